"""The modules that a closure may call: those within reach of what it holds, found by a search that is remembered.

A training loop makes a new function at every step, over a new batch, but what it holds beside tensors stays the same.
So a closure is taken apart anew each time, as far as functions and short containers go; from what is left, modules
and other objects, a search goes outwards, and its result is kept with the object until that holds something else, and
for `REMEMBERED` questions at most.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

MOST_SEEN = 10_000  # things that one search looks at
MOST_ITEMS = 100  # of a container that is searched: a longer one may be a data set, and only modules in it count
MOST_SCANNED = 1_000_000  # items of a long container
REMEMBERED = 64
_MOST_LOOSE = 200  # functions and containers that a closure is taken apart into

OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
# What holds no modules, or (a Python module) too many: of that, only what a function's code names counts.
_NUMBERS = (str, bytes, int, float, complex, type(None), Tensor, np.ndarray, torch.dtype, torch.device)
_PLAIN = (*_NUMBERS, type, types.ModuleType, types.BuiltinFunctionType)
_PLAIN_TYPES = {*_PLAIN, bool, Parameter, torch.Size}
_OBJECTS = {dict, list, tuple, set, frozenset, types.FunctionType, types.MethodType}
_CONTAINERS = (list, tuple, dict, set, frozenset, Mapping)  # an abstract class takes longest to ask: last


def is_built(module: nn.Module) -> bool:
    """Whether `nn.Module.__init__` has run: the remains of failed constructors are no modules."""
    own = module.__dict__
    return "_parameters" in own and "_buffers" in own and "_modules" in own


def parts_of_modules(roots: Sequence[nn.Module]) -> list[nn.Module]:
    """These modules and all within them, each once; sooner than by `Module.modules`, which makes names."""
    found: dict[int, nn.Module] = {}
    waiting = list(reversed(roots))
    while waiting:
        module = waiting.pop()
        if id(module) not in found and is_built(module):
            found[id(module)] = module
            waiting.extend(child for child in module.__dict__["_modules"].values() if child is not None)
    return list(found.values())


def modules_within_reach(start: Any) -> list[nn.Module]:
    """The modules that functions close over, are bound to, or name as globals, through functions and containers.

    A search from `start` outwards, nearest things first, over at most `MOST_SEEN` of them.
    """
    found: list[nn.Module] = []
    waiting, seen = deque([start]), {id(start)}
    while waiting and len(seen) < MOST_SEEN:
        thing = waiting.popleft()
        if _is_module(thing):
            found.append(thing)
        for other in _near(thing):
            if id(other) not in seen:
                seen.add(id(other))
                waiting.append(other)
    return found


class Reach:
    """Finds modules within reach of closures, and remembers what it found from every object on the way."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._questions = 0

    def modules(self, closure: Any) -> list[nn.Module]:
        """The modules within reach of a closure (or a list of closures and modules), each once."""
        if self._questions % REMEMBERED == 0:
            self._known.clear()
        self._questions += 1
        found: dict[int, nn.Module] = {}
        for thing in _taken_apart(closure):
            for module in self._from(thing):
                found[id(module)] = module
        return list(found.values())

    def _from(self, thing: Any) -> list[nn.Module]:
        held = _held(thing)
        known = self._known.get(id(thing))
        if known is not None and known.held == held and known.is_of(thing):
            return [module for link in known.modules if (module := link()) is not None]
        found = modules_within_reach(thing)
        who = _link(thing)
        if who is not None:
            self._known[id(thing)] = _Known(who, held, [weakref.ref(module) for module in found])
        return found


class _Known(NamedTuple):
    """What a search from a thing has found: who it was, what it held, the modules."""

    who: Callable[[], Any]
    held: tuple[int, ...]
    modules: list[weakref.ref[nn.Module]]

    def is_of(self, thing: Any) -> bool:
        """Whether it is of this thing, not of one that has lived at the same place; long containers count as the same
        if they are of one length, which `held` has compared.
        """
        return self.who() is (None if isinstance(thing, _CONTAINERS) else thing)


def _nobody() -> None:
    """Stands for a container, which is neither kept alive here nor can be linked to weakly."""


def _link(thing: Any) -> Callable[[], Any] | None:
    """How to recognise a thing later without keeping it alive, if that is possible."""
    if isinstance(thing, _CONTAINERS):
        return _nobody
    try:
        return weakref.ref(thing)
    except TypeError:
        return None


def _held(thing: Any) -> tuple[int, ...]:
    """The identities of what an object holds beside plain values; of a long container, the length."""
    if isinstance(thing, types.FunctionType):
        return ()
    own = getattr(thing, "__dict__", None)
    if isinstance(own, dict):
        usual = OF_EVERY_MODULE if isinstance(thing, nn.Module) else ()
        return tuple([id(v) for name, v in own.items() if type(v) not in _PLAIN_TYPES and name not in usual])
    return (len(thing),) if isinstance(thing, _CONTAINERS) else ()


