"""Per-example noise through `vmap`, against an explicit loop over the examples."""

import math
from typing import Any

import pytest
import torch
from optimizer_cases import INNER, MEGA, Task, equal, network, weights
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.estimators import Draws
from expfam_poco.noise import NoiseKey


def ivon(model: nn.Module, **choices: Any) -> Any:
    settings = {"lr": 0.1, "ess": 200.0, "hess_init": 1.0, "beta2": 0.99, "seed": 3}
    return poco.IVONPoCoMo(model.named_parameters(), **{**settings, **choices})


@pytest.mark.parametrize("noise", ["shared", "independent", "antithetic"])
@pytest.mark.parametrize("draws", [1, 2])
def test_per_example_noise_equals_a_loop_over_examples(noise: str, draws: int) -> None:
    model, twin = network(), network()
    opt = ivon(model, noise=noise, mc_samples=draws, beta1=0.0, alpha=0.6)
    task = Task(model)
    loss = nn.functional.mse_loss

    def batch(number: int) -> poco.PerExample:
        return poco.PerExample(model, loss, task.x[number], task.y[number])

    family = opt.param_groups[0]["family"]
    names = list(dict(twin.named_parameters()))

    def sites(states: list[Any], stream: int, step: int, number: int) -> list[Any]:
        count = draws * len(task.x[number])
        keys = [NoiseKey(opt.seed, stream, step, parameter=i) for i in range(4)]
        eps = [family.noise(s.mean.shape, count, k, dtype=torch.float64) for s, k in zip(states, keys, strict=True)]
        if noise == "antithetic":
            eps = [torch.stack([e, -e], 1).flatten(0, 1) for e in eps]
        rows = len(eps[0])
        grads: list[list[Tensor]] = [[] for _ in range(4)]
        for row in range(rows):
            example = row * len(task.x[number]) // rows
            leaves = [family.sample(s, e[row]).requires_grad_() for s, e in zip(states, eps, strict=True)]
            values = dict(zip(names, leaves, strict=True))
            output = torch.func.functional_call(twin, values, (task.x[number][example][None],))
            found = torch.autograd.grad(loss(output, task.y[number][example][None]), leaves)
            for record, grad in zip(grads, found, strict=True):
                record.append(grad)
        return [
            family.natural_gradient(s, Draws(e, e, torch.zeros(rows), torch.stack(g)))
            for s, e, g in zip(states, eps, grads, strict=True)
        ]

    states = list(opt.posterior_states().values())
    opt.step(batch(0))
    expected = sites(states, INNER, 1, 0)
    prior = family.centred_at(torch.zeros((), dtype=torch.float64), 200.0 * 1e-4)
    for state, site, moved in zip(states, expected, opt.posterior_states().values(), strict=True):
        direction = poco.blr.update(
            family, poco.blr.BLRState(state, ()), prior, site, rates=(0.1 * (1 + 1e-4), 1.0 - 0.99), ess=200.0
        )
        torch.testing.assert_close(moved.mean, direction.posterior.mean, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(moved.precision, direction.posterior.precision, rtol=1e-11, atol=1e-12)
    states = list(opt.posterior_states().values())
    opt.refresh([batch(1), batch(2)])
    means = [[s[i] for s in (sites(states, MEGA, 1, 1), sites(states, MEGA, 2, 2))] for i in range(4)]
    for record, pair in zip(opt.state_dict()["state"].values(), means, strict=True):
        for field in ("gradient", "curvature"):
            mean = 0.5 * (getattr(pair[0], field) + getattr(pair[1], field))
            torch.testing.assert_close(record["memory"]["site"][field], mean, rtol=1e-10, atol=1e-11)
    assert torch.isfinite(opt.step(batch(3)))


def test_per_example_noise_leaves_unused_parameters_alone_and_refuses_what_it_cannot_do() -> None:
    model = network()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.register_parameter("unused", unused)
    model[3].bias.requires_grad_(False)
    task = Task(model)
    batch = poco.PerExample(model, nn.functional.mse_loss, task.x[0], task.y[0])
    opt = ivon(model, weight_decay=0.1)
    bias = model[3].bias.detach().clone()
    for _ in range(3):
        opt.step(batch)
    assert torch.equal(unused, torch.ones(2, dtype=torch.float64)) and torch.equal(model[3].bias, bias)
    stranger = ivon(nn.Linear(3, 1))
    with pytest.raises(ValueError, match="pass the model that the optimizer was made for"):
        stranger.step(batch)
    exact = ivon(model, curvature="exact")
    with pytest.raises(ValueError, match="PerExample measures gradients alone"):
        exact.step(batch)
    with pytest.raises(ValueError, match="targets: 2 of them for 6 inputs"):
        poco.PerExample(model, nn.functional.mse_loss, task.x[0], task.y[0][:2])
    broken = poco.PerExample(model, lambda output, y: output.mean() * math.nan, task.x[0], task.y[0])
    before = weights(model)
    with pytest.raises(poco.NonFiniteError, match="of an example"):
        opt.step(broken)
    assert equal(weights(model), before)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        opt.step(batch)
