r"""Von Mises angles: θ in (−π, π] with density exp(κ cos(θ − m)) / 2π I₀(κ).

T(θ) = (cos θ, sin θ) and λ = κ (cos m, sin m), any vector of the plane, so that nothing needs a domain. With ρ = I₁/I₀,

    A(λ) = log 2π I₀(κ),    μ = ρ(κ) λ/κ,    F(λ) = ρ′ n nᵀ + (ρ/κ) (1 − n nᵀ),    n = λ/κ,  ρ′ = 1 − ρ² − ρ/κ

Draws are by inversion around the mode, θ = m + x(κ, u) modulo 2π, where x solves F(x; κ) = u. How a draw follows its
posterior is a flow on the circle, v = ∂θ/∂λ with ∂(f v)/∂θ = −∂f/∂λ; any f v + constant is one, too. Here x keeps
its place under the distribution function, and turning m moves it with speed

    v = ∂x/∂κ n + (1 − exp(−κ (1 + cos x))) / κ n⊥

(turning everything alike, 1/κ, would be infinite at κ = 0). As F⁻¹ (v ∇ℓ) this gives E_q's natural gradient for losses
that are *periodic* in θ; others have a jump at ±π that no derivative sees. Let the model use the cosine and the sine.

All of it is computed in float64, for κ from 0 to 10⁶ and beyond, and rounded to the dtype of the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family import fields
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Draws
from expfam_poco.family.inversion import increasing_root, opaque
from expfam_poco.family.transfer import on_device

LOG_2PI = math.log(2.0 * math.pi)
SMALL, LARGE = 1.0, 150.0  # below: a power series in κ²; above: an asymptotic one in 1/κ
_ROOTS = np.polynomial.legendre.leggauss(24)
PLACES, WEIGHTS = ((0.5 * (_ROOTS[0] + 1.0)).tolist(), (0.5 * _ROOTS[1]).tolist())  # of Gauss–Legendre on (0, 1)
ITERATIONS = 4
REACH = 9.0  # standard deviations, beyond which there are no draws


class Circular(NamedTuple):
    """T(θ) = (cos θ, sin θ), and what belongs to it: λ = κ (cos m, sin m)."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class VonMises(ExponentialFamily):
    """Angles in (−π, π], every entry with its own direction m and concentration κ (about 1/variance where large).

    The loss must be periodic in each angle.

    Example:
        >>> import torch
        >>> from expfam_poco.families import VonMises
        >>> q = VonMises()
        >>> q.point(q.centred_at(torch.tensor([3.0, -1.0]), 50.0)).round(decimals=3)
        tensor([ 3., -1.])
    """

    Statistics: ClassVar[type[Any]] = Circular
    support: ClassVar[constraints.Constraint] = constraints.interval(-math.pi, math.pi)
    domain: ClassVar[Any] = {"cos": constraints.real, "sin": constraints.real}
    noise_kind: ClassVar[str] = "uniform"

    def statistics(self, theta: Tensor) -> Circular:
        """(cos θ, sin θ)."""
        return Circular(theta.cos(), theta.sin())

    def log_partition(self, nat: Any) -> Tensor:
        """log 2π I₀(κ), as a function of κ² where κ is small, so that it has derivatives at 0."""
        wide = _wide(nat)
        value = LOG_2PI + _log_bessel(wide.cos * wide.cos + wide.sin * wide.sin)
        return value.to(nat.cos.dtype)

    def to_mean(self, nat: Any) -> Circular:
        """ρ(κ) λ/κ."""
        wide = _wide(nat)
        factor = _ratio_over(_length(wide))
        return _narrow(Circular(factor * wide.cos, factor * wide.sin), nat.cos)

    def to_natural(self, mean: Any) -> Circular:
        """κ from ρ(κ) = |μ|, by Newton's method on its logarithm.

        Raises:
            ValueError: where |μ| ≥ 1.
        """
        wide = _wide(mean)
        length = _length(wide)
        if not bool((length < 1.0).all()):
            raise ValueError("mean: the expectation of (cos θ, sin θ) must lie inside the unit circle.")
        start = length * (2.0 - length * length) / (1.0 - length * length)  # κ within 5 %

        def off(kappa: Tensor) -> tuple[Tensor, Tensor]:
            return kappa * _ratio_over(kappa) - length, _ratio_slope(kappa)

        kappa = increasing_root(off, start, 0.5 * start, 2.0 * start, iterations=8)
        factor = torch.where(length > 0.0, kappa / length.clamp_min(_TINY), 2.0)
        return _narrow(Circular(factor * wide.cos, factor * wide.sin), mean.cos)

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """m + x(κ, u) in (−π, π], with the derivative of the flow above."""
        nat = _wide(state)
        still = fields.map_fields(torch.Tensor.detach, nat)
        kappa = _length(still)
        x = _quantile(kappa, noise.double())
        theta = torch.atan2(still.sin, still.cos) + x
        theta = theta - 2.0 * math.pi * torch.ceil((theta - math.pi) / (2.0 * math.pi))
        along, across = _flow(kappa, x)
        ahead, aside = _turned(still, fields.subtract(nat, still), kappa)
        return (theta + along * ahead + across * aside).to(noise.dtype)

    def natural_gradient(self, state: Any, draws: Draws) -> Circular:
        """F⁻¹ (v ∇ℓ), averaged: divided by ρ′ along n, by ρ/κ across it."""
        nat, theta, gradient = _wide(state), draws.theta.double(), draws.require_grad().double()
        kappa = _length(nat)
        x = torch.remainder(theta - torch.atan2(nat.sin, nat.cos) + math.pi, 2.0 * math.pi) - math.pi
        along, across = _flow(kappa, x)
        ahead = (gradient * along).mean(0) / _ratio_slope(kappa)
        aside = (gradient * across).mean(0) / _ratio_over(kappa)
        return _narrow(_turned_back(nat, ahead, aside, kappa), state.cos)

    def fisher_solve(self, nat: Any, vector: Any) -> Circular:
        """v/ρ′ along n, v κ/ρ across it."""
        wide, v = _wide(nat), _wide(vector)
        kappa = _length(wide)
        ahead, aside = _turned(wide, v, kappa)
        solved = _turned_back(wide, ahead / _ratio_slope(kappa), aside / _ratio_over(kappa), kappa)
        return _narrow(solved, nat.cos)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Circular:
        """Direction θ, concentration `precision` (1 if None; 0: every angle is as likely)."""
        kappa = torch.as_tensor(1.0 if precision is None else precision, dtype=theta.dtype, device=theta.device)
        return Circular(kappa * theta.cos(), kappa * theta.sin())

    def point(self, state: Any) -> Tensor:
        """The mean direction m."""
        return torch.atan2(state.sin, state.cos)

    def mode(self, state: Any) -> Tensor:
        """The mean direction m."""
        return self.point(state)

    def recentre(self, state: Any, theta: Tensor) -> Circular:
        """Direction θ, the concentration kept (where it is 0, as little as shows the direction)."""
        return self.centred_at(theta, torch.hypot(state.cos, state.sin).clamp_min(torch.finfo(theta.dtype).tiny ** 0.5))

    def distribution(self, state: Any) -> Any:
        """A Pyro distribution of angles, one event of the tensor's shape."""
        from .von_mises_distribution import VonMisesDistribution

        return VonMisesDistribution(self, state)

    def variance(self, state: Any) -> Tensor:
        """The circular one, 1 − ρ(κ), as torch's von Mises has it."""
        mean = self.to_mean(_wide(state))
        return (1.0 - torch.hypot(mean.cos, mean.sin)).to(state.cos.dtype)

    def log_prob(self, state: Any, theta: Tensor) -> Tensor:
        """⟨λ, T(θ)⟩ − A(λ): in float64, for both are large."""
        return super().log_prob(_wide(state), theta.double()).to(theta.dtype)

    def entropy(self, state: Any) -> Tensor:
        """A(λ) − ⟨λ, μ⟩ in float64."""
        return super().entropy(_wide(state)).to(state.cos.dtype)

    def kl(self, state: Any, prior: Any) -> Tensor:
        """A(λ₀) − A(λ) + ⟨λ − λ₀, μ⟩ in float64."""
        return super().kl(_wide(state), _wide(prior)).to(state.cos.dtype)


