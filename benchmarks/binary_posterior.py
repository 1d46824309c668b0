"""Where the posterior of binary weights pays: ensembles of draws, task after task, a committee that asks for labels.

    python benchmarks/binary_posterior.py            # a quarter of an hour of one core; the table into RESULTS.md
    python benchmarks/binary_posterior.py --short    # seconds: does it run?
    python benchmarks/binary_posterior.py --out FILE.json --parts ensembles --seeds 2

All on scikit-learn's digits (two thirds to learn from) with the MLP 64-128-128-10 of `binary_network.py`, cosine
schedules, and the library's defaults but for what a row says. Straight-through + Adam beside it.

* `ensembles`: negative log-likelihood, accuracy, calibration error (15 bins), and how well the entropy tells digits
  from digits whose pixels have changed places (AUROC), of the mode, of 32 draws with BatchNorm's statistics of
  training, and of 32 draws each with its own statistics.
* `tasks`: five tasks, the digits with their pixels in five orders, 300 steps each with the same outputs; accuracy of
  all at the end, of the first, and of each when it was learnt, without and with `next_task`.
* `committee`: labels asked for, 20 at a time from 20 to 200, at random, by the entropy of straight-through + Adam's
  point, or by the mutual information of 16 draws; accuracy at the end and averaged over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import torch  # noqa: E402
from binary_defaults import Rule, Ste, Task, accuracy, build, images  # noqa: E402
from binary_models import Batches, Images  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import expfam_poco as poco  # noqa: E402

RESULTS, PAGE = HERE / "results" / "binary-posterior.json", HERE / "RESULTS.md"
TASK = Task("digits", "mlp", 1500, 0.03)
DRAWS, TASKS, LABELS, STEP = 32, 5, 200, 20
STE = "straight-through + Adam"
Scores = dict[str, float]


def learn(made: Any, data: Images, steps: int, seed: int, batch: int = 32) -> None:
    """A cosine schedule of so many steps."""
    batches = Batches(data.x, data.y, min(batch, len(data.y)), torch.Generator().manual_seed(seed))
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    rates = [group["lr"] for group in made.optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(made.optimizer.param_groups, rates, strict=True):
            group["lr"] = 0.5 * rate * (1.0 + math.cos(math.pi * step / steps))
        made.step(*next(stream))
    for group, rate in zip(made.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def fresh(method: str, data: Images, seed: int, **choices: Any) -> Any:
    """A network with its optimizer."""
    torch.manual_seed(seed)
    model = build(TASK, data.x.shape[1:], 10)
    make = Ste if method == STE else Rule
    return make(model, TASK, len(data.y), seed, **choices)


def calibrated(model: nn.Module, data: Images) -> nn.Module:
    """A copy in evaluation mode with BatchNorm's statistics of its own weights."""
    model = copy.deepcopy(model)
    poco.recalibrate_batchnorm(model, data.x.split(min(len(data.x), 400)))
    return model.eval()


