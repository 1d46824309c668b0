"""How the passes over large tensors run: eagerly in spans, with compiled noise, or compiled as a whole.

* "eager": torch operations on one span after the other. Nothing is compiled.
* "mixed": eager arithmetic, noise from one compiled kernel.
* "compiled": each pass is one kernel by `torch.compile`, with the noise made inside it.
* "auto": "compiled" for models of at least `LARGE` weights where a compiler works (else "mixed", else "eager"),
  nothing at all for smaller ones, which are stepped tensor by tensor.

All give the same numbers up to rounding, since all look up the same noise.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from expfam_poco.engine import kernels
from expfam_poco.engine.block import Block
from expfam_poco.engine.kernels import Evidence, Recipe
from expfam_poco.engine.tiles import Bucket, buckets
from expfam_poco.family.noise import TILE, Address, NoiseKey, address_of, tiled, traced

Call = TypeVar("Call", bound=Callable[..., Any])
BACKENDS = ("auto", "eager", "mixed", "compiled")
LARGE = 2**18
# Entries of a span. On a CPU its temporaries should fit the caches; compiled kernels have few, and calls cost more; an
# accelerator wants few, large launches.
SPANS = {"eager": 2**18, "mixed": 2**18, "compiled": 2**20}
SPAN_ELSEWHERE = 2**24
# Compiled kernels of the whole process, by what they are compiled for: a second optimizer finds those of the first.
_COMPILED: dict[tuple[Hashable, ...], Callable[..., Any]] = {}
SHORTEST = 16  # compilers treat a length of 1 as a case of its own


def plainly(function: Call) -> Call:
    """Run without gradients and outside of inference mode, whatever surrounds it: kernels are compiled for one case."""

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*arguments, **named)

    return run  # type: ignore[return-value]


def span_size(mode: str, device: torch.device) -> int:
    """How many entries of a tensor are worked on at a time."""
    return SPANS[mode] if device.type == "cpu" else SPAN_ELSEWHERE


class Backend:
    """Runs the kernels of `kernels`, compiles them where it is asked to, and keeps count of the time that takes.

    Args:
        name: one of `BACKENDS`.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend={name!r}: choose one of {', '.join(BACKENDS)}.")
        self.name = name
        self.compile_seconds = 0.0
        self.fallback: str | None = None
        self.buckets: dict[Block, Bucket] = {}
        self._assigned: list[Block] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy lays its own blocks into buckets."""
        return {**self.__dict__, "buckets": {}, "_assigned": []}

    def streams(self, weights: int) -> bool:
        """Whether a model of so many leafwise weights is stepped span by span."""
        return self.name != "auto" or weights >= LARGE

    def assign(self, blocks: Sequence[Block]) -> None:
        """Lay the small ones of these blocks into buckets, if that has not been done."""
        if self._assigned != list(blocks):
            self._assigned, self.buckets = list(blocks), buckets(blocks)

    @property
    def mode(self) -> str:
        """What "auto" has come to: "compiled", or what is left where compiling has failed."""
        if self.name != "auto":
            return self.name
        return "compiled" if self.fallback is None else self.fallback

    # ---- passes over one span ------------------------------------------------------------------------------

    def draw(self, recipe: Recipe, state: Any, source: Any, out: Tensor, dtype: torch.dtype) -> None:
        """Write θ into `out`."""
        self._run("draw", _draw, recipe, out, dtype, state, source)

    def collect(
        self, recipe: Recipe, state: Any, evidence: Evidence, total: Any, weight: float, ess: float, like: Tensor
    ) -> None:
        """total ← total + weight · natural gradient, in place."""
        packed = torch.tensor([weight, ess], dtype=torch.float64)
        self._run("collect", _collect, recipe, like, like.dtype, state, evidence, total, packed)

    def advance(self, recipe: Recipe, out: Tensor, dtype: torch.dtype, *arguments: Any) -> Tensor:
        """Step a span in place (`_advance`); returns how many weights were unsound and kept their values."""
        count: Tensor = self._run("advance", _advance, recipe, out, dtype, *arguments)
        return count

    def square(self, recipe: Recipe, like: Tensor, *arguments: Any) -> Tensor:
        """‖corrected gradient‖² over the momentum block of a span (`_square`)."""
        value: Tensor = self._run("square", _square, recipe, like, like.dtype, *arguments)
        return value

    def run(self, kernel: Callable[..., Any], constants: tuple[Hashable, ...], out: Tensor, *arguments: Any) -> Any:
        """Any other kernel on a span, compiled once for its constants: kernel(*constants, out, *arguments)."""
        if self.mode != "compiled" or out.numel() < SHORTEST:
            return kernel(*constants, out, *arguments)
        dtypes = tuple(value.dtype for value in (out, *arguments) if isinstance(value, Tensor))
        key = (kernel.__name__, *constants, out.device.type, *dtypes)
        return self._compiled(key, kernel, *constants)(out, *arguments)

    # ---- noise and compiling -------------------------------------------------------------------------------

    def noise(self, recipe: Recipe, key: NoiseKey, like: Tensor, tiles: Tensor | None = None) -> Tensor | Address:
        """Where a kernel finds one draw's noise for weights `like`: its address when compiled, else the noise."""
        if recipe.noise == "zero":
            return like.new_empty(0)
        size, kind = like.numel() * kernels.numbers_of(recipe.family), recipe.family.noise_kind
        if self.mode == "eager" or size < SHORTEST:
            if tiles is not None:
                return tiled(kind, tiles, key, like.dtype)
            return recipe.family.noise(like.shape, 1, key, dtype=like.dtype, device=like.device)[0]
        address = address_of(key, like.device, tiles)
        if self.mode == "compiled":
            return address
        out = torch.empty(size, dtype=like.dtype, device=like.device)
        self._compiled(("noise", kind, like.dtype, like.device.type), _noise, kind)(out, address)
        return out.view((*like.shape, *recipe.family.noise_dims))

    def _run(
        self, name: str, kernel: Callable[..., Any], recipe: Recipe, out: Tensor, dtype: torch.dtype, *arguments: Any
    ) -> Any:
        if self.mode != "compiled" or out.numel() < SHORTEST:
            return kernel(recipe, dtype, out, *arguments)
        kinds = tuple(argument is None or type(argument).__name__ for argument in arguments)
        known = (recipe, _identity(recipe.family), _identity(recipe.estimator))
        return self._compiled((name, *known, out.dtype, dtype, out.ndim, kinds), kernel, recipe, dtype)(out, *arguments)

    def _compiled(self, key: tuple[Hashable, ...], kernel: Callable[..., Any], *constants: Any) -> Callable[..., Any]:
        """The compiled kernel of this key; its first call, which compiles, is timed, and its failure survived."""
        compiled = _COMPILED.get(key) or _compile(kernel, constants)

        def run(*arguments: Any) -> Any:
            try:
                return compiled(*arguments) if key in _COMPILED else self._first(key, compiled, *arguments)
            except Exception as error:  # of Dynamo, of Inductor or of the compiler it calls: nothing has been run
                return self._without(error, key, kernel, *constants, *arguments)

        return run

    def _first(self, key: tuple[Hashable, ...], compiled: Callable[..., Any], *arguments: Any) -> Any:
        """The call that compiles, timed; what the compiler warns of is about itself."""
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = compiled(*arguments)
        _COMPILED[key] = compiled
        self.compile_seconds += time.perf_counter() - begun
        return result

    def _without(self, error: Exception, key: tuple[Hashable, ...], kernel: Callable[..., Any], *arguments: Any) -> Any:
        """Do it eagerly: for good where compiling has failed, this time only where it has worked before."""
        if key not in _COMPILED:
            if self.name != "auto":
                cause = getattr(error, "inner_exception", error)
                reason = next((line for line in str(cause).splitlines() if line.strip()), "no reason given").strip()
                raise RuntimeError(
                    f"backend={self.name!r}: torch.compile failed ({type(cause).__name__}: {reason}); use "
                    "backend='auto', or 'eager', which need no compiler."
                ) from error
            self.fallback = "mixed" if self.fallback is None and key[0] != "noise" else "eager"
        return kernel(*arguments)


