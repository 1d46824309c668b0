r"""Von Mises–Fisher directions: unit vectors θ in space with density exp(κ ⟨m, θ⟩) κ/(4π sinh κ).

T(θ) = θ and λ = κ m, any vector. With κ = |λ| and ρ(κ) = coth κ − 1/κ,

    A(λ) = log 4π sinh(κ)/κ,    μ = ρ(κ) m,    F(λ) = ρ′ m mᵀ + (ρ/κ) (1 − m mᵀ),    ρ′ = 1 − ρ² − 2ρ/κ

A draw pushes a uniform point z/|z| (z normal) along its meridian through m: if c = ⟨z, m⟩/|z|, uniform in (−1, 1), then

    w = ⟨θ, m⟩ = 1 + log(1 − ½ (1 − c) (1 − e^{−2κ})) / κ

has the distribution of the family (F(w) is exponential in w), and at κ = 0 nothing moves. Natural gradients are those
of this push, and losses may be any functions of the direction: only their slope along the sphere counts. Steps turn λ,
and never turn it round (`domains.Directed`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family.base import ExponentialFamily, Theta
from expfam_poco.family.domains import Directed, Sphere

LOG_4PI = math.log(4.0 * math.pi)
SMALL = 0.3  # below it the functions of κ are power series in κ²
# log(sinh κ/κ) = Σ c_n κ^{2n}; ρ/κ is twice its derivative in κ².
_LOG_SINHC = (1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250, 2 / 127702575)


@dataclass(frozen=True)
class VonMisesFisher(ExponentialFamily):
    """Unit vectors in space, one in each row of three: directions, axes, points on a globe.

    The model holds m. The precision of a member is κ, 10 for the first one: most draws are then within 26° of m.

    Example:
        >>> import torch
        >>> from expfam_poco.families import VonMisesFisher
        >>> q = VonMisesFisher()
        >>> q.point(q.centred_at(torch.tensor([[0.6, 0.0, 0.8]])))
        tensor([[0.6000, 0.0000, 0.8000]])
    """

    event_dim: ClassVar[int] = 1
    support: ClassVar[constraints.Constraint] = Sphere()
    domain: ClassVar[Any] = {"theta": Directed()}

    def statistics(self, theta: Tensor) -> Theta:
        """θ."""
        return Theta(theta)

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """0: on the sphere's surface."""
        return theta.new_zeros(theta.shape[:-1])

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """0."""
        return state.theta.new_zeros(state.theta.shape[:-1])

    def log_partition(self, nat: Any) -> Tensor:
        """log 4π sinh(κ)/κ, in κ² where κ is small, so that it has derivatives at 0."""
        square = nat.theta.double().square().sum(-1)
        return (LOG_4PI + _log_sinhc(square)).to(nat.theta.dtype)

    def to_mean(self, nat: Any) -> Theta:
        """ρ(κ) λ/κ."""
        wide = nat.theta.double()
        return Theta((_ratio_over(_length(wide)) * wide).to(nat.theta.dtype))

    def to_natural(self, mean: Any) -> Theta:
        """κ from ρ(κ) = |μ|, by Newton's method on log κ.

        Raises:
            ValueError: where |μ| ≥ 1.
        """
        wide = mean.theta.double()
        goal = _length(wide)
        if not bool((goal < 1.0).all()):
            raise ValueError("mean: the expectation of a unit vector must lie inside the unit sphere.")
        safe = goal.clamp_min(1e-300)
        kappa = safe * (3.0 - safe * safe) / (1.0 - safe * safe)  # Banerjee et al. 2005
        for _ in range(8):
            over = _ratio_over(kappa)
            slope = _ratio_slope(kappa)
            kappa = kappa * torch.exp(((safe - kappa * over) / (slope * kappa)).clamp(-1.0, 1.0))
        return Theta((wide * torch.where(goal > 0.0, kappa / safe, 3.0)).to(mean.theta.dtype))

    def fisher_solve(self, nat: Any, vector: Any) -> Theta:
        """Along m by 1/ρ′, across by κ/ρ."""
        wide, v = nat.theta.double(), vector.theta.double()
        kappa = _length(wide)
        m = _direction(wide, kappa)
        along = (m * v).sum(-1, keepdim=True) * m
        return Theta((along / _ratio_slope(kappa) + (v - along) / _ratio_over(kappa)).to(nat.theta.dtype))

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """A uniform point, pushed along its meridian."""
        wide, z = state.theta.double(), noise.double()
        kappa = _length(wide)
        m = _direction(wide, kappa)
        z = z / _length(z)
        c = (z * m).sum(-1, keepdim=True)
        across = z - c * m
        across = across / _length(across).clamp_min(1e-150)
        safe = kappa.clamp_min(1e-8)
        fall = -torch.log1p(0.5 * (1.0 - c) * torch.expm1(-2.0 * safe)) / safe  # 1 − w
        fall = fall.clamp(0.0, 2.0)
        theta = (1.0 - fall) * m + (fall * (2.0 - fall)).clamp_min(1e-300).sqrt() * across
        return (theta / _length(theta)).to(noise.dtype)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Theta:
        """κ = `precision` around θ; 10 if None.

        Raises:
            ValueError: unless rows are vectors in space.
        """
        if theta.shape[-1] != 3:
            raise ValueError(
                f"params: VonMisesFisher is about directions in space, rows of 3 numbers, not of shape "
                f"{tuple(theta.shape)}; for the plane use VonMises, on angles."
            )
        size = torch.as_tensor(10.0 if precision is None else precision, dtype=theta.dtype, device=theta.device)
        return Theta((size.unsqueeze(-1) if size.ndim else size) * theta)

    def recentre(self, state: Any, theta: Tensor) -> Theta:
        """The direction θ, κ kept."""
        return Theta(_length(state.theta) * theta)

    def point(self, state: Any) -> Tensor:
        """m; the last axis at κ = 0."""
        wide = state.theta.double()
        return _direction(wide, _length(wide)).to(state.theta.dtype)

    def mode(self, state: Any) -> Tensor:
        """m."""
        return self.point(state)


