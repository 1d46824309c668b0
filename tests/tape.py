"""What a CUDA graph does, on the CPU: every operation of a run is recorded, and replayed into the same memory.

It is no imitation: a number that the host bakes in, a tensor that moves, a value that somebody looks at show here as
they do on a card. What a capture refuses is refused: looking at values, and numbers on their way from the host.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from expfam_poco.closures.generators import Replay

ATEN = torch.ops.aten
REFUSED = {
    ATEN._local_scalar_dense.default: "a value is looked at",
    ATEN.equal.default: "values are compared by the host",
    ATEN.nonzero.default: "a shape depends on values",
    ATEN.lift_fresh.default: "a number of the host is on its way",
}


class Tape(TorchDispatchMode):
    """A recorder of `engine.capture` that needs no card."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._calls: list[Any] = []
        self.replays = 0

    # ---- a recorder ----------------------------------------------------------------------------------------

    def warm(self, run: Any) -> None:
        run()

    def record(self, run: Any) -> Any:
        self._calls.clear()
        with self:
            return run()

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for call in self._calls:
            call()

    def paired(self, params: Any) -> "Paired":
        return Paired(self)

    # ---- what is recorded ----------------------------------------------------------------------------------

    def note(self, call: Any) -> None:
        """Do this at every replay, too."""
        self._calls.append(call)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in REFUSED:
            raise RuntimeError(f"operation not permitted when a tape records: {REFUSED[function]} ({function})")
        if function is ATEN.index.Tensor and any(own is not None and own.dtype == torch.bool for own in args[1]):
            raise RuntimeError("operation not permitted when a tape records: a shape depends on values (a mask)")
        found = function(*args, **kwargs)
        writes = function._schema.is_mutable
        fresh = [own for own in tree_leaves(found) if isinstance(own, Tensor)]
        if any(ret.alias_info is not None for ret in function._schema.returns):
            fresh = []  # views, and what was written in place
        if writes or fresh:
            self._calls.append(lambda: self._again(function, args, kwargs, fresh))
        return found

    @staticmethod
    def _again(function: Any, args: Any, kwargs: Any, places: list[Tensor]) -> None:
        found = [own for own in tree_leaves(function(*args, **kwargs)) if isinstance(own, Tensor)]
        for place, value in zip(places, found, strict=False):
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)


class Paired:
    """As `Replay`, at every replay anew."""

    def __init__(self, tape: Tape) -> None:
        with _disable_current_modes():
            self._tape, self._state = tape, Replay()
        tape.note(self._state.capture)

    @contextmanager
    def again(self) -> Iterator[None]:
        contexts: list[Any] = []

        def enter() -> None:
            contexts.append(self._state.again())
            with _disable_current_modes():  # a graph has its own ways
                contexts[-1].__enter__()

        def leave() -> None:
            with _disable_current_modes():
                contexts.pop().__exit__(None, None, None)

        self._tape.note(enter)
        enter()
        try:
            yield
        finally:
            self._tape.note(leave)
            leave()
