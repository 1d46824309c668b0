"""VSGD and Constant VSGD against Algorithms 1 and 2 and the published update: the mathematics."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco import blr, gradient_model
from expfam_poco.gradient_model import Families

F64 = torch.float64


# ---- the algorithms, transcribed ---------------------------------------------------------------------------


def algorithm_1(eta: float, gamma: float, K_g: float, kappa_1: float, kappa_2: float) -> Any:
    """VSGD as printed: a generator that takes (θ, ĝ) and gives the new θ and the variational parameters."""
    a_g = a_ghat = b_g = gamma
    b_ghat, mu, t = K_g * gamma, 0.0, 0
    theta, ghat = yield
    while True:
        t += 1
        rho_1, rho_2 = t**-kappa_1, t**-kappa_2
        new = b_ghat / (b_ghat + b_g) * mu + b_g / (b_ghat + b_g) * ghat  # Eq. 15
        sigma2 = 1.0 / (a_g / b_g + a_ghat / b_ghat)  # Eq. 16
        a_g = a_ghat = gamma + 0.5  # Eq. 17
        b_g = (1 - rho_1) * b_g + rho_1 * (gamma + 0.5 * (sigma2 + (new - mu) ** 2))  # Eq. 18, 20
        b_ghat = (1 - rho_2) * b_ghat + rho_2 * (K_g * gamma + 0.5 * (sigma2 + (new - ghat) ** 2))  # Eq. 19, 21
        mu = new
        theta = theta - eta / (mu**2 + sigma2) ** 0.5 * mu  # Eq. 24
        theta, ghat = yield theta, {"mu": mu, "b_g": b_g, "b_ghat": b_ghat}


def algorithm_2(eta: float, gamma: float, K_g: float, kappa: float) -> Any:
    """Constant VSGD as printed."""
    a, b, mu, t = gamma, gamma, 0.0, 0
    theta, ghat = yield
    while True:
        t += 1
        rho = t**-kappa
        new = mu * K_g / (K_g + 1) + ghat / (K_g + 1)  # Eq. 34
        sigma2 = b / a / (K_g + 1)  # Eq. 35
        a = gamma + 1  # Eq. 36
        seen, drift = sigma2 + (new - ghat) ** 2, sigma2 + (new - mu) ** 2
        b = (1 - rho) * b + rho * (gamma + 0.5 * seen + 0.5 * K_g * drift)  # Eq. 37
        mu = new
        theta = theta - eta / (mu**2 + sigma2) ** 0.5 * mu  # Eq. 38
        theta, ghat = yield theta, {"mu": mu, "b_ghat": b}


def published(lr: float, strength: float, ratio: float, tau1: float, tau2: float, eps: float, decay: float) -> Any:
    """What the published code computes: everything doubled, the first ratio by a shape that is smaller by one."""
    shape2, prior_g2, prior_ghat2 = 2 * strength + 1 + 1e-4, 2 * strength, 2 * ratio * strength
    rate_g2, rate_ghat2, mean, t = prior_g2, prior_ghat2, 0.0, 0
    theta, ghat = yield
    while True:
        t += 1
        divisor = 2 * strength + 1e-4 if t == 1 else shape2  # the code has shape2 − 1 and so four digits less
        var_g, var_ghat = rate_g2 / divisor, rate_ghat2 / divisor
        new = (mean * var_ghat + ghat * var_g) / (var_g + var_ghat)
        variance = var_g * var_ghat / (var_g + var_ghat)
        rho1, rho2 = t**-tau1, t**-tau2
        rate_g2 = (1 - rho1) * rate_g2 + rho1 * (prior_g2 + variance + (new - mean) ** 2)
        rate_ghat2 = (1 - rho2) * rate_ghat2 + rho2 * (prior_ghat2 + variance + (new - ghat) ** 2)
        mean = new
        theta = (1 - lr * decay) * theta - lr * mean / ((mean**2 + variance) ** 0.5 + eps)
        theta, ghat = yield theta, {"mu": mean, "b_g": rate_g2 / 2, "b_ghat": rate_ghat2 / 2}


class Noisy:
    """Logistic regression of 200 examples in 7 dimensions, mini-batches of 8."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.x = torch.randn(200, 7, generator=generator, dtype=F64)
        self.y = (self.x @ torch.randn(7, generator=generator, dtype=F64) > 0.3).to(F64)
        self.batches = torch.randint(200, (400, 8), generator=generator)

    def loss(self, theta: Tensor, step: int) -> Tensor:
        rows = self.batches[step % 400]
        logits = self.x[rows].to(theta.dtype) @ theta
        return nn.functional.binary_cross_entropy_with_logits(logits, self.y[rows].to(theta.dtype))


