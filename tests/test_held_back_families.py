"""Families that nobody had in mind when the laws were written: right ones pass, and faults of other kinds are named."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import expfam_poco as poco
from expfam_poco import derive
from expfam_poco.checks import suite
from expfam_poco.checks.references import Member, represent
from expfam_poco.family.noise import NoiseKey


class Log(NamedTuple):
    log: Tensor


@dataclass(frozen=True)
class Pareto(poco.ExponentialFamily):
    """f = a mᵃ θ^(−a−1) above a known minimum m."""

    minimum: float = 2.0
    Statistics = Log
    domain: ClassVar = {"log": constraints.less_than(0.0)}
    noise_kind = "uniform"

    @property
    def support(self):  # type: ignore[override]
        return constraints.greater_than(self.minimum)

    def statistics(self, theta):
        return Log(theta.log())

    def log_base_measure(self, theta):
        return -theta.log()

    def log_partition(self, nat):
        return -torch.log(-nat.log) + nat.log * math.log(self.minimum)

    def sample(self, state, noise):
        return self.minimum * torch.exp(noise.log() / state.log)

    def centred_at(self, theta, precision=None):
        return Log(-math.log(2) / (theta / self.minimum).log())

    def point(self, state):
        return self.minimum * torch.exp(-math.log(2) / state.log)


class LogSeries(poco.ExponentialFamily):
    """pᵏ / (−k log(1−p)) for k = 1, 2, …: integers that do not begin at 0."""

    support = constraints.positive_integer
    domain: ClassVar = {"theta": constraints.less_than(0.0)}
    noise_kind = "uniform"
    default_estimator = "score"

    def statistics(self, theta):
        return self.Mean(theta)

    def log_base_measure(self, theta):
        return -theta.log()

    def log_partition(self, nat):
        return torch.log(-torch.log(-torch.expm1(nat.theta)))

    def sample(self, state, noise):
        k = torch.arange(1, 401, dtype=noise.dtype, device=noise.device)
        density = torch.exp(state.theta.unsqueeze(-1) * k - k.log() - self._true(state).unsqueeze(-1))
        return (1 + (density.cumsum(-1) < noise.unsqueeze(-1)).sum(-1)).clamp_max(400).to(noise.dtype)

    def _true(self, nat):
        return LogSeries.log_partition(self, nat)

    def centred_at(self, theta, precision=None):
        return self.State(-0.7 / theta.clamp_min(1.0))

    def point(self, state):
        return self.to_mean(state).theta.round().clamp_min(1.0)

    def recentre(self, state, theta):
        start = self.Nat(torch.full_like(theta, -0.7))
        return self.State(derive.invert_mean(self, self.Mean(theta.clamp_min(1.0001)), start=start).theta)


@dataclass(frozen=True)
class KnownCovariance(poco.ExponentialFamily):
    """Rows ~ N(Cλ, C) with a known C, a tensor of all weights."""

    covariance: Any
    event_dim: ClassVar = 1
    domain: ClassVar = {"theta": constraints.real_vector}

    def _c(self, like):
        return self.covariance.to(like)

    def statistics(self, theta):
        return self.Mean(theta)

    def log_base_measure(self, theta):
        c = self._c(theta)
        return -0.5 * ((theta @ torch.linalg.inv(c)) * theta).sum(-1) - 0.5 * torch.logdet(2 * math.pi * c)

    def log_partition(self, nat):
        return 0.5 * ((nat.theta @ self._c(nat.theta)) * nat.theta).sum(-1)

    def sample(self, state, noise):
        return state.theta @ self._c(noise) + noise @ torch.linalg.cholesky(self._c(noise)).mT

    def centred_at(self, theta, precision=None):
        return self.State(theta @ torch.linalg.inv(self._c(theta)))


# ---- wrong ----------------------------------------------------------------------------------------------------------


class WrongDependence(KnownCovariance):
    """Every entry's distribution is right; their correlations have the other sign."""

    def sample(self, state, noise):
        c = self._c(noise)
        turned = torch.where(torch.eye(3, dtype=torch.bool), c, -c)
        return state.theta @ c + noise @ torch.linalg.cholesky(turned).mT


