"""How leafwise blocks are cut into spans, and how small ones are laid side by side in buckets.

A span of a large block is a view of it. Small blocks of a group share flat storage, so that one pass serves them all:
their states become views of it, each beginning with a tile of noise, and the gaps hold weights nobody sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.engine.block import Block
from expfam_poco.family import fields
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.noise import TILE as BLOCKS
from expfam_poco.family.noise import tiles_of

TILE = 4 * BLOCKS
SMALL = 2**17  # entries below which a block goes into a bucket
BUCKET = 2**18  # entries of a bucket


def padded(size: int) -> int:
    """The number of entries of the tiles that hold so many."""
    return -(-size // TILE) * TILE


def can_stream(block: Block) -> bool:
    """Whether the block may be cut: a leafwise family with the library's noise, an estimator of gradients alone."""
    family, estimator = block.family, block.group["curvature"]
    return (
        not family.joint
        and len(block.batch) > 0
        and type(family).noise is ExponentialFamily.noise
        and estimator.needs == "gradient"
        and not estimator.independent_draws
        and block.group["retraction"] != "plain"
    )


class Span(NamedTuple):
    """Weights `start` … `stop − 1` of a block whose weights stand along the axes `batch`, each of shape `event`."""

    start: int
    stop: int
    batch: torch.Size
    event: torch.Size

    @property
    def shape(self) -> torch.Size:
        """The shape that the family sees."""
        return torch.Size([self.stop - self.start, *self.event])

    def cut(self, values: Any) -> Any:
        """A tuple of tensors (or one, or None) restricted to the span; constants without the batch's axes pass."""
        if values is None:
            return None
        if not isinstance(values, Tensor):
            parts = map(self.cut, values)
            return type(values)(*parts) if hasattr(values, "_fields") else tuple(parts)
        dims = len(self.batch)
        if values.shape[:dims] != self.batch:
            return values
        rows = values if dims == 1 else values.reshape(-1, *values.shape[dims:])
        return rows if self.start == 0 and self.stop == rows.shape[0] else rows[self.start : self.stop]


