"""The theorems and equations of *SVRG and Beyond via Posterior Correction*, against their written-out forms.

The engine's side differentiates torch losses; the references (tests/reference.py) are numpy loops over closed-form
logistic gradients and Hessians. Eq. and Alg. numbers are the paper's.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from reference import (
    LeastSquares,
    Plan,
    Prior,
    Rule,
    binary_problem,
    delta_rule,
    directions,
    expected,
    expected_logistic_loss,
    gauss_hermite_rule,
    gaussian_kl,
    monte_carlo_rule,
    plan,
    site_of,
    slope_at_zero,
    softmax_problem,
    support,
    svrg,
    tensor,
    von_mean_precision,
    von_natural,
)
from torch import Tensor

import expfam_poco as poco
from expfam_poco import blr, correction, fields

FAMILIES = poco.families_available()
WITH_CURVATURE = [name for name in FAMILIES if poco.resolve_family(name).curvature != "none"]
EXACT = poco.estimators.Exact()


def loss_of(problem: Any, i: int) -> Callable[[Tensor], Tensor]:
    return lambda theta: problem.torch_loss(theta, i)


def worst(found: Any, wanted: Any) -> float:
    """The largest difference of any entries."""
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(found, wanted, strict=True))


def site_mean(sites: list[Any]) -> Any:
    total = sites[0]
    for site in sites[1:]:
        total = fields.add(total, site)
    return fields.scale(total, 1.0 / len(sites))


# ---- Theorem 1: isotropic Gaussians -------------------------------------------------------------------------


def equation_14(problem: Any, m: ndarray, run: Plan, rate: float, rule: Rule, precision: float) -> list[ndarray]:
    """m ← m − (η/s) N [E_in ∇ℓ_i − E_out ∇ℓ_i + (1/N) Σ_j E_out ∇ℓ_j]; Eq. 14 is s = 1."""
    n, s = len(problem.x), precision * np.eye(len(m))
    path = []
    for t, i in enumerate(run.picks):
        if t % run.period == 0:
            m_out = m
            g_out = sum(expected(problem, j, m_out, s, rule)[0] for j in range(n))
        g = expected(problem, i, m, s, rule)[0] - expected(problem, i, m_out, s, rule)[0] + g_out / n
        m = m - rate * n / precision * g
        path.append(m)
    return path


@pytest.mark.parametrize("precision", [1.0, 2.5])
@pytest.mark.parametrize("accounted", [True, False], ids=["with base measure", "as printed"])
def test_theorem_1_in_natural_coordinates_needs_the_base_measure(precision: float, accounted: bool) -> None:
    # ℓ_0 is merged into the losses, so ∇̃KL is only that of −H(q): λ + ∇_μ E_q[log h] = λ − s m = 0.
    # Eq. 13 as printed lacks the second term and shrinks m at every step.
    d, rate = 3, 0.01
    problem = binary_problem(n=9, d=d, ridge=0.3 * np.eye(d), centre=np.array([0.5, -1.0, 0.2]))
    run, rule, m = plan(9, 60, 12), gauss_hermite_rule(d, 4), np.array([0.4, -0.3, 1.0])
    family = poco.get_family("isotropic_gaussian")(precision=precision)
    estimator, noise, weights = poco.estimators.Reparameterised(), tensor(rule.points), tensor(rule.weights)

    def natural_gradient(nat: Any, i: int) -> Any:
        state = family.from_nat(nat)
        return family.site_to_nat(site_of(family, estimator, state, noise, loss_of(problem, i), weights), state)

    def base_measure_slope(nat: Any) -> Any:
        """∇_μ E_q[log h] = F⁻¹ ∇_λ E_q[log h], F = 1/s."""
        slope = torch.func.grad(lambda lam: family.expected_log_base_measure(family.from_nat(lam)).sum())(nat)
        return fields.scale(slope, precision)

    nat, path = family.to_nat(family.centred_at(tensor(m))), []
    zero = fields.scale(nat, 0.0)
    for t, i in enumerate(run.picks):
        if t % run.period == 0:
            nat_out, mean = nat, site_mean([natural_gradient(nat, j) for j in range(9)])
        g = correction.natural_correct(natural_gradient(nat, i), natural_gradient(nat_out, i), mean, 1.0)
        in_place_of_prior = fields.scale(base_measure_slope(nat), -1.0) if accounted else zero
        nat = blr.natural_step(nat, in_place_of_prior, g, rate=rate, ess=9.0)
        path.append(nat.theta / precision)
    error = worst(path, equation_14(problem, m, run, rate, rule, precision))
    assert error <= 1e-12 if accounted else error > 1e-3


@pytest.mark.parametrize("precision", [1.0, 2.5])
def test_theorem_1_with_a_prior_of_the_family_in_natural_coordinates(precision: float) -> None:
    # p_0 = N(m_0, s⁻¹): the base measure cancels, and Eq. 14 has ℓ_0 = s/2 |θ − m_0|² merged into the losses.
    d, rate, centre = 3, 0.01, np.array([0.5, -1.0, 0.2])
    merged = binary_problem(n=9, d=d, ridge=precision * np.eye(d), centre=centre)
    plain = binary_problem(n=9, d=d)
    run, rule, m = plan(9, 60, 12), gauss_hermite_rule(d, 4), np.array([0.4, -0.3, 1.0])
    family = poco.get_family("isotropic_gaussian")(precision=precision)
    prior = family.to_nat(family.centred_at(tensor(centre)))
    estimator, noise, weights = poco.estimators.Reparameterised(), tensor(rule.points), tensor(rule.weights)

    def natural_gradient(nat: Any, i: int) -> Any:
        return site_of(family, estimator, family.from_nat(nat), noise, loss_of(plain, i), weights)

    nat, path = family.to_nat(family.centred_at(tensor(m))), []
    for t, i in enumerate(run.picks):
        if t % run.period == 0:
            nat_out, mean = nat, site_mean([natural_gradient(nat, j) for j in range(9)])
        g = correction.natural_correct(natural_gradient(nat, i), natural_gradient(nat_out, i), mean, 1.0)
        nat = blr.natural_step(nat, prior, g, rate=rate, ess=9.0)
        path.append(nat.theta / precision)
    # the snapshot's ∇ℓ_0 cancels in Eq. 14, which leaves E_in[∇ℓ_0]/N = s (m − m_0)/N
    assert worst(path, equation_14(merged, m, run, rate, rule, precision)) <= 1e-12


# ---- Theorem 2: SVRG ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [binary_problem(n=20, d=4), softmax_problem(n=15)], ids=["binary", "softmax"])
@pytest.mark.parametrize("precision", [1.0, 50.0])
def test_theorem_2_through_the_pure_functions(problem: Any, precision: float) -> None:
    n, theta, rate = len(problem.x), np.linspace(-1.0, 1.0, problem.size), 0.05
    run = plan(n, 200, 25)
    family = poco.get_family("isotropic_gaussian")(precision=precision)
    flat = family.centred_at(torch.zeros(problem.size, dtype=torch.float64), 0.0)
    estimator = poco.estimators.Reparameterised()
    state, outer, path = blr.init(family, tensor(theta)), None, []

    def site(posterior: Any, i: int) -> Any:
        noise = family.neutral_noise(tensor(theta))[None]
        return site_of(family, estimator, posterior, noise, loss_of(problem, i))

    for t, i in enumerate(run.picks):
        if t % run.period == 0:
            mean = correction.average_sites([site(state.posterior, j) for j in range(n)])
            outer = correction.update_outer(family, outer, state.posterior, mean, rho=0.0)
        pair = site(state.posterior, i), site(outer.posterior, i)
        corrected = correction.correct(family, *pair, state.posterior, outer, alpha=1.0)
        # η_Alg1 is on the mean loss: η_Alg2 = η_Alg1 s/N.
        state = blr.update(
            family, state, flat, corrected.site, anchor=corrected.anchor, rates=(rate * precision / n,), ess=float(n)
        )
        path.append(state.posterior.mean)
    assert worst(path, svrg(problem, theta, run, rate)) <= 1e-12


def run_optimizer(
    optimizer: Any, weights: torch.nn.Parameter, problem: Any, run: Plan, path: list[ndarray] | None = None
) -> list[ndarray]:
    """Single-example steps with a full outer pass, one closure per example, every `period` steps."""
    path = [] if path is None else path

    def closure(i: int) -> Callable[[], Tensor]:
        return lambda: problem.torch_loss(weights, i)

    for t, i in enumerate(run.picks):
        if t % run.period == 0:
            optimizer.refresh([closure(j) for j in range(len(problem.x))])
        optimizer.step(closure(i))
        path.append(weights.detach().numpy().copy())
    return path


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SVRG": lambda p, lr, **k: poco.SVRG(p, lr, **k),
    "VSGDPoCo, noise=zero": lambda p, lr, **k: poco.VSGDPoCo(p, lr, noise="zero", **k),
    "VSGDPoCo, s=30, ess=7": lambda p, lr, **k: poco.VSGDPoCo(p, lr, noise="zero", precision=30.0, ess=7.0, **k),
    "AlphaSVRG over SGD": lambda p, lr, weight_decay=0.0, alpha=1.0: poco.AlphaSVRG(
        torch.optim.SGD(p, lr=lr, weight_decay=weight_decay), alpha=alpha
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("problem", [binary_problem(n=20, d=4), softmax_problem(n=15)], ids=["binary", "softmax"])
def test_theorem_2_through_the_optimizers(name: str, problem: Any) -> None:
    theta = np.linspace(-1.0, 1.0, problem.size)
    run = plan(len(problem.x), 200, 25)
    weights = torch.nn.Parameter(tensor(theta).clone())
    path = run_optimizer(OPTIMIZERS[name]([weights], 0.05), weights, problem, run)
    assert worst(path, svrg(problem, theta, run, 0.05)) <= 1e-12


def test_vsgd_poco_with_noise_is_not_svrg() -> None:
    problem, theta = binary_problem(n=20, d=4), np.linspace(-1.0, 1.0, 4)
    run = plan(20, 200, 25)
    weights = torch.nn.Parameter(tensor(theta).clone())
    path = run_optimizer(poco.VSGDPoCo([weights], 0.05, seed=0), weights, problem, run)
    assert worst(path, svrg(problem, theta, run, 0.05)) > 1e-3


# ---- α-SVRG and the L2 term ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_alpha_svrg_with_l2_through_the_optimizers(name: str, alpha: float, decay: float) -> None:
    problem, theta = binary_problem(n=20, d=4), np.linspace(-1.0, 1.0, 4)
    run = plan(20, 100, 25)
    weights = torch.nn.Parameter(tensor(theta).clone())
    optimizer = OPTIMIZERS[name]([weights], 0.05, alpha=alpha, weight_decay=decay)
    path = run_optimizer(optimizer, weights, problem, run)
    assert worst(path, svrg(problem, theta, run, 0.05, alpha=alpha, decay=decay)) <= 1e-12


@pytest.mark.parametrize("precision", [1.0, 8.0])
def test_alpha_svrg_is_the_isotropic_case_of_equation_18(precision: float) -> None:
    # q of precision s, prior of precision N δ ≠ s: ∇̃KL = N δ m is the L2 term (§1 of the design).
    n, alpha, rate, decay = 20, 0.6, 0.05, 0.2
    problem, theta = binary_problem(n=n, d=4), np.linspace(-1.0, 1.0, 4)
    run = plan(n, 200, 25)
    family = poco.get_family("isotropic_gaussian")(precision=precision)
    prior = family.centred_at(torch.zeros(4, dtype=torch.float64), n * decay)
    estimator, noise = poco.estimators.Reparameterised(), torch.zeros(1, 4, dtype=torch.float64)
    state, path = blr.init(family, tensor(theta)), []
    for t, i in enumerate(run.picks):
        if t % run.period == 0:
            sites = [site_of(family, estimator, state.posterior, noise, loss_of(problem, j)) for j in range(n)]
            outer = correction.update_outer(family, None, state.posterior, correction.average_sites(sites), rho=0.0)
        inner = site_of(family, estimator, state.posterior, noise, loss_of(problem, i))
        at_outer = site_of(family, estimator, outer.posterior, noise, loss_of(problem, i))
        corrected = correction.correct(family, inner, at_outer, state.posterior, outer, alpha=alpha)
        assert corrected.anchor is None  # linear sites have no anchor term
        state = blr.update(family, state, prior, corrected.site, rates=(rate * precision / n,), ess=float(n))
        path.append(state.posterior.mean)
    assert worst(path, svrg(problem, theta, run, rate, alpha=alpha, decay=decay)) <= 1e-12


# ---- Theorem 3: full and diagonal Gaussians -----------------------------------------------------------------

PROBLEMS = {"binary": binary_problem(n=7, d=3), "softmax": softmax_problem(n=6)}
RULES = {
    "delta": lambda d: [delta_rule(d)],
    "monte_carlo": lambda d: [monte_carlo_rule(d, 5, seed) for seed in range(4)],
    "gauss_hermite": lambda d: [gauss_hermite_rule(d, 4 if d == 3 else 2)],
}
PRIORS = {
    "merged": lambda d: Prior(np.zeros(d), np.zeros((d, d))),
    "apart": lambda d: Prior(np.linspace(1.0, -0.5, d), 0.8 * np.eye(d)),
}


def start(family: Any, m: ndarray, precision: ndarray) -> Any:
    """The chart's state of N(m, S⁻¹): a dense family takes S, a diagonal one its diagonal."""
    value = precision if family.curvature == "dense" else precision.diagonal().copy()
    return family.State(tensor(m), tensor(value))


