r"""One step's mathematics on a tile of weights, as pure functions that run eagerly or compiled.

A leafwise family acts on every weight by itself, so a tensor may be cut into *tiles* and the rule applied to one after
the other: nothing larger than a tile is ever held beside the state. Three functions make a step, each reading and
writing every number once:

    draw      θ = points(λ̃, ε)                      into the model
    collect   total ← total + w ∇̃ℓ̂(θ)               where several draws or chunks are averaged
    advance   the natural gradients at λ̃ and λ_ref → corrected → the rule → λ, momentum, memory

None of them stores noise: it is looked up again (`noise`). They are made of the same family, estimator, correction and
`blr` functions as the step on whole tensors, and they know no family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.correction.base import Corrected, Correction
from expfam_poco.family import fields, hyperparameters
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Draws, Estimator
from expfam_poco.family.noise import Address, traced
from expfam_poco.family.recording import Recording
from expfam_poco.family.transfer import gathered, is_ahead
from expfam_poco.rule import blr


@dataclass(frozen=True)
class Constants:
    """What does not change from tile to tile nor, usually, from step to step: the constants of a compiled kernel.

    Args:
        family: an exponential family.
        estimator: of the natural gradient.
        correction: of the natural gradient.
        momentum: whether there is any.
        clip_radius: ξ.
        retraction: its variant.
        anchor_weight: of the anchor term.
        noise: "random", "reflected" (the antithetic partner) or "zero".
        prior_in_momentum: whether momentum averages the prior's pull, too.
        squares: whether averages of squares give every weight a rate of its own.
        watched: whether losses and gradients that are not finite are noticed here, as unsound weights.
        largest: number of the weights' dtype, where that is less than the posterior's.
    """

    family: ExponentialFamily
    estimator: Estimator
    correction: Correction
    momentum: bool
    clip_radius: float
    retraction: str
    anchor_weight: float
    noise: str = "random"
    prior_in_momentum: bool = False
    squares: bool = False
    watched: bool = False
    largest: float = math.inf

    def on(self, tile: Any) -> Constants:
        """Those of a tile: with the family's own tensors cut, if it has any."""
        family = tile.of(self.family)
        return self if family is self.family else replace(self, family=family)

    def noise_of(self, source: Tensor | Address, like: Tensor) -> Tensor:
        """ε for the weights `like`: `source` is the noise itself, or the address to look it up."""
        if self.noise == "zero":
            return self.family.neutral_noise(like)
        if isinstance(source, Address):
            shape = (*like.shape, *self.family.noise_dims)
            source = traced(self.family.noise_kind, like.numel() * numbers_of(self.family), source, like.dtype)
            source = source.view(shape)
        return self.family.reflect(source) if self.noise == "reflected" else source

    def where(self, state: Any, memory: Any, share: Any) -> Any:
        """λ̃, where the correction wants the mini-batch to be evaluated first."""
        if memory is None or not self.correction.moves:
            return state
        return self.correction.where(self.family, state, memory, share)


def is_flat(family: ExponentialFamily) -> bool:
    """Whether every number of a posterior, and of the noise, belongs to one entry, and the family has none itself."""
    own = family.event_dim or any(family.statistic_dims) or family.noise_dims
    return not own and not hyperparameters.tensors(family)


def numbers_of(family: ExponentialFamily) -> int:
    """How many numbers of noise an entry of θ takes."""
    return math.prod(family.noise_dims)


class Evidence(NamedTuple):
    """What one draw measured on a tile: its noise (or address; None: as at the first posterior), gradient and loss."""

    noise: Tensor | Address | None
    grad: Tensor
    loss: Tensor


class Numbers(NamedTuple):
    """What may change at every step: step sizes and α as Sites of numbers, N, β₁, 1 − β₁ᵗ, w_t, β₂ and 1 − β₂ᵗ of
    squares, the clipping's factor.

    Python numbers, or in a compiled kernel tensors without dimensions, so that none is taken for a constant.
    """

    rates: Any
    alpha: Any
    ess: Any
    momentum: Any
    unbias: Any
    share: Any
    squares: Any
    unsquare: Any
    factor: Any

    def packed(self, device: torch.device) -> Tensor:
        """As one float64 tensor; a factor may come of a norm that the host has not waited for."""
        return gathered([*self.known(), self.factor], device)

    def known(self) -> list[Any]:
        """All but the factor, one after the other."""
        return [*self.rates, *self.alpha, *self[2:-1]]

    def placed(self, record: Recording, name: str) -> Numbers:
        """The same in slots of a recording, whose `write` finds `known()` by the name."""
        values, kind = record.numbers(name, self.known()), type(self.rates)
        count = len(self.rates)
        rest: tuple[Any, ...] = (*values[2 * count :], self.factor)
        return Numbers(kind(*values[:count]), kind(*values[count : 2 * count]), *rest)


