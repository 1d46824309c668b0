"""How the passes over large tensors run: eagerly in tiles, with compiled noise, or compiled as a whole.

* "eager": torch operations on one tile after the other. Nothing is compiled.
* "mixed": eager arithmetic, noise from one compiled kernel.
* "compiled": each pass is one kernel by `torch.compile`, with the noise made inside it.
* "auto": "compiled" for models of at least `LARGE` weights where a compiler works (else "mixed", else "eager"),
  nothing at all for smaller ones, which are stepped tensor by tensor.

All give the same numbers up to rounding, since all look up the same noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from expfam_poco.arguments import choice
from expfam_poco.engine import fused, inner_loop, kernels, passes
from expfam_poco.engine.fused import Pass, Places, Programs
from expfam_poco.engine.inner_loop import Batches, Kind
from expfam_poco.engine.kernels import Constants, Evidence, Moved, Numbers, Weights
from expfam_poco.engine.triton_code import Unprintable
from expfam_poco.family import fields, hyperparameters, recording
from expfam_poco.family.ahead import Ahead
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.noise import TILE, Address, NoiseKey, address_of, traced
from expfam_poco.family.transfer import gathered

Call = TypeVar("Call", bound=Callable[..., Any])
BACKENDS = ("auto", "eager", "mixed", "compiled")
LARGE = 2**18
# Entries of a tile of weights. On a CPU its temporaries should fit the caches; compiled kernels have few, and calls
# cost more; an accelerator wants few, large launches.
TILES = {"eager": 2**18, "mixed": 2**18, "compiled": 2**20}
TILE_ELSEWHERE = 2**24
# Compiled kernels of the whole process, by what they are compiled for: a second optimizer finds those of the first.
_COMPILED: dict[tuple[Hashable, ...], Callable[..., Any]] = {}
SHORTEST = 16  # compilers treat a length of 1 as a case of its own


def plainly(function: Call) -> Call:
    """Run without gradients and outside of inference mode and autocast, whatever surrounds it.

    Kernels are compiled for one case, and products of a family's matrices keep their precision.
    """

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        casting: bool = torch._C._is_any_autocast_enabled()
        if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not casting:
            return function(*arguments, **named)
        with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
            for kind in _kinds_of_devices() if casting else ():
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*arguments, **named)

    return run  # type: ignore[return-value]


@functools.cache
def _kinds_of_devices() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def tile_size(mode: str, device: torch.device) -> int:
    """How many entries of a tensor are worked on at a time."""
    return TILES[mode] if device.type == "cpu" else TILE_ELSEWHERE


class Backend:
    """Runs the kernels of `kernels`, compiles them where it is asked to, and keeps count of the time that takes.

    Args:
        name: one of `BACKENDS`.
    """

    def __init__(self, name: str) -> None:
        choice("backend", name, BACKENDS, f"choose one of {', '.join(BACKENDS)}")
        self.name = name
        self.compile_seconds = 0.0
        self.fallback: str | None = None
        self._ahead = Ahead()
        self._unprintable: set[Hashable] = set()

    def in_place(self, weights: int) -> bool:
        """Whether a model of so many leafwise weights is stepped tile by tile, in place."""
        return self.name != "auto" or weights >= LARGE

    @property
    def mode(self) -> str:
        """What "auto" has come to: "compiled", or what is left where compiling has failed."""
        if self.name != "auto":
            return self.name
        return "compiled" if self.fallback is None else self.fallback

    # ---- passes over one tile ------------------------------------------------------------------------------

    def draw(self, constants: Constants, out: Tensor, dtype: torch.dtype, *arguments: Any) -> None:
        """Write θ into `out` (`_draw`)."""
        self._run("draw", _draw, constants, out, dtype, *arguments)

    def collect(
        self, constants: Constants, state: Any, evidence: Evidence, total: Any, weight: float, ess: Any, like: Tensor
    ) -> None:
        """total ← total + weight · natural gradient, in place."""
        self._run("collect", _collect, constants, like, like.dtype, state, evidence, total, Pair(weight, ess))

    def advance(self, constants: Constants, out: Tensor, dtype: torch.dtype, *arguments: Any) -> Tensor:
        """Step a tile in place (`_advance`); returns how many weights were unsound and kept their values."""
        count: Tensor = self._run("advance", _advance, constants, out, dtype, *arguments)
        return count

    def square(self, constants: Constants, like: Tensor, *arguments: Any) -> Tensor:
        """‖corrected gradient‖² over the momentum block of a tile (`_square`)."""
        value: Tensor = self._run("square", _square, constants, like, like.dtype, *arguments)
        return value

    def run(self, kernel: Callable[..., Any], constants: tuple[Hashable, ...], out: Tensor, *arguments: Any) -> Any:
        """Any other kernel on a tile, compiled once for its constants: kernel(*constants, out, *arguments)."""
        if self.mode != "compiled" or out.numel() < SHORTEST:
            return kernel(*constants, out, *arguments)
        dtypes = tuple(value.dtype for value in (out, *arguments) if isinstance(value, Tensor))
        key = (kernel.__name__, *constants, out.device.type, *dtypes)
        return self._compiled(key, kernel, *constants)(out, *arguments)

    def loop(
        self, kind: Kind, weights: Weights, x: Tensor, y: Tensor, batches: Batches, *, compiled: bool
    ) -> tuple[Moved, Tensor]:
        """An inner loop (`inner_loop`), step by step or as one C++ function."""
        if not compiled:
            return inner_loop.eager(kind, weights, x, y, batches)
        constants, noise = kind.constants, batches.noise
        drawn = noise[0] if constants.noise == "zero" else torch.stack(list(noise))
        known = (kind, _identity(constants.family), _identity(constants.estimator), x.dtype, weights.memory is None)
        run = self._compiled(("inner loop", *known), inner_loop.scanned, kind)
        values, losses = run(x, y, weights, batches.rows, inner_loop.packed(batches.numbers), drawn)
        return Moved(*inner_loop.replaced(kind, weights, values)[:3]), losses

    # ---- passes over a whole block as kernels of their own ------------------------------------------------------

    def makes_noise(self, constants: Constants, device: torch.device) -> bool:
        """Whether the noise of whole blocks of this family can be made by a kernel of `fused`."""
        return self.mode == "compiled" and kernels.is_flat(constants.family) and fused.is_at_hand(device)

    def fuses(self, constants: Constants, device: torch.device) -> bool:
        """Whether all passes over whole blocks of this family are kernels of `fused`, as far as is known."""
        return kernels.is_flat(constants.family) and self.fuses_all(_family_of(constants), device)

    def fused(
        self,
        function: Callable[..., Any],
        constants: Constants,
        programs: Programs,
        dtype: torch.dtype,
        targets: Sequence[Tensor | Places],
        *arguments: Any,
    ) -> Tensor | None:
        """Run one of `passes` over a whole block (`launched`)."""
        key = (function.__name__, constants, _identity(constants.family), _identity(constants.estimator))
        what = Pass(functools.partial(function, constants), key, constants.family.noise_kind, dtype)
        whose = _family_of(constants), type(constants.family).__name__
        return self.launched(what, whose, programs, targets, *arguments)

    def fuses_all(self, whose: Hashable, device: torch.device) -> bool:
        """Whether a kernel of `fused` for this may be tried on the device: none has failed."""
        return self.mode == "compiled" and fused.is_at_hand(device) and whose not in self._unprintable

    def launched(
        self,
        what: Pass,
        whose: tuple[Hashable, str],
        programs: Programs,
        targets: Sequence[Tensor | Places],
        *arguments: Any,
    ) -> Tensor | None:
        """Run a pass as a kernel (`fused.run`); None, and a warning, where that cannot be done.

        `whose`: what fails with it, and its name.
        """
        begun, known = time.perf_counter(), len(fused.KERNELS)
        try:
            sums = fused.run(what, programs, targets, *arguments)
        except Unprintable as error:
            self._unprintable.add(whose[0])
            warnings.warn(
                f"backend={self.name!r}: {whose[1]} gets no kernel of its own ({error}); steps are left to "
                "torch.compile, which is slower on a GPU.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        if len(fused.KERNELS) > known:
            self.compile_seconds += time.perf_counter() - begun
        return sums

    # ---- noise and compiling -------------------------------------------------------------------------------

    def noise(
        self,
        constants: Constants,
        key: NoiseKey,
        like: Tensor,
        tiles: Tensor | None = None,
        programs: Programs | None = None,
    ) -> Tensor | Address:
        """Where a kernel finds one draw's noise for weights `like`: its address when compiled, else the noise.

        Args:
            constants: of the kernel.
            key: of the noise.
            like: a tensor of the weights' shape, dtype and device.
            tiles: those of a flat block.
            programs: those of a block of which these are all weights, where the noise is to be made by them.
        """
        if constants.noise == "zero":
            return like.new_empty(0)
        size, kind = like.numel() * kernels.numbers_of(constants.family), constants.family.noise_kind
        plain = self.mode == "eager" or size < SHORTEST
        if (plain and recording.active is None) or key.offset % (4 * TILE):  # compiled noise begins with a tile
            if tiles is not None:
                return self._ahead.tiled(kind, tiles, key, like.dtype)
            family = constants.family
            if type(family).noise is not ExponentialFamily.noise:
                return family.noise(like.shape, 1, key, dtype=like.dtype, device=like.device)[0]
            shape = (*like.shape, *family.noise_dims)
            return self._ahead.noise(kind, shape, 1, key, dtype=like.dtype, device=like.device)[0]
        if programs is not None and not plain:
            made = constants.family.neutral_noise(like)  # in the gaps of a flat block
            if self.fused(passes.noised, constants, programs, like.dtype, [made], key) is not None:
                return made
        address = address_of(key, like.device, tiles)
        if plain or self.mode == "compiled":
            return address
        out = torch.empty(size, dtype=like.dtype, device=like.device)
        self._compiled(("noise", kind, like.dtype, like.device.type), _noise, kind)(out, address)
        return out.view((*like.shape, *constants.family.noise_dims))

    def _run(
        self,
        name: str,
        kernel: Callable[..., Any],
        constants: Constants,
        out: Tensor,
        dtype: torch.dtype,
        *arguments: Any,
    ) -> Any:
        if self.mode != "compiled" or out.numel() < SHORTEST:
            return kernel(constants, dtype, out, *arguments)
        arguments = tuple(
            argument.packed(out.device) if isinstance(argument, Numbers | Pair) else argument for argument in arguments
        )
        kinds = tuple(map(_kind_of, arguments))
        family, own = hyperparameters.lifted(constants.family)
        if own:
            constants, kernel = dataclasses.replace(constants, family=family), _LIFTED[kernel]
            arguments = own, *arguments
        known = (constants, _identity(family), _identity(constants.estimator))
        return self._compiled((name, *known, out.dtype, dtype, out.ndim, kinds), kernel, constants, dtype)(
            out, *arguments
        )

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
        with warnings.catch_warnings(), _quiet("torch._inductor.ir"):
            warnings.simplefilter("ignore")
            result = compiled(*arguments)
        _COMPILED[key] = compiled
        self.compile_seconds += time.perf_counter() - begun
        return result

    def _without(self, error: Exception, key: tuple[Hashable, ...], kernel: Callable[..., Any], *arguments: Any) -> Any:
        """Do it eagerly: for good where compiling has failed, this time only where it has worked before."""
        if key not in _COMPILED:
            if self.name != "auto":
                raise RuntimeError(
                    f"backend={self.name!r}: torch.compile failed ({_reason(error)}); use backend='auto', or 'eager', "
                    "which need no compiler."
                ) from error
            self.fallback = "mixed" if self.fallback is None and key[0] != "noise" else "eager"
            self._warn(error)
        return kernel(*arguments)

    def _warn(self, error: Exception) -> None:
        """Say, once, what could not be compiled and what that costs."""
        warnings.warn(
            f"backend='auto': compiling failed ({_reason(error)}); steps go on without it ({self.fallback}), several "
            "times slower. Give backend='eager' to do without the compiler and this warning.",
            RuntimeWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Let a logger say no more than errors."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _reason(error: Exception) -> str:
    """The compiler's complaint in one line."""
    cause = getattr(error, "inner_exception", error)
    line = next((line for line in str(cause).splitlines() if line.strip()), "no reason given").strip()
    return f"{type(cause).__name__}: {line}"


