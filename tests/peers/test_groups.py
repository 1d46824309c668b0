"""What others keep in parameter groups, and what torch's optimizers understand there, for every optimizer."""

import copy
from typing import Any

import pytest
import torch
from optimizer_cases import OVER_A_BASE, SHELL, Task, equal, network, run, same, those, weights
from torch import nn

import expfam_poco as poco
from peers.habits import EVERY, closure_of, train, trained

every = pytest.mark.parametrize("name", EVERY)
LABELS: dict[str, Any] = {
    "lr_scale": 0.5, "layer": "head", "group_name": "decay", "no_decay": True, "betas": (0.9, 0.99), "foreach": None,
    "fused": None, "differentiable": False, "capturable": False, "initial_lr": 0.3, "weight_decay_mult": 0.0,
}  # fmt: skip


# An anchor from elsewhere than the estimator has no sign.
anchored = those(lambda opt: opt._products.kind != "curvature", SHELL)
signed = [name for name in EVERY if name not in anchored]


def grouped(model: nn.Module, **keys: Any) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters()), **keys}]


@every
def test_labels_of_others_are_carried_along_and_change_nothing(name: str) -> None:
    plain, labelled = network(), network()
    first = EVERY[name](grouped(plain))
    labels = {key: value for key, value in LABELS.items() if key not in first.defaults}
    second = EVERY[name](grouped(labelled, **labels))
    assert {key: second.param_groups[0][key] for key in labels} == labels
    for opt in (first, second):
        for group in opt.param_groups:
            group["lr"] *= LABELS["lr_scale"]  # as timm's and MAE's schedulers do
    assert equal(train(first, Task(plain), 4), train(second, Task(labelled), 4))
    assert equal(weights(plain), weights(labelled))
    other = EVERY[name](grouped(network()))
    other.load_state_dict(copy.deepcopy(second.state_dict()))
    assert {key: other.param_groups[0][key] for key in labels} == labels


@pytest.mark.parametrize("flag", ["differentiable", "capturable"])
@pytest.mark.parametrize("name", sorted(EVERY.keys() - OVER_A_BASE.keys()))
def test_what_no_step_can_be_is_refused_by_name(name: str, flag: str) -> None:
    with pytest.raises(ValueError, match=rf"^{flag}=True in a group: no step .* is {flag}; leave it out\.$"):
        EVERY[name](grouped(network(), **{flag: True}))
    with pytest.raises(TypeError, match=flag):
        EVERY[name](network().parameters(), **{flag: True})


@pytest.mark.parametrize("name", signed)
def test_maximize_makes_minus_the_loss_small_group_by_group(name: str) -> None:
    """Two models in two groups, the loss of one minus that of the other: both see what two plain ones see."""
    models = [network(seed=seed) for seed in (1, 2, 1, 2)]

    class Difference(Task):
        def __init__(self, first: nn.Module, second: nn.Module, sign: float) -> None:
            super().__init__(first)
            self.models, self.sign = (first, second), sign

        def closure(self, batch: int) -> Any:
            one, other = (Task(m, seed=s).closure(batch) for s, m in enumerate(self.models))
            return lambda: one() + self.sign * other()

    results = []
    for first, second, sign in ((*models[:2], 1.0), (*models[2:], -1.0)):
        groups = [{"params": list(first.parameters())}, {"params": list(second.parameters()), "maximize": sign < 0.0}]
        opt = EVERY[name](groups)
        assert opt.param_groups[1]["maximize"] == (sign < 0.0)
        losses = train(opt, Difference(first, second, sign), 6)
        results.append([*weights(first), *weights(second)])
    by_losses = all(g["curvature"].needs in ("loss", "variations") for g in opt.param_groups if "curvature" in g)
    if by_losses and name in SHELL:  # whose gradients see the whole loss, whatever its parts are
        assert all(bool(torch.isfinite(loss)) for loss in losses)
    else:
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", signed)
def test_maximize_of_all_is_the_negative_loss(name: str) -> None:
    models, results = (network(), network()), []
    for model, sign in zip(models, (1.0, -1.0), strict=True):
        opt, task = EVERY[name](grouped(model, maximize=sign < 0.0)), Task(model)

        class Signed(Task):
            def closure(self, batch: int, sign: float = sign, task: Task = task) -> Any:
                return lambda: sign * task.closure(batch)()

        losses = train(opt, Signed(model), 6)
        results.append([*weights(model), *(sign * loss for loss in losses)])
    assert equal(*results)


