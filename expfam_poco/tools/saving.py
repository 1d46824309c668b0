"""A whole run in one file: written so that a kill at any moment leaves the old file, read all or nothing."""

from __future__ import annotations

import copy
import errno
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from expfam_poco.closures.shards import is_spread
from expfam_poco.errors import CheckpointError
from expfam_poco.optim.alpha_svrg import AlphaSVRG
from expfam_poco.optim.optimizer import PosteriorCorrected
from expfam_poco.tools.files import written_aside

FORMAT = 1
_MARK = "expfam_poco.save"
_ATOMS = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device)
_TENSORS = (Tensor, torch.nn.Parameter)
_MAPPINGS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple, set)
_RESERVED = ("path", "map_location")


def save(path: str | os.PathLike[str], /, **entries: Any) -> None:
    """Write a run to one file, which is either the old one or the new one, whenever the process is killed.

    The file also holds the states of torch's global random generators (the CPU's and, where CUDA is in use, those of
    all its devices), so that dropout and shuffling continue bit for bit. It is written under a temporary name in the
    same folder, flushed to the disk and then renamed. One process writes to a path at a time.

    Args:
        path: the file, replaced if it exists; it keeps its mode. Its folder must exist.
        **entries: what to save, by name. Objects with a `state_dict()` (model, optimizer, scheduler, scaler, …) are
            asked for it; everything else must be plain: numbers, strings, tensors, and lists, tuples, sets and
            dictionaries of them, which `torch.load(weights_only=True)` reads.

    Raises:
        TypeError: an entry is not plain; the sentence names it. Nothing is written.
        OSError: the file could not be written (a full disk), or something else than a file is there (a FIFO, a
            device). The old file is as it was, and no temporary file is left.

    Example:
        >>> import tempfile, torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=8.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     poco.save(f"{folder}/run.pt", model=model, optimizer=opt, epoch=3)
        ...     poco.load(f"{folder}/run.pt", model=model, optimizer=opt)
        {'epoch': 3}
    """
    states, values = {}, {}
    for name, entry in entries.items():
        if name in _RESERVED:
            raise TypeError(f"{name}=…: `load` has an argument of this name; give the entry another name.")
        if isinstance(entry, type) or not hasattr(entry, "state_dict"):
            values[name] = entry
        else:
            states[name] = entry.state_dict()
    for name, plain in {**values, **states}.items():
        _check_plain(name, plain, "" if name in values else ".state_dict()")
    _write({_MARK: FORMAT, "states": states, "values": values, "random": _random_states()}, path)


def load(path: str | os.PathLike[str], /, *, map_location: Any = None, **objects: Any) -> dict[str, Any]:
    """Put a saved run back into its objects, all or nothing, and return the plain values that were saved with it.

    Make the model, the optimizer and the rest as for a new run, then load. Entries of the file that are not asked for
    are left alone. The states of torch's global random generators are put back too.

    Args:
        path: a file that `save` wrote.
        map_location: where tensors are put on reading, as in `torch.load`; None: where they were. Objects take their
            states to their own devices, so "cpu" is right whenever the devices of the file may be missing here.
        **objects: the objects that take up their states, by the names they were saved under.

    Returns:
        the plain values by name.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or not one of `save`'s, has no such entry, or an object refuses its state.
            All objects, and the random generators, are as they were.

    Example:
        >>> import tempfile, torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     poco.save(f"{folder}/run.pt", model=model)
        ...     try:
        ...         poco.load(f"{folder}/run.pt", model=torch.nn.Linear(3, 1))
        ...     except poco.CheckpointError as error:
        ...         print("Linear refuses" in str(error))
        True
    """
    for name, target in objects.items():
        if isinstance(target, type) or not (hasattr(target, "state_dict") and hasattr(target, "load_state_dict")):
            raise TypeError(
                f"{name}={type(target).__name__}: load puts states into objects with state_dict() and "
                "load_state_dict(); plain values are returned, so leave it out."
            )
    saved = _read(path, map_location)
    states = saved["states"]
    for name, target in objects.items():
        if name not in states:
            found = "a plain value, which load returns" if name in saved["values"] else "missing"
            raise CheckpointError(
                f"{os.fspath(path)!r}: the entry {name!r} is {found}; the file has states of {sorted(states)}, leave "
                f"{name} out or name it as it was saved."
            )
        _check_same_kind(path, name, target, states[name])
    # The optimizers of this package look at the whole state before they change anything: the last one needs no copy.
    order = sorted(objects, key=lambda name: isinstance(objects[name], (PosteriorCorrected, AlphaSVRG)))
    with _put_back_on_error() as undo:
        try:
            _set_random_states(saved["random"])
        except Exception as error:
            raise CheckpointError(
                f"{os.fspath(path)!r}: the states of the random generators do not fit this version of torch "
                f"({' '.join(str(error).split())}); nothing was loaded, use another file."
            ) from error
        for number, name in enumerate(order, 1):
            target = objects[name]
            if number < len(order) or not isinstance(target, (PosteriorCorrected, AlphaSVRG)):
                undo.append((target, copy.deepcopy(target.state_dict())))
            try:
                target.load_state_dict(states[name])
            except Exception as error:
                raise CheckpointError(
                    f"{os.fspath(path)!r}: {type(target).__name__} refuses the state of {name!r} "
                    f"({' '.join(str(error).split())}); nothing was loaded, make {name} as it was when it was saved."
                ) from error
        _set_random_states(saved["random"])  # again, if taking up a state has drawn numbers
    values: dict[str, Any] = saved["values"]
    return values


