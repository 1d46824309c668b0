r"""The Bernoulli family over {−1, +1}: natural λ, μ = tanh λ, A(λ) = log 2cosh λ, Fisher 1 − μ² = sech² λ.

Samples are hard: θ = sign(λ + ε) with ε = ½ log(u/(1−u)), so that P(θ = 1) = σ(2λ) = (1+μ)/2. Three estimators
of the natural gradient, by name:

* "relaxed" (binary concrete, Meng et al. 2020): the loss at w = tanh((λ+ε)/τ), the natural gradient
  (1−w²)/(τ sech²λ) ∇ℓ(w). Biased (for a linear loss its 1 becomes 0.87 at τ = 1, λ = 0.7); the variance grows
  as 1/τ, so τ → 0 is *not* the straight-through estimator.
* "straight_through" (Bengio et al. 2013): the loss at a hard θ, the natural gradient ∇ℓ(θ). Biased.
* "score" (of the engine): unbiased, from losses alone, at least two draws.

1 − tanh² is never computed: sech² comes from logarithms, sound for |λ| up to 40 in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.estimators import Draws, Estimator
from expfam_poco.family import ExponentialFamily, Theta


def log_sech_squared(value: Tensor) -> Tensor:
    """log sech² x = 2 (log 2 − |x| − log(1 + e^{−2|x|})), without overflow or cancellation for any x."""
    magnitude = value.abs()
    return 2.0 * (math.log(2.0) - magnitude - F.softplus(-2.0 * magnitude))


@dataclass(frozen=True)
class Relaxed(Estimator):
    """The binary-concrete estimator of BayesBiNN at temperature τ, biased; variance grows as 1/τ.

    Args:
        temperature: τ > 0.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Bernoulli, Relaxed
        >>> q = Bernoulli()
        >>> Relaxed(temperature=0.5).points(q, q.State(torch.zeros(1)), torch.tensor([[0.25]]))
        tensor([[0.4621]])
    """

    temperature: float = 1.0
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a temperature that is not positive and finite."""
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: it must be positive and finite; try 1.0.")

    def check(self, family: ExponentialFamily) -> None:
        """Only for {−1, +1} weights."""
        _require_bernoulli("relaxed", family)

    def points(self, family: ExponentialFamily, state: Any, noise: Tensor) -> Tensor:
        """w = tanh((λ + ε)/τ)."""
        return torch.tanh((state.theta + noise) / self.temperature)

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Theta:
        """The average of sech²((λ+ε)/τ) / (τ sech² λ) ∇ℓ(w)."""
        exponent = log_sech_squared((state.theta + draws.noise) / self.temperature)
        ratio = torch.exp(exponent - log_sech_squared(state.theta)) / self.temperature
        return Theta((ratio * draws.require_grad()).mean(0))


@dataclass(frozen=True)
class StraightThrough(Estimator):
    """∇ℓ at a hard ±1 draw (at the mode with `noise="zero"`) taken as the natural gradient: biased, low variance.

    Example:
        >>> from expfam_poco.families import StraightThrough
        >>> StraightThrough().unbiased
        False
    """

    unbiased: ClassVar[bool] = False

    def check(self, family: ExponentialFamily) -> None:
        """Only for {−1, +1} weights."""
        _require_bernoulli("straight_through", family)

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Theta:
        """The average of ∇ℓ(θ)."""
        return Theta(draws.require_grad().mean(0))


@dataclass(frozen=True)
class Bernoulli(ExponentialFamily):
    """Binary weights in {−1, +1}, every entry of a tensor with its own λ = artanh E[θ].

    Args:
        point_estimate: what the model holds between steps, the "mode" sign(λ) or the "mean" tanh λ.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Bernoulli
        >>> q = Bernoulli()
        >>> q.point(q.State(torch.tensor([-0.3, 2.0])))
        tensor([-1.,  1.])
    """

    point_estimate: str = "mode"

    support: ClassVar[constraints.Constraint] = constraints.real
    noise_kind: ClassVar[str] = "logistic"
    default_estimator: ClassVar[str] = "relaxed"
    estimators: ClassVar[Mapping[str, Estimator]] = {
        "relaxed": Relaxed(),
        "straight_through": StraightThrough(),
    }

    def __post_init__(self) -> None:
        """Refuse an unknown point estimate."""
        if self.point_estimate not in ("mode", "mean"):
            raise ValueError(f"point_estimate={self.point_estimate!r}: choose 'mode' or 'mean'.")

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
        return torch.where(state.theta + noise >= 0.0, 1.0, -1.0).to(noise.dtype)

    def point(self, state: Any) -> Tensor:
        """The mode or the mean of every weight."""
        if self.point_estimate == "mean":
            return torch.tanh(state.theta)
        return torch.where(state.theta >= 0.0, 1.0, -1.0).to(state.theta.dtype)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Theta:
        """λ = strength · θ (strength 1 if None): the sign from θ, 0 at θ = 0, the uniform prior at strength 0."""
        strength = torch.as_tensor(1.0 if precision is None else precision, dtype=theta.dtype)
        return Theta(strength.to(theta.device) * theta)

    def recentre(self, state: Any, theta: Tensor) -> Theta:
        """The sign of θ with the confidence |λ| kept (the mode), or λ = artanh θ (the mean)."""
        if self.point_estimate == "mean":
            edge = 1.0 - torch.finfo(theta.dtype).eps
            return Theta(torch.atanh(theta.clamp(-edge, edge)))
        confidence = state.theta.abs().clamp_min(torch.finfo(theta.dtype).tiny)  # at λ = 0 the sign must show, too
        return Theta(torch.where(theta >= 0.0, 1.0, -1.0).to(theta.dtype) * confidence)

    def distribution(self, state: Any) -> Any:
        """A `SignBernoulli`, one event of the tensor's shape."""
        from .sign_bernoulli import SignBernoulli

        return SignBernoulli(state.theta).to_event(state.theta.ndim)


def _require_bernoulli(name: str, family: ExponentialFamily) -> None:
    if not isinstance(family, Bernoulli):
        raise ValueError(
            f"curvature={name!r} is for weights in {{−1, +1}}, not for {type(family).__name__}; "
            "use it with the Bernoulli family."
        )
