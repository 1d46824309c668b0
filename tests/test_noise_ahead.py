"""Noise made ahead of its step is the noise of that step, bit for bit."""

from __future__ import annotations

import copy
import importlib
import random

import pytest
import torch

from expfam_poco.family.ahead import Ahead
from expfam_poco.family.noise import NoiseKey, noise, tiled, tiles_of

KINDS = ("normal", "logistic", "uniform", "rademacher")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STEPS = [*range(70), 5, 6, 7, 1000, 3, 1001, *range(2**32 - 4, 2**32)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_functions(kind: str, dtype: torch.dtype) -> None:
    ahead, tiles = Ahead(), tiles_of([3, 5], [300, 10])
    for step in STEPS:
        for draw in (0, 2):
            key = NoiseKey(seed=2**63 + 7, stream=4, step=step, draw=draw, parameter=1, offset=77)
            expected = noise(kind, (5, 3), 2, key, dtype=dtype)
            assert torch.equal(ahead.noise(kind, (5, 3), 2, key, dtype=dtype), expected)
            assert torch.equal(ahead.tiled(kind, tiles, key, dtype), tiled(kind, tiles, key, dtype))


@pytest.mark.parametrize("size", [1, 31, 512, 5000, 40000])
def test_memory_is_bounded_and_order_does_not_matter(size: int) -> None:
    ahead, chosen = Ahead(steps=8), random.Random(0)
    for _ in range(60):
        key = NoiseKey(seed=1, step=chosen.randrange(6), parameter=chosen.randrange(3), draw=chosen.randrange(2))
        assert torch.equal(ahead.noise("normal", (size,), 1, key), noise("normal", (size,), 1, key))
        assert sum(kept.rows.numel() for kept in ahead._kept.values()) == ahead._size <= ahead.most


def test_rows_belong_to_the_caller() -> None:
    ahead, key = Ahead(), NoiseKey(seed=1)
    for step in range(3):
        ahead.noise("normal", (4,), 1, key.at(step=step)).zero_()
    for step in range(3):
        assert torch.equal(
            ahead.noise("normal", (4,), 1, key.at(step=step)), noise("normal", (4,), 1, key.at(step=step))
        )


def test_a_copy_starts_anew_and_inference_tensors_do_not_leak() -> None:
    ahead, key = Ahead(steps=4), NoiseKey(seed=1)
    with torch.inference_mode():
        for step in range(2):
            ahead.noise("normal", (4,), 1, key.at(step=step))
    weight = torch.ones(4, requires_grad=True)
    (weight * ahead.noise("normal", (1, 4), 1, key.at(step=2))).sum().backward()
    (weight * ahead.noise("normal", (4,), 1, key.at(step=2))).sum().backward()
    twin = copy.deepcopy(ahead)
    assert twin._kept == {} and twin.steps == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 300, 5000])
def test_numpy_and_torch_make_the_same_noise(kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    key = NoiseKey(seed=2**64 - 1, stream=255, step=2**32 - 1, parameter=2**32 - 1, offset=3)
    by_numpy = noise(kind, (size,), 3, key)
    monkeypatch.setattr(importlib.import_module("expfam_poco.family.philox"), "_FEW", 0)
    assert torch.equal(noise(kind, (size,), 3, key), by_numpy)
