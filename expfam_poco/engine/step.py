"""One block's step from what was measured inside and outside, tile by tile: whole, or in place where it is large.

A block that fits into memory twice is one tile, computed before anything changes. A large one is stepped tile by tile,
in place; that cannot be undone, so weights whose step would not be finite keep their values, and the error comes after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expfam_poco.correction import snapshot
from expfam_poco.correction.snapshot import Corrected
from expfam_poco.correction.variance import VarianceMeter
from expfam_poco.engine import kernels, settings
from expfam_poco.engine.backend import plainly
from expfam_poco.engine.block import Block
from expfam_poco.engine.kernels import Numbers
from expfam_poco.engine.tiles import Bucket, spans, spread
from expfam_poco.engine.trial import Trial
from expfam_poco.errors import NonFiniteError
from expfam_poco.family import fields
from expfam_poco.family.noise import NoiseKey
from expfam_poco.rule import blr

METER_WEIGHTS = 2**12  # of each large block; the meter's ratios need no more


class Step:
    """One block's step: nothing changes before `commit`.

    Args:
        state: the block's record.
        inner: what was measured at λ_in.
        outer: what was measured at λ_out, or None for a plain step.
        alpha: α of the gradient and of the curvature.
        anchor: the anchor term, where it comes from Hessian-vector products.
    """

    unsound = 0
    unsound_tiles: Tensor

    def __init__(
        self, state: dict[str, Any], inner: Trial, outer: Trial | None, alpha: tuple[float, float], anchor: Any = None
    ) -> None:
        inner.make_ready(state)
        self.block, self.state, self.inner, self.outer, self.alpha = inner.block, state, inner, outer, alpha
        self.anchor = anchor
        self.age = state["step"] + 1 if state["momentum"] else 1
        self.recipe = inner.recipe()
        if anchor is not None:
            self.recipe = replace(self.recipe, anchor_weight=0.0)

    @plainly
    def gradient_square(self) -> Tensor:
        """‖corrected gradient‖² of the momentum block."""
        numbers, values = self._numbers(1.0), []
        for tile, inside, outside, q_out in self._measured():
            arguments = (tile.cut(self.state["posterior"]), q_out, inside, outside, numbers)
            values.append(self.inner.runner.square(self.recipe, self.inner.like(tile), *arguments).cpu())
        return torch.stack(values).sum()

    @plainly
    def prepare(self, factor: float, following: NoiseKey | None = None) -> None:
        """Compute the new posterior of a block that is one tile, with the gradient times `factor`.

        Args:
            factor: of clipping by norm.
            following: the key of the draw to leave in a large model, if any.

        Raises:
            NonFiniteError, ValueError: if it is not finite or not in the domain.
        """
        self.factor, self.following = factor, following
        if self.inner.in_place:
            return
        ((tile, inside, outside, q_out),) = self._measured()
        state, prior = self.state, settings.prior_of(self.block)
        self.moved = kernels.advance(
            self.recipe, state["posterior"], state["momentum"], prior, q_out, inside, outside, self._numbers(factor),
            self.inner.like(tile), self.anchor,
        )  # fmt: skip
        if not bool(self.block.family.in_domain(self.moved.posterior)):
            raise domain_error(self.block, self.moved.posterior)

    def commit(self) -> None:
        """Make the new posterior the block's; in place, the model then holds its point or the next draw."""
        block, state = self.block, self.state
        if self.inner.in_place:
            self._advance_in_place()
            block.at_point, block.drawn = self.following is None, self.following
        else:
            state.update(posterior=self.moved.posterior, momentum=self.moved.momentum)
            block.at_point, block.drawn = False, None
        state["step"] = self.age if state["momentum"] else 0

    def _advance_in_place(self) -> None:
        block, state, numbers = self.block, self.state, self._numbers(self.factor)
        prior = spread(settings.prior_of(block), state["posterior"], block)
        real = block.real if isinstance(block, Bucket) else None
        following = None if self.following is None else replace(self.inner, key=self.following)
        unsound = []
        with block.rewritten() as out:
            for tile, inside, outside, q_out in self._measured():
                own = tile.cut(state["posterior"]), tile.cut(state["momentum"]), tile.cut(prior)
                after = None if following is None else following.source(tile, self.recipe, 0)
                arguments = (*own, q_out, inside, outside, numbers, real, after)
                unsound.append(self.inner.runner.advance(self.recipe, tile.cut(out), block.dtype, *arguments).cpu())
        self.unsound_tiles = unsound[0]
        self.unsound = int(torch.stack(unsound).sum())

    @plainly
    def meter(self, meter: VarianceMeter, number: int, keep: float | None = None) -> None:
        """Show the meter the weights, of large blocks some; `keep` is of an adaptive α, which looks at every pair."""
        if not meter.samples(number, keep is not None):
            return
        family, only = self.block.family, None
        if self.inner.in_place:
            only = next(spans(self.block, METER_WEIGHTS, most=METER_WEIGHTS))
        ((like, state, q_out, *pair, found),) = self._sites(only)
        if q_out is not None:
            terms = snapshot.variance_terms(pair[0], *snapshot.carried(family, pair[1], q_out, state))
            meter.add(self.block.name, terms, family.per_block(*self.alpha), keep)
        if meter.samples(number):
            square = blr.square_of([getattr(found.site, name) for name in family.momentum_block])
            meter.add_square(number, self.block.name, float(square) * self.block.numel / like.numel())

    def gradient(self) -> Tensor:
        """The corrected natural gradient of a family with one field, shaped and typed as the parameter."""
        (p,) = self.block.params
        out = torch.empty_like(p, memory_format=torch.contiguous_format)
        for tile, (*_, found) in zip(self.inner.tiles(), self._sites(), strict=True):
            tile.cut(out).copy_(found.site[0])
        return out

    def sites(self) -> Iterator[tuple[Any, Any, Corrected]]:
        """Tile by tile: the site inside, the one outside, and the corrected one with its anchor term."""
        yield from ((inside, outside, found) for *_, inside, outside, found in self._sites())

    def _sites(self, only: Any = None) -> Iterator[tuple[Any, ...]]:
        numbers, ess = self._numbers(1.0), self.block.group["ess"]
        for tile, inside, outside, q_out in self._measured(only):
            state, like = tile.cut(self.state["posterior"]), self.inner.like(tile)
            pair = kernels.site_pair(self.recipe, state, q_out, inside, outside, like, ess)
            found = kernels.corrected(self.recipe, state, q_out, *pair, numbers, like, self.anchor)
            yield like, state, q_out, *pair, found

    def _measured(self, only: Any = None) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Tile by tile: what was measured inside and outside (a batch that did not use the block: zero), and q_out."""
        q_out = None if self.outer is None else self.state["outer"]
        for tile in [only] if only is not None else self.inner.tiles():
            outside = None if self.outer is None else self.outer.evidence(tile, self.recipe, beside=self.inner)
            yield tile, self.inner.evidence(tile, self.recipe), outside, tile.cut(q_out)

    def _numbers(self, factor: float) -> Tensor:
        group, family = self.block.group, self.block.family
        unbias = blr.unbias_of(float(group["momentum"]), self.age, group["debias"])
        rates, alpha = settings.rates(group, self.block), family.per_block(*self.alpha)
        return Numbers(rates, alpha, float(group["ess"]), float(group["momentum"]), unbias, factor).packed()


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
