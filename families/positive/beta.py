r"""The Beta family of weights in (0, 1):  q(θ) = θ^{a−1} (1−θ)^{b−1} / B(a, b).

With the base measure h(θ) = 1/(θ(1−θ)) T(θ) = (log θ, log(1−θ)) and λ = (a, b), A(λ) = log B(a, b),
μ = (ψ(a) − ψ(a+b), ψ(b) − ψ(a+b)): the Dirichlet family of (θ, 1−θ).

A draw is θ = σ(y₁ − y₂) from the logarithms of two Gamma draws of shapes a and b, so an entry takes two uniforms. It
stays a float's width from 0 and 1; where it had to be kept there, its logit moves on with λ all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.arguments import positive
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Draws

from .dirichlet import (
    dirichlet_divergence,
    dirichlet_entropy,
    expected_logs,
    log_normaliser,
    pathwise,
    shape_slack,
    shapes_of,
    solved,
)
from .gamma_functions import from_zero, standard_draw


class BetaStatistics(NamedTuple):
    """T(θ) = (log θ, log(1−θ)); as natural parameters: the shapes a and b.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.beta import BetaStatistics
        >>> BetaStatistics(torch.tensor(2.0), torch.tensor(6.0)).log_rest
        tensor(6.)
    """

    log: Tensor
    log_rest: Tensor


def _together(pair: Any) -> Tensor:
    """(a, b) along a last axis, in float64."""
    return torch.stack(tuple(pair), -1).double()


def _apart(values: Tensor, dtype: torch.dtype) -> BetaStatistics:
    return BetaStatistics(*values.to(dtype).unbind(-1))


@dataclass(frozen=True)
class Beta(ExponentialFamily):
    """Weights in (0, 1) with a Beta posterior: gates, probabilities, mixing rates.

    The model holds the mean a/(a+b). A prior of precision p is symmetric with a + b = p (2: uniform); precision 0 is
    the improper prior 1/(θ(1−θ)), which pulls nowhere.

    Args:
        concentration: a + b of the first posterior, where the optimizer gives no precision.

    Raises:
        ValueError: for a concentration that is not positive and finite.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Beta
        >>> q = Beta()
        >>> q.point(q.centred_at(torch.tensor([0.2, 0.5])))
        tensor([0.2000, 0.5000])
    """

    concentration: float = 100.0

    Statistics: ClassVar[type[Any]] = BetaStatistics
    support: ClassVar[constraints.Constraint] = constraints.unit_interval
    domain: ClassVar[Any] = {"log": constraints.positive, "log_rest": constraints.positive}
    noise_kind: ClassVar[str] = "uniform"
    noise_dims: ClassVar[tuple[int, ...]] = (2,)

    def __post_init__(self) -> None:
        """Refuse a concentration out of range."""
        positive("concentration", self.concentration)

    def statistics(self, theta: Tensor) -> BetaStatistics:
        """(log θ, log(1−θ))."""
        return BetaStatistics(theta.log(), torch.log1p(-theta))

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """−log θ − log(1−θ)."""
        return -theta.log() - torch.log1p(-theta)

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """−E[log θ] − E[log(1−θ)]."""
        mean = self.to_mean(state)
        return -mean.log - mean.log_rest

    def log_partition(self, nat: Any) -> Tensor:
        """log Γ(a) + log Γ(b) − log Γ(a+b)."""
        return log_normaliser(_together(nat)).to(nat.log.dtype)

    def to_mean(self, nat: Any) -> BetaStatistics:
        """(ψ(a) − ψ(a+b), ψ(b) − ψ(a+b))."""
        return _apart(expected_logs(_together(nat)), nat.log.dtype)

    def to_natural(self, mean: Any) -> BetaStatistics:
        """The shapes, by Newton's method.

        Raises:
            ValueError: for expectations that no weights in (0, 1) have.
        """
        return _apart(shapes_of(_together(mean)), mean.log.dtype)

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """σ of the difference of two log Gamma quantiles; differentiable in λ by the implicit function theorem."""
        a = _together(value.detach() for value in state)
        wanted = state.log.requires_grad or state.log_rest.requires_grad
        draw = standard_draw(a, noise, slope=wanted)
        logs = draw.ratio + a.log()
        bounds = torch.finfo(noise.dtype)
        whole = torch.sigmoid(logs[..., 0] - logs[..., 1]).to(noise.dtype)
        theta = whole.clamp(bounds.tiny, 1.0 - 0.5 * bounds.eps)
        if draw.slope is None:
            return theta
        first, second = (draw.slope + 1.0 / a).to(noise.dtype).unbind(-1)
        change = first * from_zero(state.log) - second * from_zero(state.log_rest)
        return theta + theta * (1.0 - theta) * change

    def point(self, state: Any) -> Tensor:
        """The mean a/(a+b)."""
        return torch.as_tensor(state.log / (state.log + state.log_rest))

    def natural_gradient(self, state: Any, draws: Draws) -> BetaStatistics:
        """The pathwise gradient through F⁻¹, in closed form."""
        theta = draws.theta.double()
        pull = theta * (1.0 - theta) * draws.require_grad().double()
        solution = pathwise(_together(state), draws.noise, torch.stack((pull, -pull), -1))
        return _apart(solution, draws.theta.dtype)

    def fisher_solve(self, nat: Any, vector: Any) -> BetaStatistics:
        """F⁻¹ v in closed form."""
        shapes = _together(nat)
        each = _together(vector) * (shapes - shape_slack(shapes))
        return _apart(solved(shapes, each, each.sum(-1)), nat.log.dtype)

    def entropy(self, state: Any) -> Tensor:
        """In closed form without cancellation."""
        return dirichlet_entropy(_together(state)).to(state.log.dtype)

    def kl(self, state: Any, prior: Any) -> Tensor:
        """In closed form without cancellation."""
        shapes, others = torch.broadcast_tensors(_together(state), _together(prior))
        return dirichlet_divergence(shapes, others).to(state.log.dtype)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> BetaStatistics:
        """The member with mean θ and a + b = `precision` (the field `concentration` if None)."""
        total = torch.ones_like(theta) * (self.concentration if precision is None else precision)
        return BetaStatistics(total * theta, total * (1.0 - theta))

    def recentre(self, state: Any, theta: Tensor) -> BetaStatistics:
        """The mean θ, the concentration kept."""
        total = state.log + state.log_rest
        return BetaStatistics(total * theta, total * (1.0 - theta))

    def distribution(self, state: Any) -> Any:
        """A Pyro Beta, one event of the tensor's shape."""
        from . import distributions  # Pyro takes long to import

        return distributions.Beta(state.log, state.log_rest).to_event(state.log.ndim)
