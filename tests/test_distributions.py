"""Posteriors as Pyro distributions: torch's contract, Pyro's use of them, and digits at extreme parameters."""

import math
import pickle
from typing import Any

import mpmath
import pyro
import pytest
import torch
from family_cases import specimen_of, takes
from pyro import poutine
from torch import Tensor
from torch.distributions import kl_divergence

import expfam_poco as poco
from expfam_poco.families import Bernoulli
from expfam_poco.families.discrete.level_categorical import SignBernoulli
from expfam_poco.families.positive import distributions as exact
from expfam_poco.family.domains import is_sphere


def members_of(name: str) -> tuple[Any, Any, Any]:
    """A family and two of its members, of its own strength."""
    family = poco.resolve_family(name)
    numbers = torch.tensor([0.4, -0.8, 1.2], dtype=torch.float64)
    numbers = numbers.expand(2, 3) if family.event_dim == 2 else numbers
    if not takes(family, tuple(numbers.shape)) or family.support.is_discrete or is_sphere(family.support):
        first, second = (specimen := specimen_of(family)).support_points(2)
        return specimen.family, family.centred_at(first), family.centred_at(second)
    family = family.for_shape(numbers.shape)
    point = torch.distributions.transform_to(family.support)(numbers)
    return family, family.centred_at(point), family.centred_at(point.roll(1, -1))


def test_sign_bernoulli_shapes_support_and_moments() -> None:
    lam = torch.tensor([[0.5, -1.0]]).expand(3, 2)
    q = SignBernoulli(lam)
    assert q.batch_shape == (3, 2) and q.event_shape == ()
    assert q.enumerate_support().shape == (2, 3, 2)
    assert q.enumerate_support(expand=False).shape == (2, 1, 1)
    torch.testing.assert_close(q.log_prob(q.enumerate_support()).exp().sum(0), torch.ones(3, 2))
    torch.testing.assert_close(q.mean, torch.tanh(lam))
    torch.testing.assert_close(q.variance, 1.0 - torch.tanh(lam) ** 2)
    torch.testing.assert_close(q.entropy(), Bernoulli().entropy(Bernoulli.State(lam)))
    assert q.sample((4, 5)).shape == (4, 5, 3, 2)
    assert q.support.check(q.sample((100,))).all() and not q.support.check(torch.zeros(())).any()
    assert q.expand((7, 3, 2)).sample().shape == (7, 3, 2)
    event = q.to_event(1)
    assert event.batch_shape == (3,) and event.event_shape == (2,)
    with pytest.raises(ValueError, match="support"):
        SignBernoulli(lam, validate_args=True).log_prob(torch.full((3, 2), 0.5))


@pytest.mark.parametrize("name", poco.families_available())
def test_distributions_of_posteriors_are_sampled_in_pyro(name: str) -> None:
    family, state, _ = members_of(name)

    def model() -> Tensor:
        return pyro.sample("w", family.distribution(state))

    trace = poutine.trace(model).get_trace()
    total = family.log_prob(state, trace.nodes["w"]["value"]).sum()
    torch.testing.assert_close(trace.log_prob_sum(), total)


@pytest.mark.parametrize("name", poco.families_available())
def test_distributions_of_posteriors_keep_the_contract_of_distributions(name: str) -> None:
    """Variances against samples (6 standard errors), divergences against the family's, values off the support."""
    torch.manual_seed(0)
    family, state, other = members_of(name)
    with pyro.validation_enabled(True):
        q, p = family.distribution(state), family.distribution(other)
    draws = q.sample((20_000,))
    off = torch.angle(torch.exp(1j * (draws - family.point(state)))) if name == "von_mises" else draws - draws.mean(0)
    squares = 2.0 - 2.0 * off.cos() if name == "von_mises" else off.square()  # 1 − E cos, the circular one, is half
    measured, error = squares.mean(0), squares.std(0) / 20_000**0.5
    expected = q.variance * (2.0 if name == "von_mises" else 1.0)
    assert ((measured - expected).abs() <= 6.0 * error + 1e-12).all()
    torch.testing.assert_close(kl_divergence(q, p), family.kl(state, other).sum())
    with pytest.raises(ValueError, match=r"support|within"):
        q.log_prob(torch.full(q.event_shape, math.nan, dtype=torch.float64))
    densities = q.log_prob(draws)
    torch.testing.assert_close(q.stddev, q.variance.sqrt())
    assert (q.entropy() + densities.mean()).abs() <= 6.0 * densities.std() / 20_000**0.5 + 1e-12
    assert (q.log_prob(q.mode) >= densities - 1e-9).all()
    torch.testing.assert_close(pickle.loads(pickle.dumps(q)).log_prob(draws[:5]), densities[:5])
    copies = q.expand((4,))
    assert copies.sample((5,)).shape == (5, 4, *q.event_shape) and copies.mean.shape == (4, *q.event_shape)
    torch.testing.assert_close(copies.log_prob(draws[0]), densities[0].expand(4))
    torch.testing.assert_close(kl_divergence(copies.to_event(1), p.expand((4,)).to_event(1)), 4 * kl_divergence(q, p))