def unpacked(constants: Constants, numbers: Numbers | Tensor) -> Numbers:
    """The inverse of `Numbers.packed`; numbers that are not packed pass."""
    if isinstance(numbers, Numbers):
        return numbers
    values, site = numbers.unbind(), constants.family.Site
    count = len(site._fields)
    return Numbers(site(*values[:count]), site(*values[count : 2 * count]), *values[2 * count :])


class Weights(NamedTuple):
    """What is kept of a tile's weights: λ, the momentum's averages, the correction's memory, and the prior."""

    state: Any
    momentum: tuple[Tensor, ...]
    memory: Any
    prior: Any


class Moved(NamedTuple):
    """A tile's weights after a step."""

    state: Any
    momentum: tuple[Tensor, ...]
    memory: Any


def draw(constants: Constants, state: Any, memory: Any, share: Any, source: Tensor | Address, like: Tensor) -> Tensor:
    """θ = points(λ̃, ε) on a tile of weights shaped as `like`."""
    noise = constants.noise_of(source, like)
    where = constants.where(state, memory, share)
    return constants.estimator.points(constants.family, where, noise.unsqueeze(0))[0]


def site(constants: Constants, state: Any, evidence: Evidence, like: Tensor, ess: Any) -> Any:
    """The natural gradient at `state` that one draw estimates."""
    family, estimator = constants.family, constants.estimator
    assert evidence.noise is not None
    noise = constants.noise_of(evidence.noise, like).unsqueeze(0)
    grad = evidence.grad.to(like.dtype)
    pair = None if family.curvature == "none" else estimator.pair(grad, ess)
    pairs = None if pair is None else (pair[0].unsqueeze(0), pair[1].unsqueeze(0))
    theta = estimator.points(family, state, noise)
    draws = Draws(noise, theta, evidence.loss.to(like.dtype).reshape(1), grad.unsqueeze(0), None, pairs)
    return estimator.natural_gradient(family, state, draws)


def added(constants: Constants, state: Any, evidence: Evidence, weight: Any, ess: Any, like: Tensor) -> list[Tensor]:
    """What is added to a total, `weight` · natural gradient; a loss that is not finite shows in it."""
    parts = [value * weight for value in site(constants, state, evidence, like, ess)]
    if not constants.watched:
        return parts
    return [part + evidence.loss.to(part.dtype) * 0.0 for part in parts]


def site_pair(
    constants: Constants, weights: Weights, first: Any, second: Any, numbers: Numbers | Tensor, like: Tensor
) -> tuple[Any, Any]:
    """The natural gradients at λ̃ and at λ_ref (None: not measured) from `Evidence` of one draw; averaged ones pass."""
    values = unpacked(constants, numbers)
    share = values.share
    if isinstance(second, Evidence):
        if second.noise is None:
            second = second._replace(noise=first.noise)
        second = site(constants, constants.correction.reference(weights.memory), second, like, values.ess)
    if isinstance(first, Evidence):
        first = site(constants, constants.where(weights.state, weights.memory, share), first, like, values.ess)
    return first, second


def corrected(
    constants: Constants,
    weights: Weights,
    first: Any,
    second: Any,
    numbers: Numbers | Tensor,
    like: Tensor,
    anchor: Any = None,
) -> Corrected:
    """The corrected natural gradient of a tile and its anchor term; without a second one the first itself.

    `first` and `second` are the `Evidence` of one draw, or Sites averaged by `collect`; `anchor` an anchor term from
    elsewhere.
    """
    first, second = site_pair(constants, weights, first, second, numbers, like)
    if second is None:
        return Corrected(first, None)
    alpha, weight = unpacked(constants, numbers).alpha, constants.anchor_weight if anchor is None else 0.0
    found = constants.correction.correct(
        constants.family, first, second, weights.state, weights.memory, alpha=alpha, anchor_weight=weight
    )
    return found if anchor is None else found._replace(anchor=anchor)


