r"""An inner loop of a generalised linear model as one pure function: M steps from the mini-batches' row numbers.

    for t = 1 … M:   θ = points(λ̃, ε_t);   ∇ℓ_t(θ), ∇²ℓ_t(θ) in closed form, at λ̃ and at λ_ref
                     ∇̃ → corrected → the rule → λ, momentum, memory

Each step is `kernels.advance` on what `closures.linear` measures: the same family, estimator, correction and rule as in
ordinary steps, without a closure, a graph of autograd, or a look at values. Compiled, the loop is a `scan`, which the
compiler turns into one C++ function: no Python runs between steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.closures.linear import Loss, Measured, measure
from expfam_poco.engine import kernels
from expfam_poco.engine.kernels import Constants, Moved, Numbers, Weights
from expfam_poco.family import fields
from expfam_poco.family.draws import Draws
from expfam_poco.rule import own_site


@dataclass(frozen=True)
class Kind:
    """What does not change within a loop, nor between loops of one kind.

    Args:
        constants: of the steps.
        loss: of an example.
        own_site: whether the posterior's own site is a control variate.
        sign: −1 where the loss is to become large.
        corrected: whether mini-batches are evaluated at the reference, too.
    """

    constants: Constants
    loss: Loss
    own_site: bool
    sign: float
    corrected: bool

    @property
    def curvature(self) -> str:
        """What is measured of Hessians."""
        exact = self.constants.estimator.needs == "hessian"
        return self.constants.family.curvature if exact else "none"


class Batches(NamedTuple):
    """M mini-batches: their row numbers (M × B), and each one's `Numbers` and noise (K × P)."""

    rows: Tensor
    numbers: Sequence[Numbers]
    noise: Sequence[Tensor]


def site_of(kind: Kind, state: Any, noise: Tensor, prior: Any, ess: Any, theta: Tensor, found: Measured) -> Any:
    """The natural gradient at `state` from what was measured at `theta` (K × P) for all draws."""
    family, estimator = kind.constants.family, kind.constants.estimator
    grad = (found.grad * kind.sign).view(theta.shape)
    hessian = found.hessian
    if hessian is not None:
        hessian = hessian * kind.sign
        hessian = hessian if family.curvature == "dense" else hessian.view(theta.shape)
    pairs = None
    if hessian is None and family.curvature != "none":
        pairs = estimator.pair(grad, ess)
    draws = Draws(noise, theta, found.loss * kind.sign, grad, hessian, pairs)
    if kind.own_site:
        return own_site.natural_gradient(estimator, family, state, prior, ess, draws)
    return estimator.natural_gradient(family, state, draws)


def step(kind: Kind, weights: Weights, x: Tensor, y: Tensor, numbers: Any, noise: Tensor) -> tuple[Moved, Tensor]:
    """One step on a mini-batch; the new weights and the loss."""
    constants, values = kind.constants, kernels.unpacked(kind.constants, numbers)
    family, estimator = constants.family, constants.estimator
    first = constants.where(weights.state, weights.memory, values.share)
    states = [first, constants.correction.reference(weights.memory)] if kind.corrected else [first]
    sites, losses = [], []
    for state in states:
        theta = estimator.points(family, state, noise)
        found = measure(kind.loss, theta.flatten(1), x, y, kind.curvature)
        sites.append(site_of(kind, state, noise, weights.prior, values.ess, theta, found))
        losses.append(found.loss.mean())
    second = sites[1] if kind.corrected else None
    return kernels.advance(constants, weights, sites[0], second, values, theta[0]), losses[0]


def eager(kind: Kind, weights: Weights, x: Tensor, y: Tensor, batches: Batches) -> tuple[Moved, Tensor]:
    """The loop, step by step."""
    losses = []
    for rows, numbers, noise in zip(batches.rows.unbind(), batches.numbers, batches.noise, strict=True):
        moved, loss = step(kind, weights, x[rows], y[rows], numbers, noise)
        weights = Weights(*moved, weights.prior)
        losses.append(loss)
    return Moved(*weights[:3]), torch.stack(losses)


def scanned(
    kind: Kind, x: Tensor, y: Tensor, weights: Weights, rows: Tensor, numbers: Tensor, noise: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The same as a `scan`, to be compiled: what steps change, as a list, and the losses.

    Args:
        kind: of the loop.
        x: N × d.
        y: N.
        weights: at its beginning.
        rows: M × B.
        numbers: `packed`.
        noise: M × K × P; K × P where it is zero, for a scan would lay out the copies at every step.
    """
    from torch._higher_order_ops.scan import scan

    same = kind.constants.noise == "zero"

    def one(carry: list[Tensor], batch: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        own = noise if same else batch[2]
        moved, loss = step(kind, replaced(kind, weights, carry), x[batch[0]], y[batch[0]], batch[1], own)
        new = carried(kind, Weights(*moved, weights.prior))
        return [value.clone() if any([value is old for old in carry]) else value for value in new], loss

    carry = [value.clone() for value in carried(kind, weights)]
    found: tuple[list[Tensor], Tensor] = scan(one, carry, [rows, numbers] if same else [rows, numbers, noise])
    return found


def carried(kind: Kind, weights: Weights) -> list[Tensor]:
    """The tensors that a step changes: a field without dimensions is the family's constant, and most memories stay."""
    memory = weights.memory if kind.constants.correction.follows_steps else ()
    return [value for value in fields.leaves((weights.state, weights.momentum, memory)) if value.ndim]


def replaced(kind: Kind, weights: Weights, values: Sequence[Tensor]) -> Weights:
    """`weights` with other values of what is `carried`."""
    left = iter(values)

    def other(old: Tensor) -> Tensor:
        return next(left) if old.ndim else old

    state, momentum = fields.map_leaves(other, weights.state), fields.map_leaves(other, weights.momentum)
    follows = kind.constants.correction.follows_steps
    return Weights(
        state, momentum, fields.map_leaves(other, weights.memory) if follows else weights.memory, weights.prior
    )


def packed(numbers: Sequence[Numbers]) -> Tensor:
    """The loop's numbers, one row for each step, in float64."""
    if all([own is numbers[0] for own in numbers]):
        return torch.tensor([[*numbers[0].known(), 1.0]], dtype=torch.float64).repeat(len(numbers), 1)
    return torch.tensor([[*own.known(), 1.0] for own in numbers], dtype=torch.float64)
