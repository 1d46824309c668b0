"""Angles, positive weights and levels against closed forms of others (mpmath, scipy, torch) and differences."""

import math

import mpmath
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import expfam_poco as poco
from expfam_poco.families import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    InverseGaussian,
    LogNormal,
    RelaxedLevels,
    StraightThrough,
    StraightThroughLevels,
    VonMises,
    von_mises,
)
from expfam_poco.families import Relaxed as RelaxedSigns
from expfam_poco.families.positive import inverse_gaussian
from expfam_poco.family.derived import fisher, pathwise_natural_gradient

F64 = torch.float64
KAPPAS = (0.0, 1e-3, 0.5, 3.0, 17.0, 149.0, 151.0, 1e4, 1e6)


def draws(family: poco.ExponentialFamily, state: object, noise: Tensor, gradient: Tensor) -> poco.Draws:
    theta = family.sample(state, noise)
    return poco.Draws(noise, theta, torch.zeros(len(noise), dtype=noise.dtype), gradient)


# ---- angles -----------------------------------------------------------------------------------------------


def test_von_mises_values_are_those_of_mpmath_for_every_concentration() -> None:
    family, kappa = VonMises(), torch.tensor(KAPPAS, dtype=F64)
    nat = family.State(0.6 * kappa, -0.8 * kappa)
    with mpmath.workdps(40):
        bessel = [[mpmath.besseli(order, mpmath.mpf(k)) for order in (0, 1)] for k in KAPPAS]
        logs = [float(mpmath.log(2 * mpmath.pi * zero)) for zero, _ in bessel]
        ratios = [one / zero for zero, one in bessel]
        slopes = [float(1 - r * r - r / k) if k else 0.5 for r, k in zip(ratios, KAPPAS, strict=True)]
    expected = torch.tensor([float(r) for r in ratios], dtype=F64)
    torch.testing.assert_close(family.log_partition(nat), torch.tensor(logs, dtype=F64), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(family.to_mean(nat).cos, 0.6 * expected, rtol=1e-13, atol=1e-14)
    matrix = fisher(family, nat)
    n, across = torch.tensor([0.6, -0.8], dtype=F64), torch.tensor([0.8, 0.6], dtype=F64)
    # 1 − ρ² − ρ/κ by automatic differentiation keeps 10 digits at κ = 149.
    torch.testing.assert_close(n @ matrix @ n, torch.tensor(slopes, dtype=F64), rtol=1e-9, atol=0.0)
    over = torch.tensor([float(r) / k if k else 0.5 for r, k in zip(ratios, KAPPAS, strict=True)], dtype=F64)
    torch.testing.assert_close(across @ matrix @ across, over, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(von_mises._ratio_slope(kappa), torch.tensor(slopes, dtype=F64), rtol=1e-9, atol=0.0)


def test_von_mises_quantiles_invert_the_integral_of_the_density() -> None:
    for kappa in (1e-3, 2.4, 17.0, 1e6):
        for u in (1e-9, 0.1, 0.5, 0.7, 1.0 - 1e-6):
            x = float(von_mises._quantile(torch.tensor(kappa, dtype=F64), torch.tensor(u, dtype=F64)))
            reach = min(math.pi, 10.0 / math.sqrt(kappa))
            cuts = [-reach, *sorted({x, *(s * t / math.sqrt(kappa) for s in (-1, 1) for t in (1, 4) if t < reach)})]
            cuts = [cut for cut in cuts if cut <= x]
            mass = mpmath.quad(lambda t, k=kappa: mpmath.exp(-2 * k * mpmath.sin(t / 2) ** 2), cuts)
            found = float(mass / (2 * mpmath.pi * scipy.special.i0e(kappa)))
            assert math.isclose(found, u, rel_tol=1e-8, abs_tol=1e-13), (kappa, u, found)


def test_von_mises_draws_move_with_their_concentration_as_differences_say() -> None:
    u = torch.tensor([1e-6, 0.02, 0.3, 0.5, 0.9], dtype=F64)
    for kappa in (1e-2, 0.5, 6.0, 200.0):
        k = torch.tensor(kappa, dtype=F64)
        along, _ = von_mises._flow(k, von_mises._quantile(k, u))
        h = 1e-4 * kappa
        difference = (von_mises._quantile(k + h, u) - von_mises._quantile(k - h, u)) / (2.0 * h)
        torch.testing.assert_close(along, difference, rtol=1e-5, atol=1e-7 / kappa**1.5)


@pytest.mark.parametrize("kappa", [0.0, 0.3, 5.0])
def test_von_mises_natural_gradient_is_that_of_the_integral(kappa: float) -> None:
    """E[ℓ] of a periodic loss, over midpoints of u, against quadrature of the density on the circle."""
    family = VonMises()
    state = family.State(torch.tensor([0.6 * kappa], dtype=F64), torch.tensor([-0.8 * kappa], dtype=F64))
    u = ((torch.arange(4000, dtype=F64) + 0.5) / 4000).unsqueeze(-1)
    theta = family.sample(state, u)
    assert bool(((theta > -math.pi) & (theta <= math.pi)).all())
    slope = 2.0 * torch.cos(2.0 * theta) + torch.sin(theta - 1.0)
    found = torch.stack(family.natural_gradient(state, draws(family, state, u, slope)))
    grid = torch.linspace(-math.pi, math.pi, 2001, dtype=F64)[:-1]
    loss = torch.sin(2.0 * grid) - torch.cos(grid - 1.0)
    density = family.log_prob(state, grid).exp() * (2.0 * math.pi / 2000)
    gradient = [(density * loss * part).sum().reshape(1) for part in family.score(state, grid)]
    expected = torch.stack(family.fisher_solve(state, family.Nat(*gradient)))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_von_mises_is_sound_at_extremes_in_float32() -> None:
    family = VonMises()
    kappa = torch.tensor([0.0, 1e-20, 1e6, 1e12])
    state = family.centred_at(torch.tensor([3.1, -3.1, 3.1415, 0.0]), kappa)
    noise = torch.tensor([[2.0**-24] * 4, [0.5] * 4, [1.0 - 2.0**-24] * 4])
    found = family.natural_gradient(state, draws(family, state, noise, torch.ones(3, 4)))
    for value in (family.sample(state, noise), *found, family.entropy(state), *family.to_mean(state)):
        assert bool(torch.isfinite(value).all())
    assert family.to_natural(family.to_mean(family.centred_at(torch.zeros(2), 0.0))).cos.abs().max() == 0.0
    with pytest.raises(ValueError, match="unit circle"):
        family.to_natural(family.Mean(torch.ones(1), torch.ones(1)))


# ---- positive weights -------------------------------------------------------------------------------------


def test_inverse_gaussian_is_that_of_scipy() -> None:
    family = InverseGaussian()
    mean, phi = torch.tensor([0.3, 2.0, 5.0], dtype=F64), torch.tensor([0.05, 3.0, 400.0], dtype=F64)
    state = inverse_gaussian._state(mean, phi)
    q = scipy.stats.invgauss((1.0 / phi).numpy(), scale=(mean * phi).numpy())
    theta = mean * torch.tensor([[0.5], [1.0], [3.0]], dtype=F64)
    torch.testing.assert_close(
        family.log_prob(state, theta), torch.from_numpy(q.logpdf(theta.numpy())), rtol=1e-11, atol=1e-11
    )
    noise = torch.tensor([[-3.0], [-1.0], [0.0], [0.5], [2.5]], dtype=F64)
    # Below and above the median by the accurate one of ppf and isf.
    below, above = (torch.special.ndtr(v).numpy() for v in (noise, -noise))
    expected = torch.where(noise < 0.0, torch.from_numpy(q.ppf(below)), torch.from_numpy(q.isf(above)))
    torch.testing.assert_close(family.sample(state, noise), expected, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(family.point(state), mean)
    back = family.to_natural(family.to_mean(state))
    torch.testing.assert_close(torch.stack(back), torch.stack(state), rtol=1e-11, atol=0.0)


def test_inverse_gaussian_draws_move_as_differences_say() -> None:
    noise = torch.tensor([-6.0, -1.0, 0.0, 2.0, 5.0], dtype=F64)
    for value in (0.05, 1.0, 30.0, 1e5):
        phi = torch.tensor(value, dtype=F64)
        w = inverse_gaussian._quantile(phi, noise)
        found = inverse_gaussian._slope(phi, 2.0 * phi.sqrt() * torch.sinh(0.5 * w))
        ends = [inverse_gaussian._quantile(phi * factor, noise) for factor in (1.0 + 1e-4, 1.0 - 1e-4)]
        torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-4, rtol=1e-6, atol=1e-7)


def test_inverse_gaussian_natural_gradient_is_the_pathwise_one() -> None:
    family = InverseGaussian()
    state = family.centred_at(torch.tensor([0.3, 2.0, 5.0], dtype=F64), torch.tensor([0.2, 3.0, 400.0], dtype=F64))
    noise = torch.linspace(-2.5, 2.5, 7, dtype=F64).unsqueeze(-1).expand(-1, 3)
    measured = draws(family, state, noise, torch.randn(7, 3, dtype=F64))
    found, expected = family.natural_gradient(state, measured), pathwise_natural_gradient(family, state, measured)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-9, atol=1e-9)
    solved = torch.linalg.solve(fisher(family, state), torch.ones(3, 2, dtype=F64)).mT
    ones = family.Nat(torch.ones(3, dtype=F64), torch.ones(3, dtype=F64))
    torch.testing.assert_close(torch.stack(family.fisher_solve(state, ones)), solved, rtol=1e-8, atol=0.0)


def test_scaled_exponential_integral_is_that_of_mpmath() -> None:
    x = [1e-8, 0.1, 1.9, 2.1, 7.0, 300.0, 1e9]
    found = inverse_gaussian.scaled_exponential_integral(torch.tensor(x, dtype=F64))
    expected = [float(mpmath.e1(v) * mpmath.exp(v)) for v in x]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=0.0)


