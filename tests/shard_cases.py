"""What one of several processes does in tests/test_shards.py, where parameters are spread over them.

Usage: python shard_cases.py SIZE FOLDER [NAME…]: the outcome of every case (or of these, and of training by these
optimizers) is pickled into FOLDER, by each process into a file.
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
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.functional import mse_loss

import expfam_poco as poco

COMPILED: dict[str, Callable[[nn.Module], Any]] = {
    mode: lambda m, mode=mode: poco.IVONPoCoMo(
        m.named_parameters(), lr=0.1, ess=64.0, alpha=0.7, backend=mode, one_pass=True, seed=7
    )
    for mode in ("compiled", "mixed")
}
FOLDER = pathlib.Path()  # for what processes leave to others
JOINT = ("hutchinson", "VONPoCo")
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    **{name: make for name, make in cases.OPTIMIZERS.items() if name not in JOINT},
    "score": lambda m: poco.PosteriorCorrected(  # losses divided by deviations: a small step keeps their rounding small
        m.named_parameters(), "diagonal_gaussian", 0.01, 64.0, curvature="score", mc_samples=4, hess_init=1.0, seed=7
    ),
    "two draws": lambda m: poco.PosteriorCorrected(
        m.named_parameters(), "diagonal_gaussian", 0.1, 64.0,
        hess_init=1.0, momentum=0.9, mc_samples=2, noise="independent", seed=7,
    ),
}  # fmt: skip


LONGER = {"IVONPoCoMo": 2 * STEPS}  # until the variance meter has looked


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Sizes that no number of processes divides, and a layer of which some processes have nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 35), nn.Tanh(), nn.Linear(35, 22), nn.Tanh(), nn.Linear(22, 1)).to(dtype)


def spread(model: nn.Module, *sizes: int) -> nn.Module:
    mesh = init_device_mesh(
        "cpu", sizes or (dist.get_world_size(),), mesh_dim_names=("copies", "parts")[-len(sizes or (1,)) :]
    )
    fully_shard(model[0], mesh=mesh)
    fully_shard(model[2], mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def weights_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().flatten() for p in model.parameters()])


# ---- cases: what a process does, and what it hands back ----------------------------------------------------------


def trained(name: str, rank: int, size: int, dtype: torch.dtype = torch.float64, *sizes: int) -> Any:
    net = spread(make_model(dtype), *sizes)
    optimizer = {**OPTIMIZERS, **COMPILED}[name](net)
    losses = train(optimizer, net, [rows_of(rank, size)], dtype, LONGER.get(name, STEPS))
    return losses, weights_of(net), optimizer.diagnostics()


def train(
    optimizer: Any, net: nn.Module, parts: list[slice], dtype: torch.dtype = torch.float64, steps: int = STEPS
) -> list[float]:
    """Steps with this process's rows (or all), refreshes in which all processes evaluate a chunk together."""
    (x, y), own = make_data(dtype), slice(parts[0].start, parts[-1].stop)
    losses = []
    for i in range(steps):
        i %= STEPS
        if i in cases.REFRESHES and "correction='none'" not in str(getattr(optimizer, "correction", "")):
            chunks = [lambda j=j: mse_loss(net(x[j, own]), y[j, own]) for j in cases.REFRESHES[i]]
            optimizer.refresh(chunks, **({} if isinstance(optimizer, poco.AlphaSVRG) else {"draws": 2}))
        losses.append(float(optimizer.step(lambda i=i: mse_loss(net(x[i, own]), y[i, own]))))
    return losses


def train_from(path: pathlib.Path, name: str, net: nn.Module, own: slice, steps: range) -> tuple[Tensor, Any]:
    """Steps in the middle of an inner loop, from a checkpoint if they are not the first; what would be saved."""
    make, flat = SAVED[name]
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer, (x, y) = make(net), make_data()
    if steps.start:
        if name == "next task":  # what torch reads into must be there
            optimizer.step(lambda: mse_loss(net(x[0, own]), y[0, own]))
            optimizer.next_task()
        found = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer, options=options), strict=True))
        dcp.load(found, checkpoint_id=path)
        set_state_dict(
            net, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"], options=options
        )
    for i in steps:
        if i == 1:
            if name == "next task":
                optimizer.next_task()
            optimizer.refresh([lambda j=j: mse_loss(net(x[j, own]), y[j, own]) for j in range(2)])
        optimizer.step(lambda i=i: mse_loss(net(x[i, own]), y[i, own]))
    made = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer, options=options), strict=True))
    return weights_of(net), made


