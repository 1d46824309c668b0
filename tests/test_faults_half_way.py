"""Faults and interrupts at any place: a step, or a refresh, is taken as a whole or not at all."""

import _thread
import copy
import signal
import sys
import warnings
from contextlib import suppress
from typing import Any

import pytest
import torch
from optimizer_cases import OPTIMIZERS, Make, Task, equal, network, weights
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.engine.interrupts import Uninterrupted

OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def engine_of(optimizer: Any) -> Any:
    """The `PosteriorCorrected` that an optimizer is, or has inside."""
    return getattr(optimizer, "_engine", optimizer)


@OPTIMIZER
@pytest.mark.parametrize("fault", [RuntimeError("a bug"), KeyboardInterrupt(), None], ids=["bug", "ctrl-c", "nan"])
def test_a_first_step_that_fails_leaves_the_weights(make: Make, fault: BaseException | None) -> None:
    model = network()
    task, optimizer = Task(model), make(model.parameters())
    before = weights(model)

    def closure() -> Tensor:
        if fault is not None:
            raise fault
        return task.closure(0)() * float("nan")

    for call in (lambda: optimizer.step(closure), lambda: optimizer.refresh([closure])):
        with pytest.raises(type(fault) if fault is not None else poco.NonFiniteError):
            call()
        assert equal(before, weights(model))
    once = copy.deepcopy(model)
    other = make(once.parameters())
    other.step(Task(once).closure(0))
    optimizer.step(task.closure(0))
    if not isinstance(optimizer, poco.AlphaSVRG):
        assert equal(weights(once), weights(model)), "as if it had not been tried"


def test_many_skipped_steps_are_told_once() -> None:
    model = network()
    task, optimizer = Task(model), poco.IVON(model.parameters(), lr=0.1, ess=100.0, nonfinite="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            optimizer.step(lambda: task.closure(0)() * float("nan"))
    with pytest.warns(UserWarning, match="the last 10 steps were all skipped.*loss is nan"):
        optimizer.step(lambda: task.closure(0)() * float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: task.closure(0)() * float("nan"))
        optimizer.step(task.closure(0))


@pytest.mark.parametrize("backend", ["eager", "small"])
def test_a_refresh_that_overflows_or_fails_leaves_the_old_memory(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 600 if backend == "eager" else 6  # in place a tensor of two tiles, or two tensors that are not
    model, x = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size).double()), torch.ones(2, size)

    def closure() -> Tensor:
        return model[1](model[0](x).double()).square().mean()

    choices = {"lr": 0.1, "ess": 1e12, "rho1": 0.5, "rho2": 0.5, "seed": 0}
    place = "eager" if backend == "eager" else "auto"
    optimizer = poco.IVONPoCoMo(model.parameters(), **choices, backend=place)
    optimizer.refresh([closure])
    optimizer.step(closure)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(poco.NonFiniteError, match="q_out stays as it was"):
        optimizer.refresh([lambda: closure() * 1e37])
    kind, calls = type(optimizer.correction), []
    real = kind.after_refresh

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("out of memory")
        return real(*arguments)

    monkeypatch.setattr(kind, "after_refresh", failing)
    with pytest.raises(MemoryError):
        optimizer.refresh([closure])
    monkeypatch.undo()
    after = optimizer.state_dict()
    assert all(
        torch.equal(a, b)
        for number in before["state"]
        for a, b in zip(_tensors(before["state"][number]), _tensors(after["state"][number]), strict=True)
    )
    assert before["poco"]["clock"] == after["poco"]["clock"]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def test_a_step_in_place_that_fails_half_way_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(fails: bool) -> tuple[list[Tensor], list[int]]:
        model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400)).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        x = torch.ones(2, 400, dtype=torch.float64)
        optimizer = poco.IVON(model.parameters(), lr=0.1, ess=1e8, seed=0, backend="eager")

        def loss() -> Tensor:
            return (model(x) - 1.0).square().mean()

        optimizer.step(loss)
        if fails:
            real, calls = type(optimizer.backend).advance, []

            def failing(*arguments: Any, **named: Any) -> Any:
                calls.append(1)
                if len(calls) == 2:
                    raise MemoryError("out of memory")
                return real(*arguments, **named)

            monkeypatch.setattr(type(optimizer.backend), "advance", failing)
            with pytest.raises(MemoryError) as raised:
                optimizer.step(loss)
            monkeypatch.undo()
            assert "the next step moves the others alone" in raised.value.__notes__[0]
            before = weights(model)
            optimizer.step(loss)
            moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
            assert any(moved) and not all(moved)
        else:
            optimizer.step(loss)
        return weights(model), [record["step"] for record in optimizer.state.values()]

    whole, halved = trained(fails=False), trained(fails=True)
    assert whole[1] == halved[1] == [2, 2, 2, 2], "every tensor was stepped twice, none three times"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a generator that is closed
@pytest.mark.parametrize("name", ["IVONPoCoMo", "BayesBiNN", "SVRG"])
def test_an_interrupt_anywhere_leaves_the_points_and_whole_steps(name: str) -> None:
    """Ctrl-C at every 5th call of a step: it is taken as a whole or not at all, and no draw stays in the model."""
    model = network()
    task, optimizer = Task(model), OPTIMIZERS[name](model.parameters())
    optimizer.refresh(task.chunks())
    optimizer.step(task.closure(0))
    engine = engine_of(optimizer)
    taken = 0
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process of the background ignores it
    for at in range(1, 4000, 5):
        seen = 0

        def interrupt(frame: Any, event: str, argument: Any, at: int = at) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                _thread.interrupt_main()

        number, before = engine._clock["step"], weights(model)
        with suppress(KeyboardInterrupt):
            with suppress(KeyboardInterrupt):
                sys.setprofile(interrupt)
                optimizer.step(task.closure(1))
            sys.setprofile(None)
            for _ in range(10):  # where one that still waits comes
                pass
        sys.setprofile(None)
        torch.set_grad_enabled(True)  # the interrupt may have come while torch's own context put that back
        if seen < at:
            break
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert name == "BayesBiNN" or any(moved) == all(moved) == (engine._clock["step"] > number), at
        points = [block.family.point(engine._state(block)["posterior"]) for block in engine._blocks]
        assert equal([p.detach() for p in model.parameters()], points), at
        taken += engine._clock["step"] > number
    assert at > 500 and taken > 0
    assert signal.signal(signal.SIGINT, own) is signal.default_int_handler, "all handlers are back"


def test_signals_wait_and_come_in_order() -> None:
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: came.append(number))
        with Uninterrupted():
            with Uninterrupted():
                signal.raise_signal(signal.SIGUSR2)
                signal.raise_signal(signal.SIGUSR1)
            assert came == []
        assert came == [signal.SIGUSR2, signal.SIGUSR1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
