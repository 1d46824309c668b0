r"""Wishart matrices: positive definite θ, d × d, with density ∝ |θ|^{a − (d+1)/2} exp(−tr Bθ), a > (d − 1)/2.

(n = 2a degrees of freedom, scale V = (2B)⁻¹.) With the base measure h = |θ|^{−(d+1)/2}, the invariant one, the
statistics are T = (−θ_ii, −2θ_ij for i < j, log|θ|) and λ = (B_ii, B_ij, a): λ = 0 pulls nowhere. With the Γ_d of
several variables

    A(λ) = log Γ_d(a) − a log|B|,      E[θ] = a B⁻¹,      E[log|θ|] = Σ_i ψ(a − i/2) − log|B|,  i = 0 … d − 1

It is kept as (B, a − (d − 1)/2), which are positive definite and positive. A draw is Bartlett's, θ = L⁻ᵀ C Cᵀ L⁻¹ with
B = L Lᵀ, C lower triangular with normal numbers of variance ½ below its diagonal, and C_ii² ~ Γ(a − i/2). The loss of a
datum y ~ N(0, θ⁻¹) is linear in T: ½ yᵀθy − ½ log|θ|.
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

from .positive.gamma_functions import from_zero, standard_draw


class WishartStatistics(NamedTuple):
    """T: minus the diagonal, minus twice what is above it, and the logarithm of the determinant."""

    diagonal: Tensor
    off: Tensor
    logdet: Tensor


class WishartState(NamedTuple):
    """The chart: the rate B, and by how much a exceeds (d − 1)/2."""

    rate: Tensor
    excess: Tensor


@dataclass(frozen=True)
class Wishart(ExponentialFamily):
    """Positive definite matrices, the last two axes of a parameter: precision matrices, metrics, kernels.

    The model holds the mean a B⁻¹. A member of precision p has a = p + (d − 1)/2, precision 0 is λ = 0.

    Args:
        strength: the precision of the first posterior, where the optimizer gives none.

    Raises:
        ValueError: for a strength that is not positive and finite.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Wishart
        >>> q = Wishart()
        >>> q.point(q.centred_at(2.0 * torch.eye(2))).round(decimals=4)
        tensor([[2., 0.],
                [0., 2.]])
    """

    strength: float = 10.0

    Statistics: ClassVar[type[Any]] = WishartStatistics
    State: ClassVar[type[Any]] = WishartState
    event_dim: ClassVar[int] = 2
    statistic_dims: ClassVar[tuple[int, ...]] = (1, 1, 0)
    support: ClassVar[constraints.Constraint] = constraints.positive_definite
    domain: ClassVar[Any] = {"rate": constraints.positive_definite, "excess": constraints.positive}

    def __post_init__(self) -> None:
        """Refuse a strength out of range."""
        positive("strength", self.strength)

    def statistics(self, theta: Tensor) -> WishartStatistics:
        """(−θ_ii, −2θ_ij, log|θ|)."""
        return WishartStatistics(-theta.diagonal(dim1=-2, dim2=-1), -2.0 * _above(theta), _log_det(theta))

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """−½ (d + 1) log|θ|."""
        return -0.5 * (theta.shape[-1] + 1.0) * _log_det(theta)

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """By E[log|θ|]."""
        return -0.5 * (state.rate.shape[-1] + 1.0) * self._mean_log_det(state)

    def _mean_log_det(self, state: Any) -> Tensor:
        """Σ_i ψ(a − i/2) − log|B|."""
        return torch.digamma(_shapes(state)).sum(-1) - _log_det(state.rate)

    def to_nat(self, state: Any) -> WishartStatistics:
        """(B_ii, B_ij, a)."""
        shape = state.excess + 0.5 * (state.rate.shape[-1] - 1.0)
        return WishartStatistics(state.rate.diagonal(dim1=-2, dim2=-1), _above(state.rate), shape)

    def from_nat(self, nat: Any) -> WishartState:
        """(B, a − (d − 1)/2)."""
        return WishartState(_matrix(nat.diagonal, nat.off), nat.logdet - 0.5 * (nat.diagonal.shape[-1] - 1.0))

    def log_partition(self, nat: Any) -> Tensor:
        """log Γ_d(a) − a log|B|."""
        state = self.from_nat(nat)
        d = nat.diagonal.shape[-1]
        gamma = torch.lgamma(_shapes(state)).sum(-1) + 0.25 * d * (d - 1.0) * math.log(math.pi)
        return gamma - nat.logdet * _log_det(state.rate)

    def to_mean(self, nat: Any) -> WishartStatistics:
        """(−E θ_ii, −2 E θ_ij, E log|θ|)."""
        state = self.from_nat(nat)
        mean = self.point(state)
        return WishartStatistics(-mean.diagonal(dim1=-2, dim2=-1), -2.0 * _above(mean), self._mean_log_det(state))

    def to_natural(self, mean: Any) -> WishartStatistics:
        """a from log|E θ| − E log|θ| = Σ (log a − ψ(a − i/2)), by Newton's method on log(a − (d − 1)/2); B = a E[θ]⁻¹.

        Raises:
            ValueError: unless E[θ] is positive definite and log|E θ| > E log|θ|.
        """
        centre = _matrix(-mean.diagonal, -0.5 * mean.off).double()
        d = centre.shape[-1]
        root, fault = torch.linalg.cholesky_ex(centre)
        gap = 2.0 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - mean.logdet.double()
        if bool(fault.any()) or not bool((gap > 0.0).all()):
            raise ValueError("mean: E[θ] must be positive definite, and E[log|θ|] smaller than log|E[θ]|.")
        steps = 0.5 * torch.arange(d, dtype=torch.float64, device=gap.device)
        low = 0.5 * (d - 1.0)
        z = torch.log(0.25 * d * (d + 1.0) / gap)
        for _ in range(60):
            a = low + z.exp()
            each = a.unsqueeze(-1) - steps
            value = d * a.log() - torch.digamma(each).sum(-1) - gap
            slope = (d / a - torch.polygamma(1, each).sum(-1)) * (a - low)
            z = z - (value / slope).clamp(-1.0, 1.0)
        rate = (low + z.exp())[..., None, None] * _inverse(centre)
        dtype = mean.logdet.dtype
        return self.to_nat(WishartState(rate.to(dtype), z.exp().to(dtype)))

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """Bartlett's decomposition; Gamma quantiles of the normal numbers on the diagonal."""
        shapes = _shapes(state)
        below = torch.special.ndtr(noise.diagonal(dim1=-2, dim2=-1).double())
        draw = standard_draw(shapes, below, slope=state.excess.requires_grad)
        log = 0.5 * (draw.ratio + shapes.detach().double().log())
        diagonal = log.exp().to(noise.dtype).clamp_min(torch.finfo(noise.dtype).tiny ** 0.5)
        if draw.slope is not None:
            along = 0.5 * (draw.slope + 1.0 / shapes.detach().double())
            diagonal = diagonal * (1.0 + along.to(noise.dtype) * from_zero(shapes))
        bartlett = noise.tril(-1) / math.sqrt(2.0) + torch.diag_embed(diagonal)
        upper = torch.linalg.cholesky_ex(state.rate).L.mT
        root = torch.linalg.solve_triangular(upper, bartlett, upper=True)
        square = root @ root.mT
        ridge = 8.0 * noise.shape[-1] * torch.finfo(noise.dtype).eps  # rounding must not make it singular
        return square + torch.diag_embed(ridge * square.diagonal(dim1=-2, dim2=-1))

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> WishartState:
        """The mean θ, with a = `precision` + (d − 1)/2; λ = 0 at precision 0.

        Raises:
            ValueError: unless the last two axes are square.
        """
        if theta.shape[-1] != theta.shape[-2]:
            raise ValueError(f"params: Wishart is about square matrices, the last two axes, not {tuple(theta.shape)}.")
        low = 0.5 * (theta.shape[-1] - 1.0)
        size = torch.ones_like(theta[..., 0, 0]) * (self.strength if precision is None else precision)
        shape = torch.where(size > 0.0, size + low, 0.0)
        inverse = _inverse(theta)
        return WishartState(shape[..., None, None] * inverse, shape - low)

    def recentre(self, state: Any, theta: Tensor) -> WishartState:
        """The mean θ, a kept."""
        inverse = _inverse(theta)
        shape = state.excess + 0.5 * (theta.shape[-1] - 1.0)
        return WishartState(shape[..., None, None] * inverse, state.excess)

    def point(self, state: Any) -> Tensor:
        """a B⁻¹."""
        shape = state.excess + 0.5 * (state.rate.shape[-1] - 1.0)
        return shape[..., None, None] * _inverse(state.rate)

    def expectation(self, state: Any) -> Tensor:
        """a B⁻¹."""
        return self.point(state)

    def variance(self, state: Any) -> Tensor:
        """½ a (S_ij² + S_ii S_jj) with S = B⁻¹."""
        inverse = _inverse(state.rate)
        diagonal = inverse.diagonal(dim1=-2, dim2=-1)
        shape = state.excess + 0.5 * (state.rate.shape[-1] - 1.0)
        return 0.5 * shape[..., None, None] * (inverse.square() + diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2))

    def mode(self, state: Any) -> Tensor:
        """(a − (d + 1)/2) B⁻¹; 0 where that is none."""
        return (state.excess - 1.0).clamp_min(0.0)[..., None, None] * _inverse(state.rate)


