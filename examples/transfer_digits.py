"""Knowledge transfer: what a stored posterior is worth when a network goes on to other digits.

A network is trained on the digits 0 to 4, and then for a few steps on 5 to 9, of which there are few. It starts from

    weights     the weights alone
    q_out       the same, every step corrected by the stored posterior (`correction="stored"`, `set_outer`)
    prior       the stored posterior as start and prior (`next_task`)

    python examples/transfer_digits.py [--steps 10 40 160] [--seeds 5]
"""

from __future__ import annotations

import argparse
import copy
import warnings

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import expfam_poco as poco

FEW, BATCH, ESS = 100, 16, 500.0
METHODS = ("weights", "q_out", "prior")


def train(model: nn.Module, optimizer: poco.PosteriorCorrected, x: Tensor, y: Tensor, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(y), (BATCH,), generator=generator)
        optimizer.step(lambda rows=rows: cross_entropy(model(x[rows]), y[rows]))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).double().mean())


def run(seed: int, budgets: list[int], alpha: float) -> dict[tuple[str, int], tuple[float, float]]:
    """Accuracy on the new digits and on the old ones, by method and steps."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    old, new = y < 5, y >= 5
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def ivon(net: nn.Module, **choices: float | str) -> poco.PosteriorCorrected:
        return poco.PosteriorCorrected(
            net.named_parameters(), "diagonal_gaussian", lr=0.1, ess=ESS, weight_decay=1e-3, momentum=0.9, seed=seed,
            hess_init=0.5, precision_lr=0.02, curvature="gradsq", **choices,
        )  # fmt: skip

    first = ivon(model)
    train(model, first, x[old][:600], y[old][:600], 600, seed)
    stored, found = first.posterior_states(), {}
    for method in METHODS:
        for steps in budgets:
            net = copy.deepcopy(model)
            optimizer = ivon(net, correction="stored", alpha=alpha) if method == "q_out" else ivon(net)
            if method == "q_out":
                optimizer.set_outer(stored)
            if method == "prior":
                optimizer.set_posterior(stored)
                optimizer.next_task()
            train(net, optimizer, x[new][:FEW], y[new][:FEW], steps, seed + 1)
            found[method, steps] = (
                accuracy(net, x[new][FEW:], y[new][FEW:]), accuracy(net, x[old][600:], y[old][600:])
            )  # fmt: skip
    return found


def main() -> None:
    """Print accuracies on new and old digits, means over seeds with standard errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 40, 160])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--alpha", type=float, default=0.5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="ess: ")
    found = [run(seed, options.steps, options.alpha) for seed in range(options.seeds)]
    print(f"{'start':<10} {'steps':>6} {'new digits':>16} {'old digits':>16}")
    for key in found[0]:
        numbers = torch.tensor([each[key] for each in found], dtype=torch.float64)
        error = numbers.std(0, correction=min(1, len(found) - 1)) / len(found) ** 0.5
        cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(numbers.mean(0).tolist(), error.tolist(), strict=True)]
        print(f"{key[0]:<10} {key[1]:>6} {cells[0]:>16} {cells[1]:>16}")


if __name__ == "__main__":
    main()
