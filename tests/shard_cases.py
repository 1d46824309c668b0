"""What one of several processes does in tests/test_shards.py, where parameters are spread over them.

Usage: python shard_cases.py SIZE FOLDER: every case's outcome is pickled into FOLDER, by each process into a file.
"""

import datetime
import multiprocessing
import os
import pathlib
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

import process_cases as cases
import torch
import torch.distributed as dist
from process_cases import STEPS, make_data, rows_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

import expfam_poco as poco

FOLDER = pathlib.Path()  # for what processes leave to others
JOINT = ("hutchinson", "VONPoCo")
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    **{name: make for name, make in cases.OPTIMIZERS.items() if name not in JOINT},
    "compiled": lambda m: poco.IVONPoCoMo(
        m.named_parameters(), lr=0.1, ess=64.0, alpha=0.7, backend="compiled", seed=7
    ),
    "two draws": lambda m: poco.PosteriorCorrected(
        m.named_parameters(), "diagonal_gaussian", 0.1, 64.0,
        hess_init=1.0, momentum=0.9, mc_samples=2, noise="independent", seed=7,
    ),
}  # fmt: skip


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Sizes that no number of processes divides, and a layer of which some processes have nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 35), nn.Tanh(), nn.Linear(35, 22), nn.Tanh(), nn.Linear(22, 1)).to(dtype)


def spread(model: nn.Module, *sizes: int) -> nn.Module:
    mesh = init_device_mesh("cpu", sizes or (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model[2], mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def weights_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().flatten() for p in model.parameters()])


# ---- cases: what a process does, and what it hands back ----------------------------------------------------------


def trained(name: str, rank: int, size: int, dtype: torch.dtype = torch.float64, *sizes: int) -> Any:
    net = spread(make_model(dtype), *sizes)
    optimizer = OPTIMIZERS[name](net)
    losses = train(optimizer, net, [rows_of(rank, size)], dtype)
    return losses, weights_of(net), optimizer.diagnostics()


def train(optimizer: Any, net: nn.Module, parts: list[slice], dtype: torch.dtype = torch.float64) -> list[float]:
    """Steps with this process's rows (or all), refreshes in which all processes evaluate a chunk together."""
    (x, y), own = make_data(dtype), slice(parts[0].start, parts[-1].stop)
    losses = []
    for i in range(2 * STEPS):
        i %= STEPS
        if i in cases.REFRESHES and "correction='none'" not in str(getattr(optimizer, "correction", "")):
            optimizer.refresh([lambda j=j: mse_loss(net(x[j, own]), y[j, own]) for j in cases.REFRESHES[i]])
        losses.append(float(optimizer.step(lambda i=i: mse_loss(net(x[i, own]), y[i, own]))))
    return losses


CASES: tuple[Any, ...] = ()
FOUR = ("IVONPoCoMo", "streamed", "clipped")


def work(rank: int, size: int, folder: pathlib.Path) -> None:
    global FOLDER
    FOLDER = folder
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="params: |ess: |.*barrier")
    place, limit = f"file://{folder}/meeting", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size, timeout=limit)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    names = OPTIMIZERS if size == 2 else FOUR
    found: dict[str, Any] = {f"trained {name}": trained(name, rank, size) for name in names}
    if size == 2:
        found["trained float32"] = trained("IVONPoCoMo", rank, size, torch.float32)
    else:
        found["trained in copies"] = trained("IVONPoCoMo", rank, size, torch.float64, 2, 2)
    for case in CASES if size == 2 else ():
        found[case.__name__] = case(rank, size)
    (folder / str(rank)).write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":  # forked, so that torch is imported once
    size, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
    workers = [multiprocessing.get_context("fork").Process(target=work, args=(r, size, folder)) for r in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(max(abs(worker.exitcode or 0) for worker in workers))
