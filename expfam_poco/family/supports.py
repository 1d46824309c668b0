"""What follows from the support alone: a θ in its middle, the shape of a weight, and the mean of the base measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from expfam_poco.family import quadrature
from expfam_poco.family.domains import is_sphere
from expfam_poco.family.noise import NoiseKey

if TYPE_CHECKING:
    from expfam_poco.family.base import ExponentialFamily

DRAWS = 2**14  # for E_q[log h] where there is no quadrature
STREAM = 255  # of their noise


def middle_of(support: Any, like: Tensor, name: str) -> Tensor:
    """A θ in the middle of the support with the shape of `like`; of integers the second, of spheres the last axis.

    Raises:
        NotImplementedError: for a support of which nothing is known; `name` is whose it is.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> from expfam_poco.family.supports import middle_of
        >>> middle_of(constraints.nonnegative_integer, torch.zeros(2), "Mine")
        tensor([1., 1.])
    """
    if is_sphere(support):
        return torch.cat((torch.zeros_like(like[..., 1:]), torch.ones_like(like[..., :1])), -1)
    if quadrature.is_integer(support):
        return torch.full_like(like, support.lower_bound + 1.0)
    if not isinstance(support, constraints.Constraint):
        raise NotImplementedError(
            f"{name}: support={support!r} is no constraint; give one of torch.distributions.constraints, such as "
            "constraints.positive."
        )
    try:
        return torch.as_tensor(transform_to(support)(torch.zeros_like(like)))
    except NotImplementedError:
        raise NotImplementedError(
            f"{name}: torch knows no transform onto support={support}, so its middle is unknown; define "
            "reference_like(like), a θ in the support with the shape of `like`."
        ) from None


def like_theta(family: ExponentialFamily, statistics: Any) -> Tensor:
    """A tensor with the shape of θ, from that of T(θ) or λ."""
    first, dims, event = statistics[0], family.statistic_dims[0], family.event_dim
    batch = first.shape[: first.ndim - dims]
    for value, axes in zip(statistics, family.statistic_dims, strict=True):
        if axes == event:
            return torch.as_tensor(value)
    sizes = (family.support.lengths if isinstance(family.support, constraints.cat) else [])  # fmt: skip
    if event == 0:
        return torch.as_tensor(first.new_zeros(batch))
    if event == 1 and sizes:
        return torch.as_tensor(first.new_zeros(*batch, sum(sizes)))
    if event == 1 and dims == 2:
        return torch.as_tensor(first[..., 0])  # of products θθᵀ
    if event == 2 and dims == 1 and isinstance(family.support, type(constraints.positive_definite)):
        return torch.as_tensor(first.new_zeros(*batch, first.shape[-1], first.shape[-1]))  # of diagonals
    return torch.as_tensor(first)


def expected_log_base_measure(family: ExponentialFamily, state: Any, *, constant: bool) -> Tensor:
    """E_q[log h(θ)] of a family that does not say it; `constant`: h is."""
    nat = family.to_nat(state)
    if constant:
        return family.log_base_measure(family.middle(nat))
    if quadrature.is_known(family):
        return quadrature.expectation(family, nat, family.log_base_measure)
    like = family.middle(nat)
    with torch.no_grad():
        key = NoiseKey(0, stream=STREAM)
        noise = family.noise(like.shape, DRAWS, key, dtype=like.dtype, device=like.device)
        return family.log_base_measure(family.sample(state, noise)).mean(0)
