"""Does transport pay on the small GPT? Against the best β₁, Nesterov's momentum and no transport, at equal evaluations.

    python benchmarks/transport.py                                        # 0.1 M weights, two cores: 5 minutes
    python benchmarks/transport.py --preset small --device cuda --workers 4 --together 8    # or 10m
    python benchmarks/transport.py --report                               # tables into RESULTS.md
    python benchmarks/transport.py --quick                                # seconds, to try it

One evaluation a step everywhere, a cosine schedule, and for every method and β₁ a rate of its own, the best of those
tried with a seed that is not reported. γ = 1 − β₁ *is* Nesterov's look-ahead (`expfam_poco.correction.Transported`);
NAdamW is the other form of it, with gradients taken at the weights. *Worth*: evaluations that the plain method with
β₁ = 0.9 needs to the same loss, from runs of it with `LONGER` times the budget and their own schedule, over those used.

Each run is written to a file of its own as soon as it ends (`--runs`) and is not repeated: what was interrupted
continues. `--seconds` starts no run after so long, and reports the seeds that all rows have, or else the one that rates
were chosen by.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

import torch  # noqa: E402
from corpus import TRAINING, Corpus, load  # noqa: E402
from language_model import Settings, Training  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from torch import Tensor  # noqa: E402

from expfam_poco.tools.files import written_aside  # noqa: E402
from expfam_poco.tools.jobs import run_jobs  # noqa: E402

RESULTS, PAGE = HERE / "results", HERE / "RESULTS.md"
SEEDS, TUNING_SEED, LONGER = (0, 1, 2, 3, 4), 1000, 1.25
COMMON = Settings(batch=16, context=128, steps=1875, warmup=75, beta2=0.999, clip_radius=1e-3, validation=512)
PRESETS = {
    "nano": replace(COMMON, preset="nano", batch=8, context=64, steps=600, warmup=24, validation=256),
    "small": replace(COMMON, preset="small"),
    "10m": replace(COMMON, preset="10m", steps=1250, warmup=50),
}
QUICK = Settings(preset="nano", batch=2, context=16, steps=12, warmup=2, validation=8)
ADAMW, IVON = (7.5e-4, 1.5e-3, 3e-3, 6e-3), (0.1, 0.2, 0.4, 0.8)
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # 97.5 % points of Student's t for so many seeds


@dataclass(frozen=True)
class Row:
    """A method, its β₁ and its γ; the budget as a multiple."""

    method: str
    beta1: float = 0.9
    gamma: float = 0.0
    budget: float = 1.0

    @property
    def name(self) -> str:
        """In tables and files."""
        more = "" if self.budget == 1.0 else f", {self.budget:g}× evaluations"
        return f"{self.method} β₁ = {self.beta1:g}, γ = {self.gamma:g}{more}"

    def settings(self, common: Settings, rate: float, seed: int) -> Settings:
        """One run."""
        chosen = {"method": self.method.lower(), "beta1": self.beta1, "transport": self.gamma}
        steps = round(self.budget * common.steps)
        return replace(common, **chosen, lr=rate, seed=seed, steps=steps, validate_every=steps)


Job = tuple[Row, float, int]
"""A row, its rate and the seed."""


def rows_of(preset: str) -> list[Row]:
    """What is compared: every β₁, but β₁ = 0.9 alone in the model of 10.6 M weights."""
    betas = (0.9,) if preset == "10m" else (0.8, 0.9, 0.95)
    found = []
    for method, beta in itertools.product(("AdamW", "IVON"), betas):
        gammas = {0.0, round(1.0 - beta, 3), 0.25} if method == "IVON" or beta == 0.9 else {0.0}
        found += [Row(method, beta, gamma) for gamma in sorted(gammas)]
    found += [Row("NAdamW", beta) for beta in betas]
    return found + [Row(method, 0.9, 0.0, LONGER) for method in ("AdamW", "IVON")]


# ---- runs ------------------------------------------------------------------------------------------------


@functools.cache
def text(context: int) -> Corpus:
    """The text, read once in a process."""
    return load("stdlib", context)


def graph_of(training: Training, tokens: Tensor) -> Callable[[Tensor], Any]:
    """The step of one of torch's optimizers as a CUDA graph, as torch's documentation has it."""
    optimizer, place, side = training.optimizer, tokens.clone(), torch.cuda.Stream()
    for group in optimizer.param_groups:  # numbers that change lie on the device
        group.update(capturable=True, lr=torch.tensor(group["lr"], device=tokens.device))
    closure, graph = training.closure(place), torch.cuda.CUDAGraph()
    first = [parameter.detach().clone() for parameter in training.model.parameters()]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step(closure)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        optimizer.step(closure)
    with torch.no_grad():  # the three steps have not been
        for parameter, value in zip(training.model.parameters(), first, strict=True):
            parameter.copy_(value)
        for state in optimizer.state.values():
            for name, value in state.items():
                value.fill_(1.0 if name == "mu_product" else 0.0)

    def step(tokens: Tensor) -> None:
        place.copy_(tokens)
        graph.replay()

    return step


def step_of(training: Training) -> Callable[[Tensor], Any]:
    """A step on a batch: a graph on a GPU where there is one for the method, an ordinary step elsewhere."""
    s, optimizer = training.settings, training.optimizer

    def ordinary(tokens: Tensor) -> Any:
        return optimizer.step(training.closure(tokens))

    def loss(tokens: Tensor) -> Tensor:
        with training.precision():
            return training.model.loss(tokens)

    if s.device != "cuda" or (s.transport and s.method == "adamw"):
        return ordinary
    (tokens,) = training.batches(TRAINING, 0, 1)
    try:
        return optimizer.captured(loss, tokens) if s.method == "ivon" else graph_of(training, tokens)  # type: ignore[no-any-return]
    except RuntimeError as error:
        print(f"{s.method}: ordinary steps, for there is no graph ({error})", file=sys.stderr)
        return ordinary


def run(jobs: Sequence[tuple[Settings, Path]]) -> list[float]:
    """The final losses of runs that take turns, each on a stream of its own; from their files where these are there."""
    todo = [(settings, path) for settings, path in jobs if _stored(settings, path) is None]
    trainings = [Training(settings, text(settings.context)) for settings, _ in todo]
    on_gpu = bool(todo) and todo[0][0].device == "cuda"
    streams = [torch.cuda.Stream() if on_gpu else None for _ in todo]
    torch.cuda.synchronize() if on_gpu else None
    steps = []
    for training, stream in zip(trainings, streams, strict=True):
        with torch.cuda.stream(stream):
            steps.append(step_of(training))
    for number in range(max((settings.steps for settings, _ in todo), default=0)):
        for training, stream, step in zip(trainings, streams, steps, strict=True):
            if number < training.settings.steps:
                with torch.cuda.stream(stream):
                    step(training.batches(TRAINING, number, 1)[0])
                    training.scheduler.step()
    torch.cuda.synchronize() if on_gpu else None
    for training, (settings, path) in zip(trainings, todo, strict=True):
        loss = training.validate()
        with written_aside(path) as file:
            content = {"settings": asdict(settings), "loss": loss if math.isfinite(loss) else None}
            file.write(json.dumps(content).encode())
    return [_stored(settings, path) or math.inf for settings, path in jobs]


def _stored(settings: Settings, path: Path) -> float | None:
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    loss = math.inf if content["loss"] is None else float(content["loss"])
    return loss if content["settings"] == asdict(settings) else None


Gang = list[tuple[Settings, Path]]
"""Runs that take turns in one worker."""


@dataclass(frozen=True)
class Until:
    """Gangs, of which none begins after a time (`time.time`)."""

    time: float

    def describe(self, job: Gang) -> str:
        """For errors."""
        return ", ".join(path.stem for _, path in job)

    def do(self, job: Gang, progress: Callable[[float], None]) -> list[float]:
        """The losses; none when it is too late."""
        return run(job) if time.time() <= self.time else []


class Pool:
    """Workers, and a line of progress; none begins a run after `seconds`, and each has `together` at a time."""

    def __init__(self, folder: Path, workers: int, together: int, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.workers, self.together = folder, workers, together
        self.until = Until(time.time() + seconds)

    def _gangs(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Jobs for the same worker; those without a graph go alone."""
        slow = [job for job in jobs if job[0].gamma and job[0].method == "AdamW"]
        fast = [job for job in jobs if job not in slow]
        return [[job] for job in slow] + [fast[i : i + self.together] for i in range(0, len(fast), self.together)]

    def _path(self, job: Job, common: Settings) -> Path:
        row, rate, seed = job
        return self.folder / (re.sub(r"\W+", "-", f"{common.preset} {row.name} {rate:g} {seed}") + ".json")

    def losses(self, jobs: Sequence[Job], common: Settings, words: str) -> dict[Job, float]:
        """The loss of every job that was begun in time; infinite for one that diverged."""
        gangs = self._gangs(jobs)
        what = [[(job[0].settings(common, *job[1:]), self._path(job, common)) for job in gang] for gang in gangs]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            line = progress.add_task(words, total=len(jobs))

            def watch(number: int, amount: float, result: Any) -> None:
                progress.advance(line, 0 if result is None else len(gangs[number]))

            found = run_jobs(self.until, what, self.workers, watch)
        return {job: loss for gang, own in zip(gangs, found, strict=True) for job, loss in zip(gang, own, strict=False)}


