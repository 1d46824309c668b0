"""Conjugate problems: Bayesian linear regression, where the exact posterior is known in closed form.

ℓ_i = ½ b (y_i − x_iᵀθ)², prior N(m_0, S_0⁻¹): the posterior has precision S_0 + b XᵀX and mean
(S_0 + b XᵀX)⁻¹ (S_0 m_0 + b Xᵀy). A member of the family comes out in one step at η = 1, from any start.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from reference import FAMILIES, LeastSquares, gauss_hermite_rule, monte_carlo_rule, site_of, support, tensor
from torch import Tensor

import expfam_poco as poco
from expfam_poco import blr, correction

N, D, B = 12, 3, 2.0
GAUSSIAN = [name for name in FAMILIES if poco.resolve_family(name).noise_kind == "normal"]
WITH_CURVATURE = [name for name in GAUSSIAN if poco.resolve_family(name).curvature != "none"]


def regression(design: str) -> LeastSquares:
    """A regression whose XᵀX is dense, diagonal, or a multiple of the identity; "axes": every x_i x_iᵀ diagonal."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D))
    if design == "axes":
        x = x * np.eye(D)[np.arange(N) % D]
    elif design != "any":
        x = np.linalg.qr(x)[0] * (np.array([1.0, 2.0, 3.0]) if design == "orthogonal" else 2.0)
    return LeastSquares(x, x @ np.array([1.0, -2.0, 0.5]) + 0.3 * rng.normal(size=N), B)


def exact_posterior(problem: LeastSquares, m_0: ndarray, s_0: ndarray) -> tuple[ndarray, ndarray]:
    precision = s_0 + B * problem.x.T @ problem.x
    return np.linalg.solve(precision, s_0 @ m_0 + B * problem.x.T @ problem.y), precision


def conjugate_case(name: str) -> tuple[Any, LeastSquares, ndarray, ndarray, Any]:
    """(family, problem, m_0, S_0, a start) such that the family contains the exact posterior."""
    family = poco.resolve_family(name)
    m_0, s_0 = np.array([0.5, -1.0, 2.0]), np.diag([0.7, 1.1, 0.4])
    theta, factor = tensor([3.0, -4.0, 5.0]), 6.0
    if family.curvature == "dense":
        s_0 = s_0 + 0.2
        return family, regression("any"), m_0, s_0, family.State(theta, factor * torch.eye(D).double() + 1.0)
    if family.curvature == "diagonal":
        return family, regression("orthogonal"), m_0, s_0, family.State(theta, factor * tensor([1.0, 0.5, 2.0]))
    # fixed precision: orthonormal up to a factor, so that the posterior's precision s_0 + 4b is a number
    fixed = 0.7 + B * 4.0
    family = type(family)(precision=fixed)
    return family, regression("orthonormal"), m_0, 0.7 * np.eye(D), family.centred_at(theta)


def prior_state(family: Any, m_0: ndarray, s_0: ndarray) -> Any:
    values = {"dense": s_0, "diagonal": s_0.diagonal().copy(), "none": s_0[0, 0]}
    return family.State(tensor(m_0), tensor(values[family.curvature]))


def estimator_of(family: Any) -> Any:
    fitting = poco.estimators.available(family)
    return fitting.get("exact", fitting["reparam"])


def mean_loss(problem: LeastSquares) -> Callable[[Tensor], Tensor]:
    return lambda theta: torch.stack([problem.torch_loss(theta, i) for i in range(N)]).mean()


