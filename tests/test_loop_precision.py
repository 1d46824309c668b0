"""Loss scaling, autocast, half precision and several dtypes, for every optimizer that has gradients to scale."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import (
    OPTIMIZERS,
    SHELL,
    Task,
    differentiates,
    equal,
    flat,
    network,
    run,
    same,
    takes_second_derivatives,
    those,
    weights,
)
from torch import Tensor, nn

import expfam_poco as poco

SCALABLE = those(lambda opt: not takes_second_derivatives(opt))
GRADIENTS = those(lambda opt: differentiates(opt) and not takes_second_derivatives(opt))
CORRECTED = [n for n in GRADIENTS if OPTIMIZERS[n](network().parameters()).diagnostics()["alpha"] > 0.0]
scalable = pytest.mark.parametrize("name", SCALABLE)
graded = pytest.mark.parametrize("name", GRADIENTS)


def scaler_of(scale: float = 2.0**12, **choices: Any) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=scale, **choices)


class WithNorm(nn.Module):
    """The network, and batch statistics that every evaluation would move."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.net = network()
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))


def prepared(name: str, dtype: torch.dtype = torch.float32, **choices: Any) -> tuple[nn.Module, Any, Task]:
    model = WithNorm(dtype)
    opt: Any = OPTIMIZERS[name](model.named_parameters(), **choices)
    return model, opt, Task(model)


def everything(model: nn.Module, opt: Any) -> list[Any]:
    """All that a skipped step must leave alone."""
    return [weights(model), [b.clone() for b in model.buffers()], without_counters(opt.state_dict()["state"])]


def without_counters(value: Any) -> Any:
    """Nested dictionaries without the copies of counters that travel in the first state."""
    if not isinstance(value, dict):
        return value
    return {key: without_counters(own) for key, own in value.items() if key != "header"}


# ---- the scaled step is the step ---------------------------------------------------------------------------

WAYS = ("whole", "parts", "own-backward")


def scaled_run(name: str, scaler: Any, way: str) -> list[Tensor]:
    model, opt, task = prepared(name)
    losses = []

    def closure(batch: int) -> Callable[[], Any]:
        def evaluate() -> Any:
            loss = task.closure(batch)()
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss.detach()

        return evaluate if way == "own-backward" else task.closure(batch)

    for step in range(9):
        if step % 3 == 0 and step:
            losses.append(opt.refresh([closure(b) for b in range(4)], scaler=scaler))
            if scaler is not None:
                scaler.update()
        closures = [closure(step), closure(step + 1)] if way == "parts" else closure(step)
        losses.append(opt.step(closures, scaler=scaler))
        if scaler is not None:
            scaler.update()
    assert opt.diagnostics()["steps"] == 9 and opt.diagnostics()["skipped_steps"] == 0
    return [*losses, *weights(model)]