def saved(rank: int, size: int) -> Any:
    """Checkpoints after three steps, and where six lead."""
    found = {}
    for name in SAVED:
        path, own = FOLDER / f"saved by {size} {name}", rows_of(rank, size)
        _, made = train_from(path, name, spread(make_model()), own, range(3))
        if name == "clipped":
            dcp.async_save(made, checkpoint_id=path).result()
        else:
            dcp.save(made, checkpoint_id=path)
        found[name] = train_from(path, name, spread(make_model()), own, range(STEPS))[0]
    return found


def resumed(rank: int, size: int) -> Any:
    """From checkpoints of as many processes as these, and of four where there are any."""
    found = {}
    for name in SAVED:
        for by in (4, size):
            path = FOLDER / f"saved by {by} {name}"
            if not path.exists():
                continue
            found[name, by] = train_from(path, name, spread(make_model()), rows_of(rank, size), range(3, STEPS))[0]
    return found


def predicted(rank: int, size: int) -> Any:
    """Predictions, the objective, and what the model computes between steps, all without a backward pass after them."""
    (x, y), own = make_data(), rows_of(rank, size)
    net = spread(make_model()) if size > 1 else make_model()
    # Parts that have been assigned are laid anew in the first forward pass, which is that of a draw.
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    optimizer = OPTIMIZERS["IVONPoCoMo"](net)
    found = []
    for i in range(3):
        optimizer.step(lambda i=i: mse_loss(net(x[i, own]), y[i, own]))
        with torch.no_grad():
            found.append(net(x[i]))
        found.append(poco.predict(net, optimizer, x[i], samples=2, seed=i))
        found.append(net(x[i]).detach())
    elbo = optimizer.objective([lambda: mse_loss(net(x[0, own]), y[0, own])], samples=3)
    stored = optimizer.posterior_states()
    optimizer.step(lambda: mse_loss(net(x[0, own]), y[0, own]))
    after = weights_of(net)
    optimizer.set_posterior(stored)
    with torch.no_grad():
        found.append(net(x[2]))
    return found, tuple(elbo), after


def several(rank: int, size: int) -> Any:
    """Micro-batches, whole parameters beside spread ones, a frozen layer, others' gradients."""
    torch.manual_seed(0)
    model, (x, y), own = make_model(), make_data(), rows_of(rank, size)
    scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
    other = nn.Parameter(torch.ones(1, dtype=torch.float64))
    other.grad = torch.full_like(other, 5.0)
    model[0].requires_grad_(False)
    net = spread(model) if size > 1 else model
    named = [*net.named_parameters(), ("scale", scale)]
    optimizer = poco.IVON(named, lr=0.1, ess=64.0, seed=7, max_grad_norm=0.1)

    def closure(i: int) -> Tensor:
        return mse_loss(net(x[i, own]) * scale.sum() + other, y[i, own])

    for i in range(3):
        optimizer.step([lambda i=i: closure(i), lambda i=i: closure(i + 1)], weights=[3.0, 1.0])
    kept = float(other.grad) == 5.0 and all(p.grad is None for p in (*net.parameters(), scale))
    return weights_of(net), scale.detach(), kept


