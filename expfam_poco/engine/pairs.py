"""One step's evaluations: every draw inside and outside, with paired random numbers and buffers that move once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco.closures.batched import Batched
from expfam_poco.closures.effects import Buffers, Record, capture_random, replay_random
from expfam_poco.closures.evaluate import Closure
from expfam_poco.engine import buckets
from expfam_poco.engine.anchors import Anchor
from expfam_poco.engine.measure import measure_batched, measure_draw, measure_variations
from expfam_poco.engine.trial import Trial


class Pairs:
    """Evaluates closures at the draws of views; only a batch's first inner evaluation moves the model's buffers."""

    def __init__(self, anchor: Anchor) -> None:
        self._anchor = anchor
        self._buffers = Buffers()
        self._moved: list[Record] = []

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """If the block raises, the buffers that its evaluations have moved go back."""
        self._moved = []
        try:
            yield
        except BaseException:
            for record in reversed(self._moved):
                record.restore()
            raise
        finally:
            self._moved = []

    @contextmanager
    def undone(self, params: Sequence[Parameter], closures: Sequence[Closure]) -> Iterator[None]:
        """After the block, random numbers and buffers are what they were."""
        with replay_random(capture_random(params)), self._buffers.kept(params, closures):
            try:
                yield
            finally:
                self._moved = []

    def evaluate(
        self, closure: Closure, inner: Sequence[Trial], outer: Sequence[Trial] | None
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Call the closure for every draw, θ_in first, both with the same random numbers.

        Returns:
            the mean loss at θ_in, and the anchor's H̄ (m_in − m_out) for every view, where it comes from products.
        """
        params = [p for view in inner for p in view.block.params]
        if isinstance(closure, Batched):
            return self._evaluate_batched(closure, params, inner, outer), None
        shift = None
        if outer is not None and self._anchor.kind != "curvature":
            with self._buffers.kept(params, self._anchor.closures()):
                shift = self._anchor.shift(inner, outer)
        losses, terms = [], []
        for draw in range(inner[0].count):
            random = capture_random(params)
            if draw == 0:
                self._moved.append(self._buffers.record(params, closure))
                losses.append(self._measure(closure, inner, draw)[0])
            else:
                with self._buffers.kept(params, closure):
                    losses.append(self._measure(closure, inner, draw)[0])
            if outer is not None:
                with replay_random(random), self._buffers.kept(params, closure):
                    products = self._measure(closure, outer, draw, shift)[1]
                if shift is not None:
                    terms.append(self._anchor.difference(products))
        mean_terms = [torch.stack(values).mean(0) for values in zip(*terms, strict=True)] if terms else None
        return torch.stack(losses).mean(), mean_terms

    def evaluate_chunk(self, closure: Closure, views: Sequence[Trial], share: float) -> Tensor:
        """Evaluate one chunk of a mega-batch, which moves no buffers, and show it to the anchor."""
        params = [p for view in views for p in view.block.params]
        with self._buffers.kept(params, closure):
            if isinstance(closure, Batched):
                loss = measure_batched(closure, views)
            else:
                loss = torch.stack([self._measure(closure, views, draw)[0] for draw in range(views[0].count)]).mean()
            self._anchor.collect(closure, views, share)
        return loss

    @staticmethod
    def _evaluate_batched(
        closure: Batched, params: Sequence[Parameter], inner: Sequence[Trial], outer: Sequence[Trial] | None
    ) -> Tensor:
        random = capture_random(params)
        if outer is None or closure.pairs:
            return measure_batched(closure, inner, *([] if outer is None else [outer]))
        loss = measure_batched(closure, inner)
        with replay_random(random):
            measure_batched(closure, outer)
        return loss

    def _measure(
        self, closure: Closure, views: Sequence[Trial], draw: int, product_with: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """One draw of all views, added to the totals of those that keep one."""
        varying = any(view.estimator.needs == "variations" for view in views)
        params = [p for view in views for p in view.block.params]
        random = capture_random(params) if varying else None
        measured = measure_draw(closure, views, draw, product_with, together=buckets.together)
        if random is not None:
            with self._buffers.kept(params, closure):
                measure_variations(closure, views, draw, lambda: replay_random(random))
        buckets.collect(views, draw)
        return measured
