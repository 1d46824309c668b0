r"""The exponential family of Weibull weights of fixed shape k:  q(θ) = k r θ^{k−1} exp(−r θ^k), θ > 0.

T(θ) = θ^k, λ = −r, h(θ) = k θ^{k−1}, A(λ) = −log r, so that θ^k is exponential: μ = 1/r, F = 1/r². A draw is
θ = (−log(1 − u)/r)^{1/k}, with ∂θ/∂λ = θ/(k r), and ∇̃L = r E[θ ∇ℓ(θ)]/k. The relative width is that of the shape:
√(Γ(1 + 2/k)/Γ(1 + 1/k)² − 1), 1 for k = 1, about 1.28/k for large k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.arguments import positive
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Draws

from .gamma_functions import exp_excess


class Power(NamedTuple):
    """T(θ) = θ^k; as a natural parameter: minus the rate r of θ^k."""

    power: Tensor


@dataclass(frozen=True)
class Weibull(ExponentialFamily):
    """Positive weights with a Weibull posterior of fixed shape: as wide, relative to the mean, as the shape says.

    The model holds the mean Γ(1 + 1/k) r^{−1/k}. `Exponential` is k = 1; k = 2 (Rayleigh) suits lengths of vectors, and
    small k heavy tails. As a prior, precision p has a rate p times that of mean 1; precision 0 is h alone.

    Args:
        shape: k.

    Raises:
        ValueError: for a shape that is not positive and finite.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Weibull
        >>> q = Weibull(shape=2.0)
        >>> q.point(q.centred_at(torch.tensor([0.5, 2.0])))
        tensor([0.5000, 2.0000])
    """

    shape: float = 2.0

    Statistics: ClassVar[type[Any]] = Power
    support: ClassVar[constraints.Constraint] = constraints.positive
    domain: ClassVar[Any] = {"power": constraints.less_than(0.0)}
    noise_kind: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        """Refuse a shape out of range."""
        positive("shape", self.shape)

    @property
    def _unit_mean(self) -> float:
        """Γ(1 + 1/k), the mean at rate 1."""
        return math.gamma(1.0 + 1.0 / self.shape)

    def statistics(self, theta: Tensor) -> Power:
        """θ^k."""
        return Power(theta**self.shape)

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """log k + (k − 1) log θ."""
        return math.log(self.shape) + (self.shape - 1.0) * theta.log()

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """By E[log θ^k] = −γ − log r, with Euler's γ."""
        log_power = -0.5772156649015329 - torch.log(-state.power)
        return math.log(self.shape) + (1.0 - 1.0 / self.shape) * log_power

    def log_partition(self, nat: Any) -> Tensor:
        """−log r."""
        return -torch.log(-nat.power)

    def to_mean(self, nat: Any) -> Power:
        """1/r."""
        return Power(-1.0 / nat.power)

    def to_natural(self, mean: Any) -> Power:
        """r = 1/μ.

        Raises:
            ValueError: for a mean that is not positive.
        """
        if not bool((mean.power > 0.0).all()):
            raise ValueError("mean: the expectation of a power of positive weights must be positive.")
        return Power(-1.0 / mean.power)

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """(−log(1 − u)/r)^{1/k}, within the positive numbers of the dtype."""
        bounds = torch.finfo(noise.dtype)
        logs = (-torch.log1p(-noise)).log() - (-state.power).log()
        return (logs / self.shape).exp().clamp(bounds.tiny, bounds.max)

    def natural_gradient(self, state: Any, draws: Draws) -> Power:
        """The mean of r θ ∇ℓ(θ)/k."""
        return Power(-state.power / self.shape * (draws.theta * draws.require_grad()).mean(0))

    def fisher_solve(self, nat: Any, vector: Any) -> Power:
        """r² v."""
        return Power(nat.power * nat.power * vector.power)

    def kl(self, state: Any, prior: Any) -> Tensor:
        """x − 1 − log x with x = r₀/r."""
        return exp_excess((prior.power / state.power).log())

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Power:
        """`precision` times the rate of mean θ; that rate if None."""
        return Power(-torch.ones_like(theta) * (1.0 if precision is None else precision) * self._rate(theta))

    def recentre(self, state: Any, theta: Tensor) -> Power:
        """The mean θ."""
        return Power(-self._rate(theta))

    def _rate(self, theta: Tensor) -> Tensor:
        return (self._unit_mean / theta) ** self.shape

    def point(self, state: Any) -> Tensor:
        """E[θ]."""
        return self._unit_mean * (-state.power) ** (-1.0 / self.shape)

    def expectation(self, state: Any) -> Tensor:
        """Γ(1 + 1/k) r^{−1/k}."""
        return self.point(state)

    def variance(self, state: Any) -> Tensor:
        """(Γ(1 + 2/k) − Γ(1 + 1/k)²) r^{−2/k}."""
        unit = math.gamma(1.0 + 2.0 / self.shape) - self._unit_mean**2
        return unit * (-state.power) ** (-2.0 / self.shape)

    def mode(self, state: Any) -> Tensor:
        """((1 − 1/k)/r)^{1/k}, 0 for k ≤ 1."""
        return (max(0.0, 1.0 - 1.0 / self.shape) / -state.power) ** (1.0 / self.shape)
