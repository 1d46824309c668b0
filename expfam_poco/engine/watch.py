"""Weights that a step in place had to leave as they were: the error, at once or when the device has said how many.

On a CPU the count is looked at in the step. On an accelerator the host runs ahead, and to ask would be to wait: there
the end of the next step is early enough, and then the count has long arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from expfam_poco.engine.block import Block
from expfam_poco.engine.flat import FlatBlock
from expfam_poco.errors import NonFiniteError
from expfam_poco.family.transfer import Later, is_ahead


class Found(Protocol):
    """What a step has found: counts, on the device of the weights, of which any that is not 0 is an error."""

    @property
    def counts(self) -> Tensor:
        """The counts."""

    def error(self, late: str) -> NonFiniteError:
        """The error after the step; `late` says in which, where others have followed."""


class Unsound(NamedTuple):
    """How many weights of a block kept their values; of a flat block, for `each` so many entries of a member.

    With `together` these were the cause that no weight of any block moved.
    """

    block: Block
    counts: Tensor
    each: int
    lr: float
    together: bool = False

    def error(self, late: str) -> NonFiniteError:
        """That some weights, or all for their sake, had to keep their values."""
        block, counts = self.block, self.counts
        block, count = block.worst(counts, self.each) if isinstance(block, FlatBlock) else (block, int(counts.sum()))
        if self.together:
            error = NonFiniteError(
                f"{late}lr={self.lr}: the loss, a gradient or the new posterior was infinite or NaN for {count} of "
                f"{block.numel} weights of {block.name!r}; all weights kept their values. Lower lr or precision_lr, or "
                "clip (clip_radius, max_grad_norm)."
            )
            error.stepped = bool(late)  # what has been stepped since
            return error
        cause = ", as its loss or gradients may have been" if late else ""
        error = NonFiniteError(
            f"{late}lr={self.lr}: the step would have made {count} of {block.numel} weights of {block.name!r} infinite "
            f"or NaN{cause}; these kept their values, all others were stepped. Lower lr or precision_lr, or clip "
            "(clip_radius, max_grad_norm)."
        )
        error.stepped = True
        return error


class Watch:
    """The unsound weights of the last steps."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, list[Any], Any]] = []
        self._errors: list[NonFiniteError] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy has nothing to look at."""
        return Watch().__dict__

    def note(self, number: int, found: Sequence[Found]) -> None:
        """Take in what step `number` has found."""
        waiting: dict[torch.device, list[Found]] = {}
        for own in found:
            where = own.counts.device
            if is_ahead(where):
                waiting.setdefault(where, []).append(own)
            elif bool(own.counts.any()):
                self._errors.append(own.error(""))
        for group in waiting.values():
            totals = [own.counts if own.counts.ndim == 0 else own.counts.sum() for own in group]
            self._waiting.append((number, group, Later(torch.stack(totals))))

    def wait(self, number: int, found: Sequence[Any], totals: Any) -> None:
        """Take in what step `number` has found, whose counts, one for each, `totals.read()` gives."""
        self._waiting.append((number, list(found), totals))

    def errors(self, before: int) -> list[NonFiniteError]:
        """The errors, at most one a step, of steps below `before` and of those that nothing was waited for; once."""
        while self._waiting and self._waiting[0][0] < before:
            number, group, totals = self._waiting.pop(0)
            wrong = [own for own, total in zip(group, totals.read(), strict=True) if total]
            self._errors += [own.error(f"step {number}: ") for own in wrong[:1]]
        errors, self._errors = self._errors, []
        return errors

    def take(self, found: Sequence[Found], number: int) -> None:
        """`note`, then raise the first of the `errors` that are due."""
        self.note(number, found)
        for error in self.errors(number):
            raise error

    def settle(self, before: int, *, skipping: bool, raising: bool) -> int:
        """Look at all steps below `before`: how many errors count as skipped; else the first is raised, now or later.

        Args:
            before: a step's number.
            skipping: whether errors are counted.
            raising: whether they are raised; otherwise they are kept for the next who asks.
        """
        errors = self.errors(before)
        if skipping:
            return len(errors)
        if raising and errors:
            raise errors[0]
        self._errors = [*errors, *self._errors]
        return 0
