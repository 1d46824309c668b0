"""What the runs come to: a summary for each method, terminal tables, `results.json` and `results.csv`."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from expfam_poco.compare.methods import METHODS, Settings
from expfam_poco.compare.runner import Curve
from expfam_poco.compare.tasks import Task
from expfam_poco.tools.files import written_aside

LEVELS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
FLOOR = 1e-16
"""Below this the gap is shown as "<1e-16": float64 losses could not tell such weights from the minimum."""


@dataclass(frozen=True)
class Result:
    """One method: its settings, the curves of all seeds, and the grid if it was tuned."""

    method: str
    settings: Settings
    curves: list[Curve]
    grid: list[tuple[Settings, float]] = field(default_factory=list)

    @property
    def diverged(self) -> int:
        """How many seeds diverged."""
        return sum(bool(curve.reason) for curve in self.curves)

    def final_gaps(self) -> np.ndarray:
        """The final gap of every seed; infinite where it diverged."""
        return np.array([math.inf if curve.reason else curve.gaps[-1] for curve in self.curves])

    def median_curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Passes, steps, and the median, lowest and highest gap over seeds; diverged seeds count as infinite.

        All seeds of a method spend alike, so their records stand at the same passes.
        """
        longest = max(self.curves, key=lambda curve: len(curve.passes))
        gaps = np.full((len(self.curves), len(longest.passes)), math.inf)
        for row, curve in zip(gaps, self.curves, strict=True):
            count = len(curve.gaps) - bool(curve.reason)
            row[:count] = curve.gaps[:count]
        median, low, high = _median(gaps), gaps.min(axis=0), gaps.max(axis=0)
        return np.array(longest.passes), np.array(longest.steps), median, low, high

    def times(self) -> np.ndarray:
        """At every record of `median_curve`, the median over seeds of the CPU seconds until then."""
        longest = max(len(curve.passes) for curve in self.curves)
        whole = [curve.times for curve in self.curves if len(curve.times) == longest]
        return np.median(np.array(whole), axis=0) if whole else np.full(longest, math.nan)

    def seconds_to(self, level: float) -> float | None:
        """CPU seconds until the median gap is at or below a level for the first time; None: never."""
        there = np.flatnonzero(self.median_curve()[2] <= level)
        return _finite(self.times()[there[0]]) if len(there) else None

    def passes_to(self, level: float) -> float | None:
        """Passes until the median gap is at or below a level for the first time; None: never."""
        passes, _, median, _, _ = self.median_curve()
        there = np.flatnonzero(median <= level)
        return float(passes[there[0]]) if len(there) else None

    def summary(self) -> dict[str, Any]:
        """The row of this method in the tables, as plain numbers (None: diverged or never)."""
        gaps = self.final_gaps()
        longest = max(self.curves, key=lambda curve: curve.passes[-1])
        return {
            "method": self.method,
            "median_gap": _finite(_median(gaps)),
            "lowest_gap": _finite(gaps.min()),
            "highest_gap": _finite(gaps.max()),
            "diverged": self.diverged,
            "passes_to": {f"{level:.0e}": self.passes_to(level) for level in LEVELS},
            "seconds_to": {f"{level:.0e}": self.seconds_to(level) for level in LEVELS},
            "steps": longest.steps[-1],
            "gradient_passes": longest.passes[-1],
            "hessian_passes": longest.hessians[-1],
            "seconds": float(np.median([curve.seconds for curve in self.curves])),
        }