@pytest.mark.parametrize("shape", [1e-3, 0.5, 3.0, 1e3, 1e6])
def test_distributions_in_float32_keep_their_digits(shape: float) -> None:
    """Log densities, entropies and divergences against 40 digits, at the values that float32 has."""
    a, b, x, other = (torch.tensor(v) for v in (shape, 2.0 * shape, 0.5, 1.1 * shape))
    a_, b_, x_, o_ = (mpmath.mpf(v.item()) for v in (a, b, x, other))
    gamma = [
        a_ * mpmath.log(b_) - mpmath.loggamma(a_) + (a_ - 1) * mpmath.log(x_) - b_ * x_,
        a_ - mpmath.log(b_) + mpmath.loggamma(a_) + (1 - a_) * mpmath.digamma(a_),
        (a_ - o_) * mpmath.digamma(a_) - mpmath.loggamma(a_) + mpmath.loggamma(o_),
    ]
    joint = mpmath.loggamma(a_) + mpmath.loggamma(b_) - mpmath.loggamma(a_ + b_)
    slopes = [mpmath.digamma(v) - mpmath.digamma(a_ + b_) for v in (a_, b_)]
    shifted = mpmath.loggamma(o_) + mpmath.loggamma(b_) - mpmath.loggamma(o_ + b_)
    beta = [
        (a_ - 1) * mpmath.log(x_) + (b_ - 1) * mpmath.log(1 - x_) - joint,
        joint - (a_ - 1) * slopes[0] - (b_ - 1) * slopes[1],
        shifted - joint + (a_ - o_) * slopes[0],
    ]
    both = torch.stack((x, 1.0 - x))
    cases = [
        (exact.Gamma(a, b), exact.Gamma(other, b), x, gamma),
        (exact.Beta(a, b), exact.Beta(other, b), x, beta),
        (exact.Dirichlet(torch.stack((a, b))), exact.Dirichlet(torch.stack((other, b))), both, beta),
    ]
    for q, p, value, expected in cases:
        found = [q.log_prob(value), q.entropy(), kl_divergence(q, p)]
        torch.testing.assert_close(torch.stack(found), torch.tensor([float(v) for v in expected]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["inverse_gaussian", "von_mises", "kronecker_gaussian"])
def test_draws_of_distributions_have_the_tails_of_the_noise(name: str) -> None:
    """torch.rand is 0 once in 2²⁴: as a quantile that would be 13 standard deviations off."""
    family = poco.resolve_family(name)
    point = torch.full((64, 64), 1.5)
    family = family.for_shape(point.shape)
    q = family.distribution(family.centred_at(point, 100.0))
    torch.manual_seed(0)
    first = q.sample((3,))
    torch.manual_seed(0)
    assert torch.equal(first, q.sample((3,))) and not torch.equal(first, q.sample((3,)))
    with pytest.raises(ValueError, match="draws"):
        q.sample((2**24 + 1,))


@pytest.mark.parametrize("name", ["full_gaussian", "low_rank_gaussian"])
def test_joint_posteriors_are_known_by_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    optimizer = poco.PosteriorCorrected(model.named_parameters(), name, lr=0.1, ess=10.0)
    optimizer.step(lambda: model(torch.ones(4, 3, dtype=torch.float64)).square().mean())
    (joint,) = optimizer.posterior().values()
    family, (state,) = optimizer.param_groups[0]["family"], optimizer.posterior_states().values()
    precision = state.precision if name == "full_gaussian" else family.expand_precision(state)
    covariance, marginals = torch.linalg.inv(precision), optimizer.marginals()
    assert {key: q.event_shape for key, q in marginals.items()} == {"weight": (2, 3), "bias": (2,)}
    torch.testing.assert_close(marginals["weight"].mean, model.weight.detach())
    torch.testing.assert_close(marginals["bias"].variance, covariance.diagonal()[6:])
    torch.testing.assert_close(joint.variance[:6].view(2, 3), marginals["weight"].variance)
    value = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(state.mean[:6], covariance[:6, :6]).log_prob(value.flatten(1))
    torch.testing.assert_close(marginals["weight"].log_prob(value), expected)
