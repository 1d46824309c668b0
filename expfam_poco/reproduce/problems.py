"""What a recipe trains: declarations (`Text`, `Images`, `Convex`), and the `Problem` that each makes for a seed.

Mini-batches, mega-batches and augmentation are functions of (seed, stream, index): all methods of a figure see the
same ones, in the same order. Rates are chosen by the part "tune" of the data that are held out, and reported is the
part "report", but for convex tasks, whose measure is the training loss's gap.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from expfam_poco.compare.tasks import Task, load_task
from expfam_poco.reproduce import loaders
from expfam_poco.reproduce.corpus import Corpus, load
from expfam_poco.reproduce.data import Pictures, Rows, Source, digits
from expfam_poco.reproduce.gpt import GPT, preset
from expfam_poco.reproduce.networks import NETWORKS

Batch = tuple[Tensor, ...]
EVALUATED_AT_ONCE = 256


class Problem(Protocol):
    """A model, its data, its loss, and what is measured."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        ...

    @property
    def size(self) -> int:
        """Training examples, of which a pass has as many."""
        ...

    def batch(self, stream: int, index: int, rows: int) -> Batch:
        """A mini-batch."""
        ...

    def everything(self, chunks: int, index: int) -> list[Batch]:
        """All training examples, in random chunks."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """Its mean loss, with its graph."""
        ...

    def evaluate(self) -> dict[str, float]:
        """The measures at the model's present weights."""
        ...


class ProblemOf(Protocol):
    """A declaration of a problem: plain values, which go into a run's file."""

    def quick(self) -> ProblemOf:
        """The same, as small as can be."""
        ...

    def make(self, seed: int, part: str, source: Source) -> Problem:
        """The problem for a seed; measures belong to the held-out `part`, "tune" or "report"."""
        ...


class Epochs:
    """Numbers of examples in reshuffled epochs, without incomplete last batches."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._order = functools.lru_cache(4)(self._shuffled)

    def _shuffled(self, stream: int, epoch: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng([self.seed, stream, epoch]).permutation(self.size))

    def rows(self, stream: int, index: int, count: int) -> Tensor:
        """The index-th mini-batch of `count` rows of a stream."""
        each = max(self.size // count, 1)
        epoch, place = divmod(index, each)
        return self._order(stream, epoch)[place * count : (place + 1) * count]

    def chunks(self, count: int, index: int) -> list[Tensor]:
        """All numbers in `count` random chunks."""
        order = torch.from_numpy(np.random.default_rng([self.seed, 3, index]).permutation(self.size))
        return [chunk for chunk in order.tensor_split(count) if len(chunk)]


# ---- text --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A GPT on text.

    Attributes:
        text: "stdlib" or "topics" (bytes), or one of `loaders.TEXTS` (GPT-2's tokens).
        shape: a preset of `gpt`, with `changes` to it.
        context: tokens in a window.
        windows: held-out windows that the loss is the mean of, for each part.
        changes: to the preset.
    """

    text: str = "stdlib"
    shape: str = "nano"
    context: int = 64
    windows: int = 64
    changes: Mapping[str, Any] = field(default_factory=dict)

    def quick(self) -> Text:
        """Short windows, a narrow model."""
        return replace(self, context=16, windows=2, changes={**self.changes, "layers": 1, "width": 16, "heads": 2})

    def make(self, seed: int, part: str, source: Source) -> TextProblem:
        """As `ProblemOf` says."""
        if self.text in loaders.TEXTS:
            corpus = loaders.tokens(self.text, self.context, source)
        else:
            corpus = _corpus(self.text, self.context)
        return TextProblem(self, corpus, seed, part, source.device)


@functools.cache
def _corpus(text: str, context: int) -> Corpus:
    return load(text, context)


