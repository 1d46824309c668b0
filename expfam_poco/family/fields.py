"""Arithmetic on the small tuples of tensors that natural parameters, states and sites are.

A family's values (`Nat`, `Mean`, `State`, `Site`) are NamedTuples with one tensor per field; every function
here works on all of them alike and returns the type that it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Fields = TypeVar("Fields", bound=tuple[Any, ...])


def map_fields(function: Callable[..., Any], first: Fields, *rest: tuple[Any, ...]) -> Fields:
    """Apply `function` field by field; the result has the type of `first`."""
    return type(first)(*[function(*values) for values in zip(first, *rest, strict=True)])


def add(first: Fields, second: tuple[Any, ...]) -> Fields:
    """`first + second`, field by field."""
    return type(first)(*[a + b for a, b in zip(first, second, strict=True)])


def subtract(first: Fields, second: tuple[Any, ...]) -> Fields:
    """`first − second`, field by field."""
    return type(first)(*[a - b for a, b in zip(first, second, strict=True)])


def scale(values: Fields, factor: float | Tensor) -> Fields:
    """Every field times one factor."""
    return type(values)(*[a * factor for a in values])


def weigh(values: Fields, factors: tuple[Any, ...]) -> Fields:
    """Every field times its own factor."""
    return type(values)(*[a * f for a, f in zip(values, factors, strict=True)])


def mix(old: Fields, new: tuple[Any, ...], keep: tuple[Any, ...]) -> Fields:
    """The moving average ρ·old + (1−ρ)·new with a ρ of its own for every field."""
    return map_fields(lambda a, b, rho: rho * a + (1.0 - rho) * b, old, new, keep)


def to_plain(values: tuple[Any, ...]) -> dict[str, Tensor]:
    """A NamedTuple of tensors as a plain dictionary, which `torch.load(weights_only=True)` accepts."""
    return dict(values._asdict())  # type: ignore[attr-defined]


def from_plain(kind: type[Fields], values: Mapping[str, Tensor]) -> Fields:
    """The inverse of `to_plain`: a dictionary of tensors as the NamedTuple `kind`."""
    return kind(**values)


def all_finite(values: tuple[Tensor, ...]) -> Tensor:
    """A boolean tensor without dimensions: no field holds a NaN or an infinity."""
    first, *others = [torch.isfinite(value).all() for value in values]
    return torch.stack([first, *others]).all() if others else first


def leaves(values: Any) -> list[Tensor]:
    """The tensors of nested tuples, in order; None has none."""
    if isinstance(values, Tensor):
        return [values]
    found: list[Tensor] = []
    for value in values or ():
        if isinstance(value, Tensor):
            found.append(value)
        elif value:
            found += leaves(value)
    return found


def map_leaves(function: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """Apply `function` tensor by tensor to nested tuples of one shape; the result has the types of `first`."""
    if isinstance(first, Tensor):
        return function(first, *rest)
    if first is None:
        return None
    made = [map_leaves(function, *values) for values in zip(first, *rest, strict=True)]
    return type(first)(*made) if hasattr(first, "_fields") else tuple(made)
