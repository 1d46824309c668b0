"""The passes of `kernels` as functions that return new values, as `fused` makes its kernels of them.

Each takes an empty tensor `like` that stands for the weights, and returns the new values of what it changes (None: as
they were) with what is summed over all weights. `backend` has the same passes for tiles, which are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expfam_poco.engine import kernels
from expfam_poco.engine.kernels import Constants, Evidence, Moved, Numbers, Weights
from expfam_poco.family import fields

Passed = tuple[Sequence[Tensor | None], Tensor | None]


def drawn(constants: Constants, like: Tensor, state: Any, memory: Any, numbers: Numbers, noise: Tensor) -> Passed:
    """θ."""
    return [kernels.draw(constants, state, memory, numbers.share, noise, like)], None


def noised(constants: Constants, like: Tensor, noise: Tensor) -> Passed:
    """ε itself, for what `torch.compile` makes, which would take longer over it."""
    return [noise], None


def collected(
    constants: Constants,
    like: Tensor,
    state: Any,
    memory: Any,
    numbers: Numbers,
    evidence: Evidence,
    total: Any,
    weight: Any,
) -> Passed:
    """The total with `weight` times what one draw has measured."""
    where = constants.where(state, memory, numbers.share)
    parts = kernels.added(constants, where, evidence, weight, numbers.ess, like)
    return [value + part for value, part in zip(total, parts, strict=True)], None


def advanced(
    constants: Constants, like: Tensor, weights: Weights, first: Any, second: Any, numbers: Numbers, following: Any
) -> Passed:
    """θ or the next draw, then λ, momentum and memory after a step; which weights were not sound is summed."""
    moved = kernels.advance(constants, weights, first, second, numbers, like)
    sound = kernels.noticed(constants, kernels.sound(constants, moved, like), first, second)
    assert sound is not None

    def keep(old: Tensor, new: Tensor) -> Tensor:
        return kernels.kept(sound, new, old) if old.ndim and new is not old else old

    before = weights.state, weights.momentum, weights.memory
    after = Moved(*fields.map_leaves(keep, before, tuple(moved)))
    if following is None:
        shown = constants.family.point(after.state)
    else:
        shown = kernels.draw(constants, after.state, None, 1.0, following, like)
    pairs = zip(fields.leaves(before), fields.leaves(after), strict=True)
    return [shown, *(None if new is old else new for old, new in pairs)], ~sound


def squared(constants: Constants, like: Tensor, weights: Weights, first: Any, second: Any, numbers: Numbers) -> Passed:
    """Nothing changes; ‖corrected gradient‖² over the momentum block is summed."""
    site = kernels.corrected(constants, weights, first, second, numbers, like).site
    values = [getattr(site, name).expand_as(like).double() for name in constants.family.momentum_block]
    return [], sum((value * value for value in values), torch.zeros_like(like, dtype=torch.float64))