@pytest.mark.parametrize("way", WAYS)
@graded
def test_a_scale_that_is_a_power_of_two_changes_no_bit(name: str, way: str) -> None:
    plain = scaled_run(name, None, way)
    assert equal(scaled_run(name, scaler_of(), way), plain)
    assert equal(scaled_run(name, scaler_of(enabled=False), way), plain)
    for one, other in zip(scaled_run(name, scaler_of(1000.0), way), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", those(takes_second_derivatives))
def test_second_derivatives_refuse_a_scaler(name: str) -> None:
    model, opt, task = prepared(name)
    opt.refresh(task.chunks())
    before = everything(model, opt)
    with pytest.raises(TypeError, match="scaler: this curvature or anchor estimator differentiates twice"):
        opt.step(task.closure(0), scaler=scaler_of())
    assert same(everything(model, opt), before)


@pytest.mark.parametrize("wrong", [1024.0, "scaler", True])
def test_what_is_no_scaler_is_named(wrong: Any) -> None:
    _, opt, task = prepared("SVRG")
    with pytest.raises(TypeError, match=r"scaler=.*it has no scale\(\); give a torch\.amp\.GradScaler"):
        opt.step(task.closure(0), scaler=wrong)


# ---- overflows ---------------------------------------------------------------------------------------------


def overflowing(closure: Callable[[], Tensor], at: int) -> Callable[[], Tensor]:
    """The closure, whose gradients are infinite at its call number `at`; the loss is as it was."""
    calls = 0

    def evaluate() -> Tensor:
        nonlocal calls
        calls += 1
        loss = closure()
        return loss + (loss - loss.detach()) * 3e38 if calls == at else loss

    return evaluate


@pytest.mark.parametrize("where", ["inner", "outer", "micro-batch"])
@pytest.mark.parametrize("name", CORRECTED)
def test_an_overflow_skips_the_step_and_nothing_else(name: str, where: str) -> None:
    model, opt, task = prepared(name)
    scaler = scaler_of()
    opt.refresh(task.chunks(), scaler=scaler)
    scaler.update()
    for step in range(2):
        opt.step(task.closure(step), scaler=scaler)
        scaler.update()
    before, scale = everything(model, opt), scaler.get_scale()
    bad = overflowing(task.closure(2), 2 if where == "outer" else 1)
    opt.step([task.closure(3), bad] if where == "micro-batch" else bad, scaler=scaler)
    assert same(everything(model, opt), before)
    assert all(p.grad is None for p in model.parameters())
    assert opt.diagnostics()["skipped_steps"] == 1 and opt.diagnostics()["steps"] == 3
    scaler.update()
    assert scaler.get_scale() == scale / 2
    opt.step(task.closure(3), scaler=scaler)
    scaler.update()
    assert not equal(weights(model), before[0]) and scaler.get_scale() == scale / 2
    assert opt.diagnostics()["skipped_steps"] == 1 and int(model.norm.num_batches_tracked) == 3


@graded
def test_an_overflow_in_a_refresh_keeps_the_old_outer(name: str) -> None:
    model, opt, task = prepared(name)
    scaler = scaler_of()
    opt.refresh(task.chunks(), scaler=scaler)
    scaler.update()
    before, scale = everything(model, opt), scaler.get_scale()
    assert opt.refresh([task.closure(0), overflowing(task.closure(1), 1)], scaler=scaler).isnan()
    assert same(everything(model, opt), before)
    scaler.update()
    assert scaler.get_scale() == scale / 2


@graded
def test_the_scale_grows_with_steps_that_do_not_overflow(name: str) -> None:
    _, opt, task = prepared(name)
    scaler = scaler_of(2.0**4, growth_interval=3)
    for step in range(6):
        opt.step(task.closure(step), scaler=scaler)
        scaler.update()
    assert scaler.get_scale() == 2.0**6


# ---- the scaler between updates ----------------------------------------------------------------------------


@graded
def test_several_optimizers_share_a_scaler(name: str) -> None:
    found = []
    for scaler in (None, scaler_of()):
        pairs = [prepared(name) for _ in range(3)]
        for step in range(6):
            for _, opt, task in pairs:
                opt.step(task.closure(step), scaler=scaler)
            if scaler is not None:
                scaler.update()
        found.append([w for model, _, _ in pairs for w in weights(model)])
    assert equal(*found)


@graded
def test_a_refresh_and_a_step_share_an_update(name: str) -> None:
    found = []
    for scaler in (None, scaler_of()):
        model, opt, task = prepared(name)
        for step in range(6):
            opt.refresh(task.chunks(), scaler=scaler)
            opt.step(task.closure(step), scaler=scaler)
            if scaler is not None:
                scaler.update()
        found.append(weights(model))
    assert equal(*found)


@graded
def test_gradients_that_are_one_tensor_are_unscaled_once(name: str) -> None:
    """a and b of a sum have the same gradient, which autograd may hand out as the same tensor; that of a plain sum
    has one number in memory.
    """
    found = []
    for scaler in (None, scaler_of()):
        a, b, c = (nn.Parameter(torch.full((3,), value)) for value in (0.5, -0.25, 1.0))
        opt: Any = OPTIMIZERS[name]([a, b, c])
        for _ in range(3):
            opt.step(lambda a=a, b=b, c=c: (a + b - 1.0).square().sum() + c.sum(), scaler=scaler)
            if scaler is not None:
                scaler.update()
        found.append([p.detach().clone() for p in (a, b, c)])
    assert equal(*found)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_gradients_that_are_one_tensor_are_clipped_once(base: Any) -> None:
    a, b, c = (nn.Parameter(torch.full((3,), value)) for value in (0.5, -0.25, 1.0))
    start = flat([a, b, c])
    opt = poco.AlphaSVRG(base([a, b, c], lr=1.0, weight_decay=0.0), max_grad_norm=1.0)
    gradient = torch.cat([(2.0 * (a + b - 1.0)).detach()] * 2 + [torch.ones(3)])
    opt.step(lambda: (a + b - 1.0).square().sum() + c.sum())
    moved = start - flat([a, b, c])
    if base is torch.optim.SGD:
        torch.testing.assert_close(moved, gradient / gradient.norm())
    else:
        torch.testing.assert_close(moved, gradient.sign(), rtol=1e-5, atol=1e-5)


@graded
def test_a_scaler_may_be_copied_and_pickled_with_the_optimizer(name: str) -> None:
    model, opt, task = prepared(name)
    scaler = scaler_of()
    run_scaled(opt, task, scaler, 0)
    copies = [copy.deepcopy((model, opt, scaler)), pickle.loads(pickle.dumps((model, opt, scaler)))]
    run_scaled(opt, task, scaler, 4)
    for twin, twin_opt, twin_scaler in copies:
        run_scaled(twin_opt, Task(twin), twin_scaler, 4)
        assert equal(weights(twin), weights(model)) and twin_scaler.get_scale() == scaler.get_scale()


def run_scaled(opt: Any, task: Task, scaler: Any, start: int) -> None:
    for step in range(start, start + 4):
        opt.step(task.closure(step), scaler=scaler)
        scaler.update()


# ---- autocast and half precision ---------------------------------------------------------------------------


@pytest.mark.parametrize(("half", "scaled"), [(torch.bfloat16, False), (torch.float16, True)], ids=["bf16", "fp16"])
@graded
def test_autocast_trains(name: str, half: torch.dtype, scaled: bool) -> None:
    model, opt, task = prepared(name)
    scaler = scaler_of(2.0**8) if scaled else None
    closure_of = task.closure

    def closure(batch: int) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            with torch.autocast("cpu", half):
                return closure_of(batch)()

        return evaluate

    losses = []
    for step in range(24):
        if step % 6 == 0 and step:
            opt.refresh([closure(batch) for batch in range(4)], scaler=scaler)
            if scaler is not None:
                scaler.update()
        losses.append(opt.step([closure(step), closure(step + 1)], scaler=scaler))
        if scaler is not None:
            scaler.update()
    assert all(torch.isfinite(loss) for loss in losses)
    if not name.startswith("bernoulli"):  # whose ±1 weights are in no hurry
        assert torch.stack(losses[-8:]).mean() < torch.stack(losses[:8]).mean()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@scalable
def test_half_precision_weights_train_with_micro_batches(name: str, half: torch.dtype, corrected: bool) -> None:
    model = network(half)
    opt: Any = OPTIMIZERS[name](model.named_parameters())
    task = Task(model)
    for step in range(4):
        if corrected:
            opt.refresh(task.chunks())
        assert torch.isfinite(opt.step([task.closure(step), task.closure(step + 1)], weights=[1, 2]))
    assert {p.dtype for p in model.parameters()} == {half}
    if name in SHELL:
        assert {v.dtype for s in opt.posterior_states().values() for v in s} == {torch.float32}
        assert torch.isfinite(opt.step([task.closure(0), task.closure(1)], fresh_noise=True))


@pytest.mark.parametrize("name", [n for n in GRADIENTS if n != "full-reparam"])
def test_dtypes_side_by_side_in_one_optimizer(name: str) -> None:
    """A float64 layer between a bfloat16 and a float32 one; those of float64 and float32 keep their precision."""
    if name in ("VON", "VONPoCo"):
        pytest.skip("a joint posterior has one dtype")
    layers = [nn.Linear(3, 4).bfloat16(), nn.Linear(4, 4).double(), nn.Linear(4, 1)]
    model = nn.ModuleList(layers)
    opt: Any = OPTIMIZERS[name](model.named_parameters())
    task = Task(network(torch.float32))

    def closure(batch: int) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            hidden = layers[0](task.x[batch % 4].bfloat16()).double()
            return (layers[2](torch.tanh(layers[1](hidden)).float()) - task.y[batch % 4]).square().mean()

        return evaluate

    for step in range(6):
        if step % 3 == 0:
            opt.refresh([closure(b) for b in range(4)])
        assert torch.isfinite(opt.step([closure(step), closure(step + 1)] if step % 2 else closure(step)))
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16] * 2 + [torch.float64] * 2 + [torch.float32] * 2


def test_losses_of_micro_batches_may_differ_in_dtype() -> None:
    model = network()
    opt, task = poco.SVRG(model.parameters(), lr=0.1), Task(model)
    loss = opt.step([task.closure(0), lambda: task.closure(1)().float()])
    with torch.no_grad():
        assert torch.isfinite(loss)
    run(opt, task, 2)
