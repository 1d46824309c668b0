"""Angles with a von Mises posterior: by how much is each digit turned?

Digits of scikit-learn are turned by unknown angles; every image gets one angle, learnt by turning it back onto the
unturned image of the same digit through a differentiable rotation. The pixels are noisy, so the posterior's width says
how far an angle can be trusted.

    python examples/angles.py [--images 32] [--steps 100]
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import expfam_poco as poco


def turned(images: Tensor, angles: Tensor) -> Tensor:
    """Images (N × 1 × 8 × 8) turned by N angles, periodic in each."""
    c, s, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    matrices = torch.stack([torch.stack([c, -s, zero], -1), torch.stack([s, c, zero], -1)], 1)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def main() -> None:
    """Print the error of the angles before and after, and of the certain half beside the uncertain one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    digits = load_digits()
    start = torch.tensor(digits.images[: options.images], dtype=torch.float32).unsqueeze(1) / 16.0
    torch.manual_seed(0)
    truth = (2.0 * torch.rand(options.images) - 1.0) * math.pi
    seen = turned(start, truth) + 0.1 * torch.randn_like(start)

    # A small ess keeps the posterior wide at first, so that every angle tries the whole circle.
    angles = torch.nn.Parameter(torch.zeros(options.images))
    optimizer = poco.PosteriorCorrected([("angles", angles)], "von_mises", lr=0.03, ess=3.0, mc_samples=4, seed=0)

    def error() -> Tensor:
        return (torch.remainder(angles.detach() - truth + math.pi, 2.0 * math.pi) - math.pi).abs() * 180.0 / math.pi

    print(f"median error before {error().median():.1f} degrees")
    for _ in range(options.steps):
        optimizer.step(lambda: (turned(start, angles) - seen).square().sum() / 2.0)
    state = optimizer.posterior_states()["angles"]
    sure = torch.hypot(*state) >= torch.hypot(*state).median()
    print(f"median error after  {error().median():.1f} degrees")
    print(f"mean error of the surer half {error()[sure].mean():.1f}, of the other {error()[~sure].mean():.1f} degrees")


if __name__ == "__main__":
    main()
