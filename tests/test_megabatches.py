"""Mega-batches made as mini-batches: samplers, workers, hooks of frameworks, and iterators that are refused."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import expfam_poco as poco
from expfam_poco.tools.megabatches import MegaBatches

DATA = TensorDataset(torch.arange(100))
RARE = torch.where(torch.arange(100) < 2, 50.0, 0.1)  # two examples with 0.91 of the weight


class InPlace(Sampler[int]):
    """Shuffles its own list by Python's generator."""

    def __init__(self) -> None:
        self.order = list(range(100))

    def __iter__(self) -> Iterator[int]:
        random.shuffle(self.order)
        return iter(self.order)

    def __len__(self) -> int:
        return 100


class OwnGenerator(InPlace):
    """Draws from a generator of NumPy's that it holds."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng()

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.permutation(100).tolist())


class Hidden(InPlace):
    """Draws from a generator that nobody can find."""

    hidden = (np.random.default_rng(),)

    def __iter__(self) -> Iterator[int]:
        return iter(Hidden.hidden[0].permutation(100).tolist())


class Increasing(InPlace):
    """Examples in order, though not by torch's class."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(100))


def examples(batches: list[Any]) -> list[int]:
    return [int(i) for batch in batches for i in batch[0]]


def mega_of(size: int = 4, **choices: Any) -> MegaBatches:
    return MegaBatches(DataLoader(DATA, **choices), every=1, size=size)


SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "in order": lambda: {"batch_size": 25},
    "shuffle": lambda: {"batch_size": 25, "shuffle": True},
    "in place": lambda: {"batch_size": 25, "sampler": InPlace()},
    "own generator": lambda: {"batch_size": 25, "sampler": OwnGenerator()},
    "custom order": lambda: {"batch_size": 25, "sampler": Increasing()},
    "batch sampler": lambda: {"batch_sampler": BatchSampler(RandomSampler(DATA), 25, False)},
    "list of batches": lambda: {"batch_sampler": [list(range(i, i + 25)) for i in range(0, 100, 25)]},
    "sampler of batches": lambda: {"batch_size": None, "sampler": BatchSampler(InPlace(), 25, False)},
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_pass_has_every_example_once_and_depends_on_the_step_alone(kind: str) -> None:
    before = torch.get_rng_state()
    mega = mega_of(**SAMPLERS[kind]())
    drawn, counts = mega.at(7)
    assert sorted(examples(drawn)) == list(range(100)) and counts == [25] * 4
    mega.at(8)
    again = mega_of(**SAMPLERS[kind]())
    assert examples(again.at(7)[0]) == examples(drawn) != examples(again.at(8)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_expectation_is_that_of_the_loaders_sampler() -> None:
    mega = mega_of(batch_size=25, sampler=WeightedRandomSampler(RARE, 100))
    weighted = [i for step in range(5) for i in examples(mega.at(step)[0])]
    assert 0.85 < sum(i < 2 for i in weighted) / 500 < 0.97  # 0.91 ± 4.6 standard errors of 0.013
    assert set(examples(mega_of(batch_size=10, sampler=SubsetRandomSampler(range(10, 50))).at(0)[0])) == set(
        range(10, 50)
    )
    replaced = mega_of(batch_size=25, sampler=RandomSampler(DATA, replacement=True, num_samples=100)).at(0)[0]
    assert 55 < len(set(examples(replaced))) < 75  # 63.4 of 100 on average
    assert mega_of(batch_size=30, shuffle=True, drop_last=True).at(0)[1] == [30] * 4


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"batch_size": 10, "sampler": Hidden()}, "sampler, Hidden, gives other examples"),
        ({"batch_size": 10, "sampler": iter(range(100))}, "its sampler range_iterator can be gone through only once"),
        ({"batch_size": None}, "no batch_size"),
    ],
)
def test_samplers_that_cannot_be_drawn_from_again_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mega_of(**choices)


def test_random_augmentations_are_reproduced_and_prepare_sees_every_batch() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(()) + random.random() + np.random.rand(), index

    loader = DataLoader(Noisy(torch.arange(8)), batch_size=4)
    mega = MegaBatches(loader, every=1, size=2, prepare=lambda batch: (batch[0], -batch[1]))
    first, second = mega.at(3)[0], mega.at(3)[0]
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    assert sorted(int(i) for batch in first for i in batch[1]) == list(range(-7, 1))


