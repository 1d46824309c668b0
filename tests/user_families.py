"""Families as a user would write them: statistics, log-partition, sample, centre, and nothing that is derived."""

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

import expfam_poco as poco


class Exponential(poco.ExponentialFamily):
    """Positive weights with T(θ) = θ and λ < 0."""

    support = constraints.positive
    domain: ClassVar = {"theta": constraints.less_than(0.0)}
    noise_kind = "uniform"

    def statistics(self, theta):
        return self.Mean(theta)

    def log_partition(self, nat):
        return -torch.log(-nat.theta)

    def sample(self, state, noise):
        return torch.log(noise) / state.theta

    def centred_at(self, theta, precision=None):
        return self.State(-1.0 / theta)


class Logs(NamedTuple):
    log: Tensor
    log_squared: Tensor


class LogNormal(poco.ExponentialFamily):
    """Positive weights with T(θ) = (log θ, log² θ), h = 1."""

    Statistics = Logs
    support = constraints.positive
    domain: ClassVar = {"log_squared": constraints.less_than(0.0)}

    def statistics(self, theta):
        return Logs(theta.log(), theta.log() ** 2)

    def log_partition(self, nat):
        a = nat.log + 1.0
        return -a * a / (4.0 * nat.log_squared) + 0.5 * torch.log(math.pi / -nat.log_squared)

    def sample(self, state, noise):
        precision = -2.0 * state.log_squared
        return torch.exp((state.log + 1.0) / precision + noise * precision.rsqrt())

    def centred_at(self, theta, precision=None):
        s = torch.full_like(theta, 1.0 if precision is None else precision)
        return Logs(s * theta.log() - 1.0, -0.5 * s)

    def point(self, state):
        return torch.exp((state.log + 1.0) / (-2.0 * state.log_squared))


class Moments(NamedTuple):
    theta: Tensor
    square: Tensor


class GaussianByHand(poco.ExponentialFamily):
    """N(m, 1/s) in natural coordinates, with everything else derived."""

    Statistics = Moments
    domain: ClassVar = {"square": constraints.less_than(0.0)}

    def statistics(self, theta):
        return Moments(theta, theta**2)

    def log_partition(self, nat):
        return -(nat.theta**2) / (4.0 * nat.square) + 0.5 * torch.log(math.pi / -nat.square)

    def sample(self, state, noise):
        precision = -2.0 * state.square
        return state.theta / precision + noise * precision.rsqrt()

    def centred_at(self, theta, precision=None):
        s = torch.full_like(theta, 1.0 if precision is None else precision)
        return Moments(s * theta, -0.5 * s)


class Poisson(poco.ExponentialFamily):
    """Counts: discrete, with a base measure, without a pathwise derivative, on a support without a transform."""

    support = constraints.nonnegative_integer
    noise_kind = "uniform"
    default_estimator = "score"

    def _probabilities(self, state, like):
        k = torch.arange(60, dtype=like.dtype, device=like.device)
        log_h = -torch.lgamma(k + 1.0)
        return torch.exp(k * state.theta.unsqueeze(-1) - state.theta.exp().unsqueeze(-1) + log_h), log_h

    def statistics(self, theta):
        return self.Mean(theta)

    def log_base_measure(self, theta):
        return -torch.lgamma(theta + 1.0)

    def expected_log_base_measure(self, state):
        probabilities, log_h = self._probabilities(state, state.theta)
        return (probabilities * log_h).sum(-1)

    def log_partition(self, nat):
        return nat.theta.exp()

    def sample(self, state, noise):
        below = self._probabilities(state, noise)[0].cumsum(-1)
        return (noise.unsqueeze(-1) > below).sum(-1).to(noise.dtype)

    def centred_at(self, theta, precision=None):
        return self.State(theta.clamp_min(0.5).log())

    def recentre(self, state, theta):
        return self.State(theta.log())

    def reference_like(self, like):
        return torch.ones_like(like)


class Categorical(poco.ExponentialFamily):
    """K categories as K − 1 indicators: discrete vectors, one λ vector per weight."""

    event_dim = 1
    support = constraints.real_vector
    noise_kind = "uniform"
    default_estimator = "score"

    def _with_last(self, theta):
        return torch.cat([theta, torch.zeros_like(theta[..., :1])], -1)

    def statistics(self, theta):
        return self.Mean(theta)

    def log_partition(self, nat):
        return torch.logsumexp(self._with_last(nat.theta), -1)

    def sample(self, state, noise):
        below = self._with_last(state.theta).softmax(-1).cumsum(-1)[..., :-1]
        category = (noise[..., :1] > below).sum(-1)
        hot = torch.nn.functional.one_hot(category, noise.shape[-1] + 1)
        return hot[..., :-1].to(noise.dtype)

    def centred_at(self, theta, precision=None):
        return self.State(theta * (1.0 if precision is None else precision))

    def recentre(self, state, theta):
        return self.State(torch.log(theta / (1.0 - theta.sum(-1, keepdim=True))))


class UnitGaussian(poco.ExponentialFamily):
    """N(λ, 1)."""

    noise_kind = "uniform"

    def statistics(self, theta):
        return self.Mean(theta)

    def log_base_measure(self, theta):
        return -0.5 * (theta**2 + math.log(2.0 * math.pi))

    def expected_log_base_measure(self, state):
        return -0.5 * (state.theta**2 + 1.0 + math.log(2.0 * math.pi))

    def log_partition(self, nat):
        return 0.5 * nat.theta**2

    def sample(self, state, noise):
        return state.theta + torch.special.ndtri(noise)

    def centred_at(self, theta, precision=None):
        return self.State(theta * 1.0)


USER_FAMILIES = (Exponential, LogNormal, GaussianByHand, Poisson, Categorical)
