"""Predicted and measured worth of corrections, larger batches and transport, on fresh data.

    python benchmarks/worth.py                       # a small network: tunes, runs, reports into RESULTS.md
    python benchmarks/worth.py text                  # a GPT of 0.1 M weights; with a GPU, --preset small --device cuda
    python benchmarks/worth.py --quick               # so short that it shows only that all works

*digits*: of scikit-learn, moved by up to a pixel and with noise on every pixel, drawn anew for every mini-batch, so
that none comes twice; a 64-64-10 network. *text*: bytes of the standard library's sources. IVON with a cosine
schedule. Every method gets the same number of gradient evaluations, and its rate is tuned on its own on two other
seeds.

*Measured worth*: the number of evaluations at which plain IVON (with a schedule and rate of its own for every budget)
reaches the same held-out loss, interpolated linearly between log loss and log evaluations, over the number that was
used. *Predicted worth*: `poco.worth` in the middle of each third of the plain run; evaluations add up along it, so that
the three are put together as 1/mean(1/worth).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import expfam_poco as poco
from expfam_poco.correction import Recursive, Transported
from expfam_poco.tools.jobs import Calls, run_jobs

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

RESULTS, PAGE = HERE / "results", HERE / "RESULTS.md"
EVERY, SIZE = 10, 10
BUDGETS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4)
RATES = (0.1, 0.2, 0.4, 0.8)
TUNING_SEEDS = (1000, 1001)
SHARES = (1 / 6, 1 / 2, 5 / 6)  # of a run, where it is looked at


@dataclass(frozen=True)
class Method:
    """What is run, and the row of `poco.worth` that predicts it (the first one whose label starts so)."""

    row: str
    times: int = 1
    alpha: float = 0.0
    kind: str = "plain"
    gamma: float = 0.1


METHODS = {
    "plain": Method("plain"),
    "3x batch": Method("3x batch", times=3),
    "snapshot, alpha 0.5": Method("snapshot K=10 M=10 alpha=0.50", alpha=0.5, kind="snapshot"),
    "snapshot, alpha 1": Method("snapshot K=10 M=10 alpha=1.00", alpha=1.0, kind="snapshot"),
    "cached, alpha 1": Method("cached", alpha=1.0, kind="cached"),
    "recursive, alpha 0.9": Method("recursive", alpha=0.9, kind="recursive"),
    "transport 0.1": Method("transport 0.1", kind="transported"),
    "transport 0.5": Method("transport 0.5", kind="transported", gamma=0.5),
}


# ---- what is learned -------------------------------------------------------------------------------------


class Problem(Protocol):
    """A model, endless mini-batches of which none comes twice, a loss, and IVON's hyperparameters."""

    settings: dict[str, Any]
    samples: int

    def model(self) -> nn.Module:
        """From torch's seed."""

    def stream(self, seed: int, times: int = 1) -> Iterator[Any]:
        """Mini-batches, `times` as large."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean over a mini-batch."""

    def held_out(self, model: nn.Module) -> float:
        """The mean over what is not trained on."""


@dataclass(frozen=True)
class Digits:
    """Digits made anew for every mini-batch of 8, and a network of 4,810 weights."""

    samples: int = 60
    settings: dict[str, Any] = field(
        default_factory=lambda: {
            "ess": 1e6, "hess_init": 1.0, "beta2": 0.999, "clip_radius": 0.1, "weight_decay": 1e-4,
        }
    )  # fmt: skip

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def stream(self, seed: int, times: int = 1) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield fresh(*digits()[0], times * 8, generator)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def held_out(self, model: nn.Module) -> float:
        return float(self.loss(model, fresh(*digits()[1], 4096, torch.Generator().manual_seed(77))))


