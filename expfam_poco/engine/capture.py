"""Steps that are recorded once and replayed, a CUDA graph each: what is static about them, and who records.

A graph is what a step asks of its device, with the batch, the numbers and all state in tensors that stay where
they are. A replay is one launch, whatever the number of operations.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from expfam_poco.arguments import shown
from expfam_poco.closures.batched import Batched
from expfam_poco.closures.generators import Replay
from expfam_poco.closures.rows import Rows
from expfam_poco.family.recording import Recording

Run = Callable[[], Any]


class Recorder(Protocol):
    """Who records what runs ask of a device, and plays it again: `CudaGraph`, in tests a tape."""

    device: torch.device

    def warm(self, run: Run) -> None:
        """Run as it will be recorded, so that all that is made at the first time is there."""

    def record(self, run: Run) -> Any:
        """Record a run; its result is of tensors that every replay fills."""

    def replay(self) -> None:
        """Do once more what was recorded."""

    def paired(self, params: Sequence[Tensor]) -> Any:
        """In a run: an object whose `again()` is the context of an evaluation with the random numbers that come now."""


class CudaGraph:
    """One CUDA graph with memory of its own.

    The second evaluation of a pair has a state of the device's generator of its own, which is set to the first's before
    every replay: both go through the same numbers, so that dropout has the same masks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream(device)
        self._second: torch.Generator | None = None
        self._recording = self._pairs = False

    @property
    def _generator(self) -> torch.Generator:
        return torch.cuda.default_generators[self.device.index or 0]

    def warm(self, run: Run) -> None:
        """On the stream on which it will be recorded, as torch wants it."""
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Run) -> Any:
        """Nothing is run but the host's part."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            self._second = self._generator.clone_state()
            self._graph.register_generator_state(self._second)
            self._recording = True
            try:
                # A capture that fails leaves its stream the current one, if nobody puts the old one back.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    # Threads that load data may ask for memory meanwhile.
                    torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"),
                ):
                    return run()
            finally:
                self._recording = False

    def replay(self) -> None:
        """One launch, on the current stream."""
        with torch.cuda.device(self.device):
            if self._second is not None and self._pairs:
                self._second.set_state(self._generator.get_state())
            self._graph.replay()

    def paired(self, params: Sequence[Any]) -> Any:
        """While warming up as ever; generators do not tell their states to a capture."""
        if not self._recording:
            return Replay(params)
        self._pairs = True
        return _Second(self._generator, self._second)


class _Second:
    """The state of a generator that is registered with a graph, for evaluations that come second."""

    def __init__(self, generator: torch.Generator, state: Any) -> None:
        self._generator, self._state = generator, state

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run a block with it."""
        first = self._generator.graphsafe_get_state()
        self._generator.graphsafe_set_state(self._state)
        try:
            yield
        finally:
            self._generator.graphsafe_set_state(first)


