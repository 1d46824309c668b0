"""Pictures by number, so that a mini-batch is a function of (seed, stream, index) alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from expfam_poco.errors import InputError


@dataclass(frozen=True)
class Source:
    """Where data come from and where a model is trained.

    Attributes:
        root: folder of the papers' data, or None.
        random: random tensors of the true shapes in place of the papers' data.
        device: "cpu", "cuda", …
    """

    root: Path | None = None
    random: bool = False
    device: str = "cpu"


class Rows(Protocol):
    """Examples by number."""

    def __len__(self) -> int: ...

    def get(self, rows: Tensor, random: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """Inputs and labels of these rows, augmented where there is a generator."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Pictures in two tensors; augmentation shifts each by up to `padding` pixels, and may mirror it."""

    x: Tensor
    y: Tensor
    padding: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.y)

    def get(self, rows: Tensor, random: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """As `Rows` says."""
        x, y = self.x[rows], self.y[rows]
        if random is None or not (self.padding or self.flip):
            return x, y
        if self.flip:
            mirrored = torch.from_numpy(random.random(len(x)) < 0.5)
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        side = x.shape[-1]
        wide = functional.pad(x, [self.padding] * 4)
        shifts = torch.from_numpy(random.integers(0, 2 * self.padding + 1, size=(len(x), 2)))
        down = shifts[:, :1] + torch.arange(side)
        right = shifts[:, 1:] + torch.arange(side)
        number = torch.arange(len(x))[:, None, None]
        moved = wide[number, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)
        # Channels last, a 1 × 1 convolution of 8 channels with stride 2 kills the process in its backward pass: a fault
        # of torch 2.13's oneDNN on CPUs with AVX-512 and without AMX.
        return moved.contiguous(), y


@dataclass(frozen=True)
class Pictures:
    """A data set in parts: to train with, to choose rates by ("tune"), and to report ("report")."""

    train: Rows
    tune: Rows
    report: Rows
    colours: int
    classes: int


@functools.cache
def digits(name: str) -> Pictures:
    """scikit-learn's digits: "digits", or those of some classes, changed, such as "digits 5-9 rotated".

    A third of the pictures, the same for all seeds, is kept from training: half of it to tune, half to report.
    Training pictures are shifted by up to a pixel.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            f"{name!r} needs scikit-learn, which is not installed; run: python -m pip install 'expfam_poco[examples]'."
        ) from None
    loaded = load_digits()
    x = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 16.0
    y = torch.tensor(loaded.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(y), generator=generator)
    x, y = x[order], y[order]
    words = name.split()[1:]
    classes = 10
    for word in words:
        if word == "rotated":
            x = x.rot90(1, (-2, -1))
        elif word == "noisy":
            x = x + 0.4 * torch.randn(x.shape, generator=generator)
        else:
            first, last = map(int, word.split("-"))
            kept = (y >= first) & (y <= last)
            x, y, classes = x[kept], y[kept] - first, last - first + 1
    held_out = len(y) // 6
    parts = [
        InMemory(x[part], y[part], 1)
        for part in torch.arange(len(y)).split([len(y) - 2 * held_out, held_out, held_out])
    ]
    return Pictures(parts[0], parts[1], parts[2], 1, classes)
