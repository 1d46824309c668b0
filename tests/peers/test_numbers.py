"""Numbers that others compute: NumPy's, too large ones, and posteriors that rounding has spoilt."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import (
    OPTIMIZERS,
    OVER_A_BASE,
    SHELL,
    Task,
    differentiates,
    equal,
    is_joint,
    network,
    same,
    those,
    through_a_file,
    weights,
)
from torch import nn

import expfam_poco as poco
from peers.habits import EVERY, closure_of, train, trained

every = pytest.mark.parametrize("name", EVERY)


@every
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_numpy_s_numbers_become_python_s(name: str, kind: Any) -> None:
    """As a group's value, from a schedule in the middle of a run, and in others' labels."""
    model, twin = network(), network()
    opt, plain = EVERY[name](model.parameters()), EVERY[name](twin.parameters())
    for step in range(4):
        for group, other in zip(opt.param_groups, plain.param_groups, strict=True):
            rate = kind(0.01 * math.cos(0.3 * step))
            group["lr"], other["lr"], group["initial_lr"] = rate, float(rate), rate
        assert same(through_a_file(opt.state_dict())["param_groups"][0]["lr"], plain.param_groups[0]["lr"])
        train(opt, Task(model), 1, step)
        train(plain, Task(twin), 1, step)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-6, atol=1e-7)  # a base of torch's takes float32


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        (poco.IVON, "lr", np.float32(0.1)), (poco.IVON, "ess", np.int64(10)), (poco.IVON, "beta1", np.float32(0.5)),
        (poco.IVON, "hess_init", np.float32(0.5)), (poco.IVON, "max_grad_norm", np.float32(3.0)),
        (poco.IVONPoCo, "alpha", np.float32(0.5)), (poco.IVONPoCo, "rho", (np.float64(0.1), np.float32(0.2))),
        (poco.VSGDPoCo, "lr_scale", np.float32(2.0)), (poco.BayesBiNN, "temperature", np.float32(0.5)),
        (poco.VSGD, "gamma", np.float32(1e-3)), (poco.ConstantVSGD, "K_g", np.float64(9.0)),
    ],
)  # fmt: skip
def test_arguments_may_be_numpy_s(kind: Any, argument: str, value: Any) -> None:
    given = {"lr": 0.01, **({"ess": 24.0} if issubclass(kind, poco.PosteriorCorrected) else {}), argument: value}
    model = network()
    opt = kind(model.parameters(), **given)
    through_a_file(opt.state_dict())
    train(opt, Task(model), 2)
    assert through_a_file(opt.state_dict())


@pytest.mark.parametrize("argument", ["lr", "ess", "weight_decay", "hess_init", "clip_radius", "max_grad_norm"])
@pytest.mark.parametrize("value", [1e39, 10**400, -(10**400)], ids=["1e39", "10**400", "-10**400"])
def test_numbers_beyond_float32_are_refused(argument: str, value: Any) -> None:
    choices = {"lr": 0.1, "ess": 10.0, argument: value}
    with pytest.raises(ValueError, match=rf"^{argument}=(-?1|<int>)") as caught:
        poco.PosteriorCorrected(network().parameters(), "diagonal_gaussian", **choices)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name", those(differentiates, OPTIMIZERS))
def test_a_mega_batch_of_another_model_is_refused(name: str) -> None:
    model, opt, task = trained(name, 4)
    before = copy.deepcopy([weights(model), opt.state_dict()])
    with pytest.raises(ValueError, match=r"depends on none of this optimizer's trainable parameters; give it"):
        opt.refresh(Task(network()).chunks())
    assert same(before, [weights(model), opt.state_dict()])
    train(opt, task, 1, 4)


@pytest.mark.parametrize("name", those(is_joint, SHELL))
def test_a_posterior_that_cannot_be_factored_is_one_sentence(name: str) -> None:
    model, opt, task = trained(name, 2)
    (record,) = opt.state.values()
    record["posterior"] = record["posterior"]._replace(precision=-record["posterior"].precision)
    with pytest.raises(poco.NonFiniteError, match=r"^posterior: that of 'group0' \(FullGaussian\) is too near"):
        opt.posterior()
    assert "mean_stddev" not in opt.diagnostics()
    before = weights(model)
    with pytest.raises(poco.NonFiniteError):
        opt.step(task.closure(0))
    assert equal(weights(model), before)


def test_a_low_rank_posterior_that_rounding_has_spoilt_is_one_sentence() -> None:
    model = network()
    opt = poco.PosteriorCorrected(model.parameters(), "low_rank_gaussian", lr=0.1, ess=24.0, hess_init=1.0)
    task = Task(model)
    train(opt, task, 2)
    for record in opt.state.values():
        record["posterior"] = record["posterior"]._replace(factor=record["posterior"].factor * math.nan)
    before = weights(model)
    with pytest.raises(
        poco.NonFiniteError, match=r"^posterior: that of 'group0.*' \(LowRankGaussian\) is too near to sing"
    ):
        opt.step(task.closure(0))
    assert equal(weights(model), before)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in OVER_A_BASE])
def test_ten_skipped_steps_in_a_row_are_told_once(name: str) -> None:
    model, opt, task = trained(name, 2, nonfinite="skip")
    skipped = opt.diagnostics()["skipped_steps"]

    class Broken(Task):
        def closure(self, batch: int) -> Any:
            return lambda: math.nan * task.closure(batch)()

    broken = Broken(model)
    for row in (9, 9):  # a sound step between them
        for batch in range(row):
            opt.step(closure_of(opt, broken, batch))
        opt.step(closure_of(opt, task, 0))
    before = weights(model)
    for batch in range(9):
        opt.step(closure_of(opt, broken, batch))
    with pytest.warns(UserWarning, match=r"^nonfinite='skip': the last 10 steps were all skipped.*: closure"):
        opt.step(closure_of(opt, broken, 9))
    for batch in range(12):
        opt.step(closure_of(opt, broken, batch))
    assert equal(weights(model), before) and opt.diagnostics()["skipped_steps"] == skipped + 40


def test_a_prior_in_a_checkpoint_is_looked_at() -> None:
    model = nn.Linear(2, 1)
    kind = poco.resolve_family("diagonal_gaussian")
    opt = poco.IVON(model.parameters(), lr=0.1, ess=10.0, prior=kind.centred_at(torch.zeros(()), 1.0))
    for bad in (torch.tensor(math.nan), torch.zeros(7)):
        saved = copy.deepcopy(opt.state_dict())
        saved["param_groups"][0]["prior"]["mean"] = bad
        with pytest.raises(poco.CheckpointError, match=r"^state_dict\['param_groups'\]\[0\]: prior\.mean"):
            opt.load_state_dict(saved)
