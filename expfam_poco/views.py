"""Which noise goes where: the views of a block for the inner, the outer and the mega-batch evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import correction, fields, groups
from .backend import Backend
from .batched import Batched
from .blocks import Block
from .correction import Outer
from .evaluation import Closure
from .measurement import (
    FIXED,
    INNER,
    MEGA,
    OUTER,
    PROBE_INNER,
    PROBE_MEGA,
    PROBE_OUTER,
    View,
    draw_noise,
    draw_probes,
)
from .noise import NoiseKey
from .spans import can_stream
from .streaming import StreamedView, empty_site, streamed_view, update_outer


class Part(NamedTuple):
    """Which part of a step or mega-batch a view is for: its number, its share, the view of the part before it.

    `collecting`: natural gradients are summed up, so that even a single part has a total.
    """

    number: int
    share: float
    before: View | None = None
    collecting: bool = True


WHOLE = Part(0, 1.0, collecting=False)


def _carrying(view: View, part: Part) -> View:
    """The view with what the parts before it have brought."""
    view.weight = part.share
    if part.before is not None:
        view.total, view.used_before = part.before.settled(), part.before.used()
    return view


class NoisePlan(NamedTuple):
    """The noise mode, draws per evaluation, and the seed: with counters they determine every noise.

    `streamed` is the backend for blocks that are large enough to be stepped span by span, or None.
    """

    mode: str
    mc_samples: int
    seed: int
    streamed: Backend | None = None

    def inner_key(self, step: int) -> NoiseKey:
        """Where the noise of an inner step is."""
        return NoiseKey(self.seed, INNER, step)

    def at_inner(self, block: Block, state: Any, step: int, closure: Closure, part: Part = WHOLE) -> View:
        """A block at λ_in: fresh noise at every step (and for every part of it, where there are several)."""
        return self._view(block, state, closure, self.inner_key(step), NoiseKey(self.seed, PROBE_INNER, step), part)

    def at_outer(self, inner: View, state: Any, step: int, refresh: int, closure: Closure, part: Part = WHOLE) -> View:
        """The same block at λ_out; its noise is the inner one unless the mode says otherwise."""
        keys = {"independent": NoiseKey(self.seed, OUTER, step), "fixed": NoiseKey(self.seed, FIXED, refresh)}
        if isinstance(inner, StreamedView):
            key = keys.get(self.mode)
            at = inner.key if key is None else self._of_part(key, part)
            return self._streamed(inner.block, state, at, part)
        if self.mode in keys:
            probe_key = NoiseKey(self.seed, PROBE_OUTER if self.mode == "independent" else PROBE_INNER, step)
            return self._view(inner.block, state, closure, keys[self.mode], probe_key, part)
        view = View(inner.block, inner.estimator, state, inner.noise, inner.probes)
        return _carrying(view, part)

    def at_mega(self, block: Block, state: Any, chunk: int, refresh: int, closure: Closure, part: Part) -> View:
        """A block at the posterior that becomes λ_out; fresh noise for every chunk unless the mode is "fixed"."""
        fixed = self.mode == "fixed"
        key = NoiseKey(self.seed, FIXED, refresh) if fixed else NoiseKey(self.seed, MEGA, chunk)
        return self._view(block, state, closure, key, NoiseKey(self.seed, PROBE_MEGA, chunk), part)

    def outer_of(self, block: Block, state: dict[str, Any], site: Any) -> Outer:
        """The new q_out of a block from its mega-batch's mean natural gradient, which is used up."""
        if self.streamed is not None and can_stream(block):
            return update_outer(block, state, site)
        return correction.update_outer(
            block.family,
            state["outer"],
            fields.map_fields(torch.clone, state["posterior"]),
            site,
            rho=block.family.per_block(*groups.pair(block.group["rho"])),
            reanchor_average=block.group["reanchor_average"],
            anchor_weight=groups.anchor_weight(block.group),
        )

    def _streams(self, block: Block, closure: Closure) -> bool:
        return self.streamed is not None and not isinstance(closure, Batched) and can_stream(block)

    def _view(self, block: Block, state: Any, closure: Closure, key: NoiseKey, probe_key: NoiseKey, part: Part) -> View:
        if self._streams(block, closure):
            return self._streamed(block, state, self._of_part(key, part), part)
        count, estimator = self._count(closure), block.group["curvature"]
        noise = draw_noise(block, self.mode, count, self._of_part(key, part))
        evaluations = probe_key.at(draw=part.number * len(noise))
        return _carrying(
            View(block, estimator, state, noise, draw_probes(block, estimator, len(noise), evaluations)), part
        )

    def _of_part(self, key: NoiseKey, part: Part) -> NoiseKey:
        """The draws of one part of a step follow those of the parts before it; a fixed draw stays."""
        return key if key.stream == FIXED else key.at(draw=part.number * self.mc_samples)

    def _streamed(self, block: Block, state: Any, key: NoiseKey, part: Part) -> StreamedView:
        assert self.streamed is not None
        before, total = part.before, None
        if before is not None:
            total = before.settled()
        elif part.collecting:
            total = empty_site(block, state)
        view = streamed_view(
            block, state, self.streamed, self.mode, self.mc_samples, key, total=total, share=part.share
        )
        view.used_before = before is not None and before.used()
        return view

    def _count(self, closure: Closure) -> int:
        if not isinstance(closure, Batched) or closure.draws == 1:
            return self.mc_samples
        if self.mode == "fixed":
            raise ValueError(
                "noise='fixed': with PerExample every example would keep the draw of its place in the batch; use "
                "noise='shared'."
            )
        return self.mc_samples * closure.draws
