r"""Weights that are counts 0, 1, 2, …: Poisson and negative binomial posteriors, with T(θ) = θ.

    Poisson:             q(θ) = e^{λθ − e^λ} / θ!,                    λ = log m,          A = e^λ
    negative binomial:   q(θ) = C(θ + r − 1, θ) p^θ (1 − p)^r,        λ = log p < 0,      A = −r log(1 − e^λ)

The second is a Poisson variable whose mean is itself Gamma distributed, with shape r and rate (1 − p)/p, and is drawn
so: its variance m + m²/r, at the mean m = r p/(1 − p), exceeds a Poisson's. Poisson draws invert F(k) = Q(k + 1, m).
Integers have no derivative: natural gradients compare losses (`mc_samples` of two or more).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.arguments import flag, positive
from expfam_poco.family.base import ExponentialFamily, Theta
from expfam_poco.family.inversion import opaque

from ..positive.gamma_functions import standard_draw

REACH, HALVINGS = 12.0, 5  # of the quantile from its normal expansion, and what halves 2 · 12 + 2 to 1
LEAST = 0.5  # the least mean of a first member: at 0 no draw would ever differ


@opaque("poisson_quantile")
def poisson_quantile(mean: Tensor, u: Tensor) -> Tensor:
    """The first k with F(k) ≥ u, in float64: by halving an interval around m + z √m + (z² − 1)/6, Φ(z) = u."""
    mean, u = torch.broadcast_tensors(mean.double(), u.double())
    z = torch.special.ndtri(u)
    guess = mean + z * mean.sqrt() + (z * z - 1.0) / 6.0
    low = torch.floor(guess - REACH).clamp_min(-1.0)
    high = torch.ceil(guess + REACH).clamp_min(0.0)
    for _ in range(HALVINGS):
        middle = torch.floor(0.5 * (low + high))
        enough = torch.special.gammaincc(middle.clamp_min(0.0) + 1.0, mean) >= u
        open_ = (middle > low) & (middle < high)
        high, low = torch.where(open_ & enough, middle, high), torch.where(open_ & ~enough, middle, low)
    return high


@dataclass(frozen=True)
class Counts(ExponentialFamily):
    """The base of both.

    Args:
        whole: the model holds the whole part of E[θ], a count; False: E[θ] itself.
    """

    whole: bool = field(default=True, kw_only=True)

    support: ClassVar[constraints.Constraint] = constraints.nonnegative_integer
    noise_kind: ClassVar[str] = "uniform"
    default_estimator: ClassVar[str] = "score"

    def __post_init__(self) -> None:
        """Refuse what is neither True nor False."""
        flag("whole", self.whole)

    def statistics(self, theta: Tensor) -> Theta:
        """θ."""
        return Theta(theta)

    def point(self, state: Any) -> Tensor:
        """E[θ], or its whole part."""
        mean: Tensor = self.to_mean(state).theta
        return mean.floor() if self.whole else mean

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Theta:
        """The mean θ, half more where the model holds whole parts; at least ½. The mean says how wide it is."""
        return self._of_mean((theta + 0.5 if self.whole else theta).clamp_min(LEAST))

    def recentre(self, state: Any, theta: Tensor) -> Theta:
        """The mean θ, half more where the model holds whole parts."""
        tiny = torch.finfo(theta.dtype).tiny
        return self._of_mean((theta + 0.5 if self.whole else theta).clamp_min(tiny))

    @abstractmethod
    def _of_mean(self, mean: Tensor) -> Theta:
        """λ, of a positive mean."""

    def to_natural(self, mean: Any) -> Theta:
        """λ, of E[θ].

        Raises:
            ValueError: for a mean that is not positive.
        """
        if not bool((mean.theta > 0.0).all()):
            raise ValueError("mean: the expectation of a count must be positive.")
        return self._of_mean(mean.theta)


@dataclass(frozen=True)
class Poisson(Counts):
    """Weights that are counts, with Poisson posteriors.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Poisson
        >>> q = Poisson()
        >>> q.point(q.centred_at(torch.tensor([0.0, 3.0])))
        tensor([0., 3.])
    """

    domain: ClassVar[Any] = {"theta": constraints.real}

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """−log θ!."""
        return -torch.lgamma(theta + 1.0)

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """By summing; from a mean of 400 on by Stirling's series of the entropy."""
        mean = state.theta.double().exp()
        small = super().expected_log_base_measure(Theta(state.theta.double().clamp_max(math.log(400.0))))
        large = mean.clamp_min(100.0)
        inverse = 1.0 / large
        series = 0.5 * torch.log(2.0 * math.pi * math.e * large) - inverse * (
            1 / 12 + inverse * (1 / 24 + inverse * 19 / 360)
        )
        stirling = large - large * large.log() - series
        return torch.where(mean < 400.0, small, stirling).to(state.theta.dtype)

    def log_partition(self, nat: Any) -> Tensor:
        """e^λ."""
        return torch.as_tensor(nat.theta.exp())

    def to_mean(self, nat: Any) -> Theta:
        """e^λ."""
        return Theta(nat.theta.exp())

    def _of_mean(self, mean: Tensor) -> Theta:
        return Theta(mean.log())

    def fisher_solve(self, nat: Any, vector: Any) -> Theta:
        """v/μ."""
        return Theta(vector.theta * torch.exp(-nat.theta))

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """The quantile at u."""
        return poisson_quantile(state.theta.detach().double().exp(), noise).to(noise.dtype)

    def mode(self, state: Any) -> Tensor:
        """⌊μ⌋."""
        return torch.as_tensor(state.theta.exp().floor())