# ---- vectors of the plane ---------------------------------------------------------------------------------

_TINY = 1e-300


def _wide(value: Any) -> Circular:
    return Circular(value[0].double(), value[1].double())


def _narrow(value: Circular, like: Tensor) -> Circular:
    return Circular(value.cos.to(like.dtype), value.sin.to(like.dtype))


def _length(nat: Circular) -> Tensor:
    return torch.hypot(nat.cos, nat.sin)


def _axis(nat: Circular, kappa: Tensor) -> tuple[Tensor, Tensor]:
    """N = λ/κ; (1, 0) at 0, as the direction of atan2."""
    safe = kappa.clamp_min(_TINY)
    return torch.where(kappa > 0.0, nat.cos / safe, 1.0), nat.sin / safe


def _turned(nat: Circular, vector: Any, kappa: Tensor) -> tuple[Tensor, Tensor]:
    """A vector's parts along n and n⊥."""
    c, s = _axis(nat, kappa)
    return c * vector[0] + s * vector[1], c * vector[1] - s * vector[0]


def _turned_back(nat: Circular, ahead: Tensor, aside: Tensor, kappa: Tensor) -> Circular:
    c, s = _axis(nat, kappa)
    return Circular(c * ahead - s * aside, s * ahead + c * aside)


# ---- Bessel functions, in float64 -------------------------------------------------------------------------