def _compile(kernel: Callable[..., Any], constants: tuple[Any, ...]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return kernel(*constants, *arguments)

    # A code object of its own, for Dynamo counts recompilations by code object.
    name = f"{kernel.__name__}{len(_COMPILED)}"
    own = FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)
    options: dict[str, Any] = {"cpp_wrapper": True} if kernel is inner_loop.scanned else {}
    compiled: Callable[..., Any] = torch.compile(own, dynamic=True, fullgraph=True, options=options)

    def run(*arguments: Any) -> Any:
        # The floats in reach are hyperparameters of the family, part of the kernel's key: constants, which nested
        # derivatives can take and symbols ("SymFloat") not. What changes from step to step comes in tensors.
        with torch._dynamo.config.patch(specialize_float=True):
            return compiled(*arguments)

    return run


class Pair(NamedTuple):
    """Two numbers of a kernel, which may change from call to call; tensors where a step is recorded."""

    first: Any
    second: Any

    def packed(self, device: torch.device) -> Tensor:
        """As one float64 tensor."""
        return gathered(self, device)


def _kind_of(argument: Any) -> Hashable:
    """What of an argument makes another kernel: its type, and which of its parts are missing."""
    if argument is None or isinstance(argument, Tensor):
        return argument is None
    return type(argument).__name__, tuple(part is None or (isinstance(part, tuple) and not part) for part in argument)


