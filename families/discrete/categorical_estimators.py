r"""Estimators of the natural gradient ∇_μ E_q[ℓ] for weights from levels l₀ < … < l_{K−1} (`Categorical`).

| name                    | evaluates                                   | natural gradient ∂/∂μⱼ              | bias |
|-------------------------|---------------------------------------------|-------------------------------------|------|
| `straight_through`      | a hard θ (or the mode)                      | (lⱼ − l₀) ∇ℓ(θ)                     | yes  |
| `relaxed`               | w = l₀ + Σ_k g_k σ(z_k), z_k = (2ε − t_k)/τ | Σ_{k<j} g_k r_k ∇ℓ(w)               | yes  |
| `score` (of the engine) | two or more hard θ                          | F⁻¹ (ℓ − mean of the others)(T − μ) | no   |

Here g_k = l_{k+1} − l_k and t_k = logit c_k. The staircase w becomes the hard draw as τ → 0. Of μ it is a function
through c_k = 1 − Σ_{j>k} μⱼ alone, so ∂w/∂μⱼ = Σ_{k<j} g_k r_k with r_k = σ′(z_k) / (τ c_k (1 − c_k)), which is
F⁻¹ ∂w/∂λ without a matrix. E[r_k] → 1 for small τ, and r_k = 1 is the straight-through estimator. For two levels both
are Bernoulli's.

Sources: Bengio, Léonard and Courville 2013 (straight-through); Maddison, Mnih and Teh 2017 (binary concrete); Meng,
Bachmann and Khan 2020 (its natural gradient).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from expfam_poco.arguments import positive
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Draws, Estimator

from .weights import LevelWeights


@dataclass(frozen=True)
class StraightThroughLevels(Estimator):
    """∇ℓ at a hard draw (at the mode with `noise="zero"`), extrapolated linearly to all levels: biased, low variance.

    Example:
        >>> from expfam_poco.families import StraightThroughLevels
        >>> StraightThroughLevels().unbiased
        False
    """

    unbiased: ClassVar[bool] = False

    def check(self, family: ExponentialFamily) -> None:
        """Only for weights from levels."""
        _levelled("straight_through", family)

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Any:
        """The average of (lⱼ − l₀) ∇ℓ(θ)."""
        table = _levelled("straight_through", family).table(draws.theta)
        return family.Site(draws.require_grad().mean(0).unsqueeze(-1) * (table[1:] - table[0]))


@dataclass(frozen=True)
class RelaxedLevels(Estimator):
    """The staircase at temperature τ, biased; its variance grows as 1/τ.

    Args:
        temperature: τ > 0, in units of log-odds.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Categorical, RelaxedLevels
        >>> q = Categorical(levels=(-1.0, 1.0))
        >>> RelaxedLevels(temperature=0.5).points(q, q.State(torch.zeros(1, 1)), torch.tensor([[0.25]]))
        tensor([[0.4621]])
    """

    temperature: float = 1.0
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a temperature that is not positive and finite."""
        positive("temperature", self.temperature, "it must be a positive, finite number; try 1.0")

    def check(self, family: ExponentialFamily) -> None:
        """Only for weights from levels."""
        _levelled("relaxed", family)

    def points(self, family: ExponentialFamily, state: Any, noise: Tensor) -> Tensor:
        """w = l₀ + Σ_k g_k σ((2ε − t_k)/τ)."""
        levelled = _levelled("relaxed", family)
        table = levelled.table(noise)
        z = (2.0 * noise.unsqueeze(-1) - levelled.thresholds(state)) / self.temperature
        return table[0] + torch.sigmoid(z) @ (table[1:] - table[:-1])

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Any:
        """The average of Σ_{k<j} g_k r_k ∇ℓ(w)."""
        levelled = _levelled("relaxed", family)
        table, t = levelled.table(draws.noise), levelled.thresholds(state)
        z = (2.0 * draws.noise.unsqueeze(-1) - t) / self.temperature
        ratio = torch.exp(_log_slope(z) - _log_slope(t)) / self.temperature
        pull = (ratio * draws.require_grad().unsqueeze(-1)).mean(0)
        return family.Site(((table[1:] - table[:-1]) * pull).cumsum(-1))


def _log_slope(z: Tensor) -> Tensor:
    """log σ′(z) = log σ(z) + log σ(−z)."""
    return F.logsigmoid(z) + F.logsigmoid(-z)


def _levelled(name: str, family: ExponentialFamily) -> LevelWeights:
    if not isinstance(family, LevelWeights):
        raise ValueError(
            f"curvature={name!r} of Categorical is for weights from levels, not for {type(family).__name__}; "
            "use it with the Categorical family."
        )
    return family
