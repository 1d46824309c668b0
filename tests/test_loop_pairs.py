"""The two evaluations of a batch: they see the same random numbers, and only the first of them moves buffers."""

import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import OPTIMIZERS, SHELL, Task, differentiates, equal, network, not_looking, those
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import expfam_poco as poco

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_shell = pytest.mark.parametrize("name", SHELL)


# ---- random numbers ----------------------------------------------------------------------------------------


class Witness:
    """A closure that notes what the generators of torch, Python and NumPy give it at every call."""

    def __init__(self, loss: Callable[[], Tensor]) -> None:
        self.loss = loss
        self.seen: list[tuple[float, float, float]] = []

    def __call__(self) -> Tensor:
        self.seen.append((float(torch.rand(())), random.random(), float(np.random.random())))
        return self.loss()

    def take(self) -> list[tuple[float, float, float]]:
        taken, self.seen = self.seen, []
        return taken


def refreshed(name: str, model: nn.Module | None = None, **choices: Any) -> tuple[nn.Module, Any, Task]:
    model = network() if model is None else model
    opt: Any = not_looking(OPTIMIZERS[name](model.named_parameters(), **choices))
    task = Task(model)
    opt.refresh(task.chunks())
    return model, opt, task


def corrects(opt: Any) -> bool:
    """Whether steps after a refresh have a pair: VON and IVON have α = 0."""
    return opt.diagnostics()["alpha"] > 0.0


CORRECTED = those(corrects)


@pytest.mark.parametrize("name", CORRECTED)
def test_both_sides_of_a_pair_see_the_same_numbers_and_nobody_else_does(name: str) -> None:
    _, opt, task = refreshed(name)
    witness = Witness(task.closure(0))
    earlier: list[Any] = []
    for _ in range(3):
        opt.step(witness)
        seen = witness.take()
        assert len(seen) > 0 and len(seen) % 2 == 0
        for inside, outside in zip(seen[::2], seen[1::2], strict=True):
            assert inside == outside, "the two evaluations differ"
            assert not {*inside} & {*earlier}, "two draws or steps share their numbers"
            earlier += inside


@pytest.mark.parametrize("name", CORRECTED)
def test_micro_batches_have_numbers_of_their_own_the_same_on_both_sides(name: str) -> None:
    _, opt, task = refreshed(name)
    witnesses = [Witness(task.closure(batch)) for batch in range(3)]
    opt.step(witnesses)
    taken = [witness.take() for witness in witnesses]
    everything = [numbers for seen in taken for numbers in seen]
    assert all(seen[::2] == seen[1::2] for seen in taken)
    assert len(set(everything)) == len(everything) / 2


@every_optimizer
def test_chunks_of_a_mega_batch_have_numbers_of_their_own(name: str) -> None:
    _, opt, task = refreshed(name)
    witness = Witness(task.closure(0))
    opt.refresh([witness] * 3)
    seen = witness.take()
    assert len(seen) >= 3 and len(set(seen)) == len(seen)


@pytest.mark.parametrize("name", CORRECTED)
def test_the_generators_stand_where_one_evaluation_leaves_them(name: str) -> None:
    """Also after an interruption of the second evaluation."""
    states = []
    for interrupted in (False, True):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        _, opt, task = refreshed(name)
        calls = 0

        def closure(interrupted: bool = interrupted, task: Task = task) -> Tensor:
            nonlocal calls
            calls += 1
            random.random(), np.random.random(), torch.rand(())
            if interrupted and calls == 2:
                raise KeyboardInterrupt
            return task.closure(0)()

        if not interrupted:
            if opt.__dict__.get("mc_samples", 1) > 1 or opt.__dict__.get("noise") == "antithetic":
                pytest.skip("several draws: several evaluations")
            opt.step(closure)
        else:
            with pytest.raises(KeyboardInterrupt):
                opt.step(closure)
        states.append((random.random(), np.random.random(), float(torch.rand(()))))
    assert states[0] == states[1]


# ---- buffers -----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its calls in a buffer in place, and in one that every call replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        return x


