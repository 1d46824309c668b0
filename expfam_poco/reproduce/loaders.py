"""The papers' data through the standard loaders (torchvision, datasets), or random tensors of their true shapes.

Text is tokenised once, by GPT-2's tokenizer, into files of int32 in the data folder; pictures are read as
torchvision keeps them there. Sets that torchvision does not fetch (ImageNet, TinyImageNet, Cars, RESISC45) must lie in
the folder, as `train/CLASS/…` and `val/CLASS/…` under the set's name.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from expfam_poco.errors import InputError
from expfam_poco.reproduce.corpus import Corpus
from expfam_poco.reproduce.data import InMemory, Pictures, Source


def need(package: str, what: str) -> Any:
    """A package that only the papers' data or models need.

    Raises:
        InputError: where it is missing.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"--scale paper: {what} needs the package {package}, which is not installed; "
            f"run: python -m pip install {package} (or try --one-step, which takes random tensors of the true shapes)."
        ) from None


def root_of(source: Source, what: str) -> Path:
    """The folder of the papers' data.

    Raises:
        InputError: where none was given.
    """
    if source.root is None:
        raise InputError(f"--scale paper: say by --data FOLDER where {what} is or may be put.")
    return source.root


# ---- text --------------------------------------------------------------------------------------------------


class TextSet(NamedTuple):
    """Where a text is at Hugging Face, its column, the most tokens, and the documents at its end that are held out."""

    path: str
    name: str | None
    tokens: float
    held_out: int


TEXTS = {
    "openwebtext": TextSet("Skylion007/openwebtext", None, float("inf"), 4000),
    "fineweb-edu": TextSet("HuggingFaceFW/fineweb-edu", "sample-10BT", 1e9, 2000),  # D.3
    "wikitext103": TextSet("Salesforce/wikitext", "wikitext-103-raw-v1", float("inf"), 0),  # has a split of its own
}
VOCABULARY, END = 50_257, 50_256
RANDOM_TOKENS = 20_000


class Gpt2Tokens:
    """As `corpus.Tokenizer`: what a model needs to know of GPT-2's tokens."""

    vocabulary = VOCABULARY

    def encode(self, text: bytes) -> Tensor:
        """By the package transformers."""
        return torch.tensor(self._tokenizer().encode(text.decode()), dtype=torch.int32)

    def decode(self, tokens: Any) -> str:
        """Text of tokens."""
        return str(self._tokenizer().decode(list(tokens)))

    def saved(self) -> str:
        """Its name."""
        return "gpt2"

    def _tokenizer(self) -> Any:
        return need("transformers", "GPT-2's tokenizer").AutoTokenizer.from_pretrained("gpt2")


def tokens(name: str, context: int, source: Source) -> Corpus:
    """A text as GPT-2's tokens: from its files in the data folder, which are made if they are not there."""
    if source.random:
        generator = torch.Generator().manual_seed(0)
        parts = [torch.randint(VOCABULARY, (RANDOM_TOKENS,), generator=generator, dtype=torch.int32) for _ in range(2)]
        return Corpus(parts[0], parts[1], Gpt2Tokens())
    root = root_of(source, name)
    paths = [root / f"{name}-{part}.int32" for part in ("train", "held-out")]
    if not all(path.is_file() for path in paths):
        _tokenise(name, paths)
    train, held_out = (torch.from_numpy(np.memmap(path, dtype=np.int32, mode="c")) for path in paths)
    return Corpus(train, held_out, Gpt2Tokens())


def _tokenise(name: str, paths: list[Path]) -> None:
    declared = TEXTS[name]
    datasets, tokenizer = need("datasets", name), Gpt2Tokens()._tokenizer()
    if not declared.held_out:
        for split, path in zip(("train", "validation"), paths, strict=True):
            rows = datasets.load_dataset(declared.path, declared.name, split=split)
            _write(_encoded(rows, tokenizer), path)
        return
    rows = datasets.load_dataset(declared.path, declared.name, split="train")
    documents, seen = len(rows), 0
    if np.isfinite(declared.tokens):  # where the budget of tokens ends
        for number, ids in enumerate(_encoded(rows, tokenizer)):
            seen += len(ids)
            if seen >= declared.tokens:
                documents = number + 1
                break
    cut = documents - declared.held_out
    _write(_encoded(rows.select(range(cut)), tokenizer), paths[0])
    _write(_encoded(rows.select(range(cut, documents)), tokenizer), paths[1])


def _encoded(rows: Any, tokenizer: Any, many: int = 1000) -> Iterator[list[int]]:
    """Each document's tokens, and the end-of-text token."""
    for start in range(0, len(rows), many):
        for ids in tokenizer(rows[start : start + many]["text"])["input_ids"]:
            yield [*ids, END]


def _write(documents: Iterator[list[int]], path: Path) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        for ids in documents:
            file.write(np.array(ids, dtype=np.int32).tobytes())
    os.replace(part, path)


# ---- pictures ----------------------------------------------------------------------------------------------


class PictureSet(NamedTuple):
    """The side of its pictures as networks see them, classes, torchvision's class ("": a folder), the padding."""

    side: int
    classes: int
    torchvision: str
    padding: int = 0