@functools.cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits to draw from, and held-out ones."""
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32).view(-1, 8, 8) / 16.0, torch.tensor(found.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def fresh(x: Tensor, y: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows drawn with replacement, each moved by -1, 0 or 1 pixels both ways, and with noise."""
    chosen = torch.randint(len(y), (rows,), generator=generator)
    moves = torch.randint(-1, 2, (rows, 2), generator=generator)
    padded, at = functional.pad(x[chosen], (1, 1, 1, 1)), torch.arange(8)
    down, right = (1 + moves[:, i, None] + at for i in (0, 1))
    moved = padded[torch.arange(rows)[:, None, None], down[:, :, None], right[:, None, :]]
    return (moved + 0.3 * torch.randn(rows, 8, 8, generator=generator)).flatten(1), y[chosen]


@dataclass(frozen=True)
class Text:
    """A GPT on windows of 64 bytes, 8 in a mini-batch."""

    preset: str = "nano"
    device: str = "cpu"
    context: int = 64
    rows: int = 8
    samples: int = 24
    settings: dict[str, Any] = field(
        default_factory=lambda: {
            "ess": 1e8, "hess_init": 1e-3, "beta2": 0.999, "clip_radius": 1e-3, "weight_decay": 1e-6,
            "rescale_lr": False,
        }
    )  # fmt: skip

    def model(self) -> nn.Module:
        from gpt import GPT, preset

        return GPT(preset(self.preset, context=self.context, vocabulary=256)).to(self.device)

    def stream(self, seed: int, times: int = 1) -> Iterator[Any]:
        index = 0
        while True:
            yield (
                corpus(self.context)
                .batch(self.context, times * self.rows, seed=seed, stream=0, index=index)
                .to(self.device)
            )
            index += 1

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            value: Tensor = model.loss(batch)  # type: ignore[operator]
        return value

    def held_out(self, model: nn.Module) -> float:
        parts = corpus(self.context).validation(self.context, 256).to(self.device).split(64)
        return sum(float(self.loss(model, part)) for part in parts) / len(parts)


@functools.cache
def corpus(context: int) -> Any:
    """The text, read once in a process."""
    from corpus import load

    return load("stdlib", context)


# ---- runs ------------------------------------------------------------------------------------------------


class Run:
    """One training; `evaluations` counts gradients of plain mini-batches."""

    def __init__(self, problem: Problem, method: Method, rate: float, seed: int, budget: int) -> None:
        torch.manual_seed(seed)
        self.problem, self.method, self.rate, self.budget = problem, method, rate, budget
        self.evaluations, self.steps, self.model = 0.0, 0, problem.model()
        corrections: dict[str, Any] = {"recursive": Recursive(), "transported": Transported(gamma=method.gamma)}
        choices = {"correction": corrections[method.kind]} if method.kind in corrections else {}
        momentum = {"beta1": 0.0} if method.kind == "recursive" else {}  # which averages by itself
        self.optimizer = poco.IVONPoCo(
            self.model.parameters(), lr=rate, alpha=method.alpha, seed=seed, **problem.settings, **momentum, **choices
        )
        self.stream = problem.stream(seed, method.times)
        self.mega: list[Any] = []

    def closure(self, batch: Any) -> Any:
        """The mean loss of a mini-batch."""
        return lambda: self.problem.loss(self.model, batch)

    def until(self, share: float) -> Run:
        """Train until this share of the budget is used."""
        while self.evaluations < share * self.budget:
            progress = self.evaluations / self.budget
            warm = min(1.0, (progress + 1.0 / self.budget) / 0.04)
            self.optimizer.param_groups[0]["lr"] = self.rate * warm * (0.505 + 0.495 * math.cos(math.pi * progress))
            self.step()
        return self

    def step(self) -> None:
        """One step, with what it takes of a mega-batch."""
        kind = self.method.kind
        if kind in ("snapshot", "cached") and self.steps % EVERY == 0:
            self.mega = [next(self.stream) for _ in range(SIZE)]
            self.optimizer.refresh([self.closure(batch) for batch in self.mega])
            self.evaluations += SIZE
        batch = self.mega[self.steps % SIZE] if kind == "cached" else next(self.stream)
        self.optimizer.step(self.closure(batch))
        # A cached step would have its second gradient from the store; here it is evaluated again, and not counted.
        twice = kind == "snapshot" or (kind == "recursive" and self.steps > 0)
        self.evaluations += self.method.times * (2 if twice else 1)
        self.steps += 1

    @torch.no_grad()
    def loss(self) -> float:
        """Held-out."""
        return self.problem.held_out(self.model)