class Moving(nn.Module):
    """A network with every kind of moving buffer, behind a backbone that the optimizer does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.counting = Counting()
        self.last = nn.Linear(4, 1)
        self.backbone = [nn.Sequential(nn.BatchNorm1d(3), Counting()).requires_grad_(False).double()]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.counting(torch.tanh(self.norm(self.spectral(self.backbone[0](x))))))

    def calls(self) -> set[int]:
        """How often buffers have moved, which all of them must agree on."""
        back = self.backbone[0]
        counts = [self.norm.num_batches_tracked, self.counting.calls, self.counting.replaced]
        return {int(c) for c in [*counts, back[0].num_batches_tracked, back[1].calls, back[1].replaced]}

    def copies(self) -> list[Tensor]:
        return [b.clone() for b in [*self.buffers(), *self.backbone[0].buffers()]]


def moving(name: str, **choices: Any) -> tuple[Moving, Any, Task]:
    torch.manual_seed(0)
    model = Moving()
    return model, not_looking(OPTIMIZERS[name](model.named_parameters(), **choices)), Task(model)


@every_optimizer
def test_buffers_move_once_per_step_and_by_nothing_else(name: str) -> None:
    model, opt, task = moving(name)
    before = model.copies()
    opt.refresh(task.chunks())
    assert equal(model.copies(), before), "the refresh moved buffers"
    for step in range(1, 4):
        previous = model.copies()
        opt.step(task.closure(step))
        assert model.calls() == {step}
        assert not any(map(torch.equal, model.copies(), previous))
    if hasattr(opt, "measure_variance"):
        before = model.copies()
        opt.measure_variance(task.chunks())
        assert equal(model.copies(), before), "measuring moved buffers"


@every_optimizer
def test_the_power_iteration_of_a_spectral_norm_advances_once(name: str) -> None:
    """Followed by hand: u and v of a corrected step are those of one evaluation at the weights of the first."""
    model, opt, task = moving(name)
    opt.refresh(task.chunks())
    (spectral,) = [m for m in model.modules() if type(m).__name__ == "_SpectralNorm"]
    expected: list[Tensor] = []

    def closure() -> Tensor:
        loss = task.closure(0)()
        expected.append(spectral._u.clone())
        return loss

    opt.step(closure)
    assert torch.equal(spectral._u, expected[0])


@every_optimizer
def test_a_micro_batch_moves_buffers_once(name: str) -> None:
    model, opt, task = moving(name)
    opt.refresh(task.chunks())
    opt.step(task.chunks()[:3], weights=[1, 2, 3])
    assert model.calls() == {3}
    if name in SHELL:
        opt.step(task.chunks()[:2], fresh_noise=True)
        assert model.calls() == {5}


@pytest.mark.parametrize("draws", [2, 3])
@every_shell
def test_several_draws_move_buffers_once(name: str, draws: int) -> None:
    model, opt, task = moving(name, mc_samples=draws)
    opt.refresh(task.chunks())
    opt.step(task.closure(0))
    opt.step(task.chunks()[:2])
    assert model.calls() == {3}


@pytest.mark.parametrize("fault", [KeyboardInterrupt, float("nan")], ids=["interrupt", "nan"])
@every_optimizer
def test_a_failed_step_leaves_buffers_alone_wherever_it_fails(name: str, fault: Any) -> None:
    model, opt, task = moving(name)
    opt.refresh(task.chunks())
    opt.step(task.closure(0))
    before = model.copies()

    def failing(at: int) -> Callable[[], Tensor]:
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            loss = task.closure(1)()
            if calls == at and isinstance(fault, type):
                raise fault
            return loss * fault if calls == at else loss

        return closure

    for at in (1, 2) if corrects(opt) else (1,):
        for parts in (failing(at), [task.closure(2), failing(at)]):
            with pytest.raises(fault if isinstance(fault, type) else poco.NonFiniteError):
                opt.step(parts)
            assert equal(model.copies(), before)
    with pytest.raises((KeyboardInterrupt, poco.NonFiniteError)):
        opt.refresh([task.closure(0), failing(1)])
    assert equal(model.copies(), before)
    opt.step(task.closure(0))
    assert model.calls() == {2}


@pytest.mark.parametrize("name", those(differentiates, SHELL))
def test_a_skipped_step_leaves_buffers_alone(name: str) -> None:
    model, opt, task = moving(name, nonfinite="skip")
    opt.refresh(task.chunks())
    before = model.copies()
    opt.step(lambda: task.closure(0)() * float("inf"))
    assert equal(model.copies(), before) and opt.diagnostics()["skipped_steps"] == 1


# ---- modules that are found wherever they are --------------------------------------------------------------


def svrg(params: Any, **choices: Any) -> Any:
    return poco.SVRG(params, **{"lr": 0.1, **choices})


def test_a_module_that_was_never_built_disturbs_nobody() -> None:
    """Constructors fail, and what remains of the module may live on in a traceback."""
    remains, failure = [nn.Linear.__new__(nn.Linear)], None
    model, opt, task = moving("SVRG")
    try:
        opt.refresh(task.chunks())
        opt.step(task.closure(0))
    except AttributeError as error:
        failure = str(error)  # and not its traceback, by which the remains would meet the other tests
    remains.clear()
    assert failure is None and model.calls() == {1}


def test_models_frozen_for_the_garbage_collector_are_found() -> None:
    model, opt, task = moving("SVRG")
    gc.freeze()  # for good, as conftest.py does before every file
    opt.refresh(task.chunks())
    opt.step(task.closure(0))
    assert model.calls() == {1}


def test_a_buffer_whose_entries_share_memory_disturbs_nobody() -> None:
    model = nn.BatchNorm1d(3)
    model.register_buffer("mask", torch.ones(1).expand(3))
    x, opt = torch.randn(5, 3), svrg(model.parameters())

    def closure() -> Tensor:
        return (model(x) * model.mask - 1.0).square().mean()

    opt.refresh([closure])
    opt.step(closure)
    assert int(model.num_batches_tracked) == 1 and torch.equal(model.mask, torch.ones(3))


def test_modules_may_come_and_go_between_steps() -> None:
    weight = nn.Parameter(torch.ones(1, 3))
    opt = svrg([weight])
    x = torch.randn(8, 3)
    for _ in range(4):
        wrapper = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))
        wrapper[0].weight = weight

        def closure(wrapper: nn.Module = wrapper) -> Tensor:
            return (wrapper(x) - 1.0).square().mean()

        opt.refresh([closure])
        opt.step(closure)
        assert int(wrapper[1].num_batches_tracked) == 1
        del wrapper, closure
        gc.collect()


def test_another_module_called_with_buffers_of_its_callers_keeps_its_own() -> None:
    """An averaged teacher by `functional_call`: inside the call the module seems to hold the caller's buffers."""
    teacher = nn.Sequential(nn.BatchNorm1d(3)).eval()
    own = [b.clone() for b in teacher.buffers()]
    averaged = {key: value.clone() + 5 for key, value in teacher.state_dict().items()}
    weight, x = nn.Parameter(torch.ones(3)), torch.randn(5, 3)
    opt = svrg([weight])

    def closure() -> Tensor:
        return (functional_call(teacher, averaged, (x,)) * weight).square().mean()

    opt.refresh([closure])
    opt.step(closure)
    assert equal(list(teacher.buffers()), own)


