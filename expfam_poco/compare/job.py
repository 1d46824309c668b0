"""The main job in order: task, settings, tuning, runs, report. The command line is a thin layer over `compare`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.console import Console

from expfam_poco.compare import plot
from expfam_poco.compare.methods import METHODS, Method, Settings, check_settings, default_methods, find_methods
from expfam_poco.compare.pool import Run, run_all
from expfam_poco.compare.progress import Display
from expfam_poco.compare.report import Report, Result, group_results
from expfam_poco.compare.runner import Budget
from expfam_poco.compare.tasks import BUILT_IN, Task, load_csv, load_task
from expfam_poco.compare.tune import FIRST_SEED, SEEDS, Tuned, grid, tune
from expfam_poco.errors import InputError
from expfam_poco.tools.jobs import worker_count

ESS_MULTIPLE = 100.0
WHOLE = ("chunks", "inner")


@dataclass(frozen=True)
class Options:
    """What the command line asks for; the names are those of its options.

    `lr` and `set` hold "VALUE" (for every method that has it) or "METHOD=VALUE"; `set` has "NAME=VALUE" and
    "METHOD.NAME=VALUE". `ess` is a number, or a multiple of the number of examples such as "100N".
    """

    task: str = "breast-cancer"
    data: Path | None = None
    target: str | None = None
    methods: Sequence[str] = ()
    lr: Sequence[str] = ()
    set: Sequence[str] = ()
    passes: float = 20.0
    seeds: int = 3
    first_seed: int = 0
    batch: int = 5
    delta: float | None = None
    ess: str | None = None
    noise: str | None = None
    curvature: str | None = None
    tune: bool = False
    output: Path = field(default_factory=lambda: Path("expfam-poco-results"))
    workers: int | None = None


def compare(options: Options, out: Console, err: Console) -> Report:
    """Do the main job, write its files, and return the report.

    Args:
        options: what to do.
        out: where the report goes.
        err: where progress and remarks go.

    Raises:
        InputError: for wrong input, before any work begins.
    """
    started = time.perf_counter()
    workers = worker_count(options.workers)
    task = _task(options)
    budget = _budget(options, task)
    seeds = _seeds(options)
    chosen = _methods(options, task)
    folder = writable_folder(options.output)
    if not plot.plotting_available():
        err.print(plot.MISSING, highlight=False, markup=False)
    minimum = task.minimum
    err.print(
        f"{task.name}: {task.size} examples, {task.weights} weights, δ = {task.delta:g}; "
        f"minimum {minimum.loss:.6g} found to a gradient of {minimum.gradient:.0e}",
        highlight=False,
        markup=False,
    )
    tunable = [pair for pair in chosen if not pair[0].solver]
    tuned = _tune(task, tunable, budget, workers, err) if options.tune and tunable else {}
    settings = [tuned[method.name].settings if method.name in tuned else plain for method, plain in chosen]
    names = [method.name for method, _ in chosen]
    runs = [Run(name, plain, seed) for name, plain in zip(names, settings, strict=True) for seed in seeds]
    # Dense methods take longest; started first, they leave no worker idle at the end.
    runs.sort(key=lambda run: not METHODS[run.method].dense)
    with Display(err, "comparing", runs, budget.passes) as display:
        curves = run_all(task, runs, budget, workers, display)
    results = group_results(names, settings, curves, {name: found.grid for name, found in tuned.items()})
    report = Report(
        task,
        budget.passes,
        budget.batch,
        settings[0]["ess"],
        seeds,
        results,
        time.perf_counter() - started,
        options.tune,
    )
    _show_settings(results, out)
    report.show(out)
    _write(report, folder, out)
    return report


def _task(options: Options) -> Task:
    if options.data is None:
        if options.target is not None:
            raise InputError(f"--target {options.target!r} belongs to --data FILE; give both, or choose a --task.")
        return load_task(options.task, options.delta)
    if options.target is None:
        raise InputError(f"--data {options.data}: say which column to predict by --target COLUMN.")
    return load_csv(options.data, options.target, options.delta)


def _budget(options: Options, task: Task) -> Budget:
    if not (math.isfinite(options.passes) and options.passes > 0.0):
        raise InputError(f"--passes {options.passes:g}: give a positive number of passes, such as 20.")
    if not 1 <= options.batch <= task.size:
        raise InputError(
            f"--batch {options.batch}: {task.name} has {task.size} examples; give a number from 1 to {task.size}."
        )
    return Budget(options.passes, options.batch)


def _seeds(options: Options) -> list[int]:
    if options.seeds < 1:
        raise InputError(f"--seeds {options.seeds}: give at least one.")
    if not 0 <= options.first_seed <= FIRST_SEED - options.seeds:
        raise InputError(
            f"--first-seed {options.first_seed}: seeds from {FIRST_SEED} on are kept for --tune; "
            f"give a number from 0 to {FIRST_SEED - options.seeds}."
        )
    return list(range(options.first_seed, options.first_seed + options.seeds))


def _ess(text: str | None, task: Task) -> float:
    if text is None:
        return ESS_MULTIPLE * task.size
    number = text.strip()
    scale = 1.0
    if number.upper().endswith("N"):
        number, scale = number[:-1], float(task.size)
    try:
        value = float(number) * scale if number else scale
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0.0):
        raise InputError(f"--ess {text!r}: give a positive number, or a multiple of N such as 100N.")
    return value


def _methods(options: Options, task: Task) -> list[tuple[Method, Settings]]:
    """The methods with the settings they start from, each built once to see that they are in range."""
    methods = find_methods(options.methods or default_methods(task))
    common = {"delta": task.delta, "ess": _ess(options.ess, task)}
    chosen = []
    for method in methods:
        settings = _base_settings(method, task, options) | common
        chosen.append((method, settings))
    for text in options.lr:
        owner, _, value = text.rpartition("=")
        _assign(chosen, f"--lr {text}", owner, "lr", value)
    for text in options.set:
        name, equals, value = text.partition("=")
        owner, _, name = name.rpartition(".")
        if not equals:
            raise InputError(f"--set {text}: write NAME=VALUE or METHOD.NAME=VALUE.")
        _assign(chosen, f"--set {text}", owner, name.strip(), value)
    for method, settings in chosen:
        check_settings(method, settings)
    return chosen


def _base_settings(method: Method, task: Task, options: Options) -> Settings:
    if options.curvature == "exact" and method.exact:
        settings = METHODS[method.exact].settings(task, options.batch)
    else:
        settings = method.settings(task, options.batch)
    if not method.literal:
        asked = {"noise": options.noise, "curvature": options.curvature}
        settings |= {name: value for name, value in asked.items() if value is not None and name in settings}
    return settings


def _assign(chosen: Sequence[tuple[Method, Settings]], option: str, owner: str, name: str, text: str) -> None:
    """Put a value into the settings of one method, or of all that have it."""
    owner = owner.strip().lower()
    names = ", ".join(method.name for method, _ in chosen)
    mine = [settings for method, settings in chosen if owner in ("", method.name.lower())]
    if not mine:
        raise InputError(f"{option}: that method is not compared; choose from {names}.")
    having = [settings for settings in mine if name in settings and name not in ("delta", "ess")]
    if not having:
        known = ", ".join(sorted(set().union(*mine) - {"delta", "ess"}))
        raise InputError(f"{option}: there is no setting {name!r}; choose from {known}.")
    for settings in having:
        settings[name] = _value(option, name, text, settings[name])


def _value(option: str, name: str, text: str, present: Any) -> Any:
    if isinstance(present, str):
        return text.strip()
    try:
        value = float(text)
        if name in WHOLE and not value.is_integer():
            raise ValueError
    except ValueError:
        kind = "whole number" if name in WHOLE else "number"
        raise InputError(f"{option}: {text!r} is not a {kind}; give one.") from None
    return int(value) if name in WHOLE else value


def _tune(
    task: Task, chosen: Sequence[tuple[Method, Settings]], budget: Budget, workers: int, err: Console
) -> dict[str, Tuned]:
    runs = [
        Run(method.name, settings, FIRST_SEED + seed)
        for method, settings in chosen
        for _ in grid(settings)
        for seed in range(SEEDS)
    ]
    with Display(err, "tuning", runs, budget.passes, lines=False) as display:
        return tune(task, chosen, budget, workers, display)


def writable_folder(folder: Path) -> Path:
    """The folder, made if need be and tried out.

    Raises:
        InputError: if it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"--output {folder}: cannot be written to ({error.strerror}); choose another folder."
        ) from error
    return folder


def _show_settings(results: Sequence[Result], out: Console) -> None:
    """One line for each method: its hyperparameters."""
    width = max(len(result.method) for result in results)
    for result in results:
        shown = {name: value for name, value in result.settings.items() if name not in ("delta", "ess")}
        inner = {"inner": "half a pass"} if shown.get("inner", 0) is None else {}
        text = ", ".join(f"{name} {_short(value)}" for name, value in (shown | inner).items())
        out.print(f"{result.method:<{width}}  {text}", highlight=False, markup=False, soft_wrap=True)
    out.print()


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and value < 0.9 else str(value)


def _write(report: Report, folder: Path, out: Console) -> None:
    written = ["results.json", "results.csv"]
    try:
        report.write_json(folder / "results.json")
        report.write_csv(folder / "results.csv")
        if plot.plotting_available():
            plot.draw(report, folder / "curves.png")
            written.insert(0, "curves.png")
    except OSError as error:
        raise InputError(f"--output {error.filename or folder}: {error.strerror or error}.") from error
    out.print(
        f"Written to {folder}: {', '.join(written)}. {report.seconds:.0f} s in all.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


__all__ = ["BUILT_IN", "Options", "compare", "writable_folder"]
