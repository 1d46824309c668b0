"""The Bayes forms of a step, mega-batch averages, and fixed points (PC Eq. 6, 9–11, 17, 18, 26; §3.1)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from reference import (
    FAMILIES,
    WITH_CURVATURE,
    LeastSquares,
    Prior,
    binary_problem,
    delta_rule,
    dense,
    directions,
    expected_logistic_loss,
    gauss_hermite_rule,
    gaussian_kl,
    loss_of,
    site_mean,
    site_of,
    slope_at_zero,
    softmax_problem,
    start,
    support,
    tensor,
    worst,
)
from torch import Tensor

import expfam_poco as poco
from expfam_poco import blr, correction
from expfam_poco.family import fields

EXACT = poco.estimators.Exact()


# ---- the Bayes forms ----------------------------------------------------------------------------------------


class Step:
    """A posterior, an outer one, a prior, and natural gradients of a few examples at both, for any family."""

    def __init__(self, name: str) -> None:
        self.family = family = poco.resolve_family(name)
        self.n, d = 5, 3
        problem = binary_problem(n=self.n, d=d)
        fitting = poco.estimators.available(family)
        estimator = fitting.get("exact", fitting[family.default_estimator])
        theta = tensor([0.4, -0.6, 0.2])
        self.state, self.out = family.centred_at(theta, 2.0), family.centred_at(0.5 * theta + 0.1, 3.0)
        self.prior = family.centred_at(torch.full((d,), 0.3, dtype=torch.float64))
        if family.joint:
            self.state = self.state._replace(precision=self.state.precision + 0.5)
        noise = family.noise((d,), 4, poco.noise.NoiseKey(0), dtype=torch.float64)

        def gradients(state: Any) -> list[Any]:
            sites = [site_of(family, estimator, state, noise, loss_of(problem, i)) for i in range(self.n)]
            return [family.site_to_nat(site, state) for site in sites]

        self.nat, self.nat_0 = family.to_nat(self.state), family.to_nat(self.prior)
        self.inner, self.outer = gradients(self.state), gradients(self.out)
        distribution = family.distribution(self.state)
        self.theta = support(distribution, order=5).theta

    def log_density(self, state: Any) -> Tensor:
        """Pyro's log density at every point."""
        return self.family.distribution(state).log_prob(self.theta)

    def log_density_of(self, nat: Any) -> Tensor:
        return self.log_density(self.family.from_nat(nat))

    def site(self, natural_gradient: Any) -> Tensor:
        """⟨∇̃L, T(θ)⟩ with T = θ and, where there is a second statistic, θ² or θθᵀ."""
        value = self.theta @ natural_gradient[0]
        if len(natural_gradient) == 2:
            second = natural_gradient[1]
            second = second if second.ndim == 2 else torch.diag(second)
            value = value + torch.einsum("ki,ij,kj->k", self.theta, second, self.theta)
        return value

    def bayes(self, sites: list[tuple[float, Any]], rate: float) -> Tensor:
        value = blr.bayes_log_density(self.family, self.nat, self.nat_0, sites, self.theta, rate=rate)
        return value if self.family.joint else value.sum(-1)

    def total(self, gradients: list[Any]) -> Any:
        return fields.scale(site_mean(gradients), float(self.n))


def spread(difference: Tensor) -> float:
    """How far two log densities are from equal up to a constant."""
    return float(difference.max() - difference.min())


@pytest.fixture(params=FAMILIES)
def step(request: pytest.FixtureRequest) -> Step:
    return Step(request.param)


def test_equation_6_the_step_is_bayes_rule(step: Step) -> None:
    rate = 0.1
    moved = blr.natural_step(step.nat, step.nat_0, step.total(step.inner), rate=rate, ess=1.0)
    form = (1.0 - rate) * step.log_density(step.state) + rate * step.log_density(step.prior)
    for gradient in step.inner:
        form = form - rate * step.site(gradient)
    assert spread(form - step.log_density_of(moved)) <= 1e-12 * (1.0 + float(form.abs().max()))
    bayes = step.bayes([(1.0, gradient) for gradient in step.inner], rate)
    assert spread(bayes - step.log_density_of(moved)) <= 1e-12 * (1.0 + float(bayes.abs().max()))
    assert spread(step.log_density_of(moved) - step.log_density(step.state)) > 1e-2


