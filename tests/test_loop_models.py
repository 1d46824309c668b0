"""Models as training loops have them: compiled, parametrised, checkpointed, copied, moved; and odd closures."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from optimizer_cases import (
    OPTIMIZERS,
    OVER_A_BASE,
    SHELL,
    Task,
    equal,
    flat,
    is_joint,
    network,
    run,
    same,
    takes_second_derivatives,
    those,
    weights,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import expfam_poco as poco

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
FIRST_ORDER = those(lambda opt: not takes_second_derivatives(opt))


# ---- compiled models ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """A network with batch statistics, behind a frozen backbone that is no part of it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.net = network()
        self.backbone = [backbone]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


KINDS = ("eager", "compiled", "compiled-in-place", "compiled-backbone", "compiled-loss", "compiled-late")


@pytest.fixture
def counter() -> Iterator[Any]:
    """A backend that runs graphs eagerly and counts them; what Dynamo keeps is dropped around each test."""
    gc.collect()  # compiled models of earlier tests
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()


def compiled_run(name: str, kind: str, counter: Any) -> tuple[list[Tensor], list[Tensor], Net, Any]:
    """Eight steps with two refreshes; the losses, weights, and both models' buffers."""
    torch.manual_seed(0)
    back = Backbone().requires_grad_(False)
    model = Net(back)
    opt: Any = OPTIMIZERS[name](model.named_parameters())
    task = Task(model)
    forward: Any = model
    behind: Any = back
    if kind == "compiled":
        forward = torch.compile(model, backend=counter)
    if kind == "compiled-in-place":
        model.compile(backend=counter)
    if kind == "compiled-backbone":
        behind, forward = torch.compile(back, backend=counter), torch.compile(model, backend=counter)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (forward(behind(x)) - y).square().mean()

    whole = torch.compile(loss, backend=counter) if kind == "compiled-loss" else loss

    def closure(batch: int) -> Callable[[], Tensor]:
        return lambda: whole(task.x[batch % 4], task.y[batch % 4])

    losses = []
    for step in range(12):
        if step in (2, 6):
            losses.append(opt.refresh([closure(b) for b in range(4)]))
        if step == 4 and kind == "compiled-late":
            forward = torch.compile(model, backend=counter)
        losses.append(opt.step(closure(step)))
    return losses, [*weights(model), *model.buffers(), *back.buffers()], model, opt


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("IVONPoCoMo", kind) for kind in KINDS[1:]),
        *(("AlphaSVRG-AdamW", kind) for kind in KINDS[1:]),
        ("SVRG", "compiled"),  # without noise
        ("bernoulli-relaxed", "compiled"),  # weights that are no point
    ],
)
def test_compiled_models_train_as_eager_ones(name: str, kind: str, counter: Any) -> None:
    """Weights, losses, and the statistics of the model and of its backbone.

    Compiled once for training, and once more at most where a tensor's properties change; not at every evaluation.
    """
    eager = compiled_run(name, "eager", None)
    compiled = compiled_run(name, kind, counter)
    assert 0 < counter.frame_count <= 4
    assert int(eager[1][-1]) == 12, "the eager backbone moved more than once per step"
    for ours, theirs in zip(compiled[:2], eager[:2], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_other_compiled_models_of_the_process_change_nothing(counter: Any) -> None:
    """A model compiled elsewhere must not decide whose buffers are found."""
    other = torch.compile(nn.Linear(2, 2), backend=counter)
    _, state, _, _ = compiled_run("SVRG", "eager", None)
    assert int(state[-1]) == 12 and other is not None


# ---- parametrised and checkpointed models ------------------------------------------------------------------


class Layers(nn.Module):
    """A network whose middle may be recomputed in the backward pass."""

    def __init__(self, recompute: bool, dropout: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(dropout))
        self.last = nn.Linear(4, 1)
        self.recompute = recompute
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.recompute:
            hidden = checkpoint(self.middle, hidden, use_reentrant=False)
        else:
            hidden = self.middle(hidden)
        return self.last(hidden)


@every_optimizer
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    """Rows of exact Hessians are differentiated under vmap, where torch recomputes nothing random."""
    needs = {getattr(g.get("curvature"), "needs", None) for g in OPTIMIZERS[name](network().parameters()).param_groups}
    dropout = 0.0 if "hessian" in needs or name == "diagonal-stored" else 0.3
    found = []
    for recompute in (False, True):
        torch.manual_seed(5)
        model = Layers(recompute, dropout)
        opt: Any = OPTIMIZERS[name](model.named_parameters())
        task = Task(model)
        losses = run(opt, task, 9)
        losses.append(opt.step([task.closure(0), task.closure(1)]))
        found.append([*losses, *weights(model), torch.rand(1)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


PARAMETRIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "orthogonal": lambda layer: nn.utils.parametrizations.orthogonal(layer, orthogonal_map="matrix_exp"),
    "spectral norm": nn.utils.parametrizations.spectral_norm,
}


# ±1 weights are no coordinates of an orthogonal matrix or of a norm; they still must step.
@pytest.mark.parametrize("label", PARAMETRIZATIONS)
@every_optimizer
def test_parametrised_layers_train(name: str, label: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(PARAMETRIZATIONS[label](nn.Linear(3, 3).double()), nn.Tanh(), nn.Linear(3, 1)).double()
    opt: Any = OPTIMIZERS[name](model.named_parameters())
    before = weights(model)
    losses = run(opt, Task(model), 9)
    assert all(torch.isfinite(loss) for loss in losses)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)) or "bernoulli" in name
    weight = model[0].weight
    if label == "orthogonal":
        torch.testing.assert_close(weight.T @ weight, torch.eye(3, dtype=weight.dtype), rtol=0, atol=1e-8)
    if is_joint(opt) or name in OVER_A_BASE:
        return
    assert all("parametrizations" in key or key.startswith(("0.bias", "2.")) for key in opt.posterior_states())


# ---- odd closures ------------------------------------------------------------------------------------------


@every_optimizer
def test_a_generator_is_no_closure(name: str) -> None:
    model = network()
    opt, task = OPTIMIZERS[name](model.named_parameters()), Task(model)
    opt.step(task.closure(0))
    before = weights(model)

    def closure() -> Iterator[Tensor]:
        yield task.closure(0)()

    with pytest.raises(TypeError, match="closure: it returned <generator"):
        opt.step(closure)
    assert equal(weights(model), before)


@pytest.mark.parametrize("at", [1, 2])
@every_optimizer
def test_an_interrupt_changes_nothing_anywhere(name: str, at: int) -> None:
    model = network()
    opt: Any = OPTIMIZERS[name](model.named_parameters())
    task = Task(model)
    run(opt, task, 5)
    before, saved, calls = weights(model), copy.deepcopy(opt.state_dict()), 0

    def interrupted() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return task.closure(0)()

    measures = [lambda: opt.refresh([interrupted] * 2), lambda: opt.step([interrupted] * 2)]
    if name in SHELL:
        measures.append(lambda: opt.measure_variance([interrupted] * 2))
    for measure in measures:
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            measure()
        assert equal(weights(model), before) and same(opt.state_dict(), saved)
        assert all(p.grad is None for p in model.parameters())


@every_optimizer
def test_a_step_inside_a_closure_is_refused_or_harmless(name: str) -> None:
    """Whatever it does, weights, posterior and counters must agree afterwards, and training goes on."""
    model = network()
    opt: Any = OPTIMIZERS[name](model.named_parameters())
    task = Task(model)
    run(opt, task, 5)

    def closure() -> Tensor:
        opt.step(task.closure(1))
        return task.closure(0)()

    try:
        opt.step(closure)
    except RuntimeError as error:
        assert "closure" in str(error)
    point = weights(model)
    if name in SHELL:
        with opt.sampled(at_point=True):
            assert equal(weights(model), point)
    assert all(torch.isfinite(loss) for loss in run(opt, task, 3, start=5))


# ---- bases that do not fit ---------------------------------------------------------------------------------


def test_a_base_that_wants_a_closure_is_refused_in_one_sentence() -> None:
    model = network()
    task = Task(model)
    before = weights(model)
    with pytest.raises((TypeError, ValueError), match="base_optimizer"):
        poco.AlphaSVRG(torch.optim.LBFGS(model.parameters())).step(task.closure(0))
    assert equal(weights(model), before) and all(p.grad is None for p in model.parameters())


# ---- copies, hooks, other devices --------------------------------------------------------------------------


class Lines:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if tag.endswith("/steps"):
            self.steps.append((step, value))


@pytest.mark.parametrize("way", ["copied", "pickled"])
@every_optimizer
def test_a_logged_optimizer_can_be_copied(name: str, way: str) -> None:
    """The copy does not write the original's numbers; the original goes on writing its own."""
    model = network()
    opt: Any = OPTIMIZERS[name](model.named_parameters())
    writer = Lines()
    poco.log_diagnostics(opt, writer, every=1)
    run(opt, Task(model), 2)
    twin, other = copy.deepcopy((model, opt)) if way == "copied" else pickle.loads(pickle.dumps((model, opt)))
    run(other, Task(twin), 3, start=2)
    assert writer.steps == [(1, 1), (2, 2)], "the copy wrote"
    run(opt, Task(model), 1, start=2)
    assert writer.steps[2:] == [(3, 3)] and equal(weights(model), weights(model))


@pytest.mark.parametrize("name", SHELL)
def test_measuring_keeps_nothing_of_the_model(name: str) -> None:
    """A pickled optimizer contains its posterior, and no modules."""
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), network()).double()
    opt: Any = SHELL[name](model.named_parameters())
    task = Task(model)
    run(opt, task, 5)
    size = len(pickle.dumps(opt))
    opt.measure_variance(task.chunks())
    assert len(pickle.dumps(opt)) == size
    model[0].hook = lambda: None
    pickle.dumps(opt)


