"""Expectations that do not rest on a family's own sampler: points with weights that represent a member.

All values of a discrete θ, or importance sampling with heavy tails in coordinates where the support is everything,
which are the transforms here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.domains import is_sphere
from expfam_poco.family.noise import NoiseKey, noise

LOST = 1e-3  # the share of proposals at which a density may be no number


class Reference(NamedTuple):
    """Points θ_j (J × P) whose weights (J × batch, log) represent q without drawing from it.

    `exact` if they are all values that θ takes, but for a probability of at most `missing`; else drawn from a proposal.
    `coordinates` are the points where the support is everything (J × batch × size), and `transform` leads from there.
    """

    theta: Tensor
    log_weight: Tensor
    exact: bool
    missing: float = 0.0
    coordinates: Tensor | None = None
    transform: Any = None


class Member(NamedTuple):
    """A member of a family, and the shape, dtype and device of what the family sees."""

    family: ExponentialFamily
    state: Any
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def batch(self) -> torch.Size:
        """One index per weight."""
        return self.shape[: len(self.shape) - self.family.event_dim]


def represent(member: Member, theta: Tensor, key: NoiseKey) -> Reference | None:
    """A member by points that do not come from `family.sample`, or None where that is not possible.

    Args:
        member: which.
        theta: draws of it, K × P, which tell where it lies.
        key: of the proposals.
    """
    event = member.shape[len(member.batch) :]
    axis = 0 if event else None
    values = torch.unique(theta[:300].reshape(-1, *event), dim=axis)
    if len(values) <= 256:
        values = torch.unique(theta.reshape(-1, *event), dim=axis)
    if len(values) <= 256:
        missing = 20.0 * len(values) / len(theta)
        whole = not event and bool((values == values.round()).all())
        if whole and member.family.levels is None and member.family.support.is_discrete:
            return _integers(member, values)
        values = values.reshape(len(values), *(1,) * len(member.batch), *event).expand(-1, *member.shape)
        return Reference(values, member.family.log_prob(member.state, values), exact=True, missing=missing)
    try:
        return _importance(member, theta, key)
    except NotImplementedError:
        return None


def _integers(member: Member, seen: Tensor) -> Reference:
    """All integers of the support within three times the range of the draws; the ends tell what is beyond."""
    low, high = float(seen.min()), float(seen.max())
    reach = min(high - low + 10.0, 1000.0)
    values = torch.arange(low - reach, high + reach + 1.0, dtype=member.dtype, device=member.device)
    values = values[member.family.support.check(values)]
    values = values.reshape(-1, *(1,) * len(member.batch)).expand(-1, *member.shape)
    log_weight = member.family.log_prob(member.state, values)
    # What lies beyond an end is about as likely as the end, unless the support ends there as well.
    beyond = member.family.support.check(torch.stack((values[0] - 1.0, values[-1] + 1.0)))
    ends = torch.where(beyond, torch.stack((log_weight[0], log_weight[-1])).exp(), 0.0)
    return Reference(values, log_weight, exact=True, missing=1e-6 + 100.0 * min(float(ends.max()), 1.0))


def _importance(member: Member, draws: Tensor, key: NoiseKey) -> Reference | None:
    """Proposals x = m + L t with Student's t of 2 degrees, in coordinates where the support is everything."""
    transform = coordinates(member.family.support, draws)
    x = transform.inv(draws[:2000])
    event = x.shape[1 + len(member.batch) :]
    x = x.reshape(*x.shape[: 1 + len(member.batch)], -1)
    if not bool(torch.isfinite(x).all()):
        return None
    size = x.shape[-1]
    centre = x.mean(0)
    covariance = torch.einsum("n...i,n...j->...ij", x - centre, x - centre) / len(x)
    scale, info = torch.linalg.cholesky_ex(covariance)
    if bool(info.any()):
        return None
    u = noise("uniform", (*member.batch, size), len(draws), key, dtype=member.dtype, device=member.device)
    t = (2.0 * u - 1.0) / (2.0 * u * (1.0 - u)).sqrt()
    x = centre + (scale @ t.unsqueeze(-1)).squeeze(-1)
    flat = x
    log_proposal = -1.5 * (2.0 + t * t).log().sum(-1) - scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    x = x.reshape(*x.shape[:-1], *event)
    theta = transform(x)
    jacobian = transform.log_abs_det_jacobian(x, theta)
    jacobian = jacobian.reshape(*x.shape[: 1 + len(member.batch)], -1).sum(-1)
    # Far out in the tails θ may overflow, or round to the edge of the support: such points weigh nothing.
    lead = jacobian.shape
    inside = torch.isfinite(theta).reshape(*lead, -1).all(-1)
    inside = inside & torch.isfinite(transform.inv(theta)).reshape(*lead, -1).all(-1)
    inside = inside & member.family.support.check(theta).reshape(*lead, -1).all(-1)
    theta = torch.where(inside.reshape(*lead, *(1,) * member.family.event_dim), theta, draws[:1])
    log_weight = member.family.log_prob(member.state, theta) + jacobian - log_proposal
    # Some of the proposals furthest out may be matrices so near to singular that log h is no number.
    lost = log_weight.isnan() & inside
    inside = inside & ~(lost & (lost.sum(0) <= LOST * len(lost)))
    log_weight = torch.where(inside, log_weight, -torch.inf)
    return Reference(theta, log_weight, exact=False, coordinates=flat, transform=transform)


