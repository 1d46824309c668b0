"""VSGD beside Adam, AdamW and SGD with momentum: a small ConvMixer on scikit-learn's digits, γ, and the step's speed.

    python benchmarks/vsgd.py                  all parts: about 20 minutes on one core
    python benchmarks/vsgd.py digits gamma     some of them
    python benchmarks/vsgd.py digits --short   seconds, two methods, and nothing is written without --out

Every method has the same budget of mini-batch gradients (those at a snapshot and of a refresh count), the same cosine
schedule, and seven learning rates of its own; the one with the best mean validation accuracy over the three seeds is
shown, with its test accuracy. Numbers go to `results/vsgd/<part>.json`, tables to `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import expfam_poco as poco

HERE = Path(__file__).parent
PARTS = ("digits", "gamma", "speed")
BATCH, PASSES, SEEDS = 64, 12, (0, 1, 2)
SMALL = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # for methods whose step is about lr
LARGE = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)  # for SGD
GAMMAS = (1e-9, 5e-9, 1e-8, 5e-8, 1e-7, 1e-3)
Make = Callable[[Any, float], torch.optim.Optimizer]

METHODS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "SGD, momentum 0.9": (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), LARGE),
    "Adam": (lambda p, lr: torch.optim.Adam(p, lr=lr), SMALL),
    "AdamW 0.01": (lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.01), SMALL),
    "VSGD": (lambda p, lr: poco.VSGD(p, lr=lr), SMALL),
    "VSGD, decay 0.01": (lambda p, lr: poco.VSGD(p, lr=lr, weight_decay=0.01), SMALL),
    "VSGD official": (lambda p, lr: poco.VSGD(p, lr=lr, init="official"), SMALL),
    "VSGD, κ of the code": (lambda p, lr: poco.VSGD(p, lr=lr, kappa1=0.81, kappa2=0.9), SMALL),
    "VSGD official, κ of Table 3": (lambda p, lr: poco.VSGD(p, lr, kappa1=0.9, kappa2=0.81, init="official"), SMALL),
    "ConstantVSGD": (lambda p, lr: poco.ConstantVSGD(p, lr=lr), SMALL),
    "AlphaSVRG over VSGD": (lambda p, lr: poco.AlphaSVRG(poco.VSGD(p, lr=lr), alpha=0.5), SMALL),
}


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """As said."""
        return x + super().forward(x)


def conv_mixer(width: int = 32, depth: int = 2) -> nn.Sequential:
    """A ConvMixer (Trockman and Kolter 2023) for 8 × 8 pictures: patches of 2 × 2, kernels of 3 × 3."""

    def block() -> list[nn.Module]:
        mixing = nn.Conv2d(width, width, 3, groups=width, padding=1)
        across = nn.Conv2d(width, width, 1)
        return [Residual(mixing, nn.GELU(), nn.BatchNorm2d(width)), across, nn.GELU(), nn.BatchNorm2d(width)]

    stem = [nn.Conv2d(1, width, 2, stride=2), nn.GELU(), nn.BatchNorm2d(width)]
    body = [layer for _ in range(depth) for layer in block()]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """1197 pictures to train with, 300 to choose with, 300 to test with."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    x = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 16.0
    y = torch.tensor(loaded.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts = order.split([len(y) - 600, 300, 300])
    return {name: (x[rows], y[rows]) for name, rows in zip(("train", "validation", "test"), parts, strict=True)}


def train(make: Make, lr: float, seed: int, data: dict[str, tuple[Tensor, Tensor]], passes: int) -> dict[str, float]:
    """One run of `passes` passes' worth of mini-batch gradients: accuracies, train loss, evaluations and seconds."""
    torch.manual_seed(seed)
    model = conv_mixer()
    optimizer = make(model.parameters(), lr)
    x, y = data["train"]
    corrected = isinstance(optimizer, poco.AlphaSVRG)
    every = math.ceil(len(y) / BATCH)
    budget, spent, step, begun = passes * every, 0, 0, time.perf_counter()

    def closure_of(rows: Tensor) -> Callable[[], Tensor]:
        return lambda: nn.functional.cross_entropy(model(x[rows]), y[rows])

    while spent < budget:
        for rows in torch.randperm(len(y)).split(BATCH):
            if spent >= budget:
                break
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * lr * (1.0 + math.cos(math.pi * spent / budget))
            closure = closure_of(rows)
            if not corrected:
                optimizer.zero_grad()
                closure().backward()
                optimizer.step()
                spent += 1
                continue
            if step and step % (2 * every) == 0:
                chunks = torch.arange(len(y)).split(BATCH)
                optimizer.refresh([closure_of(c) for c in chunks], [float(len(c)) for c in chunks])
                spent += every
            optimizer.step(closure)
            spent += 2 if step >= 2 * every else 1  # no second gradient before the first refresh
            step += 1
    seconds = time.perf_counter() - begun
    model.eval()
    with torch.no_grad():
        found = {n: 100.0 * (model(a).argmax(1) == b).float().mean().item() for n, (a, b) in data.items()}
        loss = nn.functional.cross_entropy(model(x), y).item()
    return {**found, "train loss": loss, "evaluations": float(spent), "seconds": seconds}


def tuned(make: Make, rates: tuple[float, ...], seeds: tuple[int, ...], passes: int) -> dict[str, Any]:
    """Runs at every rate; the best rate by mean validation accuracy (then train loss), and its runs."""
    data = digits()
    tried = {rate: [train(make, rate, seed, data, passes) for seed in seeds] for rate in rates}

    def quality(rate: float) -> tuple[float, float]:
        runs = tried[rate]
        mean = statistics.mean
        return mean(run["validation"] for run in runs), -mean(run["train loss"] for run in runs)

    best = max(tried, key=quality)
    return {"lr": best, "rates": {str(rate): quality(rate)[0] for rate in tried}, "runs": tried[best]}


def digits_part(short: bool) -> dict[str, Any]:
    """Every method at its best learning rate."""
    names = ("Adam", "VSGD") if short else tuple(METHODS)
    found = {}
    for name in names:
        make, rates = METHODS[name]
        found[name] = tuned(make, rates[2:3] if short else rates, SEEDS[:1] if short else SEEDS, 2 if short else PASSES)
        print(name, found[name]["lr"], [round(run["test"], 1) for run in found[name]["runs"]], flush=True)
    return found


def gamma_part(short: bool) -> dict[str, Any]:
    """VSGD with every γ of the paper's Table 5, each at its best learning rate."""
    found = {}
    for gamma in GAMMAS[2:3] if short else GAMMAS:

        def make(params: Any, lr: float, gamma: float = gamma) -> torch.optim.Optimizer:
            return poco.VSGD(params, lr=lr, gamma=gamma)

        rates, seeds = (SMALL[2:3], SEEDS[:1]) if short else (SMALL[4:], SEEDS)
        found[f"{gamma:g}"] = tuned(make, rates, seeds, 2 if short else PASSES)
        print(gamma, found[f"{gamma:g}"]["lr"], flush=True)
    return found


# ---- speed -------------------------------------------------------------------------------------------------


def speed_part(short: bool) -> dict[str, Any]:
    """A step with one thread and with two, each in a process of its own."""
    found = {}
    for threads in (1,) if short else (1, 2):
        total, count = (300_000, 3) if short else (30_000_000, 100)
        command = [sys.executable, __file__, "step-times", "--threads", str(threads), "--size", str(total), str(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found[str(threads)] = json.loads(done.stdout.splitlines()[-1])
        print(threads, found[str(threads)], flush=True)
    return found


def step_times(total: int, count: int, threads: int) -> dict[str, float]:
    """Median nanoseconds a weight of a step; methods take turns, and share the gradients."""
    torch.set_num_threads(threads)
    grads = [1e-3 * torch.randn(total // count) for _ in range(count)]

    def params() -> list[nn.Parameter]:
        made = [nn.Parameter(0.1 * torch.randn_like(grad)) for grad in grads]
        for p, grad in zip(made, grads, strict=True):
            p.grad = grad
        return made

    optimizers: dict[str, torch.optim.Optimizer] = {
        "AdamW fused": torch.optim.AdamW(params(), lr=1e-4, fused=True),
        "AdamW foreach": torch.optim.AdamW(params(), lr=1e-4, foreach=True),
        "VSGD compiled": poco.VSGD(params(), lr=1e-4, backend="compiled"),
        "ConstantVSGD compiled": poco.ConstantVSGD(params(), lr=1e-4, backend="compiled"),
        "VSGD eager": poco.VSGD(params(), lr=1e-4, backend="eager"),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(2 + 9):
        for name, optimizer in optimizers.items():
            begun = time.perf_counter()
            optimizer.step()
            if turn >= 2:
                times[name].append(1e9 * (time.perf_counter() - begun) / total)
    return {name: statistics.median(values) for name, values in times.items()}


# ---- tables ------------------------------------------------------------------------------------------------


def markdown(part: str, content: dict[str, Any]) -> str:
    """A part's table in Markdown, from its JSON."""
    rows = speed_rows(content) if part == "speed" else run_rows(content)
    if part == "gamma":
        rows[0][0] = "γ"
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"| --- |{' ---: |' * (len(rows[0]) - 1)}", *body])


def run_rows(content: dict[str, Any]) -> list[list[str]]:
    """Accuracies (mean ± standard deviation over seeds), train loss, lr."""
    rows = [["method", "test accuracy, %", "validation, %", "train loss", "lr", "gradients"]]
    for name, entry in content.items():
        runs = entry["runs"]

        def values(key: str, runs: list[dict[str, float]] = runs) -> list[float]:
            return [run[key] for run in runs]

        def spread(key: str) -> str:
            several = values(key)
            return f"{statistics.mean(several):.1f} ± {statistics.stdev(several) if len(several) > 1 else 0.0:.1f}"

        loss, lr = f"{statistics.mean(values('train loss')):.1e}", f"{entry['lr']:g}"
        cost = f"{statistics.mean(values('evaluations')):.0f}"
        rows.append([name, spread("test"), spread("validation"), loss, lr, cost])
    return rows


def speed_rows(content: dict[str, Any]) -> list[list[str]]:
    """Nanoseconds a weight and multiples of AdamW fused, for every number of threads."""
    head = [f"{title}, {n} thread{'s' * (int(n) > 1)}" for n in content for title in ("ns/weight", "× AdamW fused")]
    rows = [["30 M float32 weights in 100 tensors", *head]]
    for name in next(iter(content.values())):
        pairs = [(times[name], times[name] / times["AdamW fused"]) for times in content.values()]
        rows.append([name, *(f"{value:.2f}" for pair in pairs for value in pair)])
    return rows


def write_table(part: str, content: dict[str, Any], page: Path) -> None:
    """Replace the table of a part in RESULTS.md."""
    pattern = re.compile(rf"(<!-- table vsgd-{part} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    page.write_text(pattern.sub(lambda m: f"{m[1]}\n{markdown(part, content)}\n{m[2]}", text), encoding="utf-8")


def main() -> None:
    """Run the parts that were named, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--short", action="store_true", help="a few seconds, a few methods")
    parser.add_argument("--out", type=Path, help="a folder for the JSON, in place of results/vsgd and RESULTS.md")
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.parts == ["step-times"]:
        print(json.dumps(step_times(*options.size, options.threads)))
        return
    torch.set_num_threads(1)
    runs = {"digits": digits_part, "gamma": gamma_part, "speed": speed_part}
    for part in options.parts or PARTS:
        content = runs[part](options.short)
        print(markdown(part, content))
        folder = options.out or (None if options.short else HERE / "results" / "vsgd")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{part}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if folder == HERE / "results" / "vsgd":
            write_table(part, content, HERE / "RESULTS.md")


if __name__ == "__main__":
    main()
