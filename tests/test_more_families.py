"""Poisson, negative binomial, Weibull, Laplace, von Mises–Fisher, normal–gamma and Wishart weights, against others."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributions as td
from family_cases import specimen_of

import expfam_poco as poco
from expfam_poco.families import (
    Laplace,
    NegativeBinomial,
    NormalGamma,
    Poisson,
    VonMisesFisher,
    Weibull,
    Wishart,
)
from expfam_poco.families.discrete.counts import poisson_quantile
from expfam_poco.families.von_mises_fisher import _log_sinhc, _ratio_over, _ratio_slope


def test_densities_are_those_of_torch(float64: None) -> None:
    x, counts = torch.tensor([0.2, 1.0, 3.0]), torch.tensor([0.0, 1.0, 7.0])
    cases: list[tuple[Any, Any, Any, Any]] = [
        (Weibull(1.7), Weibull.State(torch.tensor(-2.0)), td.Weibull(2.0 ** (-1 / 1.7), 1.7), x),
        (Laplace(0.5), Laplace.State(torch.tensor(-2.0)), td.Laplace(0.5, 0.5), x),
        (Poisson(), Poisson.State(torch.tensor(3.0).log()), td.Poisson(3.0), counts),
        (NegativeBinomial(2.5), NegativeBinomial.State(torch.tensor(0.3).log()), td.NegativeBinomial(2.5, 0.3), counts),
    ]
    for family, state, q, at in cases:
        torch.testing.assert_close(family.log_prob(state, at), q.log_prob(at))
        torch.testing.assert_close(family.expectation(state), q.mean)
        torch.testing.assert_close(family.variance(state), q.variance)


def test_a_wishart_is_torch_s(float64: None) -> None:
    b = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    state = Wishart.State(b, torch.tensor(1.5))  # a = 2, so 4 degrees of freedom
    q = td.Wishart(4.0, covariance_matrix=0.5 * torch.linalg.inv(b))
    x = torch.tensor([[1.0, 0.2], [0.2, 0.7]])
    family = Wishart()
    torch.testing.assert_close(family.log_prob(state, x), q.log_prob(x))
    torch.testing.assert_close(family.expectation(state), q.mean)
    torch.testing.assert_close(family.variance(state), q.variance)
    torch.testing.assert_close(family.entropy(state), q.entropy())


def test_a_normal_gamma_is_a_gamma_and_a_normal(float64: None) -> None:
    state = NormalGamma.State(*(torch.tensor(v) for v in (3.0, 2.0, -1.0, 0.5)))
    theta = torch.tensor([[-0.5, 1.3], [2.0, 0.4]])
    x, tau = theta.unbind(-1)
    expected = td.Gamma(3.0, 2.0).log_prob(tau) + td.Normal(-1.0, (0.5 * tau).rsqrt()).log_prob(x)
    torch.testing.assert_close(NormalGamma().log_prob(state, theta), expected)


def test_quantiles_of_poissons_are_scipy_s() -> None:
    rng = np.random.default_rng(0)
    mean = np.exp(rng.uniform(-8.0, 11.0, 20_000))
    u = np.concatenate([rng.uniform(size=10_000), 10.0 ** -rng.uniform(0.0, 9.9, 5000), 1.0 - 10.0 ** -rng.uniform(0.0, 9.9, 5000)])  # fmt: skip  # noqa: E501
    u = u.clip(2.0**-33, 1.0 - 2.0**-33)
    found = poisson_quantile(torch.tensor(mean), torch.tensor(u)).numpy()
    assert np.array_equal(found, scipy.stats.poisson.ppf(u, mean))


def test_functions_of_the_concentration_keep_their_digits(float64: None) -> None:
    """log(sinh κ/κ), ρ/κ and ρ′ by power series and by closed forms, against differences and each other at the seam."""
    kappa = torch.tensor([1e-6, 0.1, 0.2999, 0.3001, 2.0, 30.0, 1e4])
    slope = torch.func.grad(lambda k: _log_sinhc(k * k).sum())(kappa)
    torch.testing.assert_close(_ratio_over(kappa) * kappa, slope, rtol=1e-9, atol=1e-12)
    bend = torch.func.grad(lambda k: (_ratio_over(k) * k).sum())(kappa)
    torch.testing.assert_close(_ratio_slope(kappa), bend, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(_log_sinhc(kappa[4:5] ** 2), torch.tensor([math.log(math.sinh(2.0) / 2.0)]))


def test_one_step_is_bayes_rule(float64: None) -> None:
    """Normal data: the losses of NormalGamma and Wishart are linear in T, so a regressed step of rate 1 is exact."""
    torch.manual_seed(0)
    y = 2.0 + 0.7 * torch.randn(50)
    weight = torch.nn.Parameter(torch.tensor([[0.0, 1.0]]))
    prior = NormalGamma().centred_at(torch.tensor([[0.0, 1.0]]), 2.0)
    optimizer = poco.PosteriorCorrected([("w", weight)], "normal_gamma", lr=1.0, ess=50.0, prior=prior,
                                        curvature="regression", mc_samples=12, seed=0, retraction="plain")  # fmt: skip
    optimizer.step(lambda: (0.5 * weight[0, 1] * (y - weight[0, 0]) ** 2 - 0.5 * weight[0, 1].log()).mean())
    (a, b, m, k) = optimizer.posterior_states()["w"]
    n, mean = 50.0, y.mean()
    expected = (2.0 + n / 2, 2.0 + 0.5 * ((y - mean) ** 2).sum() + 0.5 * 2.0 * n * mean**2 / (2.0 + n),
                n * mean / (2.0 + n), 2.0 + n)  # fmt: skip
    for found, value in zip((a, b, m, k), expected, strict=True):
        torch.testing.assert_close(found, torch.as_tensor(value).reshape(1), rtol=1e-5, atol=0.0)


# ---- steps -----------------------------------------------------------------------------------------------------


def test_no_step_turns_a_direction_round(float64: None) -> None:
    """Rates up to 10, 1000 directions, 30 steps: the new direction is less than a right angle away."""
    family, generator = VonMisesFisher(), torch.Generator().manual_seed(0)
    state = family.centred_at(torch.nn.functional.normalize(torch.randn(1000, 3, generator=generator), dim=-1), 3.0)
    for _ in range(30):
        rate = 10.0 * float(torch.rand((), generator=generator))
        step = state.theta.norm(dim=-1, keepdim=True) * torch.randn(1000, 3, generator=generator)
        moved = family.retract(state, family.Site(step), (rate,))
        assert ((family.point(moved) * family.point(state)).sum(-1) > 0.0).all()
        state = family.State(moved.theta.clamp(-1e3, 1e3))


@pytest.mark.parametrize("name", [n for n in poco.families_available() if n != "product"])
def test_a_thousand_random_steps_leave_no_domain(name: str) -> None:
    """Steps along combinations of the statistics' values, at rates up to 10, each from another member."""
    specimen = specimen_of(poco.resolve_family(name), seed=1).like(torch.float32, torch.device("cpu"))
    family, rng = specimen.family, np.random.default_rng(0)
    weights = specimen.batch.numel() or 1
    for step in range(-(-1000 // (weights * len(specimen.states) * 4))):
        direction = specimen.direction(step)
        for state in specimen.states:
            for _ in range(4):
                site = family.site_from_nat(family.Nat(*direction), state)
                rate = float(rng.uniform(-10.0, 10.0))
                moved = family.retract(state, site, family.per_block(rate, rate))
                assert bool(family.in_domain(moved)), (rate, state)


# ---- points that would erase weights ------------------------------------------------------------------------------


def test_weights_that_a_fixed_point_would_erase_are_refused() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    for family in (Laplace(), Forgetful()):
        with pytest.raises(ValueError, match="would erase them; write the model's weights as a constant plus"):
            poco.PosteriorCorrected([weight], family, lr=0.1, ess=10.0).step(lambda: weight.square().sum())
        assert torch.equal(weight.detach(), torch.tensor([3.0, -2.0]))
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = poco.PosteriorCorrected([weight], "laplace", lr=0.1, ess=10.0, weight_decay=0.1)
    optimizer.step(lambda: weight.square().sum())
    with torch.no_grad():
        weight += 1.0
    with pytest.raises(ValueError, match="every Laplace has its point where it was"):
        optimizer.step(lambda: weight.square().sum())


class Forgetful(poco.ExponentialFamily):
    """Of the scale alone, without a word of it."""

    domain = Laplace.domain
    State = Statistics = Nat = Mean = Site = Laplace.Statistics
    noise_kind = "uniform"
    statistics, log_partition, sample = (vars(Laplace)[n] for n in ("statistics", "log_partition", "sample"))
    location = 0.0

    def centred_at(self, theta, precision=None):
        return self.State(-torch.ones_like(theta))

    def point(self, state):
        return torch.zeros_like(state.size)


# ---- the error of a mega-batch's mean --------------------------------------------------------------------------


def logistic(draws: int, alpha: Any, steps: int = 40) -> tuple[Any, dict[str, float]]:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = (x.sum(-1) > 0.0).float()
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = poco.PosteriorCorrected([("w", weight)], "isotropic_gaussian", lr=0.1, ess=64.0, alpha=alpha, seed=1)

    def closure(rows: Any) -> Any:
        return lambda: torch.nn.functional.binary_cross_entropy_with_logits(x[rows] @ weight, y[rows])

    for step in range(steps):
        if step % 20 == 0:
            optimizer.refresh([closure(torch.arange(64))], draws=draws)
        optimizer.step(closure(torch.randint(64, (4,))))
    return optimizer, optimizer.diagnostics()


def test_draws_of_a_refresh_are_averaged_and_their_error_is_measured() -> None:
    """ḡ_out of K draws is the mean of those that K refreshes at the same q would have found, Var that of the mean."""
    weight = torch.nn.Parameter(torch.tensor([0.5, -1.0]))

    def made(**choices: Any) -> Any:
        weight.data = torch.tensor([0.5, -1.0])
        return poco.PosteriorCorrected([("w", weight)], "isotropic_gaussian", lr=0.1, ess=10.0, seed=3, **choices)

    def closure() -> Any:
        return (weight**4).sum()

    together, apart = made(), made()
    together.refresh([closure], draws=5)
    sites = []
    for _ in range(5):
        apart.refresh([closure])
        sites.append(apart.state[weight]["memory"].site[0].clone())
    stacked = torch.stack(sites)
    torch.testing.assert_close(together.state[weight]["memory"].site[0], stacked.mean(0))
    error = float(stacked.var(0).sum() / 5.0)
    assert together._meter.outer["w"][together.state[weight]["memory"].site._fields[0]] == pytest.approx(
        error, rel=1e-4
    )
    with pytest.raises(ValueError, match="draws=0: give an integer, 1 or larger"):
        apart.refresh([closure], draws=0)


def test_the_adaptive_alpha_counts_the_error_of_the_mean_and_stays_off_where_it_is_all() -> None:
    few, many = logistic(2, "adaptive")[1], logistic(64, "adaptive")[1]
    assert few["alpha"] < 0.5 * many["alpha"]
    optimizer, numbers = logistic(2, 1.0)
    assert numbers["total_variance_ratio.theta"] > numbers["variance_ratio.theta"] > 0.0
    saved = optimizer.state_dict()
    assert "total_variance_ratio.theta" not in logistic(1, 1.0)[1]
    again = logistic(1, 1.0, steps=1)[0]
    again.load_state_dict(saved)
    assert again.diagnostics()["total_variance_ratio.theta"] == numbers["total_variance_ratio.theta"]
