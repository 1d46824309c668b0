"""Small steps: a model of 31 weights, whose step costs what Python and the calls of torch cost, and a small network.

The part "small" of `speed.py`. Every optimizer is held against the step that one would write by hand, or against the
original authors' package: medians of steps that take turns in one process, and the ratio that we allow ourselves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expfam_poco as poco

Method = Callable[[], object]
Problem = tuple[list[nn.Parameter], Callable[[], Tensor]]
STEPS = 10  # in a row
# Optimizer: what it is compared with, and the largest ratio.
BARS = {
    "SVRG": ("SVRG by hand", 3.0),
    "IVON": ("ivon-opt", 1.6),
    "AlphaSVRG": ("SVRG by hand", 2.5),
    "VONPoCo": ("SVRG by hand", 6.0),
    "IVON, network": ("AdamW, network", 4.0),
    "IVONPoCoMo, network": ("AdamW, network", 7.0),
}


def logistic(dtype: torch.dtype = torch.float32) -> Problem:
    """Logistic regression with 30 weights and a bias, on 5 examples."""
    w, b = (nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (30, 1))
    x, y = torch.randn(5, 30, dtype=dtype), (torch.rand(5) < 0.5).to(dtype)
    return [w, b], lambda: F.binary_cross_entropy_with_logits(x @ w + b, y)


def network() -> Problem:
    """64-64-10 on 32 examples."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = torch.randn(32, 64), torch.randint(0, 10, (32,))
    return list(model.parameters()), lambda: F.cross_entropy(model(x), y)


def svrg_by_hand(problem: Problem) -> Method:
    """SVRG with weight decay in a few lines: two evaluations."""
    params, closure = problem
    snapshot = [p.detach().clone() for p in params]
    means = torch.autograd.grad(closure(), params)

    def step() -> None:
        inner = torch.autograd.grad(closure(), params)
        with torch.no_grad():
            now = [p.detach().clone() for p in params]
            for p, old in zip(params, snapshot, strict=True):
                p.copy_(old)
        outer = torch.autograd.grad(closure(), params)
        with torch.no_grad():
            for p, here, a, b, mean in zip(params, now, inner, outer, means, strict=True):
                p.copy_(here - 0.1 * (a - b + mean + 1e-2 * here))

    return step


def adamw(problem: Problem) -> Method:
    """A step of torch.optim.AdamW."""
    params, closure = problem
    optimizer = torch.optim.AdamW(params, lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        closure().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ivon_opt(problem: Problem) -> Method:
    """A step of the original authors' package."""
    import ivon

    params, closure = problem
    optimizer = ivon.IVON(params, lr=1e-3, ess=569.0)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            closure().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ours(make: Callable[[list[nn.Parameter]], Any], problem: Problem, *, corrected: bool = True) -> Method:
    """A step of one of the library's optimizers."""
    params, closure = problem
    optimizer = make(params)
    if corrected:
        optimizer.refresh([closure])
    return lambda: optimizer.step(closure)


def alone() -> dict[str, Method]:
    """The library's optimizers on the logistic model."""
    return {
        "SVRG": ours(lambda p: poco.SVRG(p, lr=0.1, weight_decay=1e-2, stale_after=None), logistic()),
        "IVON": ours(lambda p: poco.IVON(p, lr=1e-3, ess=569.0), logistic(), corrected=False),
        "AlphaSVRG": ours(lambda p: poco.AlphaSVRG(torch.optim.SGD(p, lr=0.1), stale_after=None), logistic()),
        "VONPoCo": ours(
            lambda p: poco.VONPoCo(p, lr=0.1, ess=569.0, weight_decay=1e-2, noise="zero", stale_after=None),
            logistic(torch.float64),
        ),
    }


def methods() -> dict[str, Method]:
    """All of them, each with weights of its own."""
    return {
        "SVRG by hand": svrg_by_hand(logistic()),
        "ivon-opt": ivon_opt(logistic()),
        **alone(),
        "AdamW, network": adamw(network()),
        "IVON, network": ours(lambda p: poco.IVON(p, lr=1e-3, ess=1e4), network(), corrected=False),
        "IVONPoCoMo, network": ours(lambda p: poco.IVONPoCoMo(p, lr=1e-3, ess=1e4, stale_after=None), network()),
    }


def small(light: bool) -> dict[str, dict[str, float]]:
    """The table: microseconds a step, the ratio, and the largest that we allow ourselves."""
    torch.set_num_threads(1)
    steps = methods()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(25 if light else 60):
        for name, step in steps.items():
            begun = time.perf_counter()
            for _ in range(STEPS):
                step()
            times[name].append((time.perf_counter() - begun) / STEPS)
    median = {name: 1e6 * statistics.median(values[len(values) // 5 :]) for name, values in times.items()}
    print(f"\n{'small steps':24} {'µs':>8} {'ratio':>7} {'at most':>8}  to")
    found = {}
    for name, (other, bar) in BARS.items():
        found[name] = row = {"µs a step": median[name], "ratio": median[name] / median[other], "at most": bar}
        print(f"{name:24} {row['µs a step']:8.0f} {row['ratio']:7.2f} {bar:8.1f}  {other}, {median[other]:.0f} µs")
    return found