def spans(block: Block, size: int, most: int | None = None) -> Iterator[Span]:
    """The spans of a block, of equal length and each beginning with a tile of noise.

    Args:
        block: leafwise.
        size: of a span, at most so many entries.
        most: only the first so many weights.
    """
    batch, event = block.batch, block.shape[len(block.batch) :]
    weights = batch.numel() if most is None else min(batch.numel(), most)
    parts = -(-weights // max(TILE, size // max(1, event.numel())))
    length = padded(-(-weights // parts))
    for start in range(0, weights, length):
        yield Span(start, min(start + length, weights), batch, event)


def spread(prior: Any, posterior: Any, block: Block) -> Any:
    """The prior with every field either of one weight's shape or of the whole block's."""

    def spread_field(value: Tensor, own: Tensor) -> Tensor:
        constant = value.ndim <= own.ndim - len(block.batch)
        return value if constant or value.shape == own.shape else value.expand_as(own).contiguous()

    return fields.map_fields(spread_field, prior, posterior)


class Bucket(Block):
    """Small blocks of one group side by side, as one flat block."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        first = blocks[0]
        super().__init__([b.params[0] for b in blocks], first.group, first.index, first.name, first.group_number)
        self.blocks = list(blocks)
        lengths = [padded(b.numel) for b in blocks]
        self._starts = [sum(lengths[:i]) for i in range(len(lengths))]
        self._sizes = [b.numel for b in blocks]
        self._shape = torch.Size([sum(lengths)])
        self._dtype = first.dtype
        tiles = tiles_of([b.index for b in blocks], self._sizes)
        self.tiles = tiles.to(first.device)
        self.real = self.beside([torch.ones(b.shape, dtype=torch.bool, device=b.device) for b in blocks])

    @property
    def shape(self) -> torch.Size:
        """That of the flat storage."""
        return self._shape

    @property
    def numel(self) -> int:
        """The number of entries, gaps included."""
        return self._shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the posteriors."""
        return self._dtype

    def per_member(self, counts: Tensor) -> list[int]:
        """A count for each tile, added up for each member."""
        parts = counts.split([padded(size) // TILE for size in self._sizes])
        return [int(part.sum()) for part in parts]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The members' parts of flat storage, in their shapes."""
        parts = zip(self._starts, self._sizes, self.blocks, strict=True)
        return [flat[start : start + size].view(block.params[0].shape) for start, size, block in parts]

    def beside(self, values: Sequence[Tensor]) -> Tensor:
        """A copy of the members' tensors in flat storage, the gaps zero."""
        flat = torch.zeros(self._shape, dtype=values[0].dtype, device=values[0].device)
        torch._foreach_copy_(self.views(flat), list(values))
        return flat

    def shared(self, values: Sequence[Tensor]) -> Tensor | None:
        """The flat storage of which the members' tensors are views, or None."""
        first = values[0]
        origin, size, storage = first.data_ptr(), first.element_size(), first.untyped_storage()
        last = first.storage_offset() + self._shape.numel()
        if (
            any(
                value.data_ptr() != origin + start * size or not value.is_contiguous()
                for value, start in zip(values, self._starts, strict=True)
            )
            or last * size > storage.nbytes()
            or values[-1].untyped_storage().data_ptr() != storage.data_ptr()
        ):
            return None
        return first.as_strided(self._shape, (1,))

    def bound(self, values: Sequence[Any]) -> tuple[Any, list[Any]]:
        """The members' tuples of tensors as one of flat tensors, and as tuples of views of it.

        Copies them into flat storage if they are not there yet; the gaps become like the first weight, so that they
        are valid.
        """
        if not values[0]:
            return values[0], list(values)
        flats, parts = [], []
        for members in zip(*values, strict=True):
            if members[0].ndim == 0 and self.blocks[0].shape:  # a constant of the family
                flats.append(members[0])
                parts.append(members)
                continue
            flat = self.shared(members)
            if flat is None:
                flat = members[0].reshape(-1)[:1].repeat(self._shape.numel())
                own = self.views(flat)
                torch._foreach_copy_(own, list(members))
                members = tuple(own)
            flats.append(flat)
            parts.append(members)
        kind = type(values[0])
        make = kind if hasattr(kind, "_fields") else lambda *tensors: tuple(tensors)
        return make(*flats), [make(*own) for own in zip(*parts, strict=True)]

    @contextmanager
    def rewritten(self) -> Iterator[Tensor]:
        """Flat storage to write the members' weights into."""
        out = torch.zeros(self._shape, dtype=self.params[0].dtype, device=self.params[0].device)
        self.at_point, self.drawn = False, None
        yield out
        torch._foreach_copy_([p.data for p in self.params], self.views(out))
        for block in self.blocks:
            torch.autograd.graph.increment_version(block.params[0])
            block.at_point, block.drawn = False, None
            block.note_weights()


def _is_flat(family: ExponentialFamily) -> bool:
    """Whether every number of a posterior, and of the noise, belongs to one entry of the parameter."""
    return family.event_dim == 0 and not any(family.statistic_dims) and not family.noise_dims


def buckets(blocks: Sequence[Block]) -> dict[Block, Bucket]:
    """Buckets for the small blocks among these, by block; a bucket has at least two."""
    found: dict[Block, Bucket] = {}
    waiting: dict[Any, list[Block]] = {}

    def close(members: list[Block]) -> None:
        if len(members) > 1:
            bucket = Bucket(members)
            found.update(dict.fromkeys(members, bucket))
        members.clear()

    for block in blocks:
        fits = block.numel < SMALL and block.group["prior"] is None and _is_flat(block.family)
        if not fits or not can_stream(block) or not block.params[0].is_contiguous():
            continue
        alike = waiting.setdefault((block.group_number, block.params[0].dtype, block.device), [])
        if sum(padded(b.numel) for b in alike) + block.numel > BUCKET:
            close(alike)
        alike.append(block)
    for alike in waiting.values():
        close(alike)
    return found
