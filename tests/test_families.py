"""The built-in families against closed forms of others (torch, scipy, mpmath), and where numbers get extreme."""

import math
from typing import Any

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor
from user_families import Categorical as UserCategorical

import expfam_poco as poco
from expfam_poco.families import (
    Bernoulli,
    DiagonalGaussian,
    FullGaussian,
    GaussianSite,
    GaussianState,
    IsotropicGaussian,
    Relaxed,
    StraightThrough,
)
from expfam_poco.families.discrete.binary_estimators import log_sech_squared
from expfam_poco.families.discrete.level_categorical import SignBernoulli
from expfam_poco.noise import NoiseKey


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 3e-5, "atol": 3e-5}


def random_precision(size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    factor = torch.randn(size, size, dtype=torch.float64)
    matrix = scale * (factor @ factor.T + torch.eye(size, dtype=torch.float64))
    return (0.5 * (matrix + matrix.T)).to(dtype)  # symmetric bit for bit


# ---- closed forms -----------------------------------------------------------------------------------------


def test_diagonal_gaussian_is_a_normal(dtype: torch.dtype) -> None:
    family = DiagonalGaussian()
    state, prior = (GaussianState(torch.randn(3, 2, dtype=dtype), torch.rand(3, 2, dtype=dtype) + 0.3) for _ in "ab")
    q, p = (torch.distributions.Normal(s.mean, s.precision.rsqrt()) for s in (state, prior))
    theta = torch.randn(5, 3, 2, dtype=dtype)
    torch.testing.assert_close(family.log_prob(state, theta), q.log_prob(theta), **tolerance(dtype))
    torch.testing.assert_close(family.entropy(state), q.entropy(), **tolerance(dtype))
    torch.testing.assert_close(family.kl(state, prior), torch.distributions.kl_divergence(q, p), **tolerance(dtype))
    frozen = scipy.stats.norm(state.mean.double().numpy(), state.precision.double().rsqrt().numpy())
    expected = torch.from_numpy(frozen.logpdf(theta.double().numpy())).to(dtype)
    torch.testing.assert_close(family.log_prob(state, theta), expected, **tolerance(dtype))


def test_full_gaussian_is_a_multivariate_normal(dtype: torch.dtype) -> None:
    family, size = FullGaussian(), 4
    state, prior = (GaussianState(torch.randn(size, dtype=dtype), random_precision(size, dtype)) for _ in "ab")
    q, p = (torch.distributions.MultivariateNormal(s.mean, precision_matrix=s.precision) for s in (state, prior))
    theta = torch.randn(5, size, dtype=dtype)
    torch.testing.assert_close(family.log_prob(state, theta), q.log_prob(theta), **tolerance(dtype))
    torch.testing.assert_close(family.entropy(state), q.entropy(), **tolerance(dtype))
    torch.testing.assert_close(family.kl(state, prior), torch.distributions.kl_divergence(q, p), **tolerance(dtype))
    mean = family.to_mean(family.to_nat(state))
    second = q.covariance_matrix + torch.outer(state.mean, state.mean)
    torch.testing.assert_close(mean.theta_theta, second, **tolerance(dtype))


def test_full_gaussian_of_a_diagonal_precision_is_the_diagonal_gaussian(dtype: torch.dtype) -> None:
    mean, precision = torch.randn(3, dtype=dtype), torch.rand(3, dtype=dtype) + 0.5
    full, diagonal = GaussianState(mean, precision.diag()), GaussianState(mean, precision)
    noise = torch.randn(4, 3, dtype=dtype)
    theta = FullGaussian().sample(full, noise)
    torch.testing.assert_close(theta, DiagonalGaussian().sample(diagonal, noise), **tolerance(dtype))
    expected = DiagonalGaussian().log_prob(diagonal, theta).sum(-1)
    torch.testing.assert_close(FullGaussian().log_prob(full, theta), expected, **tolerance(dtype))


@pytest.mark.parametrize("precision", [0.3, 1.0, 1e4])
def test_isotropic_gaussian_is_a_normal_of_fixed_precision(dtype: torch.dtype, precision: float) -> None:
    family = IsotropicGaussian(precision)
    state, prior = family.centred_at(torch.randn(3, dtype=dtype)), family.centred_at(torch.randn(3, dtype=dtype))
    q, p = (torch.distributions.Normal(s.mean, precision**-0.5) for s in (state, prior))
    theta = family.sample(state, torch.randn(5, 3, dtype=dtype))
    torch.testing.assert_close(family.log_prob(state, theta), q.log_prob(theta), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(family.entropy(state), q.entropy(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(family.kl(state, prior), torch.distributions.kl_divergence(q, p), **tolerance(dtype))


def test_isotropic_gaussian_takes_a_prior_of_another_precision(dtype: torch.dtype) -> None:
    """The L2 term of SVRG: ∇̃KL = s₀ (m − m₀), and the KL of two Normals whose gradient in m it is."""
    family = IsotropicGaussian(4.0)
    state = family.centred_at(torch.randn(3, dtype=dtype))
    prior = family.centred_at(torch.randn(3, dtype=dtype), 0.25)
    p = torch.distributions.Normal(prior.mean, 2.0)
    mean = state.mean.clone().requires_grad_(True)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, 0.5), p)
    torch.testing.assert_close(family.kl(state, prior), kl.detach(), **tolerance(dtype))
    (slope,) = torch.autograd.grad(kl.sum(), mean)
    torch.testing.assert_close(family.kl_gradient(state, prior).theta, slope, **tolerance(dtype))


def test_bernoulli_is_a_bernoulli_of_half_theta_plus_one(dtype: torch.dtype) -> None:
    family = Bernoulli()
    state, prior = (family.State(2.0 * torch.randn(3, 2, dtype=dtype)) for _ in "ab")
    q, p = (torch.distributions.Bernoulli(logits=2.0 * s.theta) for s in (state, prior))
    theta = torch.where(torch.rand(5, 3, 2, dtype=dtype) < 0.5, 1.0, -1.0).to(dtype)
    torch.testing.assert_close(family.log_prob(state, theta), q.log_prob(0.5 * (theta + 1.0)), **tolerance(dtype))
    torch.testing.assert_close(family.entropy(state), q.entropy(), **tolerance(dtype))
    torch.testing.assert_close(family.kl(state, prior), torch.distributions.kl_divergence(q, p), **tolerance(dtype))
    torch.testing.assert_close(family.to_mean(state).theta, 2.0 * q.mean - 1.0, **tolerance(dtype))


@pytest.mark.parametrize("name", ["diagonal_gaussian", "full_gaussian", "isotropic_gaussian"])
def test_a_mean_without_a_natural_parameter_is_refused(name: str) -> None:
    family = poco.resolve_family(name)
    mean = family.to_mean(family.to_nat(family.centred_at(torch.ones(2))))
    if name == "isotropic_gaussian":
        assert family.to_natural(mean).theta.tolist() == [1.0, 1.0]  # every mean has one
        return
    with pytest.raises(ValueError, match=r"no natural parameter of .* has this expectation"):
        family.to_natural(mean._replace(theta_theta=0.0 * mean.theta_theta))


# ---- the full Gaussian's precision ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("kind", ["random", "negative", "rank one", "minus rank one"])
def test_second_order_retraction_keeps_the_precision_positive_definite(kind: str, scale: float) -> None:
    family, size = FullGaussian(), 6
    state = GaussianState(torch.zeros(size).double(), random_precision(size, torch.float64))
    vector = torch.randn(size).double()
    curvature = {
        "random": torch.randn(size, size).double(),
        "negative": -random_precision(size, torch.float64),
        "rank one": torch.outer(vector, vector),
        "minus rank one": -torch.outer(vector, vector),
    }[kind]
    direction = GaussianSite(torch.randn(size).double(), scale * curvature)
    moved = family.retract(state, direction, (1.0, 1.0))
    assert family.in_domain(moved)
    assert torch.equal(moved.precision, moved.precision.mT)
    symmetric = 0.5 * scale * (curvature + curvature.mT)
    exact = state.precision + symmetric + 0.5 * symmetric @ torch.linalg.solve(state.precision, symmetric)
    torch.testing.assert_close(moved.precision, exact, rtol=1e-9, atol=1e-9 * scale * scale)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e3])
