r"""Noise that is looked up, not drawn: a pure function of where it is used.

An ordinary generator hands out numbers in the order in which they are asked for, so whoever wants the same
noise twice must store the numbers or the generator's state. Posterior correction wants the same noise often:
a mini-batch gradient at θ_in ~ q_in and its partner at θ_out ~ q_out cancel best under one standardised
noise, a resumed run has to continue bit for bit, and a parameter spread over several devices has to see what
the whole parameter would have seen. Here noise is therefore a function

    ε = f(seed, stream, step, draw, parameter, element)

whose arguments, all but the element, travel in a `NoiseKey`. It takes no memory, has no state, can be
evaluated anywhere in any order, and is the same on every device (the words bit for bit, the floating-point
values up to the rounding of that device's logarithm and cosine).

**The words.** `philox` is Philox-4x32-10 (J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, *Parallel
random numbers: as easy as 1, 2, 3*, SC 2011): a keyed bijection of 128-bit counters that passes TestU01's
BigCrush. One counter yields a *block* of four 32-bit words, its lanes. The layout is part of the library's
format, for a resumed run depends on it:

    c0 = block               c2 = step                      k0 = seed modulo 2**32
    c1 = parameter           c3 = stream * 2**24 + draw     k1 = seed // 2**32

Elements come in *tiles* of 4 × 64. With r = e % 256, element e owns lane r // 64 of block 64 (e // 256) + r % 64:
64 blocks side by side fill a tile lane by lane, which vector units do without shuffling. Different addresses have
different counters or lanes, so within a seed no word is used twice.

**The noise.** Every kind maps lanes (0, 1) and lanes (2, 3) of a block to noise, so that an element needs nothing
outside its own block. A word x stands for the probability u = (x + ½) / 2**32, which is never 0 or 1.

**Compiled.** `traced` is the same function as `noise`, written so that `torch.compile` makes one loop of it; the
values agree up to the rounding of logarithm and cosine.

**Precision.** One word makes one element whatever the dtype, so float32 and float64 noise are one stream up
to rounding. In float16 and bfloat16, normal and logistic noise is the float32 noise rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.family.philox import MASK, MULTIPLIERS, ROUNDS, WORD, philox, rounds, schedule_of
from expfam_poco.family.transfer import on_device

__all__ = [
    "Address",
    "NoiseKey",
    "address_of",
    "noise",
    "philox",
    "quantile",
    "reflect",
    "tiled",
    "tiles_of",
    "traced",
    "words",
]

_DRAWS = 2**24
_ELEMENTS = 4 * WORD
TILE = 64  # blocks
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Elements made at a time. On a CPU the temporaries of one pass should fit the cache, and be so small that the
# allocator need not map fresh pages for each; an accelerator wants few large launches, in bounded memory.
_SPAN = {"cpu": 2**18}
_SPAN_ELSEWHERE = 2**22


# The counters of a key: their limits, as shown, and what to do about larger ones.
_LIMITS = {
    "seed": (2**64, "2**64", "reduce it modulo 2**64"),
    "stream": (2**8, "2**8", "number the streams from 0"),
    "step": (WORD, "2**32", "count steps from 0 and change the seed after 2**32"),
    "parameter": (WORD, "2**32", "number the parameters from 0"),
    "offset": (_ELEMENTS, "2**34", "split the tensor into several parameters"),
    "draw": (_DRAWS, "2**24", "number the draws from 0 within a step"),
}


@dataclass(frozen=True)
class NoiseKey:
    """The address of some noise: all that it depends on but the element.

    `seed` names the run. `stream` keeps uses apart that share the other counters (inner steps and posterior
    samples, say). `step` and `parameter` number optimizer steps and parameters. `offset` is the index of a
    tensor's first element within its whole flattened parameter, so that a shard or a chunk sees exactly its
    slice of the whole parameter's noise; any index will do. `draw` is the number of the first draw, so that
    draws can be made one at a time as well as together.

    Raises:
        ValueError: a counter is not an int in its range, see the module's layout.

    >>> NoiseKey(seed=7, step=1).at(parameter=2)
    NoiseKey(seed=7, stream=0, step=1, parameter=2, offset=0, draw=0)
    """

    seed: int
    stream: int = 0
    step: int = 0
    parameter: int = 0
    offset: int = 0
    draw: int = 0

    def __post_init__(self) -> None:
        _check(self.__dict__)

    def at(self, **counters: int) -> NoiseKey:
        """This key with the named counters replaced: `key.at(step=3, parameter=1)`."""
        _check(counters)
        made = object.__new__(NoiseKey)  # the other counters have been checked
        made.__dict__.update(self.__dict__, **counters)
        return made


def _check(counters: Mapping[str, Any]) -> None:
    for name, value in counters.items():
        limit, shown_limit, remedy = _LIMITS[name]
        if not (type(value) is int or isinstance(value, int)) or not 0 <= value < limit:
            raise ValueError(f"{name} must be an int from 0 to {shown_limit} - 1, got {value!r}: {remedy}.")


# ---- words ------------------------------------------------------------------------------------------------


def words_of_tiles(
    first: int, stop: int, draws: int, key: NoiseKey, device: torch.device, steps: int = 1
) -> tuple[Tensor, Tensor]:
    """The words of tiles `first` … `stop - 1`: lanes (0, 2) and (1, 3), each 2 × steps draws × 64 (stop - first)."""
    block = torch.arange(TILE * first, TILE * stop, device=device).expand(steps * draws, -1)
    parameter = torch.full((), key.parameter, dtype=torch.int64, device=device)
    return _words_of(block, parameter, draws, key, steps)


def _words_of(block: Tensor, parameter: Tensor, draws: int, key: NoiseKey, steps: int = 1) -> tuple[Tensor, Tensor]:
    """The words of blocks, steps draws × any number, of the parameters of these numbers (which broadcast)."""
    step = torch.arange(key.step, key.step + steps, device=block.device).view(-1, 1).expand(-1, draws).reshape(-1)
    draw = torch.arange(key.draw, key.draw + draws, device=block.device).add_(key.stream * _DRAWS).repeat(steps)
    even = torch.stack((block, step.unsqueeze(-1).expand_as(block)))
    odd = torch.stack((parameter.expand_as(block), draw.unsqueeze(-1).expand_as(block)))
    return rounds(even, odd, (key.seed & MASK, key.seed >> 32))


def in_order(even: Tensor, odd: Tensor) -> Tensor:
    """Lanes (0, 2) and (1, 3), each 2 × draws × 64 tiles, as draws × elements."""
    lanes = torch.stack((even, odd), 1)
    return lanes.reshape(4, even.shape[1], -1, TILE).permute(1, 2, 0, 3).flatten(1)


def words(shape: Sequence[int], draws: int, key: NoiseKey, device: torch.device | str = "cpu") -> Tensor:
    """One random 32-bit word for each element, draws × shape, int64 in [0, 2**32).

    Element e is counted from `key.offset` in row-major order, draw k from `key.draw`; see the module's layout.

    >>> whole = words((6,), 1, NoiseKey(seed=7))
    >>> torch.equal(whole[:, 2:], words((4,), 1, NoiseKey(seed=7, offset=2)))
    True
    """
    return _map_words(lambda even, odd: (even, odd), shape, draws, key, torch.int64, torch.device(device))


def _map_words(
    from_words: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    shape: Sequence[int],
    draws: int,
    key: NoiseKey,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`from_words` of every element's lanes, draws × shape, made some tiles at a time to bound temporaries."""
    size = math.prod(shape)
    start, stop = key.offset, key.offset + size
    if not isinstance(draws, int) or not 1 <= draws <= _DRAWS - key.draw:
        raise ValueError(
            f"draws must be an int from 1 to 2**24 - {key.draw} (the key's first draw), got {draws!r}:"
            " take further draws from another stream or step."
        )
    if stop > _ELEMENTS:
        raise ValueError(
            f"shape {tuple(shape)} must end within the 2**34 elements of a parameter, but starts at offset"
            f" {start}: split the tensor into several parameters."
        )

    def made(begin: int, end: int) -> Tensor:
        first = begin // (4 * TILE)
        aligned = in_order(*from_words(*words_of_tiles(first, -(-end // (4 * TILE)), draws, key, device)))
        return aligned[:, begin - 4 * TILE * first : end - 4 * TILE * first]

    span = max(4 * TILE, _SPAN.get(device.type, _SPAN_ELSEWHERE) // draws)
    if 0 < size <= span:
        return made(start, stop).to(dtype).reshape(draws, *shape)
    whole = torch.empty((draws, size), dtype=dtype, device=device)
    for begin in range(start, stop, span):
        end = min(begin + span, stop)
        whole[:, begin - start : end - start] = made(begin, end)
    return whole.view(draws, *shape)


# ---- kinds ------------------------------------------------------------------------------------------------


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _normal(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Box–Muller: √(−2 log u) (cos 2πv, sin 2πv)."""
    wide = _at_least_float32(dtype)
    radius = torch.sqrt(torch.log((first.to(wide) + 0.5) * (1 / WORD)) * -2.0)
    angle = (second.to(wide) + 0.5) * (2 * math.pi / WORD)
    return torch.cos(angle) * radius, torch.sin(angle) * radius


def _each(
    function: Callable[[Tensor, torch.dtype], Tensor],
) -> Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]:
    """A function of one word, applied to both lanes."""
    return lambda first, second, dtype: (function(first, dtype), function(second, dtype))


def _logistic(word: Tensor, dtype: torch.dtype) -> Tensor:
    """½ log(u / (1 − u)), with 1 − u formed from integers: accurate in both tails in float32 as well."""
    u, complement = word.to(_at_least_float32(dtype)) + 0.5, (word ^ MASK).to(_at_least_float32(dtype)) + 0.5
    return torch.log(u / complement) * 0.5


def _uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    """The centre of one of 2**bits equal cells of (0, 1), as many as have centres exact in `dtype`."""
    bits = min(32, round(-math.log2(torch.finfo(dtype).eps)))
    return ((word >> (32 - bits)).to(dtype) + 0.5) * 2.0**-bits


def _rademacher(word: Tensor, dtype: torch.dtype) -> Tensor:
    """The sign of u − ½, which is the word's highest bit."""
    return (word >> 31).to(dtype) * 2 - 1


class _Kind(NamedTuple):
    """How two lanes of words become noise of a dtype, the noise's antithetic partner, and its quantile function."""

    from_words: Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]
    reflect: Callable[[Tensor], Tensor]
    quantile: Callable[[Tensor], Tensor]


_KINDS = {
    "normal": _Kind(_normal, torch.neg, torch.special.ndtri),
    "logistic": _Kind(_each(_logistic), torch.neg, lambda u: 0.5 * torch.logit(u)),
    "uniform": _Kind(_each(_uniform), lambda noise: 1 - noise, torch.clone),
    "rademacher": _Kind(_each(_rademacher), torch.neg, lambda u: torch.where(u < 0.5, -1.0, 1.0).to(u.dtype)),
}


def kind_of(name: str) -> _Kind:
    if name not in _KINDS:
        raise ValueError(f"kind {name!r} is not a known noise: choose one of {', '.join(_KINDS)}.")
    return _KINDS[name]


def noise(
    kind: str,
    shape: Sequence[int],
    draws: int,
    key: NoiseKey,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standardised noise at an address, draws × shape.

    Args:
        kind: "normal": N(0, 1) by Box–Muller, at most 6.77 in magnitude. "logistic": ½ log(u / (1 − u)), half
            a standard logistic, the noise of binary concrete variables. "uniform": on (0, 1), both ends
            excluded in the dtype itself, with 32 bits in float64, 23 in float32, 10 in float16 and 7 in
            bfloat16. "rademacher": ±1 with equal probability.
        shape: the shape of one draw.
        draws: how many draws, numbered from `key.draw`.
        key: the address of the first element of the first draw.
        dtype: float16, bfloat16, float32 or float64.
        device: where to make the noise.

    >>> key = NoiseKey(seed=7)
    >>> noise("normal", (2, 3), 4, key).shape
    torch.Size([4, 2, 3])
    >>> torch.equal(noise("normal", (6,), 1, key.at(offset=2)), noise("normal", (8,), 1, key)[:, 2:])
    True
    """
    from_words = kind_of(kind).from_words
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype} cannot hold noise: choose one of {', '.join(map(str, _DTYPES))}.")
    return _map_words(lambda even, odd: from_words(even, odd, dtype), shape, draws, key, dtype, torch.device(device))


def reflect(kind: str, noise: Tensor) -> Tensor:
    """The antithetic partner of `noise`, any shape: mirrored about the median, equal in distribution.

    >>> reflect("uniform", torch.tensor([0.25]))
    tensor([0.7500])
    """
    return kind_of(kind).reflect(noise)


def quantile(kind: str, u: Tensor) -> Tensor:
    """The noise value at probability `u` in (0, 1), any shape: expectations by quadrature over `u`.

    >>> quantile("logistic", torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    tensor([-0.5493,  0.0000,  0.5493], dtype=torch.float64)
    """
    return kind_of(kind).quantile(u)


class Address(NamedTuple):
    """Where noise is, as tensors: `words` and perhaps `tiles`.

    `words` (27, int64) are the first block, c1, c2, c3, ten round keys, and the generator's two multipliers and mask,
    which as constants would not fit the 32 bits that compilers give to indices.

    `tiles` is for several short tensors side by side, 2 × number of tiles: the first block and the parameter of
    every tile, in place of those among the words.
    """

    words: Tensor
    tiles: Tensor | None = None


def address_of(key: NoiseKey, device: torch.device | str = "cpu", tiles: Tensor | None = None) -> Address:
    """The address as `traced` wants it.

    Raises:
        ValueError: if `key.offset` is not the beginning of a tile.
    """
    if key.offset % (4 * TILE):
        raise ValueError(f"offset={key.offset}: compiled noise begins with a tile; give a multiple of {4 * TILE}.")
    counters = [key.offset // 4, key.parameter, key.step, key.stream * _DRAWS + key.draw]
    schedule = [word for pair in schedule_of((key.seed & MASK, key.seed >> 32)) for word in pair]
    words = [*counters, *schedule, *MULTIPLIERS, MASK]
    return Address(on_device(words, torch.int64, torch.device(device)), tiles)


def tiles_of(parameters: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """`Address.tiles` for tensors of these sizes side by side, each beginning with a tile of its own.

    >>> tiles_of([3, 5], [300, 10]).tolist()
    [[0, 64, 0], [3, 3, 5]]
    """
    counts = [-(-size // (4 * TILE)) for size in sizes]
    blocks = [TILE * tile for count in counts for tile in range(count)]
    numbers = [number for number, count in zip(parameters, counts, strict=True) for _ in range(count)]
    return torch.tensor([blocks, numbers])


def tiled(kind: str, tiles: Tensor, key: NoiseKey, dtype: torch.dtype) -> Tensor:
    """One draw of noise for the tensors of `tiles_of`, 256 elements for every tile.

    >>> key = NoiseKey(seed=7)
    >>> beside = tiled("normal", tiles_of([3, 5], [300, 10]), key, torch.float32)
    >>> torch.equal(beside[512:522], noise("normal", (10,), 1, key.at(parameter=5))[0])
    True
    """
    return tiled_steps(kind, tiles, key, dtype, 1)[0]


def tiled_steps(kind: str, tiles: Tensor, key: NoiseKey, dtype: torch.dtype, steps: int) -> Tensor:
    """`tiled` for several steps from the key's on, steps × elements."""
    from_words = kind_of(kind).from_words
    block, parameter = (part.expand(-1, TILE).reshape(1, -1).expand(steps, -1) for part in _blocks_of(tiles))
    return in_order(*from_words(*_words_of(block, parameter, 1, key, steps), dtype)).to(dtype)


def _blocks_of(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the blocks of every tile, tiles × 64, and of their parameter, tiles × 1."""
    return tiles[0].unsqueeze(-1) + torch.arange(TILE, device=tiles.device), tiles[1].unsqueeze(-1)


def traced(kind: str, size: int, address: Address, dtype: torch.dtype) -> Tensor:
    """One draw of noise, `size` elements from the address on: for use inside `torch.compile`.

    Args:
        kind: as in `noise`.
        size: how many elements.
        address: `address_of` the first one.
        dtype: of the result.

    >>> key = NoiseKey(seed=7, step=3)
    >>> torch.allclose(traced("normal", 300, address_of(key), torch.float32), noise("normal", (300,), 1, key)[0])
    True
    """
    from_words = kind_of(kind).from_words
    words, tiles = address
    if tiles is None:
        c0 = torch.arange((size + 4 * TILE - 1) // (4 * TILE) * TILE, device=words.device).view(-1, TILE) + words[0]
        c1 = words[1]
    else:
        c0, c1 = _blocks_of(tiles)
    c2, c3 = words[2], words[3]
    first, second, mask = words[-3:].unbind()
    for i in range(ROUNDS):
        product0, product2 = c0 * first, c2 * second
        c0 = ((product2 >> 32) ^ c1 ^ words[4 + 2 * i]) & mask
        c2 = ((product0 >> 32) ^ c3 ^ words[5 + 2 * i]) & mask
        c1, c3 = product2, product0
    lanes = (*from_words(c0, c1 & mask, dtype), *from_words(c2, c3 & mask, dtype))
    return torch.stack(lanes, 1).view(-1)[:size].to(dtype)


# ---- look-ahead -------------------------------------------------------------------------------------------
