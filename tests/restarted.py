"""A training run under torchrun whose processes kill themselves, and which goes on from its last checkpoint.

Usage: torchrun … restarted.py FOLDER WRAPPER [RANK:STEP …]: each of these processes is killed, once, at that step. The
weights that come out are written to FOLDER/weights.
"""

import datetime
import os
import pathlib
import signal
import sys
import warnings
from typing import Any

import process_cases as cases
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

STEPS, EVERY = 24, 3


def train(net: torch.nn.Module, own: slice, begin: int, save: Any = None, die: Any = None) -> None:
    """Steps from `begin` on; a new q_out every five."""
    optimizer, (x, y) = cases.OPTIMIZERS["IVONPoCoMo"](getattr(net, "module", net)), cases.make_data()
    if begin:
        save(net, optimizer, begin, load=True)
    for step in range(begin, STEPS):
        if save is not None and step > begin and step % EVERY == 0:
            save(net, optimizer, step)
        if die is not None:
            die(step)
        i = step % cases.STEPS
        if step % 5 == 2:
            optimizer.refresh([lambda j=j: mse_loss(net(x[j, own]), y[j, own]) for j in range(2)])
        optimizer.step(lambda i=i: mse_loss(net(x[i, own]), y[i, own]))


def main(folder: pathlib.Path, wrapper: str, kills: list[str]) -> None:
    from shard_cases import make_model, spread, weights_of

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # A restart may find gloo waiting for itself; it fails after this time, and is started once more.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    rank, size = dist.get_rank(), dist.get_world_size()
    net = DistributedDataParallel(make_model()) if wrapper == "ddp" else spread(make_model())

    def save(net: torch.nn.Module, optimizer: Any, step: int, load: bool = False) -> None:
        model_state, optimizer_state = get_state_dict(net, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        if not load:
            dcp.save(state, checkpoint_id=folder / str(step))
            return
        dcp.load(state, checkpoint_id=folder / str(step))
        set_state_dict(net, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)

    def die(step: int) -> None:
        mark = folder / f"killed {rank}:{step}"
        if f"{rank}:{step}" in kills and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    begin = max([int(path.parent.name) for path in folder.glob("*/.metadata")], default=0)
    train(net, cases.rows_of(rank, size), begin, save, die)
    weights = weights_of(net)
    if rank == 0:
        torch.save(weights, folder / "weights")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