def test_second_order_retraction_in_float32(scale: float) -> None:
    family, size = FullGaussian(), 5
    state = GaussianState(torch.zeros(size), random_precision(size, torch.float32))
    for sign in (1.0, -1.0):
        direction = GaussianSite(torch.randn(size), sign * scale * random_precision(size, torch.float32))
        assert family.in_domain(family.retract(state, direction, (1.0, 1.0)))


def test_plain_retraction_out_of_the_domain_is_reported_and_raises_nothing() -> None:
    family = FullGaussian()
    state = family.centred_at(torch.zeros(2).double(), 1.0)
    outward = GaussianSite(torch.ones(2).double(), -2.0 * torch.eye(2).double())
    moved = family.retract(state, outward, (1.0, 1.0), variant="plain")
    assert not family.in_domain(moved) and family.in_domain(moved).shape == ()
    assert torch.isnan(family.sample(moved, torch.ones(1, 2).double())).all()
    assert torch.isnan(family.log_partition(family.to_nat(moved)))
    assert not family.in_domain(state._replace(mean=state.mean * math.nan))
    assert not family.in_domain(state._replace(precision=state.precision + torch.tensor([[0.0, 0.5], [0.0, 0.0]])))


@pytest.mark.parametrize("family", [DiagonalGaussian(), FullGaussian()])
@pytest.mark.parametrize("precision", [1e-8, 1.0, 1e10])
def test_gaussians_in_their_chart_are_sound_in_float32_at_any_precision(family: Any, precision: float) -> None:
    state = family.centred_at(torch.tensor([0.5, -2.0]), precision)
    noise = torch.tensor([[1.0, -1.0]])
    theta = family.sample(state, noise)
    expected = state.mean + noise * precision**-0.5
    torch.testing.assert_close(theta, expected)
    prior = family.centred_at(torch.zeros(2), 2.0 * precision)
    expected_kl = 0.5 * (2.0 + 2.0 * precision * state.mean.double() ** 2 - 1.0 - math.log(2.0))
    kl = family.kl(state, prior).double()
    torch.testing.assert_close(kl, expected_kl.sum() if family.joint else expected_kl, rtol=1e-5, atol=1e-5)