def gap(opt_of: Callable[[list[nn.Parameter]], Any], reference: Any, steps: int = 150) -> float:
    """The largest relative difference between an optimizer's run and a transcription's, of θ and of all state."""
    task, worst = Noisy(), 0.0
    weight = nn.Parameter(torch.full((7,), 0.1, dtype=F64))
    opt, theta = opt_of([weight]), weight.detach().clone()
    next(reference)
    for step in range(steps):
        opt.zero_grad()
        task.loss(weight, step).backward()
        assert weight.grad is not None
        theta, own = reference.send((theta, weight.grad.clone()))
        opt.step()
        pairs = [(weight.detach(), theta), *((opt.state[weight][name], value) for name, value in own.items())]
        worst = max(worst, *(float(((mine - ref).abs() / ref.abs().max()).max()) for mine, ref in pairs))
    return worst


def test_vsgd_is_algorithm_1() -> None:
    assert gap(lambda p: poco.VSGD(p, lr=0.05), algorithm_1(0.05, 1e-8, 30.0, 0.9, 0.81)) <= 1e-12
    reference = algorithm_1(0.02, 0.3, 4.0, 0.8, 0.95)
    assert gap(lambda p: poco.VSGD(p, 0.02, gamma=0.3, K_g=4.0, kappa1=0.8, kappa2=0.95), reference) <= 1e-12


def test_constant_vsgd_is_algorithm_2() -> None:
    for gamma, ratio, kappa in ((1e-8, 30.0, 0.81), (0.2, 2.0, 1.0)):
        reference = algorithm_2(0.05, gamma, ratio, kappa)
        opt_of = lambda p, g=gamma, r=ratio, k=kappa: poco.ConstantVSGD(p, 0.05, gamma=g, K_g=r, kappa=k)  # noqa: E731
        assert gap(opt_of, reference) <= 1e-12


def test_the_official_choice_is_the_published_update() -> None:
    reference = published(0.05, 1e-8, 30.0, 0.81, 0.9, 1e-8, 0.02)
    assert gap(lambda p: poco.VSGD(p, lr=0.05, weight_decay=0.02, init="official"), reference) <= 1e-12


def test_the_official_prior_has_shape_gamma_and_not_gamma_and_a_half() -> None:
    """a₀ = γ + 5e-5: the first step is √(5e-5/1e-8 + 1) = 70.7 times the paper's, for small gradients."""
    moves = []
    for init in ("paper", "official"):
        weight = nn.Parameter(torch.zeros(1, dtype=F64))
        weight.grad = torch.full_like(weight, 1e-6)
        poco.VSGD([weight], lr=1.0, init=init, eps=0.0).step()
        moves.append(weight.item())
    assert moves[1] / moves[0] == pytest.approx(math.sqrt(5e-5 / 1e-8 + 1.0), rel=1e-6)


# ---- they are Bayesian learning rules ----------------------------------------------------------------------


def test_the_rates_are_steps_of_the_rule_on_gamma_posteriors() -> None:
    """`natural_step` with ρ = 1/t and N = T from the prior gives the conjugate posterior of T observations."""
    families = Families.named()
    draws = torch.randn(50, 6, generator=torch.Generator().manual_seed(2), dtype=F64)
    prior = families.gamma_nat(torch.tensor(0.7, dtype=F64), torch.full((6,), 0.4, dtype=F64))
    nat = prior
    for t, x in enumerate(draws, 1):
        site = gradient_model.precision_site(nat, x**2)
        nat = blr.natural_step(nat, prior, site, rate=1.0 / t, ess=50.0)
    torch.testing.assert_close(nat.log, torch.tensor(0.7 + 25.0, dtype=F64), rtol=1e-13, atol=0.0)
    torch.testing.assert_close(-nat.theta, 0.4 + 0.5 * (draws**2).sum(0), rtol=1e-13, atol=0.0)
    mean = families.gamma.to_mean(nat).theta
    torch.testing.assert_close(gradient_model.expected_precision(nat), mean, rtol=1e-12, atol=0.0)


def test_the_whole_belief_moves_by_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """At κ = 1 both λ are the average of prior − site over all steps; and `blr.natural_step` is what is called."""
    families, generator = Families.named(), torch.Generator().manual_seed(3)
    priors = tuple(families.gamma_nat(0.25, torch.full((5,), b, dtype=F64)) for b in (0.5, 2.0))
    belief = gradient_model.init(families, torch.zeros(5, dtype=F64), *priors)
    calls, natural_step = [], blr.natural_step

    def recorded(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments[2])
        return natural_step(*arguments, **named)

    monkeypatch.setattr("expfam_poco.rule.blr.natural_step", recorded)
    for t in range(1, 41):
        seen = torch.randn(5, generator=generator, dtype=F64) + 0.5
        belief, _ = gradient_model.update(families, belief, seen, priors, (1.0 / t, 1.0 / t))
    assert len(calls) == 80 and all(type(site) is families.gamma.Statistics for site in calls)
    for nat, prior, sites in zip(belief[1:], priors, (calls[::2], calls[1::2]), strict=True):
        assert nat.log == pytest.approx(0.75, rel=1e-14)
        average = torch.stack([prior.theta - site.theta for site in sites]).mean(0)
        torch.testing.assert_close(nat.theta, average, rtol=1e-13, atol=0.0)


