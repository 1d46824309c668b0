"""How leafwise blocks are cut into tiles: consecutive weights that a kernel works on at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.engine.block import Block
from expfam_poco.family import fields, hyperparameters
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.noise import TILE as BLOCKS

TILE = 4 * BLOCKS  # the entries of one tile of noise, with which every tile of weights begins


def padded(size: int) -> int:
    """The number of entries of the tiles of noise that hold so many."""
    return -(-size // TILE) * TILE


def is_leafwise(block: Block) -> bool:
    """Whether every weight is drawn, measured and stepped by itself: no joint family, gradients of single draws."""
    family, estimator = block.family, block.settings.estimator
    return (
        not family.joint
        and len(block.batch) > 0
        and block.numel > 0
        and type(family).noise is ExponentialFamily.noise
        and estimator.needs == "gradient"
        and not (estimator.independent_draws or estimator.compares or block.settings.own_site)
    )


def steps_in_place(block: Block) -> bool:
    """Whether the block may be stepped tile by tile: leafwise, with a retraction that stays in the domain."""
    return is_leafwise(block) and block.settings.retraction != "plain"


class Tile(NamedTuple):
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
        """Nested tuples of tensors (or None) restricted to the tile; constants without the batch's axes pass."""
        if values is None:
            return None
        return fields.map_leaves(self._cut, values)

    def of(self, family: ExponentialFamily) -> ExponentialFamily:
        """The family with those of its own tensors' values that belong to the tile."""
        cut: ExponentialFamily = hyperparameters.mapped(family, self._cut)
        return cut

    def _cut(self, value: Tensor) -> Tensor:
        dims = len(self.batch)
        if value.shape[:dims] != self.batch:
            return value
        rows = value if dims == 1 else value.reshape(-1, *value.shape[dims:])
        return rows if self.start == 0 and self.stop == rows.shape[0] else rows[self.start : self.stop]


class Whole:
    """The tile that is a whole block, of any family, in its own shape."""

    start = 0
    event = torch.Size()

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def cut(self, values: Any) -> Any:
        """All of them."""
        return values

    def of(self, family: ExponentialFamily) -> ExponentialFamily:
        """The family itself."""
        return family


def tiles(block: Block, size: int, most: int | None = None) -> Iterator[Tile]:
    """The tiles of a block, of equal length and each beginning with a tile of noise.

    Args:
        block: leafwise.
        size: of a tile, at most so many entries.
        most: only the first so many weights.
    """
    batch, event = block.batch, block.shape[len(block.batch) :]
    weights = batch.numel() if most is None else min(batch.numel(), most)
    parts = max(1, -(-weights // max(TILE, size // max(1, event.numel()))))
    length = padded(-(-weights // parts))
    for start in range(0, weights, max(1, length)):
        yield Tile(start, min(start + length, weights), batch, event)


def spread(prior: Any, posterior: Any, block: Block) -> Any:
    """The prior with every field either of one weight's shape or of the whole block's."""

    def spread_field(value: Tensor, own: Tensor) -> Tensor:
        constant = value.ndim <= own.ndim - len(block.batch)
        return value if constant or value.shape == own.shape else value.expand_as(own).contiguous()

    return fields.map_fields(spread_field, prior, posterior)
