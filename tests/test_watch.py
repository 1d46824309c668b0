"""Where the host does not wait for the device: what is not finite changes nothing, and the error comes a step later.

A CPU that is taken for such a device shows it; its values are at hand, but nobody looks at them.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backend_cases import FLAT, model_of, trained
from optimizer_cases import Make, equal, named, run, same, shell, weights
from torch import Tensor

import expfam_poco as poco
from expfam_poco.family import transfer

IVON = {"lr": 0.1, "ess": 100.0, "beta2": 0.99}
CASES: dict[str, Make] = {
    "IVON": named(poco.IVON, **IVON),
    "IVON-3": named(poco.IVON, mc_samples=3, **IVON),
    "IVONPoCoMo": named(poco.IVONPoCoMo, alpha=0.7, **IVON),
    "clipping": named(poco.IVONPoCo, max_grad_norm=1.0, **IVON),
    "Bernoulli": shell("bernoulli", lr=0.001, ess=24.0, momentum=0.5),
    "straight-through": shell("bernoulli", lr=0.001, ess=24.0, curvature="straight_through"),
}
FAULTS: dict[str, Callable[[Any], Tensor]] = {
    "NaN loss": lambda model: model["long"].sum() * torch.nan,
    "infinite loss": lambda model: torch.tensor(torch.inf, dtype=torch.float64),
    "NaN gradient": lambda model: torch.sqrt((0.0 * model["long"]).sum()),
}


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "AHEAD", ("cpu", "meta"))


def posteriors(opt: Any) -> Any:
    return copy.deepcopy(opt.posterior_states())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", CASES)
def test_a_fault_changes_nothing_and_is_told_at_the_next_step(case: str, fault: str) -> None:
    model, opt, task = trained(CASES[case], 6, FLAT, backend="eager")
    before, held = posteriors(opt), [w.clone() for w in weights(model)]
    loss = opt.step(lambda: task.closure(0)() + FAULTS[fault](model))
    assert bool(torch.isfinite(loss)) == (fault == "NaN gradient")
    spoiled = ("long",) if fault == "NaN gradient" else FLAT
    assert all(same(posteriors(opt)[name], before[name]) for name in spoiled)
    if fault != "NaN gradient":
        assert equal(weights(model), held)
    with pytest.raises(poco.NonFiniteError, match=r"^step 7: lr=.* 700 of 700 weights of 'long' .*\.$"):
        opt.step(task.closure(1))
    assert not same(posteriors(opt), before)
    assert all(bool(torch.isfinite(value)) for value in run(opt, task, 4, start=8))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", CASES)
def test_a_small_model_is_all_or_nothing(case: str, fault: str) -> None:
    """Without a look at it. (The tensors lie side by side, but "kernel" alone, as it has channels last.)"""
    model, opt, task = trained(CASES[case], 6, (*FLAT, "kernel", "scalar"))
    before, held = posteriors(opt), weights(model)
    opt.step(lambda: task.closure(0)() + FAULTS[fault](model))
    assert same(posteriors(opt), before) and equal(weights(model), held)
    told = r"^step 7: lr=.* infinite or NaN for \d+ of \d+ weights of '\w+'; all weights kept their values\."
    with pytest.raises(poco.NonFiniteError, match=told):
        opt.step(task.closure(1))
    assert not any(same(posteriors(opt)[name], state) for name, state in before.items())
    assert all(bool(torch.isfinite(value)) for value in run(opt, task, 4, start=8))


def test_micro_batches_of_a_small_model_are_all_looked_at() -> None:
    """Clipping makes an infinite gradient finite, but not the step it is a part of."""
    model, opt, task = trained(shell("isotropic_gaussian", lr=0.01, ess=5.0, clip_radius=0.1), 4, FLAT)
    held = weights(model)
    bad = [lambda: task.closure(0)() + 1e400 * model["long"].sum(), task.closure(1)]
    opt.step(bad, fresh_noise=True)
    assert equal(weights(model), held)
    with pytest.raises(poco.NonFiniteError, match=r"^step 5: .* all weights kept their values\."):
        opt.step(task.closure(0))


def test_a_gradient_that_is_not_finite_stops_its_weight_alone() -> None:
    model, opt, task = trained(CASES["IVON"], 4, FLAT, backend="eager")
    before = posteriors(opt)

    def closure() -> Tensor:
        return task.closure(0)() + torch.sqrt(0.0 * model["matrix"].view(-1)[7])

    opt.step(closure)
    now = posteriors(opt)
    moved = (now["matrix"].mean != before["matrix"].mean).view(-1)
    assert not bool(moved[7]) and int(moved.sum()) == 599
    with pytest.raises(poco.NonFiniteError, match=r"^step 5: .* 1 of 600 weights of 'matrix'"):
        opt.refresh([task.closure(0)])
    opt.refresh([task.closure(0)])


def test_skipped_steps_are_counted_when_asked() -> None:
    model, opt, task = trained(CASES["IVON"], 4, FLAT, backend="eager", nonfinite="skip")
    opt.step(lambda: task.closure(0)() * torch.nan)
    assert opt.diagnostics()["skipped_steps"] == 1
    opt.step(task.closure(0))
    assert opt.diagnostics()["skipped_steps"] == 1 and all(bool(p.isfinite().all()) for p in model.parameters())


def test_asking_for_diagnostics_does_not_forget_the_error() -> None:
    _, opt, task = trained(CASES["IVON"], 4, FLAT, backend="eager")
    opt.step(lambda: task.closure(0)() * torch.nan)
    opt.diagnostics()
    opt.state_dict()
    with pytest.raises(poco.NonFiniteError, match=r"^step 5: "):
        opt.step(task.closure(0))
    opt.step(task.closure(0))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_what_keeps_no_posterior(backend: str, nonfinite: str) -> None:
    """VSGD is all or nothing, but for a large model whose weights may move apart."""
    model = model_of(FLAT)
    opt = poco.VSGD(model.parameters(), lr=0.1, backend=backend, nonfinite=nonfinite)

    def step(grad: float = 1.0) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        next(model.parameters()).grad.view(-1)[3] = grad
        opt.step()

    step()
    before = weights(model)
    step(torch.nan)
    moved = torch.cat([(a != b).view(-1) for a, b in zip(before, weights(model), strict=True)])
    alone = backend == "eager" and nonfinite == "raise"
    assert int(moved.sum()) == (1299 if alone else 0)
    if nonfinite == "skip":
        assert opt.diagnostics()["skipped_steps"] == 1
        step()
        assert opt.diagnostics()["skipped_steps"] == 1
    else:
        opt.state_dict()  # which looks, and forgets nothing
        with pytest.raises(poco.NonFiniteError, match=rf"^step 2: params: the step of {1 if alone else 1300} weights"):
            step()
    step()
    assert opt.diagnostics()["steps"] == 4 and all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_else_is_different(monkeypatch: pytest.MonkeyPatch, case: str, backend: str) -> None:
    model, opt, _ = trained(CASES[case], 12, FLAT, backend=backend)
    monkeypatch.undo()
    twin, other, _ = trained(CASES[case], 12, FLAT, backend=backend)
    assert equal(weights(model), weights(twin)) and same(posteriors(opt), posteriors(other))
    assert opt.diagnostics() == other.diagnostics()
