"""Mini-batches with a mega-batch every so often."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def megabatches(
    loader: Iterable[Any], *, every: int, size: int, burn_in: int = 0, epochs: int = 1
) -> Iterator[tuple[Any, list[Any] | None]]:
    """Pair every mini-batch with None or, every `every` steps after the burn-in, with a list of `size` batches.

    The mega-batch comes from an iteration of its own over the loader (PC App. D.3: it need not overlap with the
    batches that follow). Use it before the step: `optimizer.refresh([closure(b) for b in mega])`.

    Args:
        loader: any iterable that can be iterated over again, such as a shuffling DataLoader.
        every: inner steps between two mega-batches.
        size: mini-batches in one mega-batch.
        burn_in: steps before the first mega-batch.
        epochs: passes over the loader.

    Example:
        >>> import expfam_poco as poco
        >>> for batch, mega in poco.megabatches(range(4), every=2, size=3, burn_in=1):
        ...     print(batch, mega)
        0 None
        1 [0, 1, 2]
        2 None
        3 [3, 0, 1]
    """
    for name, value, least in (
        ("every", every, 1),
        ("size", size, 1),
        ("burn_in", burn_in, 0),
        ("epochs", epochs, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: give an integer, {least} or larger.")
    return _megabatches(loader, every, size, burn_in, epochs)


def _megabatches(
    loader: Iterable[Any], every: int, size: int, burn_in: int, epochs: int
) -> Iterator[tuple[Any, list[Any] | None]]:
    others = _again_and_again(loader)
    step = 0
    for _ in range(epochs):
        for batch in loader:
            due = step >= burn_in and (step - burn_in) % every == 0
            yield batch, ([next(others) for _ in range(size)] if due else None)
            step += 1


def _again_and_again(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("loader: it gives no batches the second time; give one that can be iterated again.")
