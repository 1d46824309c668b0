"""What a step of parameters that are spread over processes needs of all parts: norms, finiteness, the meter's sums.

Sums over a block count its `share`, for other processes may have the same weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from expfam_poco.closures.processes import Processes
from expfam_poco.correction.alpha import AdaptiveAlpha
from expfam_poco.correction.variance import VarianceMeter
from expfam_poco.engine.block import Block


def failing_together(processes: Processes | None, *, stepped: bool = False) -> AbstractContextManager[None]:
    """An error of one process inside the block is raised on all; `stepped`: weights have been changed already."""
    return contextlib.nullcontext() if processes is None else processes.failing_together(stepped=stepped)


def summed(processes: Processes | None, value: Tensor) -> Tensor:
    """The sum of a number over all processes."""
    return value if processes is None else processes.sums([value.reshape(1)], 1.0)[0].reshape(())


def meter_names(blocks: Sequence[Block]) -> dict[str, str]:
    """What sums over all parts are kept by: groups of a fixed α, blocks of an adaptive one.

    How blocks are laid side by side differs from process to process.
    """
    first = {block.group_number: block.name for block in reversed(blocks)}
    return {b.name: b.name if isinstance(b.settings.alpha, AdaptiveAlpha) else first[b.group_number] for b in blocks}


def errors_together(
    errors: dict[str, dict[str, float]], blocks: Sequence[Block], processes: Processes | None
) -> dict[str, dict[str, float]]:
    """The variances of a mega-batch's mean, by block and field, summed over parts."""
    if processes is None or not errors:
        return errors
    names, shares, total = meter_names(blocks), {b.name: b.share for b in blocks}, dict[str, dict[str, float]]()
    for name, own in errors.items():
        known = total.setdefault(names[name], dict.fromkeys(own, 0.0))
        for field, value in own.items():
            known[field] += shares[name] * value
    keys = [(name, field) for name in sorted(total) for field in total[name]]
    for (name, field), value in zip(keys, processes.totals([total[n][f] for n, f in keys]), strict=True):
        total[name][field] = value
    return total


class PartsMeter:
    """Collects what blocks show a variance meter, and shows it the sums over all parts.

    Args:
        meter: of the optimizer.
        blocks: all of the optimizer's.
        processes: over which they are spread.
    """

    def __init__(self, meter: VarianceMeter, blocks: Sequence[Block], processes: Processes) -> None:
        self._meter, self._processes = meter, processes
        self._names = meter_names(blocks)
        self._terms: dict[str, tuple[Any, Tensor, tuple[float, ...], float | None]] = {}
        self._squares: dict[str, Tensor] = {}
        self._step = 0
        self.samples = meter.samples

    def add(self, name: str, terms: Any, alphas: Iterable[float], keep: float | None = None) -> None:
        """As the meter's."""
        key, sums = self._names[name], torch.stack([value.double() for term in terms for value in term])
        known = self._terms.get(key)
        total = sums if known is None else known[1] + sums
        self._terms[key] = terms, total, tuple(alphas), keep

    def add_square(self, step: int, name: str, square: Tensor, scale: float = 1.0) -> None:
        """As the meter's."""
        key, own = self._names[name], square.double() * scale
        self._squares[key] = own if key not in self._squares else self._squares[key] + own
        self._step = step

    def show(self) -> None:
        """Show the meter the sums; all processes have collected for the same names."""
        names, squares = sorted(self._terms), sorted(self._squares)
        parts = [self._terms[name][1] for name in names] + [self._squares[name] for name in squares]
        if not parts:
            return
        found = iter(self._processes.sums(parts, 1.0))
        for name in names:
            terms, _, alphas, keep = self._terms[name]
            values, size = next(found), len(terms[0])
            rows = [type(row)(*values[size * i : size * (i + 1)].unbind()) for i, row in enumerate(terms)]
            self._meter.add(name, type(terms)(*rows), alphas, keep)
        for name in squares:
            self._meter.add_square(self._step, name, next(found))
