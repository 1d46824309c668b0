r"""The Gamma family Γ(a, b) of positive weights, shape a and rate b:  q(θ) = b^a θ^{a−1} e^{−bθ} / Γ(a).

With the base measure h(θ) = 1/θ the statistics are T(θ) = (log θ, θ) and λ = (a, −b), A(λ) = log Γ(a) − a log b.
(With h = 1 the first would be a − 1, which loses all digits of a small a.) μ = (ψ(a) − log b, a/b).

Draws invert the distribution function: θ = (a/b) e^z with z = z(a, u) of `gamma_functions`, so that at fixed u
∂ log θ/∂a = 1/a + ∂z/∂a and ∂ log θ/∂(−b) = 1/b. The Fisher matrix and the natural gradient follow:

    F = ( ψ′(a)  1/b ; 1/b  a/b² ),     ∇̃L = E[θ ∇ℓ(θ) ( a κ,  b (1/a − κ) )],     κ = (∂z/∂a)/(a ψ′(a) − 1)

in which the terms that cancel for large shapes have been cancelled by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.arguments import positive
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Draws

from .gamma_functions import (
    digamma,
    exp_excess,
    following,
    from_zero,
    log_gamma,
    log_less_digamma,
    shape_divergence,
    standard_draw,
    standard_entropy,
    trigamma_excess,
)


class GammaStatistics(NamedTuple):
    """T(θ) = (log θ, θ); as natural parameters: the shape a and minus the rate, −b.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma import GammaStatistics
        >>> GammaStatistics(log=torch.tensor(2.0), theta=torch.tensor(-4.0))  # shape 2, rate 4, mean 1/2
        GammaStatistics(log=tensor(2.), theta=tensor(-4.))
    """

    log: Tensor
    theta: Tensor


@dataclass(frozen=True)
class Gamma(ExponentialFamily):
    """Positive weights with a Gamma posterior of shape a and rate b.

    The shape is the relative precision, (mean / standard deviation)². The model holds the mean a/b. A prior of
    precision 0 is the improper scale-free prior 1/θ: λ₀ = 0 pulls nowhere. Draws that would underflow are the smallest
    positive normal number; their derivative is that of their logarithm all the same.

    Args:
        shape: of the first posterior, where the optimizer gives no precision; 100 is a spread of 10 %.

    Raises:
        ValueError: for a shape that is not positive and finite.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Gamma
        >>> q = Gamma()
        >>> state = q.centred_at(torch.tensor([0.5, 2.0]))
        >>> q.point(state), q.distribution(state).variance
        (tensor([0.5000, 2.0000]), tensor([0.0025, 0.0400]))
    """

    shape: float = 100.0

    Statistics: ClassVar[type[Any]] = GammaStatistics
    support: ClassVar[constraints.Constraint] = constraints.positive
    domain: ClassVar[Any] = {"log": constraints.positive, "theta": constraints.less_than(0.0)}
    noise_kind: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        """Refuse a shape out of range."""
        positive("shape", self.shape)

    def statistics(self, theta: Tensor) -> GammaStatistics:
        """(log θ, θ)."""
        return GammaStatistics(theta.log(), theta)

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """−log θ."""
        return -theta.log()

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """−E[log θ]."""
        return -self.to_mean(state).log

    def log_partition(self, nat: Any) -> Tensor:
        """log Γ(a) − a log b."""
        a, b = nat.log.double(), -nat.theta.double()
        return (log_gamma(a) - a * b.log()).to(nat.log.dtype)

    def to_mean(self, nat: Any) -> GammaStatistics:
        """(ψ(a) − log b, a/b)."""
        log = digamma(nat.log.double()) - (-nat.theta.double()).log()
        return GammaStatistics(log.to(nat.log.dtype), nat.log / -nat.theta)

    def to_natural(self, mean: Any) -> GammaStatistics:
        """The shape from log a − ψ(a) = log E[θ] − E[log θ] by Newton's method, and the rate a/E[θ].

        Raises:
            ValueError: unless E[θ] > 0 and E[log θ] < log E[θ].
        """
        gap = mean.theta.double().log() - mean.log.double()
        if not bool((gap > 0.0).all()):
            raise ValueError(
                "mean: of positive weights E[log θ] must be smaller than log E[θ]; give such expectations."
            )
        a = (3.0 - gap + ((gap - 3.0).square() + 24.0 * gap).sqrt()) / (12.0 * gap)  # Minka, within 2 %
        for _ in range(5):  # log a ← log a − (log of the left side's ratio to `gap`) / its slope
            left = log_less_digamma(a)
            a = a * torch.exp((left / gap).log() * left / trigamma_excess(a))
        return GammaStatistics(a.to(mean.log.dtype), -(a / mean.theta.double()).to(mean.log.dtype))

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """The quantile at u; differentiable in λ by the implicit function theorem."""
        a, b = state.log, -state.theta
        wanted = a.requires_grad or b.requires_grad
        draw = standard_draw(a, noise, slope=wanted)
        log = draw.ratio + (a.detach().double() / b.detach().double()).log()
        bounds = torch.finfo(noise.dtype)
        theta = log.exp().to(noise.dtype).clamp(bounds.tiny, bounds.max)
        if draw.slope is None:
            return theta
        along = (draw.slope + 1.0 / a.detach().double()).to(noise.dtype)
        return following(theta, along * from_zero(a) - from_zero(b.log()))

    def natural_gradient(self, state: Any, draws: Draws) -> GammaStatistics:
        """The pathwise gradient through F⁻¹, in closed form."""
        a, b = state.log.double(), -state.theta.double()
        slope = standard_draw(a, draws.noise, slope=True).slope
        assert slope is not None
        pull = draws.theta.double() * draws.require_grad().double()
        bent = (pull * slope).mean(0) / trigamma_excess(a)
        return GammaStatistics((a * bent).to(draws.theta.dtype), (b * (pull.mean(0) / a - bent)).to(draws.theta.dtype))

    def fisher_solve(self, nat: Any, vector: Any) -> GammaStatistics:
        """F⁻¹ v in closed form."""
        a, b = nat.log.double(), -nat.theta.double()
        along_log, along_theta = vector.log.double(), vector.theta.double() * b
        excess = trigamma_excess(a)
        first = (a * along_log - along_theta) / excess
        second = b * ((1.0 + excess) / a * along_theta - along_log) / excess
        return GammaStatistics(first.to(nat.log.dtype), second.to(nat.log.dtype))

    def entropy(self, state: Any) -> Tensor:
        """The entropy at rate 1, less log b."""
        return (standard_entropy(state.log.double()) - (-state.theta.double()).log()).to(state.log.dtype)

    def kl(self, state: Any, prior: Any) -> Tensor:
        """a₀ (r − 1 − log r) with the ratio r of the means, and what the shapes add; no term cancels."""
        a, b, a0, b0 = (v.double() for v in (state.log, -state.theta, prior.log, -prior.theta))
        ratio = a.log() - a0.log() + b0.log() - b.log()
        return (a0 * exp_excess(ratio) + shape_divergence(a, a0)).to(state.log.dtype)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> GammaStatistics:
        """The member with mean θ and shape `precision` (the field `shape` if None)."""
        shape = torch.ones_like(theta) * (self.shape if precision is None else precision)
        return GammaStatistics(shape, -shape / theta)

    def recentre(self, state: Any, theta: Tensor) -> GammaStatistics:
        """The mean θ, the shape kept."""
        return GammaStatistics(state.log, -state.log / theta)

    def distribution(self, state: Any) -> Any:
        """A Pyro Gamma, one event of the tensor's shape."""
        from . import distributions  # Pyro takes long to import

        return distributions.Gamma(state.log, -state.theta).to_event(state.log.ndim)