def test_a_loader_that_accelerate_has_prepared_puts_them_on_its_device() -> None:
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(DATA, batch_size=10, shuffle=True))
    assert sorted(examples(MegaBatches(loader, every=1, size=10).at(0)[0])) == list(range(100))
    loader.device = torch.device("meta")
    assert MegaBatches(loader, every=1, size=1).at(0)[0][0][0].device.type == "meta"


def test_mega_batches_depend_on_the_step_alone_and_count_each_example_once() -> None:
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=4, shuffle=True)
    mega = MegaBatches(loader, every=5, size=3, burn_in=2)
    batches, examples = mega.at(7)
    again, _ = MegaBatches(loader, every=5, size=3, burn_in=2).at(7)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    assert sorted(int(i) for batch in batches for i in batch[0]) == list(range(10))
    assert examples == [4, 4, 2]
    assert not torch.equal(torch.cat([b[0] for b in batches]), torch.cat([b[0] for b in mega.at(12)[0]]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"every": 0}, "every=0: "), ({"size": 0}, "size=0: "), ({"burn_in": -1}, "burn_in=-1: "), ({"seed": -1}, "seed")],
)
def test_mega_batches_refuse_bad_numbers(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MegaBatches(DataLoader(TensorDataset(torch.arange(4))), **({"every": 1, "size": 1} | changed))


def test_mega_batches_refuse_what_they_cannot_draw_from() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(8))

    for loader, message in ((DataLoader(Stream()), "no length"), ([1, 2], "list"), (None, "NoneType")):
        with pytest.raises(ValueError, match=message):
            MegaBatches(loader, every=1, size=1)


# ---- poco.megabatches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "accelerate"])
def test_persistent_workers_serve_both_iterations(prepared: bool) -> None:
    loader: Any = DataLoader(DATA, batch_size=25, shuffle=True, num_workers=1, persistent_workers=True)
    if prepared:
        loader = pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(loader)
    pairs = list(islice(poco.megabatches(loader, every=2, size=2, burn_in=1, epochs=3), 40))
    counts = Counter(examples([batch for batch, _ in pairs]))
    assert len(pairs) == 12 and set(counts.values()) == {3} and len(counts) == 100
    assert sum(mega is not None for _, mega in pairs) == 6


class Stream(IterableDataset[int]):
    """One that is its own iterator."""

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return 0


class Stored:
    """An iterable that gives out one iterator for ever."""

    def __init__(self) -> None:
        self.iterator = iter(range(8))

    def __iter__(self) -> Iterator[int]:
        return self.iterator


ONE_SHOT: dict[str, Callable[[], Any]] = {
    "generator": lambda: (i for i in range(8)),
    "iterator": lambda: iter(DataLoader(DATA)),
    "zip": lambda: zip(range(8), range(8), strict=True),
    "map": lambda: map(str, range(8)),
    "stored": Stored,
    "sampler": lambda: DataLoader(DATA, sampler=iter(range(8))),  # type: ignore[arg-type]
    "stream": lambda: DataLoader(Stream()),
}


@pytest.mark.parametrize("kind", ONE_SHOT)
def test_what_can_be_gone_through_only_once_is_refused_at_once(kind: str) -> None:
    with pytest.raises(ValueError, match=r"loader: .* can be gone through only once, .*; give a list"):
        poco.megabatches(ONE_SHOT[kind](), every=4, size=2, epochs=3)


def test_a_wrapper_around_persistent_workers_is_refused() -> None:
    class Wrapper:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Iterator[Any]:
            yield from self.loader

    persistent = Wrapper(DataLoader(DATA, num_workers=1, persistent_workers=True))
    with pytest.raises(ValueError, match="persistent_workers=True"):
        poco.megabatches(persistent, every=1, size=1)
    assert len(list(poco.megabatches(Wrapper([1, 2]), every=1, size=1))) == 2


def test_a_later_pass_without_batches_is_an_error() -> None:
    class Emptied:
        def __init__(self) -> None:
            self.left = [1, 2, 3]

        def __iter__(self) -> Iterator[int]:
            while self.left:
                yield self.left.pop()

    with pytest.raises(ValueError, match="gives no batches the second time"):
        list(poco.megabatches(Emptied(), every=9, size=1, burn_in=9, epochs=2))
