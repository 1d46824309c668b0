"""What a run will do, done once beside it, so that its kernels are compiled before the first step, not in the middle.

A step without correction, a corrected one and a chunk of a refresh have kernels of their own. They are tried, with
gradients of zero, on a copy of a block's first tile, which is thrown away.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco.closures.evaluate import Measured
from expfam_poco.correction.alpha import MegaBatchAlpha
from expfam_poco.engine.backend import tile_size
from expfam_poco.engine.beginning import prior_of
from expfam_poco.engine.block import Block, Record, new_record
from expfam_poco.engine.flat import ROLES, FlatBlock
from expfam_poco.engine.kernels import Constants, Numbers
from expfam_poco.engine.noise_plan import NoisePlan, Part
from expfam_poco.engine.step import Step, remember
from expfam_poco.engine.tiles import spread, steps_in_place, tiles
from expfam_poco.engine.trial import Trial
from expfam_poco.family import fields

LONGEST = 2**20  # weights of a copy: a compiler decides by a tile's length how its kernel goes about it
LOG = logging.getLogger("expfam_poco")


class Rehearsal:
    """Compiles what an optimizer's steps and refreshes will need, once for every kind of block.

    Args:
        ahead: whether steps leave the next draw in the model.
        clips: whether gradients are clipped by their norm.
    """

    def __init__(self, ahead: bool, clips: bool) -> None:
        self.ahead, self._clips = ahead, clips
        self._done: set[Hashable] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A copy may find itself in another process."""
        return {**self.__dict__, "_done": set()}

    def of(self, units: Sequence[tuple[Block, Record]], plan: NoisePlan, *, plain: bool) -> None:
        """Compile what is missing for these blocks, which are ready for a step.

        Args:
            units: the blocks with their records.
            plan: the step's.
            plain: whether steps without correction are to be expected: not where everything begins with a refresh.
        """
        backend = plan.backend
        if backend is None or backend.mode != "compiled":
            return
        for block, record in units:
            if not steps_in_place(block):
                continue
            constants = _constants(block, plan)
            kind = constants, block.dtype, block.params[0].dtype, block.device, isinstance(block, FlatBlock)
            parts = [self._plain] if plain and (kind, True) not in self._done else []
            if _is_corrected(block, plan) and (kind, False) not in self._done:
                parts.append(self._corrected)
            if not parts:
                continue
            self._done |= {(kind, False)} | ({(kind, True)} if plain else set())
            before = backend.compile_seconds
            LOG.info("compiling what steps of %s will need", type(block.family).__name__)
            copy, own = _copied(block, record)
            for part in parts:
                part(copy, own, plan)
            LOG.info("compiled it in %.1f s", backend.compile_seconds - before)

    def _corrected(self, block: Block, record: Record, plan: NoisePlan) -> None:
        correction, alpha = plan.correction, block.settings.alpha
        mega = plan.at_mega(block, record, _numbers(block), 1, 1, _nothing, Part(0, 1.0))
        record["memory"] = remember(_measured(mega) if correction.refresh_evaluations else mega, record)
        first = _measured(_present(block, record, plan))
        second = plan.at_reference(first, correction.reference(record["memory"]), 1, 1, Part(0, 1.0, None, False))
        self._step(record, first, _measured(second), plan)
        if not isinstance(alpha, int | float | tuple | MegaBatchAlpha):  # it may be 0 after a refresh
            self._plain(block, record, plan)

    def _plain(self, block: Block, record: Record, plan: NoisePlan) -> None:
        self._step(record, _measured(_present(block, record, plan)), None, plan)

    def _step(self, record: Record, first: Trial, second: Trial | None, plan: NoisePlan) -> None:
        step = Step(record, first, second)
        if self._clips:
            step.gradient_square()
        step.prepare(1.0, plan.step_key(2) if self.ahead else None)
        step.commit()


def _is_corrected(block: Block, plan: NoisePlan) -> bool:
    """Whether steps will be, once there has been a refresh."""
    alpha = block.settings.alpha
    never = alpha == 0.0 if isinstance(alpha, int | float) else isinstance(alpha, tuple) and not any(alpha)
    return plan.correction.compares and not never


def _nothing() -> None:
    """In place of a closure, which is not called."""


def _numbers(block: Block) -> Numbers:
    """Of a step that hardly moves."""
    site = block.family.per_block(0.0, 0.0)
    momentum, squares = block.settings.momentum, block.settings.square_momentum or 0.0
    unbias = 1.0 - momentum
    return Numbers(site, site, block.settings.ess, momentum, unbias, unbias, squares, 1.0 - squares, 1.0)


def _constants(block: Block, plan: NoisePlan) -> Constants:
    """Those of the block's kernels; asked for at every step, so that nothing is made for it."""
    key, nothing = plan.step_key(1), _numbers(block)
    estimator = block.settings.estimator
    trial = Trial(block, estimator, plan.correction, None, None, nothing, key, key, plan.mode, 1, plan.backend)
    return trial.constants()


def _present(block: Block, record: Record, plan: NoisePlan) -> Trial:
    return plan.at_present(block, record, _numbers(block), 1, _nothing, Part(0, 1.0, None, False))


def _measured(trial: Trial) -> Trial:
    """The trial with zeros measured at all its draws; one draw more has no other kernels than the two before."""
    params = trial.block.params
    for draw in range(min(trial.count, 2)):
        trial.write(draw)
        loss = torch.zeros((), dtype=params[0].dtype, device=params[0].device)
        grads: list[Tensor | None] = [torch.zeros_like(p) for p in params]
        trial.record(draw, Measured(loss, grads, [], {}), slice(0, len(params)))
        trial.collect(draw)
    return trial


def _copied(block: Block, record: Record) -> tuple[Block, Record]:
    """A block with copies of as many weights as are needed, and its record."""
    if not isinstance(block, FlatBlock):
        return _copy_of(block, record, tile_size("compiled", block.device))
    some, total = list[Block](), 0
    for member in block.members:
        if len(some) < 2 or total < LONGEST:
            some.append(_copy_of(member, member.record, LONGEST)[0])
            total += member.numel
    flat = FlatBlock(some)
    flat.bind()
    return flat, flat.record


def _copy_of(block: Block, record: Record, longest: int) -> tuple[Block, Record]:
    tile = next(tiles(block, min(longest, LONGEST)))
    own: dict[str, Any] = {
        role: fields.map_leaves(lambda v: v.clone(), tile.cut(record[role]))  # type: ignore[literal-required]
        for role in ROLES
        if record[role] is not None  # type: ignore[literal-required]
    }
    weights = torch.zeros(tile.shape, dtype=block.params[0].dtype, device=block.device)
    settings = replace(block.settings, family=tile.of(block.family))
    if settings.prior is not None:
        settings = replace(settings, prior=tile.cut(spread(prior_of(block), record["posterior"], block)))
    made = Block([Parameter(weights)], settings, block.index, block.name, block.group_number)
    made.record = new_record(None)
    made.record.update(own)  # type: ignore[typeddict-item]
    return made, made.record
