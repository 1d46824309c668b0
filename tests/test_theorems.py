"""The theorems and equations of *SVRG and Beyond via Posterior Correction*, against their written-out forms.

The engine's side differentiates torch losses; the references (tests/reference.py) are numpy loops over closed-form
logistic gradients and Hessians. Eq. and Alg. numbers are the paper's.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from reference import (
    WITH_CURVATURE,
    Plan,
    Prior,
    Rule,
    binary_problem,
    delta_rule,
    dense,
    expected,
    gauss_hermite_rule,
    loss_of,
    monte_carlo_rule,
    plan,
    site_mean,
    site_of,
    softmax_problem,
    start,
    svrg,
    tensor,
    von_mean_precision,
    von_natural,
    worst,
)
from torch import Tensor

import expfam_poco as poco
from expfam_poco import blr, correction
from expfam_poco.family import fields

EXACT = poco.estimators.Exact()


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


@pytest.mark.parametrize(("ridge", "alpha"), list(zip(PRIORS, (1.0, 0.6), strict=True)))
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
