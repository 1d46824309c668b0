"""What evaluations do beside giving a loss: random numbers are replayed, and state moves once."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expfam_poco.closures import generators
from expfam_poco.closures.effects import Buffers, Replay
from expfam_poco.closures.reach import Reach

DRAWS: dict[str, Callable[[], object]] = {
    "none": lambda: None,
    "torch": lambda: torch.randn(3).tolist(),
    "half a pair of torch": lambda: torch.randn(1).item(),
    "python": random.random,
    "half a pair of python": lambda: random.gauss(0.0, 1.0),
    "numpy": lambda: np.random.rand(700).tolist(),
    "half a pair of numpy": np.random.randn,
    "reseeding": lambda: (torch.manual_seed(3), random.seed(3), np.random.seed(3), torch.rand(1).item())[3],
}


def states() -> object:
    name, words, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (name, list(words), *rest)


@pytest.mark.parametrize("name", DRAWS)
def test_a_second_evaluation_sees_the_numbers_of_the_first(name: str) -> None:
    draw, replay = DRAWS[name], Replay()
    for _ in range(3):
        replay.capture()
        first = draw()
        after = states()
        for _ in range(2):
            with replay.again():
                assert draw() == first
            assert states() == after


def test_generators_are_put_back_after_errors_and_whatever_the_block_has_drawn() -> None:
    replay = Replay()
    after = states()
    with pytest.raises(KeyError), replay.again():
        for draw in DRAWS.values():
            draw()
        raise KeyError
    assert states() == after


def test_replays_can_be_nested() -> None:
    outer = Replay()
    first = torch.rand(2)
    with outer.again():
        inner = Replay()
        assert torch.equal(torch.rand(2), first)
        with inner.again(), outer.again():
            assert torch.equal(torch.rand(2), first)
    assert not torch.equal(torch.rand(2), first)


def test_the_quick_reading_of_states_is_in_use() -> None:
    kinds = {type(source).__name__ for source in generators._EVERYWHERE}
    assert kinds == {"_Torch", "_PythonInPlace", "_NumPyInPlace"}


def test_numpy_with_another_bit_generator_is_replayed() -> None:
    before = np.random.get_bit_generator()
    replay = Replay()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        replay.capture()
        first = np.random.rand()
        with replay.again():
            assert np.random.rand() == first
        assert np.random.rand() != first
    finally:
        np.random.set_bit_generator(before)


def test_the_public_way_reads_the_same() -> None:
    for source in (generators._Python(random._inst), generators._NumPy(np.random.mtrand._rand)):  # type: ignore[attr-defined]
        state = source.read()
        first = random.gauss(0.0, 1.0), np.random.randn()
        assert source.read() != state
        source.write(state)
        again = random.gauss(0.0, 1.0), np.random.randn()
        assert any(a == b for a, b in zip(first, again, strict=True))


# ---- state -------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Hidden state, a counter and a flag as plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.hidden, self.late = nn.Linear(2, 2), torch.zeros(2), None
        self.calls, self.built = 0, False

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.built = self.calls + 1, True
        self.hidden = torch.tanh(self.cell(x) + self.hidden.detach())
        self.late = self.last = self.hidden.detach()
        return self.hidden.sum()


def test_attributes_that_are_state_move_with_the_first_evaluation_alone() -> None:
    model = Recurrent()
    evaluations = Buffers().evaluations(list(model.parameters()), lambda: model(torch.ones(2)))
    model(torch.ones(2))
    hidden = model.hidden.clone()
    for _ in range(2):
        with evaluations.kept():
            model(torch.zeros(2))
        assert model.calls == 1
        assert torch.equal(model.hidden, hidden)
        assert torch.equal(model.last, hidden)
    evaluations.before.restore()
    assert model.calls == 0
    assert model.late is None
    assert torch.equal(model.hidden, torch.zeros(2))
    assert not hasattr(model, "last")
    assert model.built  # what has been done once and for all


def test_attributes_written_in_place_are_restored_but_not_views_of_weights() -> None:
    model = nn.Linear(2, 2)
    model.trace, model.flat = torch.zeros(3), model.weight.data.view(-1)
    with Buffers().kept(list(model.parameters()), lambda: None):
        model.trace.add_(1.0)
        model.weight.data.fill_(7.0)
    assert torch.equal(model.trace, torch.zeros(3))
    assert (model.weight == 7.0).all()


@pytest.mark.parametrize("count", [3, 101, 5000])
def test_modules_in_lists_of_any_length_are_found(count: int) -> None:
    norms = [nn.BatchNorm1d(1) for _ in range(count)]
    assert {id(module) for module in Reach().modules(lambda: norms[-1])} >= set(map(id, norms))


def test_what_is_remembered_follows_what_the_closure_holds() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model: nn.Module = nn.Linear(1, 1)

        def loss(self) -> object:
            return self.model

    reach, trainer = Reach(), Trainer()
    for _ in range(2):
        assert reach.modules(trainer.loss) == [trainer.model]
        assert reach.modules(lambda batch=(torch.ones(1),): trainer.loss()) == [trainer.model]  # noqa: B008
    trainer.model = nn.Linear(2, 2)
    assert reach.modules(trainer.loss) == [trainer.model]
    models = [nn.Linear(1, 1)]
    closure = lambda: models  # noqa: E731
    assert reach.modules(closure) == models
    models.append(nn.Linear(1, 1))
    assert set(reach.modules(closure)) == set(models)


def test_a_forgotten_search_is_repeated() -> None:
    class Deep:
        def __init__(self) -> None:
            self.inner: list[nn.Module] = []

    class Holder:
        def __init__(self) -> None:
            self.deep = Deep()

    reach, holder, late = Reach(), Holder(), nn.Linear(1, 1)
    closure = lambda: holder  # noqa: E731
    reach.modules(closure)
    holder.deep.inner.append(late)
    assert [reach.modules(closure) for _ in range(64)][-1] == [late]
