r"""Natural gradients by regression: F(λ) in ∇̃L = F⁻¹ ∇_λ E_q[ℓ] is estimated from the same draws as the gradient.

A loss inside the span of the statistics, ℓ = ⟨c, T⟩ + constant, has the natural gradient c, and any draws that tell the
statistics apart give it exactly: numerator and denominator have the same noise. For other losses it is a quotient of
two means, which tends to the natural gradient with the number of draws K, by a bias of O(1/K).

Source: Salimans and Knowles 2013, *Fixed-form variational posterior approximation through stochastic linear
regression*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family import fields
from expfam_poco.family.derived import _flatten, _unflatten, differentiating

if TYPE_CHECKING:
    from expfam_poco.family.base import ExponentialFamily
    from expfam_poco.family.draws import Draws


@differentiating
def pathwise(family: ExponentialFamily, state: Any, draws: Draws) -> Any:
    r"""From gradients, as a site at `state`: with μ̂(λ) = (1/K) Σ_k T(θ(λ, ε_k)), the draws' mean parameter, c in

        (∂μ̂/∂λ)ᵀ c = (1/K) Σ_k (∂θ_k/∂λ)ᵀ ∇ℓ(θ_k),        E[∂μ̂/∂λ] = ∇²A(λ) = F(λ)

    For ℓ = ⟨c, T⟩ both sides are ∂⟨c, μ̂⟩/∂λ. In float64, since statistics are often nearly collinear.
    """
    nat, noise = fields.map_fields(Tensor.double, family.to_nat(state)), draws.noise.double()

    def drawn(value: Any) -> tuple[Tensor, Any]:
        theta = family.sample(family.from_nat(value), noise)
        return theta, fields.map_fields(lambda field: field.mean(0), family.statistics(theta))

    (theta, mean), pull, *_ = torch.func.vjp(drawn, nat)
    nothing = fields.map_fields(torch.zeros_like, mean)
    (gradient,) = pull((draws.require_grad().double() / len(noise), nothing))
    vector, shapes = _flatten(family, gradient)
    rows = []
    for number in range(vector.shape[-1]):
        unit = torch.zeros_like(vector)
        unit[..., number] = 1.0
        (row,) = pull((torch.zeros_like(theta), type(mean)(*_unflatten(family, unit, shapes))))
        rows.append(_flatten(family, row)[0])
    # The rows ∂μ̂_i/∂λ as columns are the transposed matrix.
    solved = _unflatten(family, torch.linalg.solve(torch.stack(rows, -1), vector), shapes)
    site = family.site_from_nat(family.Site(*solved), state)
    return fields.map_fields(lambda value: value.to(draws.theta.dtype), site)


def score(family: ExponentialFamily, state: Any, draws: Draws) -> Any:
    """From losses, as a site at `state`: Cov(T, T)⁻¹ Cov(T, ℓ), the covariances of the draws, for every weight.

    Directions in which the draws of a discrete weight do not differ get nothing.
    """
    slopes = fitted(family, family.statistics(draws.theta), draws.loss)
    return family.site_from_nat(family.Site(*slopes), state)


def fitted(family: ExponentialFamily, values: Any, targets: Tensor) -> Any:
    """c with ⟨c, T_k⟩ + constant nearest to target_k in squares, for every weight; where draws are alike the least one.

    Args:
        family: whose statistics have the shapes of the values.
        values: T_k, K × batch in every field.
        targets: K numbers.
    """
    rows, shapes = _flatten(family, fields.map_fields(Tensor.double, values))
    rows = rows - rows.mean(0)
    size = rows.square().mean(0).sqrt()
    size = torch.where(size > 0.0, size, 1.0)
    rows = rows / size
    target = (targets - targets.mean()).double().reshape(-1, *(1,) * (rows.ndim - 1))
    matrix = torch.einsum("k...i,k...j->...ij", rows, rows)
    solved = torch.linalg.pinv(matrix, hermitian=True) @ (rows * target).sum(0).unsqueeze(-1)
    slopes = _unflatten(family, solved.squeeze(-1) / size, shapes)
    return fields.map_fields(lambda value: value.to(values[0].dtype), slopes)


def number_of_statistics(family: ExponentialFamily, shape: torch.Size) -> int:
    """k, the statistics of one weight of a tensor of this shape."""
    event = shape[len(shape) - family.event_dim :] if family.event_dim else torch.Size()
    middle = family.reference_like(torch.zeros(event, dtype=torch.float64))
    return int(_flatten(family, family.statistics(middle))[0].shape[-1])


def degrees_of_freedom(family: ExponentialFamily, shape: torch.Size) -> int:
    """The entries of one weight, less one on the simplex, along whose normal a loss has no slope."""
    event = shape[len(shape) - family.event_dim :] if family.event_dim else torch.Size()
    return event.numel() - int(isinstance(family.support, type(constraints.simplex)))
