r"""Inverse Gaussian weights: the first time at which a Brownian motion with drift passes a level; mean m, shape s.

    q(θ) = √(s/2πθ³) exp(−s (θ − m)² / (2 m² θ)),    T(θ) = (θ, 1/θ),  h = θ^{−3/2}/√2π,  λ = (−s/2m², −s/2)

With φ = s/m (1/φ is the squared relative width) A = −φ − ½ log s, μ = (m, 1/m + 1/s), and the Fisher matrix has the
inverse φ²/2 [[(1 + 2/φ)/m², 1], [1, m²]].

Draws are θ = m e^w where, with a = 2√φ sinh(w/2) and b = 2√φ cosh(w/2), w solves

    F = Φ(a) + ½ exp(−a²/2) erfcx(b/√2) = Φ(ε)        (e^{2φ} Φ(−b), which overflows, written without overflow)

for a standard normal ε; a → ε as φ → ∞. The derivative that the implicit function
theorem gives a draw is φ ∂w/∂φ = 1 − (a + b) M(b), M(b) = √(π/2) erfcx(b/√2), at fixed m. Hence in closed form

    F⁻¹ ∇_λ E_q[ℓ] = ( (E[θ∇ℓ] − (φ + 1) E[θ∇ℓ φ ∂w/∂φ]) / m,  −φ m E[θ∇ℓ φ ∂w/∂φ] )

Computed in float64 and rounded to the dtype of the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Draws
from expfam_poco.family.inversion import increasing_root, opaque

LOG_2PI = math.log(2.0 * math.pi)
EULER = 0.5772156649015329
ITERATIONS = 7


class Reciprocal(NamedTuple):
    """T(θ) = (θ, 1/θ), and what belongs to it: λ = (−s/2m², −s/2)."""

    theta: Tensor
    reciprocal: Tensor


@dataclass(frozen=True)
class InverseGaussian(ExponentialFamily):
    """Positive weights with mean m and variance m²/φ; long to the right, with a sharp end to the left.

    Args:
        strength: φ = mean²/variance at the start, where the optimizer's `hess_init` does not set it.

    Example:
        >>> import torch
        >>> from expfam_poco.families import InverseGaussian
        >>> q = InverseGaussian()
        >>> q.point(q.centred_at(torch.tensor([0.5, 2.0]), 10.0))
        tensor([0.5000, 2.0000])
    """

    strength: float = 100.0

    Statistics: ClassVar[type[Any]] = Reciprocal
    support: ClassVar[constraints.Constraint] = constraints.positive
    domain: ClassVar[Any] = {"theta": constraints.less_than(0.0), "reciprocal": constraints.less_than(0.0)}

    def statistics(self, theta: Tensor) -> Reciprocal:
        """(θ, 1/θ)."""
        return Reciprocal(theta, 1.0 / theta)

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """−(3/2) log θ − ½ log 2π."""
        return -1.5 * theta.log() - 0.5 * LOG_2PI

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """With E[log θ] = log m − e^{2φ} E₁(2φ)."""
        mean, phi = _mean(state), _phi(state)
        expected = mean.log() - scaled_exponential_integral(2.0 * phi.double()).to(mean.dtype)
        return -1.5 * expected - 0.5 * LOG_2PI

    def log_partition(self, nat: Any) -> Tensor:
        """−φ − ½ log s."""
        return -_phi(nat) - 0.5 * torch.log(-2.0 * nat.reciprocal)

    def to_mean(self, nat: Any) -> Reciprocal:
        """(m, 1/m + 1/s)."""
        mean = _mean(nat)
        return Reciprocal(mean, 1.0 / mean - 0.5 / nat.reciprocal)

    def to_natural(self, mean: Any) -> Reciprocal:
        """1/s = E[1/θ] − 1/m.

        Raises:
            ValueError: unless m > 0 and E[1/θ] > 1/m.
        """
        inverse = mean.reciprocal - 1.0 / mean.theta
        if not bool(((mean.theta > 0.0) & (inverse > 0.0)).all()):
            raise ValueError("mean: positive weights have E[θ] > 0 and E[1/θ] > 1/E[θ].")
        return _state(mean.theta, 1.0 / (mean.theta * inverse))

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """m e^w, with the derivative of the draw in both parameters."""
        mean, phi = _mean(state).double(), _phi(state).double()
        still = phi.detach()
        w = _quantile(still, noise.double())
        w = w + _slope(still, 2.0 * still.sqrt() * torch.sinh(0.5 * w)) / still * (phi - still)
        return (mean * torch.exp(w)).to(noise.dtype)

    def natural_gradient(self, state: Any, draws: Draws) -> Reciprocal:
        """In closed form: see the module's head."""
        mean, phi = _mean(state).double(), _phi(state).double()
        pull = draws.theta.double() * draws.require_grad().double()
        # a = √φ (√(θ/m) − √(m/θ))
        ratio = (draws.theta.double() / mean).sqrt()
        a = phi.sqrt() * (ratio - 1.0 / ratio)
        bent = (pull * _slope(phi, a)).mean(0)
        dtype = state.theta.dtype
        return Reciprocal(((pull.mean(0) - (phi + 1.0) * bent) / mean).to(dtype), (-phi * mean * bent).to(dtype))

    def fisher_solve(self, nat: Any, vector: Any) -> Reciprocal:
        """φ²/2 [[(1 + 2/φ)/m², 1], [1, m²]] v."""
        mean, phi = _mean(nat), _phi(nat)
        both = 0.5 * phi * (phi * (vector.theta / mean + vector.reciprocal * mean))
        return Reciprocal(both / mean + phi * vector.theta / (mean * mean), both * mean)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Reciprocal:
        """Mean θ and φ = `precision` (`strength` if None)."""
        strength = self.strength if precision is None else precision
        phi = torch.as_tensor(strength, dtype=theta.dtype, device=theta.device)
        return _state(theta, phi)

    def point(self, state: Any) -> Tensor:
        """The mean m."""
        return _mean(state)

    def mode(self, state: Any) -> Tensor:
        """m (√(1 + c²) − c) with c = 3/(2φ), as m / (√(1 + c²) + c)."""
        c = 1.5 / _phi(state)
        return _mean(state) / ((1.0 + c * c).sqrt() + c)

    def recentre(self, state: Any, theta: Tensor) -> Reciprocal:
        """A new mean, φ kept."""
        return _state(theta, _phi(state))

    def log_prob(self, state: Any, theta: Tensor) -> Tensor:
        """½ log s − ½ φ (θ − m)²/(m θ) + log h; like `entropy` and `kl` without differences of large numbers."""
        mean, phi = _mean(state), _phi(state)
        distance = phi * ((theta - mean) / mean) * ((theta - mean) / theta)
        return 0.5 * (torch.log(-2.0 * state.reciprocal) - distance) + self.log_base_measure(theta)

    def entropy(self, state: Any) -> Tensor:
        """½ − ½ log s − E[log h]."""
        return 0.5 - 0.5 * torch.log(-2.0 * state.reciprocal) - self.expected_log_base_measure(state)

    def kl(self, state: Any, prior: Any) -> Tensor:
        """½ (log(s/s₀) − 1 + s₀/s + φ₀ (m − m₀)²/(m m₀))."""
        mean, other = _mean(state), _mean(prior)
        ratio = prior.reciprocal / state.reciprocal
        distance = _phi(prior) * ((mean - other) / mean) * ((mean - other) / other)
        return 0.5 * (ratio - 1.0 - ratio.log() + distance)