def test_an_ensemble_under_vmap_trains() -> None:
    """Stacked weights, called through a module of another device (torch's tutorial on ensembles)."""
    models = [nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)) for _ in range(3)]
    for model in models:
        model.register_buffer("scale", torch.ones(()))
    params, buffers = stack_module_state(models)
    base = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).to("meta")
    base.register_buffer("scale", torch.ones((), device="meta"))
    x = torch.randn(5, 3)

    def loss(weights: Any, others: Any) -> Tensor:
        return functional_call(base, (weights, others), (x,)).square().mean()

    opt = svrg([p.requires_grad_() for p in params.values()])
    closure = lambda: vmap(loss)(params, buffers).mean()  # noqa: E731
    opt.refresh([closure])
    first = opt.step(closure)
    assert opt.step(closure) < first
    assert all(b.device.type == "meta" for b in base.buffers())


def test_plain_tensors_without_any_module_train() -> None:
    weight = torch.ones(3, requires_grad=True)
    norm = nn.BatchNorm1d(3, affine=False)
    x = torch.randn(6, 3)
    opt = svrg([weight])
    for step in range(1, 4):
        opt.refresh([lambda: (norm(x) * weight).square().mean()])
        opt.step(lambda: (norm(x) * weight).square().mean())
        assert int(norm.num_batches_tracked) == step


def test_a_model_trained_in_another_thread_keeps_its_buffers() -> None:
    """The second model's step falls into the outer evaluation of the first."""
    mine, my_opt, my_task = moving("SVRG")
    theirs, their_opt, their_task = moving("SVRG")
    my_opt.refresh(my_task.chunks())
    go, done, calls = threading.Event(), threading.Event(), 0

    def step_theirs() -> None:
        go.wait(timeout=60)
        their_opt.step(their_task.closure(0))
        done.set()

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            go.set()
            done.wait(timeout=60)
        return my_task.closure(0)()

    other = threading.Thread(target=step_theirs)
    other.start()
    my_opt.step(closure)
    other.join()
    assert mine.calls() == {1}
    assert theirs.calls() == {1}, "the other model's statistics were undone"


@pytest.mark.parametrize("name", ["SVRG", "IVONPoCoMo", "diagonal-hutchinson", "AlphaSVRG-AdamW"])
def test_steps_leave_no_objects_behind(name: str) -> None:
    """Not one object in three steps."""
    _, opt, task = moving(name)

    def train(steps: int) -> int:
        for step in range(steps):
            if step % 10 == 0:
                opt.refresh(task.chunks())
            opt.step(task.closure(step))
        gc.collect()
        return len(gc.get_objects())

    before = train(20)
    assert train(90) - before < 30
