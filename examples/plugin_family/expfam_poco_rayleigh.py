"""The Rayleigh family of positive weights:  q(θ) = (θ/σ²) exp(−θ²/2σ²), the length of a normal vector in the plane.

In the form h(θ) exp(λ T(θ) − A(λ)): T(θ) = θ², h(θ) = θ, λ = −1/(2σ²), A(λ) = log σ² = −log(−2λ).
Inverting the distribution function 1 − exp(λθ²) gives samples θ = √(log(u)/λ), u uniform; E[θ] = σ√(π/2) and
E[log θ] = ½ (log 2σ² − γ) with Euler's γ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco import ExponentialFamily

EULER_GAMMA = 0.5772156649015329


class Square(NamedTuple):
    """The field of T(θ) = θ², and of λ."""

    square: Tensor


@dataclass(frozen=True)
class Rayleigh(ExponentialFamily):
    """Positive weights with a Rayleigh posterior: a scale of which q is wide, from nearly 0 to three times the mean.

    Example:
        >>> import torch
        >>> family = Rayleigh()
        >>> round(family.point(family.centred_at(torch.tensor(2.0))).item(), 4)
        2.0
    """

    Statistics: ClassVar[type[Any]] = Square
    support: ClassVar[constraints.Constraint] = constraints.positive
    domain: ClassVar[Mapping[str, constraints.Constraint]] = {"square": constraints.less_than(0.0)}
    noise_kind: ClassVar[str] = "uniform"

    def statistics(self, theta: Tensor) -> Square:
        """θ²."""
        return Square(theta**2)

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """log θ."""
        return theta.log()

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """E[log θ] = ½ (−log(−λ) − γ)."""
        return -0.5 * (torch.log(-state.square) + EULER_GAMMA)

    def log_partition(self, nat: Any) -> Tensor:
        """−log(−2λ)."""
        return -torch.log(-2.0 * nat.square)

    def to_mean(self, nat: Any) -> Square:
        """E[θ²] = 2σ² = −1/λ; the engine would find the same by differentiating A."""
        return Square(-1.0 / nat.square)

    def to_natural(self, mean: Any) -> Square:
        """λ = −1/μ; without this line, found by Newton's method."""
        return Square(-1.0 / mean.square)

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """√(log(u)/λ)."""
        return torch.sqrt(torch.log(noise) / state.square)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Square:
        """The member with mean θ, λ = −π/(4θ²); it has no width of its own, so `precision` says nothing."""
        return Square(-0.25 * math.pi / theta**2)

    def point(self, state: Any) -> Tensor:
        """The mean ½ √(π/−λ)."""
        return 0.5 * torch.sqrt(math.pi / -state.square)