@pytest.mark.parametrize("name", [name for name in signed if name not in OVER_A_BASE])
def test_maximize_is_an_argument_too(name: str) -> None:
    opt = EVERY[name](network().parameters(), maximize=True)
    assert opt.param_groups[0]["maximize"] is True


@pytest.mark.parametrize("name", anchored)
def test_maximize_where_it_cannot_be_right_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^maximize=True: anchor='stored' knows no sign; use anchor='curvature'\.$"):
        SHELL[name](network().parameters(), maximize=True)


@every
def test_a_group_is_a_dictionary(name: str) -> None:
    _, opt, _ = trained(name, 2)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(TypeError, match=r"param_group.* must be a dict"):
        opt.add_param_group([nn.Parameter(torch.ones(2))])
    assert same(before, opt.state_dict())


@every
def test_a_wrapper_may_repeat_in_groups_what_it_tells_the_optimizer(name: str) -> None:
    """SAM hands its own groups to its base, with its own settings in them; ZeRO those of the optimizer."""
    model = network()
    opt = EVERY[name](model.parameters())
    wide = {key: getattr(opt, key) for key in ("seed", "mc_samples", "noise", "nonfinite") if hasattr(opt, key)}
    other = network()
    again = EVERY[name](grouped(other, adaptive=False, **wide))
    assert equal(train(opt, Task(model), 3), train(again, Task(other), 3))


class Wrapper(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as it is usually written."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **choices: Any) -> None:
        super().__init__(params, dict(rho=rho, **choices))
        self.base = base(self.param_groups, **choices)
        self.param_groups = self.base.param_groups


@pytest.mark.parametrize("kind", [torch.optim.SGD, poco.VSGD, poco.ConstantVSGD])
def test_sharpness_aware_minimisation_over_what_steps_with_gradients(kind: Any) -> None:
    model = network()
    opt, task = Wrapper(model.parameters(), kind, lr=0.01), Task(model)
    before = weights(model)
    task.closure(0)().backward()
    opt.base.step()
    assert opt.param_groups[0]["rho"] == 0.05 and not equal(before, weights(model))


def test_the_convention_of_lr_may_differ_by_group_and_old_words_are_understood() -> None:
    model = network()
    halves = [list(model[0].parameters()), list(model[3].parameters())]
    words = ({"rescale_lr": False}, {"lr_scale": "initial_hessian"})
    opt = poco.IVON([{"params": p, **w} for p, w in zip(halves, words, strict=True)], lr=0.1, ess=50.0)
    assert [group["lr_convention"] for group in opt.param_groups] == [1.0, "initial_hessian"]
    saved = copy.deepcopy(opt.state_dict())
    saved["poco"]["format"] = 3
    for group in saved["param_groups"]:  # as it was called then
        group["lr_scale"] = group.pop("lr_convention")
        del group["maximize"]
    del saved["poco"]["records"]
    run(opt, Task(model), 1)
    opt.load_state_dict(saved)
    assert [group["lr_convention"] for group in opt.param_groups] == [1.0, "initial_hessian"]
    assert "lr_scale" not in opt.param_groups[0]


@every
def test_empty_and_twice_given_parameters(name: str) -> None:
    model = network()
    empty = nn.Parameter(torch.zeros(0, dtype=torch.float64))
    opt = EVERY[name]([*model.parameters(), empty])
    assert all(bool(torch.isfinite(loss)) for loss in train(opt, Task(model), 4))
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        opt.add_param_group({"params": [empty]})
    with pytest.raises(ValueError, match="empty parameter list"):
        EVERY[name]([])


@every
def test_a_rate_may_be_a_tensor(name: str) -> None:
    model, other = network(), network()
    opt, plain = EVERY[name](model.parameters()), EVERY[name](other.parameters())
    for group in opt.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    for _ in range(3):
        closures = closure_of(opt, Task(model), 0), closure_of(plain, Task(other), 0)
        torch.testing.assert_close(opt.step(closures[0]), plain.step(closures[1]), rtol=1e-9, atol=0.0)
        for group in (*opt.param_groups, *plain.param_groups):
            group["lr"] *= 0.5  # in place, for a tensor
