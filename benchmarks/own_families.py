"""What the correction is worth to families without a Gaussian's curvature, at equal evaluations of the gradient.

    python benchmarks/own_families.py run       # numbers into results/own-families.json (some minutes)
    python benchmarks/own_families.py report    # the table into RESULTS.md

Six small tasks, each with the family that suits its parameter. Every method gets the same evaluations of mini-batches
and the best of three rates; what is left unsaid is the default. The table shows E_q[mean loss] + KL(q ‖ p₀)/N at the
end.
`--quick` makes everything so short that it shows only that all works.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.family.noise import NoiseKey

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "own-families.json", HERE / "RESULTS.md"
BEGIN, END = "<!-- table own-families -->", "<!-- end -->"
SIZE, BATCH, EVERY, MEGA = 512, 16, 10, 10
RATES, SEEDS, BUDGET = (0.2, 0.05, 0.0125), (0, 1), 160
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"alpha": 0.0},
    "corrected": {},
    "adaptive": {"alpha": "adaptive"},
}
TESTED = 512  # draws of q at the end


class Task(NamedTuple):
    """Data, where weights begin, the losses of a batch's rows at weights, and what the optimizer is told."""

    data: tuple[Tensor, ...]
    start: Tensor
    loss: Callable[..., Tensor]
    options: dict[str, Any]
    scale: float = 1.0  # of the rates: what is stable here


