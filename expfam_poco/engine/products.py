r"""The anchor term α (H_out − H_i)(m_in − m_out) from Hessian-vector products, for any curvature of the precision.

It must have mean zero, so H_out and H_i are measured alike, at weights drawn from q_out: H_i by a product on the
mini-batch, H_out from the mega-batch's dense Hessian ("stored": one d × d matrix, one refresh costs d products) or by
products on every chunk of the mega-batch at every step ("products": no memory, a mega-batch pass a step).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expfam_poco.arguments import choice
from expfam_poco.closures.batched import Batched
from expfam_poco.closures.effects import capture_random, replay_random
from expfam_poco.closures.evaluate import Closure
from expfam_poco.engine.block import Block
from expfam_poco.engine.measure import dense_hessian, measure_draw
from expfam_poco.engine.trial import Trial
from expfam_poco.family.base import ExponentialFamily

KINDS = ("curvature", "stored", "products")
LARGEST_STORED = 10_000


class Products:
    """What the optimizer keeps of the mega-batch for the anchor term: nothing, a Hessian, or the closures."""

    def __init__(self, kind: str) -> None:
        choice("anchor", kind, KINDS, f"choose one of {', '.join(KINDS)}")
        self.kind = kind
        self.hessian: Tensor | None = None
        self._chunks: list[tuple[Closure, list[Trial], float]] = []
        self._pending: Any = None
        self._target: list[Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the closures: those of a copied optimizer would still evaluate the original's model."""
        return {**self.__dict__, "_chunks": [], "_pending": None}

    def check_group(self, family: ExponentialFamily, maximize: bool) -> None:
        """Refuse families whose sites have no curvature to anchor with, and what has another sign than the loss."""
        if self.kind != "curvature" and maximize:
            raise ValueError(f"maximize=True: anchor={self.kind!r} knows no sign; use anchor='curvature'.")
        if self.kind != "curvature" and family.curvature == "none":
            raise ValueError(
                f"anchor={self.kind!r}: {type(family).__name__} keeps no curvature; use anchor='curvature'."
            )

    def reset(self) -> None:
        """Forget the mega-batch."""
        self.hessian, self._chunks, self._target = None, [], None

    def check_set_outer(self) -> None:
        """A stored posterior brings no Hessian along."""
        if self.kind != "curvature":
            raise ValueError(
                f"anchor={self.kind!r}: a stored posterior has no mega-batch to take products on; call refresh(), or "
                "make the optimizer with anchor='curvature'."
            )

    def begin(self) -> None:
        """A new mega-batch starts."""
        self._pending = [] if self.kind == "products" else None

    def collect(self, closure: Closure, trials: Sequence[Trial], share: float) -> None:
        """Add a chunk that counts `share` of the mega-batch."""
        if self.kind == "curvature":
            return
        if isinstance(closure, Batched):
            raise ValueError(
                f"anchor={self.kind!r}: it needs closures, not {type(closure).__name__}; use anchor='curvature'."
            )
        if self.kind == "products":
            self._pending.append((closure, [trial.again(is_present=False) for trial in trials], share))
            return
        size = sum(trial.block.numel for trial in trials)
        if size > LARGEST_STORED:
            raise ValueError(
                f"anchor='stored': {size} entries would need a Hessian of {size}²; it is meant for at most "
                f"{LARGEST_STORED}, use anchor='products' or 'curvature'."
            )
        draws = trials[0].count
        for draw in range(draws):
            part = dense_hessian(closure, trials, draw) * (share / draws)
            self._pending = part if self._pending is None else self._pending + part

    def commit(self) -> None:
        """The mega-batch is complete."""
        if self.kind == "stored":
            self.hessian = self._pending
        elif self.kind == "products":
            self._chunks = self._pending
        self._pending = None

    def closures(self) -> list[Closure]:
        """Those of the mega-batch, where products are taken on them."""
        return [closure for closure, _, _ in self._chunks]

    def shift(self, inner: Sequence[Trial], outer: Sequence[Trial] | None) -> list[Tensor] | None:
        """m_in − m_out of every trial, or None where this kind needs no products; prepares H_out (m_in − m_out)."""
        if outer is None or self.kind == "curvature":
            return None
        shifts = [
            trial.block.family.point(trial.state) - trial.block.family.point(other.state)
            for trial, other in zip(inner, outer, strict=True)
        ]
        self._target = self._mega_products(inner, shifts)
        return shifts

    def difference(self, products: Sequence[Tensor]) -> list[Tensor]:
        """(H_out − H_i)(m_in − m_out) of every trial, from the mini-batch's products."""
        assert self._target is not None
        return [target - product for target, product in zip(self._target, products, strict=True)]

    @staticmethod
    def add_products(total: list[Tensor] | None, part: list[Tensor] | None, share: float) -> list[Tensor] | None:
        """The products of one part of a step, added to those of the parts before it."""
        if part is None or total is None:
            return part if part is None or share == 1.0 else [share * product for product in part]
        return [old + share * new for old, new in zip(total, part, strict=True)]

    def term(self, block: Block, product: Tensor, weight: float) -> Any:
        """The anchor as a site: its gradient is weight · product, nothing else."""
        zero = product.new_zeros(())
        first, *others = block.family.Site._fields
        return block.family.Site(**{first: weight * product}, **dict.fromkeys(others, zero))

    def _mega_products(self, inner: Sequence[Trial], shifts: Sequence[Tensor]) -> list[Tensor]:
        if self.kind == "stored":
            if self.hessian is None or self.hessian.shape[0] != sum(s.numel() for s in shifts):
                raise RuntimeError("anchor='stored': the parameters have changed since refresh(); call refresh().")
            flat = self.hessian @ torch.cat([shift.reshape(-1) for shift in shifts]).to(self.hessian.dtype)
            parts = flat.split([shift.numel() for shift in shifts])
            return [part.reshape(s.shape).to(s.dtype) for part, s in zip(parts, shifts, strict=True)]
        if not self._chunks:
            raise RuntimeError("anchor='products': a checkpoint or copy has no closures; call refresh() first.")
        total = [torch.zeros_like(shift) for shift in shifts]
        params = [p for trial in inner for p in trial.block.params]
        with replay_random(capture_random(params)):
            for closure, trials, share in self._chunks:
                draws = trials[0].count
                for draw in range(draws):
                    fresh = [trial.again() for trial in trials]
                    _, products = measure_draw(closure, fresh, draw, shifts)
                    total = [t + (share / draws) * p for t, p in zip(total, products, strict=True)]
        return total
