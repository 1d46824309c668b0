"""What one of several processes does in tests/test_processes.py.

Usage: python process_cases.py SIZE FOLDER: every case's outcome is pickled into FOLDER, by each process into a file.
"""

import datetime
import functools
import multiprocessing
import os
import pathlib
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import expfam_poco as poco

STEPS, ROWS = 6, 64
FOLDER = pathlib.Path()  # for what processes leave to others
REFRESHES = {2: range(4), 4: range(3, 6)}


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


def make_data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(STEPS, ROWS, n, generator=generator, dtype=torch.float64) for n in (8, 1))
    return x.to(dtype), y.to(dtype)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "IVON": lambda m: poco.IVON(m.named_parameters(), lr=0.1, ess=64.0, seed=7),
    "IVONPoCoMo": lambda m: poco.IVONPoCoMo(m.named_parameters(), lr=0.1, ess=64.0, alpha=0.7, seed=7),
    "streamed": lambda m: poco.IVONPoCo(
        m.named_parameters(), lr=0.1, ess=64.0, alpha="adaptive", backend="eager", seed=7
    ),
    "antithetic": lambda m: poco.IVONPoCo(
        m.named_parameters(), lr=0.1, ess=64.0, noise="antithetic", mc_samples=2, seed=7
    ),
    "hutchinson": lambda m: poco.IVON(m.named_parameters(), lr=0.1, ess=64.0, curvature="hutchinson", seed=7),
    "gradsq": lambda m: poco.IVON(m.named_parameters(), lr=0.1, ess=64.0, curvature="gradsq", seed=7),
    "SVRG": lambda m: poco.SVRG(m.named_parameters(), lr=0.1),
    "VONPoCo": lambda m: poco.VONPoCo(m.named_parameters(), lr=0.1, ess=64.0, seed=7),
    "BayesBiNN": lambda m: poco.BayesBiNNPoCo(
        m.named_parameters(), square_momentum=None, lr=0.1, ess=64.0, alpha=0.7, seed=7
    ),
    "score": lambda m: poco.PosteriorCorrected(
        m.named_parameters(), "diagonal_gaussian", 0.1, 64.0, curvature="score", mc_samples=4, hess_init=1.0, seed=7
    ),
    "STORM": lambda m: poco.PosteriorCorrected(
        m.named_parameters(), "diagonal_gaussian", 0.1, 64.0, correction="recursive", alpha=0.5, hess_init=1.0, seed=7
    ),
    "AlphaSVRG": lambda m: poco.AlphaSVRG(torch.optim.AdamW(m.parameters(), 1e-2), alpha=0.5),
    "own site": lambda m: poco.IVONPoCo(
        m.named_parameters(), lr=0.1, ess=64.0, alpha=poco.BurnIn(2, 0.5), own_site=True, one_pass=True, seed=7
    ),
    "clipped": lambda m: poco.IVON(m.named_parameters(), lr=0.1, ess=64.0, max_grad_norm=0.1, seed=7),
}


