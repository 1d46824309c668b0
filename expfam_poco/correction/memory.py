"""A correction's memory as plain dictionaries, which checkpoints hold, and tensor by tensor, as passes over it need.

A `Memory` is a NamedTuple of States, Sites and tensors. In plain form it is a dictionary of tensors and of dictionaries
of tensors, which `torch.load(weights_only=True)` reads; a dictionary's keys say whether it was a State or a Site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from expfam_poco.family import fields

if TYPE_CHECKING:
    from expfam_poco.family.base import ExponentialFamily


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A tensor's image, or the same tuple (of tuples) of images; what is neither stays."""
    if isinstance(value, tuple):
        parts = [map_tensors(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return function(value) if isinstance(value, Tensor) else value


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a memory (or a tuple of such) with their paths, such as ("posterior.mean", …)."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, tuple):
        for name, part in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from tensors(part, f"{path}.{name}" if path else str(name))


def to_plain(memory: Any) -> dict[str, Any]:
    """A memory as dictionaries of tensors.

    Example:
        >>> import torch, expfam_poco as poco
        >>> q = poco.resolve_family("bernoulli").centred_at(torch.zeros(1))
        >>> poco.correction.memory.to_plain(poco.correction.Outer(q, q))
        {'posterior': {'theta': tensor([0.])}, 'site': {'theta': tensor([0.])}}
    """
    return {
        name: fields.to_plain(value) if isinstance(value, tuple) else value for name, value in memory._asdict().items()
    }


def from_plain(kind: type[Any], family: ExponentialFamily, plain: Mapping[str, Any]) -> Any:
    """The inverse of `to_plain`, for the `Memory` type `kind` of a correction.

    Raises:
        ValueError: for dictionaries that are no such memory; the sentence names the entry.
    """
    if set(plain) != set(kind._fields):
        raise ValueError(f"memory: it holds {sorted(plain)}, but a {kind.__name__} has {sorted(kind._fields)}.")
    return kind(**{name: _typed(name, value, family) for name, value in plain.items()})


def _typed(name: str, value: Any, family: ExponentialFamily) -> Any:
    if not isinstance(value, Mapping):
        return value
    for own in (family.State, family.Site):
        if set(value) == set(own._fields):
            return fields.from_plain(own, value)
    raise ValueError(f"memory[{name!r}]: {sorted(value)} are the fields of neither a State nor a Site of {family!r}.")
