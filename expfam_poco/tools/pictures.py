"""Pictures without a screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def empty_figure(what: str, width: float, height: float) -> Figure:
    """A figure to draw on and to save.

    Args:
        what: whose picture it is, for the sentence.
        width: in inches.
        height: in inches.

    Raises:
        ImportError: where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install 'expfam_poco[examples]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