def test_equation_9_the_outer_posterior_is_the_product_of_its_sites(step: Step) -> None:
    # ∏_i exp(−ℓ̂_i|out) has natural parameter −Σ_i ∇̃L_i(λ_out), a minus that Eq. 12 → 13 needs.
    product = -sum(step.site(gradient) for gradient in step.outer)
    for sign, equal in ((-1.0, True), (1.0, False)):
        nat_hat = fields.scale(step.total(step.outer), sign)
        error = spread(product - step.site(nat_hat))
        assert error <= 1e-12 * (1.0 + float(product.abs().max())) if equal else error > 1e-2
    value = blr.site(step.family, step.outer[0], step.theta)
    value = value if step.family.joint else value.sum(-1)
    torch.testing.assert_close(value, step.site(step.outer[0]), rtol=1e-13, atol=1e-13)


def test_equation_10_multiplying_by_one_changes_nothing(step: Step) -> None:
    rate = 0.1
    sites = [(1.0, gradient) for gradient in step.inner] + [(-1.0, gradient) for gradient in step.outer]
    sites.append((1.0, step.total(step.outer)))
    moved = blr.natural_step(step.nat, step.nat_0, step.total(step.inner), rate=rate, ess=1.0)
    bayes = step.bayes(sites, rate)
    assert spread(bayes - step.log_density_of(moved)) <= 1e-12 * (1.0 + float(bayes.abs().max()))


@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.0], ids=["Eq. 11", "Eq. 18", "Eq. 18 without correction"])
def test_equations_11_and_18_the_corrected_step(step: Step, alpha: float) -> None:
    rate, n, i = 0.1, float(step.n), 2
    mean_outer = fields.scale(step.total(step.outer), 1.0 / n)
    corrected = correction.natural_correct(step.inner[i], step.outer[i], mean_outer, alpha)
    moved = step.log_density_of(blr.natural_step(step.nat, step.nat_0, corrected, rate=rate, ess=n))
    sites = [(n, step.inner[i]), (-alpha * n, step.outer[i]), (alpha, step.total(step.outer))]
    bayes = step.bayes(sites, rate)
    assert spread(bayes - moved) <= 1e-12 * (1.0 + float(bayes.abs().max()))
    form = (1.0 - rate) * step.log_density(step.state) + rate * step.log_density(step.prior)
    for weight, gradient in sites:
        form = form - rate * weight * step.site(gradient)
    assert spread(form - moved) <= 1e-12 * (1.0 + float(form.abs().max()))
    if alpha > 0.0:
        printed = step.bayes([*sites[:2], (-alpha, sites[2][1])], rate)  # λ̂_out with the sign of Eq. 12's text
        assert spread(printed - moved) > 1e-3


# ---- mega-batch averages ------------------------------------------------------------------------------------


def random_site(family: Any, rng: np.random.Generator, d: int) -> Any:
    """A site with independent entries, symmetric where a field is a matrix."""
    zero = family.kl_gradient(*(family.centred_at(torch.zeros(d, dtype=torch.float64)),) * 2)
    parts = [rng.normal(size=tuple(value.shape)) for value in zero]
    return family.Site(*(tensor(part + part.T if part.ndim == 2 else part) for part in parts))


