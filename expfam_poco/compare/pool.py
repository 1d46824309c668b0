"""The runs of a comparison, over worker processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from expfam_poco.compare.methods import METHODS, Settings
from expfam_poco.compare.runner import Budget, Curve, train
from expfam_poco.compare.tasks import Task
from expfam_poco.tools.jobs import run_jobs


class Run(NamedTuple):
    """One piece of work: a method's name, its settings and a seed."""

    method: str
    settings: Settings
    seed: int


Watch = Callable[[int, float, "Curve | None"], None]
"""Called with the number of a run, the passes it has spent, and its curve once it has ended."""


@dataclass(frozen=True)
class _Comparison:
    """Runs of `compare` on one task with one budget; the result is a curve."""

    task: Task
    budget: Budget

    def describe(self, job: Run) -> str:
        return f"{job.method}, seed {job.seed}"

    def do(self, job: Run, progress: Callable[[float], None]) -> Curve:
        return train(self.task, METHODS[job.method], job.settings, job.seed, self.budget, progress)


def run_all(task: Task, runs: Sequence[Run], budget: Budget, workers: int, watch: Watch) -> list[Curve]:
    """All runs of a comparison, in the order given."""

    def told(number: int, passes: float, curve: Curve | None) -> None:
        watch(number, passes if curve is None else curve.passes[-1], curve)

    return run_jobs(_Comparison(task, budget), runs, workers, told)
