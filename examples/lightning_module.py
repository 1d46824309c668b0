"""A LightningModule trained by IVON-PoCoMo on scikit-learn's digits, beside AdamW in an ordinary one.

python examples/lightning_module.py [--epochs 10]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import expfam_poco as poco
from expfam_poco.integrations.lightning import PoCoModule


def network() -> nn.Module:
    """64 → 64 → 10."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Corrected(PoCoModule):
    """The loss and the optimizer; steps and mega-batches are done."""

    def __init__(self) -> None:
        super().__init__(every=20, mega_batches=10, burn_in=40)
        self.net = network()

    def loss(self, batch: list[Tensor]) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return poco.IVONPoCoMo(
            self.net.named_parameters(), lr=0.3, ess=12_000, hess_init=0.5, beta2=0.999, rho1=0.3, rho2=0.05, alpha=0.5
        )


class Plain(LightningModule):
    """The same with AdamW, as Lightning does it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=3e-3)


def accuracy(module_class: type[Corrected] | type[Plain], epochs: int) -> float:
    """On the third of the digits that is not trained on."""
    seed_everything(0, verbose=False)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(digits.data, dtype=torch.float32) / 16.0)[order]
    y = torch.tensor(digits.target)[order]
    loader = DataLoader(TensorDataset(x[:1198], y[:1198]), batch_size=32, shuffle=True)
    module = module_class()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            max_epochs=epochs,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, loader)
    with torch.no_grad():
        guessed = module.net(x[1198:].to(module.device)).argmax(-1).cpu()
    return float((guessed == y[1198:]).float().mean())


def main() -> None:
    """Train both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Lightning 2.6 uses a name that torch 2.13 deprecates, and recommends worker processes to load 1,200 digits.
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
    warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
    reached = accuracy(Corrected, options.epochs)
    print(f"IVON-PoCoMo reached {reached:.3f}, AdamW {accuracy(Plain, options.epochs):.3f}")


if __name__ == "__main__":
    main()
