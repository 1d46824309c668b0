"""The IVON family against its references: the package ivon-opt, and Algorithm 4 written out line by line."""

import inspect
import math
from typing import Any

import ivon
import ivon._ivon
import pytest
import torch
from optimizer_cases import INNER, MEGA, OUTER, Task, equal, flat, network, noises, run, weights
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.optim.choices import IVON_OPT

# ---- IVON against ivon-opt 0.1.3 ---------------------------------------------------------------------------

STEPS = 200


class TorchWithGivenNoise:
    """The module torch as ivon-opt sees it, whose `randn` hands out prepared vectors."""

    def __init__(self, prepared: list[Tensor]) -> None:
        self.prepared = prepared

    def randn(self, size: int, device: Any, dtype: torch.dtype) -> Tensor:
        value = self.prepared.pop(0)
        assert value.shape == (size,) and value.dtype == dtype
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def two_groups(model: nn.Module, **second: Any) -> list[dict[str, Any]]:
    first, last = model[0], model[3]
    return [{"params": list(first.parameters())}, {"params": list(last.parameters()), **second}]


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "default": ({"lr": 0.1}, None),
    "clipped": ({"lr": 0.5, "clip_radius": 0.05, "beta2": 0.995}, None),
    "two-samples": ({"lr": 0.1, "mc_samples": 2, "beta2": 0.999}, None),
    "gradsq": ({"lr": 0.1, "hess_approx": "gradsq", "beta2": 0.999}, None),
    "no-rescale-no-debias": ({"lr": 0.05, "rescale_lr": False, "debias": False, "beta2": 0.99}, None),
    "no-decay": ({"lr": 1.0, "hess_init": 0.125, "beta1": 0.5, "beta2": 0.9999, "weight_decay": 0.0}, None),
    "no-momentum": ({"lr": 0.05, "beta1": 0.0, "beta2": 0.99}, None),
    "groups-of-other-lr": ({"lr": 0.1, "beta2": 0.999}, {"lr": 0.02}),
    "groups-of-other-decay": ({"lr": 0.1, "beta2": 0.999}, {"weight_decay": 0.0, "hess_init": 0.5}),
    "groups-of-other-betas": ({"lr": 0.1, "beta2": 0.999}, {"beta1": 0.5, "beta2": 0.99}),
    "groups-of-other-ess": ({"lr": 0.1, "beta2": 0.999}, {"ess": 200.0, "clip_radius": 0.1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ivon_equals_ivon_opt_step_by_step(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choices, second = VARIANTS[variant]
    ours, theirs = network(), network()
    params = [m.parameters() if second is None else two_groups(m, **second) for m in (ours, theirs)]
    mine = poco.IVON.like_ivon_opt(params[0], ess=1000.0, seed=5, **choices)
    reference = ivon.IVON(params[1], ess=1000.0, **choices)
    task, other = Task(ours), Task(theirs)
    prepared: list[Tensor] = []
    monkeypatch.setattr(ivon._ivon, "torch", TorchWithGivenNoise(prepared))

    worst_mean, worst_hessian, moved = 0.0, 0.0, weights(ours)
    for step in range(1, STEPS + 1):
        blocks = noises(mine, INNER, step)
        for draw in range(mine.mc_samples):
            if second is None:
                prepared.append(flat(noise[draw] for noise in blocks))
            else:
                prepared += [flat(noise[draw] for noise in part) for part in (blocks[:2], blocks[2:])]

        def closure(batch: int = step) -> Tensor:
            with reference.sampled_params(train=True):
                reference.zero_grad()
                loss = other.closure(batch)()
                loss.backward()
            return loss

        loss = mine.step(task.closure(step))
        expected = reference.step(closure)
        assert not prepared
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
        worst_mean = max(worst_mean, float((flat(ours.parameters()) - flat(theirs.parameters())).abs().max()))
        states = list(mine.posterior_states().values())
        owners = [group for group in mine.param_groups for _ in group["params"]]
        pairs = zip(states, owners, strict=True)
        hessian = flat(s.precision / g["ess"] - g["weight_decay"] for s, g in pairs)
        difference = hessian - torch.cat([group["hess"] for group in reference.param_groups])
        worst_hessian = max(worst_hessian, float(difference.abs().max()))
    assert worst_mean <= 1e-10 and worst_hessian <= 1e-10, (worst_mean, worst_hessian)
    assert float((flat(moved) - flat(ours.parameters())).abs().max()) > 0.05, "nothing was trained"


def test_its_defaults_are_those_of_the_package() -> None:
    theirs = {key: p.default for key, p in inspect.signature(ivon.IVON).parameters.items() if key in IVON_OPT}
    assert theirs == IVON_OPT
    group = poco.IVON.like_ivon_opt(network().parameters(), 0.1, 50.0, beta2=0.9).param_groups[0]
    assert (group["hess_init"], group["precision_lr"]) == (1.0, 1.0 - 0.9)


# ---- IVONPoCoMo against Algorithm 4 ------------------------------------------------------------------------


class Algorithm4:
    """IVON-PCM line by line on one flat vector, with a global step count; `loss(θ, batch)` is a mean loss."""

    def __init__(self, m: Tensor, loss: Any, **constants: float) -> None:
        self.__dict__.update(constants)
        self.loss = loss
        self.m = m.clone()  # line 1
        self.h = torch.full_like(m, self.h0)
        self.sigma = 1 / (self.kappa * (self.h + self.delta)).sqrt()
        self.g = torch.zeros_like(m)
        self.g_out: Tensor | None = None
        self.t = 0

    def gradient(self, theta: Tensor, batch: Any) -> Tensor:
        leaf = theta.clone().requires_grad_()
        return torch.autograd.grad(self.loss(leaf, batch), leaf)[0]

    def refresh(self, chunks: list[Any], eps: list[Tensor]) -> None:
        g_hat, h_hat = torch.zeros_like(self.m), torch.zeros_like(self.m)
        for chunk, e in zip(chunks, eps, strict=True):  # line 3, in chunks with fresh noise
            theta = self.m + self.sigma * e
            g = self.gradient(theta, chunk)
            g_hat += g / len(chunks)
            h_hat += g * (theta - self.m) / self.sigma**2 / len(chunks)
        if self.g_out is None:
            self.g_out, self.h_out = g_hat, h_hat
        else:  # line 4
            self.g_out = self.rho1 * self.g_out + (1 - self.rho1) * g_hat
            self.h_out = self.rho2 * self.h_out + (1 - self.rho2) * h_hat
        self.m_out, self.sigma_out = self.m.clone(), self.sigma.clone()  # line 5

    def step(self, batch: Any, eps_in: Tensor, eps_out: Tensor) -> None:
        self.t += 1
        m, h, sigma, delta, b1, b2 = self.m, self.h, self.sigma, self.delta, self.beta1, self.beta2
        theta_in = m + sigma * eps_in  # line 7
        g_in = self.gradient(theta_in, batch)  # line 8
        h_in = g_in * (theta_in - m) / sigma**2
        anchor = torch.zeros_like(m)
        g_hat, h_hat = g_in, h_in
        if self.g_out is not None:
            theta_out = self.m_out + self.sigma_out * eps_out
            g_out = self.gradient(theta_out, batch)  # line 9
            h_out = g_out * (theta_out - self.m_out) / self.sigma_out**2
            g_hat = g_in - self.alpha * (g_out - self.g_out)  # line 10
            h_hat = h_in - self.alpha * (h_out - self.h_out)
            anchor = self.alpha * (self.h_out - h_out) * (m - self.m_out)
        self.g = b1 * self.g + (1 - b1) * g_hat  # line 11
        new_h = b2 * h + (1 - b2) * h_hat + 0.5 * (1 - b2) ** 2 * (h - h_hat) ** 2 / (h + delta)  # line 12
        g_bar = self.g / (1 - b1**self.t)  # line 13
        g_bar = (g_bar + delta * m + anchor) / (new_h + delta)  # line 14
        self.m = m - self.eta * g_bar.clamp(-self.xi, self.xi)  # line 15
        self.h = new_h
        self.sigma = 1 / (self.kappa * (new_h + delta)).sqrt()  # line 16


@pytest.mark.parametrize("xi", [math.inf, 0.3], ids=["unclipped", "clipped"])
def test_ivon_poco_mo_equals_algorithm_4(xi: float) -> None:
    model = network()
    shapes = [p.shape for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    task = Task(model)
    constants = {"kappa": 50.0, "delta": 0.05, "h0": 0.8, "beta1": 0.8, "beta2": 0.98, "eta": 0.05}
    opt = poco.IVONPoCoMo(
        model.parameters(), lr=0.05, ess=50.0, hess_init=0.8, beta1=0.8, beta2=0.98, weight_decay=0.05, clip_radius=xi,
        rescale_lr=False, alpha=0.7, rho1=0.6, rho2=0.1, noise="independent", reanchor_average=False,
        anchor_weight=1.0, retraction="second_order", seed=3,
    )  # fmt: skip

    def loss(theta: Tensor, batch: int) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        values = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        output = torch.func.functional_call(model, values, (task.x[batch],))
        return 0.5 * (output - task.y[batch]).square().mean()

    written = Algorithm4(flat(model.parameters()), loss, alpha=0.7, rho1=0.6, rho2=0.1, xi=xi, **constants)
    chunk, worst, clipped = 0, 0.0, 0
    for step in range(1, 41):
        if step > 5 and step % 7 == 0:
            numbers = [2, 0, 3]
            opt.refresh([task.closure(number) for number in numbers])
            written.refresh(numbers, [flat(noises(opt, MEGA, chunk + i)) for i in (1, 2, 3)])
            chunk += 3
        opt.step(task.closure(step))
        before = written.m
        written.step(step % 4, flat(noises(opt, INNER, step)), flat(noises(opt, OUTER, step)))
        clipped += int(((written.m - before).abs() > 0.999 * 0.05 * xi).sum())
        states = opt.posterior_states().values()
        h = flat(s.precision for s in states) / 50.0 - 0.05
        differences = [flat(model.parameters()) - written.m, h - written.h]
        worst = max(worst, *(float(d.abs().max()) for d in differences))
    assert worst <= 1e-12, worst
    assert (clipped > 0) == math.isfinite(xi)
    assert opt.diagnostics()["refreshes"] == 5


# ---- inside the IVON family --------------------------------------------------------------------------------


def trained(kind: Any, *, refreshes: bool = True, noise: str = "shared", **choices: Any) -> list[Tensor]:
    model = network()
    opt = kind(model.parameters(), lr=0.1, ess=200.0, beta2=0.99, seed=4, noise=noise, **choices)
    losses = run(opt, Task(model), 15, refresh_every=4 if refreshes else 1000)
    states = [value for state in opt.posterior_states().values() for value in state]
    return [*weights(model), *states, *(losses if not refreshes else [])]


@pytest.mark.parametrize("noise", ["shared", "independent", "fixed", "antithetic"])
@pytest.mark.parametrize("kind", [poco.IVONPoCo, poco.IVONPoCoMo])
def test_without_alpha_it_is_ivon_bit_for_bit(kind: Any, noise: str) -> None:
    plain = trained(poco.IVON, noise=noise)
    assert equal(trained(kind, alpha=0.0, noise=noise), plain)
    assert equal(trained(kind, alpha=(0.0, 0.0), noise=noise), plain)
    assert equal(trained(poco.IVON, refreshes=False, noise=noise)[: len(plain)], plain), "a refresh moved the noise"
    assert not equal(trained(kind, alpha=1.0, noise=noise), plain)


def test_without_outer_momentum_it_is_ivon_poco_bit_for_bit() -> None:
    expected = trained(poco.IVONPoCo, alpha=0.7)
    assert equal(trained(poco.IVONPoCoMo, alpha=0.7), expected)
    assert equal(trained(poco.IVONPoCoMo, alpha=0.7, rho1=0.0, rho2=0.0), expected)
    assert not equal(trained(poco.IVONPoCoMo, alpha=0.7, rho1=0.3), expected)
    assert not equal(trained(poco.IVONPoCoMo, alpha=0.7, rho2=0.3), expected)


def test_an_average_is_reanchored_unless_told_otherwise() -> None:
    moved = trained(poco.IVONPoCoMo, alpha=0.7, rho1=0.6, rho2=0.1)
    printed = trained(poco.IVONPoCoMo, alpha=0.7, rho1=0.6, rho2=0.1, reanchor_average=False)
    assert not equal(moved, printed)


def test_the_published_names_of_the_curvatures_are_estimators() -> None:
    for published, name in (("price", "reparam"), ("gradsq", "gradsq")):
        assert equal(trained(poco.IVON, hess_approx=published), trained(poco.IVON, curvature=name))
