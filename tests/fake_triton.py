"""As much of Triton as the library's kernels use, in NumPy: they run, program by program, where there is no Triton.

Values are arrays, of one entry for what is a scalar to a kernel; a pointer is an array of addresses, which are read and
written where they lie in memory.
"""

import ctypes
import math
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

NUMPY = {
    torch.float64: np.float64, torch.float32: np.float32, torch.int64: np.int64, torch.int32: np.int32,
    torch.bool: np.bool_,
}  # fmt: skip


class Value(np.ndarray):
    """What a kernel computes with."""

    def to(self, dtype: Any, bitcast: bool = False) -> Any:
        if isinstance(dtype, PointerType):
            return Pointer(np.asarray(self), dtype.entry)
        return value(self.view(dtype) if bitcast else self.astype(dtype))


def value(found: Any) -> Value:
    return np.atleast_1d(np.asarray(found)).view(Value)


class PointerType:
    def __init__(self, entry: Any) -> None:
        self.entry = entry


class Pointer:
    """Addresses of entries of one dtype."""

    def __init__(self, addresses: Any, entry: Any) -> None:
        self.addresses, self.entry = np.atleast_1d(np.asarray(addresses)).astype(np.int64), np.dtype(entry)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.addresses + np.asarray(offset).astype(np.int64) * self.entry.itemsize, self.entry)

    def memory(self, mask: Any) -> Any:
        """The memory that the addresses in the mask span, and their places in it; all are of one tensor."""
        first, last = self.addresses[mask].min(), self.addresses[mask].max()
        span = (ctypes.c_char * int(last - first + self.entry.itemsize)).from_address(int(first))
        return np.frombuffer(span, self.entry), (self.addresses[mask] - first) // self.entry.itemsize


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
    mask = np.broadcast_to(True if mask is None else mask, pointer.addresses.shape)
    found = np.full(pointer.addresses.shape, other, pointer.entry)
    if mask.any():
        memory, places = pointer.memory(mask)
        found[mask] = memory[places]
    return value(found)


def store(pointer: Pointer, values: Any, mask: Any = None) -> None:
    shape = np.broadcast_shapes(pointer.addresses.shape, np.shape(values))
    mask = np.broadcast_to(True if mask is None else mask, shape)
    if mask.any():
        memory, places = pointer.memory(mask)
        memory[places] = np.broadcast_to(values, shape)[mask]


def umulhi(first: Any, second: Any) -> Value:
    return value(((first.astype(np.uint64) * second.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32))


class Jit:
    """A function of a kernel, and a kernel: `kernel[grid](…)`."""

    launches: ClassVar[list[str]] = []

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*tensors: Tensor, BLOCKS: int, num_warps: int) -> None:
            Jit.launches.append(self._function.__name__)
            pointers = [Pointer(tensor.data_ptr(), NUMPY[tensor.dtype]) for tensor in tensors]
            with np.errstate(all="ignore"):
                for program in range(grid[0]):
                    _LANGUAGE.program_id = lambda axis, program=program: value(np.int64(program))
                    self._function(*pointers, BLOCKS)

        return launch


def _sum(values: Any, axis: int) -> Value:
    return value(np.asarray(values).sum(axis))


_LANGUAGE = SimpleNamespace(
    float64=np.float64, float32=np.float32, int64=np.int64, int32=np.int32, uint32=np.uint32, int1=np.bool_,
    constexpr=int, pointer_type=PointerType, load=load, store=store, umulhi=umulhi, sum=_sum, static_range=range,
    PropagateNan=SimpleNamespace(ALL=None), multiple_of=lambda values, _: values,
    arange=lambda first, last: value(np.arange(first, last, dtype=np.int32)),
    full=lambda shape, number, dtype: value(np.full(shape, number, dtype)),
    zeros_like=lambda values: value(np.zeros_like(values)), where=lambda *parts: value(np.where(*parts)),
    maximum=lambda a, b, propagate_nan=None: value(np.maximum(a, b)),
    minimum=lambda a, b, propagate_nan=None: value(np.minimum(a, b)), fma=lambda a, b, c: value(a * b + c),
    **{f.__name__.replace("absolute", "abs"): (lambda values, f=f: value(f(values)))
       for f in (np.exp, np.exp2, np.log, np.log2, np.sin, np.cos, np.abs, np.floor, np.ceil, np.sqrt)},
)  # fmt: skip
_LIBDEVICE = SimpleNamespace(
    **{
        name: (lambda *values, f=function: value(f(*values)))
        for name, function in {
            "tanh": np.tanh, "expm1": np.expm1, "log1p": np.log1p, "atanh": np.arctanh, "pow": np.power,
            "lgamma": np.vectorize(math.lgamma), "hypot": np.hypot,
        }.items()
    }
)  # fmt: skip


def loaded(source: str) -> Any:
    """`fused._loaded` by what stands here."""
    imports, text = source.split("\n\n", 1)
    assert all(line.startswith(("import triton", "from triton")) for line in imports.splitlines())
    names: dict[str, Any] = {"triton": SimpleNamespace(jit=Jit), "tl": _LANGUAGE, "libdevice": _LIBDEVICE}
    exec(compile(text, "kernel", "exec"), names)
    return names["kernel"]
