"""One run as plain values, which go into its file: what is trained, by which method, for how long, corrected when."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expfam_poco.optim.alpha_svrg import AlphaSVRG
from expfam_poco.optim.named import IVON, SVRG, VON, IVONPoCo, IVONPoCoMo, VONPoCo
from expfam_poco.optim.vsgd import VSGD

if TYPE_CHECKING:
    from expfam_poco.reproduce.problems import ProblemOf

Make = Callable[..., torch.optim.Optimizer]
TORCH: dict[str, Make] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "vsgd": VSGD,
}
RULES: dict[str, Make] = {
    "svrg": SVRG,
    "ivon": IVON,
    "ivon-poco": IVONPoCo,
    "ivon-pocomo": IVONPoCoMo,
    "von": VON,
    "von-poco": VONPoCo,
}
CORRECTED = ("svrg", "sgd+alpha-svrg", "adamw+alpha-svrg", "ivon-poco", "ivon-pocomo", "von-poco")
DRAWN = tuple(name for name in RULES if name != "svrg")  # they take a seed


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on but its seed.

    Attributes:
        problem: what is trained.
        method: a name of `TORCH` or `RULES`, or "sgd+alpha-svrg" and "adamw+alpha-svrg".
        lr: the learning rate; what is tuned.
        steps: the most steps.
        batch: examples in a mini-batch.
        options: arguments of the optimizer beyond lr; `alpha` of α-SVRG too.
        evaluations: where the run ends, too, in gradients of mini-batches; None: at `steps` alone.
        accumulate: micro-batches that a mini-batch is evaluated in.
        warmup: steps of a linear warm-up of lr.
        final: share of lr that a cosine ends at; 1: lr is constant.
        halve_every: steps after which lr is halved (VSGD's paper); 0: never.
        burn_in: steps before the first mega-batch.
        every: steps from one mega-batch to the next.
        mega: mini-batches in a mega-batch; 0: all data, in `chunks`.
        chunks: parts that all data are evaluated in, each with noise of its own.
        later_batch: factor on the batch after the burn-in: the control of equal evaluations.
        validate_every: steps between two points of the curve.
        dtype: "float32", or "bf16" for autocast.
        start: a run that comes first, and whose weights (and posterior, where both have one) this one begins with.
    """

    problem: ProblemOf
    method: str
    lr: float
    steps: int
    batch: int
    options: Mapping[str, Any] = field(default_factory=dict)
    evaluations: float | None = None
    accumulate: int = 1
    warmup: int = 0
    final: float = 0.0
    halve_every: int = 0
    burn_in: int = 0
    every: int = 10
    mega: int = 10
    chunks: int = 20
    later_batch: int = 1
    validate_every: int = 20
    dtype: str = "float32"
    start: Recipe | None = None

    @property
    def corrected(self) -> bool:
        """Whether the method has mega-batches."""
        return self.method in CORRECTED

    def factor(self, step: int) -> float:
        """What lr is multiplied with at a step: warm-up, then a cosine to `final`, or halvings."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.halve_every:
            return float(0.5 ** (step // self.halve_every))
        share = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


def make_optimizer(recipe: Recipe, model: nn.Module, seed: int) -> Any:
    """The method's optimizer over the model's trainable weights."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    weights, options = [weight for _, weight in named], dict(recipe.options)
    base, _, corrected = recipe.method.partition("+")
    if corrected:
        alpha = options.pop("alpha")
        return AlphaSVRG(TORCH[base](weights, lr=recipe.lr, **options), alpha=alpha)
    if base in TORCH:
        return TORCH[base](weights, lr=recipe.lr, **options)
    if base in DRAWN:
        options["seed"] = seed
    return RULES[base](named, lr=recipe.lr, **options)
