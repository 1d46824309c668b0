"""Predicted and measured worth of corrections, larger batches and transport: a small network on fresh data.

    python benchmarks/worth.py             # tunes, runs and reports: worth.json, and the table that RESULTS.md quotes
    python benchmarks/worth.py --quick     # so short that it shows only that all works
    python benchmarks/worth.py --language-model     # predictions beside what benchmarks/language_model.py has measured

Fresh data: digits (scikit-learn) moved by up to a pixel and with noise on every pixel, drawn anew for every mini-batch,
so that none comes twice. A 64-64-10 network; IVON with a cosine schedule. Every method gets the same number of gradient
evaluations, and its rate is tuned on its own on another seed.

*Measured worth*: the number of evaluations at which plain IVON (with a schedule and rate of its own for every budget)
reaches the same held-out loss, interpolated linearly between log loss and log evaluations, over the number that was
used. *Predicted worth*: `poco.worth` at one quarter, half and three quarters of the plain run, the mean of the three.

With `--language-model` the plain run is IVON's of `benchmarks/language_model.py` (0.4 M weights, 1000 evaluations),
looked at after 100 and 300 steps; what is measured there counts from the end of the burn-in on, between plain runs of
400 and 1000 evaluations.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import expfam_poco as poco
from expfam_poco.correction import Recursive, Transported

RESULTS = Path(__file__).resolve().parent / "results" / "worth.json"
PAGE = Path(__file__).resolve().parent / "RESULTS.md"
BATCH, EVERY, SIZE = 8, 10, 10
BUDGETS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4)
RATES = (0.1, 0.2, 0.4, 0.8)
TUNING_SEED = 1000


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


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits to draw from, and held-out ones."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32).view(-1, 8, 8) / 16.0, torch.tensor(digits.target)
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


class Stream:
    """Endless fresh mini-batches of a seed; going through it again goes on."""

    def __init__(self, seed: int, times: int = 1) -> None:
        self.generator, self.rows = torch.Generator().manual_seed(seed), times * BATCH
        self.train = data()[0]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield fresh(*self.train, self.rows, self.generator)


class Run:
    """One training; `evaluations` counts gradients of plain mini-batches."""

    def __init__(self, method: Method, rate: float, seed: int, budget: int) -> None:
        torch.manual_seed(seed)
        self.method, self.rate, self.budget, self.evaluations, self.steps = method, rate, budget, 0.0, 0
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        corrections: dict[str, Any] = {"recursive": Recursive(), "transported": Transported(gamma=method.gamma)}
        choices = {"correction": corrections[method.kind]} if method.kind in corrections else {}
        momentum = {"beta1": 0.0} if method.kind == "recursive" else {}  # which averages by itself
        self.optimizer = poco.IVONPoCo(
            self.model.parameters(), lr=rate, ess=1e6, hess_init=1.0, beta2=0.999, clip_radius=0.1, weight_decay=1e-4,
            alpha=method.alpha, seed=seed, **momentum, **choices,
        )  # fmt: skip
        self.stream = iter(Stream(seed, method.times))
        self.mega: list[Any] = []

    def closure(self, batch: tuple[Tensor, Tensor]) -> Any:
        """The mean loss of a mini-batch."""
        return lambda: functional.cross_entropy(self.model(batch[0]), batch[1])

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
        """On held-out digits, changed as those for training."""
        x, y = data()[1]
        generator = torch.Generator().manual_seed(77)
        value = functional.cross_entropy(self.model((many := fresh(x, y, 4096, generator))[0]), many[1])
        return float(value)


def final(method: Method, rate: float, seed: int, budget: int) -> float:
    """The held-out loss of a run; infinite where it has failed."""
    try:
        value = Run(method, rate, seed, budget).until(1.0).loss()
    except (FloatingPointError, ValueError):
        return math.inf
    return value if math.isfinite(value) else math.inf


def tuned(method: Method, budget: int, rates: tuple[float, ...]) -> float:
    """The rate of least loss on another seed; the grid is widened where that is its largest."""
    if len(rates) == 1:
        return rates[0]
    losses = {rate: final(method, rate, TUNING_SEED, budget) for rate in rates}
    while min(losses, key=losses.__getitem__) == max(losses):
        losses[2.0 * max(losses)] = final(method, 2.0 * max(losses), TUNING_SEED, budget)
    return min(losses, key=losses.__getitem__)


def measured_worth(loss: float, budgets: list[int], losses: list[float], used: int) -> float:
    """The plain method's evaluations to this loss, over those used; extrapolated along the outer pieces."""
    x, y = np.log(budgets), np.log(losses)
    place = int(np.clip(np.searchsorted(-y, -math.log(loss)), 1, len(y) - 1))
    slope = (x[place] - x[place - 1]) / (y[place] - y[place - 1])
    return float(math.exp(x[place] + slope * (math.log(loss) - y[place])) / used)


def predicted(budget: int, rate: float, seed: int) -> list[poco.Worth]:
    """Along a plain run."""
    run, found = Run(METHODS["plain"], rate, seed, budget), []
    for share in (0.25, 0.5, 0.75):
        run.until(share)
        stream = [batch for batch, _ in zip(Stream(5000 + seed), range(60), strict=False)]
        arguments: dict[str, Any] = {"transports": (0.1, 0.5), "alphas": (0.5, 1.0), "every": EVERY, "size": SIZE}
        found.append(poco.worth(run.model, run.optimizer, run.closure, Fresh(stream), **arguments))
    return found