@dataclass(frozen=True)
class Report:
    """Everything that is written down about one comparison."""

    task: Task
    passes: float
    batch: int
    ess: float
    seeds: list[int]
    results: list[Result]
    seconds: float
    tuned: bool = False

    def show(self, console: Console) -> None:
        """Print the tables and what must be known to read them."""
        console.print(self._gaps())
        console.print(self._levels("Passes", Result.passes_to, "{:.1f}"))
        console.print(self._levels("CPU seconds", Result.seconds_to, "{:.2g}"))
        for line in self.explanations():
            console.print(line, style="dim", highlight=False, markup=False)

    def explanations(self) -> list[str]:
        """The sentences under the tables."""
        multiple = self.ess / self.task.size
        lines = [
            f"Gap: regularised loss at the posterior mean minus its minimum {self.task.minimum.loss:.6g}, which is "
            f"known to a gradient of {self.task.minimum.gradient:.0e}. Median (lowest … highest) over seeds.",
            "Passes count every gradient evaluation, of mini-batches, of θ_out and of mega-batches, in units of "
            f"N = {self.task.size}; 'Hessians' are evaluations of second derivatives, in the same unit, not in them.",
            "Seconds are those of one thread, without the gap's evaluation; saga's are whole runs', and lbfgs counts "
            "evaluations of all data as passes. Both are dedicated to such losses.",
            f"ess = {self.ess:g} = {multiple:g} N: at ess = N the best diagonal q itself has its mean above the "
            "minimum (by 1.7e-3 on breast-cancer), and that falls as 1/ess², so the default is 100 N.",
        ]
        lines += [
            f"{result.method}: {result.diverged} of {len(result.curves)} seeds diverged "
            f"({next(curve.reason for curve in result.curves if curve.reason)}); a smaller --lr "
            f"{result.method}=… may help."
            for result in self.results
            if result.diverged
        ]
        return lines + [f"{self.task.name}: {note}." for note in self.task.notes]

    def _gaps(self) -> Table:
        names = ("median", "lowest … highest", "steps", "passes", "Hessians", "s/run")
        table = _table(f"Gap on {self.task.name} after {self.passes:g} passes", names)
        for result in self.results:
            row = result.summary()
            spread = f"{show_gap(row['lowest_gap'])} … {show_gap(row['highest_gap'])}"
            table.add_row(
                result.method,
                show_gap(row["median_gap"]),
                spread,
                str(row["steps"]),
                f"{row['gradient_passes']:.1f}",
                f"{row['hessian_passes']:.1f}" if row["hessian_passes"] else "–",
                f"{row['seconds']:.1f}",
            )
        return table

    def _levels(self, what: str, until: Callable[[Result, float], float | None], shown: str) -> Table:
        table = _table(f"{what} until the median gap is at most …", [f"{level:.0e}" for level in LEVELS])
        for result in self.results:
            found = [until(result, level) for level in LEVELS]
            table.add_row(result.method, *("–" if value is None else shown.format(value) for value in found))
        return table

    def write_json(self, path: Path) -> None:
        """Settings, versions, summaries and all curves; infinite gaps are null."""
        content = {
            "settings": self._settings(),
            "versions": versions(),
            "minimum": {
                "loss": self.task.minimum.loss,
                "gradient": self.task.minimum.gradient,
                "newton_steps": self.task.minimum.steps,
            },
            "seconds": self.seconds,
            "explanations": self.explanations(),
            "methods": {
                result.method: {
                    "about": METHODS[result.method].summary,
                    "hyperparameters": result.settings,
                    "tuning": [{**change, "median_gap": _finite(gap)} for change, gap in result.grid],
                    "summary": result.summary(),
                    "curves": [_curve(curve) for curve in result.curves],
                }
                for result in self.results
            },
        }
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
        with written_aside(path) as file:
            file.write(f"{text}\n".encode())

    def _settings(self) -> dict[str, Any]:
        task = self.task
        return {
            "task": task.name,
            "examples": task.size,
            "weights": task.weights,
            "classes": list(task.classes),
            "delta": task.delta,
            "batch": self.batch,
            "passes": self.passes,
            "ess": self.ess,
            "seeds": self.seeds,
            "tuned": self.tuned,
        }

    def write_csv(self, path: Path) -> None:
        """One line for every record of every curve."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["method", "seed", "passes", "steps", "hessian_passes", "seconds", "gap"])
        for result in self.results:
            for curve in result.curves:
                rows = zip(curve.passes, curve.steps, curve.hessians, curve.times, curve.gaps, strict=True)
                writer.writerows(
                    [curve.method, curve.seed, f"{p:.6g}", s, f"{h:.6g}", f"{t:.6g}", f"{g:.9g}"]
                    for p, s, h, t, g in rows
                )
        with written_aside(path) as file:
            file.write(text.getvalue().encode())


def _table(title: str, names: Sequence[str]) -> Table:
    """A table of numbers by method, narrow enough for 80 columns."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def show_gap(gap: float | None) -> str:
    """A gap for people: two digits, "<1e-16" below what float64 losses resolve, "diverged" for None."""
    if gap is None:
        return "diverged"
    return f"<{FLOOR:.0e}" if gap < FLOOR else f"{gap:.1e}"


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version()}
    for name in ("expfam_poco", "torch", "numpy", "scikit-learn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def group_results(
    methods: Sequence[str],
    settings: Sequence[Settings],
    curves: Sequence[Curve],
    grids: dict[str, list[tuple[Settings, float]]],
) -> list[Result]:
    """Results in the order of the methods, from curves in any order."""
    return [
        Result(name, chosen, [curve for curve in curves if curve.method == name], grids.get(name, []))
        for name, chosen in zip(methods, settings, strict=True)
    ]


def _median(values: np.ndarray) -> Any:
    """The median over seeds; of an even number the upper one where the lower two differ by infinity."""
    ordered = np.sort(values, axis=0)
    low, high = ordered[(len(values) - 1) // 2], ordered[len(values) // 2]
    return np.where(np.isfinite(high), 0.5 * (low + np.where(np.isfinite(high), high, 0.0)), math.inf)


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


def _curve(curve: Curve) -> dict[str, Any]:
    content = asdict(curve)
    content["gaps"] = [_finite(gap) for gap in curve.gaps]
    return content
