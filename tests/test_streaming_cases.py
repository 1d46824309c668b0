"""What training loops do to models that are stepped span by span, found by reviewers: each once went wrong."""

from typing import Any

import pytest
import torch
from backend_cases import FLAT, compiles, distance, numbers, trained
from optimizer_cases import named, run, shell
from torch import nn

import expfam_poco as poco
from expfam_poco.engine import backend

IVON: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "beta2": 0.99, "hess_init": 1.0, "seed": 1}
MAKE = shell("diagonal_gaussian", lr=0.05, ess=50.0, momentum=0.9, hess_init=1.0, weight_decay=0.1)
# The case of test_backends.py, whose kernels are compiled there.
COMPILED = named(poco.IVONPoCoMo, rho1=0.6, rho2=0.1, alpha=0.7, lr=0.1, ess=100.0, hess_init=1.0, beta2=0.99)


def test_members_of_a_bucket_keep_priors_of_their_own() -> None:
    """Also priors that are set after the first step."""
    found = []
    for name in ("auto", "eager"):
        model, opt, task = trained(MAKE, 2, FLAT, backend=name)
        states = opt.posterior_states()
        priors = {
            "long": type(states["long"])(torch.tensor(1.0), torch.tensor(300.0)),
            "matrix": type(states["long"])(torch.full((20, 30), -1.0), torch.tensor(300.0)),
        }
        opt.param_groups[0]["prior"] = priors
        run(opt, task, 6, start=2)
        found.append(numbers(model, opt))
    assert distance(*found) < 1e-9


def test_a_layer_frozen_between_one_pass_steps_holds_its_point() -> None:
    found = []
    for one_pass in (False, True):
        model, opt, task = trained(MAKE, 3, FLAT, backend="eager", one_pass=one_pass)
        model["matrix"].requires_grad_(False)
        run(opt, task, 2, start=3)
        with opt.sampled(at_point=True):
            assert torch.equal(model["matrix"], opt.state[model["matrix"]]["posterior"].mean)
        model["matrix"].requires_grad_(True)
        run(opt, task, 2, start=5)
        with opt.sampled(at_point=True):
            found.append(numbers(model, opt))
    assert distance(*found) == 0.0


def test_a_batched_step_after_a_one_pass_step_leaves_the_point() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    opt = poco.IVON(model.parameters(), **IVON, backend="eager", one_pass=True)
    opt.step(lambda: nn.functional.mse_loss(model(x), y))
    opt.step(poco.BatchedDraws(model, nn.functional.mse_loss, x, y))
    assert all(torch.equal(p, opt.state[p]["posterior"].mean) for p in model.parameters())


def test_an_outer_posterior_of_any_layout_is_refreshed() -> None:
    model, opt, task = trained(MAKE, 3, FLAT, backend="eager")
    states = {k: type(s)(*(v.t().contiguous().t() for v in s)) for k, s in opt.posterior_states().items()}
    opt.set_outer(states)
    run(opt, task, 2, start=3)
    opt.refresh(task.chunks())
    for p in model.parameters():
        record = opt.state[p]
        assert all(torch.equal(a, b) for a, b in zip(record["memory"].posterior, record["posterior"], strict=True))


@compiles
def test_schedules_of_momentum_and_ess_compile_nothing_anew() -> None:
    model, opt, task = trained(COMPILED, 6, FLAT, torch.float32, backend="compiled")
    before = len(backend._COMPILED)
    for step in range(3):
        opt.param_groups[0].update(momentum=0.8 - 0.1 * step, ess=60.0 + step, lr=0.01)
        run(opt, task, 1, start=6 + step)
    assert len(backend._COMPILED) == before
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@compiles
@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_inference_mode_around_draws_does_no_harm(name: str) -> None:
    """Neither to the state that it may create, nor to what is compiled."""
    found = []
    for around in (torch.enable_grad, torch.inference_mode):
        model, opt, task = trained(COMPILED, 0, FLAT, backend=name)
        for step in range(3):
            with around(), opt.sampled(seed=step):
                assert not any(bool(p.isnan().any()) for p in model.parameters())
            run(opt, task, 1, start=step)
        found.append(numbers(model, opt))
    assert distance(*found) == 0.0


def test_inference_mode_before_the_first_step_of_a_full_gaussian() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = poco.VON([weight], lr=0.1, ess=10.0)
    with torch.inference_mode(), opt.sampled():
        pass
    opt.step(lambda: ((weight - 1.0) ** 2).sum())
    assert bool((weight > 0.0).all())


def test_an_overflow_in_place_counts_as_a_step() -> None:
    """The weights have moved, so the next step must have noise of its own."""
    weight = nn.Parameter(torch.zeros(300))
    opt = poco.IVON([weight], **IVON, backend="eager")
    scale = torch.ones(300)
    scale[7] = 1e38
    with pytest.raises(poco.NonFiniteError, match="1 of 300 weights") as found:
        opt.step(lambda: (weight * scale).sum())
    assert found.value.stepped and opt.diagnostics()["steps"] == 1


def test_sparse_gradients_are_what_they_stand_for() -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(50, 8, sparse=sparse)
        for name in ("auto", "eager"):
            opt = poco.IVON(model.parameters(), **IVON, backend=name)
            for _ in range(2):
                opt.step(lambda model=model: model(torch.tensor([1, 4])).square().sum())
        found.append(model.weight.detach().clone())
    assert torch.equal(*found)


def test_one_pass_is_true_or_false() -> None:
    with pytest.raises(ValueError, match=r"^one_pass='no': give True or False\.$"):
        poco.IVON([nn.Parameter(torch.zeros(2))], **IVON, one_pass="no")
