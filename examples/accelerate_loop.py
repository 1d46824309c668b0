"""A loop with Accelerate: it prepares model, optimizer and loader; the steps are ours. scikit-learn's digits.

Prints the test accuracy after each pass, and at the end beside AdamW's for as many steps.

    python examples/accelerate_loop.py [--epochs 10]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import expfam_poco as poco
from expfam_poco.integrations.accelerate import unwrap_optimizer
from expfam_poco.tools.megabatches import MegaBatches


def data() -> tuple[TensorDataset, Tensor, Tensor]:
    """Training set (two thirds), test inputs, test labels; one fixed shuffle."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(digits.data, dtype=torch.float32) / 16.0)[order]
    y = torch.tensor(digits.target)[order]
    return TensorDataset(x[:1198], y[:1198]), x[1198:], y[1198:]


def train(method: str, epochs: int, report: Callable[[str], None]) -> float:
    """Test accuracy after training with one method."""
    set_seed(0)
    accelerator = Accelerator()
    dataset, x, y = data()
    loader = DataLoader(dataset, batch_size=32, shuffle=True)
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    if method == "AdamW":
        made: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    else:
        made = poco.IVONPoCoMo(
            model.named_parameters(), lr=0.3, ess=12_000, hess_init=0.5, beta2=0.999, rho1=0.3, rho2=0.05, alpha=0.5
        )
    mega = MegaBatches(loader, every=20, size=10, burn_in=40)
    model, prepared, loader = accelerator.prepare(model, made, loader)

    def closure(batch: list[Tensor]) -> Callable[[], Tensor]:
        inputs, labels = (part.to(accelerator.device) for part in batch)
        return lambda: cross_entropy(model(inputs), labels)

    step, accuracy = 0, 0.0
    for epoch in range(epochs):
        for batch in loader:
            if method == "AdamW":
                prepared.zero_grad()
                accelerator.backward(closure(batch)())
                prepared.step()
            else:
                optimizer = unwrap_optimizer(accelerator, prepared)
                if mega.due(step):
                    batches, examples = mega.at(step)
                    optimizer.refresh([closure(b) for b in batches], weights=examples)
                optimizer.step(closure(batch))
            step += 1
        with torch.no_grad():
            guessed = model(x.to(accelerator.device)).argmax(-1).cpu()
        accuracy = float((guessed == y).float().mean())
        report(f"{method} pass {epoch + 1}: accuracy {accuracy:.3f}")
    return accuracy


def main() -> None:
    """Train both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    reached = train("IVON-PoCoMo", options.epochs, print)
    compared = train("AdamW", options.epochs, lambda line: None)
    print(f"IVON-PoCoMo reached {reached:.3f}, AdamW {compared:.3f}")


if __name__ == "__main__":
    main()
