"""What is asked of a posterior beside draws: the variational objective and its parts, and what went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import fields, groups
from .errors import NonFiniteError
from .evaluation import Closure, Request, check_chunks, evaluate
from .measurement import ELBO, draw_noise
from .noise import NoiseKey

if TYPE_CHECKING:
    from .blocks import Block


class Objective(NamedTuple):
    """The evidence lower bound −(N E_q[ℓ] + KL(q ‖ p₀)) with its Monte Carlo standard error, and its two parts.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=8.0, weight_decay=0.1)
        >>> found = opt.objective([lambda: model(torch.ones(8, 2)).square().mean()], samples=4)
        >>> abs(found.elbo + 8.0 * found.expected_loss + found.kl) < 1e-6
        True
    """

    elbo: float
    standard_error: float
    expected_loss: float
    kl: float


def objective(
    blocks: Sequence[Block],
    states: Mapping[str, Any],
    closures: Sequence[Closure],
    weights: Sequence[float] | None,
    *,
    samples: int,
    seed: int,
) -> Objective:
    """Monte Carlo estimate of the objective over `samples` draws; the caller restores the weights."""
    closures, shares = check_chunks(closures, weights)
    if samples < 2:
        raise ValueError(f"samples={samples}: a standard error needs 2 draws or more.")
    sizes = {float(block.group["ess"]) for block in blocks}
    if len(sizes) != 1:
        raise ValueError(f"ess: the groups differ ({sorted(sizes)}), so there is no one objective; give all one ess.")
    (ess,) = sizes
    kl = sum(_kl(block, states[block.name]) for block in blocks)
    noises = [draw_noise(b, "shared", samples, NoiseKey(seed, ELBO)) for b in blocks]
    params = [p for block in blocks for p in block.params]

    def loss(closure: Closure) -> Tensor:
        return evaluate(closure, params, Request(gradient=False)).loss

    losses = []
    for number in range(samples):
        for block, noise in zip(blocks, noises, strict=True):
            block.write(block.family.sample(states[block.name], noise[number : number + 1])[0])
        losses.append(sum(share * float(value) for share, value in zip(shares, map(loss, closures), strict=True)))
    draws = torch.tensor(losses, dtype=torch.float64)
    mean, error = float(draws.mean()), float(draws.std() / samples**0.5)
    return Objective(-(ess * mean + kl), ess * error, mean, kl)


def mean_stddev(distributions: Mapping[str, Any]) -> float | None:
    """The mean standard deviation over all weights whose distribution knows its variance, or None."""
    total, count = 0.0, 0
    for distribution in distributions.values():
        try:
            deviation = distribution.variance.sqrt()
        except (NotImplementedError, AttributeError):
            continue
        total, count = total + float(deviation.sum()), count + deviation.numel()
    return total / count if count else None


def domain_error(block: Block, state: Any) -> Exception:
    """The error for a step that would leave the domain, or the finite numbers."""
    where = f"the posterior of {block.name!r} ({type(block.family).__name__})"
    bounded = [getattr(state, name) for name in block.family.domain]
    finite = fields.all_finite(tuple(bounded)) if bounded else fields.all_finite(state)
    if not bool(finite) or bool(block.family.in_domain(state)):
        return NonFiniteError(
            f"lr={block.group['lr']}: the step would make {where} infinite or NaN; lower lr or precision_lr, or clip "
            "(clip_radius, max_grad_norm). Nothing was changed."
        )
    if block.group["retraction"] == "plain":
        return ValueError(
            f"retraction='plain': the step would take {where} out of its domain; lower lr or precision_lr, or use "
            "retraction='second_order'. Nothing was changed."
        )
    return NonFiniteError(
        f"precision_lr: the step would take {where} out of its domain by rounding in {block.dtype}; lower lr or "
        "precision_lr, or use float64 parameters. Nothing was changed."
    )


def _kl(block: Block, state: Any) -> float:
    value = float(block.family.kl(state, groups.prior_of(block)).sum())
    if not math.isfinite(value):
        raise ValueError(
            f"weight_decay={block.group['weight_decay']}: the KL divergence from the prior of {block.name!r} is "
            f"{value}; the objective needs a proper prior."
        )
    return value
