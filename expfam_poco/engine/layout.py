"""Which blocks are stepped by themselves, and which side by side."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from expfam_poco.closures.evaluate import is_evaluating
from expfam_poco.correction.base import Correction
from expfam_poco.engine.backend import Backend, plainly, tile_size
from expfam_poco.engine.beginning import Beginning
from expfam_poco.engine.block import Block, Record
from expfam_poco.engine.flat import FlatBlock, laid_side_by_side
from expfam_poco.engine.interrupts import Uninterrupted
from expfam_poco.engine.step import begin
from expfam_poco.engine.tiles import steps_in_place, tiles

Unit = tuple[Block, Record]


class Layout:
    """The blocks of an optimizer as they are stepped, laid anew when the blocks or their families have changed.

    Attributes:
        trying: the blocks whose weights are draws while closures are evaluated.
    """

    def __init__(self) -> None:
        self._seen: list[Any] = []
        self._key: list[Any] = []
        self._laid: list[Block] = []
        self._weights = 0
        self.trying: Sequence[Block] = ()

    def __getstate__(self) -> dict[str, Any]:
        """A copy lays its own blocks."""
        return Layout().__dict__

    def in_place(self, backend: Backend, blocks: Sequence[Block]) -> bool:
        """Whether a model of these blocks is large enough to be stepped in place."""
        self._lay(blocks)
        return backend.in_place(self._weights)

    def units(
        self, blocks: Sequence[Block], correction: Correction, *, in_place: bool, apart: bool = False
    ) -> list[Unit]:
        """The blocks with their records, ready for a step; small ones side by side where they are alike.

        Args:
            blocks: that take part.
            correction: whose memory they have.
            in_place: whether the model is stepped in place.
            apart: every block by itself.
        """
        if not apart:
            self._lay(blocks)
        units: list[Unit] = []
        for block in blocks if apart else self._laid:
            if isinstance(block, FlatBlock) and not block.bind():
                units.extend([(member, member.record) for member in block.members])
            else:
                units.append((block, block.record))
        for block, record in units:
            begun = begin(block, record, correction, in_place=in_place and steps_in_place(block))
            if begun and isinstance(block, FlatBlock):
                block.give()
        return units

    def _lay(self, blocks: Sequence[Block]) -> None:
        """Lay the blocks, unless that has been done and they still go by the same settings, or alike ones."""
        seen: list[Any] = [part for b in blocks for part in (b, b.settings)]
        if len(seen) == len(self._seen) and all(map(operator.is_, seen, self._seen)):
            return
        key: list[Any] = [part for b in blocks for part in (b, b.settings.kind)]
        if len(key) != len(self._key) or any(a is not b and a != b for a, b in zip(key, self._key, strict=True)):
            self._key, self._laid = key, laid_side_by_side(blocks)
        self._seen = seen
        self._weights = sum(block.whole for block in blocks if block.numel == 0 or steps_in_place(block))
        for block in self._laid:
            if isinstance(block, FlatBlock):
                block.adopt(block.members[0].settings)

    def restore(self, blocks: Sequence[Block], *, drawn_too: bool) -> None:
        """Make the model hold the points of the posteriors; with `drawn_too` also where a draw was left on purpose."""
        waiting = {b.index for b in blocks if not b.at_point and (b.drawn is None or drawn_too)}
        for laid in self._laid if waiting else ():
            if isinstance(laid, FlatBlock) and laid.indices <= waiting and laid.is_bound():
                write_point(laid, laid.record["posterior"])
                waiting -= laid.indices
        for block in blocks if waiting else ():
            if block.index in waiting:
                write_point(block, block.record["posterior"])

    def recover(self) -> None:
        """Put back the points where a step was interrupted before it could.

        Raises:
            RuntimeError: if the step is on its way: one of its closures asks.
        """
        if not self.trying:
            return
        if is_evaluating([p for block in self.trying for p in block.params]):
            raise RuntimeError(
                "closure: it uses the optimizer by which it is being evaluated, whose weights are a draw for the time; "
                "return the loss alone, and step, refresh, predict or sample outside of the closure."
            )
        self.restore(self.trying, drawn_too=True)
        self.trying = ()


class Restored(AbstractContextManager[None]):
    """Whatever happens inside, the model leaves with the points of its posteriors.

    Args:
        layout: of the optimizer's blocks.
        blocks: whose weights are changed.
        begun: where closures are evaluated inside, so that no gradients are left: posteriors that have just begun, and
            on an error have not.
    """

    def __init__(self, layout: Layout, blocks: Sequence[Block], begun: list[Beginning] | None) -> None:
        self._layout, self._blocks, self._begun = layout, blocks, begun

    def __enter__(self) -> None:
        if self._begun is not None:
            self._layout.trying = self._blocks

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with Uninterrupted():
            self._layout.restore(self._blocks, drawn_too=kind is not None)
            self._layout.trying = ()
            if self._begun is None:
                return
            for block in self._blocks:
                for p in block.params:
                    p.grad = None
            if error is not None and not getattr(error, "stepped", False):
                for beginning in self._begun:
                    beginning.undo()
            self._begun.clear()


@plainly
def write_point(block: Block, state: Any) -> None:
    """Put the point of q into the model."""
    if block.family.joint or not block.batch or isinstance(block, FlatBlock):
        block.write(block.family.point(state))
    else:
        with block.rewritten() as out:
            for tile in tiles(block, tile_size("eager", block.device)):
                tile.cut(out).copy_(tile.of(block.family).point(tile.cut(state)))
    for member in block.members:
        member.at_point = True