def assert_is_exact(family: Any, state: Any, problem: LeastSquares, m_0: ndarray, s_0: ndarray) -> None:
    m, precision = exact_posterior(problem, m_0, s_0)
    np.testing.assert_allclose(state.mean.numpy(), m, rtol=1e-12, atol=1e-12)
    # Pyro's own covariance, whatever the chart
    distribution = family.distribution(state)
    covariance = getattr(distribution, "covariance_matrix", None)
    covariance = np.diag(distribution.variance.numpy()) if covariance is None else covariance.numpy()
    np.testing.assert_allclose(covariance, np.linalg.inv(precision), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_one_step_at_rate_1_is_the_exact_posterior(name: str) -> None:
    family, problem, m_0, s_0, state = conjugate_case(name)
    prior, points = prior_state(family, m_0, s_0), support(family.distribution(state), 3)
    site = site_of(family, estimator_of(family), state, points.noise, mean_loss(problem), points.weights)
    moved = blr.update(
        family,
        blr.BLRState(state, ()),
        prior,
        site,
        rates=family.per_block(1.0, 1.0),
        ess=float(N),
        retraction="plain",
    )
    assert_is_exact(family, moved.posterior, problem, m_0, s_0)
    # and it stays there
    points = support(family.distribution(moved.posterior), 3)
    site = site_of(family, estimator_of(family), moved.posterior, points.noise, mean_loss(problem), points.weights)
    again = blr.update(family, moved, prior, site, rates=family.per_block(1.0, 1.0), ess=float(N), retraction="plain")
    assert_is_exact(family, again.posterior, problem, m_0, s_0)


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_one_natural_step_at_rate_1_is_the_exact_posterior(name: str) -> None:
    family, problem, m_0, s_0, state = conjugate_case(name)
    points = support(family.distribution(state), 3)
    site = site_of(family, estimator_of(family), state, points.noise, mean_loss(problem), points.weights)
    prior = family.to_nat(prior_state(family, m_0, s_0))
    nat = blr.natural_step(family.to_nat(state), prior, family.site_to_nat(site, state), rate=1.0, ess=float(N))
    assert_is_exact(family, family.from_nat(nat), problem, m_0, s_0)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_one_step_of_the_optimizer_at_rate_1_is_the_exact_posterior(name: str) -> None:
    # antithetic pairs: the gradient of a quadratic is exact in the mean of ±ε
    family, problem, m_0, s_0, state = conjugate_case(name)
    weights = torch.nn.Parameter(state.mean.clone())
    optimizer = poco.PosteriorCorrected(
        [weights],
        family,
        1.0,
        float(N),
        prior=prior_state(family, m_0, s_0),
        noise="antithetic",
        curvature=estimator_of(family),
        retraction="plain",
        hess_init=None if family.curvature == "none" else 0.4,
        seed=1,
    )
    optimizer.step(lambda: mean_loss(problem)(weights))
    (found,) = optimizer.posterior_states().values()
    assert_is_exact(family, found, problem, m_0, s_0)


# ---- zero variance ------------------------------------------------------------------------------------------


def within_reach(family: Any) -> LeastSquares:
    """A regression whose single-example Hessians the family keeps in full."""
    return regression("any" if family.curvature == "dense" else "axes")


def corrected_steps(name: str, noise_in: Any, noise_out: Any, moved: Any, weights: Tensor | None) -> list[Any]:
    """The step direction (corrected site with its anchor) from each single example."""
    family, _, _, _, state = conjugate_case(name)
    problem, estimator, inner = within_reach(family), estimator_of(family), moved(state)

    def site(at: Any, noise: Tensor, i: int) -> Any:
        return site_of(family, estimator, at, noise, lambda theta: problem.torch_loss(theta, i), weights)

    mean = correction.average_sites([site(state, noise_out, j) for j in range(N)])
    outer = correction.update_outer(family, None, state, mean, rho=0.0)
    found = []
    for i in range(N):
        pair = site(inner, noise_in, i), site(state, noise_out, i)
        corrected = correction.correct(family, *pair, inner, outer, alpha=1.0)
        total = corrected.site
        if corrected.anchor is not None:
            total = type(total)(*(a + b for a, b in zip(total, corrected.anchor, strict=True)))
        found.append(total)
    return found


def spread(sites: list[Any]) -> float:
    """The largest variance of any entry over examples."""
    return max(float(torch.stack(values).var(0).max()) for values in zip(*sites, strict=True))


def shifted(state: Any) -> Any:
    return state._replace(mean=state.mean + tensor([0.3, -0.2, 1.0]))


def shifted_and_sharper(state: Any) -> Any:
    return shifted(state)._replace(precision=1.7 * state.precision)


EXACT_RULE = gauss_hermite_rule(D, 3)


@pytest.mark.parametrize("name", WITH_CURVATURE)
@pytest.mark.parametrize("moved", [shifted, shifted_and_sharper])
def test_exact_expectations_leave_no_variance(name: str, moved: Any) -> None:
    # … whatever S_in and S_out are, and the estimate is the full-batch natural gradient at λ_in.
    noise, weights = tensor(EXACT_RULE.points), tensor(EXACT_RULE.weights)
    sites = corrected_steps(name, noise, noise, moved, weights)
    assert spread(sites) <= 1e-24
    family, _, _, _, state = conjugate_case(name)
    problem, m = within_reach(family), moved(state).mean.numpy()
    hessian = B * problem.x.T @ problem.x / N
    gradient = hessian @ m - B * problem.x.T @ problem.y / N
    np.testing.assert_allclose(sites[0].gradient, gradient, rtol=1e-12, atol=1e-13)
    wanted = hessian if family.curvature == "dense" else np.diag(hessian)
    np.testing.assert_allclose(sites[0].curvature, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_shared_noise_with_equal_precisions_leaves_no_variance(name: str) -> None:
    shared, fresh = (tensor(monte_carlo_rule(D, 2, seed).points) for seed in (1, 2))
    assert spread(corrected_steps(name, shared, shared, shifted, None)) <= 1e-24
    # each condition is needed
    assert spread(corrected_steps(name, fresh, shared, shifted, None)) > 1e-4
    assert spread(corrected_steps(name, shared, shared, shifted_and_sharper, None)) > 1e-4


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_without_the_correction_or_its_anchor_there_is_variance(name: str) -> None:
    family, _, _, _, state = conjugate_case(name)
    noise, weights = tensor(EXACT_RULE.points), tensor(EXACT_RULE.weights)
    problem, estimator, inner = within_reach(family), estimator_of(family), shifted(state)

    def site(at: Any, i: int) -> Any:
        return site_of(family, estimator, at, noise, lambda theta: problem.torch_loss(theta, i), weights)

    outer = correction.Outer(state, correction.average_sites([site(state, j) for j in range(N)]))
    for anchor_weight, alpha in ((0.0, 1.0), (1.0, 0.5), (1.0, 0.0)):
        found = []
        for i in range(N):
            arguments = (site(inner, i), site(state, i), inner, outer)
            corrected = correction.correct(family, *arguments, alpha=alpha, anchor_weight=anchor_weight)
            gradient = corrected.site.gradient
            found.append((gradient if corrected.anchor is None else gradient + corrected.anchor.gradient,))
        assert spread(found) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_at_the_outer_point_shared_noise_leaves_no_variance_for_any_loss(name: str) -> None:
    # λ_in = λ_out: ∇̃L_i(in) − ∇̃L_i(out) = 0 exactly, and ḡ_out is what remains, for every family and estimator.
    family, rng = poco.resolve_family(name), np.random.default_rng(4)
    x = tensor(rng.normal(size=(N, D)))
    state = family.centred_at(tensor([0.4, -0.6, 0.2]), 2.0)
    for estimator in poco.estimators.available(family).values():
        if estimator.needs == "variations":
            continue  # held by the optimizer's tests: its losses are not of these draws alone
        draws = max(2, estimator.least_draws(family, torch.Size([D])))
        noise = family.noise((D,), draws, poco.noise.NoiseKey(3), dtype=torch.float64)
        probes = poco.noise.noise("rademacher", (D,), draws, poco.noise.NoiseKey(4), dtype=torch.float64)
        sites = [
            site_of(family, estimator, state, noise, lambda t, i=i: torch.cosh(t @ x[i]), probes=probes)
            for i in range(N)
        ]
        outer = correction.Outer(state, correction.average_sites(sites))
        for site in sites:
            corrected = correction.correct(family, site, site, state, outer, alpha=1.0)
            for found, mean, single in zip(corrected.site, outer.site, site, strict=True):
                # in − (out − mean) rounds twice, at the size of a single example's site
                assert float((found - mean).abs().max()) <= 4e-16 * float(single.abs().max() + mean.abs().max())
            assert corrected.anchor is None or float(corrected.anchor[0].abs().max()) == 0.0
