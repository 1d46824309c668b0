"""Random numbers of the global generators, shown twice: those of torch (CPU, and CUDA with weights), Python and NumPy.

The two gradients of a pair must see the same dropout masks. `Replay` notes the generators' states before the first
evaluation and sets them back before the second, but only those that the first has used; and as most closures use none,
what counts is that looking is cheap. torch's states are read in 2 µs. Python and NumPy take 15 and 100 µs to hand out
theirs, because they build an object per word, so their 624 words are read where they lie in memory. That is never
written, and a trial on private generators decides, when this module is imported, whether the words lie where they are
expected (CPython and NumPy's Mersenne twister); otherwise the slow, public way is taken.
"""

from __future__ import annotations

import ctypes
import pickle
import random
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import Parameter

_WORDS = 624  # of a Mersenne twister's state
_TWISTER = 4 * (_WORDS + 1)  # bytes, with the position


class _Source(Protocol):
    """A generator whose whole state can be read, compared by ==, and written."""

    def read(self) -> Any:
        """The state now."""

    def write(self, state: Any) -> None:
        """Make this the state."""


class _Torch:
    """A generator of torch; its state as bytes."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def read(self) -> bytes:
        """A bytes comparison takes a tenth of `torch.equal` on as many uint8."""
        state: bytes = self._generator.get_state().numpy().tobytes()
        return state

    def write(self, state: bytes) -> None:
        """Not by `torch.tensor`, which would follow a default device."""
        self._generator.set_state(torch.from_numpy(np.frombuffer(state, np.uint8).copy()))


def _memory(address: int, size: int) -> ctypes.Array[ctypes.c_char]:
    """Memory in place, whose `raw` reads it anew."""
    return (ctypes.c_char * size).from_address(address)


class _Python:
    """Python's generator by its public functions."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator

    def read(self) -> Any:
        """A version, all words with the position, and half of a pair of normal numbers."""
        return self._generator.getstate()

    def write(self, state: Any) -> None:
        """What `read` gave."""
        self._generator.setstate(state)


class _PythonInPlace(_Python):
    """Python's generator, read in place: the position, then the words, right behind the object's head."""

    def __init__(self, generator: random.Random) -> None:
        super().__init__(generator)
        if sys.implementation.name != "cpython" or type(generator).__basicsize__ < object.__basicsize__ + _TWISTER:
            raise LookupError("generator: it is not laid out as CPython's is.")
        self._words = _memory(id(generator) + object.__basicsize__, _TWISTER)

    def read(self) -> Any:
        """The memory, and half of a pair of normal numbers."""
        return self._words.raw, self._generator.gauss_next  # type: ignore[attr-defined]

    def write(self, state: Any) -> None:
        """What `read` gave, in the form that `setstate` takes."""
        memory, gauss = state
        position, *words = struct.unpack(f"={_WORDS + 1}I", memory)
        super().write((random.Random.VERSION, (*words, position), gauss))


class _NumPy:
    """NumPy's generator by its public functions; its state pickled, which compares arrays as well as numbers."""

    def __init__(self, generator: np.random.RandomState) -> None:
        self._generator = generator

    def read(self) -> Any:
        """The bit generator's state, and half of a pair of normal numbers."""
        return pickle.dumps(self._generator.get_state(legacy=False))

    def write(self, state: Any) -> None:
        """What `read` gave."""
        self._generator.set_state(pickle.loads(state))


class _NumPyInPlace(_NumPy):
    """NumPy's generator, read in place: the words, then the position, where its ctypes interface says.

    The half pair lies in the generator object itself, a flag before a double. While somebody has given NumPy another
    kind of bit generator, the public way is taken.
    """

    def __init__(self, generator: np.random.RandomState) -> None:
        super().__init__(generator)
        self._bits = generator._bit_generator
        if sys.implementation.name != "cpython" or type(self._bits) is not np.random.MT19937:
            raise LookupError("generator: it is not NumPy's own Mersenne twister.")
        self._words = _memory(self._bits.ctypes.state_address, _TWISTER)
        self._half = _memory(id(generator) + self._place_of_half(), 16)

    @staticmethod
    def _place_of_half() -> int:
        """Where a generator object keeps half a pair: found by looking for it in one that has just made a pair."""
        trial = np.random.RandomState(0)
        trial.standard_normal()
        half = struct.pack("=d", trial.get_state(legacy=False)["gauss"])
        return _memory(id(trial), type(trial).__basicsize__).raw.index(half) - 8

    def read(self) -> Any:
        """The two pieces of memory."""
        if self._generator._bit_generator is not self._bits:
            return super().read()
        return self._words.raw, self._half.raw

    def write(self, state: Any) -> None:
        """What `read` gave, in the form that `set_state` takes."""
        if isinstance(state, bytes):
            super().write(state)
            return
        words, half = state
        (position,) = struct.unpack_from("=i", words, 4 * _WORDS)
        has_half, value = struct.unpack("=ixxxxd", half)
        key = np.frombuffer(words, np.uint32, _WORDS)
        self._generator.set_state(("MT19937", key, position, has_half, value))


