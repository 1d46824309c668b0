"""What an argument may be, for all public calls: each check refuses by one sentence of name, value and remedy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LONGEST = 120  # characters of a value in a sentence


def shown(value: Any) -> str:
    """A value as a sentence shows it: on one line, tensors and arrays by their shapes.

    Example:
        >>> import torch
        >>> from expfam_poco.arguments import shown
        >>> shown(0.5), shown(torch.zeros(3)), shown(torch.nn.Tanh())
        ('0.5', '<Tensor of shape (3,)>', '<Tanh>')
    """
    shape = getattr(value, "shape", None)
    if shape is not None and (len(shape) > 0 or isinstance(value, nn.Parameter)):
        return f"<{type(value).__name__} of shape {tuple(shape)}>"
    if isinstance(value, nn.Module):
        return f"<{type(value).__name__}>"
    try:
        text = repr(value)
    except Exception:  # of a class of the user's, or an integer of thousands of digits
        text = "\n"
    return text if len(text) <= LONGEST and "\n" not in text else f"<{type(value).__name__}>"


def instance(name: str, value: Any, kind: type[Any] | tuple[type[Any], ...], remedy: str) -> None:
    """Refuse what is no `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}={shown(value)}: {remedy}.")


def module(value: Any) -> None:
    """Refuse a `model` that is none."""
    instance("model", value, nn.Module, "give the torch.nn.Module that the optimizer trains")


def listed(name: str, value: Any, remedy: str) -> list[Any]:
    """The items of an iterable."""
    if isinstance(value, str) or not isinstance(value, Iterable) or (isinstance(value, Tensor) and not value.ndim):
        raise TypeError(f"{name}={shown(value)}: {remedy}.")
    return list(value)


def function(name: str, value: Any, remedy: str) -> None:
    """Refuse what can be called no more than None can; None is the default's business."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}={shown(value)}: {remedy}.")


def whole(name: str, value: Any, least: int | None = None) -> None:
    """Refuse what is no integer from `least` on."""
    if type(value) is not int or (least is not None and value < least) or abs(value) >= 2**63:
        raise ValueError(f"{name}={shown(value)}: give an integer{'' if least is None else f', {least} or larger'}.")


def no_decay(choices: Mapping[str, Any]) -> None:
    """Refuse `weight_decay` for binary weights, whose prior about 0 is the uniform one at any precision.

    Example:
        >>> from expfam_poco.arguments import no_decay
        >>> no_decay({"weight_decay": 0.0})
    """
    if choices.get("weight_decay", 0.0) != 0.0:
        raise ValueError(
            f"weight_decay={shown(choices['weight_decay'])}: it has no meaning for binary weights, whose size is 1 and "
            "whose prior about 0 is uniform; leave it out, give it to the real group (`gaussian=` of binarize_groups), "
            "or give a State as `prior`."
        )


def flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)}: give True or False.")


def choice(name: str, value: Any, known: Sequence[str], remedy: str) -> None:
    """Refuse what is no string among these; an array is not compared with them."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={shown(value)}: {remedy}.")


def is_real(value: Any) -> bool:
    """Whether it is a number of Python's or NumPy's, or a tensor of one; True and False are none."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype is not torch.bool
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def number(name: str, value: Any, inside: Callable[[float], bool], remedy: str) -> float:
    """The number, of those for which `inside` holds."""
    try:
        found = float(value) if is_real(value) else None
    except OverflowError:
        found = None
    if found is None or not inside(found):
        raise ValueError(f"{name}={shown(value)}: {remedy}.")
    return found


def positive(name: str, value: Any, remedy: str = "it must be a positive, finite number") -> float:
    """The number, of those between 0 and infinity."""
    return number(name, value, lambda found: 0.0 < found < math.inf, remedy)
