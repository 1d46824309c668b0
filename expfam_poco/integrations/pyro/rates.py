"""How fast the posterior of a `NaturalVI` moves when nobody says it: whole steps at first, averages in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

SHARE = 0.2  # of the newest estimate of −ELBO in its average
ROUNDING = 1e-6  # of a loss in float32
SPREADS = 5.0  # how many of its deviations it may rise
CROSSING = 10.0  # nats a weight


@dataclass
class Rates:
    """The rate of the next step.

    A start of Newton steps (at the posterior's point, without noise, rate 1) ends where the loss falls by less than
    `enough`. Then η_t = 1/(2 + t/c), or 1/(1 + t/c) without such a start: posteriors of more and more steps are
    averaged, so that the noise of draws and of mini-batches dies out, and the start is forgotten as t^−c. A step after
    which the loss (−ELBO, once the start has ended) is higher is taken back, and the rate quartered; it doubles again
    step by step.

    Args:
        constant: a rate for all steps in place of these, or None.
        newton: the most Newton steps at the start.
        memory: c.
        whole: whether every step sees all data, so that losses can be compared without allowance for mini-batches.
        begun: Newton steps taken, or `newton` where they have ended.
        averaged: t.
        factor: what taking back has left of the rate.
        level: the last loss of the start, or the average of the latest estimates of −ELBO; None before the first.
        spread: the average distance of the next estimate from it.
        crossing: whether the level is the start's last loss, and the next one is the first estimate of −ELBO.
    """

    constant: float | None = None
    newton: int = 10
    memory: float = 3.0
    whole: bool = False
    begun: int = 0
    averaged: int = 0
    factor: float = 1.0
    level: float | None = None
    spread: float = 0.0
    crossing: bool = False

    enough: ClassVar[float] = 0.1
    least: ClassVar[float] = 2.0**-10

    @property
    def is_starting(self) -> bool:
        """Whether the next step is a Newton step."""
        return self.begun < self.newton

    def rate(self, share: float = 1.0) -> float:
        """η of the next step; of rows of which a batch has this share, t counts the steps that one of them has seen."""
        if self.constant is not None:
            return self.constant * self.factor
        if self.is_starting:
            return self.factor
        first = 1.0 if self.newton == 0 or share < 1.0 else 2.0
        return self.factor / (first + share * self.averaged / self.memory)

    def taken_back(self) -> bool:
        """Quarter the rate; whether it is worth trying again."""
        self.factor *= 0.25
        return self.factor >= self.least

    def is_bad(self, loss: float, weights: int) -> bool:
        """Whether a loss tells that the step before it was a bad one.

        Under q estimates of −ELBO vary by about (weights/2)^½ at most where q is any good.

        Args:
            loss: of the start, or an estimate of −ELBO.
            weights: how many there are.
        """
        if self.level is None:
            return False
        margin = SPREADS * max(self.spread, (0.5 * weights) ** 0.5)
        if self.crossing:  # the loss at a point and −ELBO differ, but not by their size and some nats a weight
            margin = abs(self.level) + CROSSING * weights
        if self.is_starting and self.whole:
            margin = self.enough + ROUNDING * abs(self.level)
        return not loss <= self.level + margin

    def stepped(self, loss: float, *, again: bool = False) -> None:
        """Count a step.

        Args:
            loss: from where it was taken.
            again: whether it was taken from there for the second time.
        """
        off = math.inf if self.level is None or again else self.level - loss
        if self.is_starting:
            self.begun = self.newton if abs(off) < self.enough else self.begun + (0 if again and self.whole else 1)
            self.level, self.crossing = loss, not self.is_starting
        else:
            self.averaged += 1
            if self.level is not None and not again and not self.crossing:
                self.spread += SHARE * (abs(off) - self.spread)
                loss = self.level - SHARE * off
            self.level, self.crossing = loss, False
        if not again:
            self.factor = min(1.0, 2.0 * self.factor)

    def restart(self) -> None:
        """Begin again, with other data."""
        self.begun = self.averaged = 0
        self.factor, self.level, self.spread, self.crossing = 1.0, None, 0.0, False

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        for name, value in state.items():
            setattr(self, name, value)
