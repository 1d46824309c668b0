"""`curves.png`, in the manner of the paper's Fig. 3: log gap against passes and steps, and against seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expfam_poco.compare.methods import METHODS
from expfam_poco.compare.report import Report, Result
from expfam_poco.errors import InputError
from expfam_poco.tools.files import written_aside
from expfam_poco.tools.pictures import empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_FLOOR = 1e-17
"""Gaps are drawn no lower than this; zero has no logarithm."""

STYLES: dict[str, tuple[str, str]] = {
    # Okabe & Ito's colours, told apart with colour blindness; corrected methods are solid, the others dashed.
    "SGD": ("#7F7F7F", "--"),
    "SGD-cosine": ("#7F7F7F", "-."),
    "saga": ("#009E73", "--"),
    "lbfgs": ("#009E73", ":"),
    "SVRG": ("#000000", "-"),
    "alpha-SVRG": ("#000000", ":"),
    "VSGD-PoCo": ("#F0E442", "-"),
    "IVON": ("#E69F00", "--"),
    "IVON-PoCo": ("#D55E00", "-"),
    "IVON-PoCo-exact": ("#CC79A7", "-"),
    "IVON-PoCo-literal": ("#D55E00", ":"),
    "VON": ("#56B4E9", "--"),
    "VON-PoCo": ("#0072B2", "-"),
}
OTHER = ("#CC79A7", "-.")


def plotting_available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(report: Report, path: Path) -> None:
    """Write the picture: the median over seeds with a band from the lowest to the highest, grey bars at refreshes.

    Raises:
        InputError: where matplotlib is missing.
    """
    if not plotting_available():
        raise InputError(MISSING)
    from matplotlib.ticker import MaxNLocator

    figure = empty_figure("compare's picture", 14.0, 4.8)
    left, middle, right = figure.subplots(1, 3, sharey=True)
    _bars(left, report.results)
    for order, result in enumerate(report.results):
        passes, steps, median, low, high = result.median_curve()
        _line(left, result.method, passes, (median, low, high), order)
        times = result.times()
        _line(right, result.method, times[1:], (median[1:], low[1:], high[1:]), order)
        if not METHODS[result.method].solver:
            _line(middle, result.method, steps, (median, low, high), order)
    left.set_xlim(0.0, report.passes)
    left.xaxis.set_major_locator(MaxNLocator(integer=report.passes >= 4))
    counted = [result for result in report.results if not METHODS[result.method].solver]
    middle.set_xlim(0, max((curve.steps[-1] for result in counted for curve in result.curves), default=1))
    right.set_xscale("log")
    left.set_xlabel("effective passes (all gradient evaluations counted)")
    middle.set_xlabel("optimizer steps")
    right.set_xlabel("CPU seconds, one thread")
    left.set_ylabel("gap to the minimum of the regularised loss")
    _decorate((left, middle, right), report.results)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=10)
    size = f"N = {report.task.size}, {report.task.weights} weights, δ = {report.task.delta:g}"
    figure.suptitle(
        f"{report.task.name}: {size}, batch {report.batch}, ess = {report.ess / report.task.size:g} N, "
        f"median and range of {len(report.seeds)} seeds",
        fontsize=11,
        x=0.01,
        horizontalalignment="left",
    )
    try:
        with written_aside(path) as file:
            figure.savefig(file, dpi=150, format="png")
    except OSError as error:
        raise InputError(f"--output: {path} cannot be written ({error.strerror}); choose another folder.") from error


MISSING = (
    "curves.png is left out because matplotlib is not installed; run: python -m pip install 'expfam_poco[examples]'."
)


def _line(axes: Axes, method: str, x: np.ndarray, gaps: Sequence[np.ndarray], order: int) -> None:
    colour, dashes = STYLES.get(method, OTHER)
    median, low, high = (_drawable(values) for values in gaps)
    axes.plot(x, median, color=colour, linestyle=dashes, linewidth=1.8, label=method, zorder=3 + order)
    axes.plot(x[-1:], median[-1:], color=colour, marker="o", markersize=5, zorder=3 + order)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)


def _drawable(gaps: np.ndarray) -> Any:
    return np.where(np.isfinite(gaps), np.maximum(gaps, SHOWN_FLOOR), np.nan)


def _bars(axes: Axes, results: Sequence[Result]) -> None:
    """The outer passes; those of all corrected methods coincide unless settings differ."""
    spans = sorted({span for result in results for curve in result.curves[:1] for span in curve.outer})
    merged: list[list[float]] = []
    for begin, end in spans:
        if merged and begin <= merged[-1][1] + 1e-9:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([begin, end])
    for number, (begin, end) in enumerate(merged):
        label = "outer pass" if number == 0 else None
        axes.axvspan(begin, end, color="#E6E6E6", linewidth=0, zorder=0, label=label)


def _decorate(panels: Sequence[Axes], results: Sequence[Result]) -> None:
    lowest = min(float(np.nanmin(_drawable(result.median_curve()[2]))) for result in results)
    for axes in panels:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 3.0, 1.0)
        axes.grid(axis="y", color="#D0D0D0", linewidth=0.5, zorder=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelleft=True)
        if lowest <= SHOWN_FLOOR:
            axes.axhline(SHOWN_FLOOR, color="#808080", linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
            axes.text(
                0.01,
                1.3 * SHOWN_FLOOR,
                "drawn no lower",
                fontsize=8,
                color="#606060",
                transform=axes.get_yaxis_transform(),
            )