def train(optimizer: Any, net: nn.Module, parts: list[slice], dtype: torch.dtype = torch.float64) -> list[float]:
    """Steps with this process's rows (or all), refreshes from chunks of every part of the rows."""
    x, y = make_data(dtype)
    own = slice(parts[0].start, parts[-1].stop)

    def closure(i: int, rows: slice) -> Callable[[], Tensor]:
        return lambda: mse_loss(net(x[i, rows]), y[i, rows])

    losses = []
    for i in range(STEPS):
        if i in REFRESHES and "correction='none'" not in str(getattr(optimizer, "correction", "")):
            optimizer.refresh([closure(j, rows) for rows in parts for j in REFRESHES[i]])
        losses.append(float(optimizer.step(closure(i, own))))
    return losses


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def rows_of(rank: int, size: int) -> slice:
    return slice(ROWS // size * rank, ROWS // size * (rank + 1))


# ---- cases: what a process does, and what it hands back ----------------------------------------------------------


def trained(name: str, rank: int, size: int, dtype: torch.dtype = torch.float64) -> Any:
    model = make_model(dtype)
    optimizer = OPTIMIZERS[name](model)
    losses = train(optimizer, DistributedDataParallel(model), [rows_of(rank, size)], dtype)
    return losses, weights_of(model)


def backward(rank: int, size: int) -> Any:
    """Where the closure differentiates itself, its gradients have been averaged by DDP already."""
    model, (x, y), rows = make_model(), make_data(), rows_of(rank, size)
    net, optimizer = DistributedDataParallel(model), OPTIMIZERS["IVON"](model)

    def closure(i: int) -> Tensor:
        optimizer.zero_grad()
        loss = mse_loss(net(x[i, rows]), y[i, rows])
        loss.backward()
        return loss

    return [float(optimizer.step(functools.partial(closure, i))) for i in range(STEPS)], weights_of(model)


def accelerated(rank: int, size: int) -> Any:
    """By Accelerate, which wraps the model and deals out the batches."""
    from accelerate import Accelerator

    from expfam_poco.integrations.accelerate import unwrap_optimizer

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    accelerator, model, (x, y) = Accelerator(cpu=True), make_model(), make_data()
    loader = DataLoader(TensorDataset(x.flatten(0, 1), y.flatten(0, 1)), batch_size=ROWS // size)
    net, prepared, loader = accelerator.prepare(model, OPTIMIZERS["IVON"](model), loader)
    optimizer = unwrap_optimizer(accelerator, prepared)
    for inputs, targets in loader:
        optimizer.step(lambda inputs=inputs, targets=targets: mse_loss(net(inputs), targets))
    return weights_of(model)


def by_trainer(rank: int, size: int) -> Any:
    """Hugging Face's Trainer with mega-batches."""
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    from expfam_poco.integrations.transformers import PoCoTrainer

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    data = [{"input_ids": torch.tensor([i % 8, i // 8]), "labels": i % 2} for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=4, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
            dataloader_pin_memory=False, logging_strategy="no", ddp_find_unused_parameters=False,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = PoCoTrainer(
            BertForSequenceClassification(config), arguments, train_dataset=data, every=2, mega_batches=2,
            optimizer_cls_and_kwargs=(poco.IVONPoCo, {"lr": 0.1, "ess": 1e4, "alpha": 0.5}),
        )  # fmt: skip
        trainer.train()
        drawn = [batch["labels"].numel() for batch in trainer._mega.at(0)[0]]
    return weights_of(trainer.model), trainer.poco.diagnostics()["refreshes"], drawn


def by_lightning(rank: int, size: int) -> Any:
    """Lightning's Trainer with strategy="ddp"."""
    import lightning
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from expfam_poco.integrations.lightning import PoCoModule

    class Module(PoCoModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def loss(self, batch: Any) -> Tensor:
            return mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return OPTIMIZERS["IVON"](self.net)

    module, (x, y) = Module(), make_data()
    data = TensorDataset(x.flatten(0, 1), y.flatten(0, 1))
    loader = DataLoader(data, ROWS // size, sampler=DistributedSampler(data, size, rank, shuffle=False))
    warnings.simplefilter("ignore")
    trainer = lightning.Trainer(
        accelerator="cpu", devices=size, strategy="ddp", plugins=[TorchElasticEnvironment()], max_epochs=1,
        use_distributed_sampler=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return weights_of(module.net)


def own_noise(rank: int, size: int) -> Any:
    model = make_model()
    optimizer = poco.IVONPoCoMo(
        model.named_parameters(), lr=0.1, ess=64.0, alpha=0.7, process_group=dist.group.WORLD, noise_per_rank=True
    )
    losses = train(optimizer, model, [slice(0, ROWS)])  # the same rows everywhere: draws differ alone
    return losses, weights_of(model), optimizer.seed


def seeds_differ_by_default(rank: int, size: int) -> Any:
    model = make_model()
    torch.manual_seed(rank)
    optimizer = poco.IVON(model.named_parameters(), lr=0.1, ess=64.0)
    train(optimizer, DistributedDataParallel(model), [rows_of(rank, size)])
    return optimizer.seed, weights_of(model)


def weighted_and_absent(rank: int, size: int) -> Any:
    """Uneven parts count by their examples, and a process without a batch takes part."""
    model, (x, y) = make_model(), make_data()
    optimizer = OPTIMIZERS["IVON"](model)
    optimizer._process_group = dist.group.WORLD
    rows = slice(0, 48) if rank == 0 else slice(48, 64)
    optimizer.step([lambda: mse_loss(model(x[0, rows]), y[0, rows])], weights=[rows.stop - rows.start])
    optimizer.step([lambda: mse_loss(model(x[1]), y[1])] if rank == 0 else [])
    return weights_of(model)


def unused(rank: int, size: int) -> Any:
    """A parameter that one process's part does not use has a gradient all the same; one that none uses stays."""
    model = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1), nn.Linear(8, 1)]).double()
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    before = weights_of(model[2])
    optimizer, (x, _) = poco.SVRG(model.named_parameters(), lr=0.1, process_group=dist.group.WORLD), make_data()
    optimizer.step(lambda: model[rank % 2](x[0]).square().mean())
    return weights_of(model[0]), weights_of(model[1]), torch.equal(before, weights_of(model[2]))


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except (RuntimeError, ValueError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(what: str, rank: int, size: int) -> Any:
    """The error of every process where one is at odds with the others, and the weights afterwards."""
    odd = rank == size - 1
    torch.manual_seed(0)
    model, (x, y) = make_model(torch.float32 if what == "dtype" and odd else torch.float64), make_data()
    if what == "model" and odd:
        model.append(nn.Linear(1, 1).double())
    given: dict[str, Any] = dict(lr=0.1, ess=64.0, seed=7 + odd * (what == "seed"), process_group=dist.group.WORLD)
    kind = poco.IVONPoCo if what != "family" or not odd else poco.BayesBiNNPoCo
    optimizer = kind(model.named_parameters(), **given)
    dtype = next(model.parameters()).dtype

    def closure() -> Tensor:
        if what == "closure" and odd:
            raise RuntimeError("a broken batch")
        loss = mse_loss(model(x[0].to(dtype)), y[0].to(dtype))
        return loss * torch.nan if what == "nan" and odd else loss

    before = weights_of(model)
    if what in ("refresh", "closure of a refresh"):
        what = "closure" if what != "refresh" else what
        refreshes = odd or what == "closure"
        message = message_of(lambda: optimizer.refresh([closure]) if refreshes else optimizer.step(closure))
    else:
        message = message_of(lambda: optimizer.step(closure))
    same = torch.equal(before, weights_of(model))
    return message, same


def unannounced(rank: int, size: int) -> Any:
    """Nothing tells the optimizer of the others: one warning at the first step."""
    model, (x, y) = make_model(), make_data()
    optimizer = OPTIMIZERS["IVON"](model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(lambda: mse_loss(model(x[0]), y[0]))
    return [str(w.message) for w in seen]


def batchnorm(rank: int, size: int) -> Any:
    """Running statistics under DDP are the first process's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    net, (x, y) = DistributedDataParallel(model), make_data()
    optimizer = poco.IVONPoCo(model.named_parameters(), 0.1, 64.0, seed=7)
    rows = rows_of(rank, size)

    def closure() -> Tensor:
        return mse_loss(net(x[0, rows]), y[0, rows])

    optimizer.refresh([closure])
    for _ in range(3):
        optimizer.step(closure)
    with torch.no_grad():
        net(x[0, rows])
    return weights_of(model), int(model[1].num_batches_tracked)


def copied_and_resumed(rank: int, size: int) -> Any:
    """A state_dict of one process, loaded on all, goes on as if nothing had been."""
    return [resumed_if(interrupted, rank, size) for interrupted in (False, True)]


def resumed_if(interrupted: bool, rank: int, size: int) -> Tensor:
    model, (x, y), rows = make_model(), make_data(), rows_of(rank, size)
    net, optimizer = DistributedDataParallel(model), OPTIMIZERS["IVONPoCoMo"](model)
    for i in range(STEPS):
        if i == 1:
            optimizer.refresh([lambda: mse_loss(net(x[0, rows]), y[0, rows])])
        if i == 3 and interrupted:
            box = [optimizer.state_dict() if rank == 0 else None]
            dist.broadcast_object_list(box)
            optimizer = OPTIMIZERS["IVONPoCoMo"](model)
            optimizer.load_state_dict(box[0])
        optimizer.step(lambda i=i: mse_loss(net(x[i, rows]), y[i, rows]))
    return weights_of(model)


def train_from(path: pathlib.Path, name: str, net: nn.Module, parts: list[slice], flat: bool, steps: range) -> Any:
    """Steps in the middle of an inner loop, from a distributed checkpoint of a new optimizer's if there is one."""
    model, options = getattr(net, "module", net), StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer, (x, y) = OPTIMIZERS[name](model), make_data()
    if path.exists():
        found = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer, options=options), strict=True))
        dcp.load(found, checkpoint_id=path)
        set_state_dict(net, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"],
                       options=options)  # fmt: skip
    for i in steps:
        if (
            i == 1
            and hasattr(optimizer, "refresh")
            and "correction='none'" not in str(getattr(optimizer, "correction", ""))
        ):
            optimizer.refresh([lambda rows=rows: mse_loss(net(x[0, rows]), y[0, rows]) for rows in parts])
        own = slice(parts[0].start, parts[-1].stop)
        optimizer.step(lambda i=i, own=own: mse_loss(net(x[i, own]), y[i, own]))
    return weights_of(model), optimizer, options


def distributed_checkpoints(rank: int, size: int) -> Any:
    """Saved by torch.distributed.checkpoint, and resumed by as many processes; the files stay for one process."""
    found = {}
    for number, name in enumerate(OPTIMIZERS):
        flat, path, parts = bool(number % 2), FOLDER / f"saved {name}", [rows_of(rank, size)]
        straight, _, _ = train_from(path, name, DistributedDataParallel(make_model()), parts, flat, range(STEPS))
        net = DistributedDataParallel(make_model())
        _, optimizer, options = train_from(path, name, net, parts, flat, range(3))
        made = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer, options=options), strict=True))
        if number % 3:
            dcp.save(made, checkpoint_id=path)
        else:
            dcp.async_save(made, checkpoint_id=path).result()
        dist.barrier()
        net = DistributedDataParallel(make_model())
        found[name] = straight, train_from(path, name, net, parts, flat, range(3, STEPS))[0], flat
    return found


def stopped(rank: int, size: int) -> Any:
    """The last case: one process takes a step fewer."""
    model, (x, y) = make_model(), make_data()
    optimizer = OPTIMIZERS["IVON"](model)
    optimizer._process_group = dist.group.WORLD
    messages = []
    for _ in range(1 if rank == size - 1 else 2):
        messages.append(message_of(lambda: optimizer.step(lambda: mse_loss(model(x[0]), y[0]))))
    return messages


FOUR = ("IVONPoCoMo", "VONPoCo")
CASES = (
    backward, accelerated, by_trainer, by_lightning, own_noise, seeds_differ_by_default, weighted_and_absent, unused,
    unannounced, batchnorm, copied_and_resumed, distributed_checkpoints,
)  # fmt: skip
REFUSED = ("model", "dtype", "family", "seed", "refresh", "closure", "closure of a refresh", "nan")


def work(rank: int, size: int, folder: pathlib.Path) -> None:
    global FOLDER
    FOLDER = folder
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="params: |ess: |.*barrier")
    place, limit = f"file://{folder}/meeting", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size, timeout=limit)
    # What torchrun sets, for the trainers of others; the processes have met already.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", TORCHELASTIC_RUN_ID="none")
    names = OPTIMIZERS if size == 2 else FOUR
    found: dict[str, Any] = {f"trained {name}": trained(name, rank, size) for name in names}
    if size == 2:
        found["trained float32"] = trained("IVONPoCoMo", rank, size, torch.float32)
        for case in CASES:
            found[case.__name__] = case(rank, size)
        for what in REFUSED:
            found[f"refused {what}"] = refused(what, rank, size)
        found["stopped"] = stopped(rank, size)
    (folder / str(rank)).write_bytes(pickle.dumps(found))


if __name__ == "__main__":  # forked, so that torch is imported once
    size, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
    if size == 2:
        import lightning  # noqa: F401
        import transformers  # noqa: F401
    workers = [multiprocessing.get_context("fork").Process(target=work, args=(r, size, folder)) for r in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(max(abs(worker.exitcode or 0) for worker in workers))
