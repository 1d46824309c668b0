r"""The matrix-normal family: weights W (m × n) with precision S = A ⊗ B, A over rows and B over columns.

    vec W ~ N(vec M, (A ⊗ B)⁻¹),     W = M + L_A⁻ᵀ E L_B⁻¹,     A = L_A L_Aᵀ,  B = L_B L_Bᵀ,  E standard normal

It is curved. A tangent vector of the precision is X = dA ⊗ B + A ⊗ dB, unique with tr(A⁻¹dA)/m = tr(B⁻¹dB)/n = τ/2. The
one nearest to a symmetric H in the Fisher metric ½ tr(S⁻¹ X S⁻¹ Y) follows from the partial traces of
H̃ = L⁻¹ H L⁻ᵀ, L = L_A ⊗ L_B, with τ = tr H̃ / mn:

    dA = L_A (tr_n H̃ / n − τ/2 I) L_Aᵀ,       dB = L_B (tr_m H̃ / m − τ/2 I) L_Bᵀ

For a product H = g wᵀ of matrices G, W they are tr_n H̃ = G̃ W̃ᵀ, tr_m H̃ = G̃ᵀ W̃ with G̃ = L_A⁻¹ G L_B⁻ᵀ: the step
takes O(m³ + n³ + mn(m + n)) operations, as Shampoo's or K-FAC's, and mn + m² + n² numbers of state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from einops import einsum
from torch import Tensor

from expfam_poco.family.base import ExponentialFamily

from .factors import cholesky, positive_definite
from .gaussian import DiagonalGaussian
from .structured import StructuredGaussian

ROUNDING = 16.0  # units of rounding of the trace: by this eigenvalues are raised where a pivot has fallen below it


class KroneckerState(NamedTuple):
    """Mean M (of the weight's shape) and the precision's factors, A (m × m) over rows and B (n × n) over columns."""

    mean: Tensor
    rows: Tensor
    columns: Tensor


class KroneckerSite(NamedTuple):
    """Gradient (of the weight's shape), and X = dA ⊗ B + A ⊗ dB by dA and dB, at the state where it was taken."""

    gradient: Tensor
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class KroneckerGaussian(StructuredGaussian):
    """N(M, (A ⊗ B)⁻¹) over whole weight tensors: a Shampoo- or K-FAC-like posterior, one for every parameter.

    In an optimizer each parameter is one matrix: its first axis are the rows, the others together the columns (a
    convolution's m is its output channels). Biases and other vectors, and what is longer than `largest` in a
    direction (embeddings), get a `DiagonalGaussian`. Weights unconstrained.

    Args:
        axes: how many trailing axes make one weight where it is used by itself; the optimizer sets it.
        largest: the longest side of a matrix that gets factors of its own.

    Example:
        >>> import torch
        >>> from expfam_poco.families import KroneckerGaussian
        >>> q = KroneckerGaussian()
        >>> state = q.centred_at(torch.zeros(2, 3), 4.0)
        >>> q.sample(state, torch.ones(1, 2, 3))[0, 0]
        tensor([0.5000, 0.5000, 0.5000])
    """

    axes: int = 2
    largest: int = 4096

    State: ClassVar[type[Any]] = KroneckerState
    Site: ClassVar[type[Any]] = KroneckerSite
    domain: ClassVar[Any] = {"rows": positive_definite, "columns": positive_definite}
    momentum_block: ClassVar[tuple[str, ...]] = ("gradient",)

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        """`axes`."""
        return self.axes

    def __post_init__(self) -> None:
        """Refuse numbers of axes or sides below one."""
        for name, value, least in (("axes", self.axes, 2), ("largest", self.largest, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: give an integer, {least} or larger.")

    def for_shape(self, shape: torch.Size) -> ExponentialFamily:
        """The family whose weight is a whole parameter of this shape; a `DiagonalGaussian` for vectors and giants."""
        if len(shape) < 2 or max(shape[0], shape[1:].numel()) > self.largest:
            return DiagonalGaussian()
        return self if self.axes == len(shape) else replace(self, axes=len(shape))

    # ---- matrices ----------------------------------------------------------------------------------------------

    def _matrix(self, theta: Tensor) -> Tensor:
        """The weight as rows × columns."""
        return theta.flatten(theta.ndim - self.axes + 1)

    def _white(self, state: Any, matrix: Tensor) -> Tensor:
        """G̃ = L_A⁻¹ G L_B⁻ᵀ."""
        left = torch.linalg.solve_triangular(_broadcast(cholesky(state.rows), matrix), matrix, upper=False)
        right = torch.linalg.solve_triangular(_broadcast(cholesky(state.columns), matrix), left.mT, upper=False)
        return right.mT

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> KroneckerState:
        """Mean θ, A = √s I, B = √s I for `precision` s (1 if None)."""
        matrix = self._matrix(theta)
        root = torch.as_tensor(1.0 if precision is None else precision, dtype=theta.dtype, device=theta.device).sqrt()
        eyes = [torch.eye(size, dtype=theta.dtype, device=theta.device) for size in matrix.shape[-2:]]
        rows, columns = ((root * eye).expand(*matrix.shape[:-2], *eye.shape).clone() for eye in eyes)
        return KroneckerState(theta.clone(), rows, columns)

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """M + L_A⁻ᵀ E L_B⁻¹."""
        matrix = self._matrix(noise)
        left = torch.linalg.solve_triangular(_broadcast(cholesky(state.rows), matrix).mT, matrix, upper=True)
        right = torch.linalg.solve_triangular(_broadcast(cholesky(state.columns), matrix).mT, left.mT, upper=True)
        return torch.as_tensor(state.mean + right.mT.reshape(noise.shape))

    def whiten(self, state: Any, noise: Tensor) -> Tensor:
        """S(θ−m) = L_A E L_Bᵀ."""
        return (cholesky(state.rows) @ self._matrix(noise) @ cholesky(state.columns).mT).reshape(noise.shape)

    # ---- tangent vectors -----------------------------------------------------------------------------------------

    def _tangent(self, state: Any, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(dA, dB) from the partial traces tr_n H̃ (m × m) and tr_m H̃ (n × n), made symmetric."""
        factors = []
        half = 0.5 * _trace(rows) / (rows.shape[-1] * columns.shape[-1])
        for factor, traced, other in ((state.rows, rows, columns), (state.columns, columns, rows)):
            part = 0.5 * (traced + traced.mT) / other.shape[-1]
            lower = cholesky(factor)
            dressed = lower @ part @ lower.mT
            factors.append(0.5 * (dressed + dressed.mT) - half[..., None, None] * factor)
        return factors[0], factors[1]

    def project_products(self, first: Tensor, second: Tensor, state: Any) -> tuple[Tensor, ...]:
        """From tr_n H̃ = G̃ W̃ᵀ and tr_m H̃ = G̃ᵀ W̃, averaged over the pairs."""
        one, two = (self._white(state, self._matrix(value)) for value in (first, second))
        rows = einsum(one, two, "k ... i c, k ... j c -> ... i j") / len(one)
        columns = einsum(one, two, "k ... r i, k ... r j -> ... i j") / len(one)
        return self._tangent(state, rows, columns)

    def project_curvature(self, curvature: Tensor, state: Any) -> tuple[Tensor, ...]:
        """From the partial traces of L⁻¹ H L⁻ᵀ, dense."""
        m, n = state.rows.shape[-1], state.columns.shape[-1]
        lower = _kron(cholesky(state.rows), cholesky(state.columns))
        half = torch.linalg.solve_triangular(lower, curvature, upper=False)
        white = torch.linalg.solve_triangular(lower, half.mT, upper=False).unflatten(-1, (m, n)).unflatten(-3, (m, n))
        rows = white.diagonal(dim1=-3, dim2=-1).sum(-1)
        columns = white.diagonal(dim1=-4, dim2=-2).sum(-1)
        return self._tangent(state, rows, columns)

    def expand_precision(self, state: Any) -> Tensor:
        """A ⊗ B."""
        return _kron(state.rows, state.columns)

    def expand_curvature(self, site: Any, state: Any) -> Tensor:
        """dA ⊗ B + A ⊗ dB."""
        return _kron(site.rows, state.columns) + _kron(state.rows, site.columns)

    def apply_curvature(self, site: Any, state: Any, vector: Tensor) -> Tensor:
        """dA V B + A V dB."""
        matrix = self._matrix(vector)
        product = site.rows @ matrix @ state.columns + state.rows @ matrix @ site.columns
        return product.reshape(vector.shape)

    def carry(self, site: Any, state_from: Any, state_to: Any) -> KroneckerSite:
        """The projection of dA ⊗ B + A ⊗ dB at `state_to`, from products of factors: nothing dense."""
        parts = [
            self._project_kron(a, b, state_to)
            for a, b in ((site.rows, state_from.columns), (state_from.rows, site.columns))
        ]
        return KroneckerSite(site.gradient, parts[0][0] + parts[1][0], parts[0][1] + parts[1][1])

    def _project_kron(self, rows: Tensor, columns: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        """The tangent vector nearest to P ⊗ Q: with p = tr A⁻¹P, q = tr B⁻¹Q it has dA = q/n P − pq/2mn A, … ."""
        m, n = state.rows.shape[-1], state.columns.shape[-1]
        p, q = (_trace_of_solution(*pair)[..., None, None] for pair in ((state.rows, rows), (state.columns, columns)))
        half = 0.5 * p * q / (m * n)
        return (q / n) * rows - half * state.rows, (p / m) * columns - half * state.columns

    # ---- the rule ------------------------------------------------------------------------------------------------

    def kl_gradient(self, state: Any, prior: Any) -> KroneckerSite:
        """(A₀ (M − M₀) B₀, the projection of S₀ − S); S itself is tangent, with dA = A/2 and dB = B/2."""
        gradient = prior.rows @ self._matrix(state.mean - prior.mean) @ prior.columns
        rows, columns = self._project_kron(prior.rows, prior.columns, state)
        return KroneckerSite(gradient.reshape(state.mean.shape), rows - 0.5 * state.rows, columns - 0.5 * state.columns)

    def retract(
        self,
        state: Any,
        direction: Any,
        rates: Any,
        *,
        variant: str = "second_order",
        clip_radius: float = math.inf,
    ) -> KroneckerState:
        """A ← A + η dA (+ ½ η² dA A⁻¹ dA), B alike, then M ← M − η clip(A⁻¹ D B⁻¹, ξ); A and B kept of equal size.

        Both variants are the ambient step to first order in η; "second_order" keeps the factors positive definite.
        """
        moved = [
            _moved(factor, rate * change, variant)
            for factor, change, rate in zip(state[1:], direction[1:], rates[1:], strict=True)
        ]
        rows, columns = _balanced(*moved)
        slope = torch.cholesky_solve(self._matrix(direction.gradient), cholesky(rows))
        slope = torch.cholesky_solve(slope.mT, cholesky(columns)).mT.reshape(state.mean.shape)
        if clip_radius < math.inf:
            slope = slope.clamp(-clip_radius, clip_radius)
        return KroneckerState(state.mean - rates[0] * slope, rows, columns)

    # ---- densities -----------------------------------------------------------------------------------------------

    def log_det(self, state: Any) -> Tensor:
        """n log |A| + m log |B|."""
        m, n = state.rows.shape[-1], state.columns.shape[-1]
        return n * _log_det(state.rows) + m * _log_det(state.columns)

    def quadratic(self, state: Any, vector: Tensor) -> Tensor:
        """‖L_Aᵀ V L_B‖²."""
        root = cholesky(state.rows).mT @ self._matrix(vector) @ cholesky(state.columns)
        return root.square().sum((-2, -1))

    def variance(self, state: Any) -> Tensor:
        """(A⁻¹)_ii (B⁻¹)_jj."""
        rows, columns = (
            torch.cholesky_inverse(cholesky(factor)).diagonal(dim1=-2, dim2=-1)
            for factor in (state.rows, state.columns)
        )
        return (rows.unsqueeze(-1) * columns.unsqueeze(-2)).reshape(state.mean.shape)

    def trace_ratio(self, prior: Any, state: Any) -> Tensor:
        """tr(A₀A⁻¹) tr(B₀B⁻¹)."""
        return _trace_of_solution(state.rows, prior.rows) * _trace_of_solution(state.columns, prior.columns)


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """Batched Kronecker products."""
    product = first[..., :, None, :, None] * second[..., None, :, None, :]
    return product.flatten(-2).flatten(-3, -2)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _log_det(matrix: Tensor) -> Tensor:
    return 2.0 * cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _trace_of_solution(matrix: Tensor, other: Tensor) -> Tensor:
    """tr(matrix⁻¹ other)."""
    return _trace(torch.cholesky_solve(other.expand_as(matrix), cholesky(matrix)))


def _broadcast(factor: Tensor, like: Tensor) -> Tensor:
    """A factor for each of the draws in front."""
    return factor.expand(*like.shape[:-2], *factor.shape[-2:])


def _moved(factor: Tensor, step: Tensor, variant: str) -> Tensor:
    """F + D, or F + D + ½ D F⁻¹ D, which is positive definite; exactly symmetric."""
    moved = factor + step
    if variant == "second_order":
        half = torch.linalg.solve_triangular(cholesky(factor), step, upper=False)
        moved = moved + 0.5 * half.mT @ half
    moved = 0.5 * (moved + moved.mT)
    if variant == "second_order":  # definite but for rounding: where that wins, it is undone
        floor = ROUNDING * torch.finfo(moved.dtype).eps * _trace(moved)
        pivot = cholesky(moved).diagonal(dim1=-2, dim2=-1).square().amin(-1)  # NaN where it is indefinite
        floor = torch.where(pivot > floor, 0.0, floor)
        moved = moved + torch.diag_embed(floor.unsqueeze(-1).expand(moved.shape[:-1]))
    return moved


def _balanced(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """cA and B/c with equal mean diagonals: A ⊗ B does not know how its scale is shared."""
    sizes = [_trace(factor).abs() / factor.shape[-1] for factor in (rows, columns)]
    scale = (sizes[1] / sizes[0]).sqrt()[..., None, None]
    return rows * scale, columns / scale
