"""Gamma, Exponential, Beta and Dirichlet weights against scipy, mpmath and torch.distributions."""

import math
from typing import Any

import mpmath
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import expfam_poco as poco
from expfam_poco.estimators import Draws
from expfam_poco.families import Beta, Dirichlet, Exponential, Gamma
from expfam_poco.families.positive.gamma_functions import (
    LARGE,
    log_gamma,
    log_less_digamma,
    standard_draw,
    standard_entropy,
    stirling_remainder,
    trigamma_excess,
)
from expfam_poco.noise import NoiseKey

F64 = torch.float64
FAMILIES: tuple[poco.ExponentialFamily, ...] = (Gamma(), Exponential(), Beta(), Dirichlet())
SHAPES = torch.tensor([1e-2, 0.3, 1.0, 5.0, LARGE - 0.01, LARGE + 0.01, 40.0, 1e3, 1e6], dtype=F64)
LEVELS = torch.tensor([1e-6, 1e-3, 0.1, 0.4, 0.6, 0.95, 0.999, 1.0 - 1e-6], dtype=F64)

by_name = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)


def members(family: poco.ExponentialFamily, low: float = -1.0, high: float = 2.0) -> tuple[Any, Any]:
    """Two members with shapes from 10^low to 10^high, 4 × 3 weights (entries)."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        values = [
            10 ** (torch.rand(4, 3, generator=generator, dtype=F64) * (high - low) + low) for _ in family.Nat._fields
        ]
        if isinstance(family, Gamma | Exponential):
            values[-1] = -values[-1]
        made.append(family.State(*values))
    return made[0], made[1]


@pytest.mark.parametrize("name", ["gamma", "exponential", "beta", "dirichlet"])
def test_families_are_registered(name: str) -> None:
    assert type(poco.resolve_family(name)).__name__.lower() == name


# ---- special functions and quantiles -----------------------------------------------------------------------


@pytest.mark.parametrize("a", [1e-3, 0.7, 9.99, 10.01, 50.0, 1e8])
def test_remainders_have_all_their_digits(a: float) -> None:
    with mpmath.workdps(40):
        x = mpmath.mpf(a)
        stirling = mpmath.loggamma(x) - (x - 0.5) * mpmath.log(x) + x - mpmath.log(2 * mpmath.pi) / 2
        digamma = mpmath.log(x) - mpmath.psi(0, x)
        excess = x * mpmath.psi(1, x) - 1
        entropy = x + mpmath.loggamma(x) + (1 - x) * mpmath.psi(0, x)
        expected = [float(v) for v in (stirling, digamma, excess, entropy)]
    functions = (stirling_remainder, log_less_digamma, trigamma_excess, standard_entropy)
    found = [float(function(torch.tensor(a, dtype=F64))) for function in functions]
    assert found == pytest.approx(expected, rel=1e-11)


def test_log_gamma_has_exact_derivatives() -> None:
    a = torch.tensor([0.01, 0.5, 3.0, 9.9, 10.1, 1e4], dtype=F64)
    first = torch.func.vmap(torch.func.grad(log_gamma))
    second = torch.func.vmap(torch.func.grad(torch.func.grad(log_gamma)))
    assert torch.allclose(first(a), torch.from_numpy(scipy.special.digamma(a.numpy())), rtol=1e-13, atol=1e-14)
    assert torch.allclose(second(a), torch.from_numpy(scipy.special.polygamma(1, a.numpy())), rtol=1e-13)


def test_quantiles_agree_with_scipy() -> None:
    a, u = torch.meshgrid(SHAPES[1:-1], LEVELS, indexing="ij")
    x = a * standard_draw(a, u).ratio.exp()
    upper = torch.from_numpy(scipy.special.gammainccinv(a.numpy(), (1.0 - u).numpy()))
    lower = torch.from_numpy(scipy.special.gammaincinv(a.numpy(), u.numpy()))
    expected = torch.where(u > 0.5, upper, lower)
    # relative to the spread: SciPy's own error at 1000 is some 1e-12 of the value
    assert float(((x / expected - 1.0).abs()).max()) < 1e-10


def quantile(a: Any, u: float, start: float) -> Any:
    """log x with P(a, x) = u by Newton's method on log P, or on log(1 − P) in the upper half."""
    y, upper = mpmath.mpf(start), u > 0.5
    target = mpmath.log(1 - mpmath.mpf(u) if upper else mpmath.mpf(u))
    for _ in range(40):
        x = mpmath.exp(y)
        tail = mpmath.gammainc(a, 0, x, regularized=True)
        tail = 1 - tail if upper else tail
        density = mpmath.exp(a * y - x - mpmath.loggamma(a))
        step = (mpmath.log(tail) - target) * tail / density * (-1 if upper else 1)
        y -= step
        if abs(step) < mpmath.mpf(10) ** -28 * (1 + abs(y)):
            break
    return y


