"""Micro-batches: a list of closures is one batch, and with fresh noise it is as many draws."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backend_cases import FLAT, Wells, distance, model_of, numbers
from optimizer_cases import (
    OPTIMIZERS,
    SHELL,
    Make,
    Task,
    differentiates,
    flat,
    is_joint,
    network,
    same,
    states_of,
    takes_second_derivatives,
    those,
    weights,
)
from torch import Tensor, nn

import expfam_poco as poco

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
CUTS = (slice(0, 2), slice(2, 13), slice(13, 24))
SIZES = [2, 11, 11]


class Parts(Task):
    """The regression task, cut anywhere."""

    def of(self, rows: slice, calls_backward: bool = False) -> Callable[[], Any]:
        x, y = torch.cat(self.x)[rows], torch.cat(self.y)[rows]

        def closure() -> Any:
            loss = 0.5 * (self.model(x) - y).square().mean()
            if not calls_backward:
                return loss
            loss.backward()
            return loss.item()

        return closure


def state(model: nn.Module, opt: Any) -> Tensor:
    """Weights, and all tensors of the optimizer's state."""
    values: list[Tensor] = []

    def collect(thing: Any) -> None:
        if isinstance(thing, Tensor):
            values.append(thing.double().nan_to_num(nan=torch.nan, posinf=1e9))  # infinities hold places
        elif isinstance(thing, dict):
            for key in thing:
                collect(thing[key])
        elif isinstance(thing, list | tuple):
            for value in thing:
                collect(value)

    collect(states_of(opt))
    return flat([*weights(model), *values])


