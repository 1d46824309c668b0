"""Hugging Face's Trainer with an optimizer that evaluates the loss itself.

The Trainer calls `training_step` for each micro-batch, then clips and calls `optimizer.step()`. Here `training_step`
only collects closures until the last micro-batch of a step, and then steps with all of them; what the Trainer does
afterwards finds no gradients to clip and an optimizer whose `step()` has been done.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor, nn
from transformers import Trainer

from expfam_poco.closures.evaluate import Closure
from expfam_poco.integrations.accelerate import check_accelerator, unwrap_optimizer
from expfam_poco.optim.alpha_svrg import AlphaSVRG
from expfam_poco.optim.optimizer import PosteriorCorrected
from expfam_poco.tools.megabatches import MegaBatches


class PoCoTrainer(Trainer):
    """A `transformers.Trainer` whose steps are corrected: closures, mega-batches, clipping of the corrected gradient.

    Give it an optimizer of this package, ready (`optimizers=(optimizer, scheduler or None)`) or by class
    (`optimizer_cls_and_kwargs=(poco.IVONPoCoMo, {"lr": …, "ess": …})`, made for all trainable parameters, by name).
    Frozen parameters, as those below LoRA adapters, get no noise. The rest is the Trainer's: gradient accumulation,
    schedulers, bf16 autocast, checkpoints, resuming. Evaluation, prediction and saved models are at the posterior's
    point.

    * `args.weight_decay` and `args.learning_rate` are not used: δ and lr are the optimizer's.
    * `args.max_grad_norm` (1.0 by default!) becomes the optimizer's limit for the *corrected* gradient, unless the
      optimizer has a `max_grad_norm` of its own; 0 clips nothing.
    * Logs have `optimizer.diagnostics()` under "poco/…", in place of the Trainer's "grad_norm".
    * `on_pre_optimizer_step` of callbacks comes after the step, and sees no gradients.

    Args:
        every: optimizer steps between two mega-batches; None: no mega-batch, so no correction.
        mega_batches: mini-batches in a mega-batch, drawn anew by a sampler of the training loader's kind; which ones,
            `args.data_seed` (or `args.seed`) and the step fix.
        burn_in: optimizer steps before the first mega-batch.
        arguments, named: the Trainer's own.

    Raises:
        TypeError: without an optimizer of this package.
        ValueError: for what is not supported: several devices in a process, DeepSpeed, FSDP, fp16 with a gradient
            scaler, `one_pass=True`, a training set without length (with `every`).

    Example:
        >>> import tempfile, torch, expfam_poco as poco
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from expfam_poco.integrations.transformers import PoCoTrainer
        >>> config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...                     intermediate_size=8)
        >>> data = [{"input_ids": torch.tensor([i % 8, 3]), "labels": i % 2} for i in range(32)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = PoCoTrainer(
        ...         BertForSequenceClassification(config),
        ...         TrainingArguments(folder, max_steps=4, use_cpu=True, report_to="none", disable_tqdm=True,
        ...                           dataloader_pin_memory=False, logging_strategy="no", save_strategy="no"),
        ...         train_dataset=data,
        ...         optimizer_cls_and_kwargs=(poco.IVONPoCo, {"lr": 0.1, "ess": 1e4, "alpha": 0.5}),
        ...         every=2, mega_batches=2, burn_in=1)
        ...     _ = trainer.train()
        {'train_runtime': ...}
        >>> trainer.poco.diagnostics()["refreshes"]
        2
    """

    def __init__(
        self, *arguments: Any, every: int | None = None, mega_batches: int = 10, burn_in: int = 0, **named: Any
    ) -> None:
        self._mega_settings: dict[str, Any] | None = None
        if every is not None:
            self._mega_settings = {"every": every, "size": mega_batches, "burn_in": burn_in}
        self._mega: MegaBatches | None = None
        self._closures: list[Closure] = []
        self._weights: list[float] = []
        super().__init__(*arguments, **named)
        check_accelerator(self.accelerator)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"args.n_gpu={self.args.n_gpu}: several devices in one process are not supported; set "
                "CUDA_VISIBLE_DEVICES to one of them."
            )
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            raise TypeError(
                "optimizers=(None, None): give an optimizer of expfam_poco by optimizers=(optimizer, None), or by "
                "optimizer_cls_and_kwargs=(class, arguments)."
            )
        if self.optimizer is not None:
            self.optimizer = _prepared_for_trainer(self.poco, self.args.max_grad_norm)

    @property
    def poco(self) -> PosteriorCorrected | AlphaSVRG:
        """The optimizer as it was given, behind the wrappers of Trainer and Accelerate."""
        return unwrap_optimizer(self.accelerator, self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimizer of `optimizer_cls_and_kwargs` for all trainable parameters, unless one was given."""
        self._closures, self._weights = [], []
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            made, chosen = self.optimizer_cls_and_kwargs
            trained: Any = self.model if model is None else model
            optimizer = made([(name, p) for name, p in trained.named_parameters() if p.requires_grad], **chosen)
            optimizer = unwrap_optimizer(self.accelerator, optimizer)
            self.optimizer = _prepared_for_trainer(optimizer, self.args.max_grad_norm)
        if self._mega_settings is not None:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            self._mega = MegaBatches(self.get_train_dataloader(), seed=seed, **self._mega_settings)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Collect the micro-batch; with the last of a step, refresh where one is due, and step.

        Returns:
            the loss of the whole step at the sampled weights, with its last micro-batch; before it, 0.
        """
        model.train()
        closure, weight = self._closure(model, inputs)
        self._closures.append(closure)
        self._weights.append(weight)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        closures, weights = self._closures, self._weights
        self._closures, self._weights = [], []
        if self._mega is not None and self._mega.due(self.state.global_step):
            chunks = [self._closure(model, batch) for batch in self._mega.at(self.state.global_step)[0]]
            self.poco.refresh(*_with_weight([chunk for chunk, _ in chunks], [share for _, share in chunks]))
        closures, weights = _with_weight(closures, weights)
        return self.poco.step(closures, weights=weights)

    def _closure(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Closure, float]:
        """The micro-batch's mean loss as a function, and how many items (examples, or tokens) it is the mean of."""
        _, counted = self.get_batch_samples(iter([inputs]), 1, self.args.device)
        weight = find_batch_size(inputs) if counted is None else counted

        def closure() -> Tensor:
            # A new dictionary for each call: `compute_loss` takes the labels out of it.
            ready = dict(self._prepare_inputs(inputs))
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, ready, num_items_in_batch=counted)
            return loss if isinstance(loss, Tensor) else loss[0]

        return closure, 1.0 if weight is None else float(weight)

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        """The Trainer's logs with the optimizer's diagnostics in them."""
        if "loss" in logs:
            logs.pop("grad_norm", None)
            logs |= {f"poco/{name}": float(value) for name, value in self.poco.diagnostics().items()}
        super().log(logs, *arguments, **named)


