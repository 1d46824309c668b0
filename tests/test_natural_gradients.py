"""Natural gradients against finite differences in μ, and every estimator against closed forms.

∇̃L = ∇_μ E_q[ℓ]: perturb μ, convert with `to_natural`, and difference E_q[ℓ], summed over the support of Pyro's
distribution (a Gauss–Hermite rule, or all members of a discrete family).
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from expectations import (
    LOSSES,
    a_state,
    along_directions,
    as_kept,
    correlated,
    differences,
    expected_site,
    problem_at,
    quartic,
    slopes_in_mean,
    total_loss,
    within_five_standard_errors,
)
from reference import (
    FAMILIES,
    WITH_CURVATURE,
    gauss_hermite_rule,
    site_of,
    slope_at_zero,
    support,
    tensor,
    weighted_draws,
)
from torch import Tensor

import expfam_poco as poco
from expfam_poco.noise import NoiseKey

UNBIASED = [
    (name, estimator)
    for name in FAMILIES
    for estimator, made in sorted(poco.estimators.available(poco.resolve_family(name)).items())
    # Pairs ±ε and variations of a draw are enumerated in test_binary_estimators.
    if made.unbiased and not made.antithetic and made.needs != "variations"
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("name", "estimator"), UNBIASED)
def test_expectations_of_unbiased_estimators_are_finite_differences_in_mu(name: str, estimator: str, loss: str) -> None:
    family, function = poco.resolve_family(name), LOSSES[loss]
    made, state = poco.estimators.available(family)[estimator], a_state(family)
    # pairs of draws: few nodes are exact for polynomials, many are needed for the logistic loss
    order = (24 if loss == "logistic" else 6) if made.independent_draws else 40
    site = expected_site(family, made, state, function, order)
    found = along_directions(family, family.site_to_nat(site, state))
    wanted = differences(family, state, function)
    tolerance = 1e-6 if made.independent_draws and loss == "logistic" else 1e-8
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)
    assert max(abs(value) for value in wanted) > 0.1


def test_every_family_has_an_unbiased_estimator_and_none_was_missed() -> None:
    assert {name for name, _ in UNBIASED} == set(FAMILIES)
    assert {estimator for _, estimator in UNBIASED} >= {"exact", "hutchinson", "reparam", "score"}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fisher_solve_of_an_exact_gradient_is_the_finite_difference(name: str) -> None:
    # PC Eq. 5, by the engine's own Fisher matrix: F⁻¹ Σ_θ q(θ) ℓ(θ) (T(θ) − μ).
    family, state = poco.resolve_family(name), a_state(poco.resolve_family(name), seed=1)
    points = support(family.distribution(state))
    nat, losses = family.to_nat(state), torch.func.vmap(quartic)(points.theta)
    score = family.score(state, points.theta)
    gradient = family.Nat(*(torch.tensordot(points.weights * losses, value, 1) for value in score))
    found = along_directions(family, family.fisher_solve(nat, gradient))
    np.testing.assert_allclose(found, differences(family, state, quartic), rtol=1e-7, atol=1e-7)


# ---- what the engine derives for a new family ---------------------------------------------------------------

REPARAMETERISED = [name for name in FAMILIES if poco.resolve_family(name).default_estimator == "reparam"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", REPARAMETERISED)
def test_the_default_pathwise_natural_gradient_is_the_finite_difference(name: str, loss: str) -> None:
    # F⁻¹ E[(∂θ/∂λ)ᵀ ∇ℓ], which the built-in families override by their own formulas.
    family, function = poco.resolve_family(name), LOSSES[loss]
    state = a_state(family)
    points = support(family.distribution(state))
    estimator = poco.estimators.available(family)["reparam"]
    draws = weighted_draws(family, estimator, state, points.noise, function, points.weights)
    site = poco.ExponentialFamily.natural_gradient(family, state, draws)
    found = along_directions(family, family.site_to_nat(site, state))
    np.testing.assert_allclose(found, differences(family, state, function), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_score_natural_gradient_is_the_overridden_one(name: str) -> None:
    family = poco.resolve_family(name)
    state = a_state(family)
    noise = family.noise((2,), 5, NoiseKey(9), dtype=torch.float64)
    theta = family.sample(state, noise)
    draws = poco.Draws(noise, theta, torch.func.vmap(quartic)(theta))
    own = family.score_natural_gradient(state, draws)
    general = poco.ExponentialFamily.score_natural_gradient(family, state, draws)
    for a, b in zip(own, general, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_the_score_function_is_accurate_at_high_precision(name: str) -> None:
    # The same noise and losses: g grows as √S and H as S. Through the Fisher matrix it would be lost at 1e10.
    family, estimator = poco.resolve_family(name), poco.estimators.ScoreFunction()
    noise = family.noise((2,), 5, NoiseKey(9), dtype=torch.float32)
    losses, sites = noise.square().sum(1) + noise.sum(1), []
    for precision in (1.0, 2.0**34):
        state = family.centred_at(torch.tensor([1.0, -0.7]), precision)
        draws = poco.Draws(noise, family.sample(state, noise), losses)
        sites.append(estimator.natural_gradient(family, state, draws))
    torch.testing.assert_close(sites[1].gradient, 2.0**17 * sites[0].gradient, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(sites[1].curvature, 2.0**34 * sites[0].curvature, rtol=1e-6, atol=0.0)


class Exponential(poco.ExponentialFamily):
    """p(θ) = −λ e^{λθ} for θ > 0, in as few lines as a user would write: everything else is derived."""

    support = torch.distributions.constraints.positive
    domain = {"theta": torch.distributions.constraints.less_than(0.0)}  # noqa: RUF012
    noise_kind = "uniform"

    def statistics(self, theta: Tensor) -> Any:
        return self.Mean(theta)

    def log_partition(self, nat: Any) -> Tensor:
        return -torch.log(-nat.theta)

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        return torch.log(noise) / state.theta

    def centred_at(self, theta: Tensor, precision: Any = None) -> Any:
        return self.State(-1.0 / theta)


@pytest.mark.parametrize("mean", [0.4, 2.5])
def test_the_derived_natural_gradient_of_a_family_in_a_dozen_lines(mean: float) -> None:
    family, state = Exponential(), Exponential().centred_at(tensor([mean]))

    def loss(theta: Tensor) -> Tensor:
        return (theta**2).sum() + torch.cos(theta).sum()

    # E over u by Gauss–Legendre on t = −log u in [0, 40], against E_q[ℓ] with ℓ's moments in closed form:
    # E θ² = 2 μ², E cos θ = 1/(1 + μ²)
    node, weight = np.polynomial.legendre.leggauss(200)
    t, weight = 20.0 * (node + 1.0), 20.0 * weight
    noise = tensor(np.exp(-t))[:, None]
    weights = tensor(weight * np.exp(-t))
    site = site_of(family, poco.estimators.Reparameterised(), state, noise, loss, weights)
    wanted = slope_at_zero(lambda h: 2.0 * (mean + h) ** 2 + 1.0 / (1.0 + (mean + h) ** 2))
    assert abs(float(site.theta) - wanted) <= 1e-9
    assert abs(wanted - (4.0 * mean - 2.0 * mean / (1.0 + mean**2) ** 2)) <= 1e-9


# ---- the prior ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kl_gradient_is_a_finite_difference_in_mu(name: str) -> None:
    # KL summed over the support with Pyro's densities; its gradient fixes the sign of the prior.
    family = poco.resolve_family(name)
    state, prior = a_state(family), family.centred_at(tensor([0.9, -0.4]))
    p_0 = family.distribution(prior)

    def kl(nat: Any) -> float:
        q = family.distribution(family.from_nat(nat))
        points = support(q, 6)
        return float(points.weights @ (q.log_prob(points.theta) - p_0.log_prob(points.theta)))

    wanted = slopes_in_mean(family, state, kl)
    gradient = family.site_to_nat(family.kl_gradient(state, prior), state)
    np.testing.assert_allclose(along_directions(family, gradient), wanted, rtol=1e-8, atol=1e-8)
    assert max(abs(value) for value in wanted) > 0.1


def test_the_kl_gradient_for_a_prior_of_another_precision() -> None:
    # N(m, s⁻¹I) of fixed s: μ = m, and KL's slope in m is s_0 (m − m_0).
    family = poco.get_family("isotropic_gaussian")(precision=3.0)
    state, prior = family.centred_at(tensor([0.5, -0.2])), family.centred_at(tensor([-1.0, 0.4]), 7.0)
    np.testing.assert_allclose(family.kl_gradient(state, prior).theta, [7.0 * 1.5, 7.0 * -0.6], rtol=1e-14)


# ---- curvature estimators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_exact_curvature_is_the_closed_form_hessian(name: str) -> None:
    family = poco.resolve_family(name)
    state, estimator = correlated(family), poco.estimators.Exact()
    noise = family.noise((3,), 4, NoiseKey(1), dtype=torch.float64)
    points = family.sample(state, noise)
    gradients, hessians = zip(*(problem_at(theta)[1:] for theta in points), strict=True)
    problem = problem_at(points[0])[0]
    site = site_of(family, estimator, state, noise, total_loss(problem))
    np.testing.assert_allclose(site.gradient, np.mean(gradients, 0), rtol=1e-13)
    np.testing.assert_allclose(site.curvature, as_kept(family, np.mean(hessians, 0)), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_gradsq_is_kappa_times_the_squared_gradient(name: str) -> None:
    family = poco.resolve_family(name)
    state, estimator, kappa = correlated(family), poco.estimators.SquaredGradient(), 37.0
    noise = family.noise((3,), 2, NoiseKey(2), dtype=torch.float64)
    gradients = [problem_at(theta)[1] for theta in family.sample(state, noise)]
    problem = problem_at(state.mean)[0]
    site = site_of(family, estimator, state, noise, total_loss(problem), ess=kappa)
    wanted = kappa * np.mean([np.outer(g, g) for g in gradients], 0)
    np.testing.assert_allclose(site.curvature, as_kept(family, wanted), rtol=1e-12)


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_one_reparameterised_draw_is_stein_s_product(name: str) -> None:
    # ĥ = ĝ ⊙ (θ−m)/σ² (Alg. 4 line 8); dense: the symmetric part of ∇ℓ (S(θ−m))ᵀ.
    family = poco.resolve_family(name)
    state = correlated(family)
    noise = family.noise((3,), 1, NoiseKey(3), dtype=torch.float64)
    theta = family.sample(state, noise)[0]
    problem, gradient, _ = problem_at(theta)
    site = site_of(family, poco.estimators.Reparameterised(), state, noise, total_loss(problem))
    off = (theta - state.mean).numpy()
    if family.curvature == "dense":
        product = np.outer(gradient, state.precision.numpy() @ off)
        wanted = 0.5 * (product + product.T)
    else:
        wanted = gradient * off * state.precision.numpy()
    np.testing.assert_allclose(site.curvature, wanted, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(site.gradient, gradient, rtol=1e-13)


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_the_mean_of_hutchinson_s_estimate_at_a_point_is_the_hessian(name: str) -> None:
    family, draws = poco.resolve_family(name), 4000
    theta = tensor([0.4, -0.6, 0.2])
    hessian = problem_at(theta)[2]
    probes = poco.noise.noise("rademacher", (3,), draws, NoiseKey(4), dtype=torch.float64)
    products = probes @ tensor(hessian)
    each = family._outer(products, probes)
    within_five_standard_errors(each, as_kept(family, hessian))
    # one estimate is the symmetric part of Hz zᵀ
    z, product = probes[0].numpy(), products[0].numpy()
    symmetric = 0.5 * (np.outer(product, z) + np.outer(z, product))
    np.testing.assert_allclose(each[0], as_kept(family, symmetric), rtol=1e-14)


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_the_mean_of_the_reparameterised_estimate_is_the_expected_hessian(name: str) -> None:
    family, count = poco.resolve_family(name), 40000
    state = correlated(family)
    problem = problem_at(state.mean)[0]
    noise = family.noise((3,), count, NoiseKey(5), dtype=torch.float64)
    # E_q[∇²ℓ] by a fine rule; single draws from a batched gradient
    rule = gauss_hermite_rule(3, 12)
    points = support(family.distribution(state), 12).theta
    wanted = sum(w * problem_at(theta)[2] for w, theta in zip(rule.weights, points, strict=True))
    draws = weighted_draws(family, poco.estimators.Reparameterised(), state, noise, total_loss(problem))
    single = torch.func.vmap(
        lambda eps, theta, loss, grad: (
            family.natural_gradient(state, poco.Draws(eps[None], theta[None], loss[None], grad[None])).curvature
        )
    )(draws.noise, draws.theta, draws.loss, draws.grad)
    within_five_standard_errors(single, as_kept(family, wanted))


CURVATURES = ["exact", "hutchinson", "reparam", "gradsq"]


@pytest.mark.parametrize("name", WITH_CURVATURE)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_what_the_shell_measures_for_every_curvature(name: str, curvature: str) -> None:
    # One step at lr = 0, precision_lr = 1 and the plain retraction shows N ĥ + S_0 as the new precision.
    family, n, count = poco.resolve_family(name), 50.0, 400
    theta = tensor([0.4, -0.6, 0.2])
    weights = torch.nn.Parameter(theta.clone())
    problem, gradient, hessian = problem_at(theta)
    loss = total_loss(problem)
    zero = curvature in ("exact", "hutchinson", "gradsq")
    optimizer = poco.PosteriorCorrected(
        [weights],
        family,
        0.0,
        n,
        precision_lr=1.0,
        weight_decay=0.3,
        hess_init=40.0,
        curvature=curvature,
        noise="zero" if zero else "antithetic",
        mc_samples=1 if curvature in ("exact", "gradsq") else count,
        retraction="plain",
        seed=0,
    )
    optimizer.step(lambda: loss(weights))
    (state,) = optimizer.posterior_states().values()
    prior = 0.3 * n * (np.eye(3) if family.curvature == "dense" else np.ones(3))
    found = (state.precision.numpy() - prior) / n
    if curvature == "gradsq":
        np.testing.assert_allclose(found, as_kept(family, n * np.outer(gradient, gradient)), rtol=1e-11)
    elif curvature == "exact":
        np.testing.assert_allclose(found, as_kept(family, hessian), rtol=1e-11, atol=1e-13)
    else:
        # standard error of one entry over `count` draws is about |H|·√2/√count
        bound = 5.0 * 2.0 * np.abs(hessian).max() / math.sqrt(count)
        assert np.abs(found - as_kept(family, hessian)).max() <= bound
    np.testing.assert_array_equal(weights.detach(), theta)