def _family_of(constants: Constants) -> Hashable:
    return constants.family, constants.estimator, constants.correction


def _identity(thing: Any) -> Hashable:
    """The object's id where it holds more than the fields by which it is compared, else None."""
    known = {entry.name for entry in dataclasses.fields(thing)}
    return None if vars(thing).keys() <= known else id(thing)


def _draw(
    constants: Constants,
    dtype: torch.dtype,
    out: Tensor,
    state: Any,
    memory: Any,
    numbers: Numbers | Tensor,
    source: Tensor | Address,
) -> None:
    out.copy_(
        kernels.draw(constants, state, memory, kernels.unpacked(constants, numbers).share, source, _like(out, dtype))
    )


def _collect(
    constants: Constants,
    dtype: torch.dtype,
    like: Tensor,
    state: Any,
    evidence: Evidence,
    total: Any,
    numbers: Pair | Tensor,
) -> None:
    weight, ess = numbers.unbind() if isinstance(numbers, Tensor) else numbers
    for value, new in zip(total, kernels.added(constants, state, evidence, weight, ess, like), strict=True):
        value.add_(new)


def _advance(
    constants: Constants,
    dtype: torch.dtype,
    out: Tensor,
    weights: Weights,
    first: Any,
    second: Any,
    numbers: Numbers | Tensor,
    real: Tensor | None,
    following: Tensor | Address | None,
) -> Tensor:
    """Step a tile in place, its point into `out`; the number of unsound weights.

    `real` says which entries of a flat block are weights, and makes the number one for each tile of noise. With
    `following`, the noise of the next draw, `out` becomes that draw in place of the point.
    """
    like = _like(out, dtype)
    moved = kernels.advance(constants, weights, first, second, numbers, like)
    sound = kernels.noticed(constants, kernels.sound(constants, moved, like), first, second)
    old = fields.leaves((weights.state, weights.momentum, weights.memory))
    new = kernels.unshared(old, fields.leaves((moved.state, moved.momentum, moved.memory)))
    for place, value in zip(old, new, strict=True):
        if place.ndim and value is not place:  # a field without dimensions is the family's constant
            place.copy_(kernels.kept(sound, value, place))
    if following is None:
        out.copy_(constants.family.point(weights.state))
    else:
        out.copy_(kernels.draw(constants, weights.state, None, 1.0, following, like))
    if sound is None:
        return torch.zeros((), dtype=torch.int64, device=out.device)
    return (~sound).sum() if real is None else (real & ~sound).view(-1, 4 * TILE).sum(1)


