"""Products with weights of one bit in C++, which the compiler that is there builds at first use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("packed_kernel.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
FEW_ROWS = 16  # so many examples are worth unpacking the weights for a product of floats
TILE = 1 << 18  # weights that are unpacked at a time
WORK = 1 << 22  # products that are worth a second thread
_POINTERS = {"signed_sums": 3, "pack_activations": 3, "agreements": 4, "unpack_signs": 2}
_NUMBERS = {"signed_sums": 4, "pack_activations": 2, "agreements": 4, "unpack_signs": 3}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernel, from the cache (`$XDG_CACHE_HOME/expfam_poco`) or built there by `$CXX` (`c++`); None: it cannot be.

    Then one warning says why, and torch's own operations take its place. The file in the cache is that of the source,
    the compiler's command and the processor.

    Example:
        >>> from expfam_poco.tools.packed_kernel import library
        >>> library() is library()
        True
    """
    try:
        built = _built()
        kernel = ctypes.CDLL(str(built))
        for name, pointers in _POINTERS.items():
            function = getattr(kernel, name)
            function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * _NUMBERS[name]
            function.restype = ctypes.c_int64 if name == "pack_activations" else None
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"packed layers: the C++ kernel could not be built ({' '.join(said.split())[:300]}), so torch unpacks "
            "their weights piece by piece, which is right and slow; install a compiler (g++ or clang++, or name one in "
            "$CXX), or set $XDG_CACHE_HOME to a folder that can be written.",
            stacklevel=2,
        )
        return None
    return kernel


def _built() -> Path:
    command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS]
    key = hashlib.sha256("\0".join([SOURCE.read_text(encoding="utf-8"), *command, _processor()]).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expfam_poco"
    target = folder / f"packed_kernel-{key.hexdigest()[:32]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:  # several processes may build at once
            made = Path(aside, "kernel.so")
            subprocess.run(
                [*command, "-o", str(made), str(SOURCE)], check=True, capture_output=True, text=True, timeout=120,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            os.replace(made, target)
    return target


def _processor() -> str:
    """What -march=native depends on; a folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        known = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    except OSError:
        known = []
    return "\n".join([platform.machine(), *(known or [platform.node()])])


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for what is on this device: float32 on the CPU, while nothing is traced."""
    # A compiled or exported model has torch's operations, which are its to fuse, in place of ours.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and device.type == "cpu" and dtype == torch.float32 and library() is not None


def usable(x: Tensor) -> bool:
    """Whether the kernel can read these activations: they are neither differentiated nor a transformation's."""
    if type(x) not in (Tensor, torch.nn.Parameter) or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return available(x.device, x.dtype) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def packed_activations(x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Rows of −1, 0 and 1 as bits: where they are 1, and where they are not 0 (None: nowhere 0).

    None in place of both where there are other values.

    Args:
        x: (rows, n), `usable` and contiguous.
    """
    rows, n = x.shape
    signs = torch.empty(rows, (n + 7) // 8, dtype=torch.uint8)
    there = torch.empty_like(signs)
    found = _called("pack_activations", x, signs, there, numbers=(rows, n))
    return None if found == 0 else (signs, there if found == 2 else None)


def agreements(signs: Tensor, there: Tensor | None, bits: Tensor, n: int) -> Tensor:
    """x Sᵀ for packed activations: n − 2 popcount(a xor w), or popcount(z) − 2 popcount((a xor w) and z) with zeros."""
    rows, out = len(signs), len(bits)
    y = torch.empty(rows, out)
    _called("agreements", signs, there, bits, y, numbers=(rows, n, out, _threads(rows * n * out)))
    return y


def product(x: Tensor, bits: Tensor) -> Tensor | None:
    """x Sᵀ, with S the ±1 of the bits; None where multiplying unpacked weights is faster.

    Activations that are all −1, 0 or 1 are packed too, and counted; of others, while rows are few, sums are taken with
    the weights' signs.

    Args:
        x: (rows, n), `usable`.
        bits: (out, ⌈n/8⌉).
    """
    x = x.detach().contiguous()
    packed = packed_activations(x)
    if packed is not None:
        return agreements(*packed, bits, x.shape[1])
    if len(x) >= FEW_ROWS:
        return None
    y = torch.empty(len(x), len(bits))
    _called("signed_sums", x, bits, y, numbers=(*x.shape, len(bits), _threads(x.numel() * len(bits))))
    return y


def unpacked(bits: Tensor, n: int) -> Tensor:
    """S, (rows, n) of −1 and 1, from its bits (rows, ⌈n/8⌉)."""
    weights = torch.empty(len(bits), n)
    _called("unpack_signs", bits, weights, numbers=(len(bits), n, _threads(weights.numel())))
    return weights


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= WORK else 1


def _called(name: str, *tensors: Tensor | None, numbers: tuple[int, ...]) -> int:
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    value: int = getattr(library(), name)(*pointers, *numbers)
    return value
