"""When something goes wrong: one clear sentence, nothing changed, and training goes on as if it had not happened."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizer_cases import (
    OPTIMIZERS,
    SHELL,
    Task,
    differentiates,
    equal,
    is_joint,
    network,
    run,
    same,
    states_of,
    weights,
)  # fmt: skip
from torch import Tensor, nn

import expfam_poco as poco

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_shell = pytest.mark.parametrize("name", SHELL)


def everything(model: nn.Module, opt: Any) -> Any:
    """All weights, gradients and state, copied."""
    saved = {**opt.state_dict(), "state": states_of(opt)}
    return copy.deepcopy([weights(model), [p.grad is None for p in model.parameters()], saved])


def one_sentence(message: str) -> None:
    assert 20 < len(message) < 500 and "\n" not in message and message.rstrip().endswith("."), message


# ---- losses and gradients that are not finite, exceptions --------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """The user's Ctrl-C."""


def nan_loss(model: nn.Module, loss: Tensor) -> Tensor:
    return loss * float("nan")


def inf_loss(model: nn.Module, loss: Tensor) -> Tensor:
    return loss + float("inf")


def nan_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    root = torch.sqrt((0.0 * next(model.parameters())).sum())  # 0, with the derivative 0/0
    return loss + root


def exception(model: nn.Module, loss: Tensor) -> Tensor:
    loss.backward()
    raise RuntimeError("the batch is broken")


def interrupt(model: nn.Module, loss: Tensor) -> Tensor:
    raise Interrupted


FAULTS: dict[str, tuple[Callable[..., Tensor], type[BaseException]]] = {
    "NaN loss": (nan_loss, poco.NonFiniteError),
    "infinite loss": (inf_loss, poco.NonFiniteError),
    "NaN gradient": (nan_gradient, poco.NonFiniteError),
    "exception": (exception, RuntimeError),
    "interrupt": (interrupt, Interrupted),
}


class Spoiled:
    """Closures whose n-th call (counted over all of them) goes wrong."""

    def __init__(self, task: Task, spoil: Callable[..., Tensor], at: int) -> None:
        self.task, self.spoil, self.at, self.calls = task, spoil, at, 0

    def closure(self, batch: int) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            self.calls += 1
            loss = self.task.closure(batch)()
            return self.spoil(self.task.model, loss) if self.calls == self.at else loss

        return evaluate

    def chunks(self) -> list[Callable[[], Tensor]]:
        return [self.closure(batch) for batch in range(4)]


def faults_of(name: str, warm: bool) -> Iterator[tuple[str, int, str]]:
    """Every fault at every call of a step, and at the first and third chunk of a refresh."""
    model = network()
    opt = OPTIMIZERS[name](model.parameters())
    run(opt, Task(model), 6 if warm else 0)
    counting = Spoiled(Task(model), nan_loss, at=0)
    opt.step(counting.closure(0))
    again = Spoiled(Task(model), nan_loss, at=0)  # the first step of all may look at the weights as well
    opt.step(again.closure(0))
    counting.calls = min(counting.calls, again.calls)
    for fault in FAULTS:
        if fault != "NaN gradient" or differentiates(opt):
            yield from (("step", call, fault) for call in sorted({1, 2, counting.calls}) if call <= counting.calls)
            yield from (("refresh", call, fault) for call in (1, 3))


@pytest.mark.parametrize("warm", [False, True], ids=["at-first", "in-an-inner-loop"])
@every_optimizer
def test_a_fault_changes_nothing_and_training_goes_on(name: str, warm: bool) -> None:
    steps = 6 if warm else 0
    model, twin = network(), network()
    opt, untouched = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    task, other = Task(model), Task(twin)
    run(opt, task, steps)
    run(untouched, other, steps)
    before = everything(model, opt)
    for where, call, fault in faults_of(name, warm):
        spoil, kind = FAULTS[fault]
        spoiled = Spoiled(task, spoil, at=call)
        with pytest.raises(kind) as caught:
            opt.step(spoiled.closure(0)) if where == "step" else opt.refresh(spoiled.chunks())
        if kind is poco.NonFiniteError:
            one_sentence(str(caught.value))
            assert "closure" in str(caught.value)
        after = everything(model, opt)
        assert all(after[1]), f"{where}, call {call}, {fault}: gradients left"
        if warm:
            assert same(after, before), f"{where}, call {call}, {fault}"
    assert equal(run(opt, task, 6, start=steps), run(untouched, other, 6, start=steps))
    assert equal(weights(model), weights(twin))