def _reads_all(make: Callable[[Any], _Source], plain: _Source, trial: Any, *draws: Callable[[], Any]) -> bool:
    """Whether a way of reading is right: on a private generator, it notices and undoes every kind of draw."""
    try:
        source = make(trial)
        for draw in draws:
            before, known = source.read(), plain.read()
            draw()
            if source.read() == before or source.read() != source.read():
                return False
            after = plain.read()
            source.write(before)
            if source.read() != before or plain.read() != known:
                return False
            plain.write(after)
    except (LookupError, ValueError, TypeError, AttributeError, struct.error):
        return False
    return True


def _python_source() -> _Source:
    trial = random.Random(0)
    half = trial.gauss
    draws = (half, half, trial.random, lambda: [trial.random() for _ in range(_WORDS)])
    fits = _reads_all(_PythonInPlace, _Python(trial), trial, *draws)
    generator = random._inst
    return _PythonInPlace(generator) if fits else _Python(generator)


def _numpy_source() -> _Source:
    trial = np.random.RandomState(0)
    half = trial.standard_normal
    draws = (half, half, trial.random_sample, lambda: trial.random_sample(_WORDS))
    fits = _reads_all(_NumPyInPlace, _NumPy(trial), trial, *draws)
    generator = np.random.mtrand._rand
    try:
        return _NumPyInPlace(generator) if fits else _NumPy(generator)
    except LookupError:  # somebody has set another bit generator already
        return _NumPy(generator)


_EVERYWHERE: tuple[_Source, ...] = (_Torch(torch.default_generator), _python_source(), _numpy_source())


class Replay:
    """The states of the global generators at one moment, and evaluations that see the same numbers again.

    >>> import torch
    >>> replay = Replay()
    >>> first = torch.rand(2)
    >>> with replay.again():
    ...     second = torch.rand(2)
    >>> torch.equal(first, second), torch.equal(first, torch.rand(2))
    (True, False)
    """

    def __init__(self, params: Sequence[Parameter] = ()) -> None:
        """Note the states now; of CUDA devices, those that these parameters are on."""
        devices = {p.device.index or 0 for p in params if p.device.type == "cuda"}
        cuda = tuple(_Torch(torch.cuda.default_generators[device]) for device in devices)
        self._sources = _EVERYWHERE + cuda
        self.capture()

    def capture(self) -> None:
        """Note the states now: they are what `again` goes back to."""
        self._states = _read(self._sources)

    def again(self) -> AbstractContextManager[None]:
        """Run a block with the generators as they were, and put them back to the present afterwards."""
        return _Again(self._sources, self._states)


class _Again(AbstractContextManager[None]):
    """The context of `Replay.again`; a class, as contexts made by generator functions cost more than it does."""

    def __init__(self, sources: Sequence[_Source], states: Sequence[Any]) -> None:
        self._sources, self._states = sources, states
        self._present: list[Any] = []

    def __enter__(self) -> None:
        self._present = _read(self._sources)
        _change(self._sources, self._present, self._states)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _change(self._sources, _read(self._sources), self._present)


def _read(sources: Sequence[_Source]) -> list[Any]:
    return [source.read() for source in sources]


def _change(sources: Sequence[_Source], now: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Write the states that differ: writing them all would cost much more than looking."""
    for source, present, state in zip(sources, now, wanted, strict=True):
        if present != state:
            source.write(state)


def capture_random(params: Sequence[Parameter]) -> Replay:
    """The generators' states now, to show a second evaluation the same dropout masks."""
    return Replay(params)


def replay_random(state: Replay) -> AbstractContextManager[None]:
    """`state.again()`."""
    return state.again()