def _log_bessel(square: Tensor) -> Tensor:
    """Log I₀(κ) of κ²: Σ (κ²/4)ᵏ/k!², the exponentially scaled function, or its expansion in 1/κ."""
    small, large = square < SMALL**2, square > LARGE**2
    quarter = 0.25 * torch.where(small, square, 0.0)
    series = _polynomial(quarter, [1.0 / math.factorial(k) ** 2 for k in range(1, 13)]) * quarter
    kappa = torch.where(small | large, 1.0, square).sqrt()
    middle = kappa + torch.special.i0e(kappa).log()
    far = torch.where(large, square, LARGE**2).sqrt()
    # Terms ((2k−1)!!)² / (k! (8κ)ᵏ)
    tail = [math.prod(range(1, 2 * k, 2)) ** 2 / (math.factorial(k) * 8.0**k) for k in range(1, 8)]
    asymptotic = far - 0.5 * (LOG_2PI + far.log()) + torch.log1p(_polynomial(1.0 / far, tail) / far)
    return torch.where(small, torch.log1p(series), torch.where(large, asymptotic, middle))


def _ratio_over(kappa: Tensor) -> Tensor:
    """ρ(κ)/κ, ½ at 0."""
    safe = kappa.clamp_min(1e-8)  # below, it is ½ to all digits
    return torch.special.i1e(safe) / torch.special.i0e(safe) / safe


def _ratio_slope(kappa: Tensor) -> Tensor:
    """ρ′ = 1 − ρ² − ρ/κ, and where this cancels 1/(2κ²) + 1/(4κ³) + 3/(8κ⁴) + 25/(32κ⁵) + …"""
    over = _ratio_over(kappa)
    inverse = 1.0 / kappa.clamp_min(LARGE)
    series = _polynomial(inverse, [0.5, 0.25, 0.375, 25.0 / 32.0, 65.0 / 32.0, 3219.0 / 512.0]) * inverse * inverse
    return torch.where(kappa > LARGE, series, 1.0 - over * (1.0 + kappa * kappa * over))


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """c₀ + c₁ x + c₂ x² + …"""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


