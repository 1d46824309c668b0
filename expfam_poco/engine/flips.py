"""Whether weights of few levels move: which of them have another level than at the last look, and how sure they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expfam_poco.engine.block import Block

STILL = 100  # steps without any flip, after which something is wrong
SHORT, HALF, MANY = 10, 0.45, 100  # steps within which so large a share of so many weights does not flip by learning


class Flips:
    """Looks at the blocks whose families have levels, and remembers what it saw.

    Example:
        >>> import torch, expfam_poco as poco
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> opt = poco.BayesBiNN([weight], square_momentum=None, lr=1.0, ess=8.0, seed=0)
        >>> opt.diagnostics()["mean_abs_lambda"]
        1.0
        >>> loss = opt.step(lambda: weight.sum())
        >>> opt.diagnostics()["flips"]
        0.5
    """

    def __init__(self) -> None:
        self._step, self._levels = -1, dict[str, Tensor]()
        self._flips: dict[str, float] = {}
        self._still, self._tossed, self._moved, self._told = 0, 0, False, False

    def read(
        self,
        step: int,
        blocks: Sequence[Block],
        states: Mapping[str, Any],
        summed: Callable[[Sequence[float]], list[float]] = list,
    ) -> dict[str, float]:
        """The share of weights whose nearest level is another than at the last step looked at; the mean of |λ|.

        Args:
            step: number of steps so far; fewer than at the last look, and that one is forgotten.
            blocks: all blocks.
            states: their posteriors, by name.
            summed: makes sums over processes, where they have parts of parameters.
        """
        blocks = [block for block in blocks if block.family.levels and block.whole]
        if not blocks:
            return {}
        now = {block.name: _nearest(block, states[block.name]) for block in blocks}
        size = count = 0.0
        for block in blocks:
            for value in block.family.to_nat(states[block.name]):
                size, count = size + block.share * float(value.abs().sum()), count + block.share * value.numel()
        size, count = summed([size, count])
        found = {"mean_abs_lambda": size / count}
        if step == self._step:  # reading again changes nothing
            return found | self._flips
        same = self._levels.keys() == now.keys() and all(self._levels[n].shape == now[n].shape for n in now)
        self._flips = {}
        if same and step > self._step:
            own = {block.name: block.share for block in blocks}
            changed = sum(own[n] * int((self._levels[n] != now[n].cpu()).sum()) for n in now)
            flipped, total = summed([changed, sum(own[n] * levels.numel() for n, levels in now.items())])
            self._flips = {"flips": flipped / total}
            self._warn(step - self._step, flipped / total, round(total))
        self._step, self._levels = step, {name: levels.cpu() for name, levels in now.items()}
        return found | self._flips

    def _warn(self, steps: int, flips: float, weights: int) -> None:
        """Once: nothing has flipped in all looks, or every look of few steps finds coin tosses."""
        self._moved |= flips > 0.0
        self._still += steps
        self._tossed = self._tossed + 1 if steps <= SHORT and flips >= HALF and weights >= MANY else 0
        if self._told or not ((self._still >= STILL and not self._moved) or self._tossed == 2):
            return
        self._told = True
        if self._moved:
            what = (
                f"{flips:.0%} of {weights} weights of few levels have flipped in {steps} steps, as coins do; lower lr"
            )
        else:
            what = f"none of {weights} weights of few levels has flipped in {self._still} steps; raise lr"
        warnings.warn(f"lr: {what}, see docs/binary-networks.md.", UserWarning, stacklevel=4)


def _nearest(block: Block, state: Any) -> Tensor:
    """The number of the level nearest to the point."""
    point = block.family.point(state).contiguous()
    levels = torch.tensor(block.family.levels, dtype=point.dtype, device=point.device)
    kind = torch.uint8 if len(levels) <= 256 else torch.int32
    return torch.bucketize(point, (levels[1:] + levels[:-1]) / 2.0, right=True).to(kind)
