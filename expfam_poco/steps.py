"""One block's step from what was measured inside and outside, computed as a whole and committed when all are sound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from . import blr, correction, fields, groups, posterior
from .correction import Corrected
from .measurement import View
from .meter import VarianceMeter
from .noise import NoiseKey


class WholeStep:
    """The step of a block that fits into memory beside its state: nothing changes before `commit`.

    Args:
        state: the block's record.
        inner: what was measured at λ_in.
        outer: what was measured at λ_out, or None for a plain step.
        alpha: α of the gradient and of the curvature.
        anchor: the anchor term, where it comes from Hessian-vector products.
    """

    unsound = 0

    def __init__(
        self,
        state: dict[str, Any],
        inner: View,
        outer: View | None,
        alpha: tuple[float, float],
        anchor: Any = None,
    ) -> None:
        self.block, self.state, self.inner, self.alpha = inner.block, state, inner, alpha
        self._site = site = inner.settled()
        self._pair: tuple[Any, Any] | None = None
        self.corrected = Corrected(site, None)
        if outer is None:
            return
        # A batch that does not use the block has gradient 0 and still moves by α times the mean.
        self._pair = site, outer.settled()
        self.corrected = correction.correct(
            self.block.family,
            *self._pair,
            inner.state,
            state["outer"],
            alpha=self.block.family.per_block(*alpha),
            anchor_weight=groups.anchor_weight(self.block.group) if anchor is None else 0.0,
        )
        if anchor is not None:
            self.corrected = self.corrected._replace(anchor=anchor)

    def gradient_square(self) -> Tensor:
        """‖corrected gradient‖² of the momentum block."""
        return blr.square_of([getattr(self.corrected.site, name) for name in self.block.family.momentum_block])

    def prepare(self, factor: float, following: NoiseKey | None = None) -> None:
        """Compute the new posterior, with the gradient times `factor`. The model will hold its point.

        Raises:
            NonFiniteError, ValueError: if it is not finite or not in the domain.
        """
        group, state, family = self.block.group, self.state, self.block.family
        site, anchor = self.corrected
        if factor < 1.0:
            site = fields.weigh(site, family.per_block(factor, 1.0))
        self.age = state["step"] + 1 if state["momentum"] else 1
        self.moved = blr.update(
            family,
            blr.BLRState(state["posterior"], state["momentum"]),
            groups.prior_of(self.block),
            site,
            rates=groups.rates(group, self.block),
            ess=group["ess"],
            anchor=anchor,
            momentum=group["momentum"],
            debias=group["debias"],
            step=self.age,
            clip_radius=group["clip_radius"],
            retraction=group["retraction"],
            prior_in_momentum=group["prior_in_momentum"],
        )
        if not bool(family.in_domain(self.moved.posterior)):
            raise posterior.domain_error(self.block, self.moved.posterior)

    def meter(self, meter: VarianceMeter, number: int, keep: float | None = None) -> None:
        """Show the meter the pair; `keep` is of an adaptive α, which looks at every pair."""
        if self._pair is not None and meter.samples(number, keep is not None):
            there = correction.carried(self.block.family, self._pair[1], self.state["outer"], self.inner.state)
            terms = correction.variance_terms(self._pair[0], *there)
            meter.add(self.block.name, terms, self.block.family.per_block(*self.alpha), keep)
        if meter.samples(number):
            meter.add_square(number, self.block.name, self.gradient_square())

    def sites(self) -> Iterator[tuple[Any, Any, Corrected]]:
        """The site inside, the one outside (None: a plain step), and the corrected one with its anchor term."""
        yield *(self._pair or (self._site, None)), self.corrected

    def commit(self) -> None:
        """Make the new posterior the block's."""
        momentum = self.moved.momentum
        self.state.update(posterior=self.moved.posterior, momentum=momentum, step=self.age if momentum else 0)
        self.block.at_point, self.block.drawn = False, None
