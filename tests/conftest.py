"""What all tests share: one thread per worker, fixed seeds, precision on request, no CUDA where none is."""

import ctypes
import gc
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")  # no screen
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compiling processes per worker
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of subprocesses, too: the workers share the cores

import numpy as np
import pytest
import torch
from hypothesis import settings

from expfam_poco.noise import NoiseKey, noise

# The workers of pytest-xdist share the cores, and one thread fixes the order of sums.
torch.set_num_threads(1)

CLEAN = {"resident": 0}  # bytes after the last return of freed memory

settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
settings.load_profile("reproducible")


# Optimizers that differ from another one by numbers or by a step's last line: in loops of others they repeat it.
REPEATED = {"VSGDPoCo", "VON", "IVONPoCo", "diagonal-gradsq", "bernoulli-mean", "AlphaSVRG-SGD", "VSGD-official"}


def pytest_itemcollected(item: pytest.Item) -> None:
    """In tests of training loops, habits and peers, what repeats another case is slow; so are edges in float64.

    A member that breaks a law near the edge of its domain breaks it in float32 first.
    """
    of_loops = (
        item.path.name.startswith(("test_loop_", "test_habits", "test_optimizer_", "test_checkpoints"))
        or item.path.parent.name == "peers"
    )
    name = getattr(item, "callspec", None) and item.callspec.params.get("name")  # type: ignore[attr-defined]
    if of_loops and isinstance(name, str) and name in REPEATED:
        item.add_marker(pytest.mark.slow)
    if item.path.name == "test_conformance.py" and item.name.startswith("test_edges") and "float64" in item.name:
        item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pytest-xdist see its groups; skip tests marked `cuda` where there is no CUDA device.

    pytest-xdist 3.8 writes "@group" behind an item's `_nodeid`, from which pytest 9.2 does not make the `nodeid` any
    more: groups would be spread over the workers without a word (pytest-xdist issue 1386).
    """
    for item in items:
        written = vars(item).get("_nodeid", item.nodeid)
        if written != item.nodeid:
            item._id = type(item._id).parse(written)  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(scope="module", autouse=True)
def heap_set_aside() -> None:
    """What is alive before a file's tests is out of the garbage collector's sight, and is not searched again and again.

    An optimizer's first step looks through all tracked objects for the modules around its parameters. All tests and
    their libraries imported, that takes 0.3 s, and a test makes several optimizers.
    """
    gc.collect()
    gc.freeze()


KEPT = 300 * 2**20


@pytest.fixture(scope="module")
def noise_is_made_once() -> Iterator[None]:
    """A hundred reports look up the same noise, which is a function of its address; making it is half of their time.

    Kept is that of the reports' default seed, up to `KEPT` bytes: first come, since all reports ask in the same order.
    """
    made: dict[Any, torch.Tensor] = {}

    def looked_up(kind: str, shape: Any, draws: int, key: NoiseKey, **rest: Any) -> torch.Tensor:
        where = kind, tuple(shape), draws, key, *sorted(rest.items(), key=str)
        if where in made:
            return made[where].clone()
        found = noise(kind, shape, draws, key, **rest)
        if key.seed == 0 and sum(value.nbytes for value in made.values()) + found.nbytes <= KEPT:
            made[where] = found.clone()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expfam_poco.family.base.noise", looked_up)
        yield


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def freed_memory_given_back() -> Iterator[None]:
    """What tests free stays in the C library's heap, between small things that live on, and a worker would grow."""
    yield
    if sys.platform == "linux" and resident() > CLEAN["resident"] + 48 * 2**20:
        getattr(ctypes.CDLL(None), "malloc_trim", bool)(0)  # which only the GNU library has
        CLEAN["resident"] = resident()


@pytest.fixture(autouse=True)
def fixed_seeds() -> Iterator[None]:
    """Every test starts from the same state of all global generators, and leaves the default dtype alone."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def float64(fixed_seeds: None) -> None:
    """Tensors made in this test are float64 unless they say otherwise."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The test runs in both precisions."""
    return request.param