def compare(preset: str, common: Settings, rows: Iterable[Row], pool: Pool, seeds: Sequence[int]) -> dict[str, Any]:
    """Rates by the tuning seed, widened while the best lies at an end, then all seeds, seed by seed."""
    rows = list(rows)
    grid = {row: list(IVON if row.method == "IVON" else ADAMW)[1:3] for row in rows}
    tuned: dict[Row, dict[float, float]] = {row: {} for row in rows}
    for _ in range(3):
        jobs = [(row, rate, TUNING_SEED) for row in rows for rate in grid[row] if rate not in tuned[row]]
        for (row, rate, _seed), loss in pool.losses(jobs, common, f"{preset}: rates").items():
            tuned[row][rate] = loss
        for row, losses in tuned.items():
            best = min(losses, key=losses.__getitem__, default=None)
            if best is not None and best in (min(losses), max(losses)):
                grid[row] = [best / 2 if best == min(losses) else best * 2]
    best = {row: min(losses, key=losses.__getitem__) for row, losses in tuned.items() if losses}
    finals: dict[Row, list[float | None]] = {row: [None] * len(seeds) for row in best}
    jobs = [(row, best[row], seed) for seed in seeds for row in best]
    for (row, _, seed), loss in pool.losses(jobs, common, f"{preset}: {len(seeds)} seeds").items():
        finals[row][seeds.index(seed)] = loss
    whole = next((n for n in range(len(seeds)) if any(losses[n] is None for losses in finals.values())), len(seeds))
    found = []
    for row, losses in finals.items():
        rates = {f"{rate:g}": tuned[row][rate] for rate in sorted(tuned[row])}
        found.append({**asdict(row), "lr": best[row], "finals": losses[:whole], "tuned": rates})
    if not whole:
        found = [{**row, "finals": [min(row["tuned"].values())]} for row in found]
    used = list(seeds[:whole]) or [TUNING_SEED]
    return {"settings": asdict(common), "device": _device(common), "seeds": used, "rows": found}