@every_shell
def test_skipping_counts_and_changes_nothing_else(name: str) -> None:
    model = network()
    opt = SHELL[name](model.parameters(), nonfinite="skip")
    task = Task(model)
    run(opt, task, 6)
    before, numbers = everything(model, opt), opt.diagnostics()
    loss = opt.step(Spoiled(task, nan_loss, at=1).closure(0))
    assert not torch.isfinite(loss)
    after = everything(model, opt)
    assert opt.diagnostics()["skipped_steps"] == numbers["skipped_steps"] + 1 == 1
    assert opt.diagnostics()["steps"] == numbers["steps"] + 1
    for record in (before, after):
        del record[2]["poco"]["clock"]
    assert same(before, after)
    with pytest.raises(RuntimeError, match="the batch is broken"):
        opt.step(Spoiled(task, exception, at=1).closure(0))
    with pytest.raises(poco.NonFiniteError):
        opt.refresh(Spoiled(task, nan_loss, at=1).chunks())
    assert all(torch.isfinite(value) for value in run(opt, task, 5, start=6))


@pytest.mark.parametrize("name", ["diagonal-exact", "diagonal-stored", "diagonal-hutchinson", "VONPoCo"])
def test_a_second_derivative_that_is_not_finite_is_refused(name: str) -> None:
    model = network()
    opt = SHELL[name](model.parameters())
    task = Task(model)
    run(opt, task, 5)
    before = everything(model, opt)

    def without_curvature() -> Tensor:
        """|x|^1.5 at 0: a gradient of 0, no second derivative."""
        rough = (0.0 * flat_sum(model)).abs().pow(1.5)
        return task.closure(0)() + rough

    def flat_sum(model: nn.Module) -> Tensor:
        return torch.stack([p.sum() for p in model.parameters()]).sum()

    for attempt in (lambda: opt.step(without_curvature), lambda: opt.refresh([without_curvature])):
        with pytest.raises(poco.NonFiniteError, match="second derivative"):
            attempt()
        assert same(everything(model, opt), before)


@pytest.mark.parametrize("family", ["diagonal_gaussian", "full_gaussian"])
def test_a_plain_step_out_of_the_domain_is_refused(family: str) -> None:
    choices = {"ess": 24.0, "weight_decay": 0.01, "curvature": "exact", "noise": "zero", "seed": 0}
    model = network()
    opt = poco.PosteriorCorrected(model.parameters(), family, lr=0.9, hess_init=0.1, retraction="plain", **choices)
    bend = Task(model)

    def saddle() -> Tensor:
        return bend.closure(0)() - 3.0 * sum(p.square().sum() for p in model.parameters())

    before = everything(model, opt)[0]
    with pytest.raises(ValueError, match=r"retraction='plain'.*out of its domain.*second_order") as caught:
        opt.step(saddle)
    one_sentence(str(caught.value))
    assert not isinstance(caught.value, poco.NonFiniteError)
    assert equal(weights(model), before) and opt.diagnostics()["steps"] == 0
    cured = poco.PosteriorCorrected(model.parameters(), family, lr=0.9, hess_init=0.1, **choices)
    assert torch.isfinite(cured.step(saddle))


