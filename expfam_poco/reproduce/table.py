"""What the runs come to: a table of curves, the claims with their verdicts, results.json and results.csv."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expfam_poco.compare.report import show_gap, versions
from expfam_poco.reproduce.figure import SMALLER, Claim, Figure, Scale
from expfam_poco.reproduce.runs import Content
from expfam_poco.tools.files import written_aside

COUNTED = ("step", "evaluations", "passes", "seconds")
PLACES = {"loss": 3, "perplexity": 2, "accuracy": 1}


@dataclass(frozen=True)
class Results:
    """A figure's runs: by label, in the order of the seeds.

    Attributes:
        figure: what it is.
        scale_name: "small" or "paper".
        scale: its declaration.
        seeds: of every curve.
        rates: of every curve.
        runs: contents by label.
    """

    figure: Figure
    scale_name: str
    scale: Scale
    seeds: Sequence[int]
    rates: Mapping[str, float]
    runs: Mapping[str, Sequence[Content]]

    def final(self, label: str, name: str) -> list[float | None]:
        """The last value of each seed; None where it diverged."""
        return [None if run["reason"] else run["points"][name][-1] for run in self.runs[label]]

    @property
    def measures(self) -> list[str]:
        """What was measured, in the order in which it is shown."""
        held = {name for runs in self.runs.values() for run in runs for name in run["points"]}
        return [name for name in SMALLER if name in held]


def compared(results: Results, pair: tuple[str, str], measure: str) -> list[float | None]:
    """For every seed how much better the first is: above 0 is better. Gaps are compared by −log10 of their ratio.

    None where the first diverged; infinite where only the second did.
    """
    from math import inf, log10

    found: list[float | None] = []
    for one, other in zip(results.final(pair[0], measure), results.final(pair[1], measure), strict=True):
        if one is None:
            found.append(None)
        elif other is None:
            found.append(inf)
        elif measure == "gap":
            found.append(log10(max(other, 1e-16)) - log10(max(one, 1e-16)))
        else:
            found.append(other - one if SMALLER[measure] else one - other)
    return found


def separated(results: Results, pairs: Sequence[tuple[str, str]], measure: str) -> bool:
    """Whether the first is better on every seed, in every pair."""
    return all(gain is not None and gain > 0.0 for pair in pairs for gain in compared(results, pair, measure))


def verdict(results: Results, claim: Claim) -> str:
    """See `figure`; "not run" where a curve that the claim names is missing."""
    if not tested(results, claim):
        return "not run"
    if separated(results, claim.steps, claim.measure):
        if not claim.evaluations or separated(results, claim.evaluations, claim.measure):
            return "holds"
        return "holds per step only"
    if claim.better and separated(results, claim.better, claim.measure):
        return "holds with the better estimator"
    some = sum(separated(results, [pair], claim.measure) for pair in claim.steps)
    return "does not hold here" + (f" (in {some} of {len(claim.steps)} pairs it does)" if some else "")


def tested(results: Results, claim: Claim) -> bool:
    """Whether all curves that a claim names were run, and measured in what it compares."""
    labels = {label for pair in claim.steps + claim.evaluations + claim.better for label in pair}
    return all(label in results.runs and claim.measure in results.runs[label][0]["points"] for label in labels)


def claim_rows(results: Results) -> list[list[str]]:
    """Claims, the pairs that test them, and verdicts."""
    rows = [["claim", "compared", "at equal", "better by, median [lowest, highest]", "seeds", "verdict"]]
    for claim in results.figure.claims:
        if not tested(results, claim):
            continue
        kinds = (("steps", claim.steps), ("evaluations", claim.evaluations), ("steps, better estimator", claim.better))
        text, told = f"{claim.text} ({claim.place})", verdict(results, claim)
        equal = "passes" if claim.measure == "gap" else ""
        for kind, pairs in kinds:
            for pair in pairs:
                gains = compared(results, pair, claim.measure)
                ahead = sum(gain is not None and gain > 0.0 for gain in gains)
                at = kind.replace("steps", equal or "steps")
                rows.append(
                    [text, f"{pair[0]} – {pair[1]}", at, gain_text(gains, claim.measure), f"{ahead}/{len(gains)}", told]
                )
                text = told = ""
    return rows


def gain_text(gains: Sequence[float | None], measure: str) -> str:
    """The median of paired differences and their range; of gaps as a factor, ∞ where only the other diverged."""
    from math import inf, isnan

    known = sorted(-inf if gain is None else gain for gain in gains)
    three = (statistics.median(known), known[0], known[-1])
    if any(map(isnan, three)):  # of two seeds one diverged for better, one for worse
        return "diverged"
    if measure == "gap":
        shown = [_factor(value) for value in three]
        return f"× {shown[0]} [{shown[1]}, {shown[2]}]"
    places, unit = PLACES[measure], {"accuracy": " points"}.get(measure, "")
    return f"{three[0]:+.{places}f} [{three[1]:+.{places}f}, {three[2]:+.{places}f}]{unit}"


def _factor(power: float) -> str:
    if abs(power) > 300:
        return "∞" if power > 0 else "0"
    value = 10.0**power
    return f"{value:.3g}" if 0.01 <= value < 1000 else f"{value:.1e}"


def curve_rows(results: Results) -> list[list[str]]:
    """Every curve: rate, cost, and final measures as median [lowest, highest]."""
    counted = ["steps", "evaluations"] + (["passes"] if "gap" in results.measures else [])
    rows = [["", "lr", *counted, *results.measures, "s/run"]]
    for label, runs in results.runs.items():
        last = {name: _median([run["points"][name][-1] for run in runs]) for name in COUNTED}
        numbers = [f"{last['step']:.0f}", f"{last['evaluations']:.0f}"]
        numbers += [f"{last['passes']:.1f}"] if "passes" in counted else []
        measured = [
            spread_text(results.final(label, name), name) if name in runs[0]["points"] else "–"
            for name in results.measures
        ]
        rows.append([label, f"{results.rates[label]:.3g}", *numbers, *measured, f"{last['seconds']:.1f}"])
    return rows


def spread_text(values: Sequence[float | None], measure: str) -> str:
    """Median [lowest, highest], with the number of seeds that diverged."""
    known = sorted(value for value in values if value is not None)
    lost = len(values) - len(known)
    if not known:
        return "diverged"
    shown = [
        show_gap(value) if measure == "gap" else f"{value:.{PLACES[measure]}f}"
        for value in (statistics.median(known), known[0], known[-1])
    ]
    text = f"{shown[0]} [{shown[1]}, {shown[2]}]"
    return text + (f", {lost} of {len(values)} diverged" if lost else "")


def cell_rows(results: Results) -> list[list[str]]:
    """The paper's table: rows by columns, final accuracy."""
    cells = results.scale.cells
    columns = list(dict.fromkeys(column for _, column in cells.values()))
    rows = [["accuracy (%)", *columns]]
    for name in dict.fromkeys(row for row, _ in cells.values()):
        by_column = {column: label for label, (row, column) in cells.items() if row == name and label in results.runs}
        shown = [
            spread_text(results.final(by_column[c], "accuracy"), "accuracy") if c in by_column else "–" for c in columns
        ]
        rows.append([name, *shown])
    return rows


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first is its head."""
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def content_of(results: Results) -> dict[str, Any]:
    """Everything that is written down."""
    return {
        "figure": results.figure.name,
        "scale": results.scale_name,
        "about": results.scale.about,
        "seeds": list(results.seeds),
        "versions": versions(),
        "rates": dict(results.rates),
        "runs": {
            label: [{"seed": run["settings"]["seed"], "reason": run["reason"], "points": run["points"]} for run in runs]
            for label, runs in results.runs.items()
        },
        "verdicts": [verdict(results, claim) for claim in results.figure.claims],
    }


def json_text(content: Mapping[str, Any]) -> str:
    """JSON with every list of numbers on a line of its own."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[[-\d\s.,enul]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def from_content(figure: Figure, content: Mapping[str, Any]) -> Results:
    """Results from what `content_of` wrote."""
    runs = {
        label: [{**run, "settings": {"seed": run["seed"]}} for run in several]
        for label, several in content["runs"].items()
    }
    return Results(figure, content["scale"], figure.scale(content["scale"]), content["seeds"], content["rates"], runs)


def write(results: Results, folder: Path) -> None:
    """results.json and results.csv."""
    with written_aside(folder / "results.json") as file:
        file.write(json_text(content_of(results)).encode())
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    names = [*COUNTED, *results.measures]
    writer.writerow(["curve", "seed", "lr", *names])
    for label, runs in results.runs.items():
        for run in runs:
            columns = [run["points"].get(name) or [""] * len(run["points"]["step"]) for name in names]
            for values in zip(*columns, strict=True):
                writer.writerow([label, run["settings"]["seed"], f"{results.rates[label]:g}", *values])
    with written_aside(folder / "results.csv") as file:
        file.write(text.getvalue().encode())