class WrongBoundary(Pareto):
    @property
    def support(self):  # type: ignore[override]
        return constraints.greater_than(0.5 * self.minimum)


class WrongConstant(LogSeries):
    """A of a support that begins at 0: the slope differs only a little, and the constant."""

    def log_partition(self, nat):
        return torch.log(1.0 - torch.log(-torch.expm1(nat.theta)))


class NotRounded(LogSeries):
    def sample(self, state, noise):
        return super().sample(state, noise) + 0.25 * noise


class SinglePrecision(LogSeries):
    def sample(self, state, noise):
        return super().sample(state, noise).float()


COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.0, -0.5], [0.0, -0.5, 2.0]])


def judged(
    family: poco.ExponentialFamily, laws: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> poco.checks.Report:
    monkeypatch.setattr(suite, "LAWS", tuple(law for law in suite.LAWS if law.name in (*laws, "centred_at")))
    return poco.check_family(family, dtypes=(torch.float64,), raise_on_failure=False)


@pytest.mark.parametrize("family", [Pareto(), LogSeries(), KnownCovariance(COVARIANCE)], ids=repr)
def test_right_families_are_judged_right(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    report = judged(family, ("samples", "log_prob", "point"), monkeypatch)
    assert report.passed and not report.unverified, report


@pytest.mark.parametrize(
    ("family", "law", "sentence"),
    [
        (WrongDependence(COVARIANCE), "goodness_of_fit", "samples against the density"),
        (WrongBoundary(), "centred_at", "leaves the domain"),
        (WrongConstant(), "log_prob", "sum of exp"),
        (NotRounded(), "samples", "outside the support"),
        (SinglePrecision(), "samples", "sample gives torch.float32 for a state and noise of torch.float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_wrong_families_are_judged_wrong(family: Any, law: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = judged(family, (law,), monkeypatch)
    assert [each.name for each in report.failures] == [law] and sentence in report.failures[0].detail, report


def test_integers_of_a_support_that_ends_leave_nothing_out() -> None:
    """The first integer of a support is not taken for an end beyond which there are more."""
    family = LogSeries()
    state = family.State(torch.tensor([-0.7, -2.0], dtype=torch.float64))
    draws = family.sample(state, torch.rand(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    found = represent(Member(family, state, torch.Size([2]), torch.float64, torch.device("cpu")), draws, NoiseKey(0))
    assert found is not None and found.exact and found.missing < 1e-5


# ---- where training begins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "weights", "sentence"),
    [
        (poco.family_from(T={"log": torch.log}, log_h=lambda x: -x, support=constraints.positive,
                          domain={"log": constraints.greater_than(-1.0)}, name="Fixed"), [1.0, -1.0],
         r"'w' holds -1, which is outside the support of Fixed, GreaterThan\(lower_bound=0.0\)"),
        ("von_mises_fisher", [[1.0, 1.0, 1.0]], r"holds \[1.0, 1.0, 1.0\], .* VonMisesFisher, Sphere\(\)"),
        ("wishart", [[-1.0, 0.0], [0.0, -1.0]], r"outside the support of Wishart, PositiveDefinite\(\)"),
    ],
)  # fmt: skip
def test_weights_outside_of_the_support_are_named(family: Any, weights: Any, sentence: str) -> None:
    weight = torch.nn.Parameter(torch.tensor(weights))
    optimizer = poco.PosteriorCorrected([("w", weight)], family, lr=0.1, ess=10.0)
    with pytest.raises(ValueError, match=sentence):
        optimizer.step(lambda: weight.sum())


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (torch.distributions.Uniform, "Uniform is not an exponential family: its support depends on its parameters"),
        (torch.distributions.Bernoulli, "its values, .* are not a line, a half line, an interval or integers"),
        (torch.distributions.RelaxedBernoulli, "cannot be made of its parameters .*temperature.*; fix others by name"),
    ],
)
def test_distributions_that_are_no_families_of_numbers_are_told_so(kind: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        poco.from_torch(kind)