def trained(name: str, corrected: bool, step: Callable[[Any, Parts], Any], **choices: Any) -> tuple[Tensor, Tensor]:
    model = network()
    opt: Any = OPTIMIZERS[name](model.named_parameters(), **choices)
    task, losses = Parts(model), []
    for number in range(6):
        if corrected and number % 3 == 0:
            opt.refresh([task.of(slice(0, 24))])
        losses.append(step(opt, task))
    return state(model, opt), torch.stack(losses).double()


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@every_optimizer
def test_micro_batches_equal_one_batch(name: str, corrected: bool) -> None:
    whole = trained(name, corrected, lambda opt, task: opt.step(task.of(slice(0, 24))))
    parts = trained(name, corrected, lambda opt, task: opt.step([task.of(cut) for cut in CUTS], weights=SIZES))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    unweighted = trained(name, corrected, lambda opt, task: opt.step([task.of(cut) for cut in CUTS]))
    assert max(float((a - b).abs().max()) for a, b in zip(unweighted, whole, strict=True)) > 1e-6


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("name", those(lambda opt: not takes_second_derivatives(opt)))
def test_some_micro_batches_may_call_backward_themselves(name: str, corrected: bool) -> None:
    whole = trained(name, corrected, lambda opt, task: opt.step(task.of(slice(0, 24))))

    def step(opt: Any, task: Parts) -> Any:
        return opt.step([task.of(cut, number != 1) for number, cut in enumerate(CUTS)], weights=SIZES)

    parts = trained(name, corrected, step)
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-6, atol=0.0)  # .item() came back in float32
    if differentiates(OPTIMIZERS[name](network().parameters())):
        torch.testing.assert_close(whole[0], parts[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", those(takes_second_derivatives))
def test_second_derivatives_refuse_a_micro_batch_that_calls_backward(name: str) -> None:
    model = network()
    opt: Any = SHELL[name](model.named_parameters())
    task = Parts(model)
    opt.refresh(task.chunks())
    before = weights(model)
    with pytest.raises(TypeError, match="return the loss without calling backward"):
        opt.step([task.of(CUTS[0]), task.of(CUTS[1], calls_backward=True)])
    assert same(weights(model), before)


# ---- fresh noise -------------------------------------------------------------------------------------------

# The score estimator's baseline is the mean of the other draws of one evaluation, which single draws have not.
LINEAR = [name for name in SHELL if name != "bernoulli-score"]


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("name", LINEAR)
def test_fresh_noise_with_equal_closures_is_that_many_draws(name: str, draws: int, corrected: bool) -> None:
    shared = {"noise": "shared"} if name == "VSGDPoCo" else {}  # a fixed draw stays one draw

    def fresh(opt: Any, task: Parts) -> Any:
        return opt.step([task.of(CUTS[1])] * 3, fresh_noise=True)

    def several(opt: Any, task: Parts) -> Any:
        return opt.step(task.of(CUTS[1]))

    def run(step: Any, count: int) -> tuple[Tensor, Tensor]:
        model = network()
        opt: Any = SHELL[name](model.named_parameters(), mc_samples=draws, **shared)
        task, losses = Parts(model), []
        for number in range(6):
            opt.mc_samples = draws  # the refreshes of both are the same
            if corrected and number % 3 == 0:
                opt.refresh([task.of(slice(0, 24))])
            opt.mc_samples = count
            losses.append(step(opt, task))
        return state(model, opt), torch.stack(losses)

    for one, other in zip(run(fresh, draws), run(several, 3 * draws), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def one_evaluation_a_draw(opt: Any) -> bool:
    """Neither pairs ±ε nor variations of a draw."""
    estimators = [group["curvature"] for group in opt.param_groups]
    return not any(estimator.antithetic or estimator.needs == "variations" for estimator in estimators)


@pytest.mark.parametrize("name", those(one_evaluation_a_draw, SHELL))
def test_fresh_noise_draws_anew_for_every_micro_batch(name: str) -> None:
    model = network()
    opt: Any = SHELL[name](model.named_parameters(), noise="shared")
    task, seen = Parts(model), []

    def watched(cut: slice) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            seen.append(flat(model.parameters()))
            return task.of(cut)()

        return closure

    opt.step(task.of(CUTS[0]))  # the first one may look at the weights as well
    opt.step([watched(cut) for cut in CUTS], weights=SIZES)
    once = opt.mc_samples
    assert len(seen) == 3 * once and len({tuple(s.tolist()) for s in seen}) in (1, once)
    if name == "SVRG":
        return
    seen.clear()
    opt.step([watched(cut) for cut in CUTS], weights=SIZES, fresh_noise=True)
    assert len({tuple(s.tolist()) for s in seen}) == 3 * once


# ---- span by span ------------------------------------------------------------------------------------------

STREAMED: dict[str, Make] = {
    name: SHELL[name] for name in ("VSGDPoCo", "IVONPoCoMo", "diagonal-gradsq", "bernoulli-relaxed", "bernoulli-score")
}
for_streams = pytest.mark.parametrize("name", STREAMED)


class Halves(Wells):
    """Wells in parts: the mean of the parts is the whole."""

    def batch(self) -> list[Callable[[], Tensor]]:
        return [self.closure(number) for number in range(3)]

    def mean(self) -> Callable[[], Tensor]:
        parts = self.batch()
        return lambda: torch.stack([part() for part in parts]).mean()


def streamed(name: str, backend: str, step: Callable[[Any, Halves], Any], corrected: bool, **more: Any) -> Any:
    model = model_of()
    opt: Any = STREAMED[name](model.named_parameters(), backend=backend, **more)
    task = Halves(model)
    for number in range(6):
        if corrected and number % 3 == 0:
            opt.refresh(task.chunks())
        step(opt, task)
    return numbers(model, opt)


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@for_streams
def test_streamed_micro_batches_equal_one_batch_and_whole_tensors(name: str, corrected: bool) -> None:
    whole = streamed(name, "auto", lambda opt, task: opt.step(task.mean()), corrected)
    for step in (lambda opt, task: opt.step(task.mean()), lambda opt, task: opt.step(task.batch(), weights=[2, 2, 2])):
        assert distance(streamed(name, "eager", step, corrected), whole) < 1e-10
    one_pass = streamed(name, "eager", lambda opt, task: opt.step(task.batch()), corrected, one_pass=True)
    assert distance({k: v for k, v in one_pass.items() if k != "weights"},
                    {k: v for k, v in whole.items() if k != "weights"}) < 1e-10  # fmt: skip


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@for_streams
def test_streamed_fresh_noise_equals_whole_tensors(name: str, corrected: bool) -> None:
    def step(opt: Any, task: Halves) -> Any:
        return opt.step(task.batch(), weights=[1, 2, 3], fresh_noise=True)

    whole = streamed(name, "auto", step, corrected)
    assert distance(streamed(name, "eager", step, corrected), whole) < 1e-10
    antithetic = {"noise": "antithetic"} if not name.startswith("bernoulli") else {}
    whole = streamed(name, "auto", step, corrected, **antithetic)
    assert distance(streamed(name, "eager", step, corrected, **antithetic), whole) < 1e-10


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("name", ["VSGDPoCo", "IVONPoCoMo", "diagonal-gradsq", "bernoulli-relaxed"])
def test_streamed_fresh_noise_with_equal_closures_is_that_many_draws(name: str, corrected: bool) -> None:
    found = []
    for fresh in (True, False):
        model = model_of(FLAT)
        opt: Any = STREAMED[name](model.named_parameters(), backend="eager", noise="shared")
        task = Halves(model)
        for number in range(6):
            opt.mc_samples = 1
            if corrected and number % 3 == 0:
                opt.refresh(task.chunks())
            opt.mc_samples = 1 if fresh else 3
            opt.step([task.closure(1)] * 3, fresh_noise=True) if fresh else opt.step(task.closure(1))
        found.append(numbers(model, opt))
    assert distance(*found) < 1e-10


# ---- micro-batches that do not use everything --------------------------------------------------------------


@pytest.mark.parametrize("fresh", [False, True], ids=["one-noise", "fresh-noise"])
@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_parameter_that_one_micro_batch_uses_is_used(backend: str, corrected: bool, fresh: bool) -> None:
    """Whichever of the micro-batches it is; one that none of them uses is not moved by a plain step."""
    found = []
    for order in ((0, 1, 2), (2, 1, 0)):
        model = model_of()
        opt = poco.SVRG(model.named_parameters(), lr=0.1, weight_decay=0.01, backend=backend)
        task = Wells(model)

        def part(names: set[str], batch: int, task: Wells = task) -> Callable[[], Tensor]:
            inner = task.closure(batch)

            def closure() -> Tensor:
                task.skip = names
                return inner()

            return closure

        parts = [part({"long", "one", "kernel"}, 0), part({"matrix", "one"}, 1), part({"one", "scalar"}, 2)]
        start = model["one"].detach().clone()
        for _ in range(3):
            if corrected:
                opt.refresh(parts[:2])
            opt.step([parts[i] for i in order], weights=[[1, 2, 3][i] for i in order], fresh_noise=fresh)
        assert torch.equal(model["one"], start)
        found.append(numbers(model, opt))
    assert distance(*found) < 1e-10


class Unusual(nn.Module):
    """A network with a tied, an empty, a scalar, a frozen and an unused parameter, and one of another dtype."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        dtype = torch.float64
        self.net = network()
        self.tied = self.net[0].weight
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=dtype))
        self.scale = nn.Parameter(torch.tensor(0.9, dtype=dtype))
        self.frozen = nn.Parameter(torch.full((3,), 0.7, dtype=dtype), requires_grad=joint)
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))
        self.single = nn.Parameter(torch.ones(3, dtype=dtype if joint else torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        shift = (x + self.frozen) @ self.tied.T
        return self.scale * self.net(x * self.single.double()) + shift.mean(-1, keepdim=True) + self.empty.sum()


@every_optimizer
def test_unusual_parameters_with_micro_batches(name: str) -> None:
    found = []
    for accumulate in (False, True):
        torch.manual_seed(0)
        model = Unusual(is_joint(OPTIMIZERS[name](network().parameters())))
        opt: Any = OPTIMIZERS[name](model.parameters())
        task = Parts(model)
        for number in range(4):
            if number % 2 == 0:
                opt.refresh(task.chunks())
            if accumulate:
                opt.step([task.of(cut) for cut in CUTS], weights=SIZES)
            else:
                opt.step(task.of(slice(0, 24)))
        found.append(flat(p.double() for p in model.parameters()))
    # The one tensor of float32 rounds its gradients, and the others follow it.
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# ---- lists that are none -----------------------------------------------------------------------------------


@every_optimizer
def test_bad_lists_get_one_sentence_and_change_nothing(name: str) -> None:
    model = network()
    opt: Any = OPTIMIZERS[name](model.named_parameters())
    task = Parts(model)
    opt.refresh(task.chunks())
    opt.step(task.closure(0))
    good, before, saved = task.chunks(), weights(model), opt.state_dict()
    batched = poco.PerExample(model, nn.functional.mse_loss, task.x[0], task.y[0])
    cases: list[tuple[Any, Any, str]] = [
        ([], None, "closures: give a list of functions"),
        ([None], None, "closures: give a list of functions"),
        ([good], None, "closures: give a list of functions"),
        ([good[0], torch.zeros(())], None, "closures: give a list of functions"),
        ({}, None, "closure={}"),
        (iter(good), None, "closure=.*with a list of such functions"),
        (good, [1.0], "weights=.*one positive number"),
        (good, [1.0, 1.0, 1.0, -1.0], "weights=.*one positive number"),
        (good, [1.0, 1.0, 1.0, float("inf")], "weights=.*one positive number"),
        (good, [1.0, 1.0, 1.0, float("nan")], "weights=.*one positive number"),
        (good, 4, "weights=4"),
        (good, ["a", "b", "c", "d"], "weights=.*one positive number"),
        (good[0], [1.0], "weights: they are for a list of closures"),
        ([good[0], batched], None, "PerExample can be neither accumulated nor scaled"),
    ]
    wrong = []
    for closures, sizes, sentence in cases:
        try:
            opt.step(closures, weights=sizes)
        except (ValueError, TypeError) as error:
            if not re.search(sentence, str(error)):
                wrong.append((sentence, str(error)))
        else:
            wrong.append((sentence, "accepted"))
        assert same(weights(model), before) and same(opt.state_dict(), saved)
    assert not wrong


def test_weights_may_be_anything_that_counts() -> None:
    """Integers, floats, a tensor, an array: shares are what matters."""
    found = []
    for sizes in ([2, 11, 11], [0.2, 1.1, 1.1], torch.tensor([2, 11, 11]), torch.tensor([2.0, 11.0, 11.0]).numpy()):
        model = network()
        opt, task = poco.SVRG(model.parameters(), lr=0.1), Parts(model)
        opt.step([task.of(cut) for cut in CUTS], weights=sizes)
        found.append(flat(model.parameters()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)