def final(problem: Problem, method: Method, rate: float, seed: int, budget: int) -> float:
    """The held-out loss of a run; infinite where it has failed."""
    try:
        value = Run(problem, method, rate, seed, budget).until(1.0).loss()
    except (FloatingPointError, ValueError):
        return math.inf
    return value if math.isfinite(value) else math.inf


def predicted(problem: Problem, rate: float, seed: int, budget: int) -> dict[str, Any]:
    """Along a plain run: worth and limit of every method's row, and the noise-to-signal ratio."""
    run = Run(problem, METHODS["plain"], rate, seed, budget)
    found: dict[str, Any] = {"noise": [], "clipped": [], **{name: [] for name in METHODS}}
    for share in SHARES:
        run.until(share)
        batches = [batch for batch, _ in zip(problem.stream(5000 + seed), range(problem.samples + EVERY), strict=False)]
        arguments: dict[str, Any] = {"transports": (0.1, 0.5), "alphas": (0.5, 1.0), "every": EVERY, "size": SIZE}
        if problem.samples < 60:
            arguments["samples"] = problem.samples
        worth = poco.worth(run.model, run.optimizer, run.closure, Fresh(batches), **arguments)
        found["noise"].append(worth.noise)
        found["clipped"].append(worth.pairs.clipped)
        for name, method in METHODS.items():
            found[name].append((worth[method.row].worth, worth[method.row].limit))
    return found


class Fresh:
    """Mini-batches that do not say how many they are: none comes twice."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


Wanted = dict[Any, tuple[Problem, Method, int]]
"""What is to be tuned, with its budget."""


def tuned(wanted: Wanted, rates: tuple[float, ...], workers: int) -> dict[Any, float]:
    """The rate of least mean loss on other seeds for every key; a grid is widened where that is at its end."""
    losses: dict[Any, dict[float, float]] = {key: {} for key in wanted}
    todo = [(key, rate) for key in wanted for rate in rates]
    for _ in range(3 if len(rates) > 1 else 1):
        jobs = [(*wanted[key][:2], rate, seed, wanted[key][2]) for key, rate in todo for seed in TUNING_SEEDS]
        found = run_jobs(Calls(final), jobs, workers)
        for i, (key, rate) in enumerate(todo):
            losses[key][rate] = statistics.mean(found[len(TUNING_SEEDS) * i :][: len(TUNING_SEEDS)])
        best = {key: min(found, key=found.__getitem__) for key, found in losses.items()}
        todo = [(key, 2 * best[key]) for key, found in losses.items() if best[key] == max(found)]
        todo += [(key, best[key] / 2) for key, found in losses.items() if best[key] == min(found) and len(found) > 1]
    return best


def measured_worth(loss: float, budgets: list[int], losses: list[float], used: int) -> float:
    """The plain method's evaluations to this loss, over those used; extrapolated along the outer pieces."""
    x, y = np.log(budgets), np.log(losses)
    place = int(np.clip(np.searchsorted(-y, -math.log(loss)), 1, len(y) - 1))
    slope = (x[place] - x[place - 1]) / (y[place] - y[place - 1])
    return float(math.exp(x[place] + slope * (math.log(loss) - y[place])) / used)