def _length(vector: Tensor) -> Tensor:
    """|v|, with a gradient at 0 (of 0)."""
    square = vector.square().sum(-1, keepdim=True)
    positive = square > 0.0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _direction(vector: Tensor, length: Tensor) -> Tensor:
    last = torch.cat((torch.zeros_like(vector[..., 1:]), torch.ones_like(vector[..., :1])), -1)
    known = length > 1e-150
    return torch.where(known, vector / torch.where(known, length, 1.0), last)


def _series(square: Tensor, coefficients: list[float]) -> Tensor:
    value = torch.full_like(square, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * square + coefficient
    return value


def _log_sinhc(square: Tensor) -> Tensor:
    """log(sinh κ/κ) of κ²."""
    small = square < SMALL**2
    inner = torch.where(small, square, 0.0)
    kappa = torch.where(small, 1.0, square).sqrt()
    far = kappa + torch.log1p(-torch.exp(-2.0 * kappa)) - torch.log(2.0 * kappa)
    return torch.where(small, inner * _series(inner, list(_LOG_SINHC)), far)


def _ratio_over(kappa: Tensor) -> Tensor:
    """ρ(κ)/κ, ⅓ at 0."""
    small = kappa < SMALL
    inner = torch.where(small, kappa, 0.0).square()
    safe = torch.where(small, 1.0, kappa)
    far = (1.0 / torch.tanh(safe) - 1.0 / safe) / safe
    return torch.where(small, _series(inner, [2.0 * (n + 1) * c for n, c in enumerate(_LOG_SINHC)]), far)


def _ratio_slope(kappa: Tensor) -> Tensor:
    """ρ′(κ) = 1/κ² − 1/sinh² κ."""
    small = kappa < SMALL
    inner = torch.where(small, kappa, 0.0).square()
    safe = torch.where(small, 1.0, kappa)
    far = safe**-2 - torch.exp(-2.0 * safe) * (2.0 / -torch.expm1(-2.0 * safe)).square()
    terms = [2.0 * (n + 1) * (2.0 * n + 1.0) * c for n, c in enumerate(_LOG_SINHC)]
    return torch.where(small, _series(inner, terms), far)
