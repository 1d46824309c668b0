"""Progress of many runs: live bars on a terminal, one line for each finished run elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from expfam_poco.compare.pool import Run
from expfam_poco.compare.report import show_gap
from expfam_poco.compare.runner import Curve


class Display:
    """A context manager to hand to `run_all` as its `watch`.

    Args:
        console: where to show it (standard error, so that standard output stays a report).
        title: what is going on.
        runs: the runs, in the order of their numbers.
        passes: the budget of one run.
        lines: print a line for each finished run where the console is no terminal.
    """

    def __init__(self, console: Console, title: str, runs: Sequence[Run], passes: float, lines: bool = True) -> None:
        self.console = console
        self.title = title
        self.runs = runs
        self.passes = passes
        self.lines = lines
        self.spent = [0.0] * len(runs)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[last]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.bars: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        if not self.console.is_terminal:
            self.console.print(f"{self.title}: {len(self.runs)} runs of {self.passes:g} passes", highlight=False)
        names = list(dict.fromkeys(run.method for run in self.runs))
        width = max(map(len, names), default=0)
        for name in names:
            count = sum(run.method == name for run in self.runs)
            description = f"{self.title} {name:<{width}}"
            self.bars[name] = self.progress.add_task(description, total=count, last="")
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, number: int, passes: float, curve: Curve | None) -> None:
        """Show that a run has spent so many passes, or has ended."""
        run = self.runs[number]
        share = 1.0 if curve is not None else min(passes / self.passes, 1.0)
        self.progress.advance(self.bars[run.method], max(share - self.spent[number], 0.0))
        self.spent[number] = max(share, self.spent[number])
        if curve is None:
            return
        gap = "diverged" if curve.reason else f"gap {show_gap(curve.gaps[-1])}"
        self.progress.update(self.bars[run.method], last=gap)
        if not self.console.is_terminal and self.lines:
            self.console.print(
                f"  {run.method}, seed {run.seed}: {gap} after {curve.passes[-1]:.1f} passes ({curve.seconds:.1f} s)",
                highlight=False,
            )