def test_no_block_moves_where_a_later_one_leaves_its_domain() -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2, dtype=torch.float64)) for name in ("valley", "saddle")})
    opt = poco.PosteriorCorrected(
        model.parameters(), "diagonal_gaussian", lr=0.5, ess=10.0, weight_decay=0.1, hess_init=1.0, curvature="exact",
        noise="zero", retraction="plain",
    )  # fmt: skip

    def closure(first: float, second: float) -> Callable[[], Tensor]:
        return lambda: first * model["valley"].square().sum() + second * model["saddle"].square().sum()

    opt.step(closure(1.0, 1.0))
    before = everything(model, opt)
    for bends in ((1.0, -9.0), (-9.0, 1.0)):
        with pytest.raises(ValueError, match="out of its domain"):
            opt.step(closure(*bends))
        assert same(everything(model, opt), before)


# ---- closures that are none --------------------------------------------------------------------------------

WRONG_CLOSURES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "no closure": (lambda model: None, r"closure=None: step\(\) evaluates the loss"),
    "not callable": (lambda model: torch.zeros(()), r"closure=tensor.*step\(\) evaluates the loss"),
    "returns nothing": (lambda model: lambda: None, "closure: it returned None"),
    "returns a vector": (lambda model: lambda: model(torch.ones(2, 3, dtype=torch.float64)), "a tensor of shape"),
    "returns a tuple": (lambda model: lambda: (torch.zeros(()), 1), "closure: it returned"),
    "returns a complex": (lambda model: lambda: torch.zeros((), dtype=torch.complex64), "closure: it returned"),
    "returns text": (lambda model: lambda: "0.5", "closure: it returned '0.5'"),
    "has no graph": (lambda model: lambda: torch.tensor(1.0), "closure: its loss has no graph"),
    "returns a number without backward": (lambda model: lambda: 1.0, "closure: its loss has no graph"),
}


@every_optimizer
def test_a_wrong_closure_gets_one_sentence(name: str) -> None:
    model = network()
    opt = OPTIMIZERS[name](model.parameters())
    task = Task(model)
    run(opt, task, 6)
    before = everything(model, opt)
    for label, (make, sentence) in WRONG_CLOSURES.items():
        if "no graph" in sentence and not differentiates(opt):
            continue
        with pytest.raises(TypeError, match=sentence) as caught:
            opt.step(make(model))
        one_sentence(str(caught.value))
        assert same(everything(model, opt), before), label
    with pytest.raises(TypeError, match="closure"):
        opt.step()
    for closures, weights_of_chunks, sentence in (
        ([], None, "closures: give a list of functions"),
        ([None], None, "closures: give a list of functions"),
        (task.chunks(), [1.0], "weights=.*one positive number"),
        (task.chunks(), [1.0, 1.0, 0.0, 1.0], "weights=.*one positive number"),
        (task.chunks(), [1.0, 1.0, float("nan"), 1.0], "weights=.*one positive number"),
    ):
        with pytest.raises(ValueError, match=sentence):
            opt.refresh(closures, weights_of_chunks)
        assert same(everything(model, opt), before)
    assert torch.isfinite(torch.stack(run(opt, task, 3, start=6))).all()


# ---- unusual parameters ------------------------------------------------------------------------------------