@pytest.mark.parametrize(
    ("a", "u"),
    [(a, u) for a in (1e-2, 0.3, 5.0, LARGE + 0.01, 1e3) for u in (1e-6, 0.3, 1.0 - 1e-6)]
    + [(1e5, 1.0 - 1e-6), (1e6, 1e-6), (1e6, 0.3)],  # further out mpmath gives up
)
def test_quantiles_and_their_derivatives_agree_with_mpmath(a: float, u: float) -> None:
    draw = standard_draw(torch.tensor(a, dtype=F64), torch.tensor(u, dtype=F64), slope=True)
    assert draw.slope is not None
    with mpmath.workdps(40):
        start = float(draw.ratio) + math.log(a)
        exact = [quantile(mpmath.mpf(a) * (1 + k * mpmath.mpf(10) ** -8), u, start) for k in (-1, 0, 1)]
        along = (exact[2] - exact[0]) * mpmath.mpf(10) ** 8 / 2  # d log x / d log a
        error = abs(exact[1] - mpmath.log(a) - mpmath.mpf(float(draw.ratio))) * max(1.0, a**0.5)
    assert float(error) < 1e-11
    assert a * float(draw.slope) == pytest.approx(float(along - 1), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_extreme_shapes_give_true_weights(dtype: torch.dtype) -> None:
    shapes = torch.tensor([1e-6, 1e-3, 1.0, 1e4, 1e8, 1e12], dtype=dtype)
    for family in FAMILIES:
        state = family.State(*(-shapes if name == "theta" else shapes for name in family.State._fields))
        theta = family.sample(state, family.noise((6,), 200, NoiseKey(1), dtype=dtype))
        assert theta.dtype == dtype and bool(torch.isfinite(theta).all())
        assert bool(family.support.check(theta).all()) and float(theta.min()) > 0.0
        if isinstance(family, Beta):
            assert float(theta.max()) < 1.0
        site = family.natural_gradient(
            state, Draws(family.noise((6,), 200, NoiseKey(1), dtype=dtype), theta, torch.zeros(200), 1.0 / theta)
        )
        assert all(bool(torch.isfinite(value).all()) for value in site)


# ---- closed forms ------------------------------------------------------------------------------------------


@by_name
def test_densities_entropies_and_divergences_are_torchs(family: poco.ExponentialFamily) -> None:
    q, p = members(family)
    theta = family.sample(q, family.noise((4, 3), 5, NoiseKey(0), dtype=F64))
    one, two = (family.distribution(state).base_dist for state in (q, p))

    def whole(values: Tensor) -> Tensor:
        return values.sum()

    assert torch.allclose(whole(family.log_prob(q, theta)), whole(one.log_prob(theta)), rtol=1e-10)
    assert torch.allclose(whole(family.entropy(q)), whole(one.entropy()), rtol=1e-10)
    divergence = torch.distributions.kl_divergence(one, two)
    assert torch.allclose(whole(family.kl(q, p)), whole(divergence), rtol=1e-10)
    assert torch.allclose(family.point(q), one.mean, rtol=1e-13)


@by_name
def test_closed_forms_are_what_the_engine_derives(family: poco.ExponentialFamily) -> None:
    base, (q, p) = poco.ExponentialFamily, members(family)
    derived = base.to_mean(family, q)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(family.to_mean(q), derived, strict=True))
    assert torch.allclose(family.kl(q, p), base.kl(family, q, p), rtol=1e-9)
    back = family.to_natural(family.to_mean(q))
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(back, q, strict=True))
    vector = family.Nat(
        *(torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(k)) for k in range(len(q)))
    )
    pairs = zip(family.fisher_solve(q, vector), base.fisher_solve(family, q, vector), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in pairs)
    epsilon = family.noise((4, 3), 3, NoiseKey(3), dtype=F64)
    theta = family.sample(q, epsilon)
    draws = Draws(epsilon, theta, torch.zeros(3, dtype=F64), theta.cos())
    pairs = zip(family.natural_gradient(q, draws), base.natural_gradient(family, q, draws), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in pairs)