def _compile(kernel: Callable[..., Any], constants: tuple[Any, ...]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return kernel(*constants, *arguments)

    # A code object of its own, for Dynamo counts recompilations by code object.
    name = f"{kernel.__name__}{len(_COMPILED)}"
    own = FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, dynamic=True, fullgraph=True)

    def run(*arguments: Any) -> Any:
        # The floats in reach are hyperparameters of the family, part of the kernel's key: constants, which nested
        # derivatives can take and symbols ("SymFloat") not. What changes from step to step comes in tensors.
        with torch._dynamo.config.patch(specialize_float=True):
            return compiled(*arguments)

    return run


def _identity(thing: Any) -> Hashable:
    """The object's id where it holds more than the fields by which it is compared, else None."""
    known = {entry.name for entry in dataclasses.fields(thing)}
    return None if vars(thing).keys() <= known else id(thing)


def _draw(recipe: Recipe, dtype: torch.dtype, out: Tensor, state: Any, source: Tensor | Address) -> None:
    out.copy_(kernels.draw(recipe, state, source, _like(out, dtype)))


def _collect(
    recipe: Recipe, dtype: torch.dtype, like: Tensor, state: Any, evidence: Evidence, total: Any, numbers: Tensor
) -> None:
    weight, ess = numbers.unbind()
    for value, new in zip(total, kernels.site(recipe, state, evidence, like, ess), strict=True):
        value.add_(new * weight)


