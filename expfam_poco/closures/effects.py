"""What evaluating a model does beside giving a loss: it moves buffers, and other state that its modules keep.

Only the first evaluation of a batch may move what a model learns without gradients (BatchNorm's statistics, spectral
norms, counters, the hidden state of a recurrent net). Nobody says where the model is, so modules are found: those
that own or contain one of the optimizer's parameters, and those within reach of the closure. (Hooks on all modules
would see what is called, but not inside compiled code, which they would break up besides.)

Random numbers, which evaluations use up, are the business of `generators`.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from expfam_poco.closures.generators import Replay, capture_random, replay_random
from expfam_poco.closures.reach import OF_EVERY_MODULE, Reach, is_built, modules_within_reach, parts_of_modules

__all__ = [
    "Buffers",
    "Evaluations",
    "ModuleState",
    "Replay",
    "capture_random",
    "is_built",
    "modules_within_reach",
    "replay_random",
]


class ModuleState:
    """The state of modules as it was when each was first seen: buffers, and attributes that are tensors or numbers.

    Such attributes are restored like buffers, for people keep hidden states and counters there; flags (bool) are not,
    as they tell what has been done once and for all. So are the gradients of parameters that are not the optimizer's:
    of a closure that calls backward() for several optimizers, those of one evaluation are meant to stay.
    """

    def __init__(self, modules: Sequence[nn.Module], params: Sequence[Parameter] = ()) -> None:
        """The modules and all within them; `params`: tensors that share memory with these are weights, not state."""
        self._params = params
        self._own = set(map(id, params))
        self._gradients: list[tuple[Parameter, Tensor | None]] = []
        self._seen: set[int] = set()
        self._attributes: list[tuple[nn.Module, type, int, dict[str, Any]]] = []
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        for part in parts_of_modules(modules):
            self._add_part(part)

    def add(self, module: nn.Module) -> None:
        """Copy the state of a module and of all within it, unless they are known."""
        for part in parts_of_modules([module]):
            self._add_part(part)

    @property
    def parts(self) -> list[nn.Module]:
        """All modules whose state is recorded."""
        return [part for part, *_ in self._attributes]

    def _add_part(self, part: nn.Module) -> None:
        if id(part) in self._seen:
            return
        self._seen.add(id(part))
        own = part.__dict__
        attributes = {name: own[name] for name in own.keys() - OF_EVERY_MODULE}
        self._attributes.append((part, type(part), len(own), attributes))
        for p in own["_parameters"].values():
            if p is not None and id(p) not in self._own:
                self._gradients.append((p, p.grad))
        for name, buffer in own["_buffers"].items():
            if buffer is not None:
                self._buffers.append((part, name, buffer))
                self._copies.append((buffer, buffer.detach().clone()))
        tensors = [value for value in attributes.values() if isinstance(value, Tensor)]
        self._copies.extend((value, value.detach().clone()) for value in tensors if self._is_state(value))

    def _is_state(self, value: Tensor) -> bool:
        """Whether the values of a tensor attribute are a module's own, and can be copied."""
        if isinstance(value, Parameter) or value.layout != torch.strided or value.is_meta:
            return False
        try:
            place = value.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # what a transform (vmap) has left behind
            return False
        return place not in self._weights

    @functools.cached_property
    def _weights(self) -> set[int]:
        """Where the weights lie."""
        own = [p for part in self.parts for p in part._parameters.values() if p is not None and not is_lazy(p)]
        return {p.untyped_storage().data_ptr() for p in (*self._params, *own)}

    def hide_gradients(self) -> None:
        """Until `restore`, let others' parameters have none, for backward() adds to those that it finds."""
        for p, grad in self._gradients:
            if grad is not None:
                p.grad = None

    def mark_gradients(self) -> None:
        """Note which gradients an evaluation has left on others' parameters: `is_waiting` tells them from others."""
        for p, before in self._gradients:
            if before is None:
                mark_used(p.grad)

    def restore(self) -> None:
        """Make all state what it was."""
        for p, grad in self._gradients:
            if p.grad is not grad:
                p.grad = grad
        for value, copy in _changed(self._copies) if self._copies else ():
            with torch.no_grad():
                value.detach().copy_(copy)
        _rewrite([pair for pair in self._copies if pair[0].is_cuda])
        for module, name, value in self._buffers:
            # One of another shape is a cache that has grown with the inputs, of which the module keeps count.
            now = module._buffers.get(name)
            if now is not value and (now is None or now.shape == value.shape):
                module._buffers[name] = value
        for module, kind, size, attributes in self._attributes:
            own = module.__dict__
            if len(own) != size or any(own.get(name) is not old for name, old in attributes.items()):
                _restore_attributes(own, attributes, numbers=type(module) is kind)


