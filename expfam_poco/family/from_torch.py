r"""`from_torch(torch.distributions.X)`: the family of a distribution that torch knows.

Three ways, the first that applies:

1. a ready-made family, with closed forms (`READY`);
2. a `torch.distributions.ExponentialFamily` of one number: its `_natural_params` λ(η) and `_log_normalizer` A. It says
   nothing of T and h; but log p(x; η) = log h(x) + ⟨λ(η), T(x)⟩ − A(λ(η)), so that with J = ∂λ/∂η at some η₀

       Jᵀ T(x) = ∂_η [ log p(x; η) + A(λ(η)) ]

3. any other distribution of one number. It is an exponential family of k parameters if and only if the matrix
   log p(x_i; η_j), its rows and columns centred, has rank k for any x and η (Pitman, Koopman, Darmois). Then

       T_j(x) = log p(x; η_j) − log p(x; η₀),     h(x) = p(x; η₀),

   are statistics for any k parameters η_j that tell them apart, and A is computed by quadrature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, transform_to
from torch.distributions.exp_family import ExponentialFamily as TorchFamily

from expfam_poco.family import quadrature
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.registry import get_family
from expfam_poco.family.written import family_from

# The registered family of a class, and what the parameters that it fixes are called there.
READY: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "Normal": ("diagonal_gaussian", {}),
    "MultivariateNormal": ("block_diagonal_gaussian", {}),
    "LogNormal": ("log_normal", {}),
    "Gamma": ("gamma", {}),
    "Exponential": ("exponential", {}),
    "Beta": ("beta", {}),
    "Dirichlet": ("dirichlet", {}),
    "VonMises": ("von_mises", {}),
    "Poisson": ("poisson", {}),
    "NegativeBinomial": ("negative_binomial", {"total_count": "count"}),
    "Weibull": ("weibull", {"concentration": "shape"}),
    "Laplace": ("laplace", {"loc": "location"}),
    "Wishart": ("wishart", {}),
}
# Those whose support always depends on the parameters, and which say so by properties.
MOVING = ("Uniform", "GeneralizedPareto")
PLACES, MEMBERS, RANK = 40, 14, 1e-9


def from_torch(distribution: type[Distribution], **fixed: float) -> ExponentialFamily:
    """The family whose members are the distributions of this class, with `fixed` parameters held at numbers.

    Args:
        distribution: a class, such as torch.distributions.Gamma.
        fixed: parameters that all members share, such as concentration=1.5 of a Weibull.

    Raises:
        TypeError: if it is no class of distributions.
        ValueError: if it is no exponential family, or not one of numbers.

    Example:
        >>> import torch, expfam_poco as poco
        >>> poco.from_torch(torch.distributions.Gamma)
        Gamma(shape=100.0)
        >>> gumbel = poco.from_torch(torch.distributions.Gumbel, scale=1.0)
        >>> gumbel.point(gumbel.centred_at(torch.tensor([0.5]))).round(decimals=4)
        tensor([0.5000])
    """
    if not (isinstance(distribution, type) and issubclass(distribution, Distribution)):
        raise TypeError(f"distribution={distribution!r}: give a class of torch.distributions, such as Gamma.")
    ready = READY.get(distribution.__name__)
    if ready is not None and distribution.__module__.startswith("torch.") and set(fixed) == set(ready[1]):
        made = get_family(ready[0])
        return made(**{ready[1][name]: value for name, value in fixed.items()})
    if distribution.__name__ in MOVING:
        raise ValueError(
            f"{distribution.__name__} is not an exponential family: its support depends on its parameters; choose a "
            "family of a fixed support, such as Beta of an interval."
        )
    member = _Member(distribution, fixed)
    try:
        _check(member)
    except (TypeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"distribution={distribution.__name__}: it cannot be made of its parameters {sorted(member.free)} "
            f"({' '.join(str(error).split())}); fix others by name, or write a class (docs/add-a-family.md)."
        ) from error
    torchs_own = issubclass(distribution, TorchFamily) and not fixed
    formulas = _stated(member) if torchs_own and len(member.natural(member.middle)) == member.size else _ratios(member)
    shown = ", ".join(f"{name}={value!r}" for name, value in fixed.items())
    support = member.at(member.middle).support
    return family_from(name=f"{distribution.__name__}({shown})", support=support, **formulas)


class _Member:
    """A class of distributions with some of its parameters free, in unconstrained coordinates η."""

    def __init__(self, kind: Any, fixed: Mapping[str, float]) -> None:
        known = getattr(kind, "arg_constraints", {})
        if not isinstance(known, Mapping) or not known:
            raise ValueError(
                f"distribution={kind.__name__}: it does not say what its parameters are (arg_constraints)."
            )
        strangers = sorted(set(fixed) - set(known))
        if strangers:
            raise ValueError(f"{kind.__name__} has no parameters {strangers}; it has {sorted(known)}.")
        free = {name: bound for name, bound in known.items() if name not in fixed}
        if "logits" in free:
            free.pop("probs", None)
        elif "logits" in fixed or "probs" in fixed:
            free = {name: bound for name, bound in free.items() if name not in ("logits", "probs")}
        if not free:
            raise ValueError(f"{kind.__name__}: all parameters are fixed; leave one or more free.")
        whole = [name for name, bound in free.items() if bound.event_dim or bound.is_discrete]
        if whole:
            raise ValueError(
                f"{kind.__name__}: the parameter {whole[0]!r} is not one real number; fix it by {whole[0]}=…, or write "
                "a class (docs/add-a-family.md)."
            )
        self.kind, self.fixed, self.free = kind, dict(fixed), free
        self._known: dict[Any, tuple[Tensor, Any]] = {}
        self.size = len(free)
        self.middle = torch.zeros(self.size, dtype=torch.float64)

    def at(self, eta: Tensor) -> Any:
        """The member at η."""
        values = {
            name: transform_to(bound)(value)
            for (name, bound), value in zip(self.free.items(), eta.unbind(), strict=True)
        }
        others = {name: torch.as_tensor(value).to(eta) for name, value in self.fixed.items()}
        return self.kind(**values, **others, validate_args=False)

    def natural(self, eta: Tensor) -> tuple[Tensor, ...]:
        """λ(η), as torch says it."""
        return tuple(self.at(eta)._natural_params)

    def log_prob(self, eta: Tensor, x: Tensor) -> Tensor:
        """log p(x; η). Making a member takes longer than some thousand densities: those asked for again are kept."""
        if torch.compiler.is_compiling():
            value: Tensor = self.at(eta.to(x)).log_prob(x)
            return value
        key = (id(eta), x.dtype, x.device)
        if key not in self._known:
            with torch.inference_mode(False):
                self._known[key] = eta, self.at(eta.to(x))  # η is kept, too, so that its id stays its own
        return torch.as_tensor(self._known[key][1].log_prob(x))

    def moved(self, number: int) -> Tensor:
        """η with one parameter elsewhere."""
        eta = self.middle.clone()
        eta[number] = 0.5
        return eta


def _check(member: _Member) -> None:
    """One number, one support, and the rank."""
    name, middle = member.kind.__name__, member.at(member.middle)
    if middle.event_shape or middle.batch_shape:
        raise ValueError(f"{name}: its members are not single numbers; write a class (docs/add-a-family.md).")
    try:
        transform = quadrature.coordinates(middle.support)
    except NotImplementedError:
        raise ValueError(
            f"{name}: its values, {middle.support}, are not a line, a half line, an interval or integers; take a "
            "family of few values, such as 'bernoulli' or 'categorical', or write a class (docs/add-a-family.md)."
        ) from None
    x = transform(torch.linspace(-4.0, 4.0, PLACES, dtype=torch.float64))
    if quadrature.is_integer(middle.support):
        x = x.round().unique()
    generator = torch.Generator().manual_seed(0)
    eta = torch.randn(MEMBERS, member.size, generator=generator, dtype=torch.float64)
    rows = torch.stack([member.log_prob(each, x) for each in eta])
    inside = all(bool(member.at(each).support.check(x).all()) for each in eta)
    if not inside or not bool(torch.isfinite(rows).all()):
        raise ValueError(
            f"{name} is not an exponential family: members have different supports; fix the parameter that bounds them."
        )
    rows = rows - rows.mean(0)
    rows = rows - rows.mean(1, keepdim=True)
    values = torch.linalg.svdvals(rows)
    rank = int((values > RANK * values[0]).sum())
    if rank > member.size:
        raise ValueError(
            f"{name} with free {sorted(member.free)} is not an exponential family: its log-densities span {rank} or "
            f"more dimensions, not {member.size}; fix parameters by name, or choose another family."
        )
    if rank < member.size:
        raise ValueError(f"{name}: only {rank} of {sorted(member.free)} can be told apart; fix the others.")


def _stated(member: _Member) -> dict[str, Any]:
    """T and h from torch's λ(η) and A."""
    eta0 = member.middle
    start = member.natural(eta0)
    jacobian = torch.func.jacrev(lambda eta: torch.stack(member.natural(eta)))(eta0)
    solver = torch.linalg.inv(jacobian.mT)

    def normalizer(*nat: Tensor) -> Tensor:
        value: Tensor = member.at(eta0.to(nat[0]))._log_normalizer(*nat)
        return value

    def statistic(number: int) -> Callable[[Tensor], Tensor]:
        def value(x: Tensor) -> Tensor:
            wide = x.double()

            def total(parts: tuple[Tensor, ...]) -> Tensor:
                at = member.kind(**_named(member, parts), validate_args=False)
                return (at.log_prob(wide) + at._log_normalizer(*at._natural_params)).sum()

            each = tuple(torch.full_like(wide, float(value)) for value in eta0)  # a parameter for every entry
            slopes = torch.stack(torch.func.grad(total)(each), -1)
            return (slopes @ solver[number].to(wide.device)).to(x.dtype)

        return value

    numbers = range(member.size)
    names = [f"eta{number}" for number in numbers]
    statistics = dict(zip(names, map(statistic, numbers), strict=True))
    if len(names) == 1 and _is_identity(statistics["eta0"], member):
        names, statistics = ["theta"], {"theta": lambda x: x}

    def log_h(x: Tensor) -> Tensor:
        linear = [value * function(x) for value, function in zip(start, statistics.values(), strict=True)]
        return member.log_prob(eta0, x) - torch.stack(linear).sum(0) + normalizer(*(v.to(x) for v in start))

    return {
        "T": statistics,
        "A": lambda nat: normalizer(*nat),
        "log_h": log_h,
        "start": {name: float(value) for name, value in zip(names, start, strict=True)},
    }


def _named(member: _Member, parts: Sequence[Tensor]) -> dict[str, Any]:
    return {name: transform_to(bound)(part) for (name, bound), part in zip(member.free.items(), parts, strict=True)}


def _is_identity(function: Callable[[Tensor], Tensor], member: _Member) -> bool:
    """Whether T(x) = x."""
    x = quadrature.coordinates(member.at(member.middle).support)(torch.linspace(-2.0, 2.0, 9, dtype=torch.float64))
    return torch.allclose(function(x), x, rtol=1e-8, atol=1e-8)


def _ratios(member: _Member) -> dict[str, Any]:
    """Log-likelihood ratios as statistics, around the member in the middle, where λ = 0."""

    def statistic(number: int) -> Callable[[Tensor], Tensor]:
        moved, middle = member.moved(number), member.middle
        return lambda x: member.log_prob(moved, x) - member.log_prob(middle, x)

    return {
        "T": {name: statistic(number) for number, name in enumerate(member.free)},
        "log_h": lambda x: member.log_prob(member.middle, x),
        "start": dict.fromkeys(member.free, 0.0),
    }


__all__ = ["READY", "from_torch"]
