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

    def at_inner(self, block: Block, state: Any, step: int, closure: Closure) -> View:
        """A block at λ_in: fresh noise at every step."""
        if self._streams(block, closure):
            return self._streamed(block, state, self.inner_key(step))
        noise = draw_noise(block, self.mode, self._count(closure), self.inner_key(step))
        estimator = block.group["curvature"]
        probes = draw_probes(block, estimator, len(noise), NoiseKey(self.seed, PROBE_INNER, step))
        return View(block, estimator, state, noise, probes)

    def at_outer(self, inner: View, state: Any, step: int, refresh: int) -> View:
        """The same block at λ_out; its noise is the inner one unless the mode says otherwise."""
        if isinstance(inner, StreamedView):
            keys = {"independent": NoiseKey(self.seed, OUTER, step), "fixed": NoiseKey(self.seed, FIXED, refresh)}
            return self._streamed(inner.block, state, keys.get(self.mode, inner.key))
        block, noise, probes = inner.block, inner.noise, inner.probes
        if self.mode == "independent":
            noise = draw_noise(block, self.mode, len(noise), NoiseKey(self.seed, OUTER, step))
            probes = draw_probes(block, inner.estimator, len(noise), NoiseKey(self.seed, PROBE_OUTER, step))
        elif self.mode == "fixed":
            noise = draw_noise(block, self.mode, len(noise), NoiseKey(self.seed, FIXED, refresh))
        return View(block, inner.estimator, state, noise, probes)

    def at_mega(
        self, block: Block, state: Any, chunk: int, refresh: int, closure: Closure, total: Any, share: float
    ) -> View:
        """A block at the posterior that becomes λ_out; fresh noise for every chunk unless the mode is "fixed".

        A streamed view adds `share` of its natural gradient to `total`.
        """
        fixed = self.mode == "fixed"
        key = NoiseKey(self.seed, FIXED, refresh) if fixed else NoiseKey(self.seed, MEGA, chunk)
        if self._streams(block, closure):
            return self._streamed(block, state, key, total=total, share=share)
        noise = draw_noise(block, self.mode, self._count(closure), key)
        estimator = block.group["curvature"]
        probes = draw_probes(block, estimator, len(noise), NoiseKey(self.seed, PROBE_MEGA, chunk))
        return View(block, estimator, state, noise, probes)

    def empty_total(self, block: Block, state: Any, closure: Closure) -> Any:
        """What the chunks of a mega-batch are added up in: zeros where the block streams, else None."""
        return empty_site(block, state) if self._streams(block, closure) else None

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
        )

    def _streams(self, block: Block, closure: Closure) -> bool:
        return self.streamed is not None and not isinstance(closure, Batched) and can_stream(block)

    def _streamed(self, block: Block, state: Any, key: NoiseKey, **collecting: Any) -> StreamedView:
        assert self.streamed is not None
        return streamed_view(block, state, self.streamed, self.mode, self.mc_samples, key, **collecting)

    def _count(self, closure: Closure) -> int:
        if not isinstance(closure, Batched) or closure.draws == 1:
            return self.mc_samples
        if self.mode == "fixed":
            raise ValueError(
                "noise='fixed': with PerExample every example would keep the draw of its place in the batch; use "
                "noise='shared'."
            )
        return self.mc_samples * closure.draws