@by_name
def test_large_shapes_keep_their_digits(family: poco.ExponentialFamily) -> None:
    """KL between members whose shapes differ by a part in 10⁵ at 10⁸: ½ δᵀFδ, where the defining sum has no digit."""
    q, _ = members(family, 7.0, 8.0)
    if isinstance(family, Exponential):
        return
    p = family.State(*(value * (1.0 + 1e-6 * (k + 1)) for k, value in enumerate(q)))
    delta = family.Nat(*(a - b for a, b in zip(p, q, strict=True)))
    half = 0.5 * family.inner(delta, family.fisher_vector_product(q, delta))
    assert torch.allclose(family.kl(q, p), half, rtol=1e-4)


def test_expectations_that_no_weights_have_are_refused() -> None:
    bad = torch.zeros(2)
    with pytest.raises(ValueError, match=r"^mean: .*E\[log θ\] must be smaller"):
        Gamma().to_natural(Gamma.Mean(bad, bad + 1.0 - 0.5))
    with pytest.raises(ValueError, match=r"^mean: .*positive"):
        Exponential().to_natural(Exponential.Mean(bad))
    with pytest.raises(ValueError, match=r"^mean: .*< 1"):
        Dirichlet().to_natural(Dirichlet.Mean(bad))
    with pytest.raises(ValueError, match=r"^mean: .*< 1"):
        Beta().to_natural(Beta.Mean(bad, bad))


@pytest.mark.parametrize("make", [Gamma, Beta, Dirichlet])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_strengths_out_of_range_are_refused(make: Any, value: float) -> None:
    with pytest.raises(ValueError, match="must be a positive, finite number"):
        make(value)


# ---- training ----------------------------------------------------------------------------------------------


@by_name
def test_training_keeps_the_constraint_and_backends_agree(family: poco.ExponentialFamily) -> None:
    """Without weight decay the prior is improper (λ₀ = 0); whole tensors and spans give the same numbers."""
    goal = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]], dtype=F64)
    found = []
    for backend in ("auto", "eager"):
        weight = torch.nn.Parameter(torch.full((2, 3), 1.0 / 3.0, dtype=F64))
        optimizer = poco.PosteriorCorrected(
            [("w", weight)], family, lr=0.05, ess=100.0, weight_decay=0.0, seed=0, backend=backend
        )

        def loss(weight: Tensor = weight) -> Tensor:
            return 2.0 * (weight - goal).square().sum()

        before = loss().item()
        for step in range(20):
            if step % 5 == 3:
                optimizer.refresh([loss, loss])
            optimizer.step(loss)
            assert bool(family.support.check(weight.detach()).all())
        # An exponential posterior is as wide as its mean, which costs more than it gains here.
        assert isinstance(family, Exponential) or loss().item() < 0.7 * before
        found.append(weight.detach().clone())
    assert torch.allclose(found[0], found[1], rtol=1e-10)


@by_name
def test_weights_outside_of_the_support_are_refused_at_the_start(family: poco.ExponentialFamily) -> None:
    weight = torch.nn.Parameter(torch.tensor([0.5, -0.5]))
    with pytest.raises(ValueError, match=r"^params: 'w' holds .*-0\.5.* outside the support of"):
        poco.PosteriorCorrected([("w", weight)], family, lr=0.1, ess=10.0).step(lambda: weight.square().sum())
