"""The streams of the counter-based generator, and the modes in which an optimizer uses them."""

from __future__ import annotations

import torch
from torch import Tensor

from expfam_poco.engine.block import Block
from expfam_poco.family.noise import NoiseKey

# Noises of different purposes never share a counter.
INNER, OUTER, MEGA, FIXED, SAMPLE, PROBE_INNER, PROBE_OUTER, PROBE_MEGA, ELBO = range(9)
NOISE_MODES = ("shared", "independent", "fixed", "antithetic", "zero")


def draw_noise(block: Block, mode: str, count: int, key: NoiseKey) -> Tensor:
    """K × P standardised noise: `count` draws, `count` antithetic pairs, or `count` times the median."""
    family = block.family
    key = key.at(parameter=block.index)
    if mode == "zero":
        like = torch.empty(count, *block.shape, dtype=block.dtype, device=block.device)
        return family.neutral_noise(like)
    drawn = family.noise(block.shape, count, key, dtype=block.dtype, device=block.device)
    if mode == "antithetic":
        return torch.stack([drawn, family.reflect(drawn)], 1).flatten(0, 1)
    return drawn
