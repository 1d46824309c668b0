"""Kronecker-factored posteriors beside diagonal ones: cost of a layer's step, a digits CNN, a small language model.

    python benchmarks/structured.py cost          # milliseconds a step of one layer, and how they grow
    python benchmarks/structured.py digits        # CNN on scikit-learn's digits
    python benchmarks/structured.py language      # GPT of 0.4 M weights on the standard library's sources, short runs
    python benchmarks/structured.py report        # tables into RESULTS.md

Rates are tuned for every method on its own, on one seed that is not among those reported (digits: on a validation
split). `--quick` makes everything so short that it shows only that all works.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

import torch  # noqa: E402
from corpus import load  # noqa: E402
from language_model import Settings, Training  # noqa: E402
from rich.progress import track  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import expfam_poco as poco  # noqa: E402
from expfam_poco.families import DiagonalGaussian, KroneckerGaussian  # noqa: E402

RESULTS, PAGE = HERE / "results" / "structured" / "structured.json", HERE / "RESULTS.md"
SIDES = (64, 128, 256, 512, 1024)
SEEDS, TUNING_SEED = (0, 1, 2), 1000
# Operations (multiplications and additions) of one step on an m × n layer, leading terms, counted from the algorithms:
# a Cholesky factor n³/3, a triangular solve n³, a product 2n³, an eigendecomposition about 9n³.
OPERATIONS = {
    "KroneckerGaussian, every step": "9.7 (m³ + n³) + 11 mn(m + n)",
    "Shampoo, roots at every step": "≈ 13 (m³ + n³) + 4 mn(m + n)",
    "K-FAC, inverses at every step, batch B": "≈ 2 (m³ + n³) + 2 mn(m + n) + 2 B(m² + n²)",
}


# ---- cost of a layer ----------------------------------------------------------------------------------------


def cost(quick: bool) -> dict[str, Any]:
    """Median milliseconds of a step of one n × n layer beside the loss: a loss that costs next to nothing."""
    torch.set_num_threads(1)
    rows = {}
    for side in SIDES[: 2 if quick else None]:
        weight = nn.Parameter(torch.randn(side, side) / side)
        direction = torch.randn(side, side)
        row = {}
        for name, make in _layer_optimizers(weight).items():
            optimizer = make()
            took = []
            for _ in range(3 if quick else 9):
                began = time.perf_counter()
                optimizer.step(_linear(optimizer, weight, direction))
                took.append(time.perf_counter() - began)
            row[name] = 1e3 * statistics.median(took[1:])
        rows[str(side)] = row
    last = [row["KroneckerGaussian"] for row in rows.values()][-2:]
    return {"milliseconds": rows, "growth": last[1] / last[0]}


def _linear(optimizer: torch.optim.Optimizer, weight: Tensor, direction: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight * direction).mean()
        loss.backward()
        return loss

    return closure


def _layer_optimizers(weight: nn.Parameter) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    chosen: dict[str, Any] = {"lr": 1e-3, "ess": 1e4, "weight_decay": 1e-2, "hess_init": 1.0, "precision_lr": 1e-4}
    return {
        "AdamW": lambda: torch.optim.AdamW([weight], lr=1e-3),
        "DiagonalGaussian": lambda: poco.PosteriorCorrected([weight], DiagonalGaussian(), momentum=0.9, **chosen),
        "KroneckerGaussian": lambda: poco.PosteriorCorrected([weight], KroneckerGaussian(), momentum=0.9, **chosen),
    }


# ---- digits -------------------------------------------------------------------------------------------------

DIGITS = {
    "IVON": (DiagonalGaussian(), 0.0),
    "IVON-PoCo": (DiagonalGaussian(), 0.5),
    "Kronecker": (KroneckerGaussian(), 0.0),
    "Kronecker-PoCo": (KroneckerGaussian(), 0.5),
}
RATES, PRECISION_RATES = (0.01, 0.02, 0.05, 0.1), (1e-3, 1e-4)


def convolutional() -> nn.Module:
    """10 490 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 10),
    )  # fmt: skip


def digits(quick: bool) -> dict[str, Any]:
    """Test loss and accuracy after equal steps; every rate tuned on 200 held-out training images."""
    torch.set_num_threads(1)
    data = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    y = torch.tensor(data.target)[order]
    steps = 20 if quick else 500
    found = {}
    for name, (family, alpha) in DIGITS.items():

        def run(pair: tuple[float, float], seed: int, cut: Any, f: Any = family, a: float = alpha) -> dict[str, float]:
            return _digits_run(f, a, pair, seed, steps, (x, y), cut)

        grid = [(rate, other) for rate in RATES for other in PRECISION_RATES][: 1 if quick else None]
        tuning = (slice(0, 1000), slice(1000, 1200))
        trials = {pair: run(pair, TUNING_SEED, tuning)["loss"] for pair in track(grid, description=f"tuning {name}")}
        best = min(trials, key=lambda pair: trials[pair])
        runs = [run(best, seed, (slice(0, 1200), slice(1200, None))) for seed in SEEDS[: 1 if quick else None]]
        found[name] = {"lr": best[0], "precision_lr": best[1], "runs": runs}
    return found


