"""A small GPT on the standard library's sources: every number about it that docs and RESULTS.md quote.

    python benchmarks/language_model.py tune         # learning rates of every configuration, one seed
    python benchmarks/language_model.py compare      # with the tuned rates, three seeds
    python benchmarks/language_model.py variance     # variance ratios 0 to 9 steps after a refresh, every noise mode
    python benchmarks/language_model.py report       # tables into RESULTS.md, and the picture

Each run is written to its own file as soon as it ends (`--runs`), and is not repeated: an interrupted command
continues. Runs go two at a time, one thread each. `--quick` makes them so short that they show only that all works.

A corrected step evaluates two gradients and a mega-batch one for each of its mini-batches: three evaluations a step
in all. Two controls spend as many on the plain method: from the end of the burn-in on, a batch of three times the
size, or three times as many steps. All begin with the same weights and, at equal steps, see the same mini-batches.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

import torch  # noqa: E402
from corpus import Corpus, load  # noqa: E402
from language_model import Settings, Training, draw  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: E402

from expfam_poco.tools.files import written_aside  # noqa: E402
from expfam_poco.tools.jobs import run_jobs  # noqa: E402

RESULTS = HERE / "results" / "language-model"
PICTURE = HERE / "language-model.png"
COMMON = Settings(preset="tiny", steps=400, batch=16, context=128, burn_in=100, every=10, mega=10, validation=128)
SEEDS, TUNING_SEED = (0, 1, 2), 1000
NOISES = ("shared", "independent", "fixed", "antithetic")
MEASURED, AFTER = 24, 10  # mini-batches of a measured variance, steps after the refresh
MARKS = (0.4, 0.6, 0.8, 1.0)  # shares of the dearest budget at which losses are compared
ADAMW, IVON = (1e-3, 2e-3, 4e-3, 8e-3), (0.15, 0.2, 0.3, 0.4)
WIDENED = 3  # times that a grid is widened at the side where its best rate lies


@dataclass(frozen=True)
class Configuration:
    """A method with the plain control's multiple of the batch or of the steps after the burn-in, and its rates."""

    method: str
    rates: tuple[float, ...]
    batches: int = 1
    steps: int = 1

    def settings(self, common: Settings, rate: float, seed: int) -> Settings:
        """One run."""
        return replace(
            common,
            method=self.method,
            lr=rate,
            seed=seed,
            later_batch=None if self.batches == 1 else self.batches * common.batch,
            steps=common.burn_in + self.steps * (common.steps - common.burn_in),
        )


CONFIGURATIONS = {
    "AdamW": Configuration("adamw", ADAMW),
    "AdamW, 3× batch": Configuration("adamw", ADAMW, batches=3),
    "α-SVRG + AdamW": Configuration("alpha-svrg", ADAMW),
    "IVON": Configuration("ivon", IVON),
    "IVON, 3× batch": Configuration("ivon", IVON, batches=3),
    "IVON, 3× steps": Configuration("ivon", IVON, steps=3),
    "IVON-PoCo": Configuration("ivon-poco", IVON),
    "IVON-PoCoMo": Configuration("ivon-pocomo", IVON),
}
# Seed by seed: the first's final loss minus the second's.
PAIRS = (
    ("α-SVRG + AdamW", "AdamW", "steps"),
    ("IVON-PoCo", "IVON", "steps"),
    ("IVON-PoCoMo", "IVON", "steps"),
    ("α-SVRG + AdamW", "AdamW, 3× batch", "evaluations"),
    ("IVON-PoCo", "IVON, 3× batch", "evaluations"),
    ("IVON-PoCo", "IVON, 3× steps", "evaluations"),
    ("IVON-PoCoMo", "IVON, 3× batch", "evaluations"),
    ("IVON-PoCoMo", "IVON, 3× steps", "evaluations"),
)


# ---- runs, each with a file of its own ---------------------------------------------------------------------

Tell = Callable[[float], None]
"""Of the steps that have been made."""


@functools.cache
def text(context: int) -> Corpus:
    """The text, read once in a process."""
    return load("stdlib", context)


def curve_of(settings: Settings, tell: Tell) -> dict[str, Any]:
    """Train; the curve of losses."""
    training = Training(settings, text(settings.context))
    for point in training.run():
        if point is not None:
            tell(training.step)
    return {"curve": training.curve}