def _device(common: Settings) -> str:
    return torch.cuda.get_device_name() if common.device == "cuda" else "CPU"


# ---- the table -------------------------------------------------------------------------------------------


def _rows(content: Mapping[str, Any]) -> dict[Row, dict[str, Any]]:
    return {Row(r["method"], r["beta1"], r["gamma"], r["budget"]): r for r in content["rows"]}


def interval(first: Sequence[float], second: Sequence[float]) -> str:
    """Mean of the differences, seed by seed, with its 95 % interval."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if len(differences) == 1:
        return f"{differences[0]:+.4f}"
    if not all(map(math.isfinite, differences)):
        return "–"
    error = STUDENT[len(differences)] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.4f} ± {error:.4f}"


def worth(loss: float, plain: float, longer: float) -> float:
    """Evaluations of the plain method to a loss, over those used: linear in log evaluations between its two budgets."""
    return math.exp(math.log(LONGER) * (plain - loss) / (plain - longer))


def table(content: Mapping[str, Any]) -> str:
    """All rows, the best of a method first."""
    done = _rows(content)
    head = ["", "β₁", "γ", "lr", "final loss [lowest, highest]", "minus plain β₁ = 0.9", "worth"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in ("AdamW", "NAdamW", "IVON"):
        base = Row("IVON" if method == "IVON" else "AdamW")
        own = [row for row in done if row.method == method]
        for row in sorted(own, key=lambda row: statistics.median(done[row]["finals"])):
            lines.append("| " + " | ".join(_line(row, done, base)) + " |")
    return "\n".join(lines)


def _nesterov(row: Row) -> bool:
    return row.method == "NAdamW" or row.gamma == round(1.0 - row.beta1, 3)


def _line(row: Row, done: Mapping[Row, Mapping[str, Any]], base: Row) -> list[str]:
    finals, plain, longer = done[row]["finals"], done.get(base), done.get(replace(base, budget=LONGER))
    name = row.method + ("" if row.budget == 1.0 else f", {row.budget:g}× evaluations")
    gamma = f"{row.gamma:g}" + (" (Nesterov)" if row.gamma and _nesterov(row) else "")
    middle, worthwhile = statistics.median(finals), "–"
    if plain and longer and row.budget == 1.0:
        worthwhile = f"{worth(middle, statistics.median(plain['finals']), statistics.median(longer['finals'])):.2f}"
    return [
        name, f"{row.beta1:g}", gamma, f"{done[row]['lr']:g}", f"{middle:.4f} [{min(finals):.4f}, {max(finals):.4f}]",
        interval(finals, plain["finals"]) if plain and row != base else "–", worthwhile,
    ]  # fmt: skip


def verdict(content: Mapping[str, Any]) -> str:
    """The best transport against the best of the controls, seed by seed."""
    done = {row: r["finals"] for row, r in _rows(content).items() if row.budget == 1.0}
    lines = []
    for methods in (("AdamW", "NAdamW"), ("IVON",)):
        mine = sorted((row for row in done if row.method in methods), key=lambda row: statistics.median(done[row]))
        transport = next((row for row in mine if row.gamma), None)
        without = next((row for row in mine if not row.gamma and not _nesterov(row)), None)
        nesterov = next((row for row in mine if _nesterov(row)), None)
        for words, control in (("the best β₁ without", without), ("the best Nesterov", nesterov)):
            if transport and control:
                gain = "the same run" if control == transport else interval(done[transport], done[control])
                lines.append(f"* {transport.name} (the best transport) minus {control.name} ({words}): {gain}")
    return "\n".join(lines)


def report(results: Path, page: Path) -> None:
    """Tables between their marks."""
    written = page.read_text(encoding="utf-8")
    for path in sorted(results.glob("transport-*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        s = content["settings"]
        head = f"`{s['preset']}`: {s['steps']} evaluations of {s['batch']} × {s['context']} bytes, {s['dtype']}, "
        alone = content["seeds"] == [TUNING_SEED]
        head += f"{content['device']}, " + (
            "the seed that rates were chosen by." if alone else f"{len(content['seeds'])} seeds."
        )
        new = f"{head}\n\n{table(content)}\n\n{verdict(content)}"
        print(f"## {path.stem}\n\n{new}\n")
        pattern = re.compile(rf"(<!-- table {path.stem} -->\n).*?(<!-- end -->)", re.DOTALL)
        written = pattern.sub(lambda found, new=new: f"{found[1]}\n{new}\n{found[2]}", written)
    page.write_text(written, encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="float32, or bf16 (of a GPU, unless it is given)")
    parser.add_argument("--workers", type=int, default=2, help="processes; 1: this one")
    parser.add_argument("--together", type=int, default=1, help="runs that take turns in a worker; of a GPU, 8")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--runs", type=Path, default=Path("build/transport"), help="folder of single runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    if not chosen.report:
        name, common, rows, seeds = chosen.preset, PRESETS[chosen.preset], rows_of(chosen.preset), SEEDS
        if chosen.quick:
            name, common, seeds = "quick", QUICK, SEEDS[:2]
            rows = [row for row in rows if row.beta1 == 0.9 and row.gamma < 0.25]
        dtype = chosen.dtype or ("bf16" if chosen.device == "cuda" else "float32")
        common = replace(common, device=chosen.device, dtype=dtype)
        pool = Pool(chosen.runs, chosen.workers, chosen.together, chosen.seconds)
        content = compare(name, common, rows, pool, seeds)
        chosen.results.mkdir(parents=True, exist_ok=True)
        path = chosen.results / f"transport-{name}.json"
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    report(chosen.results, chosen.page)


if __name__ == "__main__":
    main()
