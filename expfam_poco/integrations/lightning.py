"""A LightningModule whose optimizer evaluates the loss itself (manual optimization)."""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from expfam_poco.optim.alpha_svrg import AlphaSVRG
from expfam_poco.optim.optimizer import PosteriorCorrected
from expfam_poco.tools.megabatches import MegaBatches


class PoCoModule(LightningModule):
    """A `LightningModule` that steps with closures and refreshes with mega-batches. Write `loss(batch)` for it.

    Your module defines `loss(batch)`, the mini-batch's mean loss, and `configure_optimizers()` with one optimizer of
    this package and, if you like, one scheduler, which steps with the optimizer. `training_step` is done. The values of
    `diagnostics()` are logged as "poco/…", the loss as "train_loss".

    Lightning saves and restores the optimizer with its checkpoints. It does not save the states of random generators,
    so a resumed run equals an undisturbed one where data order and dropout do not depend on them.

    Args:
        every: steps between two mega-batches; None: no mega-batch, so no correction.
        mega_batches: mini-batches in a mega-batch, drawn anew by a sampler of the training loader's kind; the precision
            plugin and the hooks around the transfer to the device see them as they see mini-batches.
        burn_in: steps before the first mega-batch.
        mega_seed: fixes, with the step, which examples a mega-batch has.
        log_poco_every: steps between two logs of `diagnostics()`, which passes over all weights.

    Raises:
        ValueError: at the start of `fit`, for several devices, 16-mixed precision, or `one_pass=True`.
        TypeError: if `configure_optimizers` gives no optimizer of this package, or several.

    Example:
        >>> import torch, expfam_poco as poco
        >>> from expfam_poco.integrations.lightning import PoCoModule
        >>> class Regression(PoCoModule):
        ...     def __init__(self):
        ...         super().__init__(every=4, mega_batches=2, burn_in=4)
        ...         self.net = torch.nn.Linear(3, 1)
        ...     def loss(self, batch):
        ...         x, y = batch
        ...         return torch.nn.functional.mse_loss(self.net(x), y)
        ...     def configure_optimizers(self):
        ...         return poco.IVONPoCo(self.net.named_parameters(), lr=0.1, ess=1e3, alpha=0.5)
        >>> Regression().automatic_optimization
        False
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        mega_batches: int = 10,
        burn_in: int = 0,
        mega_seed: int = 0,
        log_poco_every: int = 50,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.log_poco_every = log_poco_every
        self._mega_settings: dict[str, Any] | None = (
            None if every is None else {"every": every, "size": mega_batches, "burn_in": burn_in, "seed": mega_seed}
        )
        self._mega: MegaBatches | None = None

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch, which is on the module's device."""
        raise NotImplementedError(f"{type(self).__name__}.loss: define loss(batch), the mini-batch's mean loss.")

    @property
    def poco(self) -> PosteriorCorrected | AlphaSVRG:
        """The optimizer itself. (Lightning's wrapper must do the steps, which it counts, and nothing else.)"""
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, PosteriorCorrected | AlphaSVRG):
            raise TypeError(
                f"configure_optimizers: it gives {type(optimizer).__name__}; give one optimizer of expfam_poco."
            )
        return optimizer

    def on_fit_start(self) -> None:
        """Refuse what is not supported."""
        trainer = self.trainer
        if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
            raise ValueError(
                f"strategy={type(trainer.strategy).__name__}: parameters that are spread over processes are not "
                "supported; use strategy='ddp'."
            )
        if trainer.precision in ("16-mixed", "transformer-engine-float16"):
            raise ValueError(
                f"precision={trainer.precision!r}: its gradient scaler steps without a closure; use 'bf16-mixed'."
            )
        if isinstance(self.poco, PosteriorCorrected) and self.poco.one_pass:
            raise ValueError(
                "optimizer: with one_pass=True the model holds a draw between steps, which Lightning would save and "
                "evaluate; make the optimizer with one_pass=False."
            )

    def on_train_start(self) -> None:
        """Find the dataset that mega-batches come from."""
        if self._mega_settings is not None:
            self._mega = MegaBatches(self.trainer.train_dataloader, **self._mega_settings)

    def _as_lightning_prepares(self, batch: Any) -> Any:
        """What the training loop does with a mini-batch: precision, transfer, and the hooks around it."""
        trainer = self.trainer
        batch = trainer.precision_plugin.convert_input(batch)
        batch = self._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One corrected step, after a refresh where one is due."""
        if self._mega is not None and self._mega.due(self.global_step):
            batches, examples = self._mega.at(self.global_step)
            ready = [self._as_lightning_prepares(batch) for batch in batches]
            self.poco.refresh([functools.partial(self.loss, mega) for mega in ready], weights=examples)
        stepper: Any = self.optimizers()
        loss: Tensor = stepper.step(lambda: self.loss(batch))
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        self.log("train_loss", loss, prog_bar=True)
        if isinstance(self.poco, PosteriorCorrected) and self.global_step % self.log_poco_every == 0:
            self.log_dict({f"poco/{name}": float(value) for name, value in self.poco.diagnostics().items()})
        return loss
