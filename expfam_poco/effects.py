"""What evaluating a model does beside giving a loss: it uses up random numbers, and it moves buffers.

The two gradients of a pair must see the same dropout masks, and only the first of them may move what a model learns
without gradients (BatchNorm's statistics, spectral norms, counters). Neither is told where the model is, so random
numbers are those of the global generators, and modules are found: those that own or contain one of the optimizer's
parameters, and those that are called while a closure runs.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import register_module_forward_pre_hook

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
        """Copy the buffers of a module and all within it, unless they are known."""
        if id(module) in self._seen:
            return
        for part in module.modules():
            if id(part) not in self._seen:
                self._seen.add(id(part))
                named = [(name, value) for name, value in part._buffers.items() if value is not None]
                self._saved.extend((part, name, value, value.detach().clone()) for name, value in named)

    @torch.no_grad()
    def restore(self) -> None:
        """Make every buffer what it was."""
        for module, name, value, copy in self._saved:
            if value.is_cuda or not torch.equal(value, copy):
                value.detach().copy_(copy)
            # One of another shape is a cache that has grown with the inputs, of which the module keeps count.
            now = module._buffers.get(name)
            if now is None or now.shape == value.shape:
                module._buffers[name] = value


class Buffers:
    """Finds the modules around an optimizer's parameters, and keeps evaluations from moving their buffers."""

    def __init__(self) -> None:
        self._found_for: frozenset[int] = frozenset()
        self._owners: list[weakref.ref[nn.Module]] = []
        self._compiled = False

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a copied optimizer belongs to another model."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @contextmanager
    def recorded(self, params: Sequence[Parameter]) -> Iterator[Record]:
        """Run a block, and know what the buffers were before it."""
        self._find(params)
        record = Record([module for owner in self._owners if (module := owner()) is not None])

        def before_forward(module: nn.Module, _: Any) -> None:
            if not torch.compiler.is_compiling():
                record.add(module)

        # A compiled module warns of hooks for all modules; its buffers are among those found already.
        handle = None if self._compiled else register_module_forward_pre_hook(before_forward)
        try:
            yield record
        finally:
            if handle is not None:
                handle.remove()

    @contextmanager
    def kept(self, params: Sequence[Parameter]) -> Iterator[None]:
        """Run a block after which all buffers are what they were."""
        with self.recorded(params) as record:
            try:
                yield
            finally:
                record.restore()

    def _find(self, params: Sequence[Parameter]) -> None:
        """The outermost modules with one of these parameters; looked for once for each set of parameters."""
        wanted = frozenset(map(id, params))
        if wanted == self._found_for:
            return
        modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
        holding = [m for m in modules if any(id(p) in wanted for p in m.parameters())]
        inside = {id(part) for m in holding for part in m.modules() if part is not m}
        self._owners = [weakref.ref(m) for m in holding if id(m) not in inside]
        self._compiled = any(type(m).__name__ == "OptimizedModule" for m in modules)
        self._found_for = wanted
