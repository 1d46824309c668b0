"""What a figure is: curves to run, panels to draw, and claims, each of which compares two curves.

A verdict is no opinion but a rule, applied to differences paired by seed. "Separated" means that all seeds are on one
side (of five, by chance, once in sixteen).

    holds                             separated at equal evaluations, or the claim is not about speed and holds
    holds per step only               separated at equal steps, not against the control of equal evaluations
    holds with the better estimator   not as printed, but with the estimator that `better` names
    does not hold here                neither
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from expfam_poco.reproduce.recipe import Recipe

SMALLER = {"loss": True, "perplexity": True, "gap": True, "accuracy": False}
"""The measures, and whether less is better."""

TITLES = {
    "step": "optimizer steps",
    "evaluations": "gradient evaluations (mini-batches)",
    "passes": "passes over the data (all gradients counted)",
    "loss": "held-out loss (nats)",
    "perplexity": "held-out perplexity",
    "gap": "gap to the minimum",
    "accuracy": "held-out accuracy (%)",
}


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        label: its name, unique in the figure.
        recipe: what is run.
        rates: learning rates that are tried; empty where `rate_of` says whose rate it takes.
        rate_of: the label of the curve whose tuned rate this one has.
        place: where it stands on the axis of an ablation.
        needs: a package beyond the `examples` extra that it needs.
    """

    label: str
    recipe: Recipe
    rates: tuple[float, ...] = ()
    rate_of: str = ""
    place: float | None = None
    needs: str = ""


@dataclass(frozen=True)
class Panel:
    """One plot: a measure against an axis; `x` = "place" draws the final value of each group of curves over its places.

    Attributes:
        title: above it.
        curves: labels; a group (`Mapping`) of them, by name, for x = "place".
        x: "step", "evaluations", "passes" or "place".
        y: a measure.
        log: whether y is logarithmic.
        x_title: of a "place" axis.
        low, high: limits of y where what matters would else be small.
        suffix: what the legend leaves out of labels; curves of one name then have one colour in all panels.
    """

    title: str
    curves: tuple[str, ...] | Mapping[str, tuple[str, ...]]
    x: str = "step"
    y: str = "loss"
    log: bool = False
    x_title: str = ""
    low: float | None = None
    high: float | None = None
    suffix: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper in our words, and the pairs (first, second) of curves that test it: is the first better?

    Attributes:
        text: what is claimed.
        place: where the paper says it.
        measure: what is compared at the end of the runs.
        steps: pairs at equal steps (or as the paper counts), all of which must be separated.
        evaluations: pairs at equal evaluations; empty where the claim is not about cost.
        better: pairs with the better estimator, in place of `steps`.
    """

    text: str
    place: str
    measure: str
    steps: tuple[tuple[str, str], ...]
    evaluations: tuple[tuple[str, str], ...] = ()
    better: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Scale:
    """A figure at one scale.

    Attributes:
        about: one sentence: data, model and length.
        curves: what is run.
        panels: what is drawn, row by row.
        columns: panels in a row.
        rows: of `vsgd-table1` and `table1`: a table in the paper's layout, (row, column) by label; else empty.
    """

    about: str
    curves: tuple[Curve, ...]
    panels: tuple[Panel, ...] = ()
    columns: int = 2
    cells: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def curve(self, label: str) -> Curve:
        """By its label."""
        return next(curve for curve in self.curves if curve.label == label)


@dataclass(frozen=True)
class Figure:
    """A figure or table of a paper: what it claims, and how it is made at both scales."""

    name: str
    title: str
    claims: tuple[Claim, ...]
    small: Scale
    paper: Scale

    def scale(self, name: str) -> Scale:
        """The scale "small" or "paper"."""
        return self.small if name == "small" else self.paper


def quick(scale: Scale) -> Scale:
    """A few steps of every curve: whether it runs, and nothing else."""
    return replace(scale, curves=tuple(replace(c, recipe=_quick(c.recipe), rates=c.rates[:2]) for c in scale.curves))


def _quick(recipe: Recipe) -> Recipe:
    start = None if recipe.start is None else _quick(recipe.start)
    steps = min(recipe.steps, 2)
    return replace(
        recipe, steps=steps, warmup=0, burn_in=min(recipe.burn_in, 1), every=2, mega=min(recipe.mega, 1), chunks=2,
        validate_every=2, start=start, problem=recipe.problem.quick(),
    )  # fmt: skip