def advance(
    constants: Constants,
    weights: Weights,
    first: Any,
    second: Any,
    numbers: Numbers | Tensor,
    like: Tensor,
    anchor: Any = None,
) -> Moved:
    """One step on a tile."""
    family, values = constants.family, unpacked(constants, numbers)
    found = corrected(constants, weights, first, second, numbers, like, anchor)
    moved = blr.update(
        family,
        blr.BLRState(weights.state, weights.momentum),
        weights.prior,
        clipped(family, found.site, values.factor),
        rates=values.rates,
        ess=values.ess,
        anchor=found.anchor,
        momentum=values.momentum if constants.momentum else 0.0,
        unbias=values.unbias,
        clip_radius=constants.clip_radius,
        retraction=constants.retraction,
        prior_in_momentum=constants.prior_in_momentum,
        squares=values.squares if constants.squares else None,
        unsquare=values.unsquare,
    )
    memory = weights.memory
    if memory is not None and constants.correction.follows_steps:
        memory = constants.correction.after_step(family, memory, weights.state, moved.posterior, found)
    return Moved(moved.posterior, moved.momentum, memory)


def clipped(family: ExponentialFamily, site: Any, factor: Any) -> Any:
    """The site with its momentum block times the factor of clipping by norm; eagerly, 1 costs nothing."""
    if isinstance(factor, float) and factor == 1.0:
        return site
    return fields.weigh(site, family.per_block(factor, 1.0))


def sound(constants: Constants, moved: Moved, like: Tensor) -> Tensor | None:
    """For every weight of a tile: all its numbers are finite and in the domain, and the model's dtype can hold it.

    None where that is so for all.
    """
    family = constants.family
    constrained = [(getattr(moved.state, name), constraint) for name, constraint in family.domain.items()]
    values = (*moved.state, *moved.momentum)
    weights = like.shape[: like.ndim - family.event_dim]
    if not torch.compiler.is_compiling() and not is_ahead(like.device):
        # A NaN or infinity survives summing: a look at sums is cheaper than one at every number.
        finite = math.isfinite(sum([(value.sum() if value.ndim else value).item() for value in values]))
        inside = finite and all([bool(constraint.check(value).all()) for value, constraint in constrained])
        if inside and constants.largest < math.inf:
            inside = bool((family.point(moved.state).abs() <= constants.largest).all())
        if inside:
            return None
    result = torch.ones(weights, dtype=torch.bool, device=like.device)
    for value in values:
        result = result & _per_weight(torch.isfinite(value), result.ndim)
    for value, constraint in constrained:
        result = result & _per_weight(constraint.check(value), result.ndim)
    if constants.largest < math.inf:
        result = result & _per_weight(family.point(moved.state).abs() <= constants.largest, result.ndim)
    return result


def noticed(constants: Constants, sound: Tensor | None, *measured: Any) -> Tensor | None:
    """Of the sound weights those for which what was `measured` (`Evidence` or averaged Sites) is finite, too."""
    if not constants.watched or sound is None:
        return sound
    for given in measured:
        values = (given.grad, given.loss) if isinstance(given, Evidence) else given or ()
        for value in values:
            finite = torch.isfinite(value)
            sound = sound & (_per_weight(finite, sound.ndim) if value.ndim else finite)
    return sound


def kept(sound: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the weight is sound, `old` elsewhere."""
    if sound is None:
        return new
    return torch.where(sound.reshape(sound.shape + (1,) * (new.ndim - sound.ndim)), new, old)


def without_gaps(site: Any, real: Tensor | None) -> Any:
    """A Site that is zero where a flat block has no weights; `real` is None for any other block."""
    return site if real is None else fields.map_fields(lambda value: torch.where(real, value, 0.0), site)


def unshared(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    """The new values of places, a copy of each that is another place's old value (a λ remembered).

    Such a value must have been read before that place is written.
    """
    # By `is`, for a compiler takes an id() for a constant.
    pairs = zip(old, new, strict=True)
    return [value.clone() if value is not place and any([value is o for o in old]) else value for place, value in pairs]


def _per_weight(values: Tensor, dims: int) -> Tensor:
    return values.flatten(dims).all(-1) if values.ndim > dims else values
