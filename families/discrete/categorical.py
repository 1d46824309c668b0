r"""Weights from a finite set of levels l₀ < … < l_{K−1}: ternary networks, 4-bit networks, any grid.

T(θ) are the K − 1 indicators of l₁ … l_{K−1}, a minimal set, so λ is P × (K − 1); with λ₀ = 0

    p = softmax(0, λ),    A(λ) = log Σⱼ e^{λⱼ},    μ = p₁ …,    F = diag μ − μμᵀ,    F⁻¹ = diag 1/μ + 11ᵀ/p₀

A draw inverts the cumulative probabilities c_k = p₀ + … + p_k at one noise per weight: the level's number is how many
thresholds t_k = logit c_k lie below 2ε = logit u. Both tails are exact, for |λ| up to 40 in float32, as both sides of
a threshold are summed up. For two levels this is the Bernoulli family, with λ twice as large.

Off the levels T is interpolated linearly, as what a relaxed weight sees. What estimates the natural gradient stands in
`categorical_estimators`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.arguments import choice, positive
from expfam_poco.family.draws import Estimator
from expfam_poco.family.inversion import increasing_root
from expfam_poco.family.transfer import on_device

from .categorical_estimators import RelaxedLevels, StraightThroughLevels
from .weights import LevelWeights


class Indicators(NamedTuple):
    """The indicators of all levels but the lowest, along the last axis; λ: log-odds against the lowest."""

    level: Tensor


@dataclass(frozen=True)
class Categorical(LevelWeights):
    """Weights that take one of a few values, every entry of a tensor with its own probabilities.

    Args:
        levels: the values, increasing; {−1, 0, 1} by default. `torch.linspace(-1, 1, 16).tolist()` makes 4 bits.
        point_estimate: what the model holds between steps, the "mode" (the likeliest level) or the "mean" E[θ].
        strength: of the start at the model's weights θ: a level begins with a probability like exp(−½ strength d²), d
            its distance from θ in units of half the range of the levels. θ's nearest level is the likeliest. With
            `weight_decay = strength / ess` the prior keeps q that precise; a flat prior forgets the grid's middle.

    Raises:
        ValueError: for levels that are fewer than two, not finite or not increasing, and for unknown choices.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Categorical
        >>> q = Categorical()
        >>> q.point(q.centred_at(torch.tensor([-0.7, 0.2, 3.0])))
        tensor([-1.,  0.,  1.])
    """

    levels: tuple[float, ...] = (-1.0, 0.0, 1.0)  # type: ignore[misc]  # of the class in other families
    point_estimate: str = "mode"
    strength: float = 1.0

    Statistics: ClassVar[type[Any]] = Indicators
    statistic_dims: ClassVar[tuple[int, ...]] = (1,)
    domain: ClassVar[Any] = {"level": constraints.real}
    noise_kind: ClassVar[str] = "logistic"
    default_estimator: ClassVar[str] = "relaxed"
    estimators: ClassVar[Mapping[str, Estimator]] = {
        "relaxed": RelaxedLevels(),
        "straight_through": StraightThroughLevels(),
    }

    def __post_init__(self) -> None:
        """Refuse levels that are no increasing sequence, and unknown choices."""
        levels = tuple(float(level) for level in self.levels)
        object.__setattr__(self, "levels", levels)
        rising = all(a < b for a, b in pairwise(levels))
        if len(levels) < 2 or not rising or not all(map(math.isfinite, levels)):
            raise ValueError(f"levels={self.levels!r}: give at least two finite numbers in increasing order.")
        choice("point_estimate", self.point_estimate, ("mode", "mean"), "choose 'mode' or 'mean'")
        positive("strength", self.strength)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]  # of the class in other families
        """From the lowest to the highest level, between which relaxed weights lie."""
        return constraints.interval(self.levels[0], self.levels[-1])

    def table(self, like: Tensor) -> Tensor:
        """The levels as a tensor."""
        return on_device(self.levels, like.dtype, like.device)

    def log_odds(self, nat: Any) -> Tensor:
        """(0, λ): the logarithms of all probabilities, up to a constant."""
        return torch.cat([torch.zeros_like(nat.level[..., :1]), nat.level], -1)

    def thresholds(self, nat: Any) -> Tensor:
        """t_k = logit c_k for k < K − 1: the logarithm of what is up to l_k over what is above, both summed up."""
        p = self.log_odds(nat).softmax(-1)
        tiny = torch.finfo(p.dtype).tiny
        below, above = p.cumsum(-1)[..., :-1], p.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        return below.clamp_min(tiny).log() - above.clamp_min(tiny).log()

    def statistics(self, theta: Tensor) -> Indicators:
        """The indicators; between two levels, and beyond the outer ones, interpolated linearly.

        At an inner level the derivative is the secant of its neighbours.
        """
        table = self.table(theta)
        gaps = table[1:] - table[:-1]
        ramps = (theta.unsqueeze(-1) - table[:-1]) / gaps
        first, last = (torch.arange(len(gaps), device=theta.device) == k for k in (0, len(gaps) - 1))
        flat = ((ramps < 0.0) & ~first) | ((ramps > 1.0) & ~last)
        ramps = torch.where(flat, ramps.detach().clamp(0.0, 1.0), ramps)
        # At the level between two gaps both ramps have a slope: each gets the share of its gap in both.
        pairs = gaps[1:] / (gaps[1:] + gaps[:-1])
        start = torch.cat([torch.ones_like(gaps[:1]), pairs])
        end = torch.cat([1.0 - pairs, torch.ones_like(gaps[:1])])
        share = torch.where(ramps == 0.0, start, torch.where(ramps == 1.0, end, 1.0))
        ramps = share * ramps + ((1.0 - share) * ramps).detach()
        return Indicators(ramps - torch.cat([ramps[..., 1:], torch.zeros_like(ramps[..., :1])], -1))

    def log_partition(self, nat: Any) -> Tensor:
        """Log Σⱼ e^{λⱼ}."""
        return torch.logsumexp(self.log_odds(nat), -1)

    def to_mean(self, nat: Any) -> Indicators:
        """softmax(0, λ) without the first."""
        return Indicators(self.log_odds(nat).softmax(-1)[..., 1:])

    def to_natural(self, mean: Any) -> Indicators:
        """log μ − log(1 − Σ μ).

        Raises:
            ValueError: unless all probabilities are positive.
        """
        rest = 1.0 - mean.level.sum(-1, keepdim=True)
        if not bool((mean.level > 0.0).all() and (rest > 0.0).all()):
            raise ValueError("mean: the probabilities of all levels, the lowest included, must be positive.")
        return Indicators(mean.level.log() - rest.log())

    def fisher_solve(self, nat: Any, vector: Any) -> Indicators:
        """v/μ + Σ v / p₀ (Sherman and Morrison)."""
        p = self.log_odds(nat).softmax(-1)
        return Indicators(vector.level / p[..., 1:] + vector.level.sum(-1, keepdim=True) / p[..., :1])

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """The level whose number is the count of thresholds up to 2ε."""
        number = (2.0 * noise.unsqueeze(-1) >= self.thresholds(state)).sum(-1)
        return self.table(noise)[number]

    def point(self, state: Any) -> Tensor:
        """The mode or the mean of every weight."""
        odds = self.log_odds(state)
        if self.point_estimate == "mean":
            return odds.softmax(-1) @ self.table(odds)
        return self.table(odds)[odds.argmax(-1)]

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Indicators:
        """λ_k = −½ s ((θ − l_k)² − (θ − l₀)²), s = precision / (½ (l_{K−1} − l₀))²: N(θ, 1/s) restricted to the levels.

        A precision of 0 makes all levels alike; None is the family's `strength`.
        """
        table, half = self.table(theta), 0.5 * (self.levels[-1] - self.levels[0])
        units = torch.as_tensor(self.strength if precision is None else precision, dtype=theta.dtype)
        scale = units.to(theta.device) / half**2
        scale = scale.unsqueeze(-1) if scale.ndim else scale
        rise, middle = table[1:] - table[0], 0.5 * (table[1:] + table[0])
        return Indicators(scale * rise * (theta.unsqueeze(-1) - middle))

    def recentre(self, state: Any, theta: Tensor) -> Indicators:
        """The likeliest level changes places with the one nearest to θ (mode), or λ is tilted to E[θ] = θ (mean)."""
        if self.point_estimate == "mean":
            return self._tilted(state, theta)
        odds, table = self.log_odds(state), self.table(theta)
        best, new = odds.argmax(-1, keepdim=True), (theta.unsqueeze(-1) - table).abs().argmin(-1, keepdim=True)
        top, other = odds.gather(-1, best), odds.gather(-1, new)
        odds = odds.scatter(-1, best, other).scatter(-1, new, top)
        # A tie is decided for the new one.
        eps = torch.finfo(odds.dtype).eps
        odds = odds.scatter(-1, new, top + 4.0 * eps * (1.0 + top.abs()))
        return Indicators(odds[..., 1:] - odds[..., :1])

    def _tilted(self, state: Any, theta: Tensor) -> Indicators:
        """λ_k + r (l_k − l₀): of all with mean θ the one nearest to the state."""
        table = self.table(theta).double()
        odds, span = self.log_odds(state).double(), table[-1] - table[0]
        inside = torch.finfo(theta.dtype).eps * span
        goal = theta.double().clamp(table[0] + inside, table[-1] - inside)

        def off(tilt: Tensor) -> tuple[Tensor, Tensor]:
            p = (odds + tilt.unsqueeze(-1) * table).softmax(-1)
            mean = p @ table
            return mean - goal, (p * (table - mean.unsqueeze(-1)).square()).sum(-1).clamp_min(1e-300)

        gap = min(b - a for a, b in pairwise(self.levels))
        bound = (odds.amax(-1) - odds.amin(-1) + 80.0) / gap  # there all but an outer level are out of sight
        tilt = increasing_root(off, torch.zeros_like(goal), -bound, bound, iterations=60)
        return Indicators((state.level + tilt.unsqueeze(-1) * (table[1:] - table[0])).to(theta.dtype))

    def distribution(self, state: Any) -> Any:
        """A `LevelCategorical`, one event of the tensor's shape."""
        from .level_categorical import LevelCategorical

        odds = self.log_odds(state)
        return LevelCategorical(odds, self.levels).to_event(odds.ndim - 1)