@pytest.mark.parametrize("name", FAMILIES)
def test_equation_17_rho_multiplies_the_old_value_and_the_first_initialises(name: str) -> None:
    family, rng, d = poco.resolve_family(name), np.random.default_rng(5), 3
    states = [family.centred_at(tensor(rng.normal(size=d))) for _ in range(4)]
    sites = [random_site(family, rng, d) for _ in range(4)]
    outer, written = None, [value.numpy().copy() for value in sites[0]]
    rho = family.per_block(0.7, 0.2)
    for number, (state, site) in enumerate(zip(states, sites, strict=True)):
        outer = correction.update_outer(family, outer, state, site, rho=rho, reanchor_average=False)
        if number > 0:
            for k, value in enumerate(site):
                written[k] = rho[k] * written[k] + (1.0 - rho[k]) * value.numpy()
        assert worst(outer.site, written) <= 1e-14
        assert outer.posterior is state
    # ρ = 0 keeps the freshest
    freshest = correction.update_outer(family, outer, states[0], sites[0], rho=0.0)
    assert worst(freshest.site, sites[0]) == 0.0


@pytest.mark.parametrize("name", FAMILIES)
def test_re_anchored_averages_are_averages_of_natural_sites(name: str) -> None:
    family, rng, d, rho = poco.resolve_family(name), np.random.default_rng(6), 3, 0.6
    states = [family.centred_at(tensor(rng.normal(size=d)), 1.0 + number) for number in range(4)]
    sites = [random_site(family, rng, d) for _ in range(4)]

    def as_function(site: Any, state: Any, theta: ndarray) -> float:
        """gᵀ(θ−m) + ½ (θ−m)ᵀ H (θ−m) for a site at a point (the exponent of Eq. 26), ∇̃L θ for a linear one."""
        if len(site) == 1:
            return float(site[0].numpy() @ theta)
        off, h = theta - state.mean.numpy(), site.curvature.numpy()
        return float(site.gradient.numpy() @ off + 0.5 * off @ (h if h.ndim == 2 else np.diag(h)) @ off)

    points = rng.normal(size=(20, d))
    outer, written = None, np.array([as_function(sites[0], states[0], theta) for theta in points])
    for number, (state, site) in enumerate(zip(states, sites, strict=True)):
        outer = correction.update_outer(family, outer, state, site, rho=rho)
        fresh = np.array([as_function(site, state, theta) for theta in points])
        written = fresh if number == 0 else rho * written + (1.0 - rho) * fresh
    found = np.array([as_function(outer.site, outer.posterior, theta) for theta in points])
    difference = found - written  # functions agree up to a constant
    assert difference.max() - difference.min() <= 1e-12
    printed = None
    for state, site in zip(states, sites, strict=True):
        printed = correction.update_outer(family, printed, state, site, rho=rho, reanchor_average=False)
    linear = all(len(site) == 1 for site in sites)
    assert (worst(printed.site, outer.site) == 0.0) if linear else worst(printed.site, outer.site) > 1e-2


