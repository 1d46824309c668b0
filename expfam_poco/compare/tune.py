"""`--tune`: the same number of grid points for every method, on seeds that are never reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from expfam_poco.compare.methods import Method, Settings
from expfam_poco.compare.pool import Run, Watch, run_all
from expfam_poco.compare.runner import Budget, Curve
from expfam_poco.compare.tasks import Task

FIRST_SEED = 1_000_000
"""Tuning seeds count up from here; reported seeds must stay below."""

SEEDS = 2
FLOOR = 1e-16
"""Gaps below this are equal: the earlier to get there wins."""

FINE = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
COARSE = (0.35, 0.7, 1.0, 2.0)
POINTS = len(FINE)


class Tuned(NamedTuple):
    """The best settings of one method, with the median final gap of every grid point tried."""

    settings: Settings
    grid: list[tuple[Settings, float]]


def grid(settings: Settings) -> list[Settings]:
    """Eight points around the defaults: four rates × two hess_init where there is one, eight rates otherwise."""
    if "hess_init" in settings:
        changes = [
            {"lr": settings["lr"] * factor, "hess_init": settings["hess_init"] * other}
            for factor in COARSE
            for other in (1.0, 0.1)
        ]
    else:
        changes = [{"lr": settings["lr"] * factor} for factor in FINE]
    return [{name: float(f"{value:.3g}") for name, value in change.items()} for change in changes]


def tune(
    task: Task,
    methods: Sequence[tuple[Method, Settings]],
    budget: Budget,
    workers: int,
    watch: Watch,
) -> dict[str, Tuned]:
    """Search every method's grid with the budget that will be reported.

    The best point has the lowest median final gap; a run that diverged counts as infinite.
    """
    points = [(method, settings, change) for method, settings in methods for change in grid(settings)]
    runs = [
        Run(method.name, {**settings, **change}, FIRST_SEED + seed)
        for method, settings, change in points
        for seed in range(SEEDS)
    ]
    curves = run_all(task, runs, budget, workers, watch)
    found: dict[str, Tuned] = {}
    for method, settings in methods:
        tried = []
        for number, (owner, _, change) in enumerate(points):
            if owner is method:
                tried.append((change, score(curves[number * SEEDS : (number + 1) * SEEDS])))
        best = min(tried, key=lambda pair: pair[1])[0]
        grid_gaps = [(change, gap) for change, (gap, _) in tried]
        found[method.name] = Tuned({**settings, **best}, grid_gaps)
    return found


def tuning_runs(methods: int) -> int:
    """How many runs `tune` makes for so many methods."""
    return methods * POINTS * SEEDS


def score(curves: Sequence[Curve]) -> tuple[float, float]:
    """The median final gap and, among those at machine precision, the median passes it took."""
    gaps, passes = [], []
    for curve in curves:
        final = curve.gaps[-1] if not curve.reason else math.inf
        there = [spent for spent, gap in zip(curve.passes, curve.gaps, strict=True) if gap <= FLOOR]
        gaps.append(max(final, FLOOR))
        passes.append(there[0] if there else math.inf)
    return float(np.median(gaps)), float(np.median(passes))