def _advance(
    recipe: Recipe,
    dtype: torch.dtype,
    out: Tensor,
    state: Any,
    momentum: tuple[Tensor, ...],
    prior: Any,
    outer: Any,
    inside: Any,
    outside: Any,
    numbers: Tensor,
    real: Tensor | None,
    following: Tensor | Address | None,
) -> Tensor:
    """Step a span in place, its point into `out`; the number of unsound weights.

    `real` says which weights of a bucket are not gaps, and makes the number one for each tile. With `following`, the
    noise of the next draw, `out` becomes that draw in place of the point.
    """
    like = _like(out, dtype)
    moved = kernels.advance(recipe, state, momentum, prior, outer, inside, outside, numbers, like)
    sound = kernels.sound(recipe.family, moved, like)
    # A new field may be an old one itself (a λ remembered), which must be read before that is written.
    posterior = [new.clone() if any(new is old for old in state) else new for new in moved.posterior]
    for old, new in zip((*state, *momentum), (*posterior, *moved.momentum), strict=True):
        if old.ndim:  # a field without dimensions is the family's constant
            old.copy_(kernels.kept(sound, new, old))
    if following is None:
        out.copy_(recipe.family.point(state))
    else:
        out.copy_(kernels.draw(recipe, state, following, like))
    if sound is None:
        return torch.zeros((), dtype=torch.int64)
    return (~sound).sum() if real is None else (real & ~sound).view(-1, 4 * TILE).sum(1)


def _square(
    recipe: Recipe, dtype: torch.dtype, like: Tensor, state: Any, outer: Any, inside: Any, outside: Any, numbers: Tensor
) -> Tensor:
    found = kernels.corrected(recipe, state, outer, inside, outside, numbers, like)
    values = [getattr(found.site, name) for name in recipe.family.momentum_block]
    return torch.stack([(value * value).sum(dtype=torch.float64) for value in values]).sum()


def _noise(kind: str, out: Tensor, address: Address) -> None:
    out.copy_(traced(kind, out.numel(), address, out.dtype))


def _like(out: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the span's shape in the posterior's dtype; only its shape and dtype are used."""
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


EAGER = Backend("eager")