def test_a_site_is_the_gradient_of_the_expected_loss() -> None:
    """∇_μ E_q[−log N(x | y, 1/w)] over q = Γ(a, b), by differentiating along λ: the chain rule's Fisher cancels."""
    families = Families.named()
    nat = families.gamma_nat(*(torch.tensor(v, dtype=F64) for v in (1.3, 0.6)))
    square = torch.tensor(2.5, dtype=F64)
    leaves = [value.clone().requires_grad_() for value in nat]
    means = families.gamma.to_mean(type(nat)(*leaves))
    loss = -0.5 * means.log + 0.5 * square * means.theta  # E_q of −½ log w + ½ w (x − y)²
    gradient = torch.autograd.grad(loss, leaves, retain_graph=True)
    fisher = torch.stack([torch.stack(torch.autograd.grad(m, leaves, retain_graph=True)) for m in means])
    site = torch.linalg.solve(fisher.T, torch.stack(gradient))
    torch.testing.assert_close(torch.tensor([-0.5, 0.5 * 2.5], dtype=F64), site, rtol=1e-10, atol=0.0)
    ours = gradient_model.precision_site(nat, square)
    assert ours.log == -0.5 and ours.theta == 1.25


# ---- connections to other optimizers (§3.2) ----------------------------------------------------------------


def test_the_mean_is_adams_first_moment() -> None:
    """K_g = β₁/(1−β₁) (§3.2.1)."""
    task, worst = Noisy(), 0.0
    first, second = (nn.Parameter(torch.full((7,), 0.1, dtype=F64)) for _ in range(2))
    opt, adam = poco.ConstantVSGD([first], lr=0.0, K_g=0.9 / 0.1), torch.optim.Adam([second], lr=0.0, betas=(0.9, 0.99))
    for step in range(120):
        for weight, optimizer in ((first, opt), (second, adam)):
            optimizer.zero_grad()
            task.loss(weight, step).backward()
            optimizer.step()
        moment = adam.state[second]["exp_avg"]
        worst = max(worst, float(((opt.state[first]["mu"] - moment).abs() / moment.abs().max()).max()))
    assert worst <= 1e-12


def test_the_mean_is_the_increment_of_sgd_with_momentum() -> None:
    """Eq. 51 with K_g = λ/η (the paper prints γ/η): from the same past, v_t = (λ+η) μ_t."""
    lam, eta, generator = 0.9, 0.03, torch.Generator().manual_seed(5)
    families = Families.named()
    prior = families.gamma_nat(1.0, torch.ones(4, dtype=F64))
    belief = gradient_model.init_constant(families, torch.zeros(4, dtype=F64), prior)
    v = torch.zeros(4, dtype=F64)
    for t in range(1, 121):
        ghat = torch.randn(4, generator=generator, dtype=F64) + 1.0
        belief, gradient = gradient_model.update_constant(
            families, belief._replace(mean=v), ghat, prior, 1.0 / t, lam / eta
        )
        v = lam * v + eta * ghat
        torch.testing.assert_close(v, (lam + eta) * gradient.mean, rtol=1e-12, atol=1e-14)


def test_over_a_whole_run_the_ratio_is_that_of_adam() -> None:
    """With its own past, μ = (1−λ)/η v at K_g = λ/(1−λ); Eq. 51's λ/η is that only where λ + η = 1."""
    task, worst, lam = Noisy(), 0.0, 0.8
    first, second = (nn.Parameter(torch.full((7,), 0.1, dtype=F64)) for _ in range(2))
    opt = poco.ConstantVSGD([first], lr=0.0, K_g=lam / (1.0 - lam))
    sgd = torch.optim.SGD([second], lr=0.0, momentum=lam)
    for step in range(100):
        for weight, optimizer in ((first, opt), (second, sgd)):
            optimizer.zero_grad()
            task.loss(weight, step).backward()
            optimizer.step()
        buffer = (1.0 - lam) * sgd.state[second]["momentum_buffer"]
        worst = max(worst, float(((opt.state[first]["mu"] - buffer).abs() / buffer.abs().max()).max()))
    assert worst <= 1e-12


def test_a_certain_prior_gives_normalised_sgd() -> None:
    """γ → ∞, K_g → 0, K_g γ → ∞ (§3.2.1, Eq. 25–29): the directions differ by K_g/(2ĝ²)."""
    task, gaps = Noisy(), []
    for ratio in (1e-4, 1e-6, 1e-8):
        weight = nn.Parameter(torch.full((7,), 0.1, dtype=F64))
        opt = poco.VSGD([weight], lr=1e-3, gamma=ratio**-2, K_g=ratio)
        worst = 0.0
        for step in range(50):
            opt.zero_grad()
            task.loss(weight, step).backward()
            before = weight.detach().clone()
            opt.step()
            assert weight.grad is not None
            worst = max(worst, float(((before - weight.detach()) / 1e-3 - weight.grad.sign()).abs().median()))
        gaps.append(worst)
    rates = [math.log10(a / b) / 2 for a, b in itertools.pairwise(gaps)]
    assert all(0.97 < rate < 1.03 for rate in rates), (gaps, rates)
