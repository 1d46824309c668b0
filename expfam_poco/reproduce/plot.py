"""The picture, in the paper's layout: median over seeds and a band from the lowest to the highest."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expfam_poco.reproduce.figure import TITLES, Panel
from expfam_poco.reproduce.table import Results
from expfam_poco.tools.files import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's colours, told apart with colour blindness.
COLOURS = ("#000000", "#E69F00", "#D55E00", "#0072B2", "#56B4E9", "#CC79A7", "#009E73", "#7F7F7F")
MARKERS = "osD^vPXh"
DPI = 110
FLOOR = 1e-17
"""Gaps are drawn no lower; zero has no logarithm."""


def draw(results: Results, path: Path) -> None:
    """Write the picture (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scale = results.scale
    panels = len(scale.panels) or len({column for _, column in scale.cells.values()})
    columns = min(scale.columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.6 * columns + 0.4, 3.7 * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).flat)
    for spare in axes[panels:]:
        spare.set_visible(False)
    if scale.panels:
        for place, panel in zip(axes, scale.panels, strict=False):
            _panel(place, panel, results)
        _legends(figure, axes[:panels])
    else:
        _cells(axes, results)
    count = len(results.seeds)
    seeds = f"median and range of {count} seeds" if count > 1 else "one seed"
    title = f"{results.figure.title} ({results.scale_name} scale, {seeds})"
    # Characters of this size are about a twelfth of an inch wide.
    title = textwrap.fill(title, int(12 * figure.get_figwidth()))
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    with written_aside(path) as file:
        figure.savefig(file, dpi=DPI, format="png")


def style(results: Results, label: str) -> dict[str, Any]:
    """Colour by the order of names; corrected methods solid, others dashed, controls of equal cost dotted."""
    names = list(dict.fromkeys(_name(one, results) for one in results.runs))
    recipe = results.scale.curve(label).recipe
    dashes: Any = "-" if recipe.corrected else (0, (1, 1.2)) if recipe.later_batch > 1 else "--"
    return {"color": COLOURS[names.index(_name(label, results)) % len(COLOURS)], "linestyle": dashes}


def _name(label: str, results: Results) -> str:
    """A label without what its panel leaves out."""
    for panel in results.scale.panels:
        if panel.suffix and label in panel.curves:
            return label.removesuffix(panel.suffix)
    return label


