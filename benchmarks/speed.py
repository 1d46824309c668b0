"""What a step costs: time against AdamW, ivon-opt and the memory's bandwidth, bytes, and how both grow.

    python benchmarks/speed.py                 everything: about 15 minutes and 12 GB on 2 cores
    python benchmarks/speed.py cycle --light   one table in a minute
    python benchmarks/speed.py cycle --device cuda

The parts are "cycle", "memory", "growth", "batched", "full" and "small" (`small_steps.py`). A *cycle* is all that an
optimizer does around the forward and backward pass: perturb, restore, collect, update (the closure here hands over
gradients that are there already). Methods take turns in one process; times are medians. Tables go to the terminal,
numbers to `results/speed-<part>.json` and growth also to `results/speed-growth.png`, in the folder of this file or
`--out`.
Without `--light` and `--out` the tables in `RESULTS.md` are replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import expfam_poco as poco

HERE = Path(__file__).parent / "results"
BACKENDS = ("eager", "mixed", "compiled")
Method = Callable[[], object]


def tensors_of(total: int, count: int, device: str) -> list[nn.Parameter]:
    """`total` weights in `count` equal tensors."""
    size = max(1, total // count)
    return [nn.Parameter(0.1 * torch.randn(size, device=device)) for _ in range(count)]


def handing_over(params: Sequence[nn.Parameter], grads: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A closure that costs nothing: its gradients are there already."""
    loss = torch.tensor(1.0, device=params[0].device)

    def closure() -> Tensor:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        return loss

    return closure


def adamw(params: list[nn.Parameter], grads: Sequence[Tensor], **choice: bool) -> Method:
    """A step of torch.optim.AdamW."""
    optimizer = torch.optim.AdamW(params, lr=1e-4, **choice)

    def step() -> None:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()

    return step


def ivon_opt(params: list[nn.Parameter], grads: Sequence[Tensor]) -> Method:
    """A cycle of the original authors' package."""
    import ivon

    optimizer = ivon.IVON(params, lr=1e-3, ess=1e5)

    def cycle() -> None:
        with optimizer.sampled_params(train=True):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
        optimizer.step()

    return cycle


def ours(cls: Any, params: list[nn.Parameter], grads: Sequence[Tensor], **choices: Any) -> Method:
    """A step of one of the library's optimizers, corrected where it corrects."""
    optimizer = cls(params, lr=1e-3, ess=1e5, seed=0, **choices)
    closure = handing_over(params, grads)
    if cls is poco.IVONPoCoMo:
        optimizer.refresh([closure])
    return lambda: optimizer.step(closure)


def bandwidth(total: int, device: str) -> Method:
    """An in-place multiplication: 8 bytes a weight."""
    values = torch.ones(total, device=device)
    return lambda: values.mul_(1.0)