def dense(family: Any, state: Any) -> tuple[ndarray, ndarray]:
    """(m, S) as numpy arrays, S as a matrix."""
    value = state.precision.numpy()
    return state.mean.numpy(), value if family.curvature == "dense" else np.diag(value)


def through_natural(
    family: Any, problem: Any, initial: Any, prior: Any, run: Plan, rate: float, rules: list[Rule], alpha: float
) -> list[tuple[ndarray, ndarray]]:
    """blr.natural_step and correction.natural_correct on (S m, −S/2)."""
    n = len(problem.x)

    def natural_gradient(nat: Any, i: int, rule: Rule) -> Any:
        state = family.from_nat(nat)
        loss = loss_of(problem, i)
        site = site_of(family, EXACT, state, tensor(rule.points), loss, tensor(rule.weights))
        return family.site_to_nat(site, state)

    nat, path = family.to_nat(initial), []
    for t, i in enumerate(run.picks):
        rule = rules[t % len(rules)]
        if t % run.period == 0:
            nat_out, mean = nat, site_mean([natural_gradient(nat, j, rule) for j in range(n)])
        pair = natural_gradient(nat, i, rule), natural_gradient(nat_out, i, rule)
        g = correction.natural_correct(*pair, mean, alpha)
        nat = blr.natural_step(nat, family.to_nat(prior), g, rate=rate, ess=float(n))
        path.append(dense(family, family.from_nat(nat)))
    return path


