"""The learning-rate finder and the suggestion of ess: what they find, and that nothing is changed."""

import builtins
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_cases import OPTIMIZERS, Task, network, run, same, weights
from torch import nn

import expfam_poco as poco
from expfam_poco.tools.tuning import _steepest


@pytest.mark.parametrize("used", [0, 3], ids=["fresh", "used"])
@pytest.mark.parametrize("name", ["IVONPoCoMo", "SVRG", "BayesBiNN", "VON", "AlphaSVRG-AdamW"])
def test_training_goes_on_as_if_nobody_had_looked(name: str, used: int) -> None:
    results = []
    for look in (False, True):
        model = nn.Sequential(nn.BatchNorm1d(3), *network(dropout=0.2)).double()
        optimizer, task = OPTIMIZERS[name](model.parameters()), Task(model)
        torch.manual_seed(0)
        run(optimizer, task, used)
        if look:
            model[0].eval()
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            found = poco.find_lr(model, optimizer, task.chunks(), steps=30)
            assert found.lr in found.rates and len(found.rates) == len(found.losses) == len(found.smoothed)
            assert same((model.state_dict(), optimizer.state_dict()), before)
            assert not model[0].training and model[1].training
            poco.suggest_ess(model, task.closure(0))
            assert same((model.state_dict(), optimizer.state_dict()), before)
            model.train()
        results.append([*run(optimizer, task, 3, start=used), *weights(model), *model.buffers()])
    assert same(results[0], results[1])


def test_the_found_rate_trains_and_one_ten_times_larger_does_not_do_better(tmp_path: Path) -> None:
    def loss_after(rate: float) -> float:
        model = network()
        optimizer, task = poco.SVRG(model.parameters(), lr=rate), Task(model)
        run(optimizer, task, 40)
        return sum(float(closure().detach()) for closure in task.chunks()) / 4

    model = network()
    start = sum(float(closure().detach()) for closure in Task(model).chunks()) / 4
    found = poco.find_lr(model, poco.SVRG(model.parameters(), lr=0.1), Task(model).chunks(), plot=tmp_path / "lr.png")
    assert (tmp_path / "lr.png").read_bytes()[:4] == b"\x89PNG"
    assert loss_after(found.lr) < 0.2 * start
    assert loss_after(found.lr) < 1.5 * loss_after(found.lr / 30) and not loss_after(found.lr * 30) < loss_after(
        found.lr
    )


def test_groups_keep_their_ratios_and_tensors_are_filled() -> None:
    model = network()
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": torch.tensor(0.02)}, {"params": rest, "lr": 0.01}]
    optimizer, seen = torch.optim.SGD(groups, lr=0.1), []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = Task(model).closure(0)()
        loss.backward()
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        return loss

    poco.find_lr(model, optimizer, [closure], steps=20)
    assert all(rates[0] == pytest.approx(2.0 * rates[1], rel=1e-5) for rates in seen)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.02, 0.01])
    assert all(p.grad is None for p in model.parameters())


def test_the_steepest_descent_lies_before_the_minimum() -> None:
    assert _steepest([1e-3, 1e-2, 1e-1, 1.0, 10.0], [1.0, 0.98, 0.6, 0.2, 4.0]) in (1e-2, 1e-1, 1.0)
    with pytest.raises(ValueError, match="never falls"):
        _steepest([1e-3, 1e-2, 1e-1], [1.0, 2.0, 3.0])


def test_ess_follows_the_curvature() -> None:
    # ℓ = 1 + ½ c |w|² at w = 0: the mean over draws is 1 + ½ c d σ², so ess ≥ ½ c d / (0.11 (h + δ)).
    weight = nn.Parameter(torch.zeros(1000))
    model = nn.ParameterList([weight])
    for curvature in (1.0, 100.0):
        ess = poco.suggest_ess(model, lambda c=curvature: 1.0 + 0.5 * c * weight.square().sum(), hess_init=0.5)
        least = 0.5 * curvature * 1000 / (0.11 * 0.5001)
        assert least * 0.9 < ess < least * 10**0.5 * 1.1
    assert torch.equal(weight, torch.zeros(1000)) and weight.grad is None


def test_a_closure_that_differentiates_itself_is_borne() -> None:
    model = network()
    loss = Task(model).closure(0)

    def closure() -> torch.Tensor:
        value = loss()
        value.backward()
        return value

    assert poco.suggest_ess(model, closure) == poco.suggest_ess(model, loss)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("choices", "message"),
    [({"lowest": 1.0, "highest": 0.1}, "lowest=1.0, highest=0.1: "), ({"steps": 3}, "steps=3: "), ({}, "closures")],
)
def test_find_lr_names_bad_arguments(choices: dict[str, Any], message: str) -> None:
    model = network()
    closures = Task(model).chunks() if choices else []
    with pytest.raises(ValueError, match=message):
        poco.find_lr(model, poco.SVRG(model.parameters(), lr=0.1), closures, **choices)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"tolerance": -1.0}, "tolerance=-1.0: "),
        ({"samples": 0}, "samples=0: "),
        ({"most": 0.5}, "most=0.5: "),
        ({"most": 1.0, "tolerance": 0.0, "absolute": 1e-9}, "most=1: even there"),
        ({"hess_init": -1.0}, "hess_init=-1.0"),
    ],
)
def test_suggest_ess_names_bad_arguments(choices: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        poco.suggest_ess(model, Task(model).closure(0), **choices)
    with pytest.raises(ValueError, match="closure: at the model's weights its loss is nan"):
        poco.suggest_ess(model, lambda: torch.tensor(float("nan")))


def test_the_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = poco.LearningRates(0.1, [0.1, 1.0], [1.0, 2.0], [1.0, 2.0])
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="needs matplotlib: pip install"):
        found.plot(tmp_path / "lr.png")


def test_a_maximizing_optimizer_is_refused() -> None:
    model = torch.nn.Linear(2, 1)
    opt = poco.IVON([{"params": list(model.parameters()), "maximize": True}], lr=0.1, ess=10.0)
    with pytest.raises(ValueError, match=r"^optimizer: it maximizes, .*; negate the loss instead\.$"):
        poco.find_lr(model, opt, [lambda: model(torch.ones(1, 2)).square().mean()])