# ---- the distribution around its mode ---------------------------------------------------------------------


def _reach(kappa: Tensor) -> Tensor:
    """How far from the mode draws can be: π, or where 2 sin(x/2) = 9/√κ."""
    return 2.0 * torch.asin((0.5 * REACH * kappa.clamp_min(_TINY).rsqrt()).clamp_max(1.0))


def _height(kappa: Tensor, x: Tensor) -> Tensor:
    """exp(κ (cos x − 1))."""
    return torch.exp(-2.0 * kappa * torch.sin(0.5 * x).square())


def _points(x: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss–Legendre nodes and weights from x to the end, along a new last axis."""
    t, w = (on_device(values, x.dtype, x.device) for values in (PLACES, WEIGHTS))
    length = (end - x).unsqueeze(-1)
    return x.unsqueeze(-1) + length * t, length * w


def _above(kappa: Tensor, x: Tensor) -> Tensor:
    """∫ₓ exp(κ (cos t − 1)) dt up to the reach, for x ≥ 0."""
    at, weight = _points(x, _reach(kappa).expand_as(x))
    return (weight * _height(kappa.unsqueeze(-1), at)).sum(-1)


@opaque("von_mises_quantile")
def _quantile(kappa: Tensor, u: Tensor) -> Tensor:
    """x with F(x; κ) = u. What is above |x| has the mass p = min(u, 1 − u), whose logarithm is matched.

    As exp(−2κ) (π − x) ≤ ∫ₓ ≤ π − x the root lies between π − p Z exp(2κ) and π − p Z; a good guess is the normal one.
    """
    target = torch.minimum(u, 1.0 - u) * (2.0 * math.pi * torch.special.i0e(kappa))
    reach = _reach(kappa).expand_as(target)
    low = (math.pi - 1.1 * target * torch.exp(2.0 * kappa.clamp_max(300.0))).clamp_min(0.0).minimum(reach)
    high = (math.pi - 0.9 * target).clamp_min(0.0).minimum(reach)  # a tenth wider, so that steps may overshoot
    normal = torch.special.ndtri(torch.maximum(u, 1.0 - u).clamp_max(1.0 - 1e-16)) * (kappa + 0.5).rsqrt()
    start = normal.clamp(low, high)

    def short(x: Tensor) -> tuple[Tensor, Tensor]:
        above = _above(kappa, x).clamp_min(_TINY)
        value, slope = (target / above).log(), _height(kappa, x) / above
        # Halley's: the slope minus half the value times f″/f′.
        return value, torch.maximum(slope - 0.5 * value * (slope - kappa * torch.sin(x)), 0.5 * slope)

    x = increasing_root(short, start, low, high, iterations=ITERATIONS)
    return torch.where(u < 0.5, -x, x)


def _flow(kappa: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """∂x/∂κ = ∫ₓ (cos t − ρ) f dt / f(x), and (1 − exp(−κ (1 + cos x)))/κ."""
    size = x.abs()
    at, weight = _points(size, torch.maximum(_reach(kappa).expand_as(x), size))
    # cos t − ρ without cancellation: (1 − ρ) − 2 sin²(t/2).
    defect = 1.0 - kappa * _ratio_over(kappa)
    part = (defect.unsqueeze(-1) - 2.0 * torch.sin(0.5 * at).square()) * _height(kappa.unsqueeze(-1), at)
    along = (weight * part).sum(-1) / _height(kappa, size).clamp_min(_TINY)
    safe = kappa.clamp_min(1e-12)
    return torch.where(x < 0.0, -along, along), -torch.expm1(-2.0 * safe * torch.cos(0.5 * x).square()) / safe
