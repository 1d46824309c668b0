"""How fast the posterior of a `NaturalVI` moves when nobody says it: whole steps while −ELBO falls, then averages."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

SHARE = 0.2  # of the newest estimate of −ELBO in its average
SPREADS = 5.0  # how many of its deviations it may rise
MANY = 20  # steps, before which nothing is said
OFTEN = 0.25  # a share of them
NATS = 1.0  # that −ELBO may still fall
ERRORS, SURE = 2.0, 3.0  # of U under no fall: to go by, and to speak of
SHORTEST, LONGEST = 8, 200  # estimates of −ELBO among which a fall is looked for
LEAST = 2.0**-4


@dataclass
class Rates:
    """The rate of the next step, η_t = 1/(1 + t/c).

    Where t counts all steps, posteriors of more and more of them are averaged: the noise of draws and of mini-batches
    dies out, and the start is forgotten as t^−c. That is right once the posterior is near and wrong before. So t counts
    up to c, η = ½, and from there up after a step without evidence that −ELBO falls, and down after one with it.

    The evidence is Mann and Whitney's, of which neither outliers nor the fall's shape matter. Of the last 2m estimates
    x of −ELBO, m ∝ 1/η as that is how many steps a posterior remembers,

        U = #{i ≤ m < j: x_i > x_j} > m²/2 + 2 (m² (2m + 1)/12)^½.

    A step after which −ELBO is far higher is taken back, and the rate quartered; it doubles again step by step.

    Args:
        constant: a rate for all steps in place of these, or None.
        memory: c.
        averaged: t.
        factor: what taking back has left of the rate.
        level: the average of the latest estimates of −ELBO; None before the first.
        spread: the average distance of the next estimate from it.
        recent: the latest estimates.
        steps: how many there have been.
        bad: the share of those taken back among the latest.
    """

    constant: float | None = None
    memory: float = 3.0
    averaged: int = 0
    factor: float = 1.0
    level: float | None = None
    spread: float = 0.0
    recent: list[float] = field(default_factory=list)
    steps: int = 0
    bad: float = 0.0

    def rate(self, share: float = 1.0) -> float:
        """η of the next step; of rows of which a batch has this share, t counts the steps that one of them has seen."""
        if self.constant is not None:
            return self.constant * self.factor
        return self.factor / (1.0 + share * self.averaged / self.memory)

    def taken_back(self) -> bool:
        """Quarter the rate; whether it is worth trying again."""
        self.factor *= 0.25
        return self.factor >= LEAST

    def is_bad(self, loss: float, weights: int) -> bool:
        """Whether an estimate of −ELBO tells that the step before it was a bad one.

        Under q they vary by about (weights/2)^½ at most where q is any good.

        Args:
            loss: the estimate.
            weights: how many there are.
        """
        if self.level is None:
            return False
        return not loss <= self.level + SPREADS * max(self.spread, (0.5 * weights) ** 0.5)

    def fall(self) -> float:
        """By how much −ELBO has fallen, the difference of medians; 0 without evidence that it has."""
        m = min(max(5, int(2.0 * (1.0 + self.averaged / self.memory))), LONGEST // 2, len(self.recent) // 2)
        return self._fall(m, ERRORS) if m >= SHORTEST // 2 else 0.0

    def _fall(self, m: int, errors: float) -> float:
        before, after = self.recent[-2 * m : -m], self.recent[-m:]
        ordered = sorted(before)
        higher = sum(m - 0.5 * (bisect_left(ordered, y) + bisect_right(ordered, y)) for y in after)
        if higher <= 0.5 * m**2 + errors * m * ((2 * m + 1) / 12) ** 0.5:
            return 0.0
        return max(0.0, median(before) - median(after))

    def complaint(self) -> str | None:
        """Why the posterior is none yet, as far as many steps tell; None where nothing speaks against it."""
        if self.steps >= MANY and self.bad > OFTEN:
            return "steps keep being taken back"
        third = min(len(self.recent) // 3, LONGEST // 2)  # more tell of smaller falls; the first third is a beginning
        fall = self._fall(third, SURE) if third >= MANY // 2 else 0.0
        return f"−ELBO still falls, by {fall:.3g} of late" if fall > NATS else None

    def stepped(self, loss: float, *, again: bool = False) -> None:
        """Count a step.

        Args:
            loss: the estimate of −ELBO where it was taken.
            again: whether it was taken from there for the second time.
        """
        self.recent = [*self.recent[-LONGEST:], loss]
        self.steps += 1
        self.bad += (float(again) - self.bad) / min(self.steps, MANY)
        self.averaged = max(min(self.averaged + 1, int(self.memory)), self.averaged + (-1 if self.fall() > 0.0 else 1))
        if self.level is not None and not again:
            off = self.level - loss
            self.spread += SHARE * (abs(off) - self.spread)
            loss = self.level - SHARE * off
        self.level = loss
        if not again:
            self.factor = min(1.0, 2.0 * self.factor)

    def restart(self) -> None:
        """Begin again, with other data."""
        self.load_state_dict(asdict(Rates(self.constant, self.memory)))

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)