def run(
    problem: Problem, budget: int, rates: tuple[float, ...], seeds: range, workers: int, methods: dict[str, Method]
) -> dict[str, Any]:
    """Tune and run everything."""
    budgets, plain = [round(share * budget) for share in BUDGETS], METHODS["plain"]
    wanted: Wanted = {n: (problem, plain, n) for n in budgets}
    wanted |= {name: (problem, method, budget) for name, method in methods.items() if name != "plain"}
    best = tuned(wanted, rates, workers)
    best["plain"] = best[budget]
    keys = [(key, seed) for key in (*budgets, *methods) for seed in seeds]
    wanted["plain"] = wanted[budget]
    jobs = [(*wanted[key][:2], best[key], seed, wanted[key][2]) for key, seed in keys]
    finals = run_jobs(Calls(final), jobs, workers)
    losses: dict[Any, list[float]] = {key: [] for key in (*budgets, *methods)}
    for (key, _), loss in zip(keys, finals, strict=True):
        losses[key].append(loss)
    curve = [float(np.mean(losses[n])) for n in budgets]
    foretold = run_jobs(Calls(predicted), [(problem, best[budget], seed, budget) for seed in seeds], workers)
    rows: dict[str, Any] = {}
    for name in methods:
        worths = [measured_worth(loss, budgets, curve, budget) for loss in losses[name]]
        found = np.array([of_seed[name] for of_seed in foretold])  # seeds × shares × (worth, limit)
        rows[name] = {
            "rate": best[name],
            "losses": losses[name],
            "worths": worths,
            "measured": measured_worth(float(np.mean(losses[name])), budgets, curve, budget),
            "error": statistics.stdev(worths) / math.sqrt(len(worths)),
            "predicted": float(1.0 / (1.0 / found[..., 0]).mean()),
            "by_share": found[..., 0].mean(0).tolist(),
            "limit": float(1.0 / (1.0 / found[..., 1]).mean()),
        }
    noise, clipped = (np.median([of_seed[k] for of_seed in foretold], axis=0).tolist() for k in ("noise", "clipped"))
    rates_of_plain = {n: best[n] for n in budgets}
    whole = {"budgets": budgets, "plain_rates": rates_of_plain, "plain": curve, "noise": noise, "clipped": clipped}
    return {**whole, "rows": rows}


# ---- the table -------------------------------------------------------------------------------------------


def markdown(content: dict[str, Any]) -> str:
    """The table that RESULTS.md shows."""
    lines = [
        "| method | lr | measured | predicted | in each third | if noise is all | predicted − measured |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in content["rows"].items():
        cells = [name, f"{row['rate']:g}", f"{row['measured']:.2f} ± {row['error']:.2f}", f"{row['predicted']:.2f}"]
        cells += [", ".join(f"{value:.2f}" for value in row["by_share"]), f"{row['limit']:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{row['predicted'] - row['measured']:+.2f}"]) + " |")
    noise = ", ".join(f"{value:.1f}" for value in content["noise"])
    clipped = ", ".join(f"{100 * value:.0f}" for value in content["clipped"])
    last = f"In each third: noise to signal of a plain gradient {noise}; of the weights {clipped} % clipped."
    return "\n".join(lines) + f"\n\n{last}\n"


def report(results: Path, page: Path) -> None:
    """Tables between their marks."""
    written = page.read_text(encoding="utf-8")
    for name, file in (("worth", "worth.json"), ("worth-text", "worth-text.json")):
        if (results / file).is_file():
            new = markdown(json.loads((results / file).read_text(encoding="utf-8")))
            print(f"## {name}\n\n{new}")
            pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            written = pattern.sub(lambda found, new=new: f"{found[1]}\n{new}\n{found[2]}", written)
    page.write_text(written, encoding="utf-8")


def main() -> None:
    """Tune, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", nargs="?", choices=["digits", "text"], default="digits")
    parser.add_argument("--preset", default="nano", help="of the text's model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only the tables of what is stored")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--budget", type=int, default=1000, help="gradient evaluations of a run")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results' JSON")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: a standard error needs two or more.")
    torch.set_num_threads(1)
    text = Text("nano", options.device, 16, 2, 12) if options.quick else Text(options.preset, options.device)
    problem: Problem = Digits() if options.problem == "digits" else text
    rates, seeds, budget = (RATES[1:2], 2, 40) if options.quick else (RATES, options.seeds, options.budget)
    if options.report:
        return report(options.results, options.page)
    found = run(problem, budget, rates, range(seeds), options.workers, METHODS)
    options.results.mkdir(parents=True, exist_ok=True)
    name = "worth.json" if options.problem == "digits" else "worth-text.json"
    (options.results / name).write_text(json.dumps(found, indent=1))
    return report(options.results, options.page)


if __name__ == "__main__":
    main()
