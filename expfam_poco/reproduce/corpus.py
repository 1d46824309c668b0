"""Real text that every Python installation carries, tokenisers for it, and batches that depend on a seed and a step.

"stdlib" is the source code of the standard library (12 MB without its tests), "topics" the English prose of
`pydoc_data.topics` (0.5 MB, and not in "stdlib"), anything else the path of a text file.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

HELD_OUT, HELD_OUT_TOPICS = 20, 8  # every twentieth file and every eighth topic is for validation
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
TRAINING, MEGA_BATCH, MEASUREMENT = 0, 1, 2  # independent streams of batches


class Tokenizer(Protocol):
    """Bytes to tokens and back."""

    vocabulary: int

    def encode(self, text: bytes) -> Tensor:
        """A one-dimensional tensor of token numbers."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        ...

    def saved(self) -> str:
        """What `restored` makes it from."""
        ...


class Bytes:
    """A token for each byte."""

    vocabulary = 256

    def encode(self, text: bytes) -> Tensor:
        """The bytes."""
        return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of bytes, where they are some."""
        return bytes(tokens).decode("utf-8", errors="replace")

    def saved(self) -> str:
        """What it is."""
        return "bytes"


class BytePairs:
    """Byte-pair encoding (package `tokenizers`), over bytes, so that every text has tokens.

    Args:
        model: a `tokenizers.Tokenizer`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocabulary = int(model.get_vocab_size())

    @classmethod
    def trained(cls, text: bytes, vocabulary: int) -> BytePairs:
        """Learn `vocabulary` tokens from a text."""
        if vocabulary < 257:
            raise ValueError(f"vocabulary={vocabulary}: byte pairs start from 256 bytes; give 257 or more.")
        tokenizers = _tokenizers()
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
        )
        model.train_from_iterator(_readable(text).splitlines(keepends=True), trainer)
        return cls(model)

    def encode(self, text: bytes) -> Tensor:
        """Line by line."""
        parts = self.model.encode_batch(_readable(text).splitlines(keepends=True))
        return torch.tensor([token for part in parts for token in part.ids], dtype=torch.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""
        return str(self.model.decode(list(tokens)))

    def saved(self) -> str:
        """The model as JSON."""
        return str(self.model.to_str())


def _readable(text: bytes) -> str:
    return text.decode("utf-8", errors="replace")


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "tokenizer='bpe': the package tokenizers is missing; run `pip install tokenizers`, or use 'bytes'."
        ) from error
    return tokenizers


def restored(saved: str) -> Tokenizer:
    """The tokenizer whose `saved()` this is."""
    return Bytes() if saved == "bytes" else BytePairs(_tokenizers().Tokenizer.from_str(saved))


def stdlib_files() -> tuple[list[Path], list[Path]]:
    """The standard library's sources in a fixed order, to train on and held out: every twentieth file.

    Left out are tests, installed packages, the text of "topics" and files that describe the machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts)
        if not SKIPPED & set(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise ValueError("text='stdlib': this Python has no sources of its standard library; give a text file.")
    held_out = files[HELD_OUT - 1 :: HELD_OUT]
    return [path for path in files if path not in set(held_out)], held_out


def texts(name: str) -> tuple[bytes, bytes]:
    """The text to train on and the held-out text: "stdlib", "topics" or the path of a file (its last twentieth)."""
    if name == "stdlib":
        train, held_out = stdlib_files()
        return _joined([path.read_bytes() for path in train]), _joined([path.read_bytes() for path in held_out])
    if name == "topics":
        from pydoc_data.topics import topics

        parts = [topics[key].encode() for key in sorted(topics)]
        rest = [part for number, part in enumerate(parts) if (number + 1) % HELD_OUT_TOPICS]
        return _joined(rest), _joined(parts[HELD_OUT_TOPICS - 1 :: HELD_OUT_TOPICS])
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"text={name!r}: there is no such file; give 'stdlib', 'topics' or a text file.")
    content = path.read_bytes()
    cut = len(content) - len(content) // HELD_OUT
    return content[:cut], content[cut:]


def _joined(parts: Sequence[bytes]) -> bytes:
    return b"\n".join(parts)


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on, tokens held out, and their tokenizer."""

    train: Tensor
    held_out: Tensor
    tokenizer: Tokenizer

    def batch(self, length: int, rows: int, *, seed: int, stream: int, index: int) -> Tensor:
        """`rows` random windows of length + 1 training tokens: a function of the arguments alone.

        So methods see the same batches, and a resumed run needs no generator's state. `stream` keeps mini-batches,
        mega-batches and measurements independent.
        """
        generator = np.random.default_rng([seed, stream, index])
        starts = generator.integers(0, len(self.train) - length, size=rows)
        return windows(self.train, torch.from_numpy(starts), length)

    def validation(self, length: int, rows: int) -> Tensor:
        """`rows` windows spread evenly over the held-out text, always the same."""
        starts = torch.linspace(0, len(self.held_out) - length - 1, rows, dtype=torch.float64).long()
        return windows(self.held_out, starts, length)


def windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    """Windows of length + 1 tokens from the starts on, as int64."""
    return tokens[starts[:, None] + torch.arange(length + 1)].long()


def load(text: str, length: int, tokenizer: Tokenizer | str = "bytes", vocabulary: int = 4096) -> Corpus:
    """A tokenised text.

    Args:
        text: see `texts`.
        length: of the windows that will be asked for; both parts must have as many tokens and one more.
        tokenizer: "bytes", "bpe" (learned from the part to train on) or one that is there already.
        vocabulary: number of tokens of "bpe".
    """
    train, held_out = texts(text)
    if tokenizer == "bytes":
        tokenizer = Bytes()
    elif tokenizer == "bpe":
        tokenizer = BytePairs.trained(train, vocabulary)
    elif isinstance(tokenizer, str):
        raise ValueError(f"tokenizer={tokenizer!r}: choose 'bytes' or 'bpe'.")
    corpus = Corpus(tokenizer.encode(train), tokenizer.encode(held_out), tokenizer)
    shortest = min(len(corpus.train), len(corpus.held_out))
    if shortest <= length:
        raise ValueError(
            f"text={text!r}: its training or held-out part has {shortest} tokens, and a window needs {length + 1}; "
            "give more text or a shorter context."
        )
    return corpus
