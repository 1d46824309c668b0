"""Small leafwise blocks of one group laid side by side in flat storage, so that one pass serves them all.

The posteriors, averages and memories of the members become views of flat tensors; each member begins within a tile of
noise of its own (at its beginning, unless the member is a part of a parameter that is spread over processes), and the
gaps between them hold weights that nobody sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from expfam_poco.correction.base import Corrected, Correction
from expfam_poco.engine.backend import plainly
from expfam_poco.engine.beginning import prior_of
from expfam_poco.engine.block import Block, Record, new_record
from expfam_poco.engine.kernels import is_flat
from expfam_poco.engine.settings import Settings
from expfam_poco.engine.tiles import TILE, Tile, Whole, is_leafwise, padded, spread
from expfam_poco.family import fields
from expfam_poco.family.noise import tiles_of

# Entries below which a block is laid beside others, and those of a flat block. On an accelerator launches are what
# costs, and a flat block is as large as memory beside the state may be.
SMALL = 2**17
LARGEST = 2**18
SMALL_ELSEWHERE = 2**26
LARGEST_ELSEWHERE = 2**26
ROLES = ("posterior", "momentum", "memory")


class FlatBlock(Block):
    """Blocks of one group, dtype and device as one flat block.

    Attributes:
        tiles: the addresses of the tiles of noise (`noise.tiles_of`).
        indices: the members'.
        record: the members' records as one of flat tensors, after `bind`.
    """

    def __init__(self, members: Sequence[Block]) -> None:
        first = members[0]
        self._members = list(members)
        self.indices = {b.index for b in members}
        leads = [b.offset % TILE for b in members]  # before a member, in its first tile
        reach = [lead + b.numel for lead, b in zip(leads, members, strict=True)]
        self._lengths = [padded(size) for size in reach]
        self._starts = [sum(self._lengths[:i]) + lead for i, lead in enumerate(leads)]
        self._dtype = first.dtype
        super().__init__([b.params[0] for b in members], first.settings, first.index, first.name, first.group_number)
        self.offset, self.share = max(b.offset for b in members), first.share
        self.is_part = any(b.is_part for b in members)
        self.shape = self.batch = torch.Size([sum(self._lengths)])
        self.tiles = tiles_of([b.index for b in members], reach)
        counts = torch.tensor([length // TILE for length in self._lengths])
        begins = torch.tensor([b.offset - lead for b, lead in zip(members, leads, strict=True)])
        self.tiles[0] += (begins // 4).repeat_interleave(counts, output_size=sum(self._lengths) // TILE)
        self.tiles = self.tiles.to(first.device)
        gaps = [a - b + c for a, b, c in zip(self._lengths, reach, [*leads[1:], 0], strict=True)]
        zeros = torch.zeros(2 * TILE, dtype=self.tensors[0].dtype, device=first.device)  # `cat` likes them contiguous
        self._gaps = [zeros[:gap] for gap in gaps]
        self._lead = [zeros[: leads[0]]] if leads[0] else []
        self._nothing = [zeros.new_zeros(()).expand(size) for size in self._sizes]
        self._bound: list[tuple[Any, ...]] = []
        self._scratch: dict[Any, tuple[Tensor, list[Tensor]]] = {}

    @property
    def members(self) -> Sequence[Block]:
        """The blocks."""
        return self._members

    def has_moved(self) -> bool:
        """Whether members' parts lie elsewhere than before; found again."""
        if not any([member.has_moved() for member in self._members]):
            return False
        self.tensors = [member.tensors[0] for member in self._members]
        return True

    def adopt(self, settings: Settings) -> None:
        """Go by the group's new settings; the family is the members'."""
        self.settings, self.family = settings, self.members[0].family
        self.constants.clear()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the posteriors."""
        return self._dtype

    @cached_property
    def real(self) -> Tensor:
        """Which entries are weights."""
        return self.beside([torch.ones(b.shape, dtype=torch.bool, device=b.device) for b in self._members])

    def addresses(self, tile: Tile | Whole) -> Tensor:
        """Those of the tiles of noise of a tile of weights."""
        stop = tile.start + tile.shape[0]
        return self.tiles if stop == self.shape[0] else self.tiles[:, tile.start // TILE : -(-stop // TILE)]

    def _members_laid(self) -> tuple[list[int], list[int], list[int]]:
        return self._starts, self._sizes, [block.index for block in self._members]

    # ---- weights and gradients -----------------------------------------------------------------------------

    def views(self, flat: Tensor) -> list[Tensor]:
        """The members' parts of flat storage, in their shapes."""
        parts = zip(self._starts, self._sizes, self.tensors, strict=True)
        stop = len(flat)
        return [flat[start : start + size].view(own.shape) for start, size, own in parts if start < stop]

    def beside(self, values: Sequence[Tensor | None], stop: int | None = None) -> Tensor:
        """A copy of the members' tensors in flat storage, of those that begin before `stop`; what is None is zero."""
        present = next(value for value in values if value is not None)
        count = len(self._starts) if stop is None else sum(start < stop for start in self._starts)
        length = sum(self._lengths[:count])
        flat = torch.zeros(length, dtype=present.dtype, device=present.device)
        pairs = [(place, v) for place, v in zip(self.views(flat), values, strict=False) if v is not None]
        if pairs:
            torch._foreach_copy_([place for place, _ in pairs], [value for _, value in pairs])
        return flat

    def gather(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        """One tensor per member → flat storage, in the posterior's dtype. None if all are None."""
        if all([tensor is None for tensor in tensors]):
            return None
        rows = zip(tensors, self._nothing, self._gaps, strict=True)
        parts = [x for t, nothing, gap in rows for x in (nothing if t is None else t.reshape(-1), gap)]
        flat = torch.cat([*self._lead, *parts])
        return flat if flat.dtype == self._dtype else flat.to(self._dtype)

    def split(self, value: Tensor) -> list[Tensor]:
        """Flat storage → one tensor per member."""
        return self.views(value)

    @plainly
    def write(self, value: Tensor) -> None:
        """Put values into the model."""
        out, parts = self._out(value.dtype)
        out.copy_(value)
        self._write(parts)

    @contextmanager
    def rewritten(self) -> Iterator[Tensor]:
        """Flat storage to write the members' weights into."""
        out, parts = self._out(self.params[0].dtype)
        yield out
        with torch.no_grad():
            self._write(parts)

    def _out(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Storage on the way to the model, with its views; its values last until it is asked for again."""
        known = self._scratch.get(dtype)
        if known is None or known[0].device != self.device:
            flat = torch.zeros(self.shape, dtype=dtype, device=self.device)
            known = self._scratch[dtype] = flat, self.views(flat)
        return known

    def follow(self, record: Record) -> None:
        """Centre the posteriors where another optimizer has just put the weights."""
        weights = self.gather(self.tensors)
        assert weights is not None
        old, new = record["posterior"], self.family.recentre(record["posterior"], weights)
        for place, value in zip(old, new, strict=True):
            if place.ndim and value is not place:
                place.copy_(value)
        for block in self.members:
            block.note_weights()

    def _write(self, parts: list[Tensor]) -> None:
        self.at_point, self.drawn = False, None
        for block in self._members:
            block.at_point, block.drawn = False, None  # first, so that an interrupt does not leave them wrong
        torch._foreach_copy_(self.tensors, parts)
        for block in self._members:
            block.note_weights()

    # ---- records -------------------------------------------------------------------------------------------

    def bind(self) -> bool:
        """Lay the members' records side by side, if that has not been done; False where they differ in age."""
        records = [member.record for member in self._members]
        first = records[0]
        for record in records[1:]:
            if (
                record["step"] != first["step"]
                or record["stamp"] != first["stamp"]
                or len(record["momentum"]) != len(first["momentum"])
                or (record["memory"] is None) != (first["memory"] is None)
            ):
                return False
        if not self.is_bound():
            self.record = new_record(None)
            for role in ROLES:
                self._lay(role, [record[role] for record in records])  # type: ignore[literal-required]
            self.give()
        self.record["step"], self.record["stamp"] = first["step"], first["stamp"]
        return True

    def is_bound(self) -> bool:
        """Whether the members' records still hold the views that were made for them."""
        for member, known in zip(self._members, self._bound, strict=False):
            record, (posterior, momentum, memory) = member.record, known
            if not (record["posterior"] is posterior and record["momentum"] is momentum and record["memory"] is memory):
                return False
        return len(self._bound) > 0

    def _lay(self, role: str, values: Sequence[Any]) -> None:
        """Copy the members' values of one role into flat tensors."""
        flat = None if values[0] is None else fields.map_leaves(self._flattened, values[0], *values[1:])
        self.record[role] = flat  # type: ignore[literal-required]

    def give(self) -> None:
        """Make the members' values views of the flat ones."""
        self._bound = []
        for number, member in enumerate(self._members):
            for role in ROLES:
                member.record[role] = self.cut(self.record[role], number)  # type: ignore[literal-required]
            self._bound.append(tuple(member.record[role] for role in ROLES))  # type: ignore[literal-required]

    def cut(self, flat: Any, number: int) -> Any:
        """One member's part of flat values; constants of the family pass."""
        start, size, shape = self._starts[number], self._sizes[number], self.tensors[number].shape
        return fields.map_leaves(lambda v: v[start : start + size].view(shape) if v.ndim else v, flat)

    def _flattened(self, *values: Tensor) -> Tensor:
        """The members' tensors in flat storage, the gaps like the first weight, so that they are valid."""
        first = values[0]
        if first.ndim == 0:  # a constant of the family
            return first
        flat = first.reshape(-1)[:1].repeat(self.shape.numel())
        torch._foreach_copy_(self.views(flat), list(values))
        return flat

    def settle(self) -> None:
        """Tell the members how old their records are, and what the model holds."""
        own = self.record
        for block in self._members:
            block.record["step"], block.record["stamp"] = own["step"], own["stamp"]
            block.at_point, block.drawn = self.at_point, self.drawn

    def prior(self) -> Any:
        """The members' priors as one."""
        if self.settings.prior is None:
            return prior_of(self.members[0])
        states = [self.cut(self.record["posterior"], number) for number in range(len(self.members))]
        spreads = [spread(prior_of(b), state, b) for b, state in zip(self.members, states, strict=True)]
        full = [fields.map_fields(lambda v, s: v.expand_as(s), *pair) for pair in zip(spreads, states, strict=True)]
        return fields.map_leaves(self._flattened, *full)

    def unsound_members(self, sound: Tensor) -> list[Block]:
        """The members with a weight that is not sound."""
        return [b for b, view in zip(self.members, self.views(sound), strict=True) if not bool(view.all())]

    def worst(self, counts: Tensor, each: int) -> tuple[Block, int]:
        """The member with the most of what is counted for `each` so many entries of every member, and its count."""
        parts = counts.split([-(-length // each) for length in self._lengths])
        count, number = max((int(part.sum()), number) for number, part in enumerate(parts))
        return self.members[number], count


def laid_side_by_side(blocks: Sequence[Block]) -> list[Block | FlatBlock]:
    """The blocks, the small ones among them laid side by side; a flat block has at least two members."""
    found: list[Block | FlatBlock] = []
    waiting: dict[Any, list[Block]] = {}

    def close(members: list[Block]) -> None:
        found.extend([FlatBlock(members)] if len(members) > 1 else members)
        members.clear()

    for block in blocks:
        cpu = block.device.type == "cpu"
        small, largest = (SMALL, LARGEST) if cpu else (SMALL_ELSEWHERE, LARGEST_ELSEWHERE)
        fits = block.numel < small and block.settings.adaptive is None and is_flat(block.family)
        if not fits or not is_leafwise(block):
            found.append(block)
            continue
        alike = waiting.setdefault((block.group_number, block.params[0].dtype, block.device, block.share), [])
        if sum(padded(b.numel) for b in alike) + block.numel > largest:
            close(alike)
        alike.append(block)
    for alike in waiting.values():
        close(alike)
    return found


def follow(block: Block, record: Record, correction: Correction) -> None:
    """Centre a posterior where another optimizer has stepped the weights; a memory that follows steps goes along."""
    if not correction.follows_steps:
        block.follow(record)
        return
    before = fields.map_fields(torch.clone, record["posterior"])
    block.follow(record)
    memory = correction.after_step(block.family, record["memory"], before, record["posterior"], Corrected(None, None))
    record["step"] = record["step"] + 1 if record["momentum"] else 0
    if isinstance(block, FlatBlock):
        for place, value in zip(fields.leaves(record["memory"]), fields.leaves(memory), strict=True):
            if place.ndim:
                place.copy_(value)
        block.settle()
    else:
        record["memory"] = memory
