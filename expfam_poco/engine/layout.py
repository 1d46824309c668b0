"""Which blocks are stepped by themselves, and which side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expfam_poco.correction.base import Correction
from expfam_poco.engine.backend import Backend, plainly, tile_size
from expfam_poco.engine.block import Block, Record
from expfam_poco.engine.flat import FlatBlock, laid_side_by_side
from expfam_poco.engine.step import Step, begin
from expfam_poco.engine.tiles import steps_in_place, tiles

Unit = tuple[Block, Record]


class Layout:
    """The blocks of an optimizer as they are stepped, laid anew when the blocks or their families have changed."""

    def __init__(self) -> None:
        self._key: list[Any] = []
        self._laid: list[Block] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy lays its own blocks."""
        return {"_key": [], "_laid": []}

    @staticmethod
    def in_place(backend: Backend, blocks: Sequence[Block]) -> bool:
        """Whether a model of these blocks is large enough to be stepped in place."""
        return backend.in_place(sum(block.numel for block in blocks if steps_in_place(block)))

    def units(
        self,
        blocks: Sequence[Block],
        states: Mapping[Any, Any],
        correction: Correction,
        *,
        in_place: bool,
        apart: bool = False,
    ) -> list[Unit]:
        """The blocks with their records, ready for a step; small ones side by side where they are alike.

        Args:
            blocks: that take part.
            states: `optimizer.state`.
            correction: whose memory they have.
            in_place: whether the model is stepped in place.
            apart: every block by itself.
        """
        units: list[Unit] = []
        for block in blocks if apart else self._of(blocks):
            records = [states[member.params[0]] for member in block.members]
            if isinstance(block, FlatBlock):
                if not block.bind(records):
                    units.extend(zip(block.members, records, strict=True))
                    continue
                units.append((block, block.record))
            else:
                units.append((block, records[0]))
        for block, record in units:
            if begin(block, record, correction, in_place=in_place and steps_in_place(block)):
                self._give(block, states)
        return units

    @staticmethod
    def _give(block: Block, states: Mapping[Any, Any]) -> None:
        if isinstance(block, FlatBlock):
            block.give([states[member.params[0]] for member in block.members])

    def _of(self, blocks: Sequence[Block]) -> Sequence[Block]:
        key: list[Any] = [part for b in blocks for part in (b, b.settings.kind)]
        if len(key) != len(self._key) or any(a is not b and a != b for a, b in zip(key, self._key, strict=True)):
            self._key, self._laid = key, laid_side_by_side(blocks)
        for block in self._laid:
            if isinstance(block, FlatBlock):
                block.adopt(block.members[0].settings)
        return self._laid

    def settle(self, steps: Sequence[Step], states: Mapping[Any, Any]) -> None:
        """Tell the members of flat blocks what a step has made of them."""
        for step in steps:
            if isinstance(step.block, FlatBlock):
                step.block.settle([states[member.params[0]] for member in step.block.members])

    def restore(self, blocks: Sequence[Block], states: Mapping[Any, Any], *, drawn_too: bool) -> None:
        """Make the model hold the points of the posteriors; with `drawn_too` also where a draw was left on purpose."""
        waiting = {b.index for b in blocks if not b.at_point and (b.drawn is None or drawn_too)}
        if not waiting:
            return
        for laid in self._laid:
            if not isinstance(laid, FlatBlock) or not all(member.index in waiting for member in laid.members):
                continue
            if laid.is_bound([states[member.params[0]] for member in laid.members]):
                write_point(laid, laid.record["posterior"])
                waiting.difference_update(member.index for member in laid.members)
        for block in blocks:
            if block.index in waiting:
                write_point(block, states[block.params[0]]["posterior"])


@plainly
def write_point(block: Block, state: Any) -> None:
    """Put the point of q into the model."""
    if block.family.joint or not block.batch or isinstance(block, FlatBlock):
        block.write(block.family.point(state))
    else:
        with block.rewritten() as out:
            for tile in tiles(block, tile_size("eager", block.device)):
                tile.cut(out).copy_(block.family.point(tile.cut(state)))
    for member in block.members:
        member.at_point = True