PICTURES = {
    "cifar10": PictureSet(32, 10, "CIFAR10", 4),
    "cifar100": PictureSet(32, 100, "CIFAR100", 4),
    "tiny-imagenet": PictureSet(64, 200, "", 4),
    "imagenet": PictureSet(224, 1000, ""),
    "cars": PictureSet(224, 196, ""),
    "dtd": PictureSet(224, 47, "DTD"),
    "gtsrb": PictureSet(224, 43, "GTSRB"),
    "resisc45": PictureSet(224, 45, ""),
}
RANDOM_PICTURES = 16
READERS = 16  # threads that decode pictures


@dataclass(frozen=True)
class Files:
    """A torchvision data set by number, augmented or not by its transforms; pictures are decoded by threads."""

    data: Any
    numbers: tuple[int, ...]
    augmented: Any
    plain: Any

    def __len__(self) -> int:
        return len(self.numbers)

    def get(self, rows: Tensor, random: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """As `data.Rows` says."""
        change = self.plain if random is None else self.augmented
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(lambda number: self.data[self.numbers[number]], rows.tolist()))
        x = torch.stack([change(picture.convert("RGB")) for picture, _ in found])
        return x, torch.tensor([label for _, label in found])


def pictures(name: str, source: Source) -> Pictures:
    """A set of pictures; a tenth of its training part, never augmented, is kept to choose rates by."""
    if name not in PICTURES:
        raise InputError(f"data={name!r}: choose from {', '.join(PICTURES)}, or digits.")
    declared = PICTURES[name]
    if source.random:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(RANDOM_PICTURES, 3, declared.side, declared.side, generator=generator)
        y = torch.randint(declared.classes, (RANDOM_PICTURES,), generator=generator)
        held_out = InMemory(x[:4], y[:4])
        return Pictures(InMemory(x, y, declared.padding, True), held_out, held_out, 3, declared.classes)
    vision = need("torchvision", name)
    root, change = root_of(source, name), _transforms(vision, declared)
    if declared.torchvision:
        made = getattr(importlib.import_module("torchvision.datasets"), declared.torchvision)
        if name.startswith("cifar"):
            train, test = (made(str(root), train=part, download=True) for part in (True, False))
        else:
            train, test = (made(str(root), split=part, download=True) for part in ("train", "test"))
    else:
        folders = [root / name / part for part in ("train", "val")]
        for folder in folders:
            if not folder.is_dir():
                raise InputError(
                    f"--data {root}: {name} is not there; put it into {folder}, one folder for each class."
                )
        train, test = (vision.datasets.ImageFolder(str(folder)) for folder in folders)
    numbers = np.random.default_rng(0).permutation(len(train)).tolist()
    cut = len(numbers) // 10
    parts = [(train, numbers[cut:]), (train, numbers[:cut]), (test, range(len(test)))]
    rows = [Files(data, tuple(chosen), *change) for data, chosen in parts]
    return Pictures(rows[0], rows[1], rows[2], 3, declared.classes)


def _transforms(vision: Any, declared: PictureSet) -> tuple[Any, Any]:
    """Augmentation and none, both with normalisation."""
    t = vision.transforms
    last = [t.ToTensor(), t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    if declared.side < 100:
        first = [t.RandomCrop(declared.side, declared.padding), t.RandomHorizontalFlip()]
        return t.Compose(first + last), t.Compose(last)
    first = [t.RandomResizedCrop(declared.side), t.RandomHorizontalFlip()]
    middle = [t.Resize(declared.side * 8 // 7), t.CenterCrop(declared.side)]
    return t.Compose(first + last), t.Compose(middle + last)


# ---- a pretrained network for pictures -----------------------------------------------------------------------


class ClipClassifier(nn.Module):
    """CLIP's picture encoder, whose output is matched to fixed embeddings of the labels; only the encoder is trained.

    Args:
        encoder: gives `image_embeds`.
        labels: classes × embedding, normalised.
    """

    def __init__(self, encoder: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("labels", labels)

    def forward(self, x: Tensor) -> Tensor:
        """100 × cosine similarities, as CLIP's logits."""
        seen = self.encoder(pixel_values=x).image_embeds
        return 100.0 * nn.functional.normalize(seen, dim=-1) @ self.get_buffer("labels").T


CLIP = "openai/clip-vit-base-patch32"
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}


def vision_model(network: str, data: str, classes: int, source: Source) -> nn.Module:
    """A pretrained network for pictures; with random data one of the same kind and input, but tiny.

    Raises:
        InputError: for an unknown name.
    """
    if network != "clip-vit-b32":
        raise InputError(f"network={network!r}: choose one of `networks.NETWORKS`, linear or clip-vit-b32.")
    transformers = need("transformers", network)
    if source.random:
        config = transformers.CLIPVisionConfig(**TINY, patch_size=32, image_size=224, projection_dim=512)
        labels = nn.functional.normalize(torch.randn(classes, 512), dim=-1)
        return ClipClassifier(transformers.CLIPVisionModelWithProjection(config), labels)
    train = root_of(source, data) / data / "train"
    names = [path.name.replace("_", " ") for path in sorted(train.iterdir())] if train.is_dir() else []
    if len(names) != classes:
        made = pictures(data, source).train
        names = list(getattr(getattr(made, "data", None), "classes", [f"class {n}" for n in range(classes)]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(CLIP)
    whole = transformers.CLIPTextModelWithProjection.from_pretrained(CLIP)
    with torch.no_grad():
        words = tokenizer([f"a photo of a {name}." for name in names], padding=True, return_tensors="pt")
        labels = nn.functional.normalize(whole(**words).text_embeds, dim=-1)
    return ClipClassifier(transformers.CLIPVisionModelWithProjection.from_pretrained(CLIP), labels)
