"""What evaluating a model does beside giving a loss: it uses up random numbers, and it moves buffers.

The two gradients of a pair must see the same dropout masks, and only the first of them may move what a model learns
without gradients (BatchNorm's statistics, spectral norms, counters). Neither is told where the model is, so random
numbers are those of the global generators, and modules are found: those that own or contain one of the optimizer's
parameters, and those within reach of the closure. (Hooks on all modules would see what is called, but not inside
compiled code, which they would break up besides.)
"""

from __future__ import annotations

import functools
import gc
import random
import types
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

# ---- random numbers ---------------------------------------------------------------------------------------


class RandomState(NamedTuple):
    """The states of the global generators: torch's on the CPU and on CUDA devices, Python's and NumPy's."""

    cpu: Tensor
    cuda: dict[int, Tensor]
    python: Any
    numpy: Any


def capture_random(params: Sequence[Parameter]) -> RandomState:
    """The generators' states now, to show a second evaluation the same dropout masks."""
    devices = {p.device.index or 0 for p in params if p.device.type == "cuda"}
    cuda = {d: torch.cuda.get_rng_state(d) for d in devices}
    return RandomState(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state())


@contextmanager
def replay_random(state: RandomState) -> Iterator[None]:
    """Run a block with the generators as they were, and put them back to the present afterwards."""
    cuda = {device: torch.cuda.get_rng_state(device) for device in state.cuda}
    now = RandomState(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state())
    _restore(state)
    try:
        yield
    finally:
        _restore(now)


def _restore(state: RandomState) -> None:
    torch.set_rng_state(state.cpu)
    for device, value in state.cuda.items():
        torch.cuda.set_rng_state(value, device)
    random.setstate(state.python)
    np.random.set_state(state.numpy)


# ---- buffers ----------------------------------------------------------------------------------------------


class Record:
    """The buffers of modules as they were when each was first seen."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._seen: set[int] = set()
        self._saved: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for module in modules:
            self.add(module)

    def add(self, module: nn.Module) -> None:
        """Copy the buffers of a module and of all within it, unless they are known."""
        if id(module) in self._seen:
            return
        for part in _parts(module):
            if id(part) not in self._seen:
                self._seen.add(id(part))
                named = [(name, value) for name, value in part._buffers.items() if value is not None]
                self._saved.extend((part, name, value, value.detach().clone()) for name, value in named)

    @torch.no_grad()
    def restore(self) -> None:
        """Make every buffer what it was."""
        for module, name, value, copy in self._saved:
            if not value.is_meta and not torch.equal(value, copy):
                value.detach().copy_(copy)
            # One of another shape is a cache that has grown with the inputs, of which the module keeps count.
            now = module._buffers.get(name)
            if now is None or now.shape == value.shape:
                module._buffers[name] = value


class Buffers:
    """Finds the modules that an evaluation may call, and keeps it from moving their buffers."""

    def __init__(self) -> None:
        self._found_for: frozenset[int] = frozenset()
        self._owners: list[weakref.ref[nn.Module]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a copied optimizer belongs to another model."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def record(self, params: Sequence[Parameter], closure: Any) -> Record:
        """The buffers of all modules around these parameters, or within reach of the closure, as they are now."""
        self._find(params)
        owners = [module for owner in self._owners if (module := owner()) is not None]
        return Record(modules_within_reach([*owners, closure]))

    @contextmanager
    def kept(self, params: Sequence[Parameter], closure: Any) -> Iterator[None]:
        """Run a block after which all buffers are what they were."""
        record = self.record(params, closure)
        try:
            yield
        finally:
            record.restore()

    def _find(self, params: Sequence[Parameter]) -> None:
        """The outermost modules with one of these parameters; looked for once for each set of parameters."""
        wanted = frozenset(map(id, params))
        if wanted == self._found_for:
            return
        modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module) and is_built(m)]
        holding = [m for m in modules if any(id(p) in wanted for part in _parts(m) for p in part._parameters.values())]
        inside = {id(part) for m in holding for part in _parts(m) if part is not m}
        self._owners = [weakref.ref(m) for m in holding if id(m) not in inside]
        self._found_for = wanted


def is_built(module: nn.Module) -> bool:
    """Whether `nn.Module.__init__` has run: the remains of failed constructors are no modules."""
    return all(name in module.__dict__ for name in ("_parameters", "_buffers", "_modules"))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if is_built(part))


def modules_within_reach(start: Any) -> list[nn.Module]:
    """The modules that functions close over, are bound to, or name as globals, through functions and containers.

    A search from `start` outwards, nearest things first, over at most `MOST_SEEN` of them.
    """
    found: list[nn.Module] = []
    waiting, seen = deque([start]), {id(start)}
    while waiting and len(seen) < MOST_SEEN:
        thing = waiting.popleft()
        if issubclass(type(thing), nn.Module) and is_built(thing):
            found.append(thing)
        for other in _near(thing):
            if id(other) not in seen and not isinstance(other, _PLAIN):
                seen.add(id(other))
                waiting.append(other)
    return found


MOST_SEEN = 10_000
MOST_ITEMS = 100  # of a container: a data set is not a place for models
_PLAIN = (str, bytes, int, float, complex, bool, type(None), Tensor, type, np.ndarray, torch.dtype, torch.device)


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _near(thing: Any) -> Iterator[Any]:
    """What a function, method or container holds; of other objects, their attributes (of a module, its own)."""
    if isinstance(thing, types.FunctionType):
        cells = thing.__closure__ or ()
        yield from (cell.cell_contents for cell in cells if cell != types.CellType())
        yield from (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *thing.__dict__.values())
        yield from _globals_of(thing)
    elif isinstance(thing, types.MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, Mapping | list | tuple | set | frozenset):
        if len(thing) <= MOST_ITEMS:
            yield from thing.values() if isinstance(thing, Mapping) else thing
    elif issubclass(type(thing), nn.Module):
        yield from thing.__dict__.get("_modules", {}).values()
        yield from (value for name, value in thing.__dict__.items() if name not in _OF_EVERY_MODULE)
    elif not isinstance(thing, types.ModuleType):
        yield from getattr(thing, "__dict__", {}).values()


def _globals_of(function: types.FunctionType) -> Iterator[Any]:
    """The global values, and members of global modules, that a function's code names."""
    names, codes = set[str](), [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType):
            yield from (vars(value)[member] for member in names & vars(value).keys())
        else:
            yield value
