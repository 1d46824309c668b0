r"""Local parameters, of whose rows a batch uses some: only these are stepped, with the right scale, at their own ages.

A loss that is the mean over B of the G rows of a plate has for each of them the gradient (1/B) ∇ℓ_g, which stands for
(1/G) ∇ℓ_g of the mean over all. What is measured is therefore multiplied by B/G, and the rule is applied to the rows of
the batch alone: each row is stepped as if its own data were a full batch, as often as it is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.closures.evaluate import Closure
from expfam_poco.closures.rows import rows_of
from expfam_poco.engine.block import Block, Record
from expfam_poco.family import fields


class Selection(NamedTuple):
    """The rows of a block that a step moves.

    Attributes:
        mask: which, G booleans.
        share: B/G.
        ages: the number of steps in every row's average with this one, if it is moved; shaped like the weights.
    """

    mask: Tensor
    share: float
    ages: Tensor

    def kept(self, new: Any, old: Any) -> Any:
        """`new` in these rows, `old` in the others; constants pass."""
        return fields.map_leaves(self._kept, new, old)

    def _kept(self, new: Tensor, old: Tensor) -> Tensor:
        if new.ndim == 0:
            return new
        return torch.where(self.mask.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    def ages_after(self) -> Tensor:
        """The ages after the step, one for each row."""
        ages = self.ages.flatten()
        return torch.where(self.mask, ages, ages - 1)


def are_local(parts: Sequence[tuple[Closure, float]], blocks: Sequence[Block]) -> bool:
    """Whether some block is stepped by rows now, or has been.

    Raises:
        ValueError: for rows of a parameter that is none of the blocks.
    """
    named = {name: None for closure, _ in parts for rows in rows_of(closure) for name in rows}
    for name in named:
        if not any(_is_of(name, block) for block in blocks):
            known = ", ".join(block.name for block in blocks)
            raise ValueError(f"rows[{_shown(name)}]: no such parameter takes part; the known names are {known}.")
    return bool(named) or any([block.record["ages"] is not None for block in blocks])


def selected(parts: Sequence[tuple[Closure, float]], block: Block, record: Record) -> Selection | None:
    """The rows of the block that a batch says it has used; all where it says nothing of one that has been local.

    Raises:
        ValueError: for rows that are out of range, repeated, or named by some of several closures only; for a family
            whose weights do not lie along the first axis.
    """
    given = [_find(rows, block) for closure, _ in parts for rows in rows_of(closure)]
    known = [rows for rows in given if rows is not None]
    if not known and record["ages"] is None:
        return None
    count = _rows_in(block)
    mask = torch.ones(count, dtype=torch.bool, device=block.device)
    if known:
        if len(known) != len(given):
            raise ValueError(f"rows: {len(known)} of {len(given)} closures name rows of {block.name!r}; let all do.")
        numbers = torch.cat(known).to(block.device, torch.int64)
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
            raise ValueError(f"rows[{block.name!r}]: some are none of the rows 0 to {count - 1} that there are.")
        mask = torch.zeros_like(mask).index_fill(0, numbers, True)
        if int(mask.sum()) != numbers.numel():
            raise ValueError(f"rows[{block.name!r}]: some are repeated; name every row once.")
    ages = record["ages"]
    if ages is None:
        ages = torch.full((count,), record["step"], dtype=torch.int64, device=block.device)
    shape = (count, *(1,) * (len(block.shape) - 1))
    return Selection(mask, float(mask.sum()) / max(count, 1), (ages + 1).reshape(shape))


def check_refreshed(chunks: Sequence[Closure], blocks: Sequence[Block]) -> None:
    """Refuse a mega-batch that has not used all rows of a local parameter, whose others it would call zero.

    Raises:
        ValueError: names the parameter.
    """
    are_local([(chunk, 1.0) for chunk in chunks], blocks)
    for block in blocks:
        known = [rows for chunk in chunks for each in rows_of(chunk) if (rows := _find(each, block)) is not None]
        used = torch.cat(known).unique().numel() if known else 0
        if known and used != _rows_in(block):
            raise ValueError(
                f"rows[{block.name!r}]: the mega-batch has used {used} of {_rows_in(block)} rows; refresh with all."
            )


def _rows_in(block: Block) -> int:
    if block.family.joint or not block.batch:
        raise ValueError(
            f"rows[{block.name!r}]: {type(block.family).__name__} has no rows of their own; use a family of single "
            "weights or of rows."
        )
    return block.batch[0]


def _find(rows: Mapping[Any, Tensor], block: Block) -> Tensor | None:
    for name, numbers in rows.items():
        if _is_of(name, block):
            return numbers
    return None


def _is_of(name: Any, block: Block) -> bool:
    return name == block.name if isinstance(name, str) else any(name is p for p in block.params)


def _shown(name: Any) -> str:
    return repr(name) if isinstance(name, str) else f"a tensor of shape {tuple(getattr(name, 'shape', ()))}"
