"""Hyperparameters of a family: what tells two of one class apart, in comparisons, hashes, texts and checkpoints.

A `@dataclass(frozen=True)` family declares them as fields. A family with an `__init__` of its own has them as the
parameters of that method: each becomes a field, and must be kept as an attribute of the same name. Since a field is
what `dataclasses.fields` gives, equality, `hash`, `repr`, the keys of compiled kernels and checkpoints see both alike.
"""

from __future__ import annotations

import dataclasses
import inspect
from types import FunctionType
from typing import Any

from torch import Tensor

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def declare(cls: type[Any]) -> None:
    """Make the parameters of an own `__init__` fields of the class, and compare by fields; called for each subclass.

    A dataclass decorator that follows finds its methods written, which are those that it would write.
    """
    own = cls.__dict__
    if isinstance(own.get("__init__"), FunctionType):
        known = getattr(cls, "__dataclass_fields__", {})
        names = [name for name in _parameters(cls) if name not in known]
        made = dataclasses.make_dataclass("Declared", names) if names else None
        extra = getattr(made, "__dataclass_fields__", {})
        cls.__dataclass_fields__ = {**known, **extra}
    for name, method in (("__eq__", _equal), ("__hash__", _hash), ("__repr__", _text)):
        if name not in own or (name == "__hash__" and own[name] is None and "__eq__" not in own):
            setattr(cls, name, method)


def check(family: Any) -> None:
    """Refuse hyperparameters that could not be told apart or saved.

    Raises:
        TypeError: for a parameter of `__init__` not kept under its name, and for values that are tensors, arrays
            or cannot be hashed.
    """
    cls = type(family)
    own = next(c for c in cls.__mro__ if "__init__" in c.__dict__).__dict__["__init__"]
    written = isinstance(own, FunctionType) and own.__code__.co_filename != "<string>"  # not by a dataclass
    if written:
        loose = [p.name for p in _signature(cls) if p.kind in VARIADIC]
        if loose:
            raise TypeError(
                f"family: {cls.__name__}.__init__ takes *{loose[0]}, which says nothing of its hyperparameters; name "
                "each, or make the class a @dataclass(frozen=True)."
            )
    for entry in dataclasses.fields(family):
        if not hasattr(family, entry.name):
            raise TypeError(
                f"family: {cls.__name__}.__init__ takes {entry.name!r} but keeps no attribute of this name, so that "
                f"two of them could not be told apart nor saved; write self.{entry.name} = {entry.name}, or make the "
                "class a @dataclass(frozen=True)."
            )
        value = getattr(family, entry.name)
        array = isinstance(value, Tensor) or type(value).__module__.partition(".")[0] == "numpy"
        if array or (_hashed(entry) and not _hashable(value)):
            raise TypeError(
                f"family: {cls.__name__}.{entry.name} is a {type(value).__name__}; hyperparameters are compared and "
                "saved: give a number, a string or a tuple of these (float(x), tuple(x.tolist()))."
            )


def _signature(cls: type[Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(cls.__init__).parameters.values())[1:]


def _parameters(cls: type[Any]) -> list[str]:
    return [p.name for p in _signature(cls) if p.kind not in VARIADIC]


def _hashed(entry: dataclasses.Field[Any]) -> bool:
    return entry.compare if entry.hash is None else entry.hash


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _equal(self: Any, other: Any) -> Any:
    """The same class and equal hyperparameters."""
    if type(self) is not type(other):
        return NotImplemented
    names = [entry.name for entry in dataclasses.fields(self) if entry.compare]
    return tuple(getattr(self, name, None) for name in names) == tuple(getattr(other, name, None) for name in names)


def _hash(self: Any) -> int:
    """Of the hyperparameters."""
    return hash(tuple(getattr(self, entry.name, None) for entry in dataclasses.fields(self) if _hashed(entry)))


def _text(self: Any) -> str:
    """The class with its hyperparameters."""
    shown = [f"{e.name}={getattr(self, e.name, None)!r}" for e in dataclasses.fields(self) if e.repr]
    return f"{type(self).__qualname__}({', '.join(shown)})"
