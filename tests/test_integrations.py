"""Training inside other people's loops: transformers (full and LoRA), accelerate, lightning; on a real MiniLM.

Their packages are imported by the tests, not by this file, and all tests are one group: so one worker has them.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, WeightedRandomSampler

import expfam_poco as poco
from expfam_poco.tools.megabatches import MegaBatches

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.xdist_group("loops of others")


def example(name: str) -> Any:
    """A module of examples/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- a small problem: points of three classes --------------------------------------------------------------


class Points(nn.Module):
    """A classifier of points, in the form that the Trainer takes; it counts its evaluations."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 3))
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(x)
        self.dtypes.append(logits.dtype)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def points(count: int = 96) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(3, 6, generator=generator)
    labels = torch.arange(count) % 3
    x = centres[labels] + 0.7 * torch.randn(count, 6, generator=generator)
    return [{"x": x[i], "labels": labels[i]} for i in range(count)]


def arguments(folder: Path, **changed: Any) -> Any:
    from transformers import TrainingArguments

    chosen: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
    }
    return TrainingArguments(str(folder), **(chosen | changed))


def ivon(model: nn.Module, **changed: Any) -> poco.PosteriorCorrected:
    chosen: dict[str, Any] = {"lr": 0.3, "ess": 1e4, "hess_init": 0.3, "alpha": 0.5, "rho1": 0.3, "seed": 7}
    return poco.IVONPoCoMo(model.named_parameters(), **(chosen | changed))


def alpha_svrg(model: nn.Module) -> poco.AlphaSVRG:
    return poco.AlphaSVRG(torch.optim.AdamW(model.parameters(), lr=1e-2), alpha=0.5)


def trainer_of(
    folder: Path,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer] = ivon,
    *,
    dropout: float = 0.0,
    every: int | None = 3,
    **changed: Any,
) -> Any:
    from transformers import set_seed

    from expfam_poco.integrations.transformers import PoCoTrainer

    set_seed(0)
    model = Points(dropout)
    return PoCoTrainer(
        model,
        arguments(folder, **changed),
        train_dataset=points(),
        optimizers=(optimizer_of(model), None),
        every=every,
        mega_batches=2,
        burn_in=2,
    )


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# ---- transformers -------------------------------------------------------------------------------------------


def test_trainer_takes_the_steps_of_a_loop_written_by_hand(tmp_path: Path) -> None:
    from transformers import set_seed

    trainer = trainer_of(tmp_path, lr_scheduler_type="constant", train_sampling_strategy="sequential")
    trainer.train()
    set_seed(0)
    model = Points()
    optimizer = ivon(model)
    data = points()
    loader = DataLoader(data, batch_size=8)
    mega = MegaBatches(loader, every=3, size=2, burn_in=2, seed=trainer.args.seed)

    def closure(batch: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: model(**batch)["loss"]

    losses = []
    for step, batch in enumerate(loader):
        if mega.due(step):
            optimizer.refresh([closure(b) for b in mega.at(step)[0]])
        losses.append(float(optimizer.step(closure(batch))))
    assert torch.equal(flat(model), flat(trainer.model))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-6)
    diagnostics = optimizer.diagnostics()
    assert diagnostics["refreshes"] == 4
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    for name in ("steps", "refreshes", "variance_ratio.gradient", "mean_stddev"):
        assert last[f"poco/{name}"] == pytest.approx(diagnostics[name])
    assert "grad_norm" not in last


@pytest.mark.parametrize("optimizer_of", [ivon, alpha_svrg])
def test_trainer_accumulates_to_the_step_of_a_large_batch(tmp_path: Path, optimizer_of: Any) -> None:
    # Same noise, same mega-batches; the sums differ in their order alone. Without accumulated micro-batches being
    # weighted by their examples, the last step of the pass (100 = 6 · 16 + 4 = … + 4) would differ too.
    results = []
    for size, accumulate in ((16, 1), (4, 4)):
        trainer = trainer_of(
            tmp_path,
            optimizer_of,
            every=None,
            max_steps=7,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            train_sampling_strategy="sequential",
        )
        trainer.train_dataset = points(100)
        before = flat(trainer.model)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((flat(trainer.model), losses))
        assert len(losses) == 7
        assert float((flat(trainer.model) - before).abs().max()) > 0.01
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-5)


@pytest.mark.parametrize("optimizer_of", [ivon, alpha_svrg])
def test_resumed_training_equals_undisturbed_training(tmp_path: Path, optimizer_of: Any) -> None:
    # With dropout, shuffling, a scheduler, and a checkpoint between two mega-batches in the middle of an epoch.
    chosen: dict[str, Any] = {"dropout": 0.2, "save_strategy": "steps", "save_steps": 7, "max_steps": 20}
    whole = trainer_of(tmp_path / "whole", optimizer_of, **chosen)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", optimizer_of, **chosen)
    start = flat(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    assert torch.equal(flat(whole.model), flat(resumed.model))
    assert not torch.equal(start, flat(resumed.model))
    logs = [[e["loss"] for e in t.state.log_history if "loss" in e][-13:] for t in (whole, resumed)]
    assert logs[0] == logs[1]


def test_trainer_clips_the_corrected_gradient(tmp_path: Path) -> None:
    for own, given, expected in ((None, 0.5, 0.5), (0.25, 0.5, 0.25), (None, 0.0, None)):
        trainer = trainer_of(tmp_path, lambda m, own=own: ivon(m, max_grad_norm=own), max_grad_norm=given, max_steps=1)
        assert isinstance(trainer.poco, poco.PosteriorCorrected)
        assert trainer.poco.max_grad_norm == expected


def test_trainer_clips_what_alpha_svrg_hands_to_its_base(tmp_path: Path) -> None:
    def sgd(model: nn.Module) -> poco.AlphaSVRG:
        return poco.AlphaSVRG(torch.optim.SGD(model.parameters(), lr=1.0), alpha=0.5)

    moved = {}
    for limit in (0.0, 0.01):
        trainer = trainer_of(tmp_path, sgd, max_grad_norm=limit, max_steps=1, lr_scheduler_type="constant")
        before = flat(trainer.model)
        trainer.train()
        moved[limit] = float((flat(trainer.model) - before).norm())
    assert moved[0.0] > 0.1
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)


def test_trainer_runs_under_bf16_autocast(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, bf16=True)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert set(trainer.model.dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert sum(losses[-3:]) < sum(losses[:3])


def test_trainer_makes_the_optimizer_and_follows_the_schedule(tmp_path: Path) -> None:
    from transformers import set_seed

    from expfam_poco.integrations.transformers import PoCoTrainer

    set_seed(0)
    trainer = PoCoTrainer(
        Points(),
        arguments(tmp_path),
        train_dataset=points(),
        optimizer_cls_and_kwargs=(poco.IVON, {"lr": 0.3, "ess": 1e4}),
    )
    trainer.train()
    assert set(trainer.poco.posterior()) == {name for name, _ in trainer.model.named_parameters()}
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.3 * (12 - step) / 12 for step in range(12)])
    assert trainer.poco.diagnostics()["steps"] == 12


def test_trainer_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    from expfam_poco.integrations.transformers import PoCoTrainer

    model = Points()
    with pytest.raises(TypeError, match="optimizers="):
        PoCoTrainer(model, arguments(tmp_path), train_dataset=points())
    with pytest.raises(TypeError, match="SGD"):
        trainer_of(tmp_path, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="one_pass=True"):
        trainer_of(tmp_path, lambda m: ivon(m, one_pass=True))
    with pytest.raises(ValueError, match="every=0"):
        trainer_of(tmp_path, every=0).train()


@pytest.mark.slow  # the example does it, too
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_fine_tuning_the_pretrained_transformer(tmp_path: Path, lora: bool) -> None:
    from transformers import set_seed

    from expfam_poco.integrations.transformers import PoCoTrainer

    finetune = example("finetune_transformer")
    set_seed(0)
    finetune.logging.disable_progress_bar()
    finetune.logging.set_verbosity_error()
    model = finetune.pretrained(layers=1, lora=lora)
    if not lora:  # 9 in 10 weights are the word vectors, and this test is to be quick
        model.encoder.embeddings.requires_grad_(False)
    train, test = finetune.paragraphs(finetune.tokenizer())
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = poco.IVONPoCoMo(
        trainable,
        lr=0.2,
        ess=1e7,
        hess_init=0.01,
        beta2=0.999,
        clip_radius=0.02,
        weight_decay=1e-5,
        rescale_lr=False,
        alpha=0.5,
        backend="eager",
        seed=1,
    )
    trainer = PoCoTrainer(
        model,
        arguments(tmp_path, max_steps=40, per_device_train_batch_size=16, logging_steps=10),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=finetune.accuracy,
        optimizers=(optimizer, None),
        every=10,
        mega_batches=4,
        burn_in=10,
    )
    trainer.train()
    # Chance is 1/4 on 64 test examples: standard error 0.054, so 0.5 is 4.6 of them above it.
    assert len(test) >= 64
    assert trainer.evaluate()["eval_accuracy"] > 0.5
    assert optimizer.diagnostics()["refreshes"] == 3
    after = dict(model.named_parameters())
    assert frozen and all(torch.equal(value, after[name]) for name, value in frozen.items())
    assert set(optimizer.posterior()) == {name for name, _ in trainable}
    assert all(("lora_" in name or "head" in name) for name, _ in trainable) == lora


# ---- accelerate ---------------------------------------------------------------------------------------------


def accelerated(folder: Path, optimizer_of: Any, steps: int, resume: bool) -> Tensor:
    """Train through Accelerate; the checkpoint is saved after 4 steps, or the run continues from it."""
    from accelerate import Accelerator
    from transformers import set_seed

    from expfam_poco.integrations.accelerate import unwrap_optimizer

    set_seed(0)
    accelerator = Accelerator(cpu=True)
    model: Any = Points()
    made = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(made, 0.95)
    loader = DataLoader(points(), batch_size=8)
    mega = MegaBatches(loader, every=3, size=2, burn_in=2)
    model, prepared, loader, scheduler = accelerator.prepare(model, made, loader, scheduler)
    optimizer = unwrap_optimizer(accelerator, prepared)
    assert optimizer is made
    if resume:
        accelerator.load_state(str(folder))

    def closure(batch: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: model(**batch)["loss"]

    for step, batch in enumerate(loader):
        if step < (4 if resume else 0) or step >= steps:
            continue
        if mega.due(step):
            optimizer.refresh([closure(b) for b in mega.at(step)[0]])
        if step % 2:
            optimizer.step(closure(batch))
        else:
            prepared.step(closure(batch))
        scheduler.step()
        if step == 3 and not resume:
            accelerator.save_state(str(folder))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(made.defaults["lr"] * 0.95**steps)
    return flat(accelerator.unwrap_model(model))


@pytest.mark.parametrize("optimizer_of", [ivon, alpha_svrg])
def test_accelerate_prepares_saves_and_resumes(tmp_path: Path, optimizer_of: Any) -> None:
    whole = accelerated(tmp_path, optimizer_of, steps=10, resume=False)
    resumed = accelerated(tmp_path, optimizer_of, steps=10, resume=True)
    assert torch.equal(whole, resumed)
    assert not torch.equal(whole, accelerated(tmp_path / "short", optimizer_of, steps=4, resume=False))


def test_unwrapping_refuses_other_optimizers() -> None:
    from accelerate import Accelerator

    from expfam_poco.integrations.accelerate import unwrap_optimizer

    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))
    with pytest.raises(TypeError, match="SGD"):
        unwrap_optimizer(accelerator, prepared)


# ---- lightning ----------------------------------------------------------------------------------------------


def points_module(optimizer_of: Any) -> Any:
    """The points under Lightning."""
    from expfam_poco.integrations.lightning import PoCoModule

    class PointsModule(PoCoModule):
        def __init__(self) -> None:
            super().__init__(every=3, mega_batches=2, burn_in=2, log_poco_every=1)
            self.points = Points()
            self.seen: list[float] = []

        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            loss = self.points(**batch)["loss"]
            self.seen.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(self.points)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)]

    return PointsModule()


def lightning_trainer(folder: Path, epochs: int, **changed: Any) -> Any:
    from lightning.pytorch import Trainer

    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **changed,
    )


def lightning_fit(folder: Path, optimizer_of: Any, epochs: int, checkpoint: Path | None = None) -> Any:
    torch.manual_seed(0)
    module = points_module(optimizer_of)
    trainer = lightning_trainer(folder, epochs)
    # No shuffling: Lightning does not save the state of random generators.
    trainer.fit(module, DataLoader(points(), batch_size=8), ckpt_path=checkpoint)
    return trainer


# Lightning 2.6 uses a name that torch 2.13 deprecates, and suggests worker processes for a loader of 96 points.
LIGHTNING_WARNS = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning", "ignore:The 'train_dataloader' does not have many workers"
)


@LIGHTNING_WARNS
@pytest.mark.parametrize("optimizer_of", [ivon, alpha_svrg])
def test_lightning_trains_and_resumes(tmp_path: Path, optimizer_of: Any) -> None:
    whole = lightning_fit(tmp_path, optimizer_of, 4)
    assert whole.global_step == 4 * 12
    module = whole.lightning_module
    assert sum(module.seen[-12:]) < 0.5 * sum(module.seen[:12])
    if isinstance(module.poco, poco.PosteriorCorrected):
        assert module.poco.diagnostics()["refreshes"] == 16
        assert whole.logged_metrics["poco/steps"] == 48
    first = lightning_fit(tmp_path, optimizer_of, 2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = lightning_fit(tmp_path, optimizer_of, 4, tmp_path / "half.ckpt")
    assert torch.equal(flat(whole.lightning_module), flat(resumed.lightning_module))
    assert not torch.equal(flat(first.lightning_module), flat(resumed.lightning_module))


@LIGHTNING_WARNS
def test_lightning_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    data = DataLoader(points(), batch_size=8)
    with pytest.raises(TypeError, match="SGD"):
        lightning_trainer(tmp_path, 1).fit(points_module(lambda m: torch.optim.SGD(m.parameters(), lr=0.1)), data)
    with pytest.raises(ValueError, match="one_pass=True"):
        lightning_trainer(tmp_path, 1).fit(points_module(lambda m: ivon(m, one_pass=True)), data)


@LIGHTNING_WARNS
def test_lightning_prepares_mega_batches_as_mini_batches(tmp_path: Path) -> None:
    """Hooks mark a batch, and the loss sees only marked ones of the precision plugin's dtype."""
    module = points_module(ivon)
    plain_loss, plain_transfer = module.loss, module.transfer_batch_to_device

    def loss(batch: dict[str, Tensor]) -> Tensor:
        assert {"before", "moved", "after"} < set(batch) and batch["x"].dtype == torch.float64
        return plain_loss({name: batch[name] for name in ("x", "labels")})

    module.on_before_batch_transfer = lambda batch, dataloader_idx: batch | {"before": torch.ones(())}
    module.transfer_batch_to_device = lambda batch, device, i: plain_transfer(batch | {"moved": batch["x"]}, device, i)
    module.on_after_batch_transfer = lambda batch, dataloader_idx: batch | {"after": torch.ones(())}
    module.loss = loss
    lightning_trainer(tmp_path, 1, precision="64-true").fit(module, DataLoader(points(), batch_size=8))
    assert module.poco.diagnostics()["refreshes"] == 4


def test_trainer_draws_mega_batches_by_its_sampler(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, every=2, max_steps=6)
    plain_loss = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        assert set(inputs["labels"].tolist()) == {0}
        return plain_loss(model, inputs, *rest, **named)

    trainer.compute_loss = compute_loss
    thirds = [1.0 if i % 3 == 0 else 0.0 for i in range(96)]
    trainer._get_train_sampler = lambda *_: WeightedRandomSampler(thirds, 96)
    trainer.train()
    assert trainer.poco.diagnostics()["refreshes"] == 2


# ---- the package --------------------------------------------------------------------------------------------


def test_importing_the_package_of_integrations_imports_none_of_theirs() -> None:
    probe = "import json, sys, expfam_poco.integrations; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    found = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not found & {"transformers", "accelerate", "lightning", "peft"}