@every_optimizer
def test_an_optimizer_does_not_keep_its_model_alive(name: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), network()).double()
    opt: Any = OPTIMIZERS[name](model.parameters())
    task = Task(model)
    run(opt, task, 3)
    if takes_second_derivatives(opt):
        return  # may keep the closures of its mega-batch
    watched = weakref.ref(model)
    del model, task
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("name", SHELL)
def test_a_model_on_another_device_is_named_with_the_remedy(name: str) -> None:
    model = network()
    opt: Any = SHELL[name](model.named_parameters())
    run(opt, Task(model), 2)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to("meta")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    with pytest.raises(
        RuntimeError, match=r"is on meta but its posterior on cpu.*load_state_dict\(optimizer.state_dict"
    ):
        opt.step(lambda: model(torch.ones(2, 3, dtype=torch.float64, device="meta")).mean())


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_reentrant_checkpointing_works_where_the_closure_calls_backward(name: str) -> None:
    """torch's older form has no gradients by `autograd.grad`; the refusal is torch's own."""
    model = network()
    opt: Any = OPTIMIZERS[name](model.named_parameters())
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def closure() -> Tensor:
        loss = checkpoint(model, x, use_reentrant=True).square().mean()
        loss.backward()
        return loss

    opt.refresh([closure])
    before = flat(model.parameters())
    opt.step(closure)
    assert torch.isfinite(flat(model.parameters())).all()
    assert not torch.equal(flat(model.parameters()), before) or name == "bernoulli-score"
