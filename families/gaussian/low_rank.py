r"""Gaussians with a low-rank-plus-diagonal precision, S = D + V Vᵀ, D = diag(d), V of P × r (SLANG's family).

With Y = D^{-1/2} V = U R (U with orthonormal columns), everything happens in coordinates where D is the identity. A
tangent vector is X = D^{1/2} (diag x + U Zᵀ + Z Uᵀ) D^{1/2}; it is kept as δ = d x and F = D^{1/2} Z. The one nearest
to H in the Fisher metric does not depend on the size of V: with Π = I − U Uᵀ and H̃ = D^{-1/2} H D^{-1/2},

    (Π ∘ Π) x = diag(Π H̃ Π),        E = H̃ − diag x,        Z = E U − ½ U (Uᵀ E U)

(in the metric's own coordinates S^{-1/2} · S^{-1/2} the low-rank directions are all that touch the span of U; what
they cannot reach is Π · Π, where S^{-1/2} is the identity). The first is solved by conjugate gradients, with a floor
under the eigenvalues of Π ∘ Π (`_solve_squares`). For more than 64 weights nothing of P × P is made: a step takes
O(P r²) operations.

Source of the family: Mishkin et al. 2018, *SLANG*; there the projection keeps the diagonal, here it is Fisher's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family.noise import NoiseKey, noise

from .structured import StructuredGaussian

SOLVES = 24  # steps of conjugate gradients; Π ∘ Π is near the identity unless r is near P
FEW = 64  # weights whose Π ∘ Π is decomposed
FLOOR = 1e-3  # of the eigenvalues of Π ∘ Π
SEED_SIZE = 1e-2  # of the first V, against √d
SEED_STREAM = 200


class LowRankState(NamedTuple):
    """Mean m and the precision's parts, d and V."""

    mean: Tensor
    diagonal: Tensor
    factor: Tensor


class LowRankSite(NamedTuple):
    """Gradient, and X = diag δ + (D^{1/2}U) Fᵀ + F (D^{1/2}U)ᵀ by δ and F, at the state where it was taken."""

    gradient: Tensor
    diagonal: Tensor
    factor: Tensor


class _Basis(NamedTuple):
    """√d, U (P × r) and R (r × r) with D^{-1/2} V = U R."""

    root: Tensor
    span: Tensor
    size: Tensor