def _regression(generator: torch.Generator, theta: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    x = torch.randn(SIZE, len(theta), generator=generator)
    return x, x @ theta + noise * torch.randn(SIZE, generator=generator)


def _squares(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x @ theta - y).square()


def weibull(generator: torch.Generator) -> Task:
    """Positive weights, noisy data."""
    return Task(_regression(generator, torch.linspace(0.3, 2.0, 8), 2.0), torch.ones(8), _squares, {}, 0.03)


def von_mises_fisher(generator: torch.Generator) -> Task:
    """Directions by which points are told apart."""
    theta = nn.functional.normalize(torch.randn(2, 3, generator=generator), dim=-1)
    x = torch.randn(SIZE, 2, 3, generator=generator)
    y = (torch.rand(SIZE, generator=generator) < torch.sigmoid(4.0 * (x * theta).sum((1, 2)))).float()

    def loss(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(4.0 * (x * weights).sum((1, 2)), y, reduction="none")

    return Task((x, y), nn.functional.normalize(torch.ones(2, 3), dim=-1), loss, {}, 0.3)


def poisson(generator: torch.Generator) -> Task:
    """Counts, by scores."""
    data = _regression(generator, torch.tensor([1.0, 2.0, 4.0, 6.0]), 2.0)
    return Task(data, torch.full((4,), 3.0), _squares, {"mc_samples": 4}, 0.001)


def laplace(generator: torch.Generator) -> Task:
    """How much noise each weight bears around a known place."""
    return Task(_regression(generator, torch.zeros(8), 1.0), torch.zeros(8), _squares, {})


def normal_gamma(generator: torch.Generator) -> Task:
    """Locations and precisions of four columns of data."""
    truth = torch.tensor([[0.0, 1.0], [1.0, 4.0], [-1.0, 0.5], [3.0, 2.0]])
    x = truth[:, 0] + torch.randn(SIZE, 4, generator=generator) * truth[:, 1].rsqrt()

    def loss(weights: Tensor, x: Tensor) -> Tensor:
        place, precision = weights.unbind(-1)
        return (0.5 * precision * (x - place).square() - 0.5 * precision.log()).sum(-1)

    return Task((x,), torch.tensor([[0.5, 1.0]]).repeat(4, 1), loss, {}, 0.05)


def wishart(generator: torch.Generator) -> Task:
    """The precision matrix of normal vectors."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, -0.5, 1.5]])
    x = torch.randn(SIZE, 3, generator=generator) @ root.T

    def loss(weights: Tensor, x: Tensor) -> Tensor:
        return 0.5 * (x @ weights * x).sum(-1) - 0.5 * torch.logdet(weights)

    return Task((x,), torch.eye(3), loss, {})


TASKS: dict[str, Callable[[torch.Generator], Task]] = {
    "weibull": weibull,
    "von_mises_fisher": von_mises_fisher,
    "poisson": poisson,
    "laplace": laplace,
    "normal_gamma": normal_gamma,
    "wishart": wishart,
}


def objective(name: str, task: Task, optimizer: poco.PosteriorCorrected) -> float:
    """E_q[mean loss] + KL(q ‖ p₀)/N."""
    family, state = poco.resolve_family(name), optimizer.posterior_states()["weight"]
    noise = family.noise(task.start.shape, TESTED, NoiseKey(7))
    draws = family.sample(state, noise)
    loss = torch.stack([task.loss(theta, *task.data).mean() for theta in draws]).mean()
    event = task.start.shape[task.start.ndim - family.event_dim :]
    prior = family.centred_at(family.reference_like(torch.zeros(event)), 1.0)
    return float(loss + family.kl(state, prior).sum() / SIZE)


def run(name: str, method: str, rate: float, seed: int, budget: int) -> float:
    """One training; infinite where a step is refused."""
    torch.manual_seed(seed)
    task = TASKS[name](torch.Generator().manual_seed(1000 + seed))
    weight = nn.Parameter(task.start.clone())
    optimizer = poco.PosteriorCorrected(
        [("weight", weight)],
        name,
        lr=rate * task.scale,
        ess=SIZE,
        weight_decay=1.0 / SIZE,
        seed=seed,
        **task.options,
        **METHODS[method],
    )
    generator = torch.Generator().manual_seed(seed)

    def batch() -> Callable[[], Tensor]:
        rows = torch.randint(SIZE, (BATCH,), generator=generator)
        part = [values[rows] for values in task.data]
        return lambda: task.loss(weight, *part).mean()

    spent, step = 0, 0
    try:
        while spent < budget:
            if method != "plain" and step % EVERY == 0:
                optimizer.refresh([batch() for _ in range(MEGA)])
                spent += MEGA
            optimizer.step(batch())
            spent += 1 if method == "plain" or not optimizer.diagnostics().get("alpha", 1.0) else 2
            step += 1
    except (poco.NonFiniteError, ValueError):
        return math.inf
    return objective(name, task, optimizer)


def measured(quick: bool) -> dict[str, Any]:
    """Every task, method, rate and seed."""
    torch.set_num_threads(1)
    seeds, budget = (SEEDS[:1], 35) if quick else (SEEDS, BUDGET)
    found: dict[str, Any] = {}
    for name in list(TASKS)[:: 5 if quick else 1]:
        found[name] = {
            method: [[run(name, method, rate, seed, budget) for seed in seeds] for rate in RATES] for method in METHODS
        }
        print(
            name, {method: [round(statistics.median(row), 4) for row in rows] for method, rows in found[name].items()}
        )
    return {"rates": RATES, "budget": budget, "seeds": len(seeds), "tasks": found}


def best(content: dict[str, Any], name: str) -> dict[str, float]:
    """For every method the mean over seeds of the objective at the end, at the best of its rates."""
    runs: dict[str, Sequence[Sequence[float]]] = content["tasks"][name]
    return {method: min(map(statistics.fmean, rows)) for method, rows in runs.items()}


def report(content: dict[str, Any], page: Path) -> None:
    """The table between its marks."""
    lines = ["| family | " + " | ".join(METHODS) + " |", "| --- |" + " ---: |" * len(METHODS)]
    for name in content["tasks"]:
        lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in best(content, name).values()) + " |")
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    table = "\n\n" + "\n".join(lines) + "\n"
    page.write_text(head + BEGIN + table + END + rest.split(END, 1)[1], encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["run", "report"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if "run" in options.parts:
        options.output.write_text(json.dumps(measured(options.quick), indent=1) + "\n", encoding="utf-8")
    if "report" in options.parts and not options.quick:
        report(json.loads(options.output.read_text(encoding="utf-8")), PAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