# ---- Bernoulli numerics -----------------------------------------------------------------------------------

GRID = [0.0, 1e-6, 1e-3, 0.3, 1.0, 3.0, 8.0, 10.0, 20.0, 30.0, 40.0]


def exactly(function: Any) -> Tensor:
    """A function of mpmath numbers on ±GRID with 60 digits, as float64."""
    with mpmath.workdps(60):
        return torch.tensor([float(function(mpmath.mpf(s * x))) for x in GRID for s in (1, -1)], dtype=torch.float64)


def on_grid(dtype: torch.dtype) -> Tensor:
    return torch.tensor([s * x for x in GRID for s in (1, -1)], dtype=torch.float64).to(dtype)


BERNOULLI_VALUES = {
    "log_partition": (lambda f, lam: f.log_partition(lam), lambda x: mpmath.log(2 * mpmath.cosh(x))),
    "to_mean": (lambda f, lam: f.to_mean(lam).theta, mpmath.tanh),
    "log_prob(+1)": (
        lambda f, lam: f.distribution(lam).base_dist.log_prob(torch.ones_like(lam.theta)),
        lambda x: -mpmath.log1p(mpmath.exp(-2 * x)),
    ),
    "log sech²": (lambda f, lam: log_sech_squared(lam.theta), lambda x: -2 * mpmath.log(mpmath.cosh(x))),
    "variance": (lambda f, lam: f.distribution(lam).base_dist.variance, lambda x: mpmath.sech(x) ** 2),
}


@pytest.mark.parametrize("value", BERNOULLI_VALUES)
def test_bernoulli_values_are_accurate_up_to_lambda_40(value: str, dtype: torch.dtype) -> None:
    ours, theirs = BERNOULLI_VALUES[value]
    lam = on_grid(dtype)
    with mpmath.workdps(60):
        expected = torch.tensor([float(theirs(mpmath.mpf(float(x)))) for x in lam], dtype=torch.float64)
    found = ours(Bernoulli(), Bernoulli.State(lam)).double()
    assert torch.isfinite(found).all()
    # exp of a number of size 80 turns its absolute rounding into a relative error of 80 eps.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=100 * eps, atol=2 * eps if "log" in value else 0.0)