@dataclass(frozen=True)
class LowRankGaussian(StructuredGaussian):
    """N(m, (diag(d) + V Vᵀ)⁻¹) over all parameters of a group: correlations between layers at P (r + 2) numbers.

    Weights unconstrained. Where a full Gaussian is too large and a diagonal one too proud.

    Args:
        rank: r, the number of columns of V; at most a quarter of the number of weights is used.

    Example:
        >>> import torch
        >>> from expfam_poco.families import LowRankGaussian
        >>> q = LowRankGaussian(rank=2)
        >>> q.centred_at(torch.zeros(8), 4.0).factor.shape
        torch.Size([8, 2])
    """

    rank: int = 4

    State: ClassVar[type[Any]] = LowRankState
    Site: ClassVar[type[Any]] = LowRankSite
    event_dim: ClassVar[int] = 1
    joint: ClassVar[bool] = True
    domain: ClassVar[Any] = {"diagonal": constraints.positive}
    momentum_block: ClassVar[tuple[str, ...]] = ("gradient",)

    def __post_init__(self) -> None:
        """Refuse a rank below one."""
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r}: give a positive integer.")

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> LowRankState:
        """Mean θ, d = `precision` (1 if None), and a small random V, for V = 0 would never grow in a direction."""
        size, rank = theta.shape[-1], max(1, min(self.rank, theta.shape[-1] // 4))
        strength = torch.as_tensor(1.0 if precision is None else precision, dtype=theta.dtype, device=theta.device)
        seed = NoiseKey(0, stream=SEED_STREAM)
        start = noise("normal", (size, rank), 1, seed, dtype=theta.dtype, device=theta.device)[0]
        factor = SEED_SIZE * strength.sqrt() * start / math.sqrt(size)
        return LowRankState(theta.clone(), strength.expand_as(theta).clone(), factor.expand(*theta.shape, rank).clone())

    # ---- coordinates -----------------------------------------------------------------------------------------------

    def _basis(self, state: Any) -> _Basis:
        root = state.diagonal.sqrt().clamp_min(torch.finfo(state.diagonal.dtype).tiny ** 0.5)  # 0 for a flat prior
        return _Basis(root, *torch.linalg.qr(state.factor / root.unsqueeze(-1)))

    def _power(self, basis: _Basis, vectors: Tensor, exponent: float) -> Tensor:
        """(I + Y Yᵀ)^exponent v, for the vectors K × P."""
        values, axes = torch.linalg.eigh(basis.size @ basis.size.mT)
        span = basis.span @ axes
        change = (1.0 + values.clamp_min(0.0)) ** exponent - 1.0
        return vectors + ((vectors @ span) * change) @ span.mT

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """m + D^{-1/2} (I + Y Yᵀ)^{-1/2} ε."""
        basis = self._basis(state)
        return torch.as_tensor(state.mean + self._power(basis, noise, -0.5) / basis.root)

    def whiten(self, state: Any, noise: Tensor) -> Tensor:
        """S(θ−m) = D^{1/2} (I + Y Yᵀ)^{1/2} ε."""
        basis = self._basis(state)
        return self._power(basis, noise, 0.5) * basis.root

    # ---- tangent vectors -------------------------------------------------------------------------------------------

    def _project(self, state: Any, diagonal: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The tangent vector nearest to diag(h) + f sᵀ + s fᵀ, for h of P and f, s of P × k."""
        basis = self._basis(state)
        span, root = basis.span, basis.root.unsqueeze(-1)
        diagonal, first, second = diagonal / state.diagonal, first / root, second / root
        one, two = (value - span @ (span.mT @ value) for value in (first, second))
        rest = _solve_squares(span, 2.0 * (one * two).sum(-1))  # diag(Π diag(h) Π) = (Π∘Π) h is solved by h
        pulled = first @ (second.mT @ span) + second @ (first.mT @ span) - rest.unsqueeze(-1) * span
        factor = pulled - 0.5 * span @ (span.mT @ pulled)
        return state.diagonal * (diagonal + rest), root * factor

    def project_products(self, first: Tensor, second: Tensor, state: Any) -> tuple[Tensor, ...]:
        """From the pairs as columns."""
        none = torch.zeros_like(state.diagonal)
        return self._project(state, none, first.movedim(0, -1) * (0.5 / len(first)), second.movedim(0, -1))

    def project_curvature(self, curvature: Tensor, state: Any) -> tuple[Tensor, ...]:
        """From H = ½ H Iᵀ + ½ I Hᵀ, dense."""
        eye = torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device).expand_as(curvature)
        return self._project(state, torch.zeros_like(state.diagonal), 0.5 * curvature, eye)

    def carry(self, site: Any, state_from: Any, state_to: Any) -> LowRankSite:
        """The projection of diag δ + (D^{1/2}U) Fᵀ + F (D^{1/2}U)ᵀ at `state_to`."""
        axes = self._axes(state_from)
        return LowRankSite(site.gradient, *self._project(state_to, site.diagonal, axes, site.factor))

    def _axes(self, state: Any) -> Tensor:
        """D^{1/2} U."""
        basis = self._basis(state)
        return basis.root.unsqueeze(-1) * basis.span

    def expand_precision(self, state: Any) -> Tensor:
        """diag(d) + V Vᵀ."""
        return torch.diag_embed(state.diagonal) + state.factor @ state.factor.mT

    def expand_curvature(self, site: Any, state: Any) -> Tensor:
        """diag δ + (D^{1/2}U) Fᵀ + F (D^{1/2}U)ᵀ."""
        half = self._axes(state) @ site.factor.mT
        return torch.diag_embed(site.diagonal) + half + half.mT

    def apply_curvature(self, site: Any, state: Any, vector: Tensor) -> Tensor:
        """X v, by factors."""
        axes, column = self._axes(state), vector.unsqueeze(-1)
        product = axes @ (site.factor.mT @ column) + site.factor @ (axes.mT @ column)
        return site.diagonal * vector + product.squeeze(-1)

    # ---- the rule ----------------------------------------------------------------------------------------------------

    def kl_gradient(self, state: Any, prior: Any) -> LowRankSite:
        """(S₀ (m − m₀), the projection of S₀ − S)."""
        off = state.mean - prior.mean
        gradient = prior.diagonal * off + (prior.factor @ (prior.factor.mT @ off.unsqueeze(-1))).squeeze(-1)
        first = torch.cat([0.5 * prior.factor, -0.5 * state.factor], -1)
        second = torch.cat([prior.factor, state.factor], -1)
        return LowRankSite(gradient, *self._project(state, prior.diagonal - state.diagonal, first, second))

    def retract(
        self,
        state: Any,
        direction: Any,
        rates: Any,
        *,
        variant: str = "second_order",
        clip_radius: float = math.inf,
    ) -> LowRankState:
        """d ← d + η δ (+ ½ η² δ²/d); V Vᵀ + η (…) to its r largest positive parts; m ← m − η clip(S⁻¹ g, ξ).

        To first order in η it is the ambient step; "plain" may leave the domain through d.
        """
        step = rates[1] * direction.diagonal
        diagonal = state.diagonal + step
        if variant == "second_order":
            diagonal = diagonal + 0.5 * step * (step / state.diagonal)
        moved = LowRankState(state.mean, diagonal, self._moved_factor(state, rates[2] * direction.factor))
        slope = self._solve(moved, direction.gradient)
        if clip_radius < math.inf:
            slope = slope.clamp(-clip_radius, clip_radius)
        return moved._replace(mean=state.mean - rates[0] * slope)

    def _moved_factor(self, state: Any, step: Tensor) -> Tensor:
        """V' with V' V'ᵀ nearest, of rank r, to V Vᵀ + (D^{1/2}U) stepᵀ + step (D^{1/2}U)ᵀ, where D is the identity."""
        basis = self._basis(state)
        root, rank = basis.root.unsqueeze(-1), basis.span.shape[-1]
        wide, corner = torch.linalg.qr(torch.cat([basis.span, step / root], -1))
        core = corner[..., :rank] @ (basis.size @ basis.size.mT) @ corner[..., :rank].mT
        cross = corner[..., :rank] @ corner[..., rank:].mT
        values, vectors = torch.linalg.eigh(core + cross + cross.mT)
        largest = vectors[..., -rank:] * values[..., -rank:].clamp_min(0.0).sqrt().unsqueeze(-2)
        return root * (wide @ largest)

    def _solve(self, state: Any, vector: Tensor) -> Tensor:
        """S⁻¹ v."""
        basis = self._basis(state)
        return self._power(basis, (vector / basis.root).unsqueeze(-2), -1.0).squeeze(-2) / basis.root

    def marginal(self, state: Any, start: int, stop: int) -> Any:
        """N(m, S⁻¹) of some entries, by solving for as many columns of S⁻¹."""
        import pyro.distributions as dist

        basis = self._basis(state)
        rows = torch.eye(len(state.mean), dtype=state.mean.dtype, device=state.mean.device)[start:stop]
        covariance = (self._power(basis, rows / basis.root, -1.0) / basis.root)[:, start:stop]
        return dist.MultivariateNormal(state.mean[start:stop], 0.5 * (covariance + covariance.mT))

    # ---- densities ---------------------------------------------------------------------------------------------------

    def log_det(self, state: Any) -> Tensor:
        """Σ log d + log |I + R Rᵀ|."""
        size = self._basis(state).size
        return state.diagonal.log().sum(-1) + torch.linalg.eigvalsh(size @ size.mT).clamp_min(0.0).log1p().sum(-1)

    def quadratic(self, state: Any, vector: Tensor) -> Tensor:
        """Σ d v² + ‖Vᵀ v‖²."""
        return (state.diagonal * vector * vector).sum(-1) + (vector @ state.factor).square().sum(-1)

    def variance(self, state: Any) -> Tensor:
        """(S⁻¹)_ii."""
        basis = self._basis(state)
        values, axes = torch.linalg.eigh(basis.size @ basis.size.mT)
        span = (basis.span @ axes) ** 2 * (values / (1.0 + values)).unsqueeze(-2)
        return torch.as_tensor((1.0 - span.sum(-1)) / state.diagonal)

    def trace_ratio(self, prior: Any, state: Any) -> Tensor:
        """Σ d₀ (S⁻¹)_ii + tr(V₀ᵀ S⁻¹ V₀)."""
        basis = self._basis(state)
        columns = self._power(basis, (prior.factor / basis.root.unsqueeze(-1)).mT, -0.5)
        return (prior.diagonal * self.variance(state)).sum(-1) + columns.square().sum((-2, -1))


def _solve_squares(span: Tensor, target: Tensor) -> Tensor:
    r"""x with (Π ∘ Π) x = target, Π = I − U Uᵀ, with the eigenvalues of Π ∘ Π not below FLOOR.

    Where U comes near an axis e_i (or (e_i ± e_j)/√2, …) the tangent vectors diag x and U Zᵀ + Z Uᵀ become alike:
    diag e_i is almost U Zᵀ + Z Uᵀ with Z = ½ U, and Π ∘ Π almost singular. For a unit eigenvector v of eigenvalue λ,
    λ = vᵀ (Π∘Π) v = ‖Π diag(v) Π‖², so the target's part ⟨v, diag(Π H̃ Π)⟩ = ⟨Π diag(v) Π, H̃⟩ is at most √λ ‖H̃‖, and x
    has a part of ‖H̃‖/√λ, which Z takes back. Their sum is right, but a step of d and of V Vᵀ ≥ 0 by themselves is not:
    d runs away. 1/max(λ, FLOOR) for 1/λ is exact for λ ≥ FLOOR, and leaves a part of ‖H̃‖/√FLOOR at most, which
    falls to 0 with λ: there all is in Z, the least of the solutions. The direction Π diag(v) Π is learnt when U has
    moved on.

    Few weights have their eigenvalues computed, many are solved by conjugate gradients from 0, which leave out the
    directions where the quotient of Rayleigh is below FLOOR.

    In float64: Π ∘ Π squares the small entries of Π.
    """
    dtype, span, target = target.dtype, span.double(), target.double()
    if span.shape[-2] <= FEW:
        eye = torch.eye(span.shape[-2], dtype=span.dtype, device=span.device)
        values, vectors = torch.linalg.eigh((eye - span @ span.mT).square())
        part = (vectors.mT @ target.unsqueeze(-1)).squeeze(-1) / values.clamp_min(FLOOR)
        return (vectors @ part.unsqueeze(-1)).squeeze(-1).to(dtype)
    share = 1.0 - 2.0 * span.square().sum(-1)

    def product(x: Tensor) -> Tensor:
        gram = span.mT @ (x.unsqueeze(-1) * span)
        return share * x + ((span @ gram) * span).sum(-1)

    x = torch.zeros_like(target)
    residual = target
    direction, size = residual, (residual * residual).sum(-1, keepdim=True)
    floor = torch.finfo(torch.float64).eps * size
    for _ in range(min(SOLVES, target.shape[-1])):
        image = product(direction)
        slope = (direction * image).sum(-1, keepdim=True)
        going = (size > floor * 1e-16) & (slope > FLOOR * (direction * direction).sum(-1, keepdim=True))
        length = torch.where(going, size / slope, 0.0)
        x, residual = x + length * direction, residual - length * image
        after = (residual * residual).sum(-1, keepdim=True)
        direction = residual + torch.where(going, after / size, 0.0) * direction
        size = torch.where(going, after, 0.0)
    return x.to(dtype)