def variance_of(settings: Settings, tell: Tell) -> dict[str, Any]:
    """Train to the end of the burn-in, refresh, and measure variance ratios after 0, 1, … further steps."""
    training = Training(settings, text(settings.context))
    for point in training.run(settings.burn_in):
        if point is not None:
            tell(training.step)
    training.refresh()
    measured = []
    for number in range(AFTER):
        measured.append(training.measure_variance(MEASURED))
        training.inner_step()
        tell(settings.burn_in + number + 1)
    return {"measured": measured}


KINDS = {"curve": curve_of, "variance": variance_of}


@dataclass(frozen=True)
class Runs:
    """Runs of one kind into files of a folder; a job is a label and its settings."""

    kind: str
    folder: Path

    def describe(self, job: tuple[str, Settings]) -> str:
        """For progress and errors."""
        label, settings = job
        return f"{label}, lr {settings.rate:g}, seed {settings.seed}, {settings.noise}"

    def do(self, job: tuple[str, Settings], progress: Tell) -> dict[str, Any]:
        """A run, into its file."""
        label, settings = job
        content = {"label": label, "settings": asdict(settings), **KINDS[self.kind](settings, progress)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_aside(self.path(job)) as file:
            file.write(json.dumps(content, ensure_ascii=False, allow_nan=False).encode())
        return content

    def path(self, job: tuple[str, Settings]) -> Path:
        """The file of a job."""
        label, settings = job
        name = re.sub(r"\W+", "-", label.replace("×", "x").replace("α", "alpha")).lower()
        return self.folder / f"{self.kind}-{name}-lr{settings.rate:g}-seed{settings.seed}.json"

    def stored(self, job: tuple[str, Settings]) -> dict[str, Any] | None:
        """What is in the file, if it is of the same settings."""
        if not self.path(job).is_file():
            return None
        content: dict[str, Any] = json.loads(self.path(job).read_text(encoding="utf-8"))
        return content if content["settings"] == asdict(job[1]) else None


def run_all(kind: str, jobs: Sequence[tuple[str, Settings]], folder: Path, workers: int) -> list[dict[str, Any]]:
    """All runs, `workers` at a time, with a live line; their contents in the order of the jobs."""
    runs = Runs(kind, folder)
    todo = [job for job in jobs if runs.stored(job) is None]
    steps = [settings.burn_in + AFTER if kind == "variance" else settings.steps for _, settings in todo]
    made = [0.0] * len(todo)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        line = progress.add_task(kind, total=sum(steps))

        def watch(number: int, amount: float, result: Any) -> None:
            before, made[number] = made[number], amount if result is None else steps[number]
            progress.advance(line, made[number] - before)
            if result is not None:
                progress.console.print(runs.describe(todo[number]))

        run_jobs(runs, todo, workers, watch)
    return [content for job in jobs if (content := runs.stored(job)) is not None]


# ---- the three experiments -------------------------------------------------------------------------------


def tune(common: Settings, folder: Path, workers: int) -> dict[str, Any]:
    """The final loss of every configuration at every rate, and the best rate.

    A grid whose best rate is its first or last is widened by half or twice that rate, up to `WIDENED` times.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in CONFIGURATIONS}
    todo = [(name, rate) for name, c in CONFIGURATIONS.items() for rate in c.rates]
    for _ in range(1 + WIDENED):
        jobs = [(name, CONFIGURATIONS[name].settings(common, rate, TUNING_SEED)) for name, rate in todo]
        for content in run_all("curve", jobs, folder, workers):
            found[content["label"]][f"{content['settings']['lr']:g}"] = content["curve"][-1]["loss"]
        todo = []
        for name, losses in found.items():
            best, rates = _best(losses), [float(rate) for rate in losses]
            if best in (min(rates), max(rates)):
                todo.append((name, best / 2 if best == min(rates) else best * 2))
    rows = []
    for name, losses in found.items():
        in_order = {rate: losses[rate] for rate in sorted(losses, key=float)}
        rows.append({"name": name, "losses": in_order, "lr": _best(losses)})
    return _content(common, rows, seeds=[TUNING_SEED])


def _best(losses: Mapping[str, float]) -> float:
    return float(min(losses, key=losses.__getitem__))


def compare(common: Settings, rates: Mapping[str, float], folder: Path, workers: int) -> dict[str, Any]:
    """The curves of every configuration at its tuned rate, over the seeds."""
    jobs = [(name, c.settings(common, rates[name], seed)) for seed in SEEDS for name, c in CONFIGURATIONS.items()]
    curves: dict[str, list[Any]] = {name: [] for name in CONFIGURATIONS}
    for content in run_all("curve", jobs, folder, workers):
        keep = ("step", "evaluations", "seconds", "loss")
        curves[content["label"]].append({key: [round(p[key], 5) for p in content["curve"]] for key in keep})
    rows = [{"name": name, "lr": rates[name], "curves": found} for name, found in curves.items()]
    return _content(common, rows, seeds=list(SEEDS))


def variance(common: Settings, rates: Mapping[str, float], folder: Path, workers: int) -> dict[str, Any]:
    """Variance ratios after a refresh in the middle of the training, for every noise mode."""
    middle = replace(common, method="ivon-poco", lr=rates["IVON-PoCo"], burn_in=common.steps // 2, every=common.steps)
    jobs = [(noise, replace(middle, noise=noise, seed=seed)) for noise in NOISES for seed in SEEDS]
    found: dict[str, list[Any]] = {noise: [] for noise in NOISES}
    for content in run_all("variance", jobs, folder, workers):
        found[content["label"]].append(content["measured"])
    rows = []
    for field in ("gradient", "curvature"):
        for noise, runs in found.items():
            ratios = [[point[f"variance_ratio.{field}"] for point in measured] for measured in runs]
            rows.append({"name": noise, "field": field, "ratios": ratios})
    return _content(middle, rows, seeds=list(SEEDS))


def _content(common: Settings, rows: list[Any], **more: Any) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0]}
    return {"settings": asdict(common), "versions": versions, **more, "rows": rows}


def store(name: str, content: Mapping[str, Any], folder: Path) -> None:
    """Write an experiment's JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    # Lists of numbers on one line each: a curve is one line, not fifty.
    text = re.sub(r"\[[-\d\s.,e]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def stored(name: str, folder: Path) -> dict[str, Any]:
    """An experiment's JSON."""
    path = folder / f"{name}.json"
    if not path.is_file():
        sys.exit(f"{path.name} is missing; run `python benchmarks/language_model.py {name}` first.")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


# ---- tables ----------------------------------------------------------------------------------------------


def _spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _at(curve: Mapping[str, Sequence[float]], axis: str, mark: float) -> float | None:
    """The loss of the last point up to a mark, None for a run that ended long before it."""
    reached = [loss for value, loss in zip(curve[axis], curve["loss"], strict=True) if value <= mark * (1 + 1e-9)]
    return reached[-1] if curve[axis][-1] >= 0.95 * mark else None


def _losses_at(curves: Sequence[Mapping[str, Sequence[float]]], axis: str, mark: float) -> str:
    losses = [_at(curve, axis, mark) for curve in curves]
    found = [loss for loss in losses if loss is not None]
    return f"{statistics.median(found):.3f}" if len(found) == len(losses) else "–"


def _markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] + ["---:"] * (len(lines[0]) - 1), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_tune(content: Mapping[str, Any]) -> str:
    """Final losses by learning rate."""
    lines = [["", "final loss at each learning rate", "best"]]
    for row in content["rows"]:
        losses = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in row["losses"].items())
        lines.append([row["name"], losses, f"{row['lr']:g}"])
    return _markdown(lines)


