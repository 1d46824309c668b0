"""Which noise goes where: the views of a block for the inner, the outer and the mega-batch evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple

from .blocks import Block
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
from .per_example import PerExample


class NoisePlan(NamedTuple):
    """The noise mode, draws per evaluation, and the seed: with counters they determine every noise."""

    mode: str
    mc_samples: int
    seed: int

    def at_inner(self, block: Block, state: Any, step: int, closure: Closure) -> View:
        """A block at λ_in: fresh noise at every step."""
        noise = draw_noise(block, self.mode, self._count(closure), NoiseKey(self.seed, INNER, step))
        estimator = block.group["curvature"]
        probes = draw_probes(block, estimator, len(noise), NoiseKey(self.seed, PROBE_INNER, step))
        return View(block, estimator, state, noise, probes)

    def at_outer(self, inner: View, state: Any, step: int, refresh: int) -> View:
        """The same block at λ_out; its noise is the inner one unless the mode says otherwise."""
        block, noise, probes = inner.block, inner.noise, inner.probes
        if self.mode == "independent":
            noise = draw_noise(block, self.mode, len(noise), NoiseKey(self.seed, OUTER, step))
            probes = draw_probes(block, inner.estimator, len(noise), NoiseKey(self.seed, PROBE_OUTER, step))
        elif self.mode == "fixed":
            noise = draw_noise(block, self.mode, len(noise), NoiseKey(self.seed, FIXED, refresh))
        return View(block, inner.estimator, state, noise, probes)

    def at_mega(self, block: Block, state: Any, chunk: int, refresh: int, closure: Closure) -> View:
        """A block at the posterior that becomes λ_out; fresh noise for every chunk unless the mode is "fixed"."""
        fixed = self.mode == "fixed"
        key = NoiseKey(self.seed, FIXED, refresh) if fixed else NoiseKey(self.seed, MEGA, chunk)
        noise = draw_noise(block, self.mode, self._count(closure), key)
        estimator = block.group["curvature"]
        probes = draw_probes(block, estimator, len(noise), NoiseKey(self.seed, PROBE_MEGA, chunk))
        return View(block, estimator, state, noise, probes)

    def _count(self, closure: Closure) -> int:
        if not isinstance(closure, PerExample):
            return self.mc_samples
        if self.mode == "fixed":
            raise ValueError(
                "noise='fixed': with PerExample every example would keep the draw of its place in the batch; use "
                "noise='shared'."
            )
        return self.mc_samples * len(closure)