@dataclass(frozen=True)
class NegativeBinomial(Counts):
    """Weights that are counts, with negative binomial posteriors of fixed r: wider than a Poisson's.

    Args:
        count: r > 0, not only whole numbers; 1 is the geometric distribution.

    Raises:
        ValueError: for a count that is not positive and finite.

    Example:
        >>> import torch
        >>> from expfam_poco.families import NegativeBinomial
        >>> q = NegativeBinomial(count=2.0)
        >>> q.point(q.centred_at(torch.tensor([0.0, 3.0])))
        tensor([0., 3.])
    """

    count: float = 1.0

    domain: ClassVar[Any] = {"theta": constraints.less_than(0.0)}
    noise_dims: ClassVar[tuple[int, ...]] = (2,)

    def __post_init__(self) -> None:
        """Refuse a count out of range."""
        super().__post_init__()
        positive("count", self.count)

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """log C(θ + r − 1, θ)."""
        return torch.lgamma(theta + self.count) - torch.lgamma(theta + 1.0) - math.lgamma(self.count)

    def log_partition(self, nat: Any) -> Tensor:
        """−r log(1 − e^λ)."""
        return -self.count * torch.log(-torch.expm1(nat.theta))

    def to_mean(self, nat: Any) -> Theta:
        """r/(e^−λ − 1)."""
        return Theta(self.count / torch.expm1(-nat.theta))

    def _of_mean(self, mean: Tensor) -> Theta:
        return Theta(-torch.log1p(self.count / mean))

    def fisher_solve(self, nat: Any, vector: Any) -> Theta:
        """v/(μ (1 + μ/r))."""
        mean = self.to_mean(nat).theta
        return Theta(vector.theta / (mean * (1.0 + mean / self.count)))

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """A Poisson quantile at a Gamma quantile."""
        mean = self.count / torch.expm1(-state.theta.detach().double())
        shape = torch.full_like(mean, self.count)
        rate = mean * standard_draw(shape, noise[..., 0]).ratio.exp()
        return poisson_quantile(rate, noise[..., 1]).to(noise.dtype)

    def mode(self, state: Any) -> Tensor:
        """⌊p (r − 1)/(1 − p)⌋, 0 for r ≤ 1."""
        mean = self.to_mean(state).theta
        return torch.as_tensor((mean * max(0.0, 1.0 - 1.0 / self.count)).floor())