def table_compare(content: Mapping[str, Any]) -> str:
    """Final losses with their cost, and losses at equal evaluations and seconds."""
    rows = content["rows"]
    budget = max(curve["evaluations"][-1] for row in rows for curve in row["curves"])
    clock = min(statistics.median(curve["seconds"][-1] for curve in row["curves"]) for row in rows)
    marks = [round(budget * share) for share in MARKS]
    head = ["", "lr", "steps", "evaluations", "seconds", "final loss [lowest, highest]"]
    lines = [head + [f"at {mark} evaluations" for mark in marks] + [f"at {clock:.0f} s"]]
    for row in rows:
        curves = row["curves"]
        seconds = statistics.median(curve["seconds"][-1] for curve in curves)
        line = [row["name"], f"{row['lr']:g}", f"{curves[0]['step'][-1]:.0f}", f"{curves[0]['evaluations'][-1]:.0f}"]
        line += [f"{seconds:.0f}", _spread([curve["loss"][-1] for curve in curves])]
        line += [_losses_at(curves, "evaluations", mark) for mark in marks]
        lines.append([*line, _losses_at(curves, "seconds", clock)])
    return _markdown(lines)


def table_pairs(content: Mapping[str, Any]) -> str:
    """Differences of final losses, seed by seed."""
    finals = {row["name"]: [curve["loss"][-1] for curve in row["curves"]] for row in content["rows"]}
    lines = [["", "minus", "at equal", "difference of final losses [lowest, highest]"]]
    for first, second, equal in PAIRS:
        differences = [a - b for a, b in zip(finals[first], finals[second], strict=True)]
        lines.append([first, second, equal, _spread(differences, sign="+")])
    return _markdown(lines)


