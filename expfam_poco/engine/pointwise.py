"""A rule that moves every weight by itself, and keeps no posterior: tensor by tensor, in tiles, or all tensors at once.

Where every tensor of a group is on a GPU, one kernel of `fused` steps them all. Weights whose new numbers would not be
finite keep their old ones, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from expfam_poco.closures.evaluate import by_device
from expfam_poco.engine.backend import Backend, tile_size
from expfam_poco.engine.fused import Pass, Places, Programs
from expfam_poco.family.transfer import gathered, is_ahead

EAGER_SPAN = 2**16  # some thirty operations follow each other, whose temporaries should stay in a CPU's caches
# rule(constants, values, gradient, numbers) gives the new values: of the weights, then of what is kept for them.
Rule = Callable[[Any, Sequence[Tensor], Tensor, Sequence[Any]], tuple[Tensor, ...]]


class Member(NamedTuple):
    """A tensor of weights to be stepped.

    Attributes:
        values: the weights, then what is kept for them; the dtype of the latter is that of what is computed.
        grad: the gradient.
        numbers: of the rule.
        maximize: whether to step against the gradient.
    """

    values: tuple[Tensor, ...]
    grad: Tensor
    numbers: tuple[Any, ...]
    maximize: bool

    @property
    def is_plain(self) -> bool:
        """Whether all is contiguous, and its numbers lie where it says."""
        tensors = (*self.values, self.grad)
        return all([value.is_contiguous() and not is_traceable_wrapper_subclass(value) for value in tensors])


class Pointwise:
    """Steps tensors by a rule.

    Args:
        backend: how.
        rule: of a weight.
        constants: its first argument.
    """

    def __init__(self, backend: Backend, rule: Rule, constants: Hashable) -> None:
        self._backend, self._rule, self._constants = backend, rule, constants
        self._programs: dict[Hashable, Programs] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy deals out its own weights."""
        return {**self.__dict__, "_programs": {}}

    def step(self, members: Sequence[Member], *, streamed: bool, spoils: dict[torch.device, Tensor]) -> list[Tensor]:
        """Step all in place: counts, in any number, of weights that kept their values.

        Args:
            members: what is stepped.
            streamed: in tiles, or by kernels.
            spoils: 0 or NaN by device; by NaN all weights keep their values.
        """
        together, apart, counts = dict[Any, list[Member]](), list[Member](), list[Tensor]()
        for member in members:
            if streamed and member.is_plain and self._backend.fuses_all(self._rule, member.grad.device):
                dtypes = tuple(value.dtype for value in (*member.values, member.grad))
                key = member.numbers, member.maximize, member.grad.device, dtypes
                together.setdefault(key, []).append(member)
            else:
                apart.append(member)
        for group in together.values():
            found = self._launched(group, spoils.get(group[0].grad.device))
            if found is None:
                apart += group
            else:
                counts.append(found.sum())
        known: dict[Hashable, Tensor] = {}
        counts += [self._one(own, known, streamed, spoils.get(own.grad.device)).sum() for own in apart]
        return [torch.stack(values).sum() for values in by_device(counts)]

    def _launched(self, group: Sequence[Member], spoil: Tensor | None) -> Tensor | None:
        """Step tensors by one kernel, if there is one."""
        first = group[0]
        sizes, device = [own.grad.numel() for own in group], first.grad.device
        key = (*sizes, device)
        if key not in self._programs:
            self._programs[key] = Programs([0] * len(sizes), sizes, [0] * len(sizes), device)
        columns = [Places(column, column[0].dtype) for column in zip(*(own.values for own in group), strict=True)]
        grads = Places([own.grad for own in group], first.grad.dtype)
        dtype = first.values[1].dtype

        def function(like: Tensor, *arguments: Any) -> tuple[Sequence[Tensor | None], Tensor | None]:
            values, grad, numbers, spoiled = arguments
            turned = _turned(grad, first.maximize)
            new, finite = _new(self._rule, self._constants, values, turned, numbers, spoiled)
            return _kept(finite, new, values), ~finite

        what = Pass(function, (self._rule, self._constants, first.maximize), "normal", dtype)
        whose = self._rule, self._rule.__name__
        return self._backend.launched(
            what, whose, self._programs[key], columns, tuple(columns), grads, first.numbers, spoil
        )

    def _one(self, own: Member, known: dict[Hashable, Tensor], streamed: bool, spoil: Tensor | None) -> Tensor:
        """Step one tensor, tile by tile where the model is large."""
        dtype, device = own.values[1].dtype, own.grad.device
        numbers = known.get((own.numbers, dtype, device))
        if numbers is None:
            numbers = known[own.numbers, dtype, device] = gathered(own.numbers, device, dtype)
        grad, constants = _turned(own.grad, own.maximize), (self._rule, self._constants)
        if not streamed or not own.is_plain:
            return _in_place(*constants, own.values[0], grad, *own.values[1:], numbers, spoil)
        flat = [value.view(-1) for value in (own.values[0], grad, *own.values[1:])]
        size = tile_size(self._backend.mode, device)
        if self._backend.mode != "compiled" and device.type == "cpu":
            size = min(size, EAGER_SPAN)
        pieces = zip(*(value.split(size) for value in flat), strict=True)
        counts = [self._backend.run(_in_place, constants, *piece, numbers, spoil).sum() for piece in pieces]
        return torch.stack(counts).sum()


def spoil_of(grads: Sequence[Tensor]) -> Tensor:
    """0 if all gradients, which are on one device, are finite, else NaN, without the host's waiting for it."""
    norms = by_device(torch._foreach_norm(list(grads), float("inf")))
    return torch.stack([(torch.stack(alike) * 0.0).sum().double() for alike in norms]).sum()


def _turned(grad: Tensor, maximize: bool) -> Tensor:
    return -grad if maximize else grad


def _new(
    rule: Rule, constants: Any, old: Sequence[Tensor], grad: Tensor, numbers: Sequence[Any], spoil: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The new values, and for which weights all of them are finite."""
    new = rule(constants, old, grad, numbers)
    total = sum(new[1:], start=new[0])
    return new, torch.isfinite(total if spoil is None else total + spoil)


def _kept(finite: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    return [torch.where(finite, value.to(before.dtype), before) for before, value in zip(old, new, strict=True)]


def _in_place(rule: Rule, constants: Any, theta: Tensor, grad: Tensor, *rest: Any) -> Tensor:
    """Step a tile in place; the number of weights that kept their values, or which they are."""
    *state, packed, spoil = rest
    old = (theta, *state)
    new, finite = _new(rule, constants, old, grad, _values(packed), spoil)
    if not torch.compiler.is_compiling() and not is_ahead(finite.device) and bool(finite.all()):
        for place, value in zip(old, new, strict=True):
            place.copy_(value)
        return torch.zeros(())
    for place, value in zip(old, _kept(finite, new, old), strict=True):
        place.copy_(value)
    if not finite.is_cpu:  # a device would make one slow reduction of all that stands above
        return ~finite
    # In float32, which counts the entries of a tile (at most 2^24) exactly and keeps the kernel's vectors of one width.
    return torch.where(finite, 0.0, 1.0).sum()


def _values(numbers: Tensor) -> list[Any]:
    """Python numbers; compiled or far away, tensors without dimensions: no constants, and nothing to wait for."""
    away = torch.compiler.is_compiling() or is_ahead(numbers.device)
    return list(numbers.unbind()) if away else numbers.tolist()
