"""Whether a posterior begins so wide that its first draw destroys what the weights have learnt, or never gets away."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

from expfam_poco.closures.evaluate import Closure
from expfam_poco.engine.block import Block
from expfam_poco.engine.evaluator import Evaluator

SUSPICIOUS = 0.1  # σ over the weights' scale, from which the loss is looked at
HARMLESS = 0.05  # the same, at which pretrained networks keep their outputs
PATIENCE, REACH = 1000, 0.05  # steps, and the share of its way that a precision should have gone by then
WORSE, WORSE_AT_ZERO = 0.5, 0.1  # how much a loss may grow at the first draw: of its size, and beside


class StartingWidth:
    """The deviation σ = 1/√(ess (hess_init + weight_decay)) of the first draw, held against the weights, once."""

    def __init__(self) -> None:
        self._sigma, self._scale, self._is_known = 0.0, 0.0, False

    def loss(
        self, parts: Sequence[tuple[Closure, float]], blocks: Sequence[Block], evaluator: Evaluator
    ) -> float | None:
        """The loss at the weights, which the model holds, if the noise is large for them; None, too, when asked again.

        Args:
            parts: closures and their shares of the batch.
            blocks: that are stepped; None is returned, too, where ess and hess_init do not set the width of all.
            evaluator: of closures.
        """
        if self._is_known:
            return None
        self._is_known = True
        scaled = any(getattr(closure, "scaling", None) is not None for closure, _ in parts)
        others = any(block.settings.hess_init is None for block in blocks)  # as binary ones, whose draws are far anyway
        if scaled or others or not self._is_suspicious(blocks, evaluator):
            return None
        params = [p for block in blocks for p in block.params]
        with evaluator.undone(params, [closure for closure, _ in parts]):
            return sum(share * float(evaluator.loss(closure, params)) for closure, share in parts)

    def _is_suspicious(self, blocks: Sequence[Block], evaluator: Evaluator) -> bool:
        variance = square = count = 0.0
        for block in blocks:
            settings, share = block.settings, block.share
            count += share * block.numel
            variance += share * block.numel / (settings.ess * (settings.hess_init + settings.weight_decay))  # type: ignore[operator]
            norms = [float(torch.linalg.vector_norm(p.detach(), dtype=torch.float64)) for p in block.tensors]
            square += share * sum(norm**2 for norm in norms)
        if evaluator.spread is not None:
            variance, square, count = evaluator.spread.totals([variance, square, count])
        self._sigma, self._scale = math.sqrt(variance / max(count, 1)), math.sqrt(square / max(count, 1))
        return 0.0 < self._scale < self._sigma / SUSPICIOUS

    def compare(self, at_draw: float, at_weights: float) -> None:
        """Warn if the loss is much higher at the first draw than at the weights."""
        if not at_draw - at_weights > WORSE * abs(at_weights) + WORSE_AT_ZERO:
            return
        factor = (self._sigma / (HARMLESS * self._scale)) ** 2
        warnings.warn(
            f"ess: the first draw has a loss of {at_draw:.3g}, the weights one of {at_weights:.3g}: the noise, of "
            f"standard deviation σ = {self._sigma:.2g}, is large for weights of root mean square {self._scale:.2g}; "
            f"about {float(f'{factor:.0e}'):g} times the ess (or hess_init) would keep what they have learnt, and "
            "poco.suggest_ess(model, closure) looks for the right one.",
            UserWarning,
            stacklevel=5,
        )


def check_reach(step: int, blocks: Sequence[Block]) -> None:
    """Warn at step `PATIENCE` if precisions can have moved by less than `REACH` of their way.

    A precision with the rate ρ = 1 − β₂ and the target S*, of ess (curvature + weight_decay), is after t steps

        S_t = (1−ρ)ᵗ S₀ + (1 − (1−ρ)ᵗ) S*

    so that it has gone 1 − (1−ρ)ᵗ of its way. Where one rate is that of the mean as well, its lr says all.
    """
    if step != PATIENCE:
        return
    for block in blocks:
        family, rate = block.family, block.settings.precision_lr
        way = 1.0 - (1.0 - rate) ** PATIENCE
        if len(family.momentum_block) == len(family.Site._fields) or rate in (0.0, block.settings.lr) or way >= REACH:
            continue
        warnings.warn(
            f"beta2={1.0 - rate:.10g} (precision_lr={rate:.3g}): after {PATIENCE} steps the precision of "
            f"{block.name!r} has gone {way:.1%} of its way: the posterior is as wide as hess_init made it; if its "
            f"width is wanted, give beta2=1 - 10/steps, {1.0 - 10.0 / PATIENCE:g} for as many as these "
            "(docs/optimizers.md). For training alone all is well.",
            UserWarning,
            stacklevel=5,
        )
        return
