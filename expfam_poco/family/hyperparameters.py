"""Hyperparameters of a family: what tells two of one class apart, in comparisons, hashes, texts and checkpoints.

A `@dataclass(frozen=True)` family declares them as fields. A family with an `__init__` of its own has them as the
parameters of that method: each becomes a field, and must be kept as an attribute of the same name. Since a field is
what `dataclasses.fields` gives, equality, `hash`, `repr`, the keys of compiled kernels and checkpoints see both alike.

A hyperparameter may be a tensor. One without axes becomes its number. One with axes holds a number for every weight
(where a weight is one number), or is a constant of all weights (where it is a vector or more, unless the class names it
in `per_weight`). Tensors are compared, hashed and saved by a digest of their values; a block of the optimizer has them
in its shape, on its device (`fitted`), a tile those of its weights (`mapped`), and a compiled kernel gets them as
arguments (`lifted`, `given`), so that other values need no other kernel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Hashable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_DIGESTS: Any = WeakIdKeyDictionary()  # of tensors, with the version of which it is
_OWNED: Any = WeakIdKeyDictionary()  # copies that families have made


class Values(NamedTuple):
    """What a tensor is compared and saved by.

    Example:
        >>> import torch
        >>> from expfam_poco.family.hyperparameters import Values
        >>> Values.of(torch.ones(3)) == Values.of(torch.ones(3)), Values.of(torch.ones(3)) == Values.of(torch.zeros(3))
        (True, False)
    """

    shape: tuple[int, ...]
    dtype: str
    digest: str

    @classmethod
    def of(cls, value: Tensor) -> Values:
        """Read from the tensor once for each version of it."""
        known = _DIGESTS.get(value)
        if known is None or known[0] != value._version:
            plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest = hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16]
            known = value._version, cls(tuple(value.shape), str(value.dtype).removeprefix("torch."), digest)
            _DIGESTS[value] = known
        found: Values = known[1]
        return found

    def __repr__(self) -> str:
        return f"tensor({list(self.shape)}, {self.dtype}, {self.digest})"


class Argument(NamedTuple):
    """What stands for a tensor in the key of a kernel that gets it as an argument."""

    axes: int
    dtype: torch.dtype


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
    """Refuse hyperparameters that could not be told apart or saved; tensors become numbers, or copies of its own.

    Raises:
        TypeError: for a parameter of `__init__` not kept under its name, and for values that are arrays or cannot be
            hashed.
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
        if isinstance(value, Tensor):
            object.__setattr__(family, entry.name, _own(value, f"{cls.__name__}.{entry.name}"))
        elif type(value).__module__.partition(".")[0] == "numpy" or (_hashed(entry) and not _hashable(value)):
            raise TypeError(
                f"family: {cls.__name__}.{entry.name} is a {type(value).__name__}; hyperparameters are compared and "
                "saved: give a number, a string, a tuple of these, or a tensor (torch.as_tensor(x))."
            )
    if tensors(family):
        known = {entry.name for entry in dataclasses.fields(family)}
        loose = [name for name, value in vars(family).items() if isinstance(value, Tensor) and name not in known]
        if loose:
            raise TypeError(
                f"family: {cls.__name__} keeps a tensor {loose[0]!r} beside its hyperparameters, which would not be "
                "cut into tiles with them; compute it where it is used."
            )


def _own(value: Tensor, name: str) -> float | Tensor:
    """A number of a tensor without axes, else a copy that nobody else writes to."""
    if value.is_complex() or value.layout != torch.strided or not bool(torch.isfinite(value).all()):
        raise TypeError(
            f"family: {name} is a tensor that is complex, sparse, infinite or NaN; give finite real values."
        )
    if value.ndim == 0:
        number: float = value.item()
        return number
    if value in _OWNED:
        return value
    with torch.inference_mode(False):
        made = value.detach().clone()
    _OWNED[made] = True
    Values.of(made)
    return made


# ---- tensors --------------------------------------------------------------------------------------------------


def tensors(family: Any) -> dict[str, Tensor]:
    """The hyperparameters that are tensors, by name."""
    found = {name: value for name, value in vars(family).items() if isinstance(value, Tensor)}
    return {name: found[name] for name in family.__dataclass_fields__ if name in found} if found else found


def given(family: Any, values: Mapping[str, Any]) -> Any:
    """The family with other values of these hyperparameters, whatever its `__init__` would do with them."""
    made = object.__new__(type(family))
    for name, value in vars(family).items():
        if name in values or not isinstance(value, Tensor):
            object.__setattr__(made, name, values.get(name, value))
    return made


def mapped(family: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The family with the function of every tensor that holds a number for each weight; itself without such."""
    own = {name: function(value) for name, value in tensors(family).items() if is_per_weight(family, name)}
    return given(family, own | {k: v for k, v in tensors(family).items() if k not in own}) if own else family


def is_per_weight(family: Any, name: str) -> bool:
    """Whether a tensor of this name holds a number for every weight, along the weights' axes."""
    return name in family.per_weight if family.event_dim or family.joint else True


def lifted(family: Any) -> tuple[Any, dict[str, Tensor]]:
    """The family with `Argument`s in place of its tensors, and these."""
    found = tensors(family)
    if not found:
        return family, found
    return given(family, {name: Argument(v.ndim, v.dtype) for name, v in found.items()}), found


def fitted(family: Any, batch: torch.Size, name: str, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The family of a parameter whose weights stand along the axes `batch`: tensors in its shape, dtype, and place.

    Raises:
        ValueError: for a tensor that does not broadcast to the weights.
    """
    found = tensors(family)
    if not found:
        return family
    made = {}
    for field, value in found.items():
        moved = value.to(device, dtype if value.is_floating_point() else value.dtype)
        if is_per_weight(family, field):
            axes = len(batch) if family.event_dim else value.ndim  # what follows belongs to one weight
            try:
                moved = moved.expand(batch + value.shape[axes:]).contiguous()
            except RuntimeError:
                raise ValueError(
                    f"family: {type(family).__name__}.{field} has shape {tuple(value.shape)}, which does not broadcast "
                    f"to the weights of {name!r}, {tuple(batch)}; give one number, a tensor of that shape, or the "
                    "parameter a group of its own."
                ) from None
        made[field] = moved
    before, after = ([(v.shape, v.dtype, v.device) for v in values] for values in (found.values(), made.values()))
    return family if before == after else given(family, made)


def plain(value: Any) -> Any:
    """A hyperparameter as checkpoints have it."""
    return repr(Values.of(value)) if isinstance(value, Tensor) else value


# ---- comparing ------------------------------------------------------------------------------------------------


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


def _compared(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return Values.of(value) if value.ndim else value.item()
    return value


def _equal(self: Any, other: Any) -> Any:
    """The same class and equal hyperparameters."""
    if type(self) is not type(other):
        return NotImplemented
    names = [entry.name for entry in dataclasses.fields(self) if entry.compare]
    return all([_compared(getattr(self, name, None)) == _compared(getattr(other, name, None)) for name in names])


def _hash(self: Any) -> int:
    """Of the hyperparameters."""
    return hash(tuple([_compared(getattr(self, e.name, None)) for e in dataclasses.fields(self) if _hashed(e)]))


def _text(self: Any) -> str:
    """The class with its hyperparameters."""
    shown = [f"{e.name}={_compared(getattr(self, e.name, None))!r}" for e in dataclasses.fields(self) if e.repr]
    return f"{type(self).__qualname__}({', '.join(shown)})"
