"""Parameters that a batch does not use, that are frozen or added later: when a correction applies, and to whom."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import OPTIMIZERS, OVER_A_BASE, SHELL, Task, equal, flat, is_joint, network, run, those, weights
from torch import Tensor, nn

import expfam_poco as poco

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def alike(name: str, steps: int = 6) -> list[tuple[nn.Module, Any, Task]]:
    """The same training twice."""
    found = []
    for _ in range(2):
        model = network()
        opt, task = OPTIMIZERS[name](model.parameters()), Task(model)
        run(opt, task, steps)
        found.append((model, opt, task))
    return found


def set_alpha(opt: Any, alpha: float) -> None:
    for group in opt.param_groups:
        group["alpha"] = alpha
    opt.alpha = alpha


@pytest.mark.parametrize("name", those(lambda opt: not is_joint(opt)))
def test_steps_are_plain_while_q_out_is_of_other_parameters(name: str) -> None:
    """ḡ_out of the whole model is not that of the model with a frozen layer: no correction until a refresh."""
    (model, opt, task), (other, twin, same) = alike(name)
    for net in (model, other):
        net[0].requires_grad_(False)
    set_alpha(twin, 0.0)
    assert equal(run(opt, task, 2, start=6), run(twin, same, 2, start=6)), "frozen since the refresh"
    assert equal(weights(model), weights(other))
    for net, optimizer, problem in ((model, opt, task), (other, twin, same)):
        optimizer.refresh(problem.chunks())
        net[0].requires_grad_(True)
    set_alpha(opt, 1.0)
    assert equal(run(opt, task, 2, start=9), run(twin, same, 2, start=9)), "thawed since the refresh"
    assert equal(weights(model), weights(other))
    for optimizer, problem in ((opt, task), (twin, same)):
        optimizer.refresh(problem.chunks())
    calls: list[int] = []

    def counting() -> Tensor:
        calls.append(1)
        return task.closure(0)()

    opt.step(counting)
    assert len(calls) == 2 * draws_of(opt), "the refresh brought the correction back"


def draws_of(opt: Any) -> int:
    """Evaluations of an uncorrected step."""
    draws = getattr(opt, "mc_samples", 1) * (2 if getattr(opt, "noise", "") == "antithetic" else 1)
    varied = [g for g in opt.param_groups if getattr(g.get("curvature"), "needs", "") == "variations"]
    return draws * (1 + sum(p.numel() for g in varied for p in g["params"]))


@pytest.mark.parametrize("name", ["SVRG", *OVER_A_BASE])
def test_the_correction_is_unbiased_where_a_batch_does_not_use_a_parameter(name: str) -> None:
    """A batch that leaves an embedding alone has gradient 0 for it, and still moves it by the mega-batch's mean."""
    rows = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)])
    never = nn.Parameter(torch.ones(2, dtype=torch.float64))
    directions = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]], dtype=torch.float64)

    def closure(i: int) -> Callable[[], Tensor]:
        return lambda: (directions[i] * rows[i]).sum()

    if name == "SVRG":
        opt: Any = poco.SVRG([*rows, never], lr=0.1, weight_decay=0.3)
    else:
        opt = poco.AlphaSVRG(torch.optim.SGD([*rows, never], lr=0.1, weight_decay=0.3))
    opt.refresh([closure(i) for i in range(3)])
    expected = [row.detach().clone() for row in rows]
    for i in (0, 2, 1, 1):
        opt.step(closure(i))
        # g_in − g_out + ḡ is ḡ for every row: the losses are linear
        expected = [row - 0.1 * (directions[j] / 3 + 0.3 * row) for j, row in enumerate(expected)]
        torch.testing.assert_close(torch.stack(list(rows)), torch.stack(expected), rtol=1e-13, atol=1e-14)
    assert torch.equal(never, torch.ones(2, dtype=torch.float64)), "not in any batch, so no decay either"


@every_optimizer
def test_a_group_added_after_a_refresh_makes_steps_plain_until_the_next(name: str) -> None:
    results = []
    for alpha in (None, 0.0):
        model = network()
        opt, task = OPTIMIZERS[name](model[0].parameters()), Task(model)
        run(opt, task, 6)
        if alpha is not None:
            set_alpha(opt, alpha)
        opt.add_param_group({"params": list(model[3].parameters()), **({} if alpha is None else added(opt, alpha))})
        results.append([*run(opt, task, 2, start=6), *weights(model)])
    assert equal(*results)


def added(opt: Any, alpha: float) -> dict[str, Any]:
    return {"alpha": alpha} if "family" in opt.param_groups[0] else {}


@every_optimizer
def test_a_copy_of_a_scheduled_optimizer_steps_itself(name: str) -> None:
    """Schedulers wrap `step` on the instance; a copy must not step the original through it."""
    (model, opt, task), _ = alike(name)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 5)
    opt.step(task.closure(0))
    scheduler.step()
    twin, copied = copy.deepcopy((model, opt))
    before = weights(model)
    copied.step(Task(twin).closure(1))
    assert equal(weights(model), before)
    opt.step(task.closure(1))
    assert equal(weights(twin), weights(model))


@pytest.mark.parametrize("name", SHELL)
def test_two_optimizers_on_one_model_notice_each_other(name: str) -> None:
    """What the second one writes is the mean from which the first goes on."""
    model = network()
    first: Any = SHELL[name](model.parameters())
    task = Task(model)
    run(first, task, 3)
    second = torch.optim.SGD(model.parameters(), lr=0.05)
    task.closure(0)().backward()
    second.step()
    second.zero_grad()
    moved = flat(model.parameters())
    states = first.posterior_states().values()
    family = first.param_groups[0]["family"]
    points = torch.cat([family.point(state).reshape(-1) for state in states])
    legal = points.abs().eq(1.0).all()  # a mode can only be ±1
    torch.testing.assert_close(points, moved.sign() if legal else moved, rtol=1e-14, atol=1e-14)
    assert torch.isfinite(first.step(task.closure(1)))


@pytest.mark.parametrize("name", SHELL)
def test_gradients_that_the_user_keeps_are_not_touched_by_looking(name: str) -> None:
    (model, opt, task), _ = alike(name)
    with opt.sampled(seed=0):
        task.closure(0)().backward()
    kept = [p.grad for p in model.parameters()]
    with opt.sampled(seed=1):
        pass
    poco.predict(model, opt, torch.ones(2, 3, dtype=torch.float64), samples=2)
    opt.diagnostics()
    assert all(p.grad is g and g is not None for p, g in zip(model.parameters(), kept, strict=True))
