"""What is computed from weights and kept by a context around us, though the weights change inside of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch.nn.utils import parametrize

keepers: list[ref[Any]] = []  # modules of `fully_shard`, which may keep gathered copies of their weights


def forget_weights(*, gathered: bool = True) -> None:
    """Drop what was computed of the present weights.

    An autocast that is in force around us keeps the low-precision copy of every weight until it ends,
    `parametrize.cached()` every weight that is computed, and a module of `fully_shard` the weights that it has gathered
    for a forward pass, if no backward pass follows.

    Args:
        gathered: those, too.
    """
    torch.clear_autocast_cache()
    if parametrize._cache:
        parametrize._cache.clear()
    for link in keepers if gathered else ():
        if (module := link()) is not None:
            module.reshard()


@contextmanager
def fresh_caches() -> Iterator[None]:
    """Nothing inside is computed from what was cached of other weights outside, nor the other way round."""
    forget_weights()
    try:
        yield
    finally:
        forget_weights()
