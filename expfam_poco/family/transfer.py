"""Numbers between the host and a device, without the host waiting where that can be helped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from expfam_poco.family import recording

Answer = bool | Tensor  # to a question about values; a tensor without dimensions while a device has yet to say
AHEAD = ("cuda", "meta")  # kinds of devices that do not hand out values at once


def is_ahead(device: torch.device) -> bool:
    """Whether the host runs ahead of this device, and has to wait for it when it wants to know a value.

    So it does of any device while a step is recorded, for which there are no values yet.
    """
    return device.type in AHEAD or recording.active is not None


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Some numbers as a tensor; a device's arrive without the host waiting for it."""
    compiling = torch.compiler.is_compiling()
    record = None if compiling else recording.active
    if record is not None and device.type == record.device.type:  # not "meta", where kernels are traced
        return record.place(values, dtype)
    if device.type != "cuda" or compiling:
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def gathered(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Some numbers, of which any may be a device's tensor without dimensions, as one tensor."""
    known = [value for value in values if not isinstance(value, Tensor)]
    sent = on_device(known, dtype, device) if known else torch.empty(0)
    if len(known) == len(values):
        return sent
    own = iter(sent.unbind())
    return torch.stack([value.to(dtype) if isinstance(value, Tensor) else next(own) for value in values])


def read_now(value: Tensor) -> float | Tensor:
    """A number as the host's, unless it would have to wait for it."""
    return value if is_ahead(value.device) else float(value)


def are_near(first: Tensor, second: Tensor, rtol: float, atol: float) -> Answer:
    """Whether tensors are equal, or nearly so, entry by entry."""
    if is_ahead(first.device):
        return torch.isclose(first, second, rtol=rtol, atol=atol).all()
    return torch.equal(first, second) or torch.allclose(first, second, rtol=rtol, atol=atol)


def all_of(answers: Iterable[Answer]) -> Answer:
    """Whether all answers, about tensors of one device, are yes."""
    there = list[Tensor]()
    for answer in answers:
        if isinstance(answer, Tensor):
            there.append(answer)
        elif not answer:
            return False
    return torch.stack(there).all() if there else True


def told(answers: Sequence[Answer]) -> list[bool]:
    """All answers as the host's; it waits for every device once.

    >>> told([True, torch.tensor(False), torch.tensor(True)])
    [True, False, True]
    """
    waiting: dict[torch.device, list[int]] = {}
    known = [False if isinstance(answer, Tensor) else answer for answer in answers]
    for number, answer in enumerate(answers):
        if isinstance(answer, Tensor):
            waiting.setdefault(answer.device, []).append(number)
    for numbers in waiting.values():
        values = torch.stack([torch.as_tensor(answers[number]) for number in numbers]).tolist()
        for number, value in zip(numbers, values, strict=True):
            known[number] = bool(value)
    return known


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