def rows_by_hand(rank: int, size: int) -> Any:
    """Parameters that are DTensors without fully_shard: every process evaluates the whole loss."""
    model, (x, y) = cases.make_model(), make_data()
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for name, p in list(model[0].named_parameters()):
            setattr(model[0], name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
        x = distribute_tensor(x, mesh, [Replicate()])

    def closure(i: int) -> Tensor:
        inner = model[:2](x[i])
        return mse_loss(model[2](inner.full_tensor() if size > 1 else inner), y[i])

    optimizer = OPTIMIZERS["IVON"](model)
    for i in range(3):
        optimizer.step(lambda i=i: closure(i))
    return weights_of(model)


def refused(rank: int, size: int) -> Any:
    """Messages of every process, and whether nothing has changed."""
    net, (x, y), own, odd = spread(make_model()), make_data(), rows_of(rank, size), rank == size - 1
    before, found = weights_of(net), {}

    def loss() -> Tensor:
        return mse_loss(net(x[0, own]), y[0, own])

    def nan() -> Tensor:
        return loss() * (torch.nan if odd else 1.0)

    def far() -> Tensor:
        """A step to infinity for weights of the last process's rows alone."""
        seen: list[Tensor] = []
        handle = net[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
        value = loss()
        handle.remove()
        return value + 1e300 * seen[0][:, -1].mean()

    def of(**given: Any) -> Any:
        return poco.IVONPoCo(net.named_parameters(), **{"lr": 0.1, "ess": 64.0, "seed": 7, **given})

    attempts: dict[str, Callable[[], Any]] = {
        "no batch": lambda: of().step([] if odd else [loss]),
        "chunks": lambda: of().refresh([loss] * (1 + odd)),
        "micro-batches": lambda: of().step([loss] * (2 + odd)),
        "weights": lambda: of().step([loss, loss], weights=[1.0 + odd, 1.0]),
        "seed": lambda: of(seed=rank).step(loss),
        "nan": lambda: of().step(nan),
        "nan of a refresh": lambda: of().refresh([nan]),
        "far": lambda: of(lr=1e10).step(far),
        "own noise": lambda: of(noise_per_rank=True).step(loss),
        "measure_variance": lambda: of().measure_variance([loss, loss]),
    }
    for name, attempt in attempts.items():
        found[name] = cases.message_of(attempt), torch.equal(before, weights_of(net))
    optimizer = of(nonfinite="skip")
    for closure in (loss, nan, loss):
        optimizer.step(closure)
    found["skipped"] = optimizer.diagnostics()["skipped_steps"], weights_of(net)
    return found


def left(rank: int, size: int) -> Any:
    """The last case: one process fails inside its closure, while others wait for it there."""
    net, (x, y), own = spread(make_model()), make_data(), rows_of(rank, size)
    optimizer = OPTIMIZERS["IVON"](net)

    def closure() -> Tensor:
        if rank:
            raise ValueError("a broken batch")
        return mse_loss(net(x[0, own]), y[0, own])

    return cases.message_of(lambda: optimizer.step(closure))


SAVED: dict[str, tuple[Callable[[nn.Module], Any], bool]] = {
    "IVONPoCoMo": (OPTIMIZERS["IVONPoCoMo"], False),
    "streamed": (OPTIMIZERS["streamed"], True),
    "AlphaSVRG": (OPTIMIZERS["AlphaSVRG"], False),
    "clipped": (lambda m: poco.IVONPoCo(m.named_parameters(), lr=0.1, ess=64.0, max_grad_norm=0.1, seed=7), True),
    "next task": (OPTIMIZERS["IVONPoCoMo"], False),
}
CASES = predicted, several, rows_by_hand, refused, saved, resumed, left
FOUR = ("IVONPoCoMo", "streamed", "clipped")


def work(rank: int, size: int, folder: pathlib.Path, only: list[str]) -> None:
    global FOLDER
    FOLDER = folder
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="params: |ess: |.*barrier")
    place, limit = f"file://{folder}/meeting of {size}", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size, timeout=limit)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    every = {**OPTIMIZERS, **COMPILED}
    names = [name for name in only if name in every] if only else (OPTIMIZERS if size == 2 else FOUR)
    found: dict[str, Any] = {f"trained {name}": trained(name, rank, size) for name in names}
    if only:
        pass
    elif size == 2:
        found["trained float32"] = trained("IVONPoCoMo", rank, size, torch.float32)
    else:
        found["trained in copies"] = trained("IVONPoCoMo", rank, size, torch.float64, 2, 2)
        found["saved"] = saved(rank, size)
    for case in CASES:
        if case.__name__ in only or (size == 2 and not only):
            found[case.__name__] = case(rank, size)
    (folder / f"{size} {rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":  # forked, so that torch is imported once
    size, folder, only = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(r, size, folder, only)) for r in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(max(abs(worker.exitcode or 0) for worker in workers))