def test_569_examples_in_20_unequal_chunks() -> None:
    n, chunks = 569, 20
    problem, theta = binary_problem(n=n, d=3, seed=9), np.array([0.3, -0.2, 0.5])
    parts = np.array_split(np.arange(n), chunks)
    assert len({len(part) for part in parts}) > 1
    family = poco.resolve_family("isotropic_gaussian")
    means = [family.Site(tensor(np.mean([problem.grad(i, theta) for i in part], 0))) for part in parts]
    wanted = sum(problem.grad(i, theta) for i in range(n)) / n
    sizes = [len(part) for part in parts]
    assert worst(correction.average_sites(means, sizes), [wanted]) <= 1e-15
    assert worst(correction.average_sites(means), [wanted]) > 1e-5  # a mean of means is biased
    weights = torch.nn.Parameter(tensor(theta).clone())

    def closure(part: ndarray) -> Callable[[], Tensor]:
        return lambda: torch.stack([problem.torch_loss(weights, int(i)) for i in part]).mean()

    optimizer = poco.SVRG([weights], 1.0, weight_decay=0.0)
    optimizer.refresh([closure(part) for part in parts], weights=sizes)
    optimizer.step(closure(parts[3]))  # θ_in = θ_out, so the corrected gradient is the full one
    np.testing.assert_allclose(weights.detach().numpy(), theta - wanted, atol=1e-14)


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_equation_26_with_unequal_chunks_and_rho(name: str) -> None:
    # Two outer passes over chunks: ḡ and H̄ are weighted means, then ρ-averages, as printed (no re-anchoring).
    family, problem, d = poco.resolve_family(name), binary_problem(n=17, d=3, seed=4), 3
    diagonal, rule, rho = family.curvature == "diagonal", delta_rule(3), (0.6, 0.1)
    parts = np.array_split(np.arange(17), 4)
    states = [start(family, np.full(d, value), 2.0 * np.eye(d)) for value in (0.2, -0.4)]
    outer, g_out, h_out = None, np.zeros(d), np.zeros((d, d))
    for number, state in enumerate(states):
        sites = []
        for part in parts:
            loss = lambda theta, part=part: torch.stack([problem.torch_loss(theta, int(i)) for i in part]).mean()  # noqa: E731
            sites.append(site_of(family, EXACT, state, tensor(rule.points), loss))
        mean = correction.average_sites(sites, [len(part) for part in parts])
        outer = correction.update_outer(family, outer, state, mean, rho=family.Site(*rho), reanchor_average=False)
        g, h = np.zeros(d), np.zeros((d, d))
        for i in range(17):
            g = g + problem.grad(i, state.mean.numpy()) / 17
            h = h + problem.hess(i, state.mean.numpy()) / 17
        h = np.diag(np.diag(h)) if diagonal else h
        g_out = g if number == 0 else rho[0] * g_out + (1.0 - rho[0]) * g
        h_out = h if number == 0 else rho[1] * h_out + (1.0 - rho[1]) * h
        found = outer.site.curvature.numpy()
        assert worst([outer.site.gradient, np.diag(found) if diagonal else found], [g_out, h_out]) <= 1e-14


# ---- knowledge transfer and the fixed point -----------------------------------------------------------------


def test_von_converges_to_a_stationary_point_of_the_variational_objective() -> None:
    # −ELBO = Σ_i E_q[ℓ_i] + KL(q ‖ p_0), by 1-d quadrature and in closed form; prior mean far from 0.
    problem, n, d = binary_problem(n=12, d=2, seed=2), 12, 2
    prior = Prior(np.array([1.5, -2.0]), np.array([[1.2, 0.3], [0.3, 0.8]]))
    family, rule = poco.resolve_family("full_gaussian"), gauss_hermite_rule(2, 40)
    noise, weights = tensor(rule.points), tensor(rule.weights)
    state, p_0 = blr.init(family, torch.zeros(d, dtype=torch.float64), 5.0), start(family, *prior)

    def loss(theta: Tensor) -> Tensor:
        return torch.stack([problem.torch_loss(theta, i) for i in range(n)]).mean()

    for _ in range(80):
        before = state.posterior
        site = site_of(family, EXACT, before, noise, loss, weights)
        state = blr.update(family, state, p_0, site, rates=family.Site(0.5, 0.5), ess=float(n), retraction="plain")
    assert worst(before, state.posterior) <= 1e-12
    m, precision = dense(family, state.posterior)

    def objective(mean: ndarray, s: ndarray, p: Prior = prior) -> float:
        return expected_logistic_loss(problem, mean, s) + gaussian_kl(mean, s, p)

    def slopes(p: Prior) -> list[float]:
        found = [slope_at_zero(lambda h, u=u: objective(m + h * u, precision, p)) for u in directions((d,), False)]
        for u in directions((d, d), True):
            found.append(slope_at_zero(lambda h, u=u: objective(m, precision + h * u, p)))
        return [abs(value) for value in found]

    assert max(slopes(prior)) <= 1e-9
    assert max(slopes(Prior(-prior.mean, prior.precision))) > 1.0  # a prior of the wrong sign is not stationary
    assert math.isfinite(objective(m, precision))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fixed_point_of_every_family_is_stationary(name: str) -> None:
    # N E_q[ℓ] + KL(q ‖ p_0) as a function of λ, summed over the support with Pyro's densities.
    family, d, n = poco.resolve_family(name), 2, 6.0
    q = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)

    def loss(theta: Tensor) -> Tensor:
        return 0.5 * theta @ q @ theta + 0.1 * (theta**4).sum() - theta @ tensor([0.7, 0.2])

    prior = family.centred_at(tensor([0.8, -0.5]), None)
    fitting = poco.estimators.available(family)

    def objective(nat: Any) -> Tensor:
        state = family.from_nat(nat)
        distribution = family.distribution(state)
        points = support(distribution, 12)
        kl = distribution.log_prob(points.theta) - family.distribution(prior).log_prob(points.theta)
        return points.weights @ (n * torch.func.vmap(loss)(points.theta) + kl)

    def site(posterior: Any) -> Any:
        points = support(family.distribution(posterior), 12)
        if "exact" in fitting or family.default_estimator == "reparam":
            estimator = fitting.get("exact", fitting["reparam"])
            return site_of(family, estimator, posterior, points.noise, loss, points.weights)
        # discrete: F⁻¹ Σ_θ q(θ) ℓ(θ) (T(θ) − μ), F = Cov[T]
        losses, mean = torch.func.vmap(loss)(points.theta), points.weights @ points.theta
        off = points.theta - mean
        return family.Site((points.weights * losses) @ off / (points.weights @ off**2))

    state = blr.init(family, torch.zeros(d, dtype=torch.float64))
    for _ in range(400):
        before = state.posterior
        rates = family.per_block(0.1, 0.1)
        state = blr.update(family, state, prior, site(before), rates=rates, ess=n, retraction="plain")
    assert worst(before, state.posterior) <= 1e-11
    nat = family.to_nat(state.posterior)
    for k, (value, dims) in enumerate(zip(nat, family.statistic_dims, strict=True)):
        for u in directions(tuple(value.shape), dims == 2):
            unit = tensor(u)

            def along(h: float, k: int = k, unit: Tensor = unit) -> float:
                parts = [part + h * unit if j == k else part for j, part in enumerate(nat)]
                return float(objective(family.Nat(*parts)))

            assert abs(slope_at_zero(along)) <= 1e-8