class Unusual(nn.Module):
    """A network with an unused, a frozen, an empty, a scalar and a tied parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = network(dtype)
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))
        self.frozen = nn.Parameter(torch.full((3,), 0.7, dtype=dtype), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=dtype))
        self.scale = nn.Parameter(torch.tensor(0.9, dtype=dtype))
        self.tied = self.net[0].weight

    def forward(self, x: Tensor) -> Tensor:
        shift = (x + self.frozen) @ self.tied.T
        return self.scale * self.net(x) + shift.mean(-1, keepdim=True) + self.empty.sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@every_optimizer
def test_unusual_parameters(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Unusual(dtype)
    opt = OPTIMIZERS[name](model.parameters())
    task = Task(model)
    seen: list[Tensor] = []
    closure_of = task.closure

    def closure(batch: int) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            seen.append(model.frozen.detach().clone())
            return closure_of(batch)().float()

        return evaluate

    task.closure = closure
    losses = run(opt, task, 10)
    assert all(torch.isfinite(loss) for loss in losses)
    assert all(torch.equal(value, torch.full((3,), 0.7, dtype=dtype)) for value in seen), "a frozen weight got noise"
    assert torch.equal(model.frozen, torch.full((3,), 0.7, dtype=dtype))
    assert all(p.dtype == dtype and p.grad is None for p in model.parameters())
    assert model.tied is model.net[0].weight and model.scale.item() != 0.9
    if differentiates(opt) and not is_joint(opt):
        with_point = getattr(opt, "posterior_states", None)
        expected = torch.ones(2, dtype=dtype)
        if with_point:
            family, posterior = opt.param_groups[0]["family"], torch.promote_types(torch.float32, dtype)
            expected = family.point(family.centred_at(torch.ones(2, dtype=posterior))).to(dtype)
        assert torch.equal(model.unused, expected), "an unused parameter moved"


@every_optimizer
def test_freezing_and_thawing(name: str) -> None:
    model = network()
    opt = OPTIMIZERS[name](model.parameters())
    task = Task(model)
    run(opt, task, 6)
    if is_joint(opt):
        model[0].weight.requires_grad_(False)
        before = weights(model)
        with pytest.raises(ValueError, match=r"joint over the parameters of 'group0'.*freeze all of them or none"):
            opt.step(task.closure(0))
        assert equal(weights(model), before)
    else:
        model[0].requires_grad_(False)
        before = weights(model[0])
        opt.refresh(task.chunks())
        run(opt, task, 6, start=6)
        assert equal(weights(model[0]), before) and all(p.grad is None for p in model[0].parameters())
    model.requires_grad_(False)
    before = weights(model)
    for attempt in (lambda: opt.step(task.closure(0)), lambda: opt.refresh(task.chunks())):
        with pytest.raises(ValueError, match="params: no parameter requires a gradient") as caught:
            attempt()
        one_sentence(str(caught.value))
    assert equal(weights(model), before)
    model.requires_grad_(True)
    before = everything(model, opt)[2]["state"]
    opt.refresh(task.chunks())
    run(opt, task, 3, start=12)
    after = everything(model, opt)[2]["state"]
    moved = [key for key in before if before[key]]  # of a joint family the first alone has a record
    assert after.keys() == before.keys() and moved and not any(same(before[key], after[key]) for key in moved)


@every_shell
@pytest.mark.parametrize(
    ("parameter", "sentence"),
    [
        (nn.Parameter(torch.ones(2, dtype=torch.complex64)), "params: group0.param0 is complex"),
        (
            nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False),
            "params: group0.param0 has dtype torch.int",
        ),
        (nn.Parameter(torch.eye(2).to_sparse()), "params: group0.param0 has layout torch.sparse_coo"),
    ],
    ids=["complex", "integer", "sparse"],
)
def test_tensors_without_a_posterior_are_refused(name: str, parameter: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        SHELL[name]([parameter])
    one_sentence(str(caught.value))
    opt = SHELL[name]([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=sentence.replace("group0", "group1")):
        opt.add_param_group({"params": [parameter]})
    assert len(opt.param_groups) == 1, "a refused group was added"


def test_small_steps_of_bfloat16_weights_add_up_in_the_float32_posterior() -> None:
    w = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    opt = poco.IVON([w], lr=1e-4, ess=1e6, beta1=0.0, beta2=1.0, weight_decay=0.0, seed=0)
    for _ in range(200):
        opt.step(lambda: w.sum())  # each step moves by 1e-4; the spacing of bfloat16 below 1 is 4e-3
    (state,) = opt.posterior_states().values()
    assert state.mean.dtype == torch.float32
    torch.testing.assert_close(state.mean, torch.full((4,), 0.98), rtol=1e-4, atol=0.0)
    assert torch.equal(w, state.mean.to(torch.bfloat16)) and w.dtype == torch.bfloat16


def test_a_large_effective_sample_size_does_not_overflow_float32() -> None:
    w = nn.Parameter(torch.ones(64))
    opt = poco.IVON([w], lr=0.1, ess=1e12, seed=0)
    for _ in range(20):
        opt.step(lambda: 50.0 * w.sum())
    assert torch.isfinite(w).all()