def table_variance(content: Mapping[str, Any]) -> str:
    """Median ratios by steps after the refresh."""
    lines = [["", "noise", *(str(number) for number in range(AFTER))]]
    for row in content["rows"]:
        middle = [statistics.median(values) for values in zip(*row["ratios"], strict=True)]
        lines.append([row["field"], row["name"], *(f"{value:.2f}" for value in middle)])
    return _markdown(lines)


# Table in RESULTS.md: the experiment, what makes it, what stands above it.
TABLES = {
    "language-model": ("compare", table_compare, "Validation loss in nats a byte, median over seeds."),
    "language-model-pairs": ("compare", table_pairs, "The same, seed by seed; below zero the first is better."),
    "language-model-tuning": ("tune", table_tune, "Learning rates, each configuration tuned on its own, another seed."),
    "language-model-variance": (
        "variance",
        table_variance,
        "True variance corrected/plain over mini-batches, by steps after a refresh in the middle of the training.",
    ),
}
HEAD = """
## Language model

A GPT of 0.4 M weights on the bytes of the standard library's sources; held-out files are for validation. Every gradient
evaluation is counted. Two processes of one thread each on two CPU cores.

    python benchmarks/language_model.py tune      # then: compare, variance, report

![Validation loss against steps, gradient evaluations and seconds](language-model.png)
"""


def report(folder: Path, page: Path, picture: Path) -> None:
    """Tables into the page between their comments (added at its end when missing), and the picture."""
    written = page.read_text(encoding="utf-8")
    if "<!-- table language-model -->" not in written:
        blank = "".join(f"\n{words}\n\n<!-- table {name} -->\n<!-- end -->\n" for name, (_, _, words) in TABLES.items())
        written += HEAD + blank
    for name, (experiment, table, _) in TABLES.items():
        content = table(stored(experiment, folder))
        pattern = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        written = pattern.sub(lambda found, new=content: f"{found[1]}\n{new}\n{found[2]}", written)
        print(f"## {name}\n\n{content}\n")
    page.write_text(written, encoding="utf-8")
    curves = {}
    for row in stored("compare", folder)["rows"]:
        columns = [zip(*curve.values(), strict=True) for curve in row["curves"]]
        names = list(row["curves"][0])
        curves[row["name"]] = [[dict(zip(names, point, strict=True)) for point in points] for points in columns]
    draw(curves, picture)


def main() -> None:
    """The experiments named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", choices=["tune", "compare", "variance", "report"])
    parser.add_argument("--runs", type=Path, default=Path("build/language-model"), help="folder of single runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the experiments' JSON")
    parser.add_argument("--page", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny batches, to try it")
    options = parser.parse_args()
    common = COMMON
    if options.quick:
        quick = {
            "preset": "nano",
            "steps": 12,
            "batch": 2,
            "context": 16,
            "burn_in": 4,
            "every": 4,
            "mega": 4,
            "validate_every": 4,
        }
        common = replace(COMMON, **quick, validation=8, warmup=2)
    for command in options.commands:
        if command == "report":
            report(options.results, options.page, options.picture)
        elif command == "tune":
            store(command, tune(common, options.runs, options.workers), options.results)
        else:
            rates = {row["name"]: row["lr"] for row in stored("tune", options.results)["rows"]}
            experiment = compare if command == "compare" else variance
            store(command, experiment(common, rates, options.runs, options.workers), options.results)


if __name__ == "__main__":
    main()
