"""The live variance meter: by how much the correction lowers the spread of gradients and curvatures."""

from __future__ import annotations

from typing import Any

from .blocks import Block
from .correction import Outer, variance_ratio, variance_terms

# Prime, so that refreshes every 10 or 20 steps do not always show it the same step after them.
EVERY = 7
KEEP = 0.9


class VarianceMeter:
    """Moving averages, sampled every seventh step, of the sums in `correction.variance_terms` over all blocks."""

    def __init__(self) -> None:
        self.averages: dict[str, list[float]] = {}
        self._step = -1
        self._sums: dict[str, list[float]] = {}

    @staticmethod
    def samples(step: int) -> bool:
        """Whether this step is one of those that are sampled."""
        return step % EVERY == 0

    def add(
        self, step: int, block: Block, site_in: Any, site_out: Any, outer: Outer, alpha: tuple[float, float]
    ) -> None:
        """Take in one block's pair of sites, at the steps that are sampled."""
        if not self.samples(step):
            return
        if step != self._step:
            self._flush()
            self._step = step
        terms = variance_terms(site_in, site_out, outer)
        weights = block.family.per_block(*alpha)
        for name, term, weight in zip(terms._fields, terms, weights, strict=True):
            plain, cross, spread = (float(value) for value in term)
            corrected = variance_ratio(plain, cross, spread, weight) * plain if plain > 0.0 else 0.0
            sums = self._sums.setdefault(name, [0.0, 0.0, 0.0, 0.0])
            for i, value in enumerate((plain, cross, spread, corrected)):
                sums[i] += value

    def read(self) -> dict[str, float]:
        """For every field: the ratio corrected/plain and the α that would minimise it."""
        self._flush()
        numbers = {}
        for name, (plain, cross, spread, corrected) in self.averages.items():
            numbers[f"variance_ratio.{name}"] = corrected / plain if plain > 0.0 else float("nan")
            numbers[f"optimal_alpha.{name}"] = cross / spread if spread > 0.0 else float("nan")
        return numbers

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps."""
        self._flush()
        return {name: list(values) for name, values in self.averages.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        """Continue from a checkpoint."""
        self.averages = {name: list(values) for name, values in state.items()}
        self._sums = {}

    def _flush(self) -> None:
        for name, sums in self._sums.items():
            old = self.averages.get(name)
            new = sums if old is None else [KEEP * a + (1.0 - KEEP) * b for a, b in zip(old, sums, strict=True)]
            self.averages[name] = new
        self._sums = {}