def test_inverse_gaussian_is_sound_at_extremes_in_float32_and_refuses_impossible_means() -> None:
    family = InverseGaussian()
    state = family.centred_at(torch.ones(4), torch.tensor([1e-6, 1.0, 1e6, 1e10]))
    noise = torch.tensor([-6.7, 0.0, 6.7]).unsqueeze(-1).expand(-1, 4)
    found = family.natural_gradient(state, draws(family, state, noise, torch.ones(3, 4)))
    for value in (family.sample(state, noise).log(), *found, family.entropy(state)):
        assert bool(torch.isfinite(value).all())
    with pytest.raises(ValueError, match="positive weights"):
        family.to_natural(family.Mean(torch.ones(1), torch.ones(1)))


def test_log_normal_is_a_gaussian_of_the_logarithm() -> None:
    family, gauss = LogNormal(), DiagonalGaussian()
    state = family.centred_at(torch.tensor([0.3, 2.0], dtype=F64), torch.tensor([0.5, 9.0], dtype=F64))
    theta = torch.tensor([[0.1, 3.0], [1.0, 2.0]], dtype=F64)
    q = torch.distributions.LogNormal(state.mean, state.precision.rsqrt())
    torch.testing.assert_close(family.log_prob(state, theta), q.log_prob(theta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(family.entropy(state), q.entropy(), rtol=1e-12, atol=1e-12)
    noise = torch.randn(5, 2, dtype=F64)
    x = gauss.sample(state, noise).requires_grad_()
    (slope,) = torch.autograd.grad((x.exp().square() + x.exp().sin()).sum(), x)
    theta = x.detach().exp()
    found = family.natural_gradient(state, draws(family, state, noise, 2.0 * theta + theta.cos()))
    expected = gauss.natural_gradient(state, poco.Draws(noise, x.detach(), torch.zeros(5), slope))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_log_normal_keeps_precisions_of_1e10_in_float32() -> None:
    family = LogNormal()
    state = family.centred_at(torch.tensor([0.7, 5.0]), 1e10)
    moved = family.retract(state, family.Site(torch.full((2,), 1e9), torch.full((2,), 1e9)), (0.1, 0.1))
    torch.testing.assert_close(moved.mean, state.mean - 0.1 * 1e9 / moved.precision)
    torch.testing.assert_close(family.point(family.recentre(state, torch.tensor([0.1, 9.0]))), torch.tensor([0.1, 9.0]))


# ---- levels -----------------------------------------------------------------------------------------------

GRIDS = [(-1.0, 0.0, 1.0), tuple(torch.linspace(-1.0, 1.0, 16).tolist()), (-2.0, 0.5, 1.0, 4.0)]


@pytest.mark.parametrize("levels", GRIDS, ids=len)
def test_draws_of_levels_have_their_probabilities(levels: tuple[float, ...]) -> None:
    family = Categorical(levels)
    nat = family.Nat(torch.linspace(-2.0, 1.5, len(levels) - 1, dtype=F64).flip(0).unsqueeze(0))
    u = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    theta = family.sample(nat, 0.5 * torch.logit(u).unsqueeze(-1)).squeeze(-1)
    share = torch.stack([(theta == level).double().mean() for level in family.table(u)])
    expected = torch.cat([torch.zeros(1, dtype=F64), nat.level[0]]).softmax(0)
    assert float((share - expected).abs().max()) < 1.5e-5  # a cell at each end
    assert bool((theta.diff() >= 0.0).all())
    q = family.distribution(nat).base_dist
    assert q.enumerate_support(expand=False).flatten().tolist() == family.table(u).tolist()
    torch.testing.assert_close(q.log_prob(family.table(u).unsqueeze(-1)).squeeze(-1).exp(), expected)
    torch.testing.assert_close(q.mean[0], (expected * family.table(u)).sum())


@pytest.mark.parametrize("levels", GRIDS, ids=len)
def test_relaxed_levels_are_the_fisher_solve_of_the_derivative_of_the_staircase(levels: tuple[float, ...]) -> None:
    family, estimator = Categorical(levels), RelaxedLevels(temperature=0.7)
    generator = torch.Generator().manual_seed(0)
    nat = family.Nat(torch.randn(5, len(levels) - 1, dtype=F64, generator=generator))
    noise = torch.randn(1, 5, dtype=F64, generator=generator)
    gradient = torch.randn(1, 5, dtype=F64, generator=generator)
    theta, pullback = torch.func.vjp(lambda value: estimator.points(family, value, noise), nat)
    (slope,) = pullback(gradient)
    expected = torch.linalg.solve(fisher(family, nat), slope.level)
    found = estimator.natural_gradient(family, nat, poco.Draws(noise, theta, torch.zeros(1), gradient))
    torch.testing.assert_close(found.level, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(family.fisher_solve(nat, slope).level, expected, rtol=1e-8, atol=1e-8)
    hard = RelaxedLevels(temperature=1e-6).points(family, nat, noise)
    torch.testing.assert_close(hard, family.sample(nat, noise), rtol=1e-12, atol=1e-12)


def test_two_levels_are_the_bernoulli_family() -> None:
    levels, signs = Categorical((-1.0, 1.0)), Bernoulli()
    value = torch.linspace(-3.0, 3.1, 7, dtype=F64)
    state, other = levels.State(2.0 * value.unsqueeze(-1)), signs.State(value)
    noise = torch.linspace(-2.0, 2.0, 5, dtype=F64).unsqueeze(-1).expand(-1, 7)
    gradient = torch.randn(5, 7, dtype=F64)
    pairs = ((RelaxedLevels(0.6), RelaxedSigns(0.6)), (StraightThroughLevels(), StraightThrough()))
    for one, two in pairs:
        theta = one.points(levels, state, noise)
        torch.testing.assert_close(theta, two.points(signs, other, noise), rtol=1e-12, atol=1e-12)
        measured = poco.Draws(noise, theta, torch.zeros(5, dtype=F64), gradient)
        found = one.natural_gradient(levels, state, measured).level.squeeze(-1)
        # ∂/∂P(θ = 1) is 2 ∂/∂E[θ].
        torch.testing.assert_close(
            found, 2.0 * two.natural_gradient(signs, other, measured).theta, rtol=1e-12, atol=1e-12
        )
    theta = torch.tensor([-0.4, 0.9])
    torch.testing.assert_close(levels.centred_at(theta).level.squeeze(-1), 2.0 * signs.centred_at(theta).theta)


def test_straight_through_levels_are_exact_in_expectation_for_linear_losses() -> None:
    family = Categorical((-2.0, 0.5, 1.0))
    state = family.State(torch.tensor([[0.3, -1.0]], dtype=F64))
    noise = torch.randn(4, 1, dtype=F64)
    found = StraightThroughLevels().natural_gradient(
        family, state, draws(family, state, noise, torch.full((4, 1), 3.0, dtype=F64))
    )
    torch.testing.assert_close(found.level, torch.tensor([[7.5, 9.0]], dtype=F64))  # 3 (l_k − l₀)


@pytest.mark.parametrize("precise", [True, False], ids=["prior", "flat"])
@pytest.mark.parametrize("levels", GRIDS, ids=len)
def test_a_prior_as_precise_as_q_makes_steps_gradient_descent_on_the_mean(
    levels: tuple[float, ...], precise: bool
) -> None:
    # q ∝ exp(−½ s (l − m)²) stays so, with m ← (1−η) m + η c − η N ḡ/s; with a flat prior s shrinks as (1−η)ᵗ.
    strength, rate, ess, slope = 9.0, 0.1, 50.0, torch.tensor([0.02, -0.05], dtype=F64)
    table, half = torch.tensor(levels, dtype=F64), 0.5 * (levels[-1] - levels[0])
    m, s, centre = torch.tensor([0.4, -0.3], dtype=F64), strength / half**2, 0.5 * (levels[-1] + levels[0])
    weight, pull = torch.nn.Parameter(m.clone()), s if precise else 0.0
    optimizer = poco.PosteriorCorrected(
        [("weight", weight)], Categorical(levels, strength=strength), lr=rate, ess=ess, seed=0,
        weight_decay=strength / ess if precise else 0.0, curvature="straight_through",
    )  # fmt: skip
    for _ in range(3):
        optimizer.step(lambda: weight @ slope)
        after = (1.0 - rate) * s + rate * pull
        m, s = ((1.0 - rate) * s * m + rate * pull * centre - rate * ess * slope) / after, after
    (state,) = optimizer.posterior_states().values()
    expected = (-0.5 * s * (m.unsqueeze(-1) - table) ** 2).softmax(-1)
    torch.testing.assert_close(Categorical(levels).log_odds(state).softmax(-1), expected, rtol=1e-9, atol=1e-12)


def test_levels_are_sound_for_extreme_log_odds_in_float32() -> None:
    family = Categorical()
    state = family.State(torch.tensor([[40.0, -40.0], [-40.0, 40.0], [-40.0, -40.0], [0.0, 0.0]]))
    assert family.point(state).tolist() == [0.0, 1.0, -1.0, -1.0]
    noise = torch.tensor([-11.0, 0.0, 11.0]).unsqueeze(-1).expand(-1, 4)
    for estimator in (RelaxedLevels(), StraightThroughLevels(), RelaxedLevels(0.5)):
        theta = estimator.points(family, state, noise)
        measured = poco.Draws(noise, theta, torch.zeros(3), torch.ones(3, 4))
        assert bool(torch.isfinite(estimator.natural_gradient(family, state, measured).level).all())
    ones = family.Nat(torch.ones(4, 2))
    assert bool(torch.isfinite(family.fisher_solve(state, ones).level).all())
    assert family.sample(state, noise)[1].tolist() == [0.0, 1.0, -1.0, 0.0]


@pytest.mark.parametrize("point", ["mode", "mean"])
def test_levels_are_recentred_where_they_are_told(point: str) -> None:
    family = Categorical((-2.0, 0.5, 1.0), point_estimate=point)
    state = family.State(torch.tensor([[0.0, 0.0], [5.0, -3.0], [-20.0, 1.0]], dtype=F64))
    for theta in ([-2.0, 0.5, 1.0], [1.0, 1.0, 0.5], [0.5, -2.0, -2.0]):
        goal = torch.tensor(theta, dtype=F64)
        torch.testing.assert_close(family.point(family.recentre(state, goal)), goal, rtol=1e-9, atol=1e-9)
    uniform = family.centred_at(torch.tensor([0.7]), 0.0)
    torch.testing.assert_close(family.to_mean(uniform).level, torch.full((1, 2), 1.0 / 3.0))
    assert Categorical((-2.0, 0.5, 1.0)).point(family.centred_at(torch.tensor([0.8, -3.0]))).tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    "wrong", [{"levels": (1.0,)}, {"levels": (1.0, 0.0)}, {"levels": (0.0, math.inf)}, {"levels": (0.0, math.nan)},
              {"point_estimate": "median"}, {"strength": 0.0}]
)  # fmt: skip
def test_wrong_levels_and_choices_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Categorical(**wrong)
    with pytest.raises(ValueError, match="temperature"):
        RelaxedLevels(temperature=0.0)
    with pytest.raises(ValueError, match="Categorical"):
        RelaxedLevels().check(Bernoulli())


def test_a_network_of_levels_trains_in_spans_with_corrections_and_continues_after_loading() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 6, generator=generator), torch.randint(2, (32,), generator=generator)

    def make() -> tuple[torch.nn.Module, poco.PosteriorCorrected]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 2))
        optimizer = poco.PosteriorCorrected(
            model.named_parameters(), "categorical", lr=0.1, ess=32.0, momentum=0.9, seed=0, backend="eager"
        )
        return model, optimizer

    def train(model: torch.nn.Module, optimizer: poco.PosteriorCorrected, steps: range) -> None:
        def closure(rows: slice) -> object:
            return lambda: torch.nn.functional.cross_entropy(model(x[rows]) / 6.0, y[rows])

        for step in steps:
            if step % 3 == 0:
                optimizer.refresh([closure(slice(8 * j, 8 * j + 8)) for j in range(4)])
            optimizer.step(closure(slice(8 * (step % 4), 8 * (step % 4) + 8)))

    model, optimizer = make()
    train(model, optimizer, range(4))
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(4, 7))
    train(other, resumed, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert {v for p in model.parameters() for v in p.flatten().tolist()} <= {-1.0, 0.0, 1.0}
