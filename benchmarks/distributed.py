"""Time and bytes a step on 1, 2 and 4 processes, beside AdamW under the same wrapper.

    python benchmarks/distributed.py [--steps 30] [--width 512] [--sizes 1 2 4]

An MLP, gloo on the CPU, one thread a process; methods take turns, so that all meet the same machine. A step of a
corrected method has two evaluations; refreshes are not timed. Bytes are those of all tensors handed to collective
calls: what is summed, gathered or scattered. DDP's own messages, made in C++, are not seen (4 bytes a weight).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import expfam_poco as poco

METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "IVON": lambda model: poco.IVON(model.named_parameters(), lr=0.1, ess=1e6, seed=0),
    "IVON-PoCoMo": lambda model: poco.IVONPoCoMo(model.named_parameters(), lr=0.1, ess=1e6, alpha=0.7, seed=0),
}
BATCH = 64


class Counted:
    """Calls of torch.distributed's collective functions, and the bytes of their largest tensors."""

    # The last two have other names before torch 2.13.
    NAMES = ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor")
    NEWER = ("all_gather_single", "reduce_scatter_single")

    def __init__(self) -> None:
        self.calls, self.bytes = 0, 0
        for name in (*self.NAMES, *self.NEWER):
            if not hasattr(dist, name):
                continue
            setattr(dist, name, self._counting(getattr(dist, name)))

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            tensors = [v for v in (*arguments, *named.values()) if isinstance(v, Tensor)]
            self.calls, self.bytes = self.calls + 1, self.bytes + max(v.nbytes for v in tensors)
            return function(*arguments, **named)

        return call


def make_net(width: int, wrapper: str, size: int) -> tuple[nn.Module, nn.Module]:
    """The model, and what is called."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
    if wrapper == "ddp":
        return model, DistributedDataParallel(model) if size > 1 else model
    mesh = init_device_mesh("cpu", (size,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return model, fully_shard(model, mesh=mesh)


def stepped(method: str, optimizer: Any, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """What takes one step, after a refresh where there is one."""
    if method == "AdamW":

        def step() -> None:
            optimizer.zero_grad()
            mse_loss(net(x), y).backward()
            optimizer.step()

        return step
    if method == "IVON-PoCoMo":
        optimizer.refresh([lambda: mse_loss(net(x), y)])
    return lambda: optimizer.step(lambda: mse_loss(net(x), y))


def work(rank: int, size: int, options: argparse.Namespace, place: str, queue: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)
    counted, found = Counted(), []
    for wrapper in ("ddp", "fsdp"):
        runs: dict[str, Callable[[], Any]] = {}
        rows = slice(BATCH // size * rank, BATCH // size * (rank + 1))
        x, y = (torch.randn(BATCH, n, generator=torch.Generator().manual_seed(1))[rows] for n in (64, 1))
        for method, make in METHODS.items():
            model, net = make_net(options.width, wrapper, size)
            weights = sum(p.numel() for p in model.parameters())
            runs[method] = stepped(method, make(model), net, x, y)
            for _ in range(3):
                runs[method]()
        times: dict[str, list[float]] = {method: [] for method in runs}
        messages: dict[str, tuple[float, int]] = {}
        for _ in range(options.steps):
            for method, run in runs.items():
                before, calls = counted.bytes, counted.calls
                begun = time.perf_counter()
                run()
                times[method].append(time.perf_counter() - begun)
                messages[method] = (counted.bytes - before) / weights, counted.calls - calls
        found += [(wrapper, size, m, 1e3 * statistics.median(times[m]), *messages[m], weights) for m in runs]
    if rank == 0:
        queue.put(found)
    dist.destroy_process_group()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    fork = multiprocessing.get_context("fork")
    for size in options.sizes:
        queue = fork.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            workers = [
                fork.Process(target=work, args=(r, size, options, f"{folder}/meeting", queue)) for r in range(size)
            ]
            for worker in workers:
                worker.start()
            rows = queue.get()
            for worker in workers:
                worker.join()
        base = {wrapper: ms for wrapper, _, method, ms, *_ in rows if method == "AdamW"}
        for wrapper, _, method, ms, sent, calls, weights in rows:
            print(
                f"{wrapper:<5} {size} process(es), {weights} weights, {method:<12} {ms:7.1f} ms "
                f"({ms / base[wrapper]:.1f} ×) {sent:6.2f} bytes a weight in {calls} calls",
                flush=True,
            )


if __name__ == "__main__":
    main()
