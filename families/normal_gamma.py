r"""Normal–gamma pairs (x, τ) in rows:  τ ~ Γ(a, b),  x | τ ~ N(m, 1/(kτ)), which is conjugate to normal data.

With the base measure h = (2πτ)^{−1/2} the statistics are T = (log τ, τ, τx, τx²) and

    λ = (a, −b − ½ k m², k m, −½ k),      A(λ) = log Γ(a) − a log b − ½ log k,

so that λ = 0 pulls nowhere. It is kept in the chart (a, b, m, k). The loss of a datum y ~ N(x, 1/τ) is linear in T:
½ τ (y − x)² − ½ log τ; one step with the rate 1 is Bayes' rule.
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

from .positive.gamma import Gamma
from .positive.gamma_functions import following, from_zero, log_gamma, standard_draw

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class NormalGammaStatistics(NamedTuple):
    """T = (log τ, τ, τx, τx²)."""

    log_tau: Tensor
    tau: Tensor
    tau_x: Tensor
    tau_xx: Tensor


class NormalGammaState(NamedTuple):
    """The chart: shape a and rate b of the precision τ, the mean m of x, and how many times τ its precision is, k."""

    a: Tensor
    b: Tensor
    m: Tensor
    k: Tensor


@dataclass(frozen=True)
class NormalGamma(ExponentialFamily):
    """Rows (x, τ): the location and the precision of normal data, known together.

    The model holds (m, a/b). A member of precision p has a = k = p: it knows what p data tell.

    Args:
        strength: a and k of the first posterior, where the optimizer gives no precision.

    Raises:
        ValueError: for a strength that is not positive and finite.

    Example:
        >>> import torch
        >>> from expfam_poco.families import NormalGamma
        >>> q = NormalGamma()
        >>> q.point(q.centred_at(torch.tensor([[1.0, 4.0]])))
        tensor([[1., 4.]])
    """

    strength: float = 10.0

    Statistics: ClassVar[type[Any]] = NormalGammaStatistics
    State: ClassVar[type[Any]] = NormalGammaState
    event_dim: ClassVar[int] = 1
    statistic_dims: ClassVar[tuple[int, ...]] = (0, 0, 0, 0)
    support: ClassVar[constraints.Constraint] = constraints.cat(
        [constraints.real, constraints.positive], dim=-1, lengths=[1, 1]
    )
    domain: ClassVar[Any] = {
        "a": constraints.positive,
        "b": constraints.positive,
        "m": constraints.real,
        "k": constraints.positive,
    }

    def __post_init__(self) -> None:
        """Refuse a strength out of range."""
        positive("strength", self.strength)

    def statistics(self, theta: Tensor) -> NormalGammaStatistics:
        """(log τ, τ, τx, τx²)."""
        x, tau = theta.unbind(-1)
        return NormalGammaStatistics(tau.log(), tau, tau * x, tau * x * x)

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """−½ log 2πτ."""
        return -HALF_LOG_2PI - 0.5 * theta[..., 1].log()

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """By E[log τ] = ψ(a) − log b."""
        return -HALF_LOG_2PI - 0.5 * Gamma().to_mean(Gamma.Nat(state.a, -state.b)).log

    def to_nat(self, state: Any) -> NormalGammaStatistics:
        """λ of the chart."""
        a, b, m, k = state
        return NormalGammaStatistics(a, -b - 0.5 * k * m * m, k * m, -0.5 * k)

    def from_nat(self, nat: Any) -> NormalGammaState:
        """The chart of λ."""
        k = -2.0 * nat.tau_xx
        m = nat.tau_x / k
        return NormalGammaState(nat.log_tau, -nat.tau - 0.5 * k * m * m, m, k)

    def log_partition(self, nat: Any) -> Tensor:
        """log Γ(a) − a log b − ½ log k."""
        a, b, _, k = self.from_nat(NormalGammaStatistics(*(value.double() for value in nat)))
        return (log_gamma(a) - a * b.log() - 0.5 * k.log()).to(nat.tau.dtype)

    def to_natural(self, mean: Any) -> NormalGammaStatistics:
        """The Gamma's by its own means; m = E[τx]/E[τ], 1/k = E[τx²] − m² E[τ].

        Raises:
            ValueError: for means that no member has.
        """
        gamma = Gamma()
        a, minus_b = gamma.to_natural(gamma.Mean(mean.log_tau, mean.tau))
        m = mean.tau_x / mean.tau
        spread = mean.tau_xx - m * mean.tau_x
        if not bool((spread > 0.0).all()):
            raise ValueError("mean: E[τx²] must exceed E[τx]²/E[τ]; give expectations of a normal–gamma distribution.")
        return self.to_nat(NormalGammaState(a, -minus_b, m, 1.0 / spread))

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """τ by the Gamma quantile of the second normal number, x by the first."""
        a, b, m, k = state
        below = torch.special.ndtr(noise[..., 1].double())
        wanted = a.requires_grad or b.requires_grad
        draw = standard_draw(a, below, slope=wanted)
        log = draw.ratio + (a.detach().double() / b.detach().double()).log()
        bounds = torch.finfo(noise.dtype)
        tau = log.exp().to(noise.dtype).clamp(bounds.tiny, bounds.max)
        if draw.slope is not None:
            along = (draw.slope + 1.0 / a.detach().double()).to(noise.dtype)
            tau = following(tau, along * from_zero(a) - from_zero(b.log()))
        return torch.stack((m + noise[..., 0] / (k * tau).sqrt(), tau), -1)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> NormalGammaState:
        """(m, a/b) = θ with a = k = `precision`.

        Raises:
            ValueError: unless rows are pairs.
        """
        if theta.shape[-1] != 2:
            raise ValueError(f"params: NormalGamma is about pairs (x, τ), rows of 2 numbers, not {tuple(theta.shape)}.")
        m, tau = theta.unbind(-1)
        size = torch.ones_like(tau) * (self.strength if precision is None else precision)
        return NormalGammaState(size, size / tau, m.clone(), size.clone())

    def recentre(self, state: Any, theta: Tensor) -> NormalGammaState:
        """(m, a/b) = θ, with the a and k that there are."""
        m, tau = theta.unbind(-1)
        return NormalGammaState(state.a, state.a / tau, m.clone(), state.k)

    def point(self, state: Any) -> Tensor:
        """(m, a/b)."""
        return torch.stack((state.m, state.a / state.b), -1)

    def expectation(self, state: Any) -> Tensor:
        """(m, a/b)."""
        return self.point(state)

    def variance(self, state: Any) -> Tensor:
        """(b/(k (a − 1)), a/b²); infinite for the first where a ≤ 1."""
        a, b, _, k = state
        of_x = torch.where(a > 1.0, b / (k * (a - 1.0).clamp_min(torch.finfo(a.dtype).tiny)), torch.inf)
        return torch.stack((of_x, a / (b * b)), -1)

    def mode(self, state: Any) -> Tensor:
        """(m, (a − ½)/b), τ = 0 for a ≤ ½."""
        return torch.stack((state.m, (state.a - 0.5).clamp_min(0.0) / state.b), -1)
