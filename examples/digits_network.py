"""A small network on real images (scikit-learn digits): AdamW, IVON and IVON-PoCoMo at equal gradient evaluations.

A corrected step evaluates two gradients and a mega-batch one for each of its mini-batches, so IVON-PoCoMo takes fewer
steps for the same budget. Both axes are printed. The IVON family predicts with its posterior (32 draws).

    python examples/digits_network.py [--evaluations 1500] [--seeds 3]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import expfam_poco as poco

EVERY, SIZE = 20, 10  # inner steps between mega-batches, mini-batches in one


def data() -> tuple[TensorDataset, Tensor, Tensor]:
    """Training set (two thirds), test inputs, test labels; one fixed shuffle."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(digits.data, dtype=torch.float32) / 16.0)[order]
    y = torch.tensor(digits.target)[order]
    return TensorDataset(x[:1198], y[:1198]), x[1198:], y[1198:]


def network() -> nn.Module:
    """64 → 64 → 10."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def run(name: str, seed: int, evaluations: int) -> dict[str, float]:
    """Train one method within a budget of mini-batch gradients; test accuracy and negative log-likelihood."""
    torch.manual_seed(seed)
    train, x, y = data()
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    model = network()

    def closure(batch: list[Tensor]) -> Callable[[], Tensor]:
        return lambda: cross_entropy(model(batch[0]), batch[1])

    optimizer: Any
    if name == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    else:
        chosen = {"lr": 0.3, "ess": 12_000, "hess_init": 0.5, "beta2": 0.999}
        extra = {"rho1": 0.3, "rho2": 0.05, "alpha": 0.5} if name == "IVON-PoCoMo" else {}
        optimizer = (poco.IVONPoCoMo if extra else poco.IVON)(model.named_parameters(), **chosen, **extra)
    spent, steps = 0, 0
    burn_in = 100 if name == "IVON-PoCoMo" else 10**9
    for batch, mega in poco.megabatches(loader, every=EVERY, size=SIZE, burn_in=burn_in, epochs=10**6):
        if spent >= evaluations:
            break
        if mega:
            optimizer.refresh([closure(b) for b in mega])
            spent += SIZE
        if name == "AdamW":
            optimizer.zero_grad()
            closure(batch)().backward()
            optimizer.step()
        else:
            optimizer.step(closure(batch))
        steps += 1
        spent += 1 if steps <= burn_in else 2
    with torch.no_grad():
        if name == "AdamW":
            probabilities = model(x).softmax(-1)
        else:
            probabilities = poco.predict(model, optimizer, x, samples=32, transform=lambda z: z.softmax(-1))
    return {
        "steps": steps,
        "evaluations": spent,
        "accuracy": float((probabilities.argmax(-1) == y).float().mean()),
        "nll": float(-probabilities[torch.arange(len(y)), y].log().mean()),
    }


def main() -> None:
    """Print a table of medians over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=1500, help="mini-batch gradients for each method")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(f"{'method':14s}{'steps':>7s}{'gradients':>11s}{'accuracy':>10s}{'NLL':>8s}")
    for name in ("AdamW", "IVON", "IVON-PoCoMo"):
        results = [run(name, seed, options.evaluations) for seed in range(options.seeds)]
        median = {key: statistics.median(r[key] for r in results) for key in results[0]}
        print(
            f"{name:14s}{median['steps']:7.0f}{median['evaluations']:11.0f}"
            f"{median['accuracy']:10.4f}{median['nll']:8.4f}"
        )


if __name__ == "__main__":
    main()