@pytest.mark.parametrize("name", FAMILIES)
def test_the_outer_site_of_a_stored_fixed_point(name: str) -> None:
    # At a fixed point ∇̃KL + N ḡ = 0, so a step corrected by it alone stands still there.
    family, n = poco.resolve_family(name), 8.0
    posterior = family.centred_at(tensor([0.5, -0.2, 0.9]), 3.0)
    prior = family.centred_at(tensor([0.1, 0.1, -0.4]), 2.0)
    outer = correction.outer_from_posterior(family, posterior, prior, n)
    same = family.kl_gradient(posterior, posterior)
    corrected = correction.correct(family, same, same, posterior, outer, alpha=1.0)
    moved = blr.update(
        family,
        blr.BLRState(posterior, ()),
        prior,
        corrected.site,
        anchor=corrected.anchor,
        rates=family.per_block(0.5, 0.5),
        ess=n,
    )
    assert worst(moved.posterior, posterior) <= 1e-14


@pytest.mark.parametrize(
    "problem",
    [
        binary_problem(n=3, d=3, ridge=np.eye(3), centre=np.ones(3)),
        softmax_problem(n=3),
        LeastSquares(np.array([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.1]]), np.array([0.5, -1.0, 2.0]), 2.0),
    ],
    ids=["binary", "softmax", "least squares"],
)
def test_the_references_own_derivatives_are_right(problem: Any) -> None:
    theta, units = np.linspace(-0.7, 0.9, problem.size), np.eye(problem.size)
    for i in range(3):
        assert abs(float(problem.torch_loss(tensor(theta), i)) - problem.loss(i, theta)) <= 1e-14
        for k, j in np.ndindex(problem.size, problem.size):
            slope = slope_at_zero(lambda h, i=i, k=k: problem.loss(i, theta + h * units[k]))
            assert abs(slope - problem.grad(i, theta)[k]) <= 1e-10
            slope = slope_at_zero(lambda h, i=i, k=k, j=j: problem.grad(i, theta + h * units[k])[j])
            assert abs(slope - problem.hess(i, theta)[j, k]) <= 1e-10
