r"""Philox-4x32-10: a counter and a key become four random words.

J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, *Parallel random numbers: as easy as 1, 2, 3*, SC 2011: a keyed
bijection of 128-bit counters that passes TestU01's BigCrush.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORD = 2**32
MASK = WORD - 1
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key advances by from round to round
_FEW = 2**15  # words of two lanes up to which NumPy is ahead of torch, which takes several threads above


def philox(counter: Tensor | Sequence[Tensor], key: tuple[int, int]) -> Tensor:
    """Philox-4x32-10 (Salmon et al. 2011): four counter words to four random words.

    One round, with hi and lo the upper and lower 32 bits of a 64-bit product, is

        (c0, c1, c2, c3) ← (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))

    Args:
        counter: c0 … c3, 4 × any shape (or four tensors of that shape), int64 in [0, 2**32).
        key: k0 and k1, two ints in [0, 2**32).

    Returns:
        The four words, 4 × the same shape, int64 in [0, 2**32).

    Example:
        >>> zeros = torch.zeros(4, 1, dtype=torch.int64)
        >>> [f"{int(word):08x}" for word in philox(zeros, (0, 0))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    return torch.stack(_lanes(counter, key))


def _lanes(counter: Tensor | Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """`philox` before its lanes are stacked."""
    c0, c1, c2, c3 = counter
    even, odd = rounds(torch.stack((c0, c2)), torch.stack((c1, c3)), key)
    return even[0], odd[0], even[1], odd[1]


def rounds(even: Tensor, odd: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`philox` on lanes (0, 2), which get multiplied, and lanes (1, 3): two stacked tensors, 2 × any shape.

    Stacked, it takes half the operations. int64 products wrap modulo 2**64, so (product >> 32) & mask is the upper
    half even of a product that shows as negative. Lanes that are only xored may carry more than 32 bits until the
    mask. `odd` is used up.
    """
    pair = (2,) + (1,) * (even.dim() - 1)
    if even.is_cpu and even.numel() <= _FEW and not torch.compiler.is_compiling():
        return _few_rounds(even.numpy().view(np.uint64), odd.numpy().view(np.uint64), key, pair)
    schedule = torch.tensor(schedule_of(key), device=even.device).view(ROUNDS, *pair)
    even, product = even.clone(), torch.empty_like(even)
    for round_key in schedule.unbind():  # in place: fresh memory would cost more than the arithmetic
        torch.mul(even[0], MULTIPLIERS[0], out=product[1])
        torch.mul(even[1], MULTIPLIERS[1], out=product[0])
        torch.bitwise_right_shift(product, 32, out=even)
        even.bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(MASK)
        odd, product = product, odd
    return even, odd.bitwise_and_(MASK)


def _few_rounds(even: Any, odd: Any, key: tuple[int, int], pair: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`_rounds` by NumPy, whose operations on a few numbers take a third of the time of torch's."""
    mask, half = np.uint64(MASK), np.uint64(32)
    multipliers = np.array(MULTIPLIERS[::-1], np.uint64).reshape(pair)
    for round_key in np.array(schedule_of(key), np.uint64).reshape(ROUNDS, *pair):
        product = even[::-1] * multipliers
        even = product >> half
        even ^= odd
        even ^= round_key
        even &= mask
        odd = product
    return torch.from_numpy(even.view(np.int64)), torch.from_numpy((odd & mask).view(np.int64))


def schedule_of(key: tuple[int, int]) -> list[list[int]]:
    """The two key words of every round."""
    return [[(k + i * weyl) & MASK for k, weyl in zip(key, WEYL, strict=True)] for i in range(ROUNDS)]