@torch.no_grad()
def probabilities(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Of every model: models × examples × classes."""
    return torch.stack([model(x).softmax(-1) for model in models])


def draws(made: Rule, data: Images, count: int, *, own: bool) -> list[nn.Module]:
    """Exported draws; `own`: each with BatchNorm's statistics of its own weights, else with those of training."""
    with warnings.catch_warnings():  # of BatchNorm's statistics, which are what is compared
        warnings.simplefilter("ignore")
        found = [poco.export_binary(made.model, made.optimizer, seed=seed).eval() for seed in range(count)]
    return [calibrated(model, data) for model in found] if own else found


# ---- ensembles -----------------------------------------------------------------------------------------------


def entropy(p: Tensor) -> Tensor:
    """In nats."""
    return torch.special.entr(p).sum(-1)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """How often a score from outside is above one from inside (Mann and Whitney)."""
    difference = outside.unsqueeze(1) - inside
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def calibration_error(p: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, Eq. 3)."""
    sure, right = p.max(-1).values, (p.argmax(-1) == y).double()
    number = (sure * bins).long().clamp(max=bins - 1)
    parts = [number == k for k in range(bins)]
    return float(
        sum((right[part].mean() - sure[part].mean()).abs() * part.double().mean() for part in parts if part.any())
    )


def scores(models: Sequence[nn.Module], data: Images) -> Scores:
    """Of the averaged prediction."""
    x, y = data.held_out_x, data.held_out_y
    order = torch.randperm(x[0].numel(), generator=torch.Generator().manual_seed(0))
    p = probabilities(models, x).mean(0).double()
    strange = probabilities(models, x.flatten(1)[:, order].view_as(x)).mean(0).double()
    return {
        "nll": float(-p[range(len(y)), y].clamp_min(1e-12).log().mean()),
        "accuracy": float((p.argmax(-1) == y).double().mean()),
        "ece": calibration_error(p, y),
        "auroc": auroc(entropy(p), entropy(strange)),
    }


def ensembles(seed: int, share: float = 1.0) -> dict[str, Scores]:
    """Scores by what predicts."""
    data, steps = images("digits"), int(share * TASK.gradients)
    count = max(2, int(share * DRAWS))
    found: dict[str, Scores] = {}
    made = fresh(STE, data, seed)
    learn(made, data, steps, seed)
    found[f"{STE}, its point"] = scores([calibrated(made.model, data)], data)
    for weight in (0.004, 0.1, 1.0):
        made = fresh("BayesBiNN", data, seed, kl_weight=weight)
        learn(made, data, steps, seed)
        label = f"BayesBiNN, T = {weight:g}"
        found[f"{label}, mode"] = scores([calibrated(made.model, data)], data)
        found[f"{label}, {DRAWS} draws, statistics of training"] = scores(draws(made, data, count, own=False), data)
        found[f"{label}, {DRAWS} draws, each its own statistics"] = scores(draws(made, data, count, own=True), data)
    return found


# ---- task after task -----------------------------------------------------------------------------------------


def permuted(seed: int) -> list[Images]:
    """The digits, then the same with their pixels in other orders."""
    data, generator = images("digits"), torch.Generator().manual_seed(seed)
    found = []
    for number in range(TASKS):
        order = torch.randperm(64, generator=generator) if number else torch.arange(64)
        x, other = (part.flatten(1)[:, order].view_as(part) for part in (data.x, data.held_out_x))
        found.append(Images(x, data.y, other, data.held_out_y))
    return found


def tasks(seed: int, share: float = 1.0) -> dict[str, Scores]:
    """Accuracies after all tasks, by method and the KL's weight after the first."""
    kinds: dict[str, tuple[str, float | None]] = {
        STE: (STE, None), "BayesBiNN": ("BayesBiNN", None),
        **{f"BayesBiNN, next_task(kl_weight={weight:g})": ("BayesBiNN", weight) for weight in (0.004, 1.0, 10.0)},
    }  # fmt: skip
    found: dict[str, Scores] = {}
    for label, (method, weight) in kinds.items():
        data = permuted(seed)
        made, learnt = fresh(method, data[0], seed), []
        for number, task in enumerate(data):
            if number and weight is not None:
                made.optimizer.next_task(kl_weight=weight)
            learn(made, task, int(share * 300), seed)
            learnt.append(accuracy(made.model, task))
        final = [accuracy(made.model, task) for task in data]
        found[label] = {
            "all": statistics.mean(final), "first": final[0], "when learnt": statistics.mean(learnt),
        }  # fmt: skip
    return found


# ---- a committee ---------------------------------------------------------------------------------------------


def committee(seed: int, share: float = 1.0) -> dict[str, Scores]:
    """Accuracies with labels asked for in different ways."""

    def at_random(made: Any, data: Images, pool: Tensor) -> Tensor:
        return torch.rand(len(pool), generator=torch.Generator().manual_seed(seed))

    def by_entropy(made: Any, data: Images, pool: Tensor) -> Tensor:
        return entropy(probabilities([calibrated(made.model, data)], pool)[0])

    def by_information(made: Any, data: Images, pool: Tensor) -> Tensor:
        p = probabilities(draws(made, data, max(2, DRAWS // 2), own=True), pool)
        return entropy(p.mean(0)) - entropy(p).mean(0)

    kinds: dict[str, tuple[str, Callable[..., Tensor], dict[str, Any]]] = {
        f"{STE}, random": (STE, at_random, {}), f"{STE}, entropy": (STE, by_entropy, {}),
        "BayesBiNN, random": ("BayesBiNN", at_random, {}),
        "BayesBiNN, entropy of the mode": ("BayesBiNN", by_entropy, {}),
        "BayesBiNN, committee": ("BayesBiNN", by_information, {}),
        "BayesBiNN, committee, T = 0.1": ("BayesBiNN", by_information, {"kl_weight": 0.1}),
    }  # fmt: skip
    data, found = images("digits"), {}
    rounds = range(STEP, max(2 * STEP, int(share * LABELS)) + 1, STEP)
    for label, (method, asks, choices) in kinds.items():
        order = torch.randperm(len(data.y), generator=torch.Generator().manual_seed(seed))
        known, pool, reached = order[:STEP], order[STEP:], []
        for labels in rounds:
            part = Images(data.x[known], data.y[known], data.held_out_x, data.held_out_y)
            made = fresh(method, part, seed, **choices)
            learn(made, part, int(share * 200), seed)
            reached.append(accuracy(made.model, part))
            if labels < rounds[-1]:
                best = asks(made, part, data.x[pool]).argsort(descending=True)
                known, pool = torch.cat([known, pool[best[:STEP]]]), pool[best[STEP:]]
        found[label] = {"at the end": reached[-1], "averaged": statistics.mean(reached)}
    return found


# ---- tables --------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[..., dict[str, Scores]]] = {"ensembles": ensembles, "tasks": tasks, "committee": committee}


def table(runs: Sequence[Mapping[str, Scores]]) -> str:
    """Means over seeds ± standard errors."""
    columns = list(next(iter(runs[0].values())))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for label in runs[0]:
        cells = []
        for column in columns:
            values = [run[label][column] for run in runs]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            cells.append(f"{statistics.mean(values):.3f} ± {error:.3f}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(found: Mapping[str, Sequence[Mapping[str, Scores]]], page: Path = PAGE) -> None:
    """The tables between their marks."""
    text = page.read_text(encoding="utf-8")
    for part, runs in found.items():
        mark = f"<!-- table binary-{part} -->"
        before, rest = text.split(mark, 1)
        text = f"{before}{mark}\n\n{table(runs)}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """Run what is asked for, print the tables, and put them where they belong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="one seed, a fiftieth of the steps: does it run?")
    parser.add_argument("--out", type=Path, help="JSON there, and no table is replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    share, seeds = (0.02, 1) if options.short else (1.0, options.seeds)
    keeps = not (options.short or options.out)
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if keeps and RESULTS.exists() else {}
    for part in options.parts:
        found[part] = [PARTS[part](seed, share) for seed in range(seeds)]
        print(f"{part}\n\n{table(found[part])}\n", flush=True)
        if keeps or options.out:
            (options.out or RESULTS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if keeps:
        report(found)


if __name__ == "__main__":
    main()