# ---- writing -------------------------------------------------------------------------------------------------


def _check_plain(name: str, value: Any, where: str) -> None:
    """Refuse what `torch.load(weights_only=True)` would refuse; `where` is the way to the value from the entry."""
    kind = type(value)
    if kind in _MAPPINGS:
        for key, inner in value.items():
            _check_plain(name, key, f"{where} (a key)")
            _check_plain(name, inner, f"{where}[{key!r}]")
    elif kind in _SEQUENCES:
        for number, inner in enumerate(value):
            _check_plain(name, inner, f"{where}[{number}]")
    elif is_spread(value):
        raise TypeError(
            f"{name}: {name}{where} is a DTensor, of which this process has a part; use torch.distributed.checkpoint "
            "(docs/scaling.md)."
        )
    elif kind not in _ATOMS and kind not in _TENSORS:
        raise TypeError(
            f"{name}: {name}{where} is a {kind.__module__}.{kind.__qualname__}, which is not read with "
            "weights_only=True; give numbers, strings, tensors, and lists, tuples and dictionaries of them."
        )


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _write(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    with written_aside(path) as file:
        torch.save(dict(content), file)
        size = file.tell()
        file.write(_seal(file, size))  # behind the archive's end, where torch.load does not look


def _seal(file: Any, size: int) -> bytes:
    """The checksum of the first `size` bytes, after which the file stands. `torch.load` compares none itself."""
    file.seek(0)
    checksum, left = 0, size
    while left > 0 and (part := file.read(min(left, 1 << 22))):
        checksum, left = zlib.crc32(part, checksum), left - len(part)
    return f"\n{_MARK} crc32 {checksum:08x}\n".encode()


# ---- reading -------------------------------------------------------------------------------------------------


def _read(path: str | os.PathLike[str], map_location: Any) -> dict[str, Any]:
    if not os.path.exists(path):
        raise FileNotFoundError(
            errno.ENOENT, "there is no such checkpoint; save one first, or check the path", os.fspath(path)
        )
    try:
        with open(path, "rb") as file:
            length = len(_seal(file, 0))
            size = max(0, os.fstat(file.fileno()).st_size - length)
            if _seal(file, size) != file.read(length):
                raise ValueError("the checksum at its end is missing or wrong")
            file.seek(0)
            content = torch.load(file, map_location=map_location, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{os.fspath(path)!r}: {_reason(error)}") from error
    if not isinstance(content, dict) or content.get(_MARK) != FORMAT:
        found = content.get(_MARK) if isinstance(content, dict) else None
        raise CheckpointError(
            f"{os.fspath(path)!r}: format {found!r} where {FORMAT} is needed; it was not written by this version of "
            "poco.save, give a file that was."
        )
    return content


def _reason(error: Exception) -> str:
    reason = f"{type(error).__name__}: {str(error).partition('. ')[0].strip()}"
    if "deserialize" in reason and "device" in reason:
        return f"its tensors are on a device that is missing here ({reason}); give map_location='cpu'."
    return f"it is damaged, or not a file of poco.save ({reason}); use another file."


def _check_same_kind(path: str | os.PathLike[str], name: str, target: Any, state: Any) -> None:
    """Schedulers take whatever they are given, so their entries are compared here."""
    if not isinstance(target, LRScheduler):
        return
    own, found = set(target.state_dict()), set(state)
    if own != found:
        raise CheckpointError(
            f"{os.fspath(path)!r}: the state of {name!r} is not one of a {type(target).__name__} (they differ in "
            f"{sorted(own ^ found)}); nothing was loaded, make {name} as it was when it was saved."
        )


@contextmanager
def _put_back_on_error() -> Iterator[list[tuple[Any, Any]]]:
    """Collects objects with their states of before, and puts those back if what happens inside fails."""
    undo: list[tuple[Any, Any]] = []
    random = _random_states()
    try:
        yield undo
    except BaseException:
        for target, state in reversed(undo):
            target.load_state_dict(state)
        _set_random_states(random)
        raise


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), device)
