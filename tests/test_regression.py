"""Natural gradients by regression: conjugate models exact in one step of the optimizer, and the bias elsewhere."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints
from user_families import Exponential

import expfam_poco as poco
from expfam_poco.families import Bernoulli
from expfam_poco.noise import NoiseKey


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class NormalGammaStatistics(NamedTuple):
    log: Tensor
    tau: Tensor
    product: Tensor
    square: Tensor


class NormalGamma(poco.ExponentialFamily):
    """θ = (μ, τ) with τ ~ Γ(a, b) and μ ~ N(m, 1/(κτ)): T = (log τ, τ, τμ, τμ²), h = τ^{-1/2}: a user's family."""

    Statistics = NormalGammaStatistics
    event_dim = 1
    statistic_dims = (0, 0, 0, 0)
    support = constraints.independent(constraints.cat([constraints.real, constraints.positive], -1, [1, 1]), 1)

    def statistics(self, theta: Tensor) -> NormalGammaStatistics:
        mu, tau = theta.unbind(-1)
        return NormalGammaStatistics(tau.log(), tau, tau * mu, tau * mu * mu)

    def log_base_measure(self, theta: Tensor) -> Tensor:
        return -0.5 * theta[..., 1].log() - 0.5 * math.log(2.0 * math.pi)

    def usual(self, nat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(m, κ, a, b)."""
        kappa = -2.0 * nat.square
        return nat.product / kappa, kappa, nat.log, -nat.tau - 0.5 * nat.product**2 / kappa

    def log_partition(self, nat: Any) -> Tensor:
        _, kappa, a, b = self.usual(nat)
        return torch.lgamma(a) - a * b.log() - 0.5 * kappa.log()

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        m, kappa, a, b = self.usual(state)
        gamma = poco.resolve_family("gamma")
        u = torch.special.ndtr(noise[..., 1])
        tau = gamma.sample(gamma.State(a, -b), u)
        return torch.stack([m + noise[..., 0] / (kappa * tau).sqrt(), tau], -1)

    def nat_of(self, m: Any, kappa: Any, a: Any, b: Any) -> NormalGammaStatistics:
        return NormalGammaStatistics(a, -b - 0.5 * kappa * m * m, kappa * m, -0.5 * kappa)

    def centred_at(self, theta: Tensor, precision: Any = None) -> NormalGammaStatistics:
        mu, tau = theta.unbind(-1)
        return self.nat_of(mu, torch.full_like(mu, 2.0), torch.full_like(mu, 4.0), 4.0 / tau)

    def point(self, state: Any) -> Tensor:
        m, _, a, b = self.usual(state)
        return torch.stack([m, a / b], -1)


class Problem(NamedTuple):
    """A conjugate model: where the weights start, the prior, the loss summed over the data, and the exact posterior."""

    family: Any
    start: Tensor
    prior: Any
    loss: Any
    exact: Any
    choices: dict[str, Any] = {}  # noqa: RUF012


def normal_normal() -> Problem:
    family, y = poco.resolve_family("diagonal_gaussian"), 1.0 + data(20, 3)
    prior = family.State(torch.zeros(3).double(), torch.full((3,), 0.5).double())
    exact = family.State(2.0 * y.sum(0) / 40.5, torch.full((3,), 40.5).double())
    return Problem(family, torch.full((3,), 4.0).double(), prior, lambda t: (t - y).square().sum(), exact)


def linear_regression(curvature: str) -> Problem:
    family, x = poco.resolve_family("full_gaussian"), data(30, 4)
    y = x.sum(1) + data(30, 1)[:, 0]
    eye = torch.eye(4).double()
    exact = family.State(torch.linalg.solve(eye + x.mT @ x, x.mT @ y), eye + x.mT @ x)
    choices = {"curvature": curvature, "mc_samples": 1 if curvature == "exact_regression" else 6}
    start, prior = torch.zeros(4).double(), family.State(torch.zeros(4).double(), eye)
    return Problem(family, start, prior, lambda t: 0.5 * (x @ t - y).square().sum(), exact, choices)


def beta_bernoulli() -> Problem:
    family, ones = poco.resolve_family("beta"), torch.tensor([3.0, 11.0, 0.0]).double()
    exact = torch.stack([2.0 + ones, 2.0 + 12.0 - ones], -1)
    make = lambda a: family.from_nat(family.to_natural(poco_beta_mean(a)))  # noqa: E731
    prior = make(torch.full((3, 2), 2.0).double())
    return Problem(
        family, torch.full((3,), 0.3).double(), prior,
        lambda t: -(ones * t.log() + (12.0 - ones) * torch.log1p(-t)).sum(), make(exact),
    )  # fmt: skip


def poco_beta_mean(a: Tensor) -> Any:
    """E[log θ], E[log(1−θ)] of Beta(a₀, a₁)."""
    return poco.resolve_family("beta").Mean(*(torch.digamma(a) - torch.digamma(a.sum(-1, keepdim=True))).unbind(-1))


def gamma_poisson() -> Problem:
    family, counts = poco.resolve_family("gamma"), torch.tensor([30.0, 2.0, 151.0]).double()
    prior = family.State(torch.full((3,), 2.0).double(), torch.full((3,), -0.5).double())
    exact = family.State(2.0 + counts, torch.full((3,), -10.5).double())
    start = torch.full((3,), 4.0).double()
    return Problem(family, start, prior, lambda t: (10.0 * t - counts * t.log()).sum(), exact)


def dirichlet_categorical() -> Problem:
    family, counts = (
        poco.resolve_family("dirichlet"),
        torch.tensor([[3.0, 0.0, 9.0, 1.0], [1.0, 1.0, 2.0, 20.0]]).double(),
    )
    start = torch.full((2, 4), 0.25).double()
    prior = family.centred_at(start, 4.0)
    exact = type(prior)(prior[0] + counts)
    return Problem(family, start, prior, lambda t: -(counts * t.log()).sum(), exact)


def normal_gamma() -> Problem:
    family, y = NormalGamma(), 2.0 + 0.5 * data(25, 1)[:, 0]
    kappa, a, b, m = (torch.tensor([v]).double() for v in (1.0, 2.0, 1.0, 0.0))
    n, mean = 25.0, y.mean()
    after = (kappa * m + n * mean) / (kappa + n)
    rate = b + 0.5 * (y - mean).square().sum() + 0.5 * kappa * n * (mean - m) ** 2 / (kappa + n)
    exact = family.nat_of(after, kappa + n, a + 0.5 * n, rate)

    def loss(t: Tensor) -> Tensor:
        mu, tau = t[..., 0], t[..., 1]
        return 0.5 * tau * (y - mu).square().sum() - 0.5 * n * tau.log().sum()

    return Problem(family, torch.tensor([[1.0, 2.0]]).double(), family.nat_of(m, kappa, a, b), loss, exact)


PROBLEMS = {
    "normal_normal": normal_normal,
    "linear_regression": lambda: linear_regression("regression"),
    "linear_regression_exact": lambda: linear_regression("exact_regression"),
    "beta_bernoulli": beta_bernoulli,
    "gamma_poisson": gamma_poisson,
    "dirichlet_categorical": dirichlet_categorical,
    "normal_gamma": normal_gamma,
}


@pytest.mark.parametrize("noise", ["shared", "antithetic"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_conjugate_model_is_exact_in_one_step_from_the_fewest_draws(name: str, noise: str) -> None:
    problem, n = PROBLEMS[name](), 8.0
    weights = torch.nn.Parameter(problem.start.clone())
    choices = {"curvature": "regression", "mc_samples": 2, **problem.choices}
    opt = poco.PosteriorCorrected(
        [weights],
        problem.family,
        lr=1.0,
        ess=n,
        prior=problem.prior,
        retraction="plain",
        noise=noise,
        seed=0,
        **choices,
    )
    opt.step(lambda: problem.loss(weights) / n)
    (found,) = opt.posterior_states().values()
    for mine, exact in zip(found, problem.exact, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-8, atol=1e-8)


def test_a_discrete_weight_is_exact_from_losses() -> None:
    weights = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    opt = poco.PosteriorCorrected(
        [weights], Bernoulli(strength=0.5), lr=1.0, ess=5.0, curvature="score_regression", mc_samples=8, seed=0
    )
    opt.step(lambda: 0.3 * weights.sum() + 7.0)
    (found,) = opt.posterior_states().values()
    torch.testing.assert_close(found.theta, torch.tensor([-1.5], dtype=torch.float64), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["diagonal_gaussian", "gamma"])
def test_its_bias_is_of_order_one_over_the_draws(name: str) -> None:
    # ℓ = θ³ outside the span; the mean of many estimates (one a weight) from K and 4K draws, against a very long one.
    family, many = poco.resolve_family(name), 3000

    def estimates(draws: int, count: int) -> Tensor:
        state = family.centred_at(torch.full((count,), 1.0, dtype=torch.float64), 6.0)
        noise = family.noise((count,), draws, NoiseKey(2), dtype=torch.float64)
        theta = family.sample(state, noise)
        site = family.regressed_natural_gradient(state, poco.Draws(noise, theta, theta[:, 0], 3.0 * theta * theta))
        return torch.stack(list(site))

    truth = estimates(40_000, 1)
    few, more = (estimates(draws, many) for draws in (6, 24))
    doubt = 4.0 * (few.std(1) + more.std(1)) / math.sqrt(many)
    bias, less = ((found.mean(1) - truth[:, 0]).abs() for found in (few, more))
    assert bool((bias > doubt).any()), "the bias is there"
    assert bool((less <= bias / 3.0 + doubt).all())
    assert bool((bias <= 0.3 * truth[:, 0].abs() + doubt).all())


def test_too_few_draws_and_families_without_are_one_sentence() -> None:
    weights = torch.nn.Parameter(torch.ones(3))
    cases = (
        ("full_gaussian", "regression", 3, "Regression of FullGaussian needs at least 4 draws"),
        ("gamma", "regression", 1, "Regression of Gamma needs at least 2 draws"),
        ("gamma", "score_regression", 2, "ScoreRegression of Gamma needs at least 3 draws"),
        ("low_rank_gaussian", "regression", 9, "'regression' is not an estimator for LowRankGaussian"),
        ("bernoulli", "regression", 9, "'regression' is not an estimator for Bernoulli"),
    )
    for family, curvature, draws, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            poco.PosteriorCorrected([weights], family, 0.1, 1.0, curvature=curvature, mc_samples=draws)
    with pytest.raises(ValueError, match="noise='zero': Regression measures with the noise"):
        poco.PosteriorCorrected([weights], "gamma", 0.1, 1.0, curvature="regression", mc_samples=2, noise="zero")
    one = Exponential()
    assert one.least_draws(torch.Size([3])) == 1  # one statistic: a single slope tells it
