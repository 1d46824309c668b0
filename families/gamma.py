r"""The Gamma family Γ(a, b) of positive weights, shape a and rate b:  q(θ) = b^a θ^{a−1} e^{−bθ} / Γ(a).

With the base measure h(θ) = 1/θ the statistics are T(θ) = (log θ, θ) and λ = (a, −b), A(λ) = log Γ(a) − a log b.
(With h = 1 the first would be a − 1, which loses all digits of a small a.) μ = (ψ(a) − log b, a/b).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family import ExponentialFamily


class GammaStatistics(NamedTuple):
    """T(θ) = (log θ, θ); as natural parameters: the shape a and minus the rate, −b."""

    log: Tensor
    theta: Tensor


@dataclass(frozen=True)
class Gamma(ExponentialFamily):
    """Positive weights with a Gamma posterior of shape a and rate b."""

    Statistics: ClassVar[type[Any]] = GammaStatistics
    support: ClassVar[constraints.Constraint] = constraints.positive
    domain: ClassVar[Any] = {"log": constraints.positive, "theta": constraints.less_than(0.0)}
    noise_kind: ClassVar[str] = "uniform"

    def statistics(self, theta: Tensor) -> GammaStatistics:
        """(log θ, θ)."""
        return GammaStatistics(theta.log(), theta)

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """−log θ."""
        return -theta.log()

    def log_partition(self, nat: Any) -> Tensor:
        """log Γ(a) − a log b."""
        return torch.lgamma(nat.log) - nat.log * torch.log(-nat.theta)

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """Not yet."""
        raise NotImplementedError

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> GammaStatistics:
        """The member with mean θ and shape `precision` (1 if None)."""
        shape = torch.ones_like(theta) * (1.0 if precision is None else precision)
        return GammaStatistics(shape, -shape / theta)