def _with_weight(closures: list[Closure], weights: list[float]) -> tuple[list[Closure], list[float]]:
    """Without those that are the mean over nothing: of a micro-batch whose labels are all masked.

    Raises:
        ValueError: if none is left.
    """
    kept = [(closure, weight) for closure, weight in zip(closures, weights, strict=True) if weight > 0.0]
    if not kept:
        raise ValueError("train_dataset: all labels of a whole step are masked (-100); leave such examples out.")
    return [closure for closure, _ in kept], [weight for _, weight in kept]


class _SteppedInTrainingStep(torch.optim.Optimizer):
    """What the Trainer gets to hold: the optimizer's groups and state, and a `step()` that `training_step` has done."""

    def __init__(self, optimizer: PosteriorCorrected | AlphaSVRG) -> None:
        # Not Optimizer's own __init__, which would make groups and state of its own.
        self.optimizer = optimizer
        self.defaults = optimizer.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: the step has been taken."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)


def _prepared_for_trainer(optimizer: PosteriorCorrected | AlphaSVRG, max_grad_norm: float) -> _SteppedInTrainingStep:
    """Hand the Trainer's clipping to the optimizer, which alone sees the corrected gradient."""
    if isinstance(optimizer, PosteriorCorrected) and optimizer.one_pass:
        raise ValueError(
            "optimizer: with one_pass=True the model holds a draw between steps, which the Trainer would save and "
            "evaluate; make the optimizer with one_pass=False."
        )
    if optimizer.max_grad_norm is None and max_grad_norm > 0:
        optimizer.max_grad_norm = max_grad_norm
    return _SteppedInTrainingStep(optimizer)
