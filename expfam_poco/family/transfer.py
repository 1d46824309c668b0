"""Numbers between the host and a device, without the host waiting where that can be helped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

AHEAD = ("cuda", "meta")  # kinds of devices that do not hand out values at once


def is_ahead(device: torch.device) -> bool:
    """Whether the host runs ahead of this device, and has to wait for it when it wants to know a value."""
    return device.type in AHEAD


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Some numbers as a tensor; a device's arrive without the host waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def read_now(value: Tensor) -> float | Tensor:
    """A number as the host's, unless it would have to wait for it."""
    return value if is_ahead(value.device) else float(value)


class Later:
    """Values of a tensor as they are now, to be read by the host when the device has them.

    >>> Later(torch.tensor([1.0, 2.0])).read()
    [1.0, 2.0]
    """

    def __init__(self, values: Tensor) -> None:
        self._event: Any = None
        if not values.is_cuda:
            self._values = values.clone()
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(values.device))

    @property
    def arrived(self) -> bool:
        """Whether reading would not wait."""
        return self._event is None or bool(self._event.query())

    def read(self) -> Any:
        """The values, as `tolist` gives them; waits for them, but not for what the device was asked for after them."""
        if not self.arrived:
            self._event.synchronize()
        return self._values.tolist()