class Batch:
    """A batch in tensors that stay where they are.

    Args:
        example: tensors, or tuples, lists and dictionaries of them (and of what stays as it is).
        device: where they are.
    """

    def __init__(self, example: Any, device: torch.device) -> None:
        self._device = device
        self._places: list[Tensor] = []
        self._example = self._placed(example)

    def _placed(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            place = torch.empty(value.shape, dtype=value.dtype, device=self._device)
            self._places.append(place.copy_(value.detach()))
            return place
        if isinstance(value, dict):
            return {key: self._placed(part) for key, part in value.items()}
        if isinstance(value, tuple | list):
            parts = [self._placed(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    def bound(self, closure: Callable[..., Any]) -> Run:
        """The closure of this batch: of a tuple's or list's parts, one after the other, or of the batch itself."""
        example = self._example

        def evaluate() -> Any:
            return closure(*example) if isinstance(example, tuple | list) else closure(example)

        return evaluate

    @torch.no_grad()
    def take(self, batch: Any) -> None:
        """Copy a batch there.

        Raises:
            ValueError: if it differs from the example in more than the values of its tensors.
        """
        found: list[Tensor] = []
        self._look(self._example, batch, found)
        for place, value in zip(self._places, found, strict=True):
            if value is not place:
                place.copy_(value, non_blocking=True)

    def _look(self, example: Any, value: Any, found: list[Tensor]) -> None:
        if isinstance(example, Tensor):
            if not isinstance(value, Tensor) or value.shape != example.shape or value.dtype != example.dtype:
                own = f"{tuple(example.shape)}, {example.dtype}"
                given = f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else shown(value)
                raise ValueError(
                    f"batch: a tensor of {given} where the example has {own}; a captured step has one shape: drop the "
                    "last batch (drop_last=True), pad it, or give it to step(closure)."
                )
            found.append(value)
        elif isinstance(example, dict) and isinstance(value, dict) and example.keys() == value.keys():
            for key, part in example.items():
                self._look(part, value[key], found)
        elif isinstance(example, tuple | list) and isinstance(value, tuple | list) and len(example) == len(value):
            for part, other in zip(example, value, strict=True):
                self._look(part, other, found)
        elif isinstance(example, dict | tuple | list) or type(value) is not type(example) or value != example:
            raise ValueError(
                f"batch: {shown(value)} where the example has {shown(example)}; a captured step keeps all but the "
                "values of tensors: give what changes in tensors, or call step(closure)."
            )


class Graph:
    """One kind of step, recorded.

    Args:
        recorder: a fresh one.
        run: the device's part of a step; reads what changes from slots.
        undone: makes contexts after which all is as before, for runs that only show what a step does.

    Attributes:
        numbers: the slots.
        result: what `run` has given.

    Raises:
        RuntimeError: if the step cannot be recorded; nothing was changed.
    """

    def __init__(self, recorder: Recorder, run: Run, undone: Callable[[], AbstractContextManager[None]]) -> None:
        self._recorder = recorder
        self.numbers = Recording(recorder.device, recorder.paired)

        def once() -> Any:
            with self.numbers.running():
                return run()

        with undone():
            recorder.warm(once)
        with undone():
            try:
                self.result = recorder.record(once)
            except Exception as error:
                raise RuntimeError(
                    f"closure: its step cannot be captured ({_reason(error)}); look at no values inside of it "
                    "(.item(), if, print, masks as indices), make no tensors of the host's numbers there, or call "
                    "step(closure). Nothing was changed."
                ) from error

    def replay(self) -> None:
        """Send the numbers, and do it once more."""
        self.numbers.send()
        self._recorder.replay()


def _reason(error: BaseException) -> str:
    """The first complaint in one line: to end a capture that has failed makes another."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    line = next((line for line in str(error).splitlines() if line.strip()), "no reason given").strip()
    return f"{type(error).__name__}: {line}"


class Captured:
    """What is common to captured steps: the batch, and a graph for each kind of step that has come up.

    Args:
        closure: gives the loss of a batch.
        example: a batch.
        device: of the model.
        recorder: makes recorders for a device.
    """

    def __init__(
        self,
        closure: Callable[..., Any],
        example: Any,
        device: torch.device,
        recorder: Callable[[torch.device], Recorder],
    ) -> None:
        self._batch = Batch(example, device)
        self._closure = self._batch.bound(closure)
        self._device, self._recorder = device, recorder
        self._graphs: dict[Hashable, Graph] = {}

    def _graph(
        self, kind: Hashable, run: Run, undone: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Graph:
        """The graph of this kind of step, recorded now if there is none."""
        found = self._graphs.get(kind)
        if found is None:
            found = self._graphs[kind] = Graph(self._recorder(self._device), run, undone)
        return found


def check_captured(closure: Any, devices: set[torch.device], recorder: Any) -> torch.device:
    """The device of all parameters; refuse what no step on it can be captured of.

    Raises:
        TypeError: if the closure is no function.
        ValueError: for several devices, or one that has no graphs.
    """
    if not callable(closure) or isinstance(closure, Batched | Rows):
        raise TypeError(
            f"closure={shown(closure)}: captured() takes a function of a batch that returns its mean loss; give others "
            "to step(closure)."
        )
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "no device"
        raise ValueError(f"params: they are on {names}; captured() is for one CUDA device, so call step(closure).")
    (device,) = devices
    if recorder is CudaGraph and device.type != "cuda":
        raise ValueError(f"params: they are on {device}, which has no CUDA graphs; call step(closure).")
    return device


def loss_elsewhere(loss: Tensor, device: torch.device) -> str:
    """The sentence for a loss that is not on the model's device."""
    return f"closure: its loss is on {loss.device}, the model on {device}; return a tensor that is computed there."