def test_bernoulli_entropy_and_kl_are_finite_up_to_lambda_40(dtype: torch.dtype) -> None:
    family = Bernoulli()
    lam = on_grid(dtype)
    eps = torch.finfo(dtype).eps
    entropy = exactly(lambda x: mpmath.log(2 * mpmath.cosh(x)) - x * mpmath.tanh(x))
    torch.testing.assert_close(family.entropy(family.State(lam)).double(), entropy, rtol=0.0, atol=100 * eps)
    every, other = lam.repeat_interleave(len(lam)), lam.repeat(len(lam))
    kl = family.kl(family.State(every), family.State(other))
    assert torch.isfinite(kl).all() and (kl > -100 * eps).all()
    assert float(kl.max()) == pytest.approx(80.0, rel=1e-5)


def test_relaxed_estimate_is_finite_for_saturated_weights_and_small_temperatures(dtype: torch.dtype) -> None:
    """What the published code loses in float32: 1 − tanh² underflows, and 10⁻¹⁰ takes its place."""
    family = Bernoulli()
    for lam in (0.0, 10.0, 40.0):
        for temperature in (1.0, 0.1, 1e-3):
            state = family.State(torch.full((1,), lam, dtype=dtype))
            noise = torch.tensor([[-lam], [-lam + 1e-3], [0.3], [5.0]], dtype=dtype)
            estimator = Relaxed(temperature)
            points = estimator.points(family, state, noise)
            draws = poco.Draws(noise, points, torch.zeros(4, dtype=dtype), torch.ones_like(noise))
            each = [
                estimator.natural_gradient(
                    family, state, draws._replace(noise=row[None], grad=torch.ones_like(row[None]))
                )
                for row in noise
            ]
            found = torch.stack([site.theta for site in each]).double().flatten()
            with mpmath.workdps(60):
                x = [mpmath.mpf(float(e)) for e in (state.theta + noise).flatten()]
                ratios = [(mpmath.sech(v / temperature) / mpmath.sech(lam)) ** 2 / temperature for v in x]
            expected = torch.tensor([float(v) for v in ratios], dtype=torch.float64)
            scale = 300 * torch.finfo(dtype).eps * (1.0 + 5.0 / temperature)
            torch.testing.assert_close(found, expected, rtol=scale, atol=1e-30)


