"""Discrete families: the relaxed, straight-through and score estimators, and what shared noise is worth."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from expectations import (
    DISCRETE,
    a_state,
    differences,
    expected_site,
    from_directions,
    logistic,
    problem_at,
    quartic,
    total_loss,
    within_five_standard_errors,
)
from reference import (
    FAMILIES,
    binary_problem,
    directions,
    site_of,
    slope_at_zero,
    support,
    tensor,
)
from torch import Tensor

import expfam_poco as poco
from expfam_poco.noise import NoiseKey

# ---- Bernoulli ----------------------------------------------------------------------------------------------


def over_logistic_noise(function: Callable[[Tensor], Tensor], cells: int = 400_000) -> float:
    """E over ε = ½ log(u/(1−u)): the midpoint rule over ε against the density ½ sech² ε."""
    edges = torch.linspace(-20.0, 20.0, cells + 1, dtype=torch.float64)
    middle = 0.5 * (edges[1:] + edges[:-1])
    density = 0.5 / torch.cosh(middle) ** 2
    return float((density * function(middle)).sum() * (edges[1] - edges[0]))


def relaxed_draw(lam: float, temperature: float, noise: Tensor, slope: float = 1.0) -> Tensor:
    """The engine's relaxed estimate for the loss cθ, one for each noise."""
    family = poco.resolve_family("bernoulli")
    estimator = type(family.estimators["relaxed"])(temperature=temperature)
    state = family.State(tensor([lam]))
    theta = estimator.points(family, state, noise[:, None])

    def one(eps: Tensor, point: Tensor) -> Tensor:
        draws = poco.Draws(eps[None], point[None], slope * point, torch.full_like(point, slope)[None])
        return estimator.natural_gradient(family, state, draws).theta[0]

    return torch.func.vmap(one)(noise[:, None], theta)