def _shapes(state: Any) -> Tensor:
    """a − i/2 for i = 0 … d − 1, along the last axis."""
    d = state.rate.shape[-1]
    steps = 0.5 * torch.arange(d - 1, -1, -1, dtype=state.excess.dtype, device=state.excess.device)
    return state.excess.unsqueeze(-1) + steps


def _log_det(matrix: Tensor) -> Tensor:
    return 2.0 * torch.linalg.cholesky_ex(matrix).L.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _inverse(matrix: Tensor) -> Tensor:
    """L⁻ᵀ L⁻¹; without an exception where rounding has made the matrix singular, which is then not finite."""
    root = torch.linalg.cholesky_ex(matrix).L
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    half = torch.linalg.solve_triangular(root, eye.expand_as(matrix), upper=False)
    return half.mT @ half


def _above(matrix: Tensor) -> Tensor:
    """The entries above the diagonal, row by row."""
    row, column = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], 1, device=matrix.device)
    return matrix[..., row, column]


def _matrix(diagonal: Tensor, off: Tensor) -> Tensor:
    """The symmetric matrix with this diagonal and these entries above it."""
    d = diagonal.shape[-1]
    row, column = torch.triu_indices(d, d, 1, device=diagonal.device)
    place = torch.nn.functional.one_hot(row * d + column, d * d) + torch.nn.functional.one_hot(column * d + row, d * d)
    return torch.diag_embed(diagonal) + (off @ place.to(off)).unflatten(-1, (d, d))