def through_chart(
    family: Any, problem: Any, initial: Any, prior: Any, run: Plan, rate: float, rules: list[Rule], alpha: float
) -> list[tuple[ndarray, ndarray]]:
    """blr.update with correction.correct: plain retraction, equal rates, anchor weight 1."""
    n = len(problem.x)

    def site(posterior: Any, i: int, rule: Rule) -> Any:
        return site_of(family, EXACT, posterior, tensor(rule.points), loss_of(problem, i), tensor(rule.weights))

    state, outer, path = blr.BLRState(initial, ()), None, []
    for t, i in enumerate(run.picks):
        rule = rules[t % len(rules)]
        if t % run.period == 0:
            mean = correction.average_sites([site(state.posterior, j, rule) for j in range(n)])
            outer = correction.update_outer(family, outer, state.posterior, mean, rho=0.0)
        pair = site(state.posterior, i, rule), site(outer.posterior, i, rule)
        corrected = correction.correct(family, *pair, state.posterior, outer, alpha=alpha, anchor_weight=1.0)
        state = blr.update(
            family,
            state,
            prior,
            corrected.site,
            anchor=corrected.anchor,
            rates=family.per_block(rate, rate),
            ess=float(n),
            retraction="plain",
        )
        assert bool(family.in_domain(state.posterior))
        path.append(dense(family, state.posterior))
    return path