@pytest.mark.parametrize("lam", [0.0, 0.7, -1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_relaxed_estimate_is_its_formula(lam: float, temperature: float) -> None:
    # (1 − w²)/(τ (1 − μ²)) ∇ℓ(w), w = tanh((λ+ε)/τ), averaged: bias and all, by quadrature over ε.
    found = over_logistic_noise(lambda eps: relaxed_draw(lam, temperature, eps, slope=2.0))

    def formula(eps: Tensor) -> Tensor:
        w = torch.tanh((lam + eps) / temperature)
        return (1.0 - w**2) / (temperature * (1.0 - math.tanh(lam) ** 2)) * 2.0

    assert abs(found - over_logistic_noise(formula)) <= 1e-10
    assert abs(over_logistic_noise(torch.ones_like) - 1.0) <= 1e-10


def test_the_relaxed_estimate_of_a_linear_loss_is_0_87_at_tau_1_and_lambda_0_7() -> None:
    found = over_logistic_noise(lambda eps: relaxed_draw(0.7, 1.0, eps))
    assert abs(found - 0.87) <= 0.005
    # unbiased as τ → 0 for a linear loss, so the law's 1 comes back
    assert abs(over_logistic_noise(lambda eps: relaxed_draw(0.7, 0.01, eps)) - 1.0) <= 1e-3


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_the_variance_of_the_relaxed_estimate_grows_as_one_over_tau(lam: float) -> None:
    # With z = (λ+ε)/τ: τ E[ratio²] → ∫ sech⁴ z dz · ½ sech²λ / sech⁴λ = ⅔ cosh²λ.
    products = []
    for temperature in (0.1, 0.01, 0.001):
        second = over_logistic_noise(lambda eps, t=temperature: relaxed_draw(lam, t, eps) ** 2)
        first = over_logistic_noise(lambda eps, t=temperature: relaxed_draw(lam, t, eps))
        products.append(temperature * (second - first**2))
    limit = 2.0 / 3.0 * math.cosh(lam) ** 2
    assert abs(products[2] - limit) <= 0.01 * limit
    assert abs(products[1] - products[2]) < abs(products[0] - products[2])


def test_straight_through_is_the_gradient_at_a_hard_draw_and_biased() -> None:
    family = poco.resolve_family("bernoulli")
    estimator = family.estimators["straight_through"]
    problem, state = binary_problem(n=6, d=3, seed=8), family.State(tensor([0.4, -0.6, 0.2]))
    noise = family.noise((3,), 5, NoiseKey(6), dtype=torch.float64)
    points = family.sample(state, noise)
    assert bool((points.abs() == 1.0).all())
    np.testing.assert_array_equal(points, np.where(state.theta.numpy() + noise.numpy() >= 0.0, 1.0, -1.0))
    wanted = np.mean([problem_at(theta)[1] for theta in points], 0)
    site = site_of(family, estimator, state, noise, total_loss(problem))
    np.testing.assert_allclose(site.theta, wanted, rtol=1e-13)
    # exact for a linear loss only: E[∇ℓ] at hard points is not ∇_μ E[ℓ]
    everywhere = support(family.distribution(state))
    biased = site_of(family, estimator, state, everywhere.noise, total_loss(problem), everywhere.weights)
    slopes = [
        slope_at_zero(lambda h, u=u: enumerated(state.theta.numpy(), total_loss(problem), h * u))
        for u in directions((3,), False)
    ]
    assert np.abs(biased.theta.numpy() - slopes).max() > 1e-3
    linear = site_of(family, estimator, state, everywhere.noise, lambda t: t @ tensor([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(linear.theta, [1.0, 2.0, 3.0], rtol=1e-13)


def enumerated(lam: np.ndarray, loss: Callable[[Tensor], Tensor], shift: np.ndarray) -> float:
    """E[ℓ] over {−1, 1}^d with mean tanh λ + shift, by a plain loop: P(θ_j = ±1) = (1 ± μ_j)/2."""
    mean = np.tanh(lam) + shift
    total = 0.0
    for signs in itertools.product([-1.0, 1.0], repeat=len(lam)):
        probability = math.prod((1.0 + sign * mu) / 2.0 for sign, mu in zip(signs, mean, strict=True))
        total += probability * float(loss(tensor(signs)))
    return total


@pytest.mark.parametrize("name", DISCRETE)
def test_natural_gradients_of_discrete_families_by_a_plain_enumeration(name: str) -> None:
    family, estimator = poco.resolve_family(name), poco.estimators.ScoreFunction()
    problem, state = binary_problem(n=6, d=3, seed=8), family.State(tensor([0.4, -0.6, 0.2]))
    wanted = [
        slope_at_zero(lambda h, u=u: enumerated(state.theta.numpy(), total_loss(problem), h * u))
        for u in directions((3,), False)
    ]
    found = expected_site(family, estimator, state, total_loss(problem), 0)
    np.testing.assert_allclose(found.theta, wanted, rtol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_score_function_averages_to_the_natural_gradient(name: str) -> None:
    family, estimator, count = poco.resolve_family(name), poco.estimators.ScoreFunction(), 20000
    state = a_state(family)
    noise = family.noise((2,), 4 * count, NoiseKey(7), dtype=torch.float64)
    theta = family.sample(state, noise)
    losses = torch.func.vmap(logistic)(theta)
    each = torch.func.vmap(
        lambda eps, point, loss: torch.cat(
            [
                value.flatten()
                for value in family.site_to_nat(
                    estimator.natural_gradient(family, state, poco.Draws(eps, point, loss)), state
                )
            ]
        ),
        chunk_size=2000,
    )(noise.reshape(count, 4, 2), theta.reshape(count, 4, 2), losses.reshape(count, 4))
    slopes = differences(family, state, logistic)
    wanted = torch.cat([value.flatten() for value in from_directions(family, slopes)])
    within_five_standard_errors(each, wanted)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("draws", [2, 5])
def test_the_leave_one_out_baseline_written_out(name: str, draws: int) -> None:
    # F⁻¹ (1/K) Σ_k (ℓ_k − mean_{j≠k} ℓ_j)(T(θ_k) − μ); a constant loss gives exactly nothing.
    family, estimator = poco.resolve_family(name), poco.estimators.ScoreFunction()
    state = a_state(family)
    noise = family.noise((2,), draws, NoiseKey(8), dtype=torch.float64)
    theta = family.sample(state, noise)
    losses = torch.func.vmap(quartic)(theta)
    site = family.site_to_nat(estimator.natural_gradient(family, state, poco.Draws(noise, theta, losses)), state)
    # the statistics and F = Cov[T] over the support, per weight (or jointly), by plain sums
    points = support(family.distribution(state))
    for weight in [slice(None)] if family.joint else [slice(0, 1), slice(1, 2)]:
        statistics = flat_statistics(family, points.theta[:, weight])
        mean = points.weights.numpy() @ statistics
        covariance = (points.weights.numpy()[:, None] * (statistics - mean)).T @ (statistics - mean)
        gradient = np.zeros(len(mean))
        for k in range(draws):
            others = np.mean([float(losses[j]) for j in range(draws) if j != k])
            sample = flat_statistics(family, theta[k : k + 1, weight])[0]
            gradient += (float(losses[k]) - others) * (sample - mean) / draws
        wanted = np.linalg.solve(covariance, gradient)
        found = np.concatenate([flat_dual(value, weight, family) for value in site])
        np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-7)
    constant = poco.Draws(noise, theta, torch.full((draws,), 3.0, dtype=torch.float64))
    assert all(float(value.abs().max()) <= 1e-12 for value in estimator.natural_gradient(family, state, constant))


def flat_statistics(family: Any, theta: Tensor) -> np.ndarray:
    """θ and, for families with two statistics, the distinct products θ_i θ_j, side by side."""
    points = theta.numpy()
    if len(family.Nat._fields) == 1:
        return points
    size = points.shape[1]
    products = [points[:, i] * points[:, j] for i in range(size) for j in range(i, size)]
    return np.concatenate([points, np.stack(products, 1)], 1)


def flat_dual(value: Tensor, weight: slice, family: Any) -> np.ndarray:
    """A field of a natural gradient against `flat_statistics`: off-diagonal entries count twice."""
    if value.ndim == 1:
        return value[weight].numpy()
    size = len(value)
    return np.array([float(value[i, j]) * (1.0 if i == j else 2.0) for i in range(size) for j in range(i, size)])


# ---- shared noise -------------------------------------------------------------------------------------------


def bernoulli_variances(noise: str, alpha: float, steps: int = 300) -> Tensor:
    """The variance of the corrected natural gradient over steps, entry by entry, read off a frozen posterior.

    lr is so small that λ does not move, and (λ_before − λ_after)/lr − (λ − λ_0) = N ĝ.
    """
    problem = binary_problem(n=40, d=6, seed=11)
    torch.manual_seed(0)
    family = poco.resolve_family("bernoulli")
    weights = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    n, tiny = 40.0, 1e-7
    prior = family.State(torch.zeros(6, dtype=torch.float64))
    optimizer = poco.PosteriorCorrected(
        [weights], family, 0.005, n, prior=prior, alpha=alpha, noise=noise, mc_samples=1, seed=5
    )
    rng = np.random.default_rng(0)

    def batch(picks: Any) -> Callable[[], Tensor]:
        return lambda: torch.stack([problem.torch_loss(weights, int(i)) for i in picks]).mean()

    for _ in range(5):
        optimizer.step(batch(range(40)))
    optimizer.refresh([batch(range(40))] * 20)
    for _ in range(2):  # λ_in moves away from λ_out a little
        optimizer.step(batch(range(40)))
    for group in optimizer.param_groups:
        group["lr"] = tiny
    found = []
    for _ in range(steps):
        (before,) = optimizer.posterior_states().values()
        optimizer.step(batch(rng.choice(40, size=5, replace=False)))
        (after,) = optimizer.posterior_states().values()
        found.append((before.theta - after.theta) / tiny / n)
    return torch.stack(found).var(0)


def test_shared_noise_is_what_makes_the_bernoulli_correction_work() -> None:
    plain = float(bernoulli_variances("shared", 0.0).sum())
    shared = float(bernoulli_variances("shared", 1.0).sum())
    independent = float(bernoulli_variances("independent", 1.0).sum())
    # measured: 0.166, 2.8e-4 and 0.147
    assert independent / shared > 50.0
    assert plain / shared > 50.0
    assert independent > 0.5 * plain  # fresh noise for θ_out gains little or nothing