def _panel(axes: Axes, panel: Panel, results: Results) -> None:
    axes.set_title(panel.title, fontsize=10)
    if panel.x == "place":
        assert isinstance(panel.curves, Mapping)
        for number, (name, labels) in enumerate(panel.curves.items()):
            _places(axes, number, name, labels, panel.y, results)
        axes.set_xlabel(panel.x_title)
    else:
        for label in panel.curves:
            _line(axes, label, panel, results)
        axes.set_xlabel(TITLES[panel.x])
    axes.set_ylabel(TITLES[panel.y])
    if panel.log:
        axes.set_yscale("log")
    if panel.log and panel.x != "place":
        shown = [
            v for label in panel.curves for run in results.runs.get(label, ()) for v in run["points"][panel.y] if v
        ]
        axes.set_ylim(max(min(shown, default=FLOOR), FLOOR) / 3.0, panel.high)
    elif panel.low is not None or panel.high is not None:
        axes.set_ylim(panel.low, panel.high)
    elif panel.x != "place" and not panel.log:
        _focus(axes, panel, results)
    axes.grid(color="#DDDDDD", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _focus(axes: Axes, panel: Panel, results: Results) -> None:
    """Limits of y by the later half of the curves: the first points would hide what differs."""
    late = [
        value
        for label in panel.curves
        for run in results.runs.get(label, ())
        for value in run["points"][panel.y][len(run["points"][panel.y]) * 2 // 5 :]
        if value is not None
    ]
    if late:
        low, high = np.quantile(late, [0.0, 1.0])
        edge = 0.05 * max(high - low, 1e-9)
        axes.set_ylim(low - edge, high + edge)


def _line(axes: Axes, label: str, panel: Panel, results: Results) -> None:
    runs = results.runs.get(label)
    if not runs:
        return
    across, values = _grid(runs, panel)
    how = style(results, label)
    middle, low, high = np.median(values, axis=0), values.min(axis=0), values.max(axis=0)
    there = np.isfinite(middle)
    axes.plot(across[there], middle[there], linewidth=1.7, label=label.removesuffix(panel.suffix), **how)
    axes.fill_between(across, low, np.minimum(high, 1e30), color=how["color"], alpha=0.15, linewidth=0)


def _grid(runs: Sequence[Any], panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    """x and the seeds' values; a seed that has diverged is infinite from there on (accuracy: 0)."""
    longest = max(runs, key=lambda run: len(run["points"]["step"]))["points"][panel.x]
    whole = [len(run["points"]["step"]) for run in runs if not run["reason"]]
    count = min(whole, default=len(longest))
    lost = 0.0 if panel.y == "accuracy" else np.inf
    values = np.full((len(runs), count), lost)
    for row, run in zip(values, runs, strict=True):
        known = [lost if value is None else value for value in run["points"][panel.y]][:count]
        row[: len(known)] = known
    return np.array(longest[:count]), np.maximum(values, FLOOR) if panel.log else values


def _places(axes: Axes, number: int, name: str, labels: Sequence[str], measure: str, results: Results) -> None:
    """Final values over the places of an ablation."""
    shown = [
        label for label in labels if label in results.runs and any(v is not None for v in results.final(label, measure))
    ]
    places = [results.scale.curve(label).place for label in shown]
    finals = [[value for value in results.final(label, measure) if value is not None] for label in shown]
    middle = [float(np.median(values)) for values in finals]
    spread = [
        [m - min(v) for m, v in zip(middle, finals, strict=True)],
        [max(v) - m for m, v in zip(middle, finals, strict=True)],
    ]
    axes.errorbar(
        np.array(places, dtype=float), middle, yerr=spread, label=name, color=COLOURS[(2, 3, 6, 1)[number % 4]],
        marker=MARKERS[number % len(MARKERS)], capsize=3, linewidth=1.5,
    )  # fmt: skip


def _legends(figure: Any, axes: Sequence[Axes]) -> None:
    """One legend beside the panels where the first shows all names, else one in each."""
    named = [axis.get_legend_handles_labels() for axis in axes]
    if all(set(labels) <= set(named[0][1]) for _, labels in named):
        figure.legend(*named[0], loc="outside right center", frameon=False, fontsize=9)
        return
    for place in axes:
        place.legend(frameon=False, fontsize=8)


def _cells(axes: Sequence[Axes], results: Results) -> None:
    """A column of the table in each panel: seeds as dots, medians as bars, one line for each row."""
    cells = results.scale.cells
    names = list(dict.fromkeys(row for row, _ in cells.values()))
    for place, column in zip(axes, dict.fromkeys(column for _, column in cells.values()), strict=False):
        place.set_title(column, fontsize=10)
        for label, (row, where) in cells.items():
            if where != column or label not in results.runs:
                continue
            height, colour = -names.index(row), COLOURS[names.index(row) % len(COLOURS)]
            values = [value for value in results.final(label, "accuracy") if value is not None]
            place.plot(values, [height] * len(values), "o", color=colour, alpha=0.6, markersize=5)
            if values:
                place.plot([np.median(values)] * 2, [height - 0.3, height + 0.3], color=colour, linewidth=2)
        place.set_yticks([-number for number in range(len(names))], names)
        place.set_ylim(0.6 - len(names), 0.6)
        place.set_xlabel(TITLES["accuracy"])
        place.grid(axis="x", color="#DDDDDD", linewidth=0.5)
        place.spines[["top", "right"]].set_visible(False)
