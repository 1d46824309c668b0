"""Many runs: one file each, written when it ends; what is there already and was made alike is not made again."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from expfam_poco.reproduce.data import Source
from expfam_poco.reproduce.figure import Curve
from expfam_poco.reproduce.recipe import Recipe
from expfam_poco.tools.files import written_aside
from expfam_poco.tools.jobs import run_jobs

Content = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A curve at one rate and seed."""

    label: str
    recipe: Recipe
    seed: int
    part: str = "report"

    @staticmethod
    def of(curve: Curve, rate: float, seed: int, part: str = "report") -> Job:
        """The curve's recipe with this rate."""
        return Job(curve.label, replace(curve.recipe, lr=rate), seed, part)

    def settings(self, source: Source) -> Content:
        """All that the run depends on, as JSON has it."""
        plain = {"recipe": asdict(self.recipe), "problem": type(self.recipe.problem).__name__, "random": source.random}
        loaded: Content = json.loads(json.dumps({**plain, "seed": self.seed, "part": self.part}))
        return loaded

    def path(self, folder: Path) -> Path:
        """Its file."""
        words = re.sub(r"\W+", "-", self.label.replace("×", "x").replace("α", "alpha").replace("ρ", "rho")).strip("-")
        return folder / self.part / f"{words.lower()}-lr{self.recipe.lr:g}-seed{self.seed}.json"


@dataclass(frozen=True)
class Work:
    """What workers do: train, and write the run's file."""

    folder: Path
    source: Source

    def describe(self, job: Job) -> str:
        """For errors."""
        return f"{job.label}, lr {job.recipe.lr:g}, seed {job.seed}"

    def do(self, job: Job, progress: Callable[[float], None]) -> Content:
        """One run; its content, which is in its file, too."""
        from expfam_poco.reproduce.training import Training

        training = Training(job.recipe, job.seed, job.part, self.source, self.folder / "starts")
        reason = training.run(progress)
        content = {"label": job.label, "settings": job.settings(self.source), "reason": reason}
        names = list(training.points[0])
        content["points"] = {name: [_rounded(point.get(name)) for point in training.points] for name in names}
        path = job.path(self.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as file:
            file.write(json.dumps(content, ensure_ascii=False, allow_nan=False).encode())
        return content


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def stored(job: Job, folder: Path, source: Source) -> Content | None:
    """A run's content if its file is there, whole, and of the same settings."""
    try:
        content: Content = json.loads(job.path(folder).read_text(encoding="utf-8"))
        return content if content["settings"] == job.settings(source) and content["points"]["step"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_all(jobs: Sequence[Job], folder: Path, source: Source, workers: int, err: Console, title: str) -> list[Content]:
    """All runs in the order given, with progress and time left; those that are stored are not repeated."""
    found: dict[int, Content] = {}
    for number, job in enumerate(jobs):
        content = stored(job, folder, source)
        if content is not None:
            found[number] = content
    todo = [number for number in range(len(jobs)) if number not in found]
    if todo:
        with Watch(err, title, [jobs[number] for number in todo], len(found)) as watch:
            made = run_jobs(Work(folder, source), [jobs[number] for number in todo], workers, watch)
        found.update(zip(todo, made, strict=True))
    return [found[number] for number in range(len(jobs))]


def cost(recipe: Recipe) -> float:
    """About how many evaluations a run takes, for the time left."""
    if recipe.evaluations is not None:
        return recipe.evaluations
    before = min(recipe.burn_in, recipe.steps)
    each = 2.0 + recipe.mega / recipe.every if recipe.corrected else float(recipe.later_batch)
    return before + (recipe.steps - before) * each


class Watch:
    """Progress: a bar with the time left on a terminal, a line for each finished run elsewhere."""

    def __init__(self, err: Console, title: str, jobs: Sequence[Job], kept: int) -> None:
        self.err, self.title, self.jobs, self.kept = err, title, jobs, kept
        self.costs = [cost(job.recipe) for job in jobs]
        self.shares = [0.0] * len(jobs)
        self.ended, self.began = 0, time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)

    def __enter__(self) -> Watch:
        kept = f", {self.kept} are there already" if self.kept else ""
        self.err.print(f"{self.title}: {len(self.jobs)} runs{kept}", highlight=False, markup=False)
        self.bar = self.progress.add_task(self.title, total=sum(self.costs))
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, number: int, share: float, content: Content | None) -> None:
        """A run has come so far, or has ended."""
        share = min(share, 1.0) if content is None else 1.0
        self.progress.advance(self.bar, max(share - self.shares[number], 0.0) * self.costs[number])
        self.shares[number] = max(share, self.shares[number])
        if content is None:
            return
        self.ended += 1
        job, last = self.jobs[number], {name: values[-1] for name, values in content["points"].items()}
        measure = next((f"{name} {last[name]:.4g}" for name in ("loss", "gap") if last.get(name) is not None), "")
        told = f"  {self.ended}/{len(self.jobs)} {job.label}, lr {job.recipe.lr:g}, seed {job.seed}: "
        told += content["reason"] or f"{measure} ({last['seconds']:.0f} s)"
        left = f"; {self._left():.0f} s left"
        if self.err.is_terminal:
            self.progress.update(self.bar, description=f"{self.title}: {job.label}")
        else:
            self.err.print(told + left, highlight=False, markup=False, soft_wrap=True)

    def _left(self) -> float:
        done = sum(share * each for share, each in zip(self.shares, self.costs, strict=True))
        return (time.perf_counter() - self.began) * (sum(self.costs) / max(done, 1e-9) - 1.0)
