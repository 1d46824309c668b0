r"""Estimators of the natural gradient ∇_μ E_q[ℓ] for {−1, +1} weights.

| name                       | evaluates                  | natural gradient                     | bias | cost       |
|----------------------------|----------------------------|--------------------------------------|------|------------|
| `relaxed`                  | w = tanh((λ+ε)/τ)          | (1−w²)/(τ sech²λ) ∇ℓ(w)              | yes  | 1 gradient |
| `straight_through`         | a hard θ (or the mode)     | ∇ℓ(θ)                                | yes  | 1 gradient |
| `clipped_straight_through` | a hard θ (or the mode)     | ∇ℓ(θ) where |λ| ≤ 1, else 0          | yes  | 1 gradient |
| `score` (of the engine)    | K ≥ 2 hard θ               | F⁻¹ (ℓ − mean of the others) (θ − μ) | no   | K losses   |
| `arm`                      | θ(ε) and θ(−ε)             | (ℓ(θ(ε)) − ℓ(θ(−ε))) tanh ε / sech²λ | no   | 2 losses   |
| `flip`                     | a hard θ and d flips of it | ½ θᵢ (ℓ(θ) − ℓ(θ with θᵢ flipped))   | no   | d+1 losses |

Of the last: E_q[ℓ] is linear in each μᵢ, so ∂/∂μᵢ is half the difference of E[ℓ | θᵢ = ±1], whatever the other weights.

Sources: Meng, Bachmann and Khan 2020 (relaxed); Bengio, Léonard and Courville 2013 (straight-through, clipped as in
Hubara et al. 2016); Kool et al. 2019 (leave-one-out); Yin and Zhou 2019 (ARM, Eq. 3, with u − ½ = ½ tanh ε).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from expfam_poco.arguments import positive
from expfam_poco.family.base import ExponentialFamily, Theta
from expfam_poco.family.draws import Draws, Estimator

from .weights import SignWeights


def log_sech_squared(value: Tensor) -> Tensor:
    """log sech² x = 2 (log 2 − |x| − log(1 + e^{−2|x|})), without overflow or cancellation for any x."""
    magnitude = value.abs()
    return 2.0 * (math.log(2.0) - magnitude - F.softplus(-2.0 * magnitude))


@dataclass(frozen=True)
class Relaxed(Estimator):
    """The binary-concrete estimator of BayesBiNN at temperature τ, biased; variance grows as 1/τ.

    Args:
        temperature: τ > 0.
        epsilon: added to 1 − w² and to 1 − μ², 1e-10 in the published code; 0 is exact.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Bernoulli, Relaxed
        >>> q = Bernoulli()
        >>> Relaxed(temperature=0.5).points(q, q.State(torch.zeros(1)), torch.tensor([[0.25]]))
        tensor([[0.4621]])
    """

    temperature: float = 1.0
    epsilon: float = 0.0
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a temperature that is not positive and finite."""
        positive("temperature", self.temperature, "it must be a positive, finite number; try 1.0")
        if not 0.0 <= self.epsilon < 1.0:
            raise ValueError(f"epsilon={self.epsilon}: it must be in [0, 1); 0 is exact.")

    def check(self, family: ExponentialFamily) -> None:
        """Only for {−1, +1} weights."""
        _require_bernoulli("relaxed", family)

    def points(self, family: ExponentialFamily, state: Any, noise: Tensor) -> Tensor:
        """w = tanh((λ + ε)/τ)."""
        return torch.tanh((state.theta + noise) / self.temperature)

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Theta:
        """The average of sech²((λ+ε)/τ) / (τ sech² λ) ∇ℓ(w)."""
        above = log_sech_squared((state.theta + draws.noise) / self.temperature)
        below = log_sech_squared(_divisor(state))
        if self.epsilon > 0.0:
            ratio = (above.exp() + self.epsilon) / (below.exp() + self.epsilon)
        else:
            ratio = torch.exp(above - below)
        ratio = ratio / self.temperature
        return Theta((ratio * draws.require_grad()).mean(0))


