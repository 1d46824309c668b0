"""The isotropic Gaussian of a fixed precision: SVRG's family."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from expfam_poco.arguments import positive
from expfam_poco.family.base import ExponentialFamily, Theta
from expfam_poco.family.draws import Draws, mean_of

from .gaussian import LOG_2PI, GaussianState, beyond


@dataclass(frozen=True)
class IsotropicGaussian(ExponentialFamily):
    """N(m, s⁻¹ I) of fixed precision s: T(θ) = θ, λ = s m, h(θ) = exp(−s θ²/2) √(s/2π) (SVRG's family).

    The prior may have another precision s₀: ∇̃KL = s₀ (m − m₀) (the L2 term of SVRG).

    Args:
        precision: s > 0, the same for every weight, never changed by a step.

    Example:
        >>> import torch
        >>> from expfam_poco.families import IsotropicGaussian
        >>> q = IsotropicGaussian(precision=4.0)
        >>> q.sample(q.centred_at(torch.tensor([1.0])), torch.tensor([[2.0]]))
        tensor([[2.]])
    """

    precision: float = 1.0

    delta_method: ClassVar[bool] = True
    State: ClassVar[type[Any]] = GaussianState

    def __post_init__(self) -> None:
        """Refuse a precision that is not positive and finite."""
        positive("precision", self.precision, "a Gaussian needs one that is positive and finite")

    def in_domain(self, state: Any) -> Tensor:
        """Whether all is finite and the precision, which may be a prior's own, positive."""
        return super().in_domain(state) & (state.precision > 0.0).all()

    def statistics(self, theta: Tensor) -> Theta:
        """T(θ) = θ."""
        return Theta(theta)

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """log N(θ | 0, s⁻¹)."""
        return 0.5 * (math.log(self.precision) - LOG_2PI - self.precision * theta * theta)

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """E_q[log h] with E[θ²] = m² + 1/s."""
        second = state.mean * state.mean + 1.0 / self.precision
        return 0.5 * (math.log(self.precision) - LOG_2PI - self.precision * second)

    def log_partition(self, nat: Any) -> Tensor:
        """λ²/(2s)."""
        return nat.theta * nat.theta / (2.0 * self.precision)

    def to_natural(self, mean: Any) -> Theta:
        """λ = s μ."""
        return Theta(self.precision * mean.theta)

    def to_nat(self, state: Any) -> Theta:
        """λ = s m."""
        return Theta(self.precision * state.mean)

    def from_nat(self, nat: Any) -> GaussianState:
        """m = λ/s."""
        return GaussianState(nat.theta / self.precision, nat.theta.new_full((), self.precision))

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """θ = m + ε/√s."""
        theta: Tensor = state.mean + noise / math.sqrt(self.precision)
        return theta

    def natural_gradient(self, state: Any, draws: Draws) -> Theta:
        """∇_μ E_q[ℓ] = ∇_m E_q[ℓ] = E_q[∇ℓ] (Bonnet's theorem, PC Thm 1)."""
        return Theta(mean_of(draws.require_grad()))

    def kl_gradient(self, state: Any, prior: Any) -> Theta:
        """s₀ (m − m₀), for a prior of any precision s₀."""
        return Theta(prior.precision * (state.mean - prior.mean))

    def log_ratio(self, state: Any, prior: Any, theta: Tensor) -> Tensor:
        """½ s₀ (θ−m₀)² − ½ s (θ−m)², for a prior of any precision s₀."""
        return 0.5 * (prior.precision * (theta - prior.mean) ** 2 - self.precision * (theta - state.mean) ** 2)

    def log_prob(self, state: Any, theta: Tensor) -> Tensor:
        """−½ s (θ−m)² + ½ log s − ½ log 2π; like `entropy` and `kl` in the chart, where nothing cancels."""
        return 0.5 * (math.log(self.precision) - LOG_2PI - self.precision * (theta - state.mean) ** 2)

    def entropy(self, state: Any) -> Tensor:
        """½ (1 + log 2π) − ½ log s."""
        return torch.full_like(state.mean, 0.5 * (1.0 + LOG_2PI - math.log(self.precision)))

    def kl(self, state: Any, prior: Any) -> Tensor:
        """½ (s₀/s + s₀ (m − m₀)² − 1 − log(s₀/s)), one value per weight."""
        ratio = prior.precision / self.precision
        distance = prior.precision * (state.mean - prior.mean) ** 2
        return 0.5 * (ratio + distance - 1.0 - torch.log(ratio))

    def retract(
        self,
        state: Any,
        direction: Any,
        rates: Any,
        *,
        variant: str = "second_order",
        clip_radius: float = math.inf,
    ) -> GaussianState:
        """m ← m − η clip(D/s, ξ); there is no domain to leave."""
        slope = direction.theta / self.precision
        if clip_radius < math.inf:
            slope = slope.clamp(-clip_radius, clip_radius)
        return GaussianState(state.mean - rates[0] * slope, state.precision)

    def extrapolate(self, state: Any, previous: Any, factor: float | Tensor) -> GaussianState:
        """m + k (m − m_previous)."""
        return beyond(state, previous, factor)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> GaussianState:
        """Mean θ. A `precision` other than the family's own makes a prior, not a member."""
        value = self.precision if precision is None else precision
        return GaussianState(theta.clone(), torch.as_tensor(value, dtype=theta.dtype, device=theta.device))

    def point(self, state: Any) -> Tensor:
        """The mean."""
        mean: Tensor = state.mean
        return mean

    def recentre(self, state: Any, theta: Tensor) -> GaussianState:
        """A new mean."""
        return GaussianState(theta, state.precision)

    def distribution(self, state: Any) -> Any:
        """A `pyro.distributions.Normal`, one event of the tensor's shape."""
        import pyro.distributions as dist

        deviation = torch.full_like(state.mean, 1.0 / math.sqrt(self.precision))
        return dist.Normal(state.mean, deviation).to_event(state.mean.ndim)
