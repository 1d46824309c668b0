"""Steps as torch has them, for every optimizer: hooks, closures, schedulers."""

import copy
from typing import Any

import pytest
import torch
from optimizer_cases import OVER_A_BASE, Task, differentiates, equal, takes_second_derivatives, those, weights
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peers.habits import EVERY, closure_of, train, trained

every = pytest.mark.parametrize("name", EVERY)


@every
def test_hooks_of_all_optimizers_run_once_a_step(name: str) -> None:
    _, opt, task = trained(name)
    seen: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda own, *given: seen.append(("before", own))),
        register_optimizer_step_post_hook(lambda own, *given: seen.append(("after", own))),
    ]
    try:
        opt.step(closure_of(opt, task, 0))
        assert seen == [("before", opt), ("after", opt)]

        def broken() -> Any:
            raise KeyError("broken")

        with pytest.raises(KeyError):
            opt.step(broken)
        opt.step(closure_of(opt, task, 1))
        assert seen[2:] == [("before", opt), ("before", opt), ("after", opt)]
    finally:
        for handle in handles:
            handle.remove()


@every
def test_its_own_hooks_run_around_every_step_and_may_change_the_closure(name: str) -> None:
    model, opt, task = trained(name)
    twin, other, same_task = trained(name)
    seen: list[str] = []
    first, second = closure_of(opt, task, 0), closure_of(other, same_task, 1)
    opt.register_step_pre_hook(lambda own, args, kwargs: ((own, closure_of(own, task, 1)), kwargs))
    opt.register_step_post_hook(lambda *given: seen.append("after"))
    assert torch.equal(opt.step(first), other.step(second)) and seen == ["after"]
    assert equal(weights(model), weights(twin))
    twin, copied = copy.deepcopy((model, opt))
    copied.step(closure_of(copied, Task(twin), 2))
    assert seen == ["after"], "hooks belong to the original"


@pytest.mark.parametrize("name", OVER_A_BASE)
def test_hooks_of_the_base_run_around_the_base_s_step(name: str) -> None:
    _, opt, task = trained(name)
    seen: list[Any] = []
    opt.base.register_step_pre_hook(lambda own, *given: seen.append(own))
    opt.step(task.closure(0))
    assert seen == [opt.base]


steppable = those(lambda opt: not takes_second_derivatives(opt) and differentiates(opt), EVERY)


@pytest.mark.parametrize("name", steppable)
def test_a_closure_may_differentiate_itself_and_return_a_float(name: str) -> None:
    model, opt, task = trained(name)
    twin, other, same_task = trained(name)

    def closure() -> float:
        opt.zero_grad()
        loss = task.closure(0)()
        loss.backward()
        return loss.item()

    found = opt.step(closure)
    expected = other.step(closure_of(other, same_task, 0))
    assert float(found) == pytest.approx(expected.item(), rel=1e-6)
    assert equal(weights(model), weights(twin))


SCHEDULES: dict[str, Any] = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.9**step),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-3, 2e-3, cycle_momentum=False),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=9, cycle_momentum=False),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
}


@every
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers_set_rates_and_resume(name: str, schedule: str) -> None:
    model, opt, task = trained(name, 1)
    scheduler = SCHEDULES[schedule](opt)
    rates = []
    for step in range(6):
        if step == 3:  # into another optimizer, which goes on with the rates of this one
            saved = copy.deepcopy([model.state_dict(), opt.state_dict(), scheduler.state_dict()])
            model, opt, task = trained(name, 0)
            scheduler = SCHEDULES[schedule](opt)
            for part, state in zip((model, opt, scheduler), saved, strict=True):
                part.load_state_dict(state)
        opt.step(closure_of(opt, task, step))
        scheduler.step()
        rates.append(float(opt.param_groups[0]["lr"]))
    assert len(set(rates)) > 1 and all(bool(torch.isfinite(w).all()) for w in weights(model))
    _, whole, task = trained(name, 1)
    scheduler, undisturbed = SCHEDULES[schedule](whole), []
    for step in range(6):
        whole.step(closure_of(whole, task, step))
        scheduler.step()
        undisturbed.append(float(whole.param_groups[0]["lr"]))
    assert rates == undisturbed


@every
def test_a_plateau_lowers_the_rate(name: str) -> None:
    _, opt, task = trained(name, 2)
    rate = opt.param_groups[0]["lr"]
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)
    for _ in range(3):
        scheduler.step(1.0)
    train(opt, task, 1)
    assert opt.param_groups[0]["lr"] == pytest.approx(rate * 0.25)
