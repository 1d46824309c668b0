"""The command in order: figure, rates, runs, tables, picture. The command line is a thin layer over `reproduce`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from expfam_poco.compare.job import writable_folder
from expfam_poco.compare.plot import plotting_available
from expfam_poco.errors import InputError
from expfam_poco.reproduce import table
from expfam_poco.reproduce.data import Source
from expfam_poco.reproduce.figure import Figure, Scale, quick
from expfam_poco.reproduce.figures import FIGURES
from expfam_poco.reproduce.runs import Job, run_all
from expfam_poco.reproduce.tune import TUNING_SEEDS, rates_of, tune
from expfam_poco.tools.jobs import worker_count

SCALES = ("small", "paper")
RANGE = re.compile(r" \[[^\]]*\]")
SEEDS = 5


@dataclass(frozen=True)
class Options:
    """What the command line asks for; the names are those of its options."""

    figures: Sequence[str]
    scale: str = "small"
    seeds: int | None = None
    workers: int | None = None
    output: Path = field(default_factory=lambda: Path("expfam-poco-figures"))
    tune: bool = False
    quick: bool = False
    one_step: bool = False
    data: Path | None = None
    device: str = "cpu"


def reproduce(options: Options, out: Console, err: Console) -> list[table.Results]:
    """Make the figures; each leaves its files in a folder of its own, and runs that are there are not repeated.

    Args:
        options: what to do.
        out: where tables go.
        err: where progress goes.

    Raises:
        InputError: for wrong input, before any work begins.
    """
    figures = find_figures(options.figures)
    if options.scale not in SCALES:
        raise InputError(f"--scale {options.scale!r} is not known; choose small or paper.")
    if options.seeds is not None and not 0 < options.seeds <= min(TUNING_SEEDS):
        raise InputError(f"--seeds {options.seeds}: give at least one.")
    if options.data is not None and not options.data.is_dir():
        raise InputError(f"--data {options.data}: there is no such folder; give the one that holds the papers' data.")
    workers = worker_count(options.workers)
    return [_one(figure, options, workers, out, err) for figure in figures]


def find_figures(names: Sequence[str]) -> list[Figure]:
    """Figures by name; "all" is all of them.

    Raises:
        InputError: for an unknown name.
    """
    if "all" in names:
        return list(FIGURES.values())
    for name in names:
        if name not in FIGURES:
            raise InputError(f"there is no figure {name!r}; choose from {', '.join(FIGURES)}, or all.")
    return [FIGURES[name] for name in names]


def _one(figure: Figure, options: Options, workers: int, out: Console, err: Console) -> table.Results:
    scale = _there(figure.scale(options.scale), err)
    source = Source(options.data, options.one_step, options.device)
    kind = "one-step" if options.one_step else "quick" if options.quick else ""
    folder = writable_folder(options.output / "-".join(filter(None, (figure.name, options.scale, kind))))
    seeds = range(options.seeds or (1 if options.quick or options.one_step else SEEDS))
    if options.quick:
        scale = quick(scale)
    if options.one_step:
        scale = one_step(scale)
    err.print(f"{figure.name}: {scale.about}", highlight=False, markup=False, soft_wrap=True)
    if options.tune:
        tune(scale, measures_of(figure, scale), folder, source, workers, err, 0 if options.quick else 2)
    rates = rates_of(figure.name, scale, options.scale, folder)
    jobs = [Job.of(curve, rates[curve.label], seed) for seed in seeds for curve in scale.curves]
    contents = run_all(jobs, folder, source, workers, err, figure.name)
    runs = {
        curve.label: [content for job, content in zip(jobs, contents, strict=True) if job.label == curve.label]
        for curve in scale.curves
    }
    results = table.Results(figure, options.scale, scale, list(seeds), rates, runs)
    show(results, out, judged=not (options.quick or options.one_step))
    table.write(results, folder)
    written = "results.json, results.csv"
    if plotting_available():
        from expfam_poco.reproduce.plot import draw

        draw(results, folder / f"{figure.name}.png")
        written = f"{figure.name}.png, {written}"
    else:
        err.print("no picture: matplotlib is not installed; run: python -m pip install 'expfam_poco[examples]'.")
    out.print(f"Written to {folder}: {written}.", highlight=False, markup=False, soft_wrap=True)
    return results


def _there(scale: Scale, err: Console) -> Scale:
    """Without the curves whose packages are missing; what is left out is said."""
    missing = {curve.needs for curve in scale.curves if curve.needs and importlib.util.find_spec(curve.needs) is None}
    for name in sorted(missing):
        package = name.replace("_", "-")
        err.print(
            f"without the package {package} some curves are left out; run: python -m pip install {package}",
            highlight=False, markup=False,
        )  # fmt: skip
    kept = tuple(curve for curve in scale.curves if curve.needs not in missing)
    labels = {curve.label for curve in kept}
    return replace(scale, curves=kept, cells={label: cell for label, cell in scale.cells.items() if label in labels})


def measures_of(figure: Figure, scale: Scale) -> dict[str, str]:
    """What the rate of each curve is chosen by: the gap of convex tasks, else the loss."""
    from expfam_poco.reproduce.problems import Convex

    return {c.label: "gap" if isinstance(c.recipe.problem, Convex) else "loss" for c in scale.curves}


def one_step(scale: Scale) -> Scale:
    """One corrected step of every curve, after one mega-batch of two mini-batches."""
    curves = []
    for curve in scale.curves:
        recipe = replace(curve.recipe, steps=1, burn_in=0, mega=min(curve.recipe.mega, 2), start=None)
        curves.append(replace(curve, recipe=replace(recipe, validate_every=1)))
    return replace(scale, curves=tuple(curves))


def show(results: table.Results, out: Console, *, judged: bool) -> None:
    """The tables on a terminal, and the claims where the runs are more than a trial."""
    if results.scale.cells:
        out.print(_terminal(table.cell_rows(results), results.figure.title))
    out.print(_terminal(table.curve_rows(results), results.figure.title))
    out.print("Medians over seeds; results.json has all.", style="dim", highlight=False)
    if not judged:
        out.print("No claim is judged by a trial.", highlight=False)
    for row in table.claim_rows(results)[1:] if judged else []:
        if row[0]:
            out.print(f"{row[5]}: {row[0]}", highlight=False, markup=False, soft_wrap=True)
        out.print(
            f"    {row[1]}, at equal {row[2]}: better by {row[3]} on {row[4]} seeds",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _terminal(rows: Sequence[Sequence[str]], title: str) -> Table:
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(rows[0]):
        made.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows[1:]:
        made.add_row(row[0], *(RANGE.sub("", cell) for cell in row[1:]))
    return made
