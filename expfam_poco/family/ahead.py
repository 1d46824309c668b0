"""Noise of small tensors, made for many steps in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.family.noise import TILE, NoiseKey, in_order, kind_of, noise, tiled, tiled_steps, words_of_tiles
from expfam_poco.family.philox import WORD


class _Kept(NamedTuple):
    """Noise of `len(rows)` steps from `first` on."""

    first: int
    rows: Tensor


class Ahead:
    """`noise` and `tiled` for small tensors at step after step: the same numbers, made for many steps in one pass.

    A few hundred numbers take as long to make as ten thousand do, for the operations are many and small. So once a
    step follows the one before, the noise of the next `steps` is made along with it, and kept. Any other order of
    steps gets the same numbers without that gain.

    Args:
        steps: how many are made at a time.
        most: how many numbers are kept, at most. Larger noise is made when asked for.

    >>> from expfam_poco.family.ahead import Ahead
    >>> ahead, key = Ahead(), NoiseKey(seed=7)
    >>> all(
    ...     torch.equal(ahead.noise("normal", (3,), 2, key.at(step=step)), noise("normal", (3,), 2, key.at(step=step)))
    ...     for step in (0, 1, 2, 9, 40, 5)
    ... )
    True
    """

    def __init__(self, steps: int = 64, most: int = 2**16) -> None:
        self.steps, self.most = steps, most
        self._kept: dict[Any, _Kept] = {}
        self._size = 0
        self._tiles: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of what is kept, which can be made again."""
        return {"steps": self.steps, "most": self.most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def noise(
        self,
        kind: str,
        shape: Sequence[int],
        draws: int,
        key: NoiseKey,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """As the function `noise`."""
        size = math.prod(shape)
        if not 0 < size * draws * 2 <= self.most:
            return noise(kind, shape, draws, key, dtype=dtype, device=device)

        def made(at: NoiseKey, steps: int) -> Tensor:
            if steps == 1:
                return noise(kind, shape, draws, at, dtype=dtype, device=device).unsqueeze(0)
            first, stop = at.offset // (4 * TILE), -(-(at.offset + size) // (4 * TILE))
            lanes = words_of_tiles(first, stop, draws, at, torch.device(device), steps)
            aligned = in_order(*kind_of(kind).from_words(*lanes, dtype)).to(dtype)
            begin = at.offset - 4 * TILE * first
            return aligned[:, begin : begin + size].reshape(steps, draws, *shape)

        where = (kind, tuple(shape), draws, key.seed, key.stream, key.parameter, key.offset, key.draw, dtype, device)
        return self._row(where, key, size * draws, made)

    def tiled(self, kind: str, tiles: Tensor, key: NoiseKey, dtype: torch.dtype) -> Tensor:
        """As the function `tiled`; `tiles` must not change afterwards."""
        size = 4 * TILE * tiles.shape[1]
        if size * 2 > self.most:
            return tiled(kind, tiles, key, dtype)
        if self._tiles.get(id(tiles)) is not tiles:
            if len(self._tiles) >= 64:
                self._forget()
            self._tiles[id(tiles)] = tiles  # kept, so that no other tensor gets its id

        def made(at: NoiseKey, steps: int) -> Tensor:
            return tiled_steps(kind, tiles, at, dtype, steps)

        where = (kind, id(tiles), key.seed, key.stream, key.draw, dtype)
        return self._row(where, key, size, made)

    def _row(self, where: Any, key: NoiseKey, size: int, made: Callable[[NoiseKey, int], Tensor]) -> Tensor:
        """The noise of one step, from what is kept, or from now on kept; a copy, as callers may write into it."""
        kept, step = self._kept.get(where), key.step
        if kept is None or not kept.first <= step < kept.first + len(kept.rows):
            follows = kept is not None and step == kept.first + len(kept.rows)
            steps = max(1, min(self.steps, self.most // (2 * size), WORD - step)) if follows else 1
            kept = _Kept(step, made(key, steps))
            self._keep(where, kept)
        return kept.rows[step - kept.first].clone()

    def _keep(self, where: Any, kept: _Kept) -> None:
        """Keep this; when there is too much, forget the rest."""
        old = self._kept.pop(where, None)
        self._size += kept.rows.numel() - (0 if old is None else old.rows.numel())
        while self._size > self.most:
            oldest = next(iter(self._kept))
            self._size -= self._kept.pop(oldest).rows.numel()
        self._kept[where] = kept

    def _forget(self) -> None:
        self._kept.clear()
        self._tiles.clear()
        self._size = 0