def _digits_run(
    family: Any,
    alpha: float,
    rates: tuple[float, float],
    seed: int,
    steps: int,
    data: tuple[Tensor, Tensor],
    cut: tuple[slice, slice],
) -> dict[str, float]:
    (x, y), (rate, other) = data, rates
    torch.manual_seed(seed)
    model, rows = convolutional(), torch.Generator().manual_seed(seed)
    train, test = (torch.arange(1797)[part] for part in cut)
    optimizer = poco.PosteriorCorrected(
        model.named_parameters(), family, lr=rate, ess=1e5, weight_decay=1e-4, hess_init=0.1, momentum=0.9,
        precision_lr=other, alpha=alpha, seed=seed,
    )  # fmt: skip

    def closure(count: int) -> Callable[[], Tensor]:
        picked = train[torch.randint(len(train), (count,), generator=rows)]
        return lambda: nn.functional.cross_entropy(model(x[picked]), y[picked])

    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    began, evaluated = time.perf_counter(), 0
    try:
        for step in range(steps):
            if alpha and step >= 50 and step % 20 == 0:
                optimizer.refresh([closure(32) for _ in range(10)])
                evaluated += 10
            optimizer.step(closure(32))
            annealing.step()
            evaluated += 1 + (alpha > 0.0 and step >= 60)
        with torch.no_grad():
            scores = model(x[test])
        loss = float(nn.functional.cross_entropy(scores, y[test]))
        accuracy = float((scores.argmax(-1) == y[test]).float().mean())
    except poco.NonFiniteError:
        loss, accuracy = 99.0, 0.0  # JSON has no infinity
    seconds = time.perf_counter() - began
    return {"loss": loss, "accuracy": accuracy, "evaluations": float(evaluated), "seconds": seconds}


# ---- language -----------------------------------------------------------------------------------------------

LANGUAGE = {
    "IVON": ("ivon", {}, (0.2, 0.4)),
    "IVON-PoCo": ("ivon-poco", {}, (0.2, 0.4)),
    "Kronecker": ("kronecker", {"beta2": 0.999}, (0.4, 0.8, 1.6)),
    "Kronecker-PoCo": ("kronecker-poco", {"beta2": 0.999}, (0.4, 0.8, 1.6)),
}


def language(quick: bool) -> dict[str, Any]:
    """Validation loss (nats a byte) of short runs at equal steps."""
    torch.set_num_threads(1)
    text = load("stdlib", 64)
    length = {"steps": 6, "burn_in": 2} if quick else {"steps": 150, "burn_in": 40}
    common: dict[str, Any] = {"preset": "tiny", "context": 64, "batch": 16, "every": 10, "mega": 10, **length}

    def run(method: str, more: dict[str, Any], rate: float, seed: int) -> dict[str, float]:
        training = Training(
            Settings(method=method, lr=rate, seed=seed, validate_every=length["steps"], **more, **common), text
        )
        try:
            list(training.run())
        except poco.NonFiniteError:
            return {"loss": 99.0, "seconds": training.seconds}  # JSON has no infinity
        return {"loss": training.curve[-1]["loss"], "seconds": training.seconds}

    found = {}
    for name, (method, more, rates) in LANGUAGE.items():
        grid = rates[: 1 if quick else None]
        trials = {rate: run(method, more, rate, TUNING_SEED)["loss"] for rate in track(grid, description=name)}
        rate = min(trials, key=lambda key: trials[key])
        runs = [run(method, more, rate, seed) for seed in SEEDS[: 1 if quick else None]]
        found[name] = {"lr": rate, "trials": {str(key): value for key, value in trials.items()}, "runs": runs}
    return found


# ---- tables -------------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"|---|{'---|' * (len(rows[0]) - 1)}", *body])


def markdown(part: str, content: dict[str, Any]) -> str:
    """A part's table."""
    if part == "cost":
        rows = [["n × n layer", *next(iter(content["milliseconds"].values()))]]
        rows += [[side, *(f"{ms:.2f}" for ms in row.values())] for side, row in content["milliseconds"].items()]
        counts = [["step of one m × n layer", "operations, leading terms"], *map(list, OPERATIONS.items())]
        return f"{table(rows)}\n\n{table(counts)}"
    unit = "test loss" if part == "digits" else "validation loss"
    rows = [["method", "lr", unit, *(["accuracy", "evaluations"] if part == "digits" else []), "seconds a run"]]
    for name, row in content.items():
        cells = [name, f"{row['lr']:g}", _spread([r["loss"] for r in row["runs"]])]
        if part == "digits":
            cells += [_spread([r["accuracy"] for r in row["runs"]]), f"{row['runs'][0]['evaluations']:.0f}"]
        rows.append([*cells, f"{statistics.median(r['seconds'] for r in row['runs']):.0f}"])
    return table(rows)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def report(content: dict[str, Any], page: Path) -> None:
    """Replace the tables in the page."""
    text = page.read_text(encoding="utf-8")
    for part, found in content.items():
        pattern = re.compile(rf"(<!-- table structured-{part} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda m, part=part, found=found: f"{m[1]}\n{markdown(part, found)}\n\n{m[2]}", text)
    page.write_text(text, encoding="utf-8")


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {"cost": cost, "digits": digits, "language": language}


def main() -> None:
    """Measure the parts that are named, write the JSON, or replace the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=(*PARTS, "report"))
    parser.add_argument("--quick", action="store_true", help="so short that it shows only that all works")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON")
    options = parser.parse_args()
    content = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    for part in options.parts:
        if part == "report":
            report(content, PAGE)
            continue
        content[part] = PARTS[part](options.quick)
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(markdown(part, content[part]), end="\n\n")


if __name__ == "__main__":
    main()
