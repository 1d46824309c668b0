"""Weights that a step in place had to leave as they were: the error, at once or when the device has said how many.

On a CPU the count is looked at in the step. On an accelerator the host runs ahead, and to ask would be to wait: there
the end of the next step is early enough, and then the count has long arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.engine.block import Block
from expfam_poco.engine.flat import FlatBlock
from expfam_poco.errors import NonFiniteError
from expfam_poco.family.transfer import Later, is_ahead


class Unsound(NamedTuple):
    """How many weights of a block kept their values; of a flat block, for `each` so many entries of a member."""

    block: Block
    counts: Tensor
    each: int
    lr: float


class Watch:
    """The unsound weights of the last steps."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, list[Unsound], Later]] = []
        self._errors: list[NonFiniteError] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy has nothing to look at."""
        return Watch().__dict__

    def note(self, number: int, found: Sequence[Unsound]) -> None:
        """Take in what step `number` has found."""
        waiting: dict[torch.device, list[Unsound]] = {}
        for unsound in found:
            where = unsound.counts.device
            if is_ahead(where):
                waiting.setdefault(where, []).append(unsound)
            elif bool(unsound.counts.any()):
                self._errors.append(_error(unsound, ""))
        for group in waiting.values():
            totals = [own.counts if own.counts.ndim == 0 else own.counts.sum() for own in group]
            self._waiting.append((number, group, Later(torch.stack(totals))))

    def errors(self, before: int) -> list[NonFiniteError]:
        """The errors, at most one a step, of steps below `before` and of those that nothing was waited for; once."""
        while self._waiting and self._waiting[0][0] < before:
            number, group, totals = self._waiting.pop(0)
            wrong = [own for own, total in zip(group, totals.read(), strict=True) if total]
            self._errors += [_error(own, f"step {number}: ") for own in wrong[:1]]
        errors, self._errors = self._errors, []
        return errors

    def take(self, found: Sequence[Unsound], number: int) -> None:
        """`note`, then raise the first of the `errors` that are due."""
        self.note(number, found)
        for error in self.errors(number):
            raise error

    def keep(self, errors: Sequence[NonFiniteError]) -> None:
        """Give these again when asked next."""
        self._errors = [*errors, *self._errors]


def _error(unsound: Unsound, late: str) -> NonFiniteError:
    """The error after a step in which some weights had to keep their values; `late`: which, where others followed."""
    block, counts, each, lr = unsound
    block, count = block.worst(counts, each) if isinstance(block, FlatBlock) else (block, int(counts.sum()))
    cause = ", as its loss or gradients may have been" if late else ""
    error = NonFiniteError(
        f"{late}lr={lr}: the step would have made {count} of {block.numel} weights of {block.name!r} infinite or NaN"
        f"{cause}; these kept their values, all others were stepped. Lower lr or precision_lr, or clip "
        "(clip_radius, max_grad_norm)."
    )
    error.stepped = True
    return error