class TextProblem:
    """See `Text`. Windows are drawn with replacement: a pass has no meaning, and size is 1."""

    size = 1

    def __init__(self, declared: Text, corpus: Corpus, seed: int, part: str, device: str) -> None:
        self.declared, self.corpus, self.seed, self.device = declared, corpus, seed, device
        shape = {"context": declared.context, "vocabulary": corpus.tokenizer.vocabulary, **declared.changes}
        self.model = GPT(preset(declared.shape, **shape)).to(device)
        both = corpus.validation(declared.context, 2 * declared.windows)
        self.held_out = both[(0 if part == "tune" else 1) :: 2].to(device)

    def batch(self, stream: int, index: int, rows: int) -> Batch:
        """As `Problem` says."""
        return (
            self.corpus.batch(self.declared.context, rows, seed=self.seed, stream=stream, index=index).to(self.device),
        )

    def everything(self, chunks: int, index: int) -> list[Batch]:
        """Refused: text is endless."""
        raise ValueError("mega=0: text has no full pass; give a number of mini-batches.")

    def loss(self, batch: Batch) -> Tensor:
        """Nats a token."""
        return self.model.loss(batch[0])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss (nats a token) and perplexity of the held-out windows."""
        self.model.eval()
        losses = [float(self.model.loss(part)) * len(part) for part in self.held_out.split(32)]
        self.model.train()
        loss = sum(losses) / len(self.held_out)
        return {"loss": loss, "perplexity": float(np.exp(loss))}


# ---- pictures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """A network on pictures.

    Attributes:
        data: "digits" with what `data.digits` says, or one of `loaders.PICTURES`.
        network: a name of `NETWORKS`, with `changes` to its defaults; "linear"; or one of `pretrained.VISION`.
        changes: arguments of the network.
    """

    data: str = "digits"
    network: str = "resnet"
    changes: Mapping[str, Any] = field(default_factory=dict)

    def quick(self) -> Images:
        """The same: the networks of small scale are small."""
        return self

    def make(self, seed: int, part: str, source: Source) -> ImageProblem:
        """As `ProblemOf` says."""
        data = digits(self.data) if self.data.startswith("digits") else loaders.pictures(self.data, source)
        if self.network == "linear":
            side = data.report.get(torch.arange(1), None)[0].numel()
            model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(side, data.classes))
        elif self.network in NETWORKS:
            model = NETWORKS[self.network](data.colours, data.classes, **self.changes)
        else:
            model = loaders.vision_model(self.network, self.data, data.classes, source)
        return ImageProblem(model.to(source.device), data, seed, part, source.device)


class ImageProblem:
    """See `Images`."""

    def __init__(self, model: nn.Module, data: Pictures, seed: int, part: str, device: str) -> None:
        self.model, self.train, self.seed, self.device = model, data.train, seed, device
        self.held_out: Rows = data.tune if part == "tune" else data.report
        self.size = len(data.train)
        self.epochs = Epochs(self.size, seed)

    def _get(self, data: Rows, rows: Tensor, random: np.random.Generator | None) -> Batch:
        x, y = data.get(rows, random)
        return x.to(self.device), y.to(self.device)

    def batch(self, stream: int, index: int, rows: int) -> Batch:
        """As `Problem` says."""
        chosen = self.epochs.rows(stream, index, rows)
        return self._get(self.train, chosen, np.random.default_rng([self.seed, stream, index, 1]))

    def everything(self, chunks: int, index: int) -> list[Batch]:
        """As `Problem` says."""
        random = np.random.default_rng([self.seed, index, 2])
        return [self._get(self.train, chunk, random) for chunk in self.epochs.chunks(chunks, index)]

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss (nats) and accuracy (%) on the held-out part."""
        self.model.eval()
        loss = right = 0.0
        for rows in torch.arange(len(self.held_out)).split(EVALUATED_AT_ONCE):
            x, y = self._get(self.held_out, rows, None)
            logits = self.model(x)
            loss += float(functional.cross_entropy(logits, y, reduction="sum"))
            right += float((logits.argmax(1) == y).sum())
        self.model.train()
        return {"loss": loss / len(self.held_out), "accuracy": 100.0 * right / len(self.held_out)}


# ---- convex tasks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convex:
    """A task of `expfam-poco compare`: L2-regularised logistic regression, by the gap to its minimum."""

    task: str

    def quick(self) -> Convex:
        """The same."""
        return self

    def make(self, seed: int, part: str, source: Source) -> ConvexProblem:
        """As `ProblemOf` says."""
        return ConvexProblem(task_of(self.task), seed)


@functools.cache
def task_of(name: str) -> Task:
    """A task, loaded once in a process."""
    return load_task(name)


class Weights(nn.Module):
    """θ alone, from zero, in float64."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(shape, dtype=torch.float64))


class ConvexProblem:
    """See `Convex`."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.model, self.size = task, Weights(task.shape), task.size
        self.epochs = Epochs(task.size, seed)

    def batch(self, stream: int, index: int, rows: int) -> Batch:
        """As `Problem` says."""
        return (self.epochs.rows(stream, index, rows),)

    def everything(self, chunks: int, index: int) -> list[Batch]:
        """As `Problem` says."""
        return [(chunk,) for chunk in self.epochs.chunks(chunks, index)]

    def loss(self, batch: Batch) -> Tensor:
        """Mean negative log-likelihood, without the L2 term."""
        return self.task.loss(self.model.theta, batch[0])

    def evaluate(self) -> dict[str, float]:
        """The gap of the regularised loss."""
        return {"gap": self.task.gap(self.model.theta.detach().numpy())}
