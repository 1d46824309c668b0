"""Natural gradients against finite differences in μ, and every estimator against closed forms.

∇̃L = ∇_μ E_q[ℓ]: perturb μ, convert with `to_natural`, and difference E_q[ℓ], summed over the support of Pyro's
distribution (a Gauss–Hermite rule, or all members of a discrete family).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import (
    BinaryLogistic,
    binary_problem,
    directions,
    gauss_hermite_rule,
    site_of,
    slope_at_zero,
    support,
    tensor,
    weighted_draws,
)
from torch import Tensor

import expfam_poco as poco
from expfam_poco import fields
from expfam_poco.noise import NoiseKey

FAMILIES = poco.families_available()
WITH_CURVATURE = [name for name in FAMILIES if poco.resolve_family(name).curvature != "none"]
POSITIVE_DEFINITE = [[1.3, 0.4], [0.4, 0.7]]


def quadratic(theta: Tensor) -> Tensor:
    return 0.5 * theta @ tensor(POSITIVE_DEFINITE) @ theta - theta @ tensor([0.5, -1.1])


def quartic(theta: Tensor) -> Tensor:
    return 0.25 * ((theta - tensor([0.3, -0.4])) ** 4).sum() + 0.1 * theta.prod() ** 2 + theta.sum() ** 3 / 6.0


def logistic(theta: Tensor) -> Tensor:
    problem = binary_problem(n=5, d=2, seed=3)
    return torch.stack([problem.torch_loss(theta, i) for i in range(5)]).sum()


def is_discrete(name: str) -> bool:
    """Whether the family's distribution can list its support."""
    family = poco.resolve_family(name)
    distribution = family.distribution(family.centred_at(torch.zeros(1)))
    return bool(getattr(distribution, "base_dist", distribution).has_enumerate_support)


DISCRETE = [name for name in FAMILIES if is_discrete(name)]
LOSSES = {"quadratic": quadratic, "quartic": quartic, "logistic": logistic}


def a_state(family: Any, seed: int = 0) -> Any:
    """A member over two weights, correlated where the family can."""
    rng = np.random.default_rng(seed)
    state = family.centred_at(tensor(rng.normal(size=2)), 2.0)
    if family.curvature == "dense":
        state = state._replace(precision=state.precision + tensor([[0.7, 0.6], [0.6, 0.0]]))
    elif family.curvature == "diagonal":
        state = state._replace(precision=state.precision * tensor([1.0, 1.7]))
    return state


def expectation(family: Any, nat: Any, loss: Callable[[Tensor], Tensor]) -> float:
    points = support(family.distribution(family.from_nat(nat)))
    return float(points.weights @ torch.func.vmap(loss)(points.theta))


def differences(family: Any, state: Any, loss: Callable[[Tensor], Tensor]) -> list[float]:
    """dE_q[ℓ]/dμ along the unit perturbations of every field of μ."""
    mean = family.to_mean(family.to_nat(state))
    slopes = []
    for k, (value, dims) in enumerate(zip(mean, family.statistic_dims, strict=True)):
        for unit in directions(tuple(value.shape), dims == 2):

            def along(h: float, k: int = k, unit: np.ndarray = unit) -> float:
                moved = family.Mean(*(part + h * tensor(unit) if j == k else part for j, part in enumerate(mean)))
                return expectation(family, family.to_natural(moved), loss)

            slopes.append(slope_at_zero(along))
    return slopes


def along_directions(family: Any, gradient: Any) -> list[float]:
    """⟨g, unit⟩ for the same perturbations."""
    return [
        float((value * tensor(unit)).sum())
        for value, dims in zip(gradient, family.statistic_dims, strict=True)
        for unit in directions(tuple(value.shape), dims == 2)
    ]


def from_directions(family: Any, slopes: list[float]) -> list[Tensor]:
    """The gradient that `along_directions` turns into `slopes`."""
    rest = list(slopes)
    fields_of_gradient = []
    for dims in family.statistic_dims:
        shape = (2, 2) if dims == 2 else (2,)
        total = torch.zeros(shape, dtype=torch.float64)
        for unit in directions(shape, dims == 2):
            total = total + rest.pop(0) * tensor(unit) / float((unit**2).sum())
        fields_of_gradient.append(total)
    return fields_of_gradient


