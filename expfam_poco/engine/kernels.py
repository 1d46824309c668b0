r"""One step's mathematics on a span of weights, as pure functions that run eagerly or compiled.

A leafwise family acts on every weight by itself, so a tensor may be cut into *spans* and the rule applied to one
after the other: nothing larger than a span is ever held beside the state. Three functions make a step, each reading
and writing every number once:

    draw      θ = points(λ, ε)                       into the model
    collect   total ← total + w ∇̃ℓ̂(θ)               where several draws or chunks are averaged
    advance   ∇̃ℓ̂ in and out → corrected → the rule → λ, momentum, and the point into the model

None of them stores noise: it is looked up again (`noise`). They are made of the same family, estimator, `correction`
and `blr` functions as the step on whole tensors, and they know no family.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.correction import snapshot
from expfam_poco.correction.snapshot import Outer
from expfam_poco.family import fields
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Draws, Estimator
from expfam_poco.family.noise import Address, traced
from expfam_poco.rule import blr


@dataclass(frozen=True)
class Recipe:
    """What does not change from span to span nor, usually, from step to step: the constants of a compiled kernel.

    Args:
        family: a leafwise exponential family.
        estimator: of the natural gradient.
        momentum: whether there is any.
        clip_radius: ξ.
        retraction: its variant.
        anchor_weight: of the anchor term.
        noise: "random", "reflected" (the antithetic partner) or "zero".
        prior_in_momentum: whether momentum averages the prior's pull, too.
    """

    family: ExponentialFamily
    estimator: Estimator
    momentum: bool
    clip_radius: float
    retraction: str
    anchor_weight: float
    noise: str = "random"
    prior_in_momentum: bool = False

    def noise_of(self, source: Tensor | Address, like: Tensor) -> Tensor:
        """ε for the weights `like`: `source` is the noise itself, or the address to look it up."""
        if self.noise == "zero":
            return self.family.neutral_noise(like)
        if isinstance(source, Address):
            shape = (*like.shape, *self.family.noise_dims)
            source = traced(self.family.noise_kind, like.numel() * numbers_of(self.family), source, like.dtype)
            source = source.view(shape)
        return self.family.reflect(source) if self.noise == "reflected" else source


def numbers_of(family: ExponentialFamily) -> int:
    """How many numbers of noise an entry of θ takes."""
    return math.prod(family.noise_dims)


class Evidence(NamedTuple):
    """What one draw measured on a span: its noise (or address; None: as inside), gradient and loss."""

    noise: Tensor | Address | None
    grad: Tensor
    loss: Tensor


class Numbers(NamedTuple):
    """What may change at every step: step sizes and α as Sites of numbers, N, β₁, 1 − β₁ᵗ, the clipping's factor."""

    rates: Any
    alpha: Any
    ess: Any
    momentum: Any
    unbias: Any
    factor: Any

    def packed(self) -> Tensor:
        """As one float64 tensor, so that a compiled kernel does not take them for constants."""
        return torch.tensor([*self.rates, *self.alpha, *self[2:]], dtype=torch.float64)


def unpacked(recipe: Recipe, packed: Tensor) -> Numbers:
    """The inverse of `Numbers.packed`."""
    values, site = packed.unbind(), recipe.family.Site
    count = len(site._fields)
    return Numbers(site(*values[:count]), site(*values[count : 2 * count]), *values[2 * count :])


def draw(recipe: Recipe, state: Any, source: Tensor | Address, like: Tensor) -> Tensor:
    """θ = points(λ, ε) on a span of weights shaped as `like`."""
    noise = recipe.noise_of(source, like)
    return recipe.estimator.points(recipe.family, state, noise.unsqueeze(0))[0]


def site(recipe: Recipe, state: Any, evidence: Evidence, like: Tensor, ess: Any) -> Any:
    """The natural gradient that one draw estimates."""
    family, estimator = recipe.family, recipe.estimator
    assert evidence.noise is not None
    noise = recipe.noise_of(evidence.noise, like).unsqueeze(0)
    grad = evidence.grad.to(like.dtype)
    pair = None if family.curvature == "none" else estimator.pair(grad, ess)
    pairs = None if pair is None else (pair[0].unsqueeze(0), pair[1].unsqueeze(0))
    theta = estimator.points(family, state, noise)
    draws = Draws(noise, theta, evidence.loss.to(like.dtype).reshape(1), grad.unsqueeze(0), None, pairs)
    return estimator.natural_gradient(family, state, draws)