def methods(total: int, count: int, device: str, backends: Sequence[str]) -> dict[str, Method]:
    """All methods, each with weights of its own; gradients are shared."""
    grads = [1e-3 * torch.randn(max(1, total // count), device=device) for _ in range(count)]

    def params() -> list[nn.Parameter]:
        return tensors_of(total, count, device)

    found: dict[str, Method] = {
        "in-place multiply": bandwidth(total, device),
        "AdamW fused": adamw(params(), grads, fused=True),
        "AdamW foreach": adamw(params(), grads, foreach=True),
        "ivon-opt": ivon_opt(params(), grads),
    }
    for cls in (poco.IVON, poco.IVONPoCoMo):
        for backend in backends:
            found[f"{cls.__name__} {backend}"] = ours(cls, params(), grads, backend=backend)
        found[f"{cls.__name__} {backends[-1]}, one pass"] = ours(
            cls, params(), grads, backend=backends[-1], one_pass=True
        )
    return found


def seconds(method: Method, device: str) -> float:
    """One call, to its end."""
    begun = time.perf_counter()
    method()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def interleaved(found: dict[str, Method], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of every method, which take turns after two calls to warm up."""
    for _ in range(2):
        for method in found.values():
            seconds(method, device)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, method in found.items():
            times[name].append(seconds(method, device))
    return {name: statistics.median(values) for name, values in times.items()}


def cycle(light: bool, device: str) -> dict[str, Any]:
    """The table of cycles: 30 M weights in 100 tensors, and in 10."""
    total = 2_000_000 if light else 30_000_000
    tables = {}
    for count in (10,) if light else (100, 10):
        torch.manual_seed(0)
        times = interleaved(methods(total, count, device, BACKENDS), 5 if light else 9, device)
        tables[str(count)] = times
        fused, foreach, ivon = (times[name] for name in ("AdamW fused", "AdamW foreach", "ivon-opt"))
        print(f"\n{total:,} float32 weights in {count} tensors on {device}")
        print(f"{'':28} {'ns/weight':>10} {'× fused':>8} {'× foreach':>10} {'ivon-opt is slower by':>22}")
        for name, value in times.items():
            row = f"{value / total * 1e9:10.2f} {value / fused:8.2f} {value / foreach:10.2f} {ivon / value:22.1f}"
            print(f"{name:28} {row}")
        gigabytes = 8.0 * total / times["in-place multiply"] / 1e9
        moved = {"IVON": 40, "IVONPoCoMo": 64}  # bytes a weight of perturbing and updating, without noise
        print(f"bandwidth of the multiplication: {gigabytes:.1f} GB/s")
        for name, size in moved.items():
            best = times[f"{name} {BACKENDS[-1]}"]
            share = size * total / best / 1e9 / gigabytes
            print(f"{name} {BACKENDS[-1]} moves {size * total / best / 1e9:.1f} GB/s, {share:.0%} of it")
    return {"weights": total, "seconds": tables}


MEMORY_PROBE = """
import sys, torch, expfam_poco as poco
sys.path.insert(0, {folder!r})
from speed import handing_over, memory_of, tensors_of
name, backend, total, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
params = tensors_of(total, count, "cpu")
grads = [1e-3 * torch.randn_like(p) for p in params]
print(memory_of(getattr(poco, name), backend, params, grads))
"""


def memory_of(cls: Any, backend: str, params: list[nn.Parameter], grads: list[Tensor]) -> str:
    """Bytes a weight of state and of what a step needs beside it at its peak, as JSON."""
    optimizer = cls(params, lr=1e-3, ess=1e5, backend=backend)
    closure = handing_over(params, grads)
    for _ in range(3):
        if cls is poco.IVONPoCoMo:
            optimizer.refresh([closure])
        optimizer.step(closure)
    weights = sum(p.numel() for p in params)
    seen: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (tuple, list)):
            for part in value:
                count(part)
        elif isinstance(value, dict):
            count(list(value.values()))

    count(list(optimizer.state.values()))
    before, peak = resident("VmRSS"), 0.0
    reset_peak()
    optimizer.step(closure)
    peak = resident("VmHWM")
    return json.dumps({"state": sum(seen.values()) / weights, "transient": max(0.0, peak - before) / weights})


def resident(entry: str) -> float:
    """Bytes of resident memory, now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry):
            return 1024.0 * float(line.split()[1])
    return float("nan")


def reset_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(light: bool) -> dict[str, Any]:
    """State and transient bytes a weight, each method in a process of its own (Linux)."""
    total, count = (2_000_000, 10) if light else (30_000_000, 100)
    table: dict[str, Any] = {}
    print(f"\n{'bytes a weight, ' + format(total, ',') + ' weights':40} {'state':>7} {'transient':>10}")
    for name in ("IVON", "IVONPoCoMo"):
        for backend in BACKENDS:
            probe = MEMORY_PROBE.format(folder=str(Path(__file__).parent))
            command = [sys.executable, "-c", probe, name, backend, str(total), str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            table[f"{name} {backend}"] = found
            print(f"{name + ' ' + backend:40} {found['state']:7.2f} {found['transient']:10.2f}")
    return {"weights": total, "bytes": table}


def growth(light: bool, out: Path) -> dict[str, Any]:
    """How a step grows with weights, tensors, Monte Carlo samples and the mega-batch; with a picture."""
    scale = 100 if light else 1
    sizes = [10**4, 10**5, 10**6, 10**7, 10**8, 3 * 10**8]
    cases: dict[str, list[tuple[int, Method]]] = {"weights": [], "tensors": [], "samples": [], "chunks": []}
    results: dict[str, dict[str, dict[str, float]]] = {axis: {} for axis in cases}

    def measure(axis: str, name: str, at: int, make: Callable[[], Method]) -> None:
        method = make()
        value = interleaved({name: method}, 3 if at >= 10**8 else 5)[name]
        results[axis].setdefault(name, {})[str(at)] = value
        print(f"{axis:8} {at:>12,} {name:24} {value * 1e3:10.2f} ms", flush=True)

    def of(cls: Any, total: int, count: int, **choices: Any) -> Callable[[], Method]:
        def make() -> Method:
            params = tensors_of(total, count, "cpu")
            return ours(cls, params, [torch.full_like(p, 1e-3) for p in params], **choices)

        return make

    for size in [size for size in sizes if size <= sizes[-1] // scale]:
        for cls in (poco.IVON, poco.IVONPoCoMo):
            measure("weights", cls.__name__, size, of(cls, size, 10))
    for count in [10, 100, 1000, 10_000 // min(scale, 10)]:
        for cls in (poco.IVON, poco.IVONPoCoMo):
            measure("tensors", cls.__name__, count, of(cls, 5_000_000, count))
    for samples in (1, 2, 4, 8, 16):
        measure("samples", "IVON", samples, of(poco.IVON, 5_000_000 // scale, 10, mc_samples=samples))
    for chunks in (1, 2, 5, 10, 20):
        measure("chunks", "refresh", chunks, refreshing(5_000_000 // scale, chunks))
    draw_growth(results, out / "speed-growth.png")
    return results


def refreshing(total: int, chunks: int) -> Callable[[], Method]:
    """A refresh from so many chunks."""

    def make() -> Method:
        params = tensors_of(total, 10, "cpu")
        optimizer = poco.IVONPoCoMo(params, lr=1e-3, ess=1e5, seed=0)
        closure = handing_over(params, [torch.full_like(p, 1e-3) for p in params])
        return lambda: optimizer.refresh([closure] * chunks)

    return make


def draw_growth(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Four panels, logarithmic on both axes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    titles = {
        "weights": "weights, in 10 tensors",
        "tensors": "tensors of 5 M weights",
        "samples": "Monte Carlo samples",
        "chunks": "chunks of the mega-batch",
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3.4), constrained_layout=True)
    for panel, (axis, curves) in zip(axes, results.items(), strict=True):
        for name, points in curves.items():
            panel.loglog([int(at) for at in points], list(points.values()), "o-", label=name)
        panel.set_xlabel(titles[axis])
        panel.grid(alpha=0.3)
        panel.legend()
    axes[0].set_ylabel("seconds, without the model's own")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def batched(light: bool, device: str) -> dict[str, float]:
    """BatchedDraws against an ordinary closure: time of a whole step of an MLP, ordinary / batched."""
    print(f"\n{'BatchedDraws: ordinary / batched time of a step':52} {'K=1':>6} {'K=4':>6} {'K=16':>6}")
    found: dict[str, float] = {}
    shapes = [(64, 8), (64, 128)] if light else [(64, 8), (64, 128), (256, 8), (256, 128), (1024, 32)]
    for width, batch in shapes:
        for cls in (poco.IVON, poco.IVONPoCoMo):
            row = []
            for samples in (1, 4) if light else (1, 4, 16):
                row.append(batched_ratio(cls, width, batch, samples, device))
                found[f"{cls.__name__} width {width} batch {batch} K {samples}"] = row[-1]
            print(f"{f'{cls.__name__}, width {width}, batch {batch}':52} " + " ".join(f"{r:6.2f}" for r in row))
    return found


def batched_ratio(cls: Any, width: int, batch: int, samples: int, device: str) -> float:
    """One entry of the table."""
    x, y = torch.randn(batch, 64, device=device), torch.randn(batch, 10, device=device)
    steps: dict[str, Method] = {}
    for name in ("ordinary", "batched"):
        model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
        model = model.to(device)
        optimizer = cls(model.parameters(), lr=1e-3, ess=1e4, mc_samples=samples)

        def plain(model: nn.Module = model) -> Tensor:
            return nn.functional.mse_loss(model(x), y)

        stacked = poco.BatchedDraws(model, nn.functional.mse_loss, x, y)
        closure = plain if name == "ordinary" else stacked
        if cls is poco.IVONPoCoMo:
            optimizer.refresh([closure])
        steps[name] = lambda optimizer=optimizer, closure=closure: optimizer.step(closure)
    times = interleaved(steps, 9, device)
    return times["ordinary"] / times["batched"]


def full(light: bool) -> dict[str, dict[str, float]]:
    """A step of VON, second-order and plain, beside a plain Newton step with the same Hessian."""
    print(
        f"\n{'d':>6} {'Newton ms':>10} {'VON ms':>9} {'plain ms':>9} {'VON/Newton':>11} {'state MB':>9} {'peak MB':>9}"
    )
    found = {}
    for d in (250, 500) if light else (250, 500, 1000, 2000, 4000):
        found[str(d)] = row = full_row(d)
        times = " ".join(f"{1e3 * row[name]:9.1f}" for name in ("newton", "von", "plain"))
        print(f"{d:6} {times:>30} {row['von'] / row['newton']:11.1f} {row['state_mb']:9.1f} {row['peak_mb']:9.1f}")
    return found


def full_row(d: int) -> dict[str, float]:
    """Times and memory at one d; the loss is quadratic, so that its Hessian costs nothing."""
    root = torch.randn(d, 2 * d) / (2 * d) ** 0.5
    hessian = root @ root.T + 0.1 * torch.eye(d)
    target = torch.randn(d)
    steps: dict[str, Method] = {}
    for name, variant in (("von", "second_order"), ("plain", "plain")):
        weight = nn.Parameter(torch.zeros(d))

        def closure(weight: nn.Parameter = weight) -> Tensor:
            off = weight - target
            return 0.5 * off @ (hessian @ off)

        optimizer = poco.VON(
            [weight], lr=0.1, ess=100.0, hess_init=1.0, weight_decay=0.1, curvature=Known(hessian), retraction=variant
        )
        steps[name] = lambda optimizer=optimizer, closure=closure: optimizer.step(closure)
    weight = torch.zeros(d)

    def newton() -> None:
        gradient = hessian @ (weight - target)
        factor = torch.linalg.cholesky(hessian + 0.1 * torch.eye(d))
        weight.sub_(torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1), alpha=0.1)

    times = interleaved({"newton": newton, **steps}, 3 if d > 2000 else 5)
    before = resident("VmRSS")
    reset_peak()
    steps["von"]()
    return {**times, "state_mb": 4e-6 * d * d, "peak_mb": (resident("VmHWM") - before) / 1e6}


class Known(poco.estimators.SquaredGradient):
    """A curvature that is known beforehand, so that only the optimizer's own work is measured."""

    unbiased = True

    def __init__(self, hessian: Tensor) -> None:
        object.__setattr__(self, "hessian", hessian)

    def natural_gradient(self, family: Any, state: Any, draws: Any) -> Any:
        """With the Hessian."""
        hessian: Tensor = self.hessian  # type: ignore[attr-defined]
        return family.natural_gradient(state, draws._replace(hessian=hessian.unsqueeze(0), pairs=None))


def markdown(part: str, content: dict[str, Any]) -> str:
    """A part's table in Markdown, from its JSON."""
    rows: list[list[str]] = {"cycle": cycle_rows, "growth": growth_rows}.get(part, plain_rows)(content[part])
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"| --- |{' ---: |' * (len(rows[0]) - 1)}", *body])


def cycle_rows(content: dict[str, Any]) -> list[list[str]]:
    """Nanoseconds a weight and ratios, for every number of tensors."""
    rows = [["tensors", "method", "ns/weight", "× AdamW fused", "× AdamW foreach", "ivon-opt is slower by"]]
    for count, times in content["seconds"].items():
        for name, value in times.items():
            ratios = [value / times[f"AdamW {kind}"] for kind in ("fused", "foreach")]
            nanoseconds = value / content["weights"] * 1e9
            numbers = [f"{nanoseconds:.2f}", *(f"{r:.2f}" for r in ratios), f"{times['ivon-opt'] / value:.1f}"]
            rows.append([count, name, *numbers])
    return rows


def growth_rows(content: dict[str, Any]) -> list[list[str]]:
    """Milliseconds at every point of every curve."""
    rows = [["axis", "optimizer", "milliseconds at each value"]]
    for axis, curves in content.items():
        for name, points in curves.items():
            shown = ", ".join(f"{int(at):,}: {value * 1e3:.1f}" for at, value in points.items())
            rows.append([axis, name, shown])
    return rows


def plain_rows(content: dict[str, Any]) -> list[list[str]]:
    """One row for every entry, whose columns are what it holds."""
    entries = content.get("bytes", content)
    rows: list[list[str]] = []
    for name, entry in entries.items():
        values = entry if isinstance(entry, dict) else {"ordinary / batched": entry}
        rows = rows or [["", *values]]
        rows.append([name, *(f"{value:.4g}" for value in values.values())])
    return rows


def write_table(part: str, content: dict[str, Any]) -> None:
    """Replace the table of a part in RESULTS.md."""
    path = HERE.parent / "RESULTS.md"
    pattern = re.compile(rf"(<!-- table speed-{part} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = path.read_text(encoding="utf-8")
    found = pattern.sub(lambda match: f"{match[1]}\n{markdown(part, content)}\n{match[2]}", text)
    path.write_text(found, encoding="utf-8")


def machine(device: str) -> dict[str, str]:
    """What the numbers were measured on."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "cores": str(os.cpu_count())}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def main() -> None:
    """Run the parts that were named, all by default."""
    from small_steps import small

    parts = ("cycle", "memory", "growth", "batched", "full", "small")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help=f"any of {', '.join(parts)}")
    parser.add_argument("--light", action="store_true", help="small sizes: a minute or two")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for cycle and batched")
    parser.add_argument("--out", type=Path, default=HERE, help="where the JSON and the picture go")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.parts or parts:
        torch.manual_seed(0)
        runs: dict[str, Callable[[], Any]] = {
            "cycle": lambda: cycle(options.light, options.device),
            "memory": lambda: memory(options.light),
            "growth": lambda: growth(options.light, options.out),
            "batched": lambda: batched(options.light, options.device),
            "full": lambda: full(options.light),
            "small": lambda: small(options.light),
        }
        result = {"machine": machine(options.device), part: runs[part]()}
        (options.out / f"speed-{part}.json").write_text(json.dumps(result, indent=1) + "\n")
        if options.out == HERE and not options.light and options.device == "cpu":
            write_table(part, result)


if __name__ == "__main__":
    main()
