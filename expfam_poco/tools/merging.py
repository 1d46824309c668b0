"""Posteriors of several data sets made one: sites are multiplied, that is, natural parameters are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from expfam_poco.arguments import instance
from expfam_poco.family import fields
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.registry import resolve_family


@torch.no_grad()
def merge(
    posteriors: Sequence[Mapping[str, Any]],
    prior: Any,
    family: ExponentialFamily | type[ExponentialFamily] | str,
) -> dict[str, Any]:
    r"""The posterior of all data, from posteriors of its parts that had one prior.

    Each part's site is what it has made of the prior, t_k = q_k / p₀, and sites of independent data multiply:

        q ∝ p₀ Π_k q_k / p₀,      λ = λ₀ + Σ_k (λ_k − λ₀)

    For conjugate likelihoods this is exact; else each q_k is an approximation of its own, and so is q.

    Args:
        posteriors: States by the parameters' names, as `optimizer.posterior_states()` gives them; at least one.
        prior: p₀, a State for all or a dictionary of them by name; its fields broadcast to the posteriors'.
        family: of the posteriors, by name, class or object.

    Returns:
        States by name, for `optimizer.set_posterior`, `optimizer.set_outer` or `prior=`.

    Raises:
        ValueError: for posteriors of other names, families or shapes than the first, for a prior that is no member, a
            curved family, or a sum outside the domain; the sentence names the parameter.

    Example:
        >>> import torch, expfam_poco as poco
        >>> gaussian = poco.resolve_family("diagonal_gaussian")
        >>> prior = gaussian.centred_at(torch.zeros(1), 1.0)
        >>> ones = {"w": gaussian.centred_at(torch.ones(1), 3.0)}  # the site has precision 2 and mean 1.5
        >>> poco.merge([ones, ones], prior, gaussian)["w"]
        GaussianState(mean=tensor([1.2000]), precision=tensor([5.]))
    """
    if not isinstance(posteriors, Sequence) or not posteriors:
        raise ValueError("posteriors: give a list of what posterior_states() returns, at least one.")
    for states in posteriors:
        instance("posteriors", states, Mapping, "give a list of what posterior_states() returns")
    first = posteriors[0]
    for number, states in enumerate(posteriors):
        if set(states) != set(first):
            raise ValueError(
                f"posteriors[{number}]: its parameters are {sorted(states)}, those of the first {sorted(first)}; give "
                "posteriors of one model."
            )
    chosen = resolve_family(family)
    families = dict.fromkeys(first, chosen)
    for part, _, indices in chosen.parts_of(list(first)) or ():
        families.update({list(first)[index]: part for index in indices})
    return {
        name: _merged(name, [states[name] for states in posteriors], prior, families[name].for_shape(own[0].shape))
        for name, own in first.items()
    }


def _merged(name: str, states: Sequence[Any], prior: Any, family: ExponentialFamily) -> Any:
    if family.curved:
        raise ValueError(
            f"posteriors: {name!r} has a {type(family).__name__}, whose natural parameters lie on a surface that sums "
            "leave; merge family.expand(state) in family.ambient."
        )
    own: Any = prior.get(name) if isinstance(prior, Mapping) else prior
    shapes = [value.shape for value in states[0]]
    for number, state in enumerate([*states, own]):
        what = f"posteriors[{number}]" if number < len(states) else "prior"
        if not isinstance(state, family.State):
            raise ValueError(
                f"{what}: {name!r} has a {type(state).__name__} where {type(family).__name__} needs a "
                f"{family.State.__name__}; give states of one family."
            )
        if number < len(states) and [value.shape for value in state] != shapes:
            raise ValueError(f"{what}: {name!r} has another shape than in the first; give posteriors of one model.")
    like = states[0]
    try:
        own = fields.map_fields(lambda value, ours: value.to(ours).expand_as(ours), own, like)
    except RuntimeError:
        raise ValueError(
            f"prior: it has shapes {[tuple(v.shape) for v in own]} for {name!r}, whose are "
            f"{[tuple(s) for s in shapes]}; give one that broadcasts to them."
        ) from None
    base = family.to_nat(own)
    if not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(family.from_nat(base), own, strict=True)):
        raise ValueError(
            f"prior: for {name!r} it is no member of {family!r}, as one of another fixed precision is none; give a "
            "prior of the family."
        )
    total = base
    for state in states:
        site = fields.subtract(family.to_nat(fields.map_fields(lambda value, ours: value.to(ours), state, like)), base)
        total = fields.add(total, site)
    merged = family.from_nat(total)
    if not bool(family.in_domain(merged)):
        raise ValueError(
            f"posteriors: the sum of {len(states)} sites lies outside the domain of {type(family).__name__} for "
            f"{name!r}, because some posteriors are wider than the prior; give each part the same, wider prior, train "
            "it longer, or merge fewer."
        )
    return merged
