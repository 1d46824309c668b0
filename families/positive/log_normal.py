r"""Log-normal weights, x = log θ ~ N(m, S⁻¹): the diagonal Gaussian's λ, chart and steps, seen through the exponential.

The base measure h(θ) = 1/θ is the derivative of log θ, so that λ, A and T, which is (x, x²), are the Gaussian's. Under
x a loss is ℓ(eˣ) with gradient θ ∇ℓ(θ), and everything else is as there: sites are (E[θ∇ℓ], curvature of ℓ(eˣ)), the
curvature by Stein's identity, and (mean, precision) of x is a chart that bears precisions of 10¹⁰ in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family.draws import Draws

from ..gaussian.gaussian import DiagonalGaussian, GaussianSite, GaussianState, GaussianStatistics


@dataclass(frozen=True)
class LogNormal(DiagonalGaussian):
    """Positive weights, multiplied by the steps; 1/√S is their relative width. All fields are about log θ.

    The point is the median e^m, which stays where it is when the precision moves; E[θ] = e^{m + 1/2S} would not.

    Args:
        strength: S at the start, 1/(relative width)², where the optimizer's `hess_init` does not set it.

    Example:
        >>> import torch
        >>> from expfam_poco.families import LogNormal
        >>> q = LogNormal()
        >>> state = q.centred_at(torch.tensor([0.5, 2.0]), 4.0)
        >>> q.point(state), q.distribution(state).base_dist.scale
        (tensor([0.5000, 2.0000]), tensor([0.5000, 0.5000]))
    """

    strength: float = 100.0

    support: ClassVar[constraints.Constraint] = constraints.positive
    curvature: ClassVar[str] = "none"  # a measured Hessian would be that of ℓ, not of ℓ(eˣ)

    def statistics(self, theta: Tensor) -> GaussianStatistics:
        """(log θ, log² θ)."""
        return super().statistics(theta.log())

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """−log θ."""
        return -theta.log()

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """−m."""
        return -state.mean

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """exp(m + ε/√S), within the positive finite numbers."""
        limits = torch.finfo(noise.dtype)
        return super().sample(state, noise).exp().clamp(limits.tiny, limits.max)

    def natural_gradient(self, state: Any, draws: Draws) -> GaussianSite:
        """The averages of θ∇ℓ and of θ∇ℓ √S ε."""
        return super().natural_gradient(state, draws._replace(grad=draws.theta * draws.require_grad()))

    def regressed_natural_gradient(self, state: Any, draws: Draws) -> GaussianSite:
        """The Gaussian's of θ∇ℓ."""
        return super().regressed_natural_gradient(state, draws._replace(grad=draws.theta * draws.require_grad()))

    def log_ratio(self, state: Any, prior: Any, theta: Tensor) -> Tensor:
        """The Gaussian's at log θ."""
        return super().log_ratio(state, prior, theta.log())

    def log_ratio_gradient(self, state: Any, prior: Any, theta: Tensor) -> Tensor:
        """The Gaussian's at log θ, over θ."""
        return super().log_ratio_gradient(state, prior, theta.log()) / theta

    def log_prob(self, state: Any, theta: Tensor) -> Tensor:
        """The Gaussian's at log θ, minus log θ."""
        return super().log_prob(state, theta.log()) - theta.log()

    def entropy(self, state: Any) -> Tensor:
        """The Gaussian's plus m."""
        return super().entropy(state) + state.mean

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> GaussianState:
        """Median θ, precision of log θ everywhere `precision` (`strength` if None)."""
        return super().centred_at(theta.log(), self.strength if precision is None else precision)

    def point(self, state: Any) -> Tensor:
        """The median e^m."""
        return super().point(state).exp()

    def recentre(self, state: Any, theta: Tensor) -> GaussianState:
        """A new median, the precision kept."""
        return super().recentre(state, theta.log())

    def distribution(self, state: Any) -> Any:
        """A `pyro.distributions.LogNormal`, one event of the tensor's shape."""
        import pyro.distributions as dist

        return dist.LogNormal(state.mean, state.precision.rsqrt()).to_event(state.mean.ndim)
