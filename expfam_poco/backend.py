"""How the passes over large tensors run: eagerly in spans, with compiled noise, or compiled as a whole.

* "eager": torch operations on one span after the other. Nothing is compiled.
* "mixed": eager arithmetic, noise from one compiled kernel.
* "compiled": each pass is one kernel by `torch.compile`, with the noise made inside it.
* "auto": "compiled" for models of at least `LARGE` weights where a compiler works (else "mixed", else "eager"),
  nothing at all for smaller ones, which are stepped tensor by tensor.

All give the same numbers up to rounding, since all look up the same noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .kernels import Evidence, Recipe
from .noise import NoiseKey, key_words, traced

BACKENDS = ("auto", "eager", "mixed", "compiled")
LARGE = 2**20
# Entries of a span. On a CPU its temporaries should fit the caches; compiled kernels have few, and calls cost more; an
# accelerator wants few, large launches.
SPANS = {"eager": 2**18, "mixed": 2**18, "compiled": 2**20}
SPAN_ELSEWHERE = 2**24
SHORTEST = 16  # compilers treat a length of 1 as a case of its own


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
        self._cache: dict[Hashable, Callable[..., Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Compiled kernels cannot be copied; a copy compiles its own."""
        return {**self.__dict__, "_cache": {}}

    def streams(self, weights: int) -> bool:
        """Whether a model of so many leafwise weights is stepped span by span."""
        return self.name != "auto" or weights >= LARGE

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

    def collect(self, recipe: Recipe, state: Any, evidence: Evidence, total: Any, weight: float, like: Tensor) -> None:
        """total ← total + weight · natural gradient, in place."""
        packed = torch.tensor(weight, dtype=torch.float64)
        self._run("collect", _collect, recipe, like, like.dtype, state, evidence, total, packed)

    def advance(
        self,
        recipe: Recipe,
        state: Any,
        momentum: tuple[Tensor, ...],
        prior: Any,
        outer: Any,
        inside: Any,
        outside: Any,
        numbers: kernels.Numbers,
        out: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Step a span in place, its point into `out`; returns how many weights were unsound and kept their values."""
        arguments = (state, momentum, prior, outer, inside, outside, numbers.packed())
        count: Tensor = self._run("advance", _advance, recipe, out, dtype, *arguments)
        return count

    def square(
        self, recipe: Recipe, state: Any, outer: Any, inside: Any, outside: Any, numbers: kernels.Numbers, like: Tensor
    ) -> Tensor:
        """‖corrected gradient‖² over the momentum block of a span."""
        arguments = (state, outer, inside, outside, numbers.packed())
        value: Tensor = self._run("square", _square, recipe, like, like.dtype, *arguments)
        return value

    # ---- noise and compiling -------------------------------------------------------------------------------

    def noise(self, recipe: Recipe, key: NoiseKey, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Any:
        """Where a kernel finds one draw's noise: its address when compiled, else the noise itself."""
        if recipe.noise == "zero":
            return torch.empty(0, dtype=dtype, device=device)
        size = shape.numel()
        if self.mode == "compiled" and size >= SHORTEST:
            return key_words(key, device)
        if self.mode == "mixed" and size >= SHORTEST:
            out = torch.empty(size, dtype=dtype, device=device)
            key_parts = ("noise", recipe.family.noise_kind, dtype, device.type)
            self._compiled(key_parts, _noise, recipe.family.noise_kind)(out, key_words(key, device))
            return out.view(shape)
        return recipe.family.noise(shape, 1, key, dtype=dtype, device=device)[0]

    def _run(
        self, name: str, kernel: Callable[..., Any], recipe: Recipe, out: Tensor, dtype: torch.dtype, *arguments: Any
    ) -> Any:
        if self.mode != "compiled" or out.numel() < SHORTEST:
            return kernel(recipe, dtype, out, *arguments)
        kinds = tuple(argument is None or type(argument).__name__ for argument in arguments)
        return self._compiled((name, recipe, out.dtype, dtype, out.ndim, kinds), kernel, recipe, dtype)(out, *arguments)

    def _compiled(self, key: Hashable, kernel: Callable[..., Any], *constants: Any) -> Callable[..., Any]:
        """The compiled kernel of this key; its first call, which compiles, is timed."""
        if key in self._cache:
            return self._cache[key]

        def call(*arguments: Any) -> Any:
            return kernel(*constants, *arguments)

        # A code object of its own, for Dynamo counts recompilations by code object.
        name = f"{kernel.__name__}{len(self._cache)}"
        closed = FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)
        compiled = torch.compile(closed, dynamic=True, fullgraph=True)

        def first(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = compiled(*arguments)
            self.compile_seconds += time.perf_counter() - begun
            self._cache[key] = compiled
            return result

        return first


def _draw(recipe: Recipe, dtype: torch.dtype, out: Tensor, state: Any, source: Tensor) -> None:
    out.copy_(kernels.draw(recipe, state, source, _like(out, dtype)))


def _collect(
    recipe: Recipe, dtype: torch.dtype, like: Tensor, state: Any, evidence: Evidence, total: Any, weight: Tensor
) -> None:
    for value, new in zip(total, kernels.site(recipe, state, evidence, like), strict=True):
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
) -> Tensor:
    moved, sound = kernels.advance(recipe, state, momentum, prior, outer, inside, outside, numbers, _like(out, dtype))
    all_sound = not torch.compiler.is_compiling() and bool(sound.all())
    for old, new in zip((*state, *momentum), (*moved.posterior, *moved.momentum), strict=True):
        if old.ndim:  # a field without dimensions is the family's constant
            old.copy_(new if all_sound else kernels.kept(sound, new, old))
    out.copy_(recipe.family.point(state))
    return (~sound).sum()


def _square(
    recipe: Recipe, dtype: torch.dtype, like: Tensor, state: Any, outer: Any, inside: Any, outside: Any, numbers: Tensor
) -> Tensor:
    found = kernels.corrected(recipe, state, outer, inside, outside, numbers, like)
    values = [getattr(found.site, name) for name in recipe.family.momentum_block]
    return torch.stack([(value * value).sum(dtype=torch.float64) for value in values]).sum()


def _noise(kind: str, out: Tensor, address: Tensor) -> None:
    out.copy_(traced(kind, out.numel(), address, out.dtype))


def _like(out: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the span's shape in the posterior's dtype; only its shape and dtype are used."""
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