def test_straight_through_returns_the_gradient_at_the_hard_weights() -> None:
    family, state = Bernoulli(), Bernoulli.State(torch.tensor([0.5, -2.0]))
    noise = torch.tensor([[-1.0, 0.0], [0.0, 3.0]])
    points = StraightThrough().points(family, state, noise)
    assert points.tolist() == [[-1.0, -1.0], [1.0, 1.0]]
    draws = poco.Draws(noise, points, torch.zeros(2), torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert StraightThrough().natural_gradient(family, state, draws).theta.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("point_estimate", ["mode", "mean"])
def test_point_and_recentre_of_bernoulli(point_estimate: str) -> None:
    family = Bernoulli(point_estimate)
    state = family.State(torch.tensor([-2.0, 0.0, 1.5]))
    expected = [-1.0, 1.0, 1.0] if point_estimate == "mode" else torch.tanh(state.theta).tolist()
    assert family.point(state).tolist() == expected
    moved = family.recentre(state, torch.tensor([1.0, -1.0, -1.0]))
    assert family.in_domain(moved)
    assert family.point(moved).sign().tolist() == [1.0, -1.0, -1.0]  # also from λ = 0
    if point_estimate == "mode":
        torch.testing.assert_close(moved.theta.abs(), torch.tensor([2.0, 0.0, 1.5]))


def test_bernoulli_samples_are_signs_of_the_right_frequency() -> None:
    family, state = Bernoulli(), Bernoulli.State(torch.tensor([-1.0, 0.0, 0.4]))
    theta = family.sample(state, family.noise((3,), 40_000, NoiseKey(0)))
    assert set(theta.unique().tolist()) == {-1.0, 1.0}
    frequency = (theta > 0).double().mean(0)
    expected = torch.sigmoid(2.0 * state.theta.double())
    assert ((frequency - expected).abs() < 5.0 * (expected * (1.0 - expected) / 40_000).sqrt()).all()


# ---- SignBernoulli in Pyro --------------------------------------------------------------------------------


def test_sign_bernoulli_in_a_plate_of_a_pyro_model() -> None:
    lam = torch.tensor([0.5, -1.0, 2.0])

    def model() -> Tensor:
        with pyro.plate("weights", 3):
            return pyro.sample("w", SignBernoulli(lam))

    pyro.set_rng_seed(0)
    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    value = trace.nodes["w"]["value"]
    assert value.shape == (3,) and (value.abs() == 1.0).all()
    torch.testing.assert_close(trace.nodes["w"]["log_prob"], Bernoulli().log_prob(Bernoulli.State(lam), value))
    conditioned = poutine.condition(model, data={"w": torch.tensor([1.0, 1.0, -1.0])})
    expected = Bernoulli().log_prob(Bernoulli.State(lam), torch.tensor([1.0, 1.0, -1.0])).sum()
    torch.testing.assert_close(poutine.trace(conditioned).get_trace().log_prob_sum(), expected)


def test_sign_bernoulli_is_enumerated_by_pyro() -> None:
    """Summing out one sign weight: log Σ_w p(w) N(y | w, 1) is what the enumerated ELBO of an empty guide gives."""
    lam, y = torch.tensor(0.7), torch.tensor(0.3)

    @config_enumerate
    def model() -> None:
        w = pyro.sample("w", SignBernoulli(lam))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    pyro.clear_param_store()
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(model, lambda: None)
    terms = [dist.Normal(w, 1.0).log_prob(y) + SignBernoulli(lam).log_prob(torch.tensor(w)) for w in (-1.0, 1.0)]
    assert -loss == pytest.approx(float(torch.logsumexp(torch.stack(terms), 0)), abs=1e-6)


@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=["one weight", "two"])
def test_variances_of_vectors_are_those_of_their_entries(shape: tuple[int, ...]) -> None:
    """Indicators of categories: p (1 − p) each."""
    family = UserCategorical()
    state = family.State(torch.linspace(-1.0, 1.0, math.prod(shape), dtype=torch.float64).reshape(shape))
    p = family.to_mean(state).theta
    torch.testing.assert_close(family.variance(state), p * (1.0 - p))


# ---- wrong arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [0.0, -1.0, math.inf, math.nan])
def test_isotropic_gaussian_refuses_a_precision_that_is_none(precision: float) -> None:
    with pytest.raises(ValueError, match=r"precision=.*positive and finite"):
        IsotropicGaussian(precision)


@pytest.mark.parametrize("temperature", [0.0, -0.5, math.inf, math.nan])
def test_relaxed_refuses_a_temperature_that_is_none(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature=.*positive, finite number"):
        Relaxed(temperature)


def test_bernoulli_refuses_other_points_and_means() -> None:
    with pytest.raises(ValueError, match="point_estimate='median': choose 'mode' or 'mean'"):
        Bernoulli("median")
    with pytest.raises(ValueError, match="strictly between −1 and 1"):
        Bernoulli().to_natural(Bernoulli.Mean(torch.tensor([0.0, 1.0])))


@pytest.mark.parametrize("estimator", ["relaxed", "straight_through"])
def test_estimators_of_bernoulli_are_for_bernoulli(estimator: str) -> None:
    with pytest.raises(ValueError, match="not an estimator for DiagonalGaussian; choose one of: exact, exact_reg"):
        poco.estimators.resolve_estimator(estimator, DiagonalGaussian())
    with pytest.raises(ValueError, match="use it with the Bernoulli family"):
        poco.estimators.resolve_estimator(Bernoulli.estimators[estimator], DiagonalGaussian())
    with pytest.raises(ValueError, match="choose one of: arm, clipped_straight_through, flip, relaxed, score, "):
        poco.estimators.resolve_estimator("exact", Bernoulli())
