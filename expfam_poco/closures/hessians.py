"""Second derivatives from gradients that carry their graph: products with a vector, dense blocks, diagonals."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

ROWS_AT_ONCE = 256
_SMALL = 64  # rows of an identity matrix that is worth keeping


def hessian_product(
    grads: Sequence[Tensor | None], params: Sequence[Parameter], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """∇²ℓ v over all parameters at once, from gradients that carry their graph."""
    pairs = [(g, v) for g, v in zip(grads, vectors, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return [torch.zeros_like(p) for p in params]
    # The vectors enter where backward begins: Σ gᵀv, were it computed, would have to be differentiated as well.
    outputs, weights = [g for g, _ in pairs], [v.to(g.dtype).reshape(g.shape) for g, v in pairs]
    found = torch.autograd.grad(outputs, list(params), weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if f is None else f for p, f in zip(params, found, strict=True)]


def hessian_block(grads: Sequence[Tensor | None], params: Sequence[Parameter], where: list[int], dense: bool) -> Tensor:
    """The Hessian of the parameters at `where` (flat, d × d) or its diagonal (d), by batched products."""
    chosen = [params[i] for i in where]
    sizes, like = [p.numel() for p in chosen], chosen[0]
    size = sum(sizes)
    # Gradients without a graph are constants: their rows are zero, and stay out.
    used = [i for i, at in enumerate(where) if (g := grads[at]) is not None and g.requires_grad]
    outputs = [g for i in used if (g := grads[where[i]]) is not None]
    if not used:
        return like.new_zeros((size, size) if dense else (size,))
    blocks = []
    for start in range(0, size, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, size)
        picks = _picks(start, stop, tuple(sizes), like.dtype, like.device)
        vectors = [
            picks[i].view(stop - start, *chosen[i].shape).to(g.dtype) for i, g in zip(used, outputs, strict=True)
        ]
        found = torch.autograd.grad(
            outputs, chosen, vectors, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        parts = [
            like.new_zeros(stop - start, n) if f is None else f.reshape(stop - start, n)
            for f, n in zip(found, sizes, strict=True)
        ]
        rows = (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]).to(like.dtype)
        blocks.append(rows if dense else rows.diagonal(start))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _picks(
    start: int, stop: int, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Rows `start` … `stop − 1` of the identity, in columns of these sizes; those of small models are kept."""
    make = _kept_picks if sum(sizes) <= _SMALL else _make_picks
    return make(start, stop, sizes, dtype, device)


def _make_picks(
    start: int, stop: int, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    rows = torch.zeros(stop - start, sum(sizes), dtype=dtype, device=device)
    rows.diagonal(start).fill_(1.0)
    return tuple(part.contiguous() for part in rows.split(sizes, dim=1))


_kept_picks = functools.lru_cache(8)(_make_picks)
