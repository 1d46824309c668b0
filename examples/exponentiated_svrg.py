"""A family of one's own on real data: non-negative mixing weights by exponentiated-gradient SVRG.

Noisy pixels of a blend of the mean images of four digits (scikit-learn): how much of each is in it? The amounts are
positive and have a log-normal posterior; `alpha=0` and `alpha=1` are run side by side.

    python examples/exponentiated_svrg.py [--steps 2000]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributions import constraints

import expfam_poco as poco


class Log(NamedTuple):
    """The statistic log θ."""

    log: Tensor


@dataclass(frozen=True)
class LogNormal(poco.ExponentialFamily):
    """Positive weights of fixed relative width: log θ ~ N(width² λ, width²)."""

    width: float = 0.02

    Statistics = Log
    support = constraints.positive

    def statistics(self, theta: Tensor) -> Log:
        """Log θ."""
        return Log(theta.log())

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """The log-normal density at λ = 0."""
        return -theta.log() - 0.5 * (theta.log() / self.width) ** 2 - math.log(self.width * math.sqrt(2 * math.pi))

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """Its expectation."""
        m = self.width**2 * state.log
        return -m - 0.5 * ((m / self.width) ** 2 + 1.0) - math.log(self.width * math.sqrt(2 * math.pi))

    def log_partition(self, nat: Any) -> Tensor:
        """width² λ² / 2."""
        return 0.5 * (self.width * nat.log) ** 2

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """exp(width² λ + width ε)."""
        return torch.exp(self.width**2 * state.log + self.width * noise)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Log:
        """The member with median θ."""
        return Log(theta.log() / self.width**2)

    def point(self, state: Any) -> Tensor:
        """The median."""
        return torch.exp(self.width**2 * state.log)


def blend() -> tuple[Tensor, Tensor, Tensor]:
    """1024 noisy readings of pixels (rows) of a blend of four mean images, and the true parts."""
    data = load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float64) / 16.0
    images = torch.stack([pixels[data.target == k].mean(0) for k in (0, 1, 4, 7)], 1)
    truth = torch.tensor([0.6, 0.3, 0.1, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(64, (1024,), generator=generator)
    readings = images[rows] @ truth + 0.1 * torch.randn(1024, dtype=torch.float64, generator=generator)
    return images[rows], readings, truth


def train(alpha: float, steps: int, seed: int = 0) -> Tensor:
    """The parts after so many steps of mini-batches of 4."""
    x, y, _ = blend()
    parts = torch.nn.Parameter(torch.full((4,), 0.5, dtype=torch.float64))
    optimizer = poco.PosteriorCorrected(
        [("parts", parts)], LogNormal(), lr=4e-6, ess=1e9, alpha=alpha, noise="shared", seed=seed
    )
    generator = torch.Generator().manual_seed(seed)

    def closure(rows: Tensor) -> Any:
        return lambda: 0.5 * ((x[rows] @ parts - y[rows]) ** 2).mean()

    for step in range(steps):
        if step % 64 == 0:
            optimizer.refresh([closure(rows) for rows in torch.arange(1024).split(32)])
        optimizer.step(closure(torch.randint(1024, (4,), generator=generator)))
    return parts.detach().clone()


def main() -> None:
    """Print the parts found with and without correction beside the exact least-squares solution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    steps = parser.parse_args().steps
    poco.check_family(LogNormal(), dtypes=(torch.float64,))  # the dtype it is used in
    x, y, truth = blend()
    best = torch.linalg.lstsq(x, y.unsqueeze(1)).solution.squeeze(1)
    print(f"true parts          {[round(v, 4) for v in truth.tolist()]}")
    print(f"least squares       {[round(v, 4) for v in best.tolist()]}")
    for name, alpha in (("plain BLR", 0.0), ("posterior-corrected", 1.0)):
        found = torch.stack([train(alpha, steps, seed) for seed in range(3)])
        distance = (found - best).norm(dim=1).median()
        print(f"{name:20s}{[round(v, 4) for v in found[0].tolist()]}  distance to least squares {distance:.2e}")


if __name__ == "__main__":
    main()