def _taken_apart(closure: Any) -> list[Any]:
    """What a closure comes to when everything is taken apart that is likely to be made anew for every step.

    Those are short containers, dataclasses (accumulated closures, batches), bound methods, and functions: the closure
    itself and those with cells. Other functions, and modules and objects, outlive a step and are left whole.
    """
    whole: list[Any] = []
    waiting, seen = [(closure, True)], {id(closure)}
    while waiting:
        thing, is_closure = waiting.pop()
        function = isinstance(thing, types.FunctionType)
        loose = is_closure or thing.__closure__ is not None if function else _is_loose(thing)
        if not loose or len(seen) > _MOST_LOOSE:
            whole.append(thing)
            continue
        for other in _near(thing):
            if id(other) not in seen:
                seen.add(id(other))
                waiting.append((other, is_closure and not function))
    return whole


def _is_loose(thing: Any) -> bool:
    """Whether something that is no function is likely to be made anew for every step."""
    if isinstance(thing, nn.Module):
        return False
    if isinstance(thing, _CONTAINERS):
        return len(thing) <= MOST_ITEMS
    return isinstance(thing, types.MethodType | functools.partial) or hasattr(type(thing), "__dataclass_fields__")


def _is_module(thing: Any) -> bool:
    # By type: an object may claim another class, and a weak proxy does.
    return issubclass(type(thing), nn.Module) and is_built(thing)


def _near(thing: Any) -> list[Any]:
    """What a thing holds, but for plain values."""
    near = [other for other in _all_near(thing) if type(other) not in _PLAIN_TYPES]
    return [other for other in near if not _is_plain(type(other))]


def _is_plain(kind: type) -> bool:
    """Whether things of this type hold no modules; by type, as objects may claim another class than theirs."""
    return kind in _PLAIN_TYPES or (kind not in _OBJECTS and issubclass(kind, _PLAIN))


def _all_near(thing: Any) -> Iterable[Any]:
    """What a function, method or container holds; of other objects, their attributes (of a module, its own)."""
    if isinstance(thing, types.FunctionType):
        return _near_function(thing)
    if isinstance(thing, types.MethodType):
        return thing.__self__, thing.__func__
    if isinstance(thing, functools.partial):
        return thing.func, *thing.args, *thing.keywords.values()
    if issubclass(type(thing), nn.Module):
        own = thing.__dict__
        children = own.get("_modules", {}).values()
        return *children, *(value for name, value in own.items() if name not in OF_EVERY_MODULE)
    if isinstance(thing, _CONTAINERS):
        items = thing.values() if isinstance(thing, dict | Mapping) else thing
        return items if len(thing) <= MOST_ITEMS else _modules_among(items)
    return getattr(thing, "__dict__", {}).values()


def _near_function(function: types.FunctionType) -> list[Any]:
    found = [*_cells_of(function), *(function.__defaults__ or ())]
    if function.__kwdefaults__:
        found += function.__kwdefaults__.values()
    if function.__dict__:
        found += function.__dict__.values()
    return found + _globals_of(function)


def _modules_among(items: Any) -> Iterator[Any]:
    """The modules, and functions, of a long container; its items' types are looked at first, which is quick."""
    kinds = set(map(type, islice(items, MOST_SCANNED)))
    wanted = tuple(k for k in kinds if issubclass(k, nn.Module | types.FunctionType | types.MethodType))
    if wanted:
        yield from (item for item in islice(items, MOST_SCANNED) if type(item) in wanted)


def _cells_of(function: types.FunctionType) -> list[Any]:
    found: list[Any] = []
    for cell in function.__closure__ or ():
        try:
            found += (cell.cell_contents,)
        except ValueError:  # empty: of a variable that is not assigned yet
            continue
    return found


@functools.lru_cache(4096)
def _names_in(code: types.CodeType) -> frozenset[str]:
    """The names that a function's code, and functions within it, read as globals, attributes or imports."""
    names, codes = set[str](), [code]
    while codes:
        part = codes.pop()
        names.update(part.co_names)
        codes.extend(constant for constant in part.co_consts if isinstance(constant, types.CodeType))
    return frozenset(names)


def _globals_of(function: types.FunctionType) -> list[Any]:
    """The values named by a function's code: globals, and members of modules that are globals or imported inside."""
    names, own, loaded = _names_in(function.__code__), function.__globals__, sys.modules
    home = own.get("__package__")
    if isinstance(home, str) and (home == "torch" or home.startswith("torch.")):
        return []  # torch keeps nobody's modules in its globals
    found: list[Any] = []
    for name in names:
        value = own[name] if name in own else loaded.get(name) or loaded.get(f"{home}.{name}")
        if isinstance(value, types.ModuleType):
            members = vars(value)
            found += [members[member] for member in names if member in members]
        else:
            found += (value,)
    return found
