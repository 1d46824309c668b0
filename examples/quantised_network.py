"""Networks whose weights take few values: ternary and 4-bit, trained as such, on scikit-learn's digits.

Beside a full-precision network trained by AdamW and the same one rounded afterwards stand categorical posteriors
trained by the Bayesian learning rule, without and with posterior correction. All networks have no other parameters
than their weights; test accuracy is that of the likeliest levels. After 300 steps (two seeds): full precision 0.97;
ternary 0.77 rounded, 0.79 by the rule, 0.68 with correction, which does not pay here; 4 bits 0.96 rounded (so many
levels need no training of their own), 0.76 by the rule, 0.68 with correction.

    python examples/quantised_network.py [--steps 400] [--seeds 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.families import Categorical

LEVELS = {"ternary": (-1.0, 0.0, 1.0), "4 bits": tuple(torch.linspace(-1.0, 1.0, 16).tolist())}
BATCH = 50


class Network(nn.Module):
    """64-100-10, its layers divided by the root of their inputs, with layer normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(0.3 * torch.randn(100, 64))
        self.second = nn.Parameter(0.3 * torch.randn(10, 100))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.layer_norm(x @ self.first.T, (100,)).relu()
        return 3.0 * F.layer_norm(hidden @ self.second.T, (10,))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two thirds for training, one for the test."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(digits.data, dtype=torch.float32) / 8.0 - 1.0)[order]
    y = torch.tensor(digits.target)[order]
    end = len(y) * 2 // 3
    return x[:end], y[:end], x[end:], y[end:]


def accuracy(model: Network) -> float:
    """On the test images."""
    *_, x, y = data()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def train(
    model: Network, steps: int, seed: int, step: Callable[[Callable[[], Tensor]], object], refresh: object = None
) -> None:
    """Random mini-batches; a mega-batch of ten for q_out every tenth step, after a third of the steps."""
    x, y, *_ = data()
    generator = torch.Generator().manual_seed(seed)

    def closure(rows: Tensor) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(model(x[rows]), y[rows])

    for number in range(steps):
        if callable(refresh) and number % 10 == 0 and number >= steps // 3:
            refresh([closure(torch.randint(len(x), (BATCH,), generator=generator)) for _ in range(10)])
        step(closure(torch.randint(len(x), (BATCH,), generator=generator)))


def full_precision(steps: int, seed: int) -> dict[str, float]:
    """AdamW, and what rounding to every grid makes of it: each layer times the best of 50 scales, then rounded."""
    torch.manual_seed(seed)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def step(closure: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()

    train(model, steps, seed, step)
    found = {"full precision, AdamW": accuracy(model)}
    trained = [p.detach().clone() for p in model.parameters()]
    for name, levels in LEVELS.items():
        grid = torch.tensor(levels)
        for p, weight in zip(model.parameters(), trained, strict=True):
            tries = []
            for scale in torch.linspace(0.1, 2.0, 50) * weight.abs().max():
                rounded = scale * grid[(weight.unsqueeze(-1) / scale - grid).abs().argmin(-1)]
                tries.append((float((rounded - weight).square().sum()), rounded))
            p.data.copy_(min(tries, key=lambda each: each[0])[1])
        found[f"{name}, AdamW rounded"] = accuracy(model)
    return found


def quantised(name: str, steps: int, seed: int, corrected: bool, estimator: str = "relaxed") -> float:
    """The accuracy of the modes of a categorical posterior."""
    torch.manual_seed(seed)
    model = Network()
    optimizer = poco.PosteriorCorrected(
        model.named_parameters(),
        Categorical(LEVELS[name]),
        lr=0.02,
        ess=1e5,
        curvature=estimator,
        alpha=0.5 if corrected else 0.0,
        seed=seed,
        backend="eager",
    )
    train(model, steps, seed, optimizer.step, optimizer.refresh if corrected else None)
    return accuracy(model)


def main() -> None:
    """Print mean and worst accuracy over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        found = full_precision(options.steps, seed)
        for name in LEVELS:
            for corrected in (False, True):
                label = f"{name}, BLR{', corrected' if corrected else ''}"
                found[label] = quantised(name, options.steps, seed, corrected)
        for label, value in found.items():
            rows.setdefault(label, []).append(value)
    print(f"{'weights':<28}{'mean':>8}{'worst':>8}")
    for label, values in rows.items():
        print(f"{label:<28}{sum(values) / len(values):8.3f}{min(values):8.3f}")


if __name__ == "__main__":
    main()
