"""Where a posterior starts, what becomes of it when weights are changed from outside, and which priors pull nowhere."""

from typing import Any

import pytest
import torch

import expfam_poco as poco
from expfam_poco.families import Dirichlet, Exponential, Gamma, KroneckerGaussian, LogNormal, LowRankGaussian

POSITIVE = ["gamma", "exponential", "log_normal", "inverse_gaussian"]
WIDE = [*POSITIVE, "beta", "von_mises"]


def optimizer_of(weight: torch.nn.Parameter, family: Any, **choices: Any) -> poco.PosteriorCorrected:
    return poco.PosteriorCorrected(
        [("w", weight)], family, **{"lr": 1e-9, "ess": 100.0, "weight_decay": 0.0, "seed": 0, **choices}
    )


@pytest.mark.parametrize("name", WIDE)
def test_a_step_of_no_length_leaves_the_weights(name: str) -> None:
    weight = torch.nn.Parameter(torch.tensor([0.2, 0.7]))
    optimizer_of(weight, name).step(lambda: (weight**2).sum())
    torch.testing.assert_close(weight.detach(), torch.tensor([0.2, 0.7]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gamma", "log_normal", "inverse_gaussian", "beta", "von_mises"])
def test_weights_that_nobody_touched_keep_their_posteriors(name: str) -> None:
    weight = torch.nn.Parameter(torch.tensor([0.3, 0.6, 0.4]))
    optimizer = optimizer_of(weight, name, lr=0.02)
    for _ in range(20):
        optimizer.step(lambda: ((weight - 0.5) ** 2).sum())
    before = optimizer.posterior_states()["w"]
    with torch.no_grad():
        weight[0] = 0.8
    optimizer.param_groups[0]["lr"] = 1e-12
    optimizer.step(lambda: (weight**2).sum())
    for old, new in zip(before, optimizer.posterior_states()["w"], strict=True):
        torch.testing.assert_close(new[1:], old[1:], rtol=1e-5, atol=1e-6)
    assert abs(float(weight.detach()[0]) - 0.8) < 1e-3


@pytest.mark.parametrize("name", [*WIDE, "dirichlet", "diagonal_gaussian", "kronecker_gaussian", "low_rank_gaussian"])
def test_the_delta_method_is_refused_where_the_noise_measures_the_width(name: str) -> None:
    weight = torch.nn.Parameter(torch.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="noise='zero': Reparameterised measures with the noise"):
        optimizer_of(weight, name, noise="zero")
    optimizer_of(weight, "isotropic_gaussian", noise="zero")


def test_a_precision_that_moves_the_weights_is_refused() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.5, 2.0]))
    with pytest.raises(ValueError, match=r"hess_init=1.0: Exponential has a precision of its own"):
        optimizer_of(weight, Exponential(), hess_init=1.0)


def test_rows_that_do_not_sum_to_one_are_refused() -> None:
    weight = torch.nn.Parameter(torch.full((2, 3), 7.0))
    optimizer = optimizer_of(weight, Dirichlet())
    with pytest.raises(ValueError, match=r"'w' holds \[7.0, 7.0, 7.0\], which is outside the support of Dirichlet"):
        optimizer.step(lambda: (weight**2).sum())
    assert bool((weight == 7.0).all())


def test_draws_of_a_wide_log_normal_are_positive_finite_numbers() -> None:
    family = LogNormal()
    draws = family.sample(family.centred_at(torch.ones(1), 1e-4), torch.tensor([[-2.0], [2.0]]))
    assert bool(family.support.check(draws).all()) and bool(torch.isfinite(draws).all())


@pytest.mark.parametrize("side", [64, 256])
def test_kronecker_factors_at_their_prior_stay_there_in_float32(side: int) -> None:
    family = KroneckerGaussian()
    prior = state = family.centred_at(torch.zeros(side, side), 1e4)
    for _ in range(30):
        state = family.retract(state, family.kl_gradient(state, prior), (0.1, 1e-2, 1e-2))
    torch.testing.assert_close(state.rows, prior.rows, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(state.columns, prior.columns, rtol=1e-5, atol=1e-3)


def test_the_objective_of_a_low_rank_gaussian_needs_a_proper_prior() -> None:
    weight = torch.nn.Parameter(torch.ones(60))
    optimizer = optimizer_of(weight, LowRankGaussian(), lr=0.1)
    optimizer.step(lambda: (weight**2).sum())
    with pytest.raises(ValueError, match=r"weight_decay=0.0: .* the objective needs a proper prior"):
        optimizer.objective([lambda: (weight**2).sum()])


def test_the_meter_compares_low_rank_sites_in_one_basis() -> None:
    """The same curvature at two states whose V differs by a rotation: nothing of it is left at α = 1."""
    from expfam_poco import correction

    family, generator = LowRankGaussian(rank=2), torch.Generator().manual_seed(0)
    here = family.centred_at(torch.zeros(12, dtype=torch.float64), 2.0)
    here = here._replace(factor=torch.randn(12, 2, generator=generator, dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator, dtype=torch.float64)).Q
    there = here._replace(factor=here.factor @ turn)
    pair = torch.randn(2, 1, 12, generator=generator, dtype=torch.float64)
    one, other = (
        family.Site(torch.zeros(12, dtype=torch.float64), *family.project_products(*pair, at)) for at in (here, there)
    )
    outer = correction.Outer(there, family.Site(*(torch.zeros_like(value) for value in other)))
    terms = correction.variance_terms(one, *correction.carried(family, other, outer, here))
    for term in terms[1:]:
        assert correction.variance_ratio(*map(float, term), alpha=1.0) < 1e-12


def test_a_gamma_is_centred_where_it_is_told_to_be() -> None:
    for precision in (None, 0.5, 30.0):
        theta = torch.tensor([0.5, 2.0])
        torch.testing.assert_close(Gamma().point(Gamma().centred_at(theta, precision)), theta)
