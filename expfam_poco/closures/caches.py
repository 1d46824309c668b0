"""What is computed from weights and kept by a context around us, though the weights change inside of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils import parametrize


def forget_weights() -> None:
    """Drop what was computed of the present weights.

    An autocast that is in force around us keeps the low-precision copy of every weight until it ends, and
    `parametrize.cached()` every weight that is computed.
    """
    torch.clear_autocast_cache()
    if parametrize._cache:
        parametrize._cache.clear()


@contextmanager
def fresh_caches() -> Iterator[None]:
    """Nothing inside is computed from what was cached of other weights outside, nor the other way round."""
    forget_weights()
    try:
        yield
    finally:
        forget_weights()
