"""Mini-batches with a mega-batch every so often.

`megabatches` drives a loop of your own. A framework that owns the loop calls back with a step number, restarts at any
of them, and saves no iterators: in `MegaBatches` the step and the seed fix the examples.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from expfam_poco.closures.effects import capture_random, replay_random

SHUFFLING = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


def megabatches(
    loader: Iterable[Any], *, every: int, size: int, burn_in: int = 0, epochs: int = 1
) -> Iterator[tuple[Any, list[Any] | None]]:
    """Pair every mini-batch with None or, every `every` steps after the burn-in, with a list of `size` batches.

    The mega-batch comes from an iteration of its own over the loader (PC App. D.3: it need not overlap with the
    batches that follow). Use it before the step: `optimizer.refresh([closure(b) for b in mega])`. A DataLoader with
    `persistent_workers=True`, which has one iterator for all, gets workers for each of the two iterations.

    Args:
        loader: any iterable that can be iterated over again, such as a shuffling DataLoader.
        every: inner steps between two mega-batches.
        size: mini-batches in one mega-batch.
        burn_in: steps before the first mega-batch.
        epochs: passes over the loader.

    Raises:
        ValueError: for a number out of range, an iterator (a generator, `iter(loader)`, `zip(…)`), or a loader that
            gives no batches in a later pass.

    Example:
        >>> import expfam_poco as poco
        >>> for batch, mega in poco.megabatches(range(4), every=2, size=3, burn_in=1):
        ...     print(batch, mega)
        0 None
        1 [0, 1, 2]
        2 None
        3 [3, 0, 1]
    """
    _check_numbers(every=(every, 1), size=(size, 1), burn_in=(burn_in, 0), epochs=(epochs, 1))
    _check_iterates_twice(loader)
    return _megabatches(loader, every, size, burn_in, epochs)


def _check_numbers(**numbers: tuple[Any, int]) -> None:
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: give an integer, {least} or larger.")


def _check_iterates_twice(loader: Any) -> None:
    """Refuse what two loops cannot go through side by side, each from its beginning.

    Raises:
        ValueError: for such a loader; the sentence names what is at fault.
    """
    parts: list[tuple[str, Any]] = [("", loader)]
    if isinstance(loader, DataLoader):
        parts = [("its sampler ", loader.sampler), ("its batch_sampler ", loader.batch_sampler)]
        if loader.num_workers == 0 and isinstance(loader.dataset, IterableDataset):  # workers have copies of it
            parts = [("its dataset ", loader.dataset)]
    elif not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ValueError(f"loader={type(loader).__name__}: give an iterable of batches, such as a DataLoader.")
    for name, part in parts:
        if part is not None and (isinstance(part, Iterator) or (not name and iter(part) is iter(part))):
            raise ValueError(
                f"loader: it gives no batches the second time, as {name}{type(part).__name__} can be gone through "
                "only once, and mega-batches would take batches away from training; give a list, a DataLoader, or an "
                "object whose __iter__ starts anew."
            )
    within = getattr(loader, "__dict__", {})
    for name, part in within.items() if not isinstance(loader, DataLoader) else ():
        if isinstance(part, DataLoader) and part.persistent_workers:
            raise ValueError(
                f"loader: the DataLoader in its {name!r} has persistent_workers=True, so that two loops share its one "
                "iterator; give that DataLoader itself, or make it with persistent_workers=False."
            )


def _twin(loader: Iterable[Any]) -> Iterable[Any]:
    """What a second loop goes through: the loader, or one like it where it keeps an only iterator."""
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    twin = copy.copy(loader)
    inner = getattr(twin, "base_dataloader", twin)  # Accelerate's has another within
    if inner is not twin:
        inner = copy.copy(inner)
        object.__setattr__(twin, "base_dataloader", inner)
    inner._iterator = None
    return twin


def _megabatches(
    loader: Iterable[Any], every: int, size: int, burn_in: int, epochs: int
) -> Iterator[tuple[Any, list[Any] | None]]:
    others = _again_and_again(_twin(loader))
    step = 0
    for _ in range(epochs):
        before = step
        for batch in loader:
            due = step >= burn_in and (step - burn_in) % every == 0
            yield batch, ([next(others) for _ in range(size)] if due else None)
            step += 1
        if step == before:
            raise _runs_dry(step)


def _again_and_again(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise _runs_dry(1)


def _runs_dry(step: int) -> ValueError:
    when = "the second time; give one that can be iterated again" if step else "at all; give one with data"
    return ValueError(f"loader: it gives no batches {when}.")


class MegaBatches:
    """Every so many steps, a list of mini-batches made as a loader makes its own.

    They are drawn by a sampler of the loader's kind with generators of its own, so that the expectation is that of the
    mini-batches (a WeightedRandomSampler's weights, a SubsetRandomSampler's indices, `replacement`, `drop_last`), and
    put together by the loader's `collate_fn`, on the device of a loader that Accelerate has prepared. Examples in
    order are drawn in a random one. `size` batches that exceed a pass go on with another.

    A sampler or batch sampler of your own is copied, its generators (torch's, NumPy's, Python's) and attributes
    `seed` and `initial_seed` are replaced, the global generators are seeded, and `size` batches are chosen at random
    from one pass. One that then does not give the same examples twice is refused.

    Args:
        loader: a DataLoader over a dataset with a length.
        every: steps between two mega-batches.
        size: mini-batches in one mega-batch.
        burn_in: steps before the first mega-batch.
        seed: of the choice.
        prepare: called with every mini-batch, for what your loop does with its own before they reach the loss.

    Raises:
        ValueError: if a number is out of range, the dataset has no length, or the sampler cannot be reproduced.

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

    def __init__(
        self,
        loader: Any,
        *,
        every: int,
        size: int,
        burn_in: int = 0,
        seed: int = 0,
        prepare: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(loader, DataLoader):
            raise ValueError(f"loader={type(loader).__name__}: give a torch DataLoader, to draw mega-batches from.")
        _check_numbers(every=(every, 1), size=(size, 1), burn_in=(burn_in, 0), seed=(seed, 0))
        if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
            raise ValueError(
                f"loader: its dataset, {type(loader.dataset).__name__}, has no length, so mega-batches cannot be drawn "
                "from it; give one with __len__ and __getitem__."
            )
        _check_iterates_twice(loader)
        self.loader = loader
        self.dataset: Any = loader.dataset
        self.every, self.size, self.burn_in, self.seed = every, size, burn_in, seed
        self.prepare = prepare
        # With neither batch_size nor batch_sampler the sampler's items go to the dataset as they are.
        self.sampler: Any = _reseeded(loader.sampler if loader.batch_sampler is None else loader.batch_sampler, 0)
        inner = getattr(self.sampler, "sampler", None)
        own = type(inner).__module__.startswith("accelerate.")  # its seedable RandomSampler
        self.known = type(self.sampler) is BatchSampler and (type(inner) in SHUFFLING or own)
        if not self.known:
            self._check_custom(loader)

    def due(self, step: int) -> bool:
        """Whether a mega-batch comes before the step after `step` completed ones."""
        return step >= self.burn_in and (step - self.burn_in) % self.every == 0

    def at(self, step: int) -> tuple[list[Any], list[int]]:
        """The mini-batches of that step's mega-batch, and their numbers of examples."""
        with _generators_seeded(self._seed(step, self.size)):  # for a custom sampler, and random augmentations
            chosen = self._chosen(step)
            batches = [self._batch(indices) for indices in chosen]
        return batches, [len(indices) for indices in chosen]

    def _seed(self, step: int, number: int) -> int:
        return int(np.random.SeedSequence([self.seed, step, number]).generate_state(1)[0])

    def _chosen(self, step: int) -> list[Any]:
        """The indices of each mini-batch, from as many passes as it takes."""
        chosen: list[Any] = []
        for number in range(self.size):
            seed = self._seed(step, number)
            one_pass = iter(_reseeded(self.sampler, seed))
            if self.known:
                chosen += islice(one_pass, self.size - len(chosen))
            else:
                # Of one without a length, which may never end, the first ones.
                found = list(one_pass if hasattr(self.sampler, "__len__") else islice(one_pass, self.size))
                order = np.random.default_rng(seed).permutation(len(found)).tolist()
                chosen += [found[i] for i in order[: self.size - len(chosen)]]
            if not chosen:
                raise ValueError("loader: its sampler gives no batches; give one that does.")
            if len(chosen) == self.size:
                break
        return chosen

    def _batch(self, indices: Any) -> Any:
        if self.loader.batch_sampler is None:
            examples = self.dataset[indices]
        elif getattr(self.dataset, "__getitems__", None):
            examples = self.dataset.__getitems__(indices)
        else:
            examples = [self.dataset[i] for i in indices]
        batch = self.loader.collate_fn(examples)
        if type(self.loader).__module__.startswith("accelerate.") and getattr(self.loader, "device", None) is not None:
            from accelerate.utils import send_to_device

            batch = send_to_device(batch, self.loader.device)  # type: ignore[attr-defined]
        return batch if self.prepare is None else self.prepare(batch)

    def _check_custom(self, loader: DataLoader[Any]) -> None:
        """See that a sampler can be drawn from again, and gives batches.

        Raises:
            ValueError: otherwise.
        """
        draws = []
        for _ in range(2):
            with _generators_seeded(0):
                draws.append([_plain(batch) for batch in self._chosen(0)])
        own = loader.sampler if loader.batch_sampler is None or type(self.sampler) is BatchSampler else self.sampler
        if not all(isinstance(batch, list) for batch in draws[0]):
            raise ValueError("loader: it has no batch_size; give a DataLoader that makes batches.")
        if draws[0] != draws[1]:
            raise ValueError(
                f"loader: its sampler, {type(own).__name__}, gives other examples when it is drawn from again with the "
                "same seeds, so mega-batches could not be reproduced; let it draw from an attribute `generator` (a "
                "torch.Generator), or use poco.megabatches in a loop of your own."
            )


def _plain(batch: Any) -> Any:
    """Indices to compare, of a batch in any form."""
    if hasattr(batch, "tolist"):
        return batch.tolist()
    return list(batch) if isinstance(batch, list | tuple | range) else batch


def _reseeded(sampler: Any, seed: int) -> Any:
    """A copy of a sampler, and of samplers within it, that draws from generators of its own."""
    if type(sampler) is SequentialSampler:  # examples in order: any order will do, and a random one has no bias
        return RandomSampler(sampler.data_source, generator=torch.Generator().manual_seed(seed))
    own = copy.copy(sampler)
    for name, value in list(getattr(own, "__dict__", {}).items()):
        if isinstance(value, Sampler) or name in ("sampler", "batch_sampler"):
            value = _reseeded(value, seed)
        elif isinstance(value, torch.Generator) or (name == "generator" and value is None):
            value = torch.Generator().manual_seed(seed)
        elif isinstance(value, np.random.Generator):
            value = np.random.default_rng(seed)
        elif isinstance(value, np.random.RandomState):
            value = np.random.RandomState(seed)
        elif isinstance(value, random.Random):
            value = random.Random(seed)
        elif name in ("seed", "initial_seed") and isinstance(value, int):
            value = seed
        elif name == "epoch" and isinstance(own, RandomSampler | DistributedSampler):
            value = 0  # it counts passes, and these seeds do that here
        elif isinstance(value, list | np.ndarray):
            value = value.copy()  # which may be shuffled in place
        own.__dict__[name] = value
    return own


@contextmanager
def _generators_seeded(seed: int) -> Iterator[None]:
    """The global generators on the CPU seeded inside, and as they were afterwards."""
    with replay_random(capture_random(())):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield
