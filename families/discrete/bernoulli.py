r"""The Bernoulli family over {−1, +1}: natural λ, μ = tanh λ, A(λ) = log 2cosh λ, Fisher 1 − μ² = sech² λ.

Samples are hard: θ = sign(λ + ε) with ε = ½ log(u/(1−u)), so that P(θ = 1) = σ(2λ) = (1+μ)/2. What estimates its
natural gradient stands in `binary_estimators`.

1 − tanh² is never computed: sech² comes from logarithms, sound for |λ| up to 40 in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.arguments import choice, positive
from expfam_poco.family.base import Theta
from expfam_poco.family.draws import Estimator

from .binary_estimators import Arm, Relaxed, SingleFlip, StraightThrough
from .weights import SignWeights, signs


@dataclass(frozen=True)
class Bernoulli(SignWeights):
    """Binary weights in {−1, +1}, every entry of a tensor with its own λ = artanh E[θ].

    Args:
        point_estimate: what the model holds between steps, the "mode" sign(λ) or the "mean" tanh λ.
        initial: what λ starts from, the model's weights θ: "value" (λ = strength · θ, so that a trained network's
            large weights are the sure ones) or "sign" (λ = strength · sign θ; random signs if θ is random).
        strength: |λ| at |θ| = 1; the published BayesBiNN starts at 10.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Bernoulli
        >>> q = Bernoulli()
        >>> q.point(q.State(torch.tensor([-0.3, 2.0])))
        tensor([-1.,  1.])
    """

    point_estimate: str = "mode"
    initial: str = "value"
    strength: float = 1.0

    support: ClassVar[constraints.Constraint] = constraints.real
    domain: ClassVar[Any] = {"theta": constraints.real}
    levels: ClassVar[tuple[float, ...] | None] = (-1.0, 1.0)
    noise_kind: ClassVar[str] = "logistic"
    default_estimator: ClassVar[str] = "relaxed"
    estimators: ClassVar[Mapping[str, Estimator]] = {
        "relaxed": Relaxed(),
        "straight_through": StraightThrough(),
        "clipped_straight_through": StraightThrough(clip=1.0),
        "arm": Arm(),
        "flip": SingleFlip(),
    }

    def __post_init__(self) -> None:
        """Refuse an unknown point estimate."""
        choice("point_estimate", self.point_estimate, ("mode", "mean"), "choose 'mode' or 'mean'")
        choice("initial", self.initial, ("value", "sign"), "choose 'value' or 'sign'")
        positive("strength", self.strength)

    @staticmethod
    def stale_variant() -> type[StaleBernoulli]:
        """The variant that remembers the λ before the last step."""
        return StaleBernoulli

    def statistics(self, theta: Tensor) -> Theta:
        """T(θ) = θ."""
        return Theta(theta)

    def log_partition(self, nat: Any) -> Tensor:
        """log(e^λ + e^{−λ})."""
        magnitude = torch.where(nat.theta >= 0.0, nat.theta, -nat.theta)  # of abs autograd has ∇²A(0) = 0, not 1
        return magnitude + F.softplus(-2.0 * magnitude)

    def to_mean(self, nat: Any) -> Theta:
        """μ = tanh λ."""
        return Theta(torch.tanh(nat.theta))

    def to_natural(self, mean: Any) -> Theta:
        """λ = artanh μ."""
        if not bool((mean.theta.abs() < 1.0).all()):
            raise ValueError("mean: an expectation of ±1 weights must lie strictly between −1 and 1.")
        return Theta(torch.atanh(mean.theta))

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """sign(λ + ε), +1 at 0."""
        return signs(state.theta + noise).to(noise.dtype)

    def point(self, state: Any) -> Tensor:
        """The mode or the mean of every weight."""
        if self.point_estimate == "mean":
            return torch.tanh(state.theta)
        return signs(state.theta)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Theta:
        """λ = precision · θ, the uniform prior at precision 0; where it is None, as `initial` and `strength` say."""
        if precision is None and self.initial == "sign":
            theta = signs(theta)
        strength = torch.as_tensor(self.strength if precision is None else precision, dtype=theta.dtype)
        return Theta(strength.to(theta.device) * theta)

    def recentre(self, state: Any, theta: Tensor) -> Theta:
        """The sign of θ with the confidence |λ| kept (the mode), or λ = artanh θ (the mean)."""
        if self.point_estimate == "mean":
            edge = 1.0 - torch.finfo(theta.dtype).eps
            return Theta(torch.atanh(theta.clamp(-edge, edge)))
        confidence = state.theta.abs().clamp_min(torch.finfo(theta.dtype).tiny)  # at λ = 0 the sign must show, too
        return Theta(signs(theta) * confidence)

    def distribution(self, state: Any) -> Any:
        """A `SignBernoulli`, one event of the tensor's shape."""
        from .level_categorical import SignBernoulli

        return SignBernoulli(state.theta).to_event(state.theta.ndim)


class Stale(NamedTuple):
    """λ, and the λ before it.

    Example:
        >>> import torch
        >>> from expfam_poco.families.discrete.bernoulli import Stale
        >>> Stale(torch.zeros(1), torch.ones(1)).previous
        tensor([1.])
    """

    theta: Tensor
    previous: Tensor


@dataclass(frozen=True)
class StaleBernoulli(Bernoulli):
    """A `Bernoulli` that remembers the λ before the last step, whose μ the published BayesBiNN code divides by.

    For comparisons with that code alone; otherwise use `Bernoulli`.

    Example:
        >>> import torch
        >>> from expfam_poco.families.discrete.bernoulli import StaleBernoulli
        >>> q = StaleBernoulli()
        >>> q.retract(q.centred_at(torch.ones(1)), q.Site(torch.ones(1)), (0.5,)).previous
        tensor([1.])
    """

    State: ClassVar[type[Any]] = Stale
    domain: ClassVar[Any] = {"theta": constraints.real, "previous": constraints.real}

    def to_nat(self, state: Any) -> Theta:
        """λ."""
        return Theta(state.theta)

    def from_nat(self, nat: Any) -> Stale:
        """λ, as if it had not moved."""
        return Stale(nat.theta, nat.theta.clone())  # of its own, since large models are stepped in place

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Any:
        """As `Bernoulli`, as if λ had not moved."""
        return self.from_nat(super().centred_at(theta, precision))

    def recentre(self, state: Any, theta: Tensor) -> Any:
        """As `Bernoulli`, as if λ had not moved."""
        return self.from_nat(super().recentre(state, theta))

    def kl_gradient(self, state: Any, prior: Any) -> Theta:
        """λ − λ₀."""
        return Theta(state.theta - prior.theta)

    def retract(self, state: Any, direction: Any, rates: Any, **choices: Any) -> Stale:
        """The step of `Bernoulli`; the λ before it stays."""
        return Stale(super().retract(state, direction, rates, **choices).theta, state.theta)
