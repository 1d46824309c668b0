"""From an `ivon-opt` checkpoint the run goes on here as it would have there; what does not fit is refused."""

import copy
from collections.abc import Callable
from typing import Any

import ivon
import ivon._ivon
import pytest
import torch
from optimizer_cases import INNER, Task, equal, flat, network, noises, same, through_a_file, weights
from test_optimizers_parity import TorchWithGivenNoise, two_groups
from torch import Tensor, nn

import expfam_poco as poco

SHELL_ONLY = ("hess_approx", "rescale_lr", "debias", "mc_samples")
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "default": ({"lr": 0.1}, None),
    "two-samples": ({"lr": 0.1, "mc_samples": 2, "beta2": 0.999}, None),
    "clipped-gradsq": ({"lr": 0.5, "hess_approx": "gradsq", "beta2": 0.999, "clip_radius": 0.05}, None),
    "no-rescale-no-debias": ({"lr": 0.05, "rescale_lr": False, "debias": False, "beta2": 0.99}, None),
    "no-momentum": ({"lr": 0.05, "beta1": 0.0, "beta2": 0.99}, None),
    "groups": ({"lr": 0.1, "beta2": 0.999}, {"lr": 0.02, "beta1": 0.5, "weight_decay": 0.0, "ess": 200.0}),
}


def one_step(old: Any, task: Task, batch: int) -> Tensor:
    def closure() -> Tensor:
        with old.sampled_params(train=True):
            old.zero_grad()
            loss = task.closure(batch)()
            loss.backward()
        return loss

    loss: Tensor = old.step(closure)
    return loss


def begun(steps: int = 7, second: dict[str, Any] | None = None, **choices: Any) -> tuple[nn.Module, Any]:
    """A run with ivon-opt on its own noise."""
    model = network()
    params = model.parameters() if second is None else two_groups(model, **second)
    old = ivon.IVON(params, **{"lr": 0.1, "ess": 1000.0, **choices})
    for step in range(steps):
        one_step(old, Task(model), step)
    return model, old


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [poco.IVON, poco.IVONPoCo, poco.IVONPoCoMo])
def test_the_run_goes_on_as_with_ivon_opt(kind: Any, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choices, second = VARIANTS[variant]
    theirs, old = begun(second=second, **choices)
    scheduler = torch.optim.lr_scheduler.StepLR(old, 5, 0.5)
    saved = through_a_file({"model": theirs.state_dict(), "optimizer": old.state_dict()})

    ours = network(seed=9)
    ours.load_state_dict(saved["model"])
    fixed = {name: value for name, value in choices.items() if name in SHELL_ONLY}  # the others come from the file
    params = ours.parameters() if second is None else two_groups(ours)
    opt = kind(params, lr=7.0, ess=3.0, seed=5, **fixed)
    poco.load_ivon_opt(opt, saved["optimizer"], steps=old.current_step)
    resumed = torch.optim.lr_scheduler.StepLR(opt, 5, 0.5)
    assert opt.param_groups[0]["initial_lr"] == scheduler.base_lrs[0]

    prepared: list[Tensor] = []
    monkeypatch.setattr(ivon._ivon, "torch", TorchWithGivenNoise(prepared))
    start, worst = weights(ours), 0.0
    for step in range(8, 58):
        blocks = noises(opt, INNER, step)
        for draw in range(opt.mc_samples):
            parts = (blocks,) if second is None else (blocks[:2], blocks[2:])
            prepared += [flat(noise[draw] for noise in part) for part in parts]
        expected = one_step(old, Task(theirs), step)
        loss = opt.step(Task(ours).closure(step))
        scheduler.step()
        resumed.step()
        assert not prepared
        precisions = flat(state.precision for state in opt.posterior_states().values())
        theirs_s = torch.cat([g["ess"] * (g["hess"] + g["weight_decay"]) for g in old.param_groups])
        worst = max(
            worst,
            float((loss - expected).abs()),
            float((flat(ours.parameters()) - flat(theirs.parameters())).abs().max()),
            float((precisions / theirs_s - 1.0).abs().max()),
        )
    assert worst <= 1e-10, worst
    assert float((flat(start) - flat(ours.parameters())).abs().max()) > 0.01, "nothing was trained"
    assert opt.diagnostics()["steps"] == old.current_step == 57


def test_hyperparameters_come_from_the_checkpoint() -> None:
    _, old = begun(1, lr=0.2, hess_init=0.5, beta1=0.8, beta2=0.98, weight_decay=0.01, clip_radius=3.0)
    opt = poco.IVONPoCoMo(network().named_parameters(), lr=1.0, ess=1.0, alpha=0.7, rho1=0.6, seed=2)
    poco.load_ivon_opt(opt, old.state_dict(), steps=1)
    group = opt.param_groups[0]
    assert [group[k] for k in ("lr", "ess", "hess_init", "momentum", "weight_decay", "clip_radius")] == [
        0.2, 1000.0, 0.5, 0.8, 0.01, 3.0,
    ]  # fmt: skip
    assert group["precision_lr"] == pytest.approx(0.02) and (group["alpha"], group["rho"]) == (0.7, (0.6, 0.0))
    assert opt.seed == 2 and group["lr_convention"] == "initial_hessian"


def test_the_weights_may_be_loaded_before_or_after() -> None:
    theirs, old = begun()
    found = []
    for weights_first in (True, False):
        model = network(seed=4)
        opt = poco.IVON(model.parameters(), lr=0.1, ess=1000.0, seed=1)
        if weights_first:
            model.load_state_dict(theirs.state_dict())
        poco.load_ivon_opt(opt, old.state_dict(), steps=7)
        if not weights_first:
            model.load_state_dict(theirs.state_dict())
        means = [state.mean for state in opt.posterior_states().values()]
        assert equal(means, weights(theirs))
        found.append([*weights(model), opt.step(Task(model).closure(0)), *weights(model)])
    assert equal(*found)


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, dtype=torch.float64)
        self.second = nn.Linear(3, 3, dtype=torch.float64)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())[:, :1]
        return out


