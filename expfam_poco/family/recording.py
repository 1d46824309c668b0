"""A step that is recorded once and replayed: the device finds its numbers in slots, which the host fills anew.

While a step is recorded, nobody may look at values, and a number of the host becomes a part of what is recorded. So
what changes from step to step (rates, α, the counters of noise) gets slots in one tensor on the device. All numbers of
the host come by `transfer.on_device`, which asks here; `Counter`s among them are found again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

BUFFERS = 8  # as many replays may wait for the device
CAPACITY = 2**17  # slots: addresses of tensors, words of keys and numbers


class Counter(int):
    """A counter of a noise key whose value a recorded step finds in a slot.

    Whoever reckoned with it would fix its present value, and is refused.

    >>> from expfam_poco.noise import NoiseKey
    >>> NoiseKey(seed=7, step=Counter(3, "step")).step.name
    'step'
    """

    name: str

    def __new__(cls, value: int, name: str) -> Counter:
        """The counter of this name, and its value now."""
        made = super().__new__(cls, value)
        made.name = name
        return made

    def _refuse(self, *others: object) -> NoReturn:
        raise RuntimeError(f"{self.name}: a recorded step would keep this number; it may only be sent to the device.")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = _refuse
    __floordiv__ = __truediv__ = __mod__ = __pow__ = __rpow__ = __lshift__ = __rshift__ = __and__ = __float__ = _refuse


class Recording:
    """The slots of a recorded step, and how its second evaluations see the random numbers of the first.

    Args:
        device: where the slots are.
        paired: gives, for some parameters, an object whose `again()` is the context of a second evaluation.

    >>> recording = Recording(torch.device("cpu"), lambda params: None)
    >>> (rate,) = recording.numbers("rates", [0.5])
    >>> recording.write("rates", [0.25])
    >>> rate
    tensor(0.2500, dtype=torch.float64)
    """

    def __init__(self, device: torch.device, paired: Callable[[Any], Any]) -> None:
        self.device, self.paired = device, paired
        self._host = np.zeros(CAPACITY, np.int64)
        self._floats = self._host.view(np.float64)
        own = device.type == "cpu"
        self._slots = torch.from_numpy(self._host) if own else torch.zeros(CAPACITY, dtype=torch.int64, device=device)
        self._used = 0
        self._sent = -1
        self._on_their_way: list[tuple[Tensor, Any]] = []
        self._ranges: dict[str, slice] = {}
        self._places: dict[str, list[int]] = {}

    def numbers(self, name: str, values: Sequence[float]) -> list[Tensor]:
        """Slots for these numbers, float64 tensors without dimensions, that `write` finds by the name."""
        self._ranges[name] = slice(self._used, self._used + len(values))
        return list(self.place(values, torch.float64).unbind())

    def place(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Slots for numbers that stay, and for `Counter`s, as one tensor."""
        begin, end = self._used, self._used + len(values)
        if end > CAPACITY:
            raise RuntimeError(
                f"captured: a graph has {CAPACITY} numbers, which does not do for so many tensors; large models are "
                "stepped as fast by step(closure)."
            )
        self._used = end
        for place, value in enumerate(values, begin):
            if isinstance(value, Counter):
                self._places.setdefault(value.name, []).append(place)
        floating = dtype.is_floating_point
        self._host[begin:end] = np.array([*map(float, values)], np.float64).view(np.int64) if floating else values
        slots = self._slots[begin:end]
        if self.device.type != "cpu" and not torch.cuda.is_current_stream_capturing():
            slots.copy_(torch.from_numpy(self._host[begin:end].copy()))
        return slots.view(torch.float64).to(dtype) if floating else slots

    def write(self, name: str, values: Sequence[float]) -> None:
        """New values of `numbers`; `send` sends them."""
        self._floats[self._ranges[name]] = values

    def count(self, name: str, value: int) -> None:
        """The new value of a `Counter`; `send` sends it."""
        self._host[self._places.get(name, [])] = value

    def send(self) -> None:
        """Let the device have all values, without waiting for it: they go through one of some buffers in turn."""
        if self.device.type == "cpu":
            return
        self._sent += 1
        if self._sent < BUFFERS:
            pinned = torch.empty(self._used, dtype=torch.int64, pin_memory=True)
            self._on_their_way.append((pinned, torch.cuda.Event()))
        pinned, left = self._on_their_way[self._sent % BUFFERS]
        if self._sent >= BUFFERS and not left.query():
            left.synchronize()
        pinned.copy_(torch.from_numpy(self._host[: self._used]))
        self._slots[: self._used].copy_(pinned, non_blocking=True)
        left.record()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, numbers that go to a device get slots, from the first on."""
        global active
        if active is not None:
            raise RuntimeError("captured: a step is being recorded already; one of its closures asks for another.")
        active = self
        self._used = 0
        self._places.clear()
        self._ranges.clear()
        try:
            yield
        finally:
            active = None


active: Recording | None = None  # the one that is running; a module's name, for it is looked at in every small step