def expected_site(family: Any, estimator: Any, state: Any, loss: Callable[[Tensor], Tensor], order: int) -> Any:
    """E[estimate], exactly: over the support, over all signs of probes, over all pairs of independent draws."""
    points = support(family.distribution(state), order)
    if estimator.independent_draws:
        losses, count = torch.func.vmap(loss)(points.theta), len(points.theta)
        first, second = (index.flatten() for index in torch.meshgrid(*[torch.arange(count)] * 2, indexing="ij"))
        pair = torch.stack([first, second], 1)

        def estimate(noise: Tensor, theta: Tensor, loss_values: Tensor) -> Any:
            draws = poco.Draws(noise, theta, loss_values)
            return tuple(estimator.natural_gradient(family, state, draws))

        each = torch.func.vmap(estimate)(points.noise[pair], points.theta[pair], losses[pair])
        weights = points.weights[first] * points.weights[second]
        return family.Site(*(torch.tensordot(weights, value, 1) for value in each))
    if estimator.needs == "hvp":
        sites = []
        for signs in itertools.product([-1.0, 1.0], repeat=2):
            probes = tensor(signs).expand(len(points.noise), 2)
            sites.append(site_of(family, estimator, state, points.noise, loss, points.weights, probes=probes))
        return fields.scale(fields.add(fields.add(sites[0], sites[1]), fields.add(sites[2], sites[3])), 0.25)
    return site_of(family, estimator, state, points.noise, loss, points.weights)


UNBIASED = [
    (name, estimator)
    for name in FAMILIES
    for estimator, made in sorted(poco.estimators.available(poco.resolve_family(name)).items())
    if made.unbiased
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
    mean = family.to_mean(family.to_nat(state))
    wanted = []
    for k, (value, dims) in enumerate(zip(mean, family.statistic_dims, strict=True)):
        for unit in directions(tuple(value.shape), dims == 2):

            def kl(h: float, k: int = k, unit: np.ndarray = unit) -> float:
                moved = family.Mean(*(part + h * tensor(unit) if j == k else part for j, part in enumerate(mean)))
                q = family.distribution(family.from_nat(family.to_natural(moved)))
                points = support(q, 6)
                return float(points.weights @ (q.log_prob(points.theta) - p_0.log_prob(points.theta)))

            wanted.append(slope_at_zero(kl))
    gradient = family.site_to_nat(family.kl_gradient(state, prior), state)
    np.testing.assert_allclose(along_directions(family, gradient), wanted, rtol=1e-8, atol=1e-8)
    assert max(abs(value) for value in wanted) > 0.1


def test_the_kl_gradient_for_a_prior_of_another_precision() -> None:
    # N(m, s⁻¹I) of fixed s: μ = m, and KL's slope in m is s_0 (m − m_0).
    family = poco.get_family("isotropic_gaussian")(precision=3.0)
    state, prior = family.centred_at(tensor([0.5, -0.2])), family.centred_at(tensor([-1.0, 0.4]), 7.0)
    np.testing.assert_allclose(family.kl_gradient(state, prior).theta, [7.0 * 1.5, 7.0 * -0.6], rtol=1e-14)


# ---- curvature estimators -----------------------------------------------------------------------------------


def problem_at(theta: Tensor) -> tuple[BinaryLogistic, np.ndarray, np.ndarray]:
    """A logistic regression, its summed gradient and Hessian in closed form."""
    problem = binary_problem(n=6, d=3, seed=8)
    point = theta.numpy()
    gradient = sum(problem.grad(i, point) for i in range(6))
    hessian = sum(problem.hess(i, point) for i in range(6))
    return problem, gradient, hessian


def total_loss(problem: BinaryLogistic) -> Callable[[Tensor], Tensor]:
    return lambda theta: torch.stack([problem.torch_loss(theta, i) for i in range(6)]).sum()


def as_kept(family: Any, hessian: np.ndarray) -> np.ndarray:
    return hessian if family.curvature == "dense" else np.diag(hessian).copy()


def correlated(family: Any) -> Any:
    """A member over three weights."""
    theta = tensor([0.4, -0.6, 0.2])
    state = family.centred_at(theta, 4.0)
    if family.curvature == "dense":
        root = tensor([[1.0, 0.3, 0.0], [0.3, 1.0, -0.5], [0.0, -0.5, 1.0]])
        return state._replace(precision=state.precision + root)
    return state._replace(precision=state.precision * tensor([1.0, 0.6, 2.0]))


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


def within_five_standard_errors(draws: Tensor, wanted: Any) -> None:
    """The mean over the first axis, entry by entry, and not because the standard error is huge."""
    mean, error = draws.mean(0), draws.std(0) / math.sqrt(len(draws))
    wanted = tensor(wanted)
    assert bool(((mean - wanted).abs() <= 5.0 * error + 1e-12).all()), ((mean - wanted) / error).tolist()
    assert float(error.max()) < 0.05 * float(wanted.abs().max())


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_the_mean_of_hutchinson_s_estimate_at_a_point_is_the_hessian(name: str) -> None:
    family, draws = poco.resolve_family(name), 4000
    theta = tensor([0.4, -0.6, 0.2])
    problem, _, hessian = problem_at(theta)
    probes = poco.noise.noise("rademacher", (3,), draws, NoiseKey(4), dtype=torch.float64)
    estimator, dense = poco.estimators.Hutchinson(), family.curvature == "dense"
    products = probes @ tensor(hessian)
    each = torch.stack([estimator.curvature_of_product(z, p, dense) for z, p in zip(probes, products, strict=True)])
    within_five_standard_errors(each, as_kept(family, hessian))
    assert problem.size == 3


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
        )
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