@dataclass(frozen=True)
class StraightThrough(Estimator):
    """∇ℓ at a hard ±1 draw (at the mode with `noise="zero"`) taken as the natural gradient: biased, low variance.

    Args:
        clip: pass the gradient only where |λ| ≤ clip, as a hard tanh would; None: everywhere.

    Example:
        >>> from expfam_poco.families import StraightThrough
        >>> StraightThrough().unbiased
        False
    """

    clip: float | None = None
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a limit that is not positive."""
        if self.clip is not None:
            positive("clip", self.clip, "it must be a positive, finite number, or None for no clipping")

    def check(self, family: ExponentialFamily) -> None:
        """Only for {−1, +1} weights."""
        _require_bernoulli("straight_through", family)

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Theta:
        """The average of ∇ℓ(θ), where it passes."""
        mean = draws.require_grad().mean(0)
        return Theta(mean if self.clip is None else torch.where(state.theta.abs() <= self.clip, mean, 0.0))


@dataclass(frozen=True)
class Arm(Estimator):
    """Augment, REINFORCE, merge (Yin and Zhou 2019): unbiased, from the losses of an antithetic pair.

    One difference of losses must explain all weights, so the variance grows with their number: for small models. Needs
    `noise="antithetic"`, whose pairs ±ε it compares.

    Example:
        >>> from expfam_poco.families import Arm
        >>> Arm().needs, Arm().antithetic
        ('loss', True)
    """

    needs: ClassVar[str] = "loss"
    needs_noise: ClassVar[bool] = True
    antithetic: ClassVar[bool] = True

    def check(self, family: ExponentialFamily) -> None:
        """Only for {−1, +1} weights."""
        _require_bernoulli("arm", family)

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Theta:
        """The average over pairs of (ℓ(θ(ε)) − ℓ(θ(−ε))) tanh ε / sech²λ."""
        loss, other = draws.loss[0::2], draws.loss[1::2]
        noise = draws.noise[0::2]
        difference = (loss - other).reshape(-1, *(1,) * (noise.ndim - 1))
        return Theta((difference * torch.tanh(noise)).mean(0) * torch.exp(-log_sech_squared(state.theta)))


@dataclass(frozen=True)
class SingleFlip(Estimator):
    """The exact difference that each weight makes at a hard draw: unbiased, d + 1 losses for d weights.

    Without noise in the weights that the others see but that of the draw, its variance is the lowest of the unbiased
    ones; its cost is absurd beyond `most` weights in a tensor, and refused there.

    Args:
        most: the largest tensor.

    Example:
        >>> from expfam_poco.families import SingleFlip
        >>> SingleFlip().needs
        'variations'
    """

    most: int = 4096
    needs: ClassVar[str] = "variations"
    needs_noise: ClassVar[bool] = True

    def check(self, family: ExponentialFamily) -> None:
        """Only for {−1, +1} weights."""
        _require_bernoulli("flip", family)

    def check_size(self, size: int) -> None:
        """At most `most` weights."""
        if size > self.most:
            raise ValueError(
                f"curvature='flip': a tensor of {size} weights would take as many further losses a step; "
                "choose 'straight_through' or 'relaxed', or give SingleFlip(most=…) to insist."
            )

    def variations(self, family: ExponentialFamily, theta: Tensor) -> Iterator[Tensor]:
        """θ with one entry flipped, entry after entry."""
        self.check_size(theta.numel())
        for i in range(theta.numel()):
            flipped = theta.flatten().clone()
            flipped[i] = -flipped[i]
            yield flipped.reshape(theta.shape)

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Theta:
        """The average of ½ θᵢ (ℓ(θ) − ℓ(θ with θᵢ flipped))."""
        assert draws.variations is not None
        difference = (draws.loss.unsqueeze(-1) - draws.variations).reshape(draws.theta.shape)
        return Theta((0.5 * draws.theta * difference).mean(0))


def _divisor(state: Any) -> Tensor:
    """λ of the μ that the estimate divides by: the present one, or the one before (`StaleBernoulli`)."""
    value: Tensor = getattr(state, "previous", state.theta)
    return value


def _require_bernoulli(name: str, family: ExponentialFamily) -> None:
    if not isinstance(family, SignWeights):
        raise ValueError(
            f"curvature={name!r} is for weights in {{−1, +1}}, not for {type(family).__name__}; "
            "use it with the Bernoulli family."
        )