class Fresh:
    """Mini-batches that do not say how many they are: none comes twice."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def _line(name: str, row: dict[str, Any]) -> str:
    by_share = ", ".join(f"{value:.2f}" for value in row["by_share"])
    return (
        f"{name:22s} rate {row['rate']:<5g} measured {row['measured']:.2f} ± {row['error']:.2f}   "
        f"predicted {row['predicted']:.2f} ({by_share})   if noise is all {row['limit']:.2f}"
    )


def markdown(content: dict[str, Any]) -> str:
    """The table that RESULTS.md shows."""
    lines = [
        "| method | lr | measured | predicted | at ¼, ½, ¾ of the run | if noise is all | predicted − measured |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in content["rows"].items():
        cells = [name, f"{row['rate']:g}", f"{row['measured']:.2f} ± {row['error']:.2f}", f"{row['predicted']:.2f}"]
        cells += [", ".join(f"{value:.2f}" for value in row["by_share"]), f"{row['limit']:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{row['predicted'] - row['measured']:+.2f}"]) + " |")
    return "\n".join(lines)


def run(budget: int, rates: tuple[float, ...], seeds: range, methods: dict[str, Method]) -> dict[str, Any]:
    """Tune and run everything."""
    budgets = [round(share * budget) for share in BUDGETS]
    plain = {n: tuned(METHODS["plain"], n, rates) for n in budgets}
    print("plain rates", plain, flush=True)
    curves = [[final(METHODS["plain"], plain[n], seed, n) for n in budgets] for seed in seeds]
    curve = [float(np.mean(values)) for values in zip(*curves, strict=True)]
    print("plain losses", [round(value, 4) for value in curve], flush=True)
    foretold = [predicted(budget, plain[budget], seed) for seed in seeds]
    rows: dict[str, Any] = {}
    for name, method in methods.items():
        rate = tuned(method, budget, rates)
        losses = [final(method, rate, seed, budget) for seed in seeds]
        worths = [measured_worth(loss, budgets, curve, budget) for loss in losses]
        found = [[w[method.row] for w in of_seed] for of_seed in foretold]
        row = rows[name] = {
            "rate": rate,
            "losses": losses,
            "worths": worths,
            "measured": measured_worth(float(np.mean(losses)), budgets, curve, budget),
            "error": statistics.stdev(worths) / math.sqrt(len(worths)),
            "predicted": float(np.mean([[r.worth for r in of_seed] for of_seed in found])),
            "by_share": np.mean([[r.worth for r in of_seed] for of_seed in found], axis=0).tolist(),
            "limit": float(np.mean([[r.limit for r in of_seed] for of_seed in found])),
        }
        print(_line(name, row), flush=True)
    noise = np.median([[w.noise for w in of_seed] for of_seed in foretold], axis=0).tolist()
    print("noise/signal at a quarter, half, three quarters:", [round(value, 1) for value in noise])
    return {"budgets": budgets, "plain_rates": plain, "plain": curve, "noise": noise, "rows": rows}


def language_model(marks: Sequence[int] = (100, 300)) -> dict[str, Any]:
    """Predicted and measured worth of the language model's mega-batch correction and larger batch."""
    # Examples have a module of that name as well, which this one imports.
    found_at = PAGE.parent / "language_model.py"
    spec = importlib.util.spec_from_file_location("language_model_benchmark", found_at)
    assert spec is not None and spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = theirs
    spec.loader.exec_module(theirs)
    common = theirs.COMMON
    stored = json.loads((PAGE.parent / "results" / "language-model" / "compare.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in stored["rows"]}
    ends = {name: float(np.mean([curve["loss"][-1] for curve in row["curves"]])) for name, row in rows.items()}
    burn_in, plain = common.burn_in, "IVON, 3× steps"
    after = [common.steps - burn_in, 3 * (common.steps - burn_in)]
    losses = [ends["IVON"], ends[plain]]
    settings = theirs.CONFIGURATIONS[plain].settings(common, rows[plain]["lr"], 0)
    training = theirs.Training(settings, theirs.text(common.context))
    found = []
    for mark in marks:
        for _ in training.run(until=mark):
            pass
        batches = Fresh(training.batches(sys.modules["corpus"].MEASUREMENT, 1000 * mark, 40))
        pace: dict[str, Any] = {"alphas": (common.alpha,), "every": common.every, "size": common.mega}
        found.append(poco.worth(training.model, training.optimizer, training.closure, batches, samples=12, **pace))
        print(found[-1], flush=True)
    content = {}
    for name, start in (("IVON, 3× batch", "3x batch"), ("IVON-PoCo", f"snapshot K=10 M=10 alpha={common.alpha:.2f}")):
        content[name] = {
            "measured": measured_worth(ends[name], after, losses, after[1]),
            "predicted": [w[start].worth for w in found],
            "errors": [w[start].error for w in found],
        }
        print(name, content[name], flush=True)
    return {"noise": [w.noise for w in found], "transport": [w["transport"].worth for w in found], "rows": content}


def main() -> None:
    """Tune, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", action="store_true", help="the language model in place of the digits")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--budget", type=int, default=1000, help="gradient evaluations of a run")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.language_model:
        language_model()
        return
    if options.quick:
        found = run(40, RATES[1:2], range(2), METHODS)
    else:
        found = run(options.budget, RATES, range(options.seeds), METHODS)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
