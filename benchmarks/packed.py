"""Layers with packed binary weights against float32 ones: memory, and time at one example and at 64.

    python benchmarks/packed.py           # a minute; replaces the table in RESULTS.md
    python benchmarks/packed.py --short   # seconds, nothing is replaced

The layers take turns in one process; lower quartiles, as others may use the processor, and how many times faster than
float32's the packed layer is. Real activations are normal, binary ones their signs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import expfam_poco as poco

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "packed.json", HERE / "RESULTS.md"
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear 1024 → 1024": (lambda: nn.Linear(1024, 1024), (1024,)),
    "Linear 4096 → 4096": (lambda: nn.Linear(4096, 4096), (4096,)),
    "Conv2d 64 → 64, 3 × 3, 32 × 32": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 32, 32)),
    "Conv2d 256 → 256, 3 × 3, 16 × 16": (lambda: nn.Conv2d(256, 256, 3, padding=1), (256, 16, 16)),
}


def bytes_of(layer: nn.Module) -> int:
    """Of all numbers that a layer keeps."""
    return sum(t.numel() * t.element_size() for t in [*layer.parameters(), *layer.buffers()])


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A layer with weights of ±1, and the packed one."""
    layer = make().requires_grad_(False)
    weight: Any = layer.weight
    weight.copy_(torch.where(weight >= 0.0, 1.0, -1.0))
    return layer, poco.pack_weights(layer)


@torch.no_grad()
def measured(layers: tuple[nn.Module, nn.Module], x: Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds of float32, and of the packed layer with real and with binary activations."""
    plain, packed = layers
    signs = torch.where(x >= 0.0, 1.0, -1.0)
    runs = {"float32": (plain, x), "real": (packed, x), "binary": (packed, signs)}
    error = float((packed(x) - plain(x)).abs().max() / plain(x).abs().max())
    assert error < 1e-5 and torch.allclose(packed(signs), plain(signs), rtol=1e-5, atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (layer, values) in runs.items():
            began = time.perf_counter()
            layer(values)
            times[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.quantiles(values)[0] for name, values in times.items()} | {"error": error}


def run(short: bool) -> dict[str, Any]:
    """All layers, at 1 and 64 examples, on one and two threads."""
    torch.manual_seed(0)
    content: dict[str, Any] = {}
    before = torch.get_num_threads()
    try:
        for name in list(LAYERS)[: 1 if short else None]:
            make, shape = LAYERS[name]
            layers = pair(make)
            times = {}
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for batch in (1, 64):
                    repeats = 3 if short else 101 if batch == 1 else 11
                    times[f"{batch}, {threads}"] = measured(layers, torch.randn(batch, *shape), repeats)
            content[name] = {"memory": bytes_of(layers[0]) / bytes_of(layers[1]), "times": times}
    finally:
        torch.set_num_threads(before)
    return content


def markdown(content: dict[str, Any]) -> str:
    """The table: milliseconds of float32, and how many times faster the packed layer is."""
    lines = [
        "| layer | memory | examples, threads | float32, ms | real activations | ±1 activations |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in content.items():
        for key, times in found["times"].items():
            gains = " | ".join(f"{times['float32'] / times[kind]:.2g}×" for kind in ("real", "binary"))
            lines.append(f"| {name} | 1/{found['memory']:.0f} | {key} | {times['float32']:.3g} | {gains} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and replace what is stored unless it was a short run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one layer, a few repetitions")
    options = parser.parse_args()
    content = run(options.short)
    print(markdown(content))
    if not options.short:
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        pattern = re.compile(r"(<!-- table packed -->\n).*?(<!-- end -->)", re.DOTALL)
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(pattern.sub(lambda m: f"{m[1]}\n{markdown(content)}\n\n{m[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