def _square(
    constants: Constants,
    dtype: torch.dtype,
    like: Tensor,
    weights: Weights,
    first: Any,
    second: Any,
    numbers: Numbers | Tensor,
    real: Tensor | None,
) -> Tensor:
    found = kernels.corrected(constants, weights, first, second, numbers, like)
    site = kernels.without_gaps(found.site, real)
    values = [getattr(site, name) for name in constants.family.momentum_block]
    return torch.stack([(value * value).sum(dtype=torch.float64) for value in values]).sum()


def _with_tensors(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of families with tensors of their own, which it gets as an argument."""

    def run(constants: Constants, dtype: torch.dtype, out: Tensor, own: dict[str, Tensor], *arguments: Any) -> Any:
        family = hyperparameters.given(constants.family, own)
        return kernel(dataclasses.replace(constants, family=family), dtype, out, *arguments)

    run.__name__ = kernel.__name__
    return run


_LIFTED = {kernel: _with_tensors(kernel) for kernel in (_draw, _collect, _advance, _square)}


def _noise(kind: str, out: Tensor, address: Address) -> None:
    out.copy_(traced(kind, out.numel(), address, out.dtype))


def _like(out: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the tile's shape in the posterior's dtype; only its shape and dtype are used."""
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


EAGER = Backend("eager")
