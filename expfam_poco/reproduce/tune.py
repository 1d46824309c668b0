"""The learning rate of every curve: the same number of rates, seeds that are never reported, a held-out part of theirs.

A grid whose best rate is its first or last is widened there by the ratio of its rates, up to `WIDENED` times, for
every method alike. The rates that were found stand in `rates.json` beside this module, and are used unless a folder
has its own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from expfam_poco.errors import InputError
from expfam_poco.reproduce.data import Source
from expfam_poco.reproduce.figure import Curve, Scale
from expfam_poco.reproduce.runs import Content, Job, run_all
from expfam_poco.tools.files import written_aside

TUNING_SEEDS = (1_000_000, 1_000_001)
"""A rate is judged by the mean of them; one alone often hides that a rate is too large."""
WIDENED = 2
SHIPPED = Path(__file__).with_name("rates.json")
FILE = "rates.json"

Tried = dict[str, dict[str, float]]


def rates_of(figure: str, scale: Scale, scale_name: str, folder: Path) -> dict[str, float]:
    """The rate of every curve: the folder's, else the shipped ones, else its recipe's."""
    known = stored_rates(folder)
    if not known and scale_name == "small":
        shipped: dict[str, Any] = json.loads(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.is_file() else {}
        known = shipped.get(figure, {}).get("rates", {})
    found = {curve.label: float(known.get(curve.label, curve.recipe.lr)) for curve in scale.curves}
    for curve in scale.curves:
        if curve.rate_of:
            found[curve.label] = found[curve.rate_of]
    return found


def stored_rates(folder: Path) -> Mapping[str, float]:
    """What `tune` has left in a figure's folder."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        rates = json.loads(path.read_text(encoding="utf-8"))["rates"]
        return {label: float(rate) for label, rate in rates.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: no rates can be read in it; delete it, or search anew with --tune.") from None


def tune(
    scale: Scale,
    measures: Mapping[str, str],
    folder: Path,
    source: Source,
    workers: int,
    err: Console,
    widened: int = WIDENED,
) -> dict[str, float]:
    """Search, and write `rates.json` into the folder.

    Args:
        scale: whose curves have `rates`.
        measures: of every curve, what its final value is minimised in.
        folder: of the figure.
        source: of the data.
        workers: processes.
        err: for progress.
        widened: how often a grid may be widened.
    """
    curves = {curve.label: curve for curve in scale.curves if curve.rates}
    tried: Tried = {label: {} for label in curves}
    todo = [(curve, rate) for curve in curves.values() for rate in curve.rates]
    for _ in range(1 + widened):
        jobs = [Job.of(curve, rate, seed, "tune") for curve, rate in todo for seed in TUNING_SEEDS]
        found: dict[tuple[str, float], list[float]] = {}
        for job, content in zip(jobs, run_all(jobs, folder, source, workers, err, "tuning"), strict=True):
            found.setdefault((job.label, job.recipe.lr), []).append(final(content, measures[job.label]))
        for (label, rate), values in found.items():
            tried[label][f"{rate:g}"] = statistics.fmean(values)
        todo = [(curves[label], rate) for label, known in tried.items() for rate in _beyond(curves[label], known)]
        if not todo:
            break
    rates = {label: best(known) for label, known in tried.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / FILE) as file:
        file.write(json.dumps({"rates": rates, "tried": _sorted(tried)}, indent=1, ensure_ascii=False).encode())
    return rates


def _sorted(tried: Tried) -> dict[str, dict[str, float | None]]:
    """In the order of rates; a run that diverged is None."""
    return {
        label: {rate: found[rate] if found[rate] < float("inf") else None for rate in sorted(found, key=float)}
        for label, found in tried.items()
    }


def best(found: Mapping[str, float]) -> float:
    """The rate with the least measure."""
    return float(min(found, key=found.__getitem__))


def _beyond(curve: Curve, found: Mapping[str, float]) -> Sequence[float]:
    rates = sorted(map(float, found))
    ratio = max(curve.rates[1] / curve.rates[0] if len(curve.rates) > 1 else 2.0, 1.2)
    chosen = best(found)
    if chosen == rates[0]:
        return [float(f"{chosen / ratio:.3g}")]
    return [float(f"{chosen * ratio:.3g}")] if chosen == rates[-1] else []


def final(content: Content, measure: str) -> float:
    """The last value of a run, infinite if it diverged; accuracies count by the loss beside them."""
    values = content["points"]["loss" if measure in ("accuracy", "perplexity") else measure]
    return float("inf") if content["reason"] or values[-1] is None else float(values[-1])
