"""How much a correction lowers the variance, measured over mini-batches at one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expfam_poco.correction.snapshot import variance_ratio


class _Moments:
    """Sums for the variances and the covariance of two quantities, shifted by their first values, in float64."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self._shifts = first.double(), second.double()
        self._count = 0
        self._sums = [torch.zeros_like(shift) for shift in self._shifts]
        self._products = [0.0, 0.0, 0.0]

    def add(self, first: Tensor, second: Tensor) -> None:
        a, b = first.double() - self._shifts[0], second.double() - self._shifts[1]
        self._count += 1
        for total, value in zip(self._sums, (a, b), strict=True):
            total += value
        for i, (x, y) in enumerate(((a, a), (a, b), (b, b))):
            self._products[i] += float((x * y).sum())

    def read(self) -> tuple[float, float, float]:
        """Var(first), Cov(first, second), Var(second), unbiased, summed over entries."""
        a, b = self._sums
        outer = [float((x * y).sum()) / self._count for x, y in ((a, a), (a, b), (b, b))]
        found = [(p - o) / (self._count - 1) for p, o in zip(self._products, outer, strict=True)]
        return found[0], found[1], found[2]


class DrawMoments:
    """The mean of natural gradients of several draws, and the variance of that mean, shifted by the first."""

    def __init__(self, first: Any) -> None:
        self._first = type(first)(*(value.clone() for value in first))
        self._sum = type(first)(*(torch.zeros_like(value) for value in first))
        self._squares = dict.fromkeys(first._fields, 0.0)
        self._count = 1

    def add(self, site: Any) -> None:
        """One more draw."""
        self._count += 1
        for name, value, first, total in zip(site._fields, site, self._first, self._sum, strict=True):
            off = value - first
            total += off
            self._squares[name] += float(off.double().square().sum())

    def mean(self) -> Any:
        """Over all draws."""
        return type(self._first)(*(a + b / self._count for a, b in zip(self._first, self._sum, strict=True)))

    def variance(self) -> dict[str, float]:
        """Of the mean, for every field, summed over its entries."""
        count = self._count
        sums = {name: float(value.double().square().sum()) for name, value in self._sum._asdict().items()}
        return {name: max(0.0, self._squares[name] - s / count) / (count * (count - 1)) for name, s in sums.items()}


class PairedVariance:
    """Collects the sites of steps that are not taken, and compares plain and corrected estimates of every field."""

    def __init__(self) -> None:
        self._moments: dict[tuple[Any, ...], _Moments] = {}

    def add(self, steps: Sequence[Any]) -> None:
        """One mini-batch's steps of all blocks."""
        for step in steps:
            for number, (inside, outside, corrected) in enumerate(step.sites()):
                anchored = corrected.site
                if corrected.anchor is not None:
                    anchored = type(anchored)(*(a + b for a, b in zip(anchored, corrected.anchor, strict=True)))
                for i, name in enumerate(inside._fields):
                    key = step.block.name, number, name
                    self._put((*key, "pair"), inside[i], outside[i])
                    self._put((*key, "corrected"), corrected.site[i], anchored[i].expand_as(inside[i]))

    def _put(self, key: tuple[Any, ...], first: Tensor, second: Tensor) -> None:
        if key not in self._moments:
            self._moments[key] = _Moments(first, second)
        self._moments[key].add(first, second)

    def read(self) -> dict[str, float]:
        """For every field the ratios and the α of least variance, over all blocks."""
        names = dict.fromkeys(key[2] for key in self._moments)
        numbers = {}
        for name in names:
            plain, cross, outer = self._total(name, "pair")
            corrected, _, anchored = self._total(name, "corrected")
            numbers[f"variance.{name}"] = plain
            numbers[f"variance_ratio.{name}"] = corrected / plain if plain > 0.0 else float("nan")
            numbers[f"anchored_variance_ratio.{name}"] = anchored / plain if plain > 0.0 else float("nan")
            alpha = cross / outer if outer > 0.0 else float("nan")
            numbers[f"optimal_alpha.{name}"] = alpha
            numbers[f"optimal_variance_ratio.{name}"] = variance_ratio(plain, cross, outer, alpha)
        return numbers

    def _total(self, name: str, kind: str) -> tuple[float, float, float]:
        rows = [moments.read() for key, moments in self._moments.items() if key[2:] == (name, kind)]
        first, both, second = (sum(values) for values in zip(*rows, strict=True))
        return first, both, second
