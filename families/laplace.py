r"""The exponential family of Laplace weights of fixed location m:  q(θ) = (r/2) exp(−r |θ − m|).

T(θ) = |θ − m|, λ = −r, A(λ) = log 2 − log r; μ = 1/r, F = 1/r². A draw is θ = m ± e/r with e exponential, so that
∂θ/∂λ = (θ − m)/r and ∇̃L = r E[(θ − m) ∇ℓ(θ)]: only the scale is learnt, which is what a loss lets a weight move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.arguments import number
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Draws

from .positive.gamma_functions import exp_excess


class Size(NamedTuple):
    """T(θ) = |θ − m|; as a natural parameter: minus the rate r = 1/scale."""

    size: Tensor


@dataclass(frozen=True)
class Laplace(ExponentialFamily):
    """Real weights around a fixed location, with a Laplace posterior of learnt scale: how much noise each bears.

    Every member has the same point, the location, and the optimizer refuses weights that are elsewhere. Write what is
    known as a constant of the model, θ = w + δ, and give this family δ, which starts at 0: the scales then say which of
    the weights w a loss can do without, or how coarsely each may be rounded. The prior of precision p has the
    variance 1/p; precision 0 is flat.

    Args:
        location: m.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Laplace
        >>> q = Laplace()
        >>> q.variance(q.centred_at(torch.zeros(2), 4.0))
        tensor([0.2500, 0.2500])
    """

    location: float = 0.0

    Statistics: ClassVar[type[Any]] = Size
    domain: ClassVar[Any] = {"size": constraints.less_than(0.0)}
    noise_kind: ClassVar[str] = "uniform"
    fixed_point: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a location that is no finite number."""
        number("location", self.location, math.isfinite, "it must be a finite number")

    def statistics(self, theta: Tensor) -> Size:
        """|θ − m|."""
        return Size((theta - self.location).abs())

    def log_partition(self, nat: Any) -> Tensor:
        """log 2 − log r."""
        return math.log(2.0) - torch.log(-nat.size)

    def to_mean(self, nat: Any) -> Size:
        """1/r."""
        return Size(-1.0 / nat.size)

    def to_natural(self, mean: Any) -> Size:
        """r = 1/μ.

        Raises:
            ValueError: for a mean that is not positive.
        """
        if not bool((mean.size > 0.0).all()):
            raise ValueError("mean: the expectation of |θ − m| must be positive.")
        return Size(-1.0 / mean.size)

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """m ± log(2 min(u, 1 − u))/λ."""
        upper = noise > 0.5
        away = torch.log(2.0 * torch.where(upper, 1.0 - noise, noise)) / state.size
        return self.location + torch.where(upper, away, -away)

    def natural_gradient(self, state: Any, draws: Draws) -> Size:
        """The mean of r (θ − m) ∇ℓ(θ)."""
        return Size(-state.size * ((draws.theta - self.location) * draws.require_grad()).mean(0))

    def fisher_solve(self, nat: Any, vector: Any) -> Size:
        """r² v."""
        return Size(nat.size * nat.size * vector.size)

    def kl(self, state: Any, prior: Any) -> Tensor:
        """x − 1 − log x with x = r₀/r."""
        return exp_excess((prior.size / state.size).log())

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Size:
        """The member of variance 1/precision; 1 if None."""
        size = torch.ones_like(theta) * (1.0 if precision is None else precision)
        return Size(-(2.0 * size).sqrt())

    def recentre(self, state: Any, theta: Tensor) -> Size:
        """The same: there is no other location."""
        return Size(state.size)

    def reference_like(self, like: Tensor) -> Tensor:
        """The location."""
        return torch.full_like(like, self.location)

    def point(self, state: Any) -> Tensor:
        """The location."""
        return torch.full_like(state.size, self.location)

    def expectation(self, state: Any) -> Tensor:
        """m."""
        return self.point(state)

    def variance(self, state: Any) -> Tensor:
        """2/r²."""
        return 2.0 / (state.size * state.size)

    def mode(self, state: Any) -> Tensor:
        """The location."""
        return self.point(state)

    def distribution(self, state: Any) -> Any:
        """A Pyro Laplace, one event of the tensor's shape."""
        import pyro.distributions as dist

        return dist.Laplace(self.point(state), -1.0 / state.size).to_event(state.size.ndim)
