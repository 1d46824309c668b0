"""Mini-batches with a mega-batch every so often.

`megabatches` drives a loop of your own. A framework that owns the loop calls back with a step number, restarts at any
of them, and saves no iterators: in `MegaBatches` the step and the seed fix the examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset


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


class MegaBatches:
    """Every so many steps, a list of mini-batches drawn without replacement from a loader's dataset.

    They are chosen uniformly, whatever the loader's sampler, and put together by the loader's `collate_fn`. `size`
    batches that exceed the dataset go on with another permutation of it.

    Args:
        loader: a DataLoader over a dataset with a length.
        every: steps between two mega-batches.
        size: mini-batches in one mega-batch.
        burn_in: steps before the first mega-batch.
        seed: of the choice.

    Raises:
        ValueError: if a number is out of range or the dataset has no length.

    Example:
        >>> from expfam_poco.tools.megabatches import MegaBatches
        >>> loader = DataLoader(range(10), batch_size=4)
        >>> mega = MegaBatches(loader, every=5, size=3, burn_in=2)
        >>> [step for step in range(14) if mega.due(step)]
        [2, 7, 12]
        >>> batches, examples = mega.at(7)
        >>> examples
        [4, 4, 2]
    """

    def __init__(self, loader: Any, *, every: int, size: int, burn_in: int = 0, seed: int = 0) -> None:
        if not isinstance(loader, DataLoader):
            raise ValueError(f"loader={type(loader).__name__}: give a torch DataLoader, to draw mega-batches from.")
        for name, value, least in (("every", every, 1), ("size", size, 1), ("burn_in", burn_in, 0), ("seed", seed, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: give an integer, {least} or larger.")
        if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
            raise ValueError(
                f"loader: its dataset, {type(loader.dataset).__name__}, has no length, so mega-batches cannot be drawn "
                "from it; give one with __len__ and __getitem__."
            )
        batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        if batch_size is None:
            raise ValueError("loader: it has no batch_size; give a DataLoader that makes batches.")
        self.dataset: Any = loader.dataset
        self.collate = loader.collate_fn
        self.batch_size: int = batch_size
        self.every, self.size, self.burn_in, self.seed = every, size, burn_in, seed

    def due(self, step: int) -> bool:
        """Whether a mega-batch comes before the step after `step` completed ones."""
        return step >= self.burn_in and (step - self.burn_in) % self.every == 0

    def at(self, step: int) -> tuple[list[Any], list[int]]:
        """The mini-batches of that step's mega-batch, and their numbers of examples."""
        generator = np.random.default_rng([self.seed, step])
        chosen: list[list[int]] = []
        while len(chosen) < self.size:
            order = generator.permutation(len(self.dataset)).tolist()
            chosen += [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        chosen = chosen[: self.size]
        return [self.collate([self.dataset[i] for i in batch]) for batch in chosen], [len(batch) for batch in chosen]
