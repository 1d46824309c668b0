"""The small GPT on several processes: one model, a batch dealt out, by DistributedDataParallel or fully_shard (FSDP2).

    torchrun --standalone --nproc_per_node 2 examples/train_distributed.py
    torchrun --standalone --nproc_per_node 2 examples/train_distributed.py --wrapper fsdp
    torchrun --standalone --nproc_per_node 2 examples/train_distributed.py --method adamw
    python examples/train_distributed.py --steps 20                     # one process, the same numbers

The global batch is the same on any number of processes, so is the noise, and so the curve, but that under DDP every
process draws for its own chunks of a mega-batch. With --checkpoint FOLDER the
run saves every --every steps, and goes on from the last checkpoint if there is one, on any number of processes:

    torchrun --standalone --nproc_per_node 2 --max-restarts 3 examples/train_distributed.py --checkpoint run
"""

from __future__ import annotations

import argparse
import os
import pathlib
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from corpus import MEGA_BATCH, TRAINING, load
from gpt import GPT, PRESETS, preset
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import expfam_poco as poco

CONTEXT = 64
RATES = {"adamw": 3e-3, "ivon": 0.3, "ivon-pocomo": 0.3}


def make_optimizer(method: str, model: nn.Module) -> Any:
    """The method with the rates of `language_model.py`."""
    if method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=RATES[method], betas=(0.9, 0.95), weight_decay=0.1)
    chosen: dict[str, Any] = dict(lr=RATES[method], ess=1e8, hess_init=1e-3, beta2=0.99, clip_radius=1e-2, seed=0)
    kind = poco.IVON if method == "ivon" else poco.IVONPoCoMo
    return kind(model.named_parameters(), weight_decay=1e-6, rescale_lr=False, **chosen)


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Nats a token."""
    scores: Tensor = model(tokens[:, :-1])
    return cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten())


def wrap(model: GPT, wrapper: str, size: int) -> nn.Module:
    """The model as processes share it: whole on each, or its rows dealt out."""
    if size == 1:
        return model
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def latest(folder: pathlib.Path) -> int:
    """The step of the last checkpoint that is complete; 0 where there is none."""
    return max([int(path.parent.name) for path in folder.glob("*/.metadata")], default=0)


def save(folder: pathlib.Path, step: int, net: nn.Module, optimizer: Any) -> None:
    """A checkpoint of all processes; its last file is written when all others are there."""
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / str(step))


def resume(folder: pathlib.Path, step: int, net: nn.Module, optimizer: Any) -> None:
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / str(step))
    set_state_dict(net, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def train(options: argparse.Namespace, rank: int, size: int) -> None:
    """Steps on this process's rows of every batch, refreshes from its share of every mega-batch."""
    corpus = load("stdlib", CONTEXT)
    torch.manual_seed(0)
    model = GPT(preset(options.preset, context=CONTEXT, vocabulary=corpus.tokenizer.vocabulary))
    net = wrap(model, options.wrapper, size)
    optimizer = make_optimizer(options.method, model)
    begin = latest(options.checkpoint) if options.checkpoint else 0
    if begin:
        resume(options.checkpoint, begin, net, optimizer)
    held_out = corpus.validation(CONTEXT, 32)

    def own_rows(stream: int, index: int) -> Tensor:
        return corpus.batch(CONTEXT, options.batch, seed=0, stream=stream, index=index)[rank::size]

    for step in range(begin, options.steps):
        if options.checkpoint and step > begin and step % options.every == 0:
            save(options.checkpoint, step, net, optimizer)
        tokens = own_rows(TRAINING, step)
        if options.method == "adamw":
            optimizer.zero_grad()
            next_token_loss(net, tokens).backward()
            optimizer.step()
            continue
        if options.method == "ivon-pocomo" and step >= options.every and step % options.every == 0:
            chunks = [own_rows(MEGA_BATCH, step + k) for k in range(options.every)]
            optimizer.refresh([lambda own=own: next_token_loss(net, own) for own in chunks])
        optimizer.step(lambda tokens=tokens: next_token_loss(net, tokens))
    with torch.no_grad():
        loss = next_token_loss(net, held_out)
    if rank == 0:
        print(f"{options.method}, {size} process(es): {loss:.4f} nats a byte after {options.steps} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(RATES), default="ivon-pocomo")
    parser.add_argument("--wrapper", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="folder of checkpoints (torch.distributed.checkpoint)")
    parser.add_argument("--preset", choices=list(PRESETS), default="nano")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="windows in a batch, of all processes together")
    parser.add_argument(
        "--every", type=int, default=10, help="steps between mega-batches and checkpoints, and batches in one"
    )
    options = parser.parse_args()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo")
    try:
        train(options, dist.get_rank() if size > 1 else 0, size)
    finally:
        if size > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
