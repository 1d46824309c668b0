"""How fast the posterior of a `NaturalVI` moves when nobody says it: whole steps at first, averages in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass
class Rates:
    """The rate of the next step.

    A start of Newton steps (rate 1 at the posterior's point, without noise) ends where the loss falls by less than
    `enough`; then η_t = c/(c + t), so that posteriors of many steps are averaged and the noise of draws and of
    mini-batches dies out. Where a step has to be taken back, the next are smaller by the same factor, which is
    forgotten little by little.

    Args:
        constant: a rate for all steps in place of these, or None.
        newton: the most steps at the start.
        memory: c.
    """

    constant: float | None = None
    newton: int = 10
    memory: float = 2.0
    begun: int = 0
    averaged: int = 0
    factor: float = 1.0

    enough: ClassVar[float] = 0.1
    least: ClassVar[float] = 2.0**-10

    @property
    def is_starting(self) -> bool:
        """Whether the next step is a Newton step."""
        return self.begun < self.newton

    def rate(self) -> float:
        """η of the next step."""
        if self.constant is not None:
            return self.constant * self.factor
        if self.is_starting:
            return self.factor
        return self.factor * self.memory / (self.memory + self.averaged)

    def taken_back(self) -> bool:
        """Halve the rate; whether it is worth trying again."""
        self.factor *= 0.5
        return self.factor >= self.least

    def stepped(self, fall: float | None) -> None:
        """Count a step; `fall` is by how much a Newton step lowered the loss of its batch."""
        if self.is_starting:
            self.begun = self.newton if fall is not None and abs(fall) < self.enough else self.begun + 1
        else:
            self.averaged += 1
        self.factor = min(1.0, 2.0 * self.factor)

    def restart(self) -> None:
        """Begin again, with other data."""
        self.begun = self.averaged = 0
        self.factor = 1.0

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        for name, value in state.items():
            setattr(self, name, value)