def unseen(reference: Reference) -> float:
    """A bound on the probability of values that the reference leaves out."""
    return reference.missing


class LogRatios(Transform):
    """x ↦ softmax(x, 0): the simplex by log ratios, which keeps small entries where stick-breaking rounds them.

    Example:
        >>> import torch
        >>> from expfam_poco.checks.references import LogRatios
        >>> LogRatios()(torch.zeros(3))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    domain = constraints.real_vector
    codomain = constraints.simplex
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 1)).softmax(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return y[..., :-1].log() - y[..., -1:].log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ log y: of the map to all entries but the last."""
        return torch.nn.functional.pad(x, (0, 1)).log_softmax(-1).sum(-1)


class Cholesky(Transform):
    """x ↦ X = L Lᵀ for the lower triangle x of L with logarithms on its diagonal; the measure is Π_{i ≥ j} dX_ij.

    log |∂X/∂x| = d log 2 + Σ_i (d − i + 2) log L_ii, i = 1 … d (Muirhead 1982, Theorem 2.1.9).

    Example:
        >>> import torch
        >>> from expfam_poco.checks.references import Cholesky
        >>> Cholesky()(torch.zeros(3))
        tensor([[1., 0.],
                [0., 1.]])
    """

    domain = constraints.real_vector
    codomain = constraints.positive_definite
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        size = int((math.sqrt(8 * x.shape[-1] + 1) - 1) / 2)
        row, column = torch.tril_indices(size, size, device=x.device)
        place = torch.nn.functional.one_hot(row * size + column, size * size).to(x)
        lower = (x @ place).reshape(*x.shape[:-1], size, size)
        lower = lower.tril(-1) + torch.diag_embed(lower.diagonal(dim1=-2, dim2=-1).exp())
        return lower @ lower.mT

    def _inverse(self, y: Tensor) -> Tensor:
        lower = torch.linalg.cholesky_ex(y).L
        lower = lower.tril(-1) + torch.diag_embed(lower.diagonal(dim1=-2, dim2=-1).log())
        row, column = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        return lower[..., row, column]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the map to the lower triangle of X."""
        size = y.shape[-1]
        row, column = torch.tril_indices(size, size, device=x.device)
        powers = size - torch.arange(size, dtype=x.dtype, device=x.device) + 1.0
        return size * math.log(2.0) + (x[..., row == column] * powers).sum(-1)


class Stereographic(Transform):
    """The sphere in R^n from the plane R^{n−1}, by projection from the point opposite to the draws' mean direction.

    In coordinates in which that direction is the last axis, y = (2x, 1 − |x|²)/(1 + |x|²), and an element of the
    sphere's surface is (2/(1 + |x|²))^{n−1} dx.

    Example:
        >>> import torch
        >>> from expfam_poco.checks.references import Stereographic
        >>> Stereographic(torch.tensor([[0.0, 0.0, 1.0]]))(torch.zeros(2))
        tensor([0., 0., 1.])
    """

    domain = constraints.real_vector
    codomain = constraints.independent(constraints.real, 1)
    bijective = True

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        mean = theta.mean(0)
        mean = mean / mean.square().sum(-1, keepdim=True).sqrt().clamp_min(torch.finfo(theta.dtype).tiny)
        last = torch.zeros_like(mean)
        last[..., -1] = 1.0
        self._axis = last - mean  # of Householder's reflection between the two

    def _turn(self, y: Tensor) -> Tensor:
        size = self._axis.square().sum(-1, keepdim=True)
        along = (self._axis * y).sum(-1, keepdim=True) / torch.where(size > 0.0, size, 1.0)
        return y - 2.0 * along * self._axis

    def _call(self, x: Tensor) -> Tensor:
        square = x.square().sum(-1, keepdim=True)
        return self._turn(torch.cat((2.0 * x, 1.0 - square), -1) / (1.0 + square))

    def _inverse(self, y: Tensor) -> Tensor:
        y = self._turn(y)
        return y[..., :-1] / (1.0 + y[..., -1:])

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the surface against the plane."""
        return x.shape[-1] * (math.log(2.0) - torch.log1p(x.square().sum(-1)))


def coordinates(support: constraints.Constraint, theta: Tensor) -> Any:
    """A bijection from unconstrained numbers onto a support of which `theta` are draws.

    Raises:
        NotImplementedError: where none is known.
    """
    if support is constraints.simplex:
        return LogRatios()
    if isinstance(support, type(constraints.positive_definite)):
        return Cholesky()
    if is_sphere(support):
        return Stereographic(theta)
    return biject_to(support)
