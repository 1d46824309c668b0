"""VSGD-G Table 1: VSGD beside Adam, AdamW and SGD, three networks on pictures; hyperparameters from its Table 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expfam_poco.reproduce.figure import Claim, Curve, Figure, Scale
from expfam_poco.reproduce.networks import VGG19
from expfam_poco.reproduce.problems import Images
from expfam_poco.reproduce.recipe import Recipe

METHODS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "VSGD, decay": ("vsgd", {"weight_decay": 0.01}),
    "VSGD": ("vsgd", {}),
    "Adam": ("adam", {}),
    "AdamW": ("adamw", {"weight_decay": 0.01}),
    "SGD, momentum": ("sgd", {"momentum": 0.9}),
}
# The paper has {0.001, 0.005, 0.01, 0.02} for all and 10⁵ steps; in a hundred steps rates must be larger.
SMALL_RATES = {"vsgd": (0.03, 0.1, 0.3, 0.9), "adam": (3e-3, 1e-2, 3e-2, 9e-2), "sgd": (0.01, 0.03, 0.1, 0.3)}
PAPER_RATES = (0.001, 0.005, 0.01, 0.02)


def _curves(networks: Mapping[str, Recipe], small: bool) -> tuple[tuple[Curve, ...], dict[str, tuple[str, str]]]:
    curves, cells = [], {}
    for column, base in networks.items():
        for name, (method, options) in METHODS.items():
            label = f"{name}, {column}"
            rates = SMALL_RATES[method.removesuffix("w")] if small else PAPER_RATES
            recipe = replace(base, method=method, options=options, lr=rates[2])
            curves.append(Curve(label, recipe, rates))
            cells[label] = (name, column)
    return tuple(curves), cells


def _scale(about: str, networks: Mapping[str, Recipe], small: bool) -> Scale:
    curves, cells = _curves(networks, small)
    return Scale(about, curves, columns=3, cells=cells)


Networks = tuple[tuple[str, str, Mapping[str, Any]], ...]
SMALL_NETWORKS: Networks = (
    ("VGG", "vgg", {"channels": (16, 16, 0, 32, 32, 0)}),
    ("ConvMixer", "conv-mixer", {"width": 24, "depth": 2, "kernel": 3}),
    ("ResNeXt", "resnext", {"width": 4, "depths": (1, 1), "groups": 4}),
)
SMALL = {
    column: Recipe(Images("digits", network, changes), "vsgd", 0.1, steps=126, batch=64, validate_every=18)
    for column, network, changes in SMALL_NETWORKS
}
# The number of epochs is not said: 200 of CIFAR100, 100 of TinyImageNet.
SIZES = {"CIFAR100": ("cifar100", 200 * 50_000, 10_000, 1), "TinyImageNet": ("tiny-imagenet", 100 * 100_000, 20_000, 2)}
PAPER_NETWORKS: tuple[tuple[str, str, int], ...] = (
    ("VGG", "vgg", 256),
    ("ConvMixer", "conv-mixer", 256),
    ("ResNeXt", "resnext", 128),
)
PAPER = {
    f"{column} {data}": Recipe(
        Images(name, network, {"channels": VGG19} if (name, network) == ("tiny-imagenet", "vgg") else {}),
        "vsgd", 0.01, steps=examples // (batch // factor), batch=batch // factor, final=1.0, halve_every=halve,
        validate_every=1000,
    )
    for data, (name, examples, halve, factor) in SIZES.items()
    for column, network, batch in PAPER_NETWORKS
}  # fmt: skip

TABLE1 = Figure(
    "vsgd-table1",
    "VSGD-G Table 1: test accuracy",
    (
        Claim(
            "VSGD beats Adam on every network", "Table 1", "accuracy",
            tuple((f"VSGD, {column}", f"Adam, {column}") for column in SMALL),
        ),
        Claim(
            "VSGD with decay beats AdamW on every network", "Table 1", "accuracy",
            tuple((f"VSGD, decay, {column}", f"AdamW, {column}") for column in SMALL),
        ),
        Claim(
            "VSGD beats SGD on every network", "Table 1", "accuracy",
            tuple((f"VSGD, {column}", f"SGD, momentum, {column}") for column in SMALL),
        ),
    ),
    _scale(
        "digits of 8 × 8 pixels, shifted by up to one: small VGG, ConvMixer and ResNeXt, batch 64, 126 steps, cosine",
        SMALL, True,
    ),
    _scale("CIFAR100 and TinyImageNet-200: VGG16/19, ConvMixer-256/8, ResNeXt-18", PAPER, False),
)  # fmt: skip