def _mean(nat: Any) -> Tensor:
    """M = √(λ₂/λ₁)."""
    return torch.sqrt(nat.reciprocal / nat.theta)


def _phi(nat: Any) -> Tensor:
    """φ = 2 √(λ₁ λ₂), without overflow of the product."""
    return 2.0 * torch.sqrt(-nat.theta) * torch.sqrt(-nat.reciprocal)


def _state(mean: Tensor, phi: Tensor) -> Reciprocal:
    """λ = −½ φ (1/m, m)."""
    return Reciprocal(-0.5 * phi / mean, -0.5 * phi * mean)


def _mills(b: Tensor) -> Tensor:
    """M(b) = (1 − Φ(b)) / φ(b)."""
    return math.sqrt(0.5 * math.pi) * torch.special.erfcx(b * math.sqrt(0.5))


def _slope(phi: Tensor, a: Tensor) -> Tensor:
    """φ ∂w/∂φ = 1 − (a + b) M(b); a + b = 4φ/(b − a) where a < 0."""
    b = torch.sqrt(a * a + 4.0 * phi)
    together = torch.where(a < 0.0, 4.0 * phi / (b + a.abs()), a + b)
    return 1.0 - together * _mills(b)


@opaque("inverse_gaussian_quantile")
def _quantile(phi: Tensor, noise: Tensor) -> Tensor:
    """w = log θ/m with F = Φ(ε), found in logarithms of the smaller tail.

    Φ ≤ F gives a ≤ ε; F ≤ 2Φ below the median, and 1 − F ≤ ½ above it, give the lower end. Without drift (φ = 0) θ
    would be later, φ/z² with 2Φ(−z) = Φ(ε): the guess is the sooner of both bounds.
    """
    lower = noise < 0.0
    target = torch.special.log_ndtr(-noise.abs())
    width = 2.0 * phi.sqrt()

    def short(w: Tensor) -> tuple[Tensor, Tensor]:
        a, b = width * torch.sinh(0.5 * w), width * torch.cosh(0.5 * w)
        # The tail's mass over the normal density: M(−a) + M(b) below, M(a) − M(b) above.
        mass = torch.where(lower, _mills(-a) + _mills(b), _mills(a) - _mills(b)).clamp_min(1e-300)
        off = mass.log() - 0.5 * (a * a + LOG_2PI) - target
        slope = 0.5 * width * torch.exp(-0.5 * w) / mass  # b − a = 2 √φ e^{−w/2}
        return torch.where(lower, off, -off), slope

    low, high = (2.0 * torch.asinh(end / width) for end in (noise.clamp_max(0.0) - 0.7, noise))
    z = -torch.special.ndtri(0.5 * torch.special.ndtr(noise)).clamp_max(-1e-16)
    start = torch.minimum(high, phi.log() - 2.0 * z.log())
    return increasing_root(short, torch.maximum(start, low), low, high, iterations=ITERATIONS)


def scaled_exponential_integral(x: Tensor) -> Tensor:
    """eˣ E₁(x) = ∫ e^{−t}/(x + t) dt for x > 0, in float64: a power series below 2, a continued fraction above.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.inverse_gaussian import scaled_exponential_integral
        >>> scaled_exponential_integral(torch.tensor([1.0, 1e9], dtype=torch.float64))
        tensor([5.9635e-01, 1.0000e-09], dtype=torch.float64)
    """
    small = x.clamp_max(2.0)
    series = torch.zeros_like(x)
    for k in range(30, 0, -1):  # Σ −(−x)ᵏ/(k k!)
        series = (series - (-1.0) ** k / (k * math.factorial(k))) * small
    near = torch.exp(small) * (series - EULER - small.log())
    large = x.clamp_min(2.0)
    fraction = torch.zeros_like(x)
    for k in range(60, 0, -1):  # 1/(x + 1 − 1/(x + 3 − 4/(x + 5 − …)))
        fraction = k * k / (large + 2.0 * k + 1.0 - fraction)
    return torch.where(x < 2.0, near, 1.0 / (large + 1.0 - fraction))