def test_tied_parameters_count_once() -> None:
    model = Tied()
    old = ivon.IVON(model.parameters(), lr=0.1, ess=100.0)
    for step in range(3):
        one_step(old, Task(model), step)
    opt = poco.IVON(model.named_parameters(), lr=0.1, ess=100.0)
    poco.load_ivon_opt(opt, old.state_dict(), steps=3)
    states = opt.posterior_states()
    assert list(states) == ["first.weight", "first.bias", "second.bias"]
    assert torch.equal(flat(s.precision for s in states.values()), 100.0 * (old.param_groups[0]["hess"] + 1e-4))


def test_frozen_parameters_keep_their_state_until_they_are_unfrozen() -> None:
    """ivon-opt's vectors hold them too, so that the parameters behind them get their own entries."""
    theirs, old = begun()
    theirs[0].bias.requires_grad_(False)
    opt = poco.IVON(theirs.named_parameters(), lr=0.1, ess=1000.0)
    poco.load_ivon_opt(opt, old.state_dict(), steps=7)
    assert list(opt.posterior_states()) == ["0.weight", "3.weight", "3.bias"]
    bias = theirs[0].bias.clone()
    opt.step(Task(theirs).closure(0))
    assert torch.equal(theirs[0].bias, bias)
    theirs[0].bias.requires_grad_()
    precision = 1000.0 * (old.param_groups[0]["hess"][12:16] + 1e-4)
    assert torch.equal(opt.posterior_states()["0.bias"].precision, precision)


def test_parameters_that_are_none_do_not_exist() -> None:
    """ivon-opt passes over them, but torch refuses them before either optimizer sees them."""
    for kind in (ivon.IVON, poco.IVON):
        with pytest.raises(TypeError, match="None"):
            kind([nn.Parameter(torch.zeros(2)), None], lr=0.1, ess=10.0)
    model = nn.Linear(2, 2, bias=False)  # whose bias is None, and not among its parameters
    old = ivon.IVON(model.parameters(), lr=0.1, ess=10.0)
    poco.load_ivon_opt(poco.IVON(model.parameters(), lr=0.1, ess=10.0), old.state_dict(), steps=0)