def flattened(path: list[tuple[ndarray, ndarray]]) -> list[ndarray]:
    return [np.concatenate([m, s.ravel()]) for m, s in path]


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("ridge", PRIORS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_theorem_3_in_both_coordinates(name: str, problem: str, rule: str, ridge: str, alpha: float) -> None:
    family, task = poco.resolve_family(name), PROBLEMS[problem]
    d, diagonal = task.size, family.curvature == "diagonal"
    prior, rules, run, rate = PRIORS[ridge](d), RULES[rule](d), plan(len(task.x), 18, 6), 0.04
    m, precision = np.linspace(-0.5, 0.8, d), 3.0 * np.eye(d) + 0.4
    precision = np.diag(precision.diagonal()) if diagonal else precision
    arguments = (task, m, precision, prior, run, rate, rules)
    wanted = von_natural(*arguments, alpha=alpha, diagonal=diagonal)
    printed = von_mean_precision(*arguments, alpha=alpha, diagonal=diagonal)
    # the two written-out forms agree with each other: this is the theorem
    assert worst(flattened(printed), flattened(wanted)) <= 1e-10
    initial, p_0 = start(family, m, precision), start(family, *prior)
    natural = through_natural(family, task, initial, p_0, run, rate, rules, alpha)
    chart = through_chart(family, task, initial, p_0, run, rate, rules, alpha)
    assert worst(flattened(natural), flattened(wanted)) <= 1e-10
    assert worst(flattened(chart), flattened(printed)) <= 1e-10
    # "m before S" is wrong
    swapped = von_mean_precision(*arguments, alpha=alpha, diagonal=diagonal, mean_first=True)
    assert worst(flattened(swapped), flattened(wanted)) > 1e-3
    assert worst(flattened(swapped), flattened(chart)) > 1e-3


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_theorem_3_needs_the_anchor_term_and_its_sign(name: str) -> None:
    family, task = poco.resolve_family(name), PROBLEMS["binary"]
    prior, run = PRIORS["apart"](3), plan(7, 18, 6)
    arguments = (family, task, start(family, np.full(3, 0.5), 3.0 * np.eye(3)), start(family, *prior), run, 0.1)
    right = through_chart(*arguments, [delta_rule(3)], 1.0)

    class Changed(type(family)):
        factor = 0.0

        def reanchor(self, site: Any, state_from: Any, state_to: Any) -> Any:
            moved = super().reanchor(site, state_from, state_to)
            shift = fields.subtract(moved, site)
            return fields.add(site, fields.scale(shift, self.factor))

    for factor in (0.0, -1.0):
        Changed.factor = factor
        wrong = through_chart(Changed(), *arguments[1:], [delta_rule(3)], 1.0)
        assert worst(flattened(wrong), flattened(right)) > 1e-3
    Changed.factor = 1.0
    assert worst(flattened(through_chart(Changed(), *arguments[1:], [delta_rule(3)], 1.0)), flattened(right)) <= 1e-12


@pytest.mark.parametrize("name", WITH_CURVATURE)
@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
def test_the_corrected_site_with_a_pair_of_alphas(name: str, weight: float) -> None:
    # ĝ_in − α_g (ĝ_out − g_out),  ĥ_in − α_h (ĥ_out − h_out),  anchor w α_h (h_out − ĥ_out)(m_in − m_out)
    family, rng = poco.resolve_family(name), np.random.default_rng(3)
    d = 3

    def curvature() -> ndarray:
        root = rng.normal(size=(d, d))
        return root @ root.T if family.curvature == "dense" else np.abs(root[0])

    def product(h: ndarray, v: ndarray) -> ndarray:
        return h @ v if family.curvature == "dense" else h * v

    (g_in, g_hat, g_out), (h_in, h_hat, h_out) = rng.normal(size=(3, d)), [curvature() for _ in range(3)]
    m_in, m_out = rng.normal(size=(2, d))
    s_in, s_out = curvature(), curvature()
    site = [family.Site(tensor(g), tensor(h)) for g, h in ((g_in, h_in), (g_hat, h_hat), (g_out, h_out))]
    outer = correction.Outer(family.State(tensor(m_out), tensor(s_out)), site[2])
    corrected = correction.correct(
        family,
        site[0],
        site[1],
        family.State(tensor(m_in), tensor(s_in)),
        outer,
        alpha=family.Site(0.7, 0.4),
        anchor_weight=weight,
    )
    np.testing.assert_allclose(corrected.site.gradient, g_in - 0.7 * (g_hat - g_out), atol=1e-14)
    np.testing.assert_allclose(corrected.site.curvature, h_in - 0.4 * (h_hat - h_out), atol=1e-14)
    if weight == 0.0:
        assert corrected.anchor is None
        return
    wanted = weight * 0.4 * product(h_out - h_hat, m_in - m_out)
    np.testing.assert_allclose(corrected.anchor.gradient, wanted, atol=1e-14)
    assert not bool(corrected.anchor.curvature.any())


def test_theorem_3_through_the_optimizer() -> None:
    # VONPoCo with the delta method and the plain retraction is Eq. 24 with an isotropic prior.
    task, d, n = PROBLEMS["binary"], 3, 7
    run, rate, m = plan(n, 18, 6), 0.04, np.linspace(-0.5, 0.8, 3)
    weights = torch.nn.Parameter(tensor(m).clone())
    optimizer = poco.VONPoCo(
        [weights], rate, float(n), weight_decay=0.1, hess_init=0.3, noise="zero", retraction="plain"
    )
    prior, precision = Prior(np.zeros(d), 0.1 * n * np.eye(d)), (0.1 + 0.3) * n * np.eye(d)
    wanted = von_mean_precision(task, m, precision, prior, run, rate, [delta_rule(d)])
    assert worst(run_optimizer(optimizer, weights, task, run), [mean for mean, _ in wanted]) <= 1e-10


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