def site_pair(
    recipe: Recipe, state: Any, outer: Outer | None, inside: Any, outside: Any, like: Tensor, ess: Any
) -> tuple[Any, Any]:
    """The sites inside and outside (None without a q_out) from the `Evidence` of one draw; averaged sites pass."""
    if outer is not None and isinstance(outside, Evidence):
        if outside.noise is None:
            outside = outside._replace(noise=inside.noise)
        outside = site(recipe, outer.posterior, outside, like, ess)
    if isinstance(inside, Evidence):
        inside = site(recipe, state, inside, like, ess)
    return inside, outside


def corrected(
    recipe: Recipe,
    state: Any,
    outer: Outer | None,
    inside: Any,
    outside: Any,
    numbers: Any,
    like: Tensor,
    anchor: Any = None,
) -> snapshot.Corrected:
    """The corrected site of a span and its anchor term; without a q_out the site itself.

    `inside` and `outside` are the `Evidence` of one draw, or sites averaged by `collect`.
    """
    _, alpha, ess, *_ = unpacked(recipe, numbers)
    inside, outside = site_pair(recipe, state, outer, inside, outside, like, ess)
    if outer is None:
        return snapshot.Corrected(inside, None)
    found = snapshot.correct(
        recipe.family, inside, outside, state, outer, alpha=alpha, anchor_weight=recipe.anchor_weight
    )
    return found if anchor is None else found._replace(anchor=anchor)


def advance(
    recipe: Recipe,
    state: Any,
    momentum: tuple[Tensor, ...],
    prior: Any,
    outer: Outer | None,
    inside: Any,
    outside: Any,
    numbers: Any,
    like: Tensor,
    anchor: Any = None,
) -> blr.BLRState:
    """One step on a span."""
    family = recipe.family
    rates, _, ess, beta, unbias, factor = unpacked(recipe, numbers)
    natural_gradient, anchor = corrected(recipe, state, outer, inside, outside, numbers, like, anchor)
    return blr.update(
        family,
        blr.BLRState(state, momentum),
        prior,
        clipped(family, natural_gradient, factor),
        rates=rates,
        ess=ess,
        anchor=anchor,
        momentum=beta if recipe.momentum else 0.0,
        unbias=unbias,
        clip_radius=recipe.clip_radius,
        retraction=recipe.retraction,
        prior_in_momentum=recipe.prior_in_momentum,
    )


def clipped(family: ExponentialFamily, site: Any, factor: Any) -> Any:
    """The site with its momentum block times the factor of clipping by norm; eagerly, 1 costs nothing."""
    if not torch.compiler.is_compiling() and float(factor) == 1.0:
        return site
    return fields.weigh(site, family.per_block(factor, 1.0))


def sound(family: ExponentialFamily, moved: blr.BLRState, like: Tensor) -> Tensor | None:
    """For every weight of a span: all its numbers are finite and in the domain; None where they all are."""
    constrained = [(getattr(moved.posterior, name), constraint) for name, constraint in family.domain.items()]
    values = (*moved.posterior, *moved.momentum)
    weights = like.shape[: like.ndim - family.event_dim]
    if not torch.compiler.is_compiling():
        # A NaN or infinity survives summing: a look at sums is cheaper than one at every number.
        finite = math.isfinite(sum(float(value.sum()) for value in values))
        if finite and all(bool(constraint.check(value).all()) for value, constraint in constrained):
            return None
    result = torch.ones(weights, dtype=torch.bool, device=like.device)
    for value in values:
        result = result & _per_weight(torch.isfinite(value), result.ndim)
    for value, constraint in constrained:
        result = result & _per_weight(constraint.check(value), result.ndim)
    return result


def kept(sound: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the weight is sound, `old` elsewhere."""
    if sound is None:
        return new
    return torch.where(sound.reshape(sound.shape + (1,) * (new.ndim - sound.ndim)), new, old)


def _per_weight(values: Tensor, dims: int) -> Tensor:
    return values.flatten(dims).all(-1) if values.ndim > dims else values