def test_bfloat16_weights_get_a_float32_posterior() -> None:
    model = network(torch.bfloat16)
    old = ivon.IVON(model.parameters(), lr=0.1, ess=100.0)
    one_step(old, Task(model), 0)
    opt = poco.IVON(model.parameters(), lr=0.1, ess=100.0)
    poco.load_ivon_opt(opt, old.state_dict(), steps=1)
    assert {value.dtype for state in opt.posterior_states().values() for value in state} == {torch.float32}
    assert torch.isfinite(opt.step(Task(model).closure(1)))


def put(name: str, value: Any) -> Callable[[Any], None]:
    return lambda saved: saved["param_groups"][0].update({name: value})


def leave_out(name: str) -> Callable[[Any], None]:
    return lambda saved: saved["param_groups"][0].pop(name)


def set_first(name: str, value: float) -> Callable[[Any], None]:
    return lambda saved: saved["param_groups"][0][name][:1].fill_(value)


HARMS: dict[str, tuple[Callable[[Any], None], str]] = {
    "no groups": (lambda saved: saved.pop("param_groups"), r"\['param_groups'\]: missing"),
    "two groups": (lambda saved: saved["param_groups"].append(saved["param_groups"][0]), "2 groups"),
    **{f"no {name}": (leave_out(name), rf"\[0\]\['{name}'\]: missing") for name in ("hess", "momentum", "lr", "beta2")},
    "other size": (put("hess", torch.ones(20)), r"\['hess'\]: shape \(20,\) where 21"),
    "no tensor": (put("momentum", 0.9), r"\['momentum'\]: float where 21"),
    "NaN in g": (set_first("momentum", torch.nan), r"\['momentum'\]: it holds NaN"),
    "NaN in h": (set_first("hess", torch.nan), r"\['hess'\]: it holds NaN"),
    "h + δ = 0": (set_first("hess", -1e-4), r"\['hess'\]: .* the least is 0.0"),
    "h + δ < 0": (set_first("hess", -1.0), r"\['hess'\]: .* the least is -"),
    "draws": (put("mc_samples", 3), r"\['mc_samples'\]: saved with 3"),
    "beta2": (put("beta2", 1.5), r"\[0\]: beta2=1.5"),
    "lr": (put("lr", -1.0), r"\[0\].*lr=-1.0"),
    "between sample and step": (lambda saved: saved["state"].update(count=1), r"\['count'\]: 1 samples"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_a_checkpoint_that_does_not_fit_is_refused(harm: str) -> None:
    model, old = begun()
    saved = copy.deepcopy(old.state_dict())
    damage, message = HARMS[harm]
    damage(saved)
    opt = poco.IVON(model.parameters(), lr=0.3, ess=50.0, seed=1)
    before = copy.deepcopy([weights(model), opt.state_dict()])
    with pytest.raises(poco.CheckpointError, match=message) as caught:
        poco.load_ivon_opt(opt, saved, steps=7)
    assert "\n" not in str(caught.value)
    assert same(before, [weights(model), opt.state_dict()])


def test_arguments_that_make_no_sense_are_refused() -> None:
    model, old = begun()
    saved = old.state_dict()
    opt = poco.IVON(model.parameters(), lr=0.3, ess=50.0, seed=1)
    with pytest.raises(poco.CheckpointError, match="not zero after steps=0"):
        poco.load_ivon_opt(opt, saved, steps=0)
    for steps in (-1, 7.0, True):
        with pytest.raises(ValueError, match="steps="):
            poco.load_ivon_opt(opt, saved, steps=steps)
    with pytest.raises(TypeError, match="optimizer=VON"):
        poco.load_ivon_opt(poco.VON(model.parameters(), lr=0.3, ess=50.0), saved, steps=7)
    names = [(f"net.{name}", p) for name, p in model.named_parameters()]
    foreign = ivon.IVON(names, lr=0.1, ess=10.0).state_dict()
    with pytest.raises(poco.CheckpointError, match=r"net\.0\.weight"):
        poco.load_ivon_opt(poco.IVON(model.named_parameters(), lr=0.3, ess=50.0), foreign, steps=0)
    opt.step(Task(model).closure(0))
    with pytest.raises(ValueError, match="optimizer: it has been used"):
        poco.load_ivon_opt(opt, saved, steps=7)
