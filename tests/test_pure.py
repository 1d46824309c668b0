"""The pure functions: chart and natural coordinates, ensembles under vmap, float32, and the retractions."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import FAMILIES, WITH_CURVATURE, binary_problem, plan, site_of, tensor
from torch import Tensor

import expfam_poco as poco
from expfam_poco import blr, correction
from expfam_poco.family import fields
from expfam_poco.noise import NoiseKey

LEAFWISE = [name for name in FAMILIES if not poco.resolve_family(name).joint]
GAUSSIAN = [name for name in FAMILIES if poco.resolve_family(name).noise_kind == "normal"]
N, D = 8, 3
PROBLEM = binary_problem(n=N, d=D, seed=6)


def loss_of(i: int) -> Callable[[Tensor], Tensor]:
    return lambda theta: PROBLEM.torch_loss(theta, i)


def estimators_of(family: Any) -> list[Any]:
    """The family's default estimator, and the exact one where there is one."""
    fitting = poco.estimators.available(family)
    return [fitting[name] for name in dict.fromkeys([family.default_estimator, "exact"]) if name in fitting]


def steady(family: Any) -> Any:
    """An estimator whose plain steps stay in the domain."""
    return estimators_of(family)[-1]


def error(found: Any, wanted: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def member(family: Any, theta: list[float], strength: float = 1.0) -> Any:
    """A posterior centred at θ: `centred_at` through natural coordinates, so that it is a member of the family."""
    return family.from_nat(family.to_nat(family.centred_at(tensor(theta), strength)))


def random_site(family: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    zero = family.kl_gradient(*(family.centred_at(torch.zeros(D, dtype=torch.float64)),) * 2)
    parts = [rng.normal(size=tuple(value.shape)) for value in zero]
    return family.Site(*(tensor(part + part.T if part.ndim == 2 else part) for part in parts))


# ---- chart and natural coordinates --------------------------------------------------------------------------


@pytest.mark.parametrize(("rho", "alpha"), [(0.0, 1.0), (0.6, 0.7)], ids=["whole", "averaged"])
@pytest.mark.parametrize("name", FAMILIES)
def test_chart_and_natural_coordinates_give_the_same_steps(name: str, rho: float, alpha: float) -> None:
    family = poco.resolve_family(name)
    estimator, run, rate = steady(family), plan(N, 40, 8), 0.05
    start, prior = member(family, [0.4, -0.6, 0.2], 3.0), member(family, [0.2, 0.5, -0.3])

    def site(posterior: Any, i: int, t: int) -> Any:
        noise = family.noise((D,), 2, NoiseKey(0, step=t), dtype=torch.float64)
        return site_of(family, estimator, posterior, noise, loss_of(i))

    def in_chart(reanchor_average: bool) -> list[Any]:
        state, outer, path = blr.BLRState(start, ()), None, []
        for t, i in enumerate(run.picks):
            if t % run.period == 0:
                mean = correction.average_sites([site(state.posterior, j, t) for j in range(N)])
                options = {"rho": rho, "reanchor_average": reanchor_average}
                outer = correction.update_outer(family, outer, state.posterior, mean, **options)
            pair = site(state.posterior, i, t), site(outer.posterior, i, t)
            corrected = correction.correct(family, *pair, state.posterior, outer, alpha=alpha)
            state = blr.update(
                family,
                state,
                prior,
                corrected.site,
                anchor=corrected.anchor,
                rates=family.per_block(rate, rate),
                ess=float(N),
                retraction="plain",
            )
            assert bool(family.in_domain(state.posterior))
            path.append(state.posterior)
        return path

    def in_natural_coordinates() -> list[Any]:
        nat, average, path = [*family.to_nat(start)], None, []
        nat_0 = family.to_nat(prior)

        def natural_site(at: Any, i: int, t: int) -> list[Tensor]:
            posterior = family.from_nat(family.Nat(*at))
            return [*family.site_to_nat(site(posterior, i, t), posterior)]

        for t, i in enumerate(run.picks):
            if t % run.period == 0:
                each = [natural_site(nat, j, t) for j in range(N)]
                fresh = [sum(values) / N for values in zip(*each, strict=True)]
                keep = 0.0 if average is None else rho
                average = [keep * a + (1.0 - keep) * b for a, b in zip(average or fresh, fresh, strict=True)]
                nat_out = nat
            inner, outer = natural_site(nat, i, t), natural_site(nat_out, i, t)
            nat = [
                (1.0 - rate) * lam + rate * lam_0 - rate * N * (a - alpha * (b - c))
                for lam, lam_0, a, b, c in zip(nat, nat_0, inner, outer, average, strict=True)
            ]
            path.append(family.from_nat(family.Nat(*nat)))
        return path

    wanted = in_natural_coordinates()
    found = in_chart(True)
    assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-11
    # the printed average mixes sites of different anchors; where sites are linear there is nothing to move
    printed = max(error(a, b) for a, b in zip(in_chart(False), wanted, strict=True))
    linear = family.momentum_block == family.Site._fields
    assert printed <= 1e-11 if rho == 0.0 or linear else printed > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_and_states_go_to_natural_coordinates_and_back(name: str) -> None:
    family = poco.resolve_family(name)
    state, other = member(family, [0.4, -0.6, 0.2], 3.0), member(family, [1.4, 0.6, -0.9], 2.0)
    site = random_site(family, 0)
    assert error(family.from_nat(family.to_nat(state)), state) <= 1e-14
    there = family.site_to_nat(site, state)
    assert error(family.site_from_nat(there, state), site) <= 1e-14
    # re-anchoring is: to natural coordinates at one state, back at the other
    assert error(family.reanchor(site, state, other), family.site_from_nat(there, other)) <= 1e-13


@pytest.mark.parametrize("name", FAMILIES)
def test_closed_forms_of_densities_agree_with_the_general_ones_and_pyro(name: str) -> None:
    family, general = poco.resolve_family(name), poco.ExponentialFamily
    state, prior = member(family, [0.4, -0.6, 0.2], 3.0), member(family, [0.2, 0.5, -0.3])
    theta = family.sample(state, family.noise((D,), 7, NoiseKey(1), dtype=torch.float64))
    torch.testing.assert_close(family.log_prob(state, theta), general.log_prob(family, state, theta))
    torch.testing.assert_close(family.entropy(state), general.entropy(family, state))
    torch.testing.assert_close(family.kl(state, prior), general.kl(family, state, prior))
    whole = family.log_prob(state, theta)
    whole = whole if family.joint else whole.sum(-1)
    torch.testing.assert_close(whole, family.distribution(state).log_prob(theta))


# ---- ensembles ----------------------------------------------------------------------------------------------


def train(
    family: Any, estimator: Any, theta: Tensor, noise: Tensor, *, momentum: float = 0.9, path: list[Any] | None = None
) -> tuple[Tensor, ...]:
    """A corrected run of `len(noise)` steps with momentum, refreshed three times; returns all final tensors."""
    run = plan(N, len(noise), 4)
    prior = family.centred_at(torch.full_like(theta, 0.1))
    state, outer = blr.init(family, theta, 3.0, momentum=momentum), None

    def site(posterior: Any, i: int, t: int) -> Any:
        return site_of(family, estimator, posterior, noise[t], loss_of(i), ess=float(N))

    for t, i in enumerate(run.picks):
        if t % run.period == 0:
            mean = correction.average_sites([site(state.posterior, j, t) for j in range(N)])
            outer = correction.update_outer(family, outer, state.posterior, mean, rho=0.4)
        corrected = correction.correct(
            family, site(state.posterior, i, t), site(outer.posterior, i, t), state.posterior, outer, alpha=0.8
        )
        state = blr.update(
            family,
            state,
            prior,
            corrected.site,
            anchor=corrected.anchor,
            rates=family.per_block(0.05, 0.03),
            ess=float(N),
            momentum=momentum,
            step=t + 1,
            clip_radius=5.0,
        )
        if path is not None:
            path.append(state)
    return (*state.posterior, *state.momentum, *outer.posterior, *outer.site)


CASES = [
    (name, type(estimator).__name__) for name in FAMILIES for estimator in [*estimators_of(poco.resolve_family(name))]
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "estimator"), CASES)
def test_an_ensemble_under_vmap_equals_separate_runs(name: str, estimator: str) -> None:
    family, seeds, steps = poco.resolve_family(name), 32, 10
    made = next(e for e in estimators_of(family) if type(e).__name__ == estimator)
    generator = torch.Generator().manual_seed(0)
    thetas = torch.randn(seeds, D, generator=generator, dtype=torch.float64)
    noises = torch.stack(
        [
            family.noise((D,), 2 * steps, NoiseKey(seed), dtype=torch.float64).reshape(steps, 2, D)
            for seed in range(seeds)
        ]
    )

    def run(theta: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return train(family, made, theta, noise)

    together = torch.func.vmap(run)(thetas, noises)
    for seed in range(seeds):
        alone = run(thetas[seed], noises[seed])
        assert error([value[seed] for value in together], alone) <= 1e-12
        assert all(bool(torch.isfinite(value).all()) for value in alone)
    # the members are different runs
    assert float(together[0].std(0).min()) > 1e-3


def test_every_leafwise_family_is_among_the_ensembles() -> None:
    assert {name for name, _ in CASES} >= set(LEAFWISE)


@pytest.mark.parametrize("name", LEAFWISE)
def test_states_of_separate_runs_stack_into_an_ensemble(name: str) -> None:
    family = poco.resolve_family(name)
    states = [family.centred_at(torch.full((D,), 0.1 * number).double(), 2.0) for number in range(4)]
    prior = family.centred_at(torch.zeros(D, dtype=torch.float64))
    sites = [random_site(family, number) for number in range(4)]

    def step(posterior: Any, site: Any) -> Any:
        rates = family.per_block(0.1, 0.1)
        return blr.update(family, blr.BLRState(posterior, ()), prior, site, rates=rates, ess=2.0).posterior

    together = torch.func.vmap(step)(correction.stack_states(states), correction.stack_states(sites))
    for number in range(4):
        alone = step(states[number], sites[number])
        assert error([value[number] for value in together], alone) <= 1e-15


# ---- Algorithm 4's inner step -------------------------------------------------------------------------------


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("clip", [0.05, math.inf])
def test_algorithm_4_lines_10_to_16(debias: bool, clip: float) -> None:
    # The inner step written out with h, s = κ(h+δ), a global step count, and random measurements.
    family, rng = poco.resolve_family("diagonal_gaussian"), np.random.default_rng(7)
    kappa, delta, eta, beta_1, beta_2, alpha = 50.0, 0.1, 0.2, 0.9, 0.95, 0.7
    m, h, g = rng.normal(size=D), np.full(D, 0.8), np.zeros(D)
    m_out, g_out, h_out = m.copy(), rng.normal(size=D), rng.uniform(0.5, 1.0, size=D)
    state = blr.init(family, tensor(m), kappa * (0.8 + delta), momentum=beta_1)
    prior = family.centred_at(torch.zeros(D, dtype=torch.float64), kappa * delta)
    outer = correction.Outer(state.posterior, family.Site(tensor(g_out), tensor(h_out)))
    for t in range(1, 41):
        g_in, h_in, g_hat, h_hat = rng.normal(size=(4, D))
        # lines 10 to 16
        g_new = g_in - alpha * (g_hat - g_out)
        h_new = h_in - alpha * (h_hat - h_out)
        g = beta_1 * g + (1 - beta_1) * g_new
        h = beta_2 * h + (1 - beta_2) * h_new + 0.5 * (1 - beta_2) ** 2 * (h - h_new) ** 2 / (h + delta)
        g_bar = g / (1 - beta_1**t) if debias else g
        g_bar = (g_bar + delta * m + alpha * (h_out - h_hat) * (m - m_out)) / (h + delta)
        m = m - eta * np.clip(g_bar, -clip, clip)
        # the pure functions
        sites = family.Site(tensor(g_in), tensor(h_in)), family.Site(tensor(g_hat), tensor(h_hat))
        corrected = correction.correct(family, *sites, state.posterior, outer, alpha=alpha)
        state = blr.update(
            family,
            state,
            prior,
            corrected.site,
            anchor=corrected.anchor,
            rates=family.Site(eta, 1 - beta_2),
            ess=kappa,
            momentum=beta_1,
            debias=debias,
            step=t,
            clip_radius=clip,
        )
        np.testing.assert_allclose(state.posterior.mean, m, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(state.posterior.precision, kappa * (h + delta), rtol=1e-12)
        assert h.min() + delta > 0.0


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_the_two_retractions(name: str) -> None:
    family, rng, eta = poco.resolve_family(name), np.random.default_rng(8), 0.9
    dense = family.curvature == "dense"

    def kept(matrix: np.ndarray) -> Tensor:
        return tensor(matrix if dense else np.diag(matrix).copy())

    root = rng.normal(size=(D, D))
    precision = root @ root.T + 0.1 * np.eye(D)
    precision = precision if dense else np.diag(np.diag(precision))
    pull = -9.0 * np.eye(D) + rng.normal(size=(D, D))
    pull = 0.5 * (pull + pull.T) if dense else np.diag(np.diag(pull))
    slope, m = rng.normal(size=(2, D))
    state = family.State(tensor(m), kept(precision))
    direction = family.Site(tensor(slope), kept(pull))
    plain = precision + eta * pull
    bent = plain + 0.5 * eta**2 * pull @ np.linalg.inv(precision) @ pull
    found = family.retract(state, direction, family.Site(0.3, eta))
    np.testing.assert_allclose(found.precision, kept(bent), rtol=1e-10)
    np.testing.assert_allclose(found.mean, m - 0.3 * np.linalg.solve(bent, slope), rtol=1e-10)
    assert bool(family.in_domain(found))
    assert np.linalg.eigvalsh(plain).min() < 0.0
    assert not bool(family.in_domain(family.retract(state, direction, family.Site(0.3, eta), variant="plain")))
    gentle = family.retract(state, family.Site(tensor(slope), kept(-pull)), family.Site(0.3, eta), variant="plain")
    np.testing.assert_allclose(gentle.precision, kept(precision - eta * pull), rtol=1e-12)
    np.testing.assert_allclose(gentle.mean, m - 0.3 * np.linalg.solve(precision - eta * pull, slope), rtol=1e-10)


# ---- float32 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "estimator"), CASES)
def test_float32_is_kept_and_close_to_float64(name: str, estimator: str) -> None:
    # One rounding is eps/2 of the value; a step makes about 10 of them on its way to each entry, amplified by the
    # preconditioner's spread (below 4 here) and not by the dynamics, which contract. So 40 eps a step, at the
    # scale of the largest entry of its field.
    family, steps = poco.resolve_family(name), 12
    made = next(e for e in estimators_of(family) if type(e).__name__ == estimator)
    paths: dict[torch.dtype, list[Any]] = {}
    for dtype in (torch.float32, torch.float64):
        noise = family.noise((D,), 2 * steps, NoiseKey(3), dtype=dtype).reshape(steps, 2, D)
        paths[dtype] = []
        final = train(family, made, torch.tensor([0.4, -0.6, 0.2], dtype=dtype), noise, path=paths[dtype], momentum=0.5)
        assert {value.dtype for value in final} == {dtype}
    for t, (single, double) in enumerate(zip(paths[torch.float32], paths[torch.float64], strict=True), start=1):
        for a, b in zip((*single.posterior, *single.momentum), (*double.posterior, *double.momentum), strict=True):
            bound = 40.0 * t * torch.finfo(torch.float32).eps * (1.0 + float(b.abs().max()))
            assert a.dtype == torch.float32
            assert float((a.double() - b).abs().max()) <= bound


@pytest.mark.parametrize("name", FAMILIES)
def test_natural_steps_keep_float32(name: str) -> None:
    family = poco.resolve_family(name)
    nat = family.to_nat(family.centred_at(torch.tensor([0.4, -0.6])))
    moved = blr.natural_step(nat, nat, correction.natural_correct(nat, nat, nat, 0.5), rate=0.1, ess=10.0)
    assert {value.dtype for value in moved} == {torch.float32}
    assert error(moved, fields.scale(nat, 1.0 - 0.1 * 10.0)) <= 4e-7


def at_precision(name: str, precision: float, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """A Gaussian family with a sharp member and a broad prior of it."""
    family = poco.resolve_family(name)
    if family.curvature == "none":
        family = dataclasses.replace(family, precision=precision)
    mean = torch.tensor([1.0, -0.7, 0.3], dtype=torch.float32).to(dtype)
    return family, family.centred_at(mean, precision), family.centred_at(0.5 * mean, 2.0)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_at_precision_1e10_in_float32_the_chart_is_accurate_and_natural_coordinates_lose_everything(name: str) -> None:
    general, single, double = poco.ExponentialFamily, torch.float32, torch.float64
    eps = torch.finfo(single).eps
    family, state, prior = at_precision(name, 1e10, single)
    _, exact, exact_prior = at_precision(name, 1e10, double)

    def relative(found: Tensor, wanted: Tensor) -> float:
        return float(((found.double() - wanted) / wanted).abs().max())

    # divergences and entropies: a few roundings in the chart; off by more than their size in natural coordinates
    divergence = family.kl(exact, exact_prior)
    assert relative(family.kl(state, prior), divergence) <= 8 * eps
    assert relative(family.entropy(state), family.entropy(exact)) <= 8 * eps
    assert relative(general.entropy(family, state), family.entropy(exact)) > 0.5
    if family.curvature != "none":  # for one fixed precision the general form needs a prior of the same
        assert relative(general.kl(family, state, prior), divergence) > 0.5
    # log densities at exactly representable points five standard deviations off
    theta = state.mean + 5e-5
    wanted = family.log_prob(exact, theta.double())
    assert relative(family.log_prob(state, theta), wanted) <= 16 * eps
    assert relative(general.log_prob(family, state, theta), wanted) > 0.5
    if family.curvature == "none":
        return
    # the variance 1e-10 drowns in E[θθᵀ] ~ 1
    try:
        back = family.from_nat(family.to_natural(family.to_mean(family.to_nat(state))))
        lost = relative(back.precision.double().flatten()[:1], exact.precision.flatten()[:1])
    except ValueError:
        lost = math.inf
    assert lost > 0.5
    # a small gradient drowns in h m ~ 1
    curvature = family.kl_gradient(prior, state).curvature / 1e10  # about the identity
    site = family.Site(torch.full((D,), 3e-9, dtype=single), curvature)
    there_and_back = family.site_from_nat(family.site_to_nat(site, state), state)
    assert relative(there_and_back.gradient, tensor(site.gradient)) > 0.5


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_a_chart_run_at_precision_1e10_in_float32_stays_within_roundings(name: str) -> None:
    # ess = 1e10: fifty steps with noisy curvature, second-order retraction; also the gradients of order 1e-9 arrive.
    eps, steps, ess = torch.finfo(torch.float32).eps, 50, 1e10
    finals = {}
    for dtype in (torch.float32, torch.float64):
        family, state, prior = at_precision(name, 1e10, dtype)
        start = state.mean
        run = blr.BLRState(family.State(torch.zeros_like(start), state.precision), ())
        for t in range(steps):
            eye = torch.eye(D, dtype=torch.float32) if family.curvature == "dense" else torch.ones(D)
            generator = torch.Generator().manual_seed(t)
            curvature = eye * (0.5 + torch.rand(D, generator=generator))
            gradient = 1e-9 * torch.randn(D, generator=generator)
            site = family.Site(gradient.to(dtype), curvature.to(dtype))
            prior_at_zero = family.State(torch.zeros_like(start), prior.precision)
            run = blr.update(family, run, prior_at_zero, site, rates=family.Site(0.1, 0.05), ess=ess)
        finals[dtype] = run.posterior
    single, double = finals[torch.float32], finals[torch.float64]
    scale = float(double.mean.abs().max())
    assert 1e-11 < scale < 1e-8
    assert float((single.mean.double() - double.mean).abs().max()) <= 8 * steps * eps * scale
    relative = (single.precision.double() - double.precision).abs().max() / double.precision.abs().max()
    assert float(relative) <= 8 * steps * eps


@pytest.mark.parametrize("name", [name for name in WITH_CURVATURE if poco.resolve_family(name).joint])
def test_an_ill_conditioned_precision_in_float32_keeps_its_mean_in_the_chart_only(name: str) -> None:
    # S = Q diag(1e10, 1e6, 1e4) Qᵀ: m = S⁻¹(S m) is off by cond(S)·eps, a chart step by that much of the step.
    family, rng = poco.resolve_family(name), np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(D, D)))[0]
    precision = q @ np.diag([1e10, 1e6, 1e4]) @ q.T
    mean = np.array([1.0, -0.7, 0.3], dtype=np.float32)
    state = family.State(torch.from_numpy(mean), torch.from_numpy(precision).float())
    back = family.from_nat(family.to_nat(state))
    assert float((back.mean - state.mean).abs().max()) > 1e-4
    prior = family.centred_at(torch.zeros(D), 1.0)
    site = family.Site(torch.full((D,), 1e-8), state.precision / 1e10)
    moved = blr.update(family, blr.BLRState(state, ()), prior, site, rates=family.Site(0.1, 0.1), ess=1e10).posterior
    exact = family.State(*(value.double() for value in state))
    site, prior = family.Site(*(v.double() for v in site)), family.centred_at(torch.zeros(D).double(), 1.0)
    wanted = blr.update(family, blr.BLRState(exact, ()), prior, site, rates=family.Site(0.1, 0.1), ess=1e10).posterior
    step = float((wanted.mean - exact.mean).abs().max())
    assert float((moved.mean.double() - wanted.mean).abs().max()) <= 0.3 * step + 1e-7
    assert step < 1e-2


# ---- small parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_variance_ratio_is_its_definition(alpha: float) -> None:
    family = poco.resolve_family("isotropic_gaussian")
    a, b, mean = (random_site(family, seed) for seed in range(3))
    outer = correction.Outer(family.centred_at(torch.zeros(D).double()), mean)
    (terms,) = correction.variance_terms(a, b, outer)
    found = correction.variance_ratio(*(float(term) for term in terms), alpha)
    plain = (a.theta - mean.theta).numpy()
    left = plain - alpha * (b.theta - mean.theta).numpy()
    assert abs(found - (left @ left) / (plain @ plain)) <= 1e-14
    assert math.isnan(correction.variance_ratio(0.0, 0.0, 0.0, alpha))


def test_alpha_from_numbers_pairs_and_schedules() -> None:
    assert correction.alpha_at(0.3, 1) == (0.3, 0.3)
    assert correction.alpha_at((0.3, 0.6), 1) == (0.3, 0.6)
    burn_in = poco.BurnIn(steps=3, alpha=0.5)
    assert [correction.alpha_at(burn_in, t)[0] for t in range(1, 6)] == [0.0, 0.0, 0.0, 0.5, 0.5]
    for wrong in (-0.1, 1.1, (0.5, 2.0), lambda step: 3.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            correction.alpha_at(wrong, 1)


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_the_norm_clip_factor(limit: float) -> None:
    parts = [tensor([3.0, 4.0]), tensor([[12.0]])]
    squares = [blr.square_of(parts[:1]), blr.square_of(parts[1:])]
    assert abs(float(blr.norm_clip_factor(squares, limit)) - min(1.0, limit / 13.0)) <= 1e-15
    assert float(blr.square_of(parts)) == 169.0
    zero = [torch.zeros((), dtype=torch.float64)]
    assert float(blr.norm_clip_factor(zero, limit)) == 1.0


@pytest.mark.parametrize("weight", [0.0, 0.01, 1.0])
def test_an_old_average_moves_by_the_anchor_weight(weight: float) -> None:
    """Written out: g ← ρ (g + w H (m′ − m)) + (1−ρ) g′; with w = 1 the site's exact value at the new mean."""
    family = poco.resolve_family("diagonal_gaussian")
    before = family.State(tensor([1.0, -2.0]), tensor([3.0, 4.0]))
    after = family.State(tensor([0.5, -1.0]), tensor([5.0, 6.0]))
    old = family.Site(tensor([0.3, 0.4]), tensor([2.0, 7.0]))
    new = family.Site(tensor([0.1, -0.2]), tensor([1.0, 5.0]))
    outer = correction.update_outer(family, correction.Outer(before, old), after, new, rho=0.6, anchor_weight=weight)
    moved = old[0] + weight * old[1] * (after[0] - before[0])
    np.testing.assert_allclose(outer.site[0], 0.6 * moved + 0.4 * new[0], rtol=1e-14)
    np.testing.assert_allclose(outer.site[1], 0.6 * old[1] + 0.4 * new[1], rtol=1e-14)