def mark_used(grad: Tensor | None) -> None:
    """Note that a gradient, as it is now, waits for nobody: a closure has left it, or an earlier optimizer."""
    if grad is not None:
        grad._used_at = grad._version  # type: ignore[attr-defined]


def is_waiting(grad: Tensor | None) -> bool:
    """Whether a gradient that nobody has used yet is there: not zero, nor marked as used."""
    if grad is None or getattr(grad, "_used_at", None) == grad._version:
        return False
    return bool((grad if grad.layout is torch.strided else grad.to_dense()).any())


def _changed(copies: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The pairs that are not equal. To write the others too might spoil what autograd has saved of them."""
    return [(v, copy) for v, copy in copies if not v.is_meta and not v.is_cuda and not torch.equal(v, copy)]


def _rewrite(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Put all copies back, without asking the device which values have changed: one does not wait for it.

    Through `data`, so that autograd, which may have saved some, does not take an unchanged value for another.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for value, copy in copies:
        alike.setdefault((value.device, value.dtype), []).append((value.data, copy))
    for pairs in alike.values():
        torch._foreach_copy_([value for value, _ in pairs], [copy for _, copy in pairs])


def _restore_attributes(own: dict[str, Any], before: dict[str, Any], *, numbers: bool) -> None:
    """Make the state among a module's attributes what it was; `numbers`: those too."""
    for name in own.keys() - OF_EVERY_MODULE - before.keys():
        if _is_tensor(own[name]):
            del own[name]
    for name, old in before.items():
        new = own.get(name)
        if new is old:
            continue
        if _is_tensor(old):
            moved = new is None or (_is_tensor(new) and new.shape == old.shape)
        elif old is None:
            moved = _is_tensor(new)
        else:
            moved = numbers and type(old) in (int, float) and type(new) in (int, float)
        if moved:
            own[name] = old


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, Parameter)


class Evaluations(AbstractContextManager[None]):
    """The state of modules around one batch's evaluations: the first may move it, all others leave it as that did.

    Attributes:
        before: the state before the first evaluation.
    """

    def __init__(self, modules: Sequence[nn.Module], params: Sequence[Parameter]) -> None:
        self._modules, self._params = modules, params
        self.before = ModuleState(modules, params)
        self._after: ModuleState | None = None

    def kept(self) -> AbstractContextManager[None]:
        """Run a block with a later evaluation. The state is recorded when the first such block is entered."""
        return self

    def __enter__(self) -> None:
        if self._after is None:
            self._after = ModuleState(self._modules, self._params)
        self._after.hide_gradients()

    def __exit__(self, *error: object) -> None:
        assert self._after is not None
        self._after.restore()


class Buffers:
    """Finds the modules that an evaluation may call, and keeps it from moving their buffers (and other state)."""

    def __init__(self) -> None:
        self._found_for: tuple[int, ...] = ()
        self._owners: list[weakref.ref[nn.Module]] = []
        self._reach = Reach()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a copied optimizer belongs to another model."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def evaluations(self, params: Sequence[Parameter], closure: Any) -> Evaluations:
        """For several evaluations of one batch: modules are looked for once, and recorded before and after the first.

        `closure` is one closure, or a list.
        """
        return Evaluations(self.modules(params, closure), params)

    def state_of(self, params: Sequence[Parameter], closure: Any) -> ModuleState:
        """The state of all modules around these parameters, or within reach of the closure, as it is now."""
        return ModuleState(self.modules(params, closure), params)

    @contextmanager
    def kept(self, params: Sequence[Parameter], closure: Any) -> Iterator[None]:
        """Run a block after which all state is what it was."""
        record = self.state_of(params, closure)
        record.hide_gradients()
        try:
            yield
        finally:
            record.restore()

    def modules(self, params: Sequence[Parameter], closure: Any) -> list[nn.Module]:
        """The modules around these parameters, or within reach of the closure (or several)."""
        self._find(params)
        owners = [module for owner in self._owners if (module := owner()) is not None]
        return self._reach.modules([*owners, closure])

    def _find(self, params: Sequence[Parameter]) -> None:
        """The outermost modules with one of these parameters; looked for once for each set of parameters."""
        wanted_now = tuple(map(id, params))
        if wanted_now == self._found_for:
            return
        wanted = frozenset(wanted_now)
        modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module) and is_built(m)]
        holding = [m for m in modules if _holds(m, wanted)]
        inside = {id(part) for m in holding for part in parts_of_modules([m]) if part is not m}
        self._owners = [weakref.ref(m) for m in holding if id(m) not in inside]
        self._found_for = wanted_now


def _holds(module: nn.Module, wanted: frozenset[int]) -> bool:
    """Whether one of these parameters is somewhere in the module."""
    return any(id(p) in wanted for part in parts_of_modules([module]) for p in part._parameters.values())
