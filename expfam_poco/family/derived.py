"""What the engine derives for a family from its log-partition function and a differentiable sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family import fields

if TYPE_CHECKING:
    from expfam_poco.family.base import ExponentialFamily
    from expfam_poco.family.draws import Draws


def fisher(family: ExponentialFamily, nat: Any) -> Tensor:
    """F(λ) = ∇²A(λ) as one k × k block per weight (batch × k × k), k the number of statistics' entries.

    Computed by differentiating `log_partition` twice; blocks of different weights do not interact.
    """
    flat, shapes = _flatten(family, nat)

    def log_partition(vector: Tensor) -> Tensor:
        return family.log_partition(_unflatten(family, vector, shapes)).sum()

    gradient = torch.func.grad(log_partition)
    rows = torch.func.vmap(torch.func.jacrev(gradient))(flat.reshape(-1, flat.shape[-1]))
    return rows.reshape(*flat.shape, flat.shape[-1])


def fisher_solve(family: ExponentialFamily, nat: Any, gradient: Any) -> Any:
    """F(λ)⁻¹ g: a gradient in λ becomes a natural gradient (PC Eq. 5). A division when k = 1."""
    vector, shapes = _flatten(family, gradient)
    matrix = fisher(family, nat)
    if vector.shape[-1] == 1:
        solved = vector / matrix[..., 0]
    else:
        solved = torch.linalg.solve(matrix, vector)
    return _unflatten(family, solved, shapes)


def pathwise_natural_gradient(family: ExponentialFamily, state: Any, draws: Draws) -> Any:
    """F(λ)⁻¹ (1/K) Σ_k (∂θ_k/∂λ)ᵀ ∇ℓ(θ_k) with θ_k = sample(λ, ε_k), as a site at `state`."""
    nat = family.to_nat(state)
    _, pullback, *_ = torch.func.vjp(lambda value: family.sample(family.from_nat(value), draws.noise), nat)
    (gradient,) = pullback(draws.require_grad() / draws.noise.shape[0])
    return family.site_from_nat(family.Site(*family.fisher_solve(nat, gradient)), state)


def leave_one_out(loss: Tensor) -> Tensor:
    """ℓ_k − mean_{j≠k} ℓ_j for every one of K ≥ 2 draws; they sum to zero."""
    count = loss.shape[0]
    return (loss - loss.mean()) * (count / (count - 1))


def score_natural_gradient(family: ExponentialFamily, state: Any, draws: Draws) -> Any:
    """F(λ)⁻¹ (1/K) Σ_k (ℓ_k − mean_{j≠k} ℓ_j) (T(θ_k) − μ): unbiased, needs losses only and K ≥ 2."""
    advantage = leave_one_out(draws.loss)
    nat = family.to_nat(state)

    def average(value: Tensor) -> Tensor:
        weights = advantage.to(value.dtype).reshape(-1, *(1,) * (value.ndim - 1))
        return (weights * value).mean(0)

    gradient = family.Nat(*fields.map_fields(average, family.score(state, draws.theta)))
    return family.site_from_nat(family.Site(*family.fisher_solve(nat, gradient)), state)


def bounded_step(value: Tensor, step: Tensor, bound: constraints.Constraint, *, plain: bool) -> Tensor:
    """`value + step`, or for a one-sided bound and not `plain` the second-order step that keeps to its side.

    With slack s = |value − bound| > 0 and inward displacement d: s + d + d²/(2s) ≥ s/2 > 0 for every d.
    """
    lower = getattr(bound, "lower_bound", None)
    upper = getattr(bound, "upper_bound", None)
    if plain or (lower is None) == (upper is None):
        return value + step
    edge: Any = lower if lower is not None else upper
    return value + step + 0.5 * step * step / (value - edge)


def invert_mean(family: ExponentialFamily, mean: Any, *, iterations: int = 200, tolerance: float | None = None) -> Any:
    """Solve ∇A(λ) = μ for all weights at once: Newton steps on the concave ⟨λ, μ⟩ − A(λ), halved until they rise.

    Raises:
        ValueError: if some weight has not converged, which means that its μ is outside the mean domain.
    """
    target, shapes = _flatten(family, mean)
    tolerance = tolerance or 200.0 * torch.finfo(target.dtype).eps
    start = family.centred_at(family.middle(mean))
    current, _ = _flatten(family, family.to_nat(start))
    for _ in range(iterations):
        residual = target - _flatten(family, family.to_mean(_unflatten(family, current, shapes)))[0]
        if bool((residual.abs() <= tolerance * (1.0 + target.abs())).all()):
            return _unflatten(family, current, shapes)
        matrix = fisher(family, _unflatten(family, current, shapes))
        step, fault = torch.linalg.solve_ex(matrix, residual)
        if bool(fault.any()):
            break
        current = _ascend(family, current, step, target, shapes)
    raise ValueError(
        f"mean: no natural parameter of {type(family).__name__} was found with this expectation "
        f"(largest remaining error {float(residual.abs().max()):.3g}); give a mean inside the mean domain."
    )


def _ascend(family: ExponentialFamily, current: Tensor, step: Tensor, target: Tensor, shapes: Any) -> Tensor:
    """Per weight, the longest of the halved steps that stays in the domain and does not lower the dual."""

    def dual(vector: Tensor) -> tuple[Tensor, Tensor]:
        linear = vector * target
        partition = family.log_partition(_unflatten(family, vector, shapes)).reshape(linear.shape[:-1])
        value = linear.sum(-1) - partition
        inside = _inside(family, _unflatten(family, vector, shapes)).reshape(value.shape)
        size = linear.abs().sum(-1) + partition.abs()
        return torch.where(inside & torch.isfinite(value), value, value.new_full((), -torch.inf)), size

    best, size = dual(current)
    slack = 4.0 * torch.finfo(best.dtype).eps * size  # of the terms: their sum may be near zero
    length = torch.ones_like(best)
    for _ in range(60):
        worse = dual(current + length.unsqueeze(-1) * step)[0] < best - slack
        if not bool(worse.any()):
            break
        length = torch.where(worse, 0.5 * length, length)
    return current + length.unsqueeze(-1) * step


def _inside(family: ExponentialFamily, nat: Any) -> Tensor:
    """Per weight: the fields satisfy the declared constraints."""
    inside: Tensor | None = None
    for name, value, dims in zip(nat._fields, nat, family.statistic_dims, strict=True):
        ok = family.domain.get(name, constraints.real).check(value)
        ok = ok.flatten(-dims).all(-1) if dims and ok.ndim == value.ndim else ok
        inside = ok if inside is None else inside & ok
    assert inside is not None
    return inside


def _flatten(family: ExponentialFamily, values: Any) -> tuple[Tensor, list[torch.Size]]:
    """The fields of one weight side by side (batch × k), and the shapes to undo it."""
    parts, shapes = [], []
    for value, dims in zip(values, family.statistic_dims, strict=True):
        batch, event = value.shape[: value.ndim - dims], value.shape[value.ndim - dims :]
        parts.append(value.reshape(*batch, -1))
        shapes.append(event)
    return torch.cat(parts, -1), shapes


def _unflatten(family: ExponentialFamily, vector: Tensor, shapes: list[torch.Size]) -> Any:
    """The inverse of `_flatten`."""
    parts = vector.split([max(1, shape.numel()) for shape in shapes], -1)
    return family.Nat(*(part.reshape((*vector.shape[:-1], *shape)) for part, shape in zip(parts, shapes, strict=True)))
