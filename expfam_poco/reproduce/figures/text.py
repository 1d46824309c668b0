"""PC Fig. 1 (pretraining) and Fig. 6 (continual pretraining, α, inner loops): GPTs on text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expfam_poco.reproduce.figure import Claim, Curve, Figure, Panel, Scale
from expfam_poco.reproduce.problems import Text
from expfam_poco.reproduce.recipe import Recipe

Options = Mapping[str, Any]
ADAMW_RATES, IVON_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2), (0.2, 0.4, 0.8, 1.6)

# Small scale: bytes of the standard library, hundreds of steps. The paper's κ, β₂ and ξ are for 10⁵ steps.
SMALL_IVON: Options = {
    "ess": 1e8, "hess_init": 1e-3, "beta2": 0.99, "weight_decay": 1e-6, "clip_radius": 1e-2, "rescale_lr": False,
}  # fmt: skip
SMALL_ADAMW: Options = {"betas": (0.9, 0.95), "weight_decay": 0.1}
MOMENTUM: dict[str, Any] = {"rho1": 0.6, "rho2": 0.1}  # D.2
BASE = Recipe(Text(), "ivon", 0.6, steps=300, batch=8, options=SMALL_IVON, warmup=15, burn_in=150, validate_every=15)

# Paper scale: D.2. α of Fig. 1 is not said; 0.7 is that of §4.4.
PAPER_IVON: Options = {
    "ess": 1e10, "hess_init": 1e-3, "beta2": 0.99999, "weight_decay": 1e-6, "clip_radius": 1e-3, "rescale_lr": False,
}  # fmt: skip
ALPHA = 0.7
OPENWEBTEXT = Text("openwebtext", "125m", 1024, windows=480)
# 480 sequences in 48 micro-batches of 10; warm-up as in nanoGPT.
PAPER = Recipe(
    OPENWEBTEXT, "ivon", 0.3, steps=100_000, batch=480, options=PAPER_IVON, accumulate=48, warmup=2000,
    burn_in=50_000, validate_every=1000, dtype="bf16",
)  # fmt: skip


def corrected(recipe: Recipe, method: str = "ivon-pocomo", alpha: float = ALPHA, **changes: Any) -> Recipe:
    """The recipe's plain method with correction; `changes` are of the recipe, but ρ of the optimizer."""
    more: dict[str, Any] = {name: changes.pop(name) for name in ("rho1", "rho2") if name in changes}
    return replace(recipe, method=method, options={**recipe.options, "alpha": alpha, **more}, **changes)


def _fig1(
    base: Recipe, adamw: Recipe, starts: tuple[int, ...], rates: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[Curve, ...]:
    late = [
        Curve(
            f"IVON-PoCoMo from {start}",
            corrected(base, **MOMENTUM, burn_in=start, every=20, mega=20),
            rate_of="IVON-PoCoMo",
        )
        for start in starts
    ]
    return (
        Curve("AdamW", adamw, rates[0]),
        Curve("IVON", base, rates[1]),
        Curve("IVON-PoCoMo", corrected(base, **MOMENTUM), rates[1]),
        Curve("IVON, 3× batch", replace(base, later_batch=3), rates[1]),
        *late,
    )


def _fig1_panels(labels: list[str]) -> tuple[Panel, ...]:
    first, later = tuple(labels[:4]), (labels[1], *labels[4:])
    return (
        Panel("(b) pretraining, correction from the middle on", first, "step", "perplexity"),
        Panel("(c) three starts of the correction", later, "step", "perplexity"),
        Panel("(b) by cost", first, "evaluations", "perplexity"),
        Panel("(c) by cost", later, "evaluations", "perplexity"),
    )


def _scale1(about: str, curves: tuple[Curve, ...]) -> Scale:
    return Scale(about, curves, _fig1_panels([curve.label for curve in curves]))


SMALL1 = _scale1(
    "pretraining from scratch: GPT of 0.1 M weights, bytes of the standard library, 8 × 64 a batch, 300 steps",
    _fig1(BASE, replace(BASE, method="adamw", options=SMALL_ADAMW, lr=4e-3), (90, 150, 210), (ADAMW_RATES, IVON_RATES)),
)
_PAPER_ADAMW = replace(PAPER, method="adamw", options=SMALL_ADAMW, lr=6e-4)
PAPER1 = _scale1(
    "pretraining from scratch: GPT-2 (125 M) on OpenWebText, 480 × 1024 tokens a batch, 100,000 steps",
    _fig1(PAPER, _PAPER_ADAMW, (30_000, 50_000, 70_000), ((), ())),
)

# Labels of the three starts differ by scale: claims name those of small scale, and hold for the paper's by `_starts`.
FIG1 = Figure(
    "fig1",
    "PC Fig. 1: pretraining with IVON-PoCoMo",
    (
        Claim(
            "with correction from the middle of the run on, IVON ends below itself and below AdamW",
            "Fig. 1b", "perplexity", (("IVON-PoCoMo", "IVON"), ("IVON-PoCoMo", "AdamW")),
            (("IVON-PoCoMo", "IVON, 3× batch"),),
        ),
        Claim(
            "it helps whenever it starts: early, in the middle, late",
            "Fig. 1c", "perplexity", tuple((f"IVON-PoCoMo from {n}", "IVON") for n in (90, 150, 210)),
        ),
    ),
    SMALL1,
    PAPER1,
)  # fmt: skip


# ---- Fig. 6 ------------------------------------------------------------------------------------------------

FIRST = replace(BASE, steps=250, burn_in=250)  # what is pretrained further
ON = Recipe(
    Text("topics"), "ivon", 0.2, steps=160, batch=8, options=SMALL_IVON, burn_in=40, every=20, mega=20,
    validate_every=10, start=FIRST,
)  # fmt: skip
ABLATED = replace(BASE, steps=160, burn_in=40, validate_every=20)
PAPER_ON = Recipe(
    Text("fineweb-edu", "125m", 512, windows=400), "ivon", 0.04, steps=24_414, batch=80,
    options={**PAPER_IVON, "ess": 3e10, "beta2": 0.9999}, burn_in=1000, every=40, mega=40, validate_every=500,
    dtype="bf16", start=PAPER,
)  # fmt: skip
# D.2's ablations: one epoch of wikitext103 (118 M tokens), 33 M weights, batches of 64 × 128.
WIKITEXT = Text("wikitext103", "33m", 128, windows=512, changes={"positions": "learned"})
PAPER_ABLATED = Recipe(
    WIKITEXT, "ivon", 0.3, steps=14_400, batch=64, options=PAPER_IVON, warmup=200, burn_in=5000, validate_every=500,
    dtype="bf16",
)  # fmt: skip
SMALL_ALPHAS = (0.3, 0.6, 0.9)
PAPER_ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)


def _continual(on: Recipe, adamw: Recipe, rates: tuple[tuple[float, ...], tuple[float, ...]]) -> list[Curve]:
    return [
        Curve("AdamW", adamw, rates[0]),
        Curve("α-SVRG + AdamW", corrected(adamw, "adamw+alpha-svrg"), rates[0]),
        Curve("IVON", on, rates[1]),
        Curve("IVON-PoCo", corrected(on, "ivon-poco"), rates[1]),
        Curve("IVON-PoCoMo", corrected(on, rho1=0.3, rho2=0.05), rates[1]),
        Curve("AdamW, 3× batch", replace(adamw, later_batch=3), rates[0]),
        Curve("IVON, 3× batch", replace(on, later_batch=3), rates[1]),
    ]


def _alphas(
    base: Recipe, adamw: Recipe, alphas: tuple[float, ...], rates: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[list[Curve], dict[str, tuple[str, ...]]]:
    """α = 0 is the plain method; one rate for all α > 0 of a method."""
    curves, groups = [], {}
    for name, plain, method, own in (
        ("α-SVRG", adamw, "adamw+alpha-svrg", rates[0]), ("IVON-PoCo", base, "ivon-poco", rates[1]),
    ):  # fmt: skip
        middle = f"{name}, α = {alphas[len(alphas) // 2]:g}"
        made = [Curve(f"{name}, α = 0", plain, own, place=0.0)]
        for alpha in alphas:
            label = f"{name}, α = {alpha:g}"
            tuned = own if label == middle else ()
            made.append(Curve(label, corrected(plain, method, alpha), tuned, "" if label == middle else middle, alpha))
        curves += made
        groups[name] = tuple(curve.label for curve in made)
    return curves, groups


def _loops(base: Recipe, mega: int, everies: tuple[int, ...], rates: tuple[float, ...]) -> list[Curve]:
    """The size of mega-batches fixed, the inner loops of several lengths."""
    middle = f"every {everies[1]} steps"
    made = []
    for every in everies:
        label = f"every {every} steps"
        recipe = corrected(base, "ivon-poco", mega=mega, every=every)
        made.append(Curve(label, recipe, rates if label == middle else (), "" if label == middle else middle))
    return made


def _scale6(
    about: str, continual: list[Curve], ablation: tuple[list[Curve], dict[str, tuple[str, ...]]], loops: list[Curve]
) -> Scale:
    labels, every = tuple(curve.label for curve in continual), tuple(curve.label for curve in loops)
    panels = (
        Panel("(left) continual pretraining", labels, "step", "perplexity"),
        Panel("(center) final loss by α, equal steps", ablation[1], "place", "loss", x_title="α (0: no correction)"),
        Panel("(right) IVON-PoCo, refreshes", every, "step", "loss"),
        Panel("(left) by cost", labels, "evaluations", "perplexity"),
        Panel("(right) by cost", every, "evaluations", "loss"),
    )
    return Scale(about, (*continual, *ablation[0], *loops), panels, columns=3)


_ON_ADAMW = replace(ON, method="adamw", options=SMALL_ADAMW, lr=1e-3)
_ABLATED_ADAMW = replace(ABLATED, method="adamw", options=SMALL_ADAMW, lr=4e-3)
_PAPER_ON_ADAMW = replace(PAPER_ON, method="adamw", options={"betas": (0.9, 0.999), "weight_decay": 0.1}, lr=1e-4)
_PAPER_ABLATED_ADAMW = replace(PAPER_ABLATED, method="adamw", options=SMALL_ADAMW, lr=6e-4)
FIG6 = Figure(
    "fig6",
    "PC Fig. 6: continual pretraining, α, and inner loops",
    (
        Claim(
            "in continual pretraining IVON-PoCo gains on IVON, and IVON-PoCoMo too", "Fig. 6 left", "perplexity",
            (("IVON-PoCo", "IVON"), ("IVON-PoCoMo", "IVON")),
            (("IVON-PoCo", "IVON, 3× batch"), ("IVON-PoCoMo", "IVON, 3× batch")),
        ),
        Claim(
            "momentum of mega-batches improves on IVON-PoCo and on α-SVRG", "§4.4", "perplexity",
            (("IVON-PoCoMo", "IVON-PoCo"), ("IVON-PoCoMo", "α-SVRG + AdamW")),
        ),
        Claim(
            "α-SVRG gains on AdamW by steps, and not by time", "§4.4", "perplexity",
            (("α-SVRG + AdamW", "AdamW"),), (("α-SVRG + AdamW", "AdamW, 3× batch"),),
        ),
        Claim(
            "correction helps for a wide range of α", "Fig. 6 center", "loss",
            tuple((f"{name}, α = {a:g}", f"{name}, α = 0") for name in ("α-SVRG", "IVON-PoCo") for a in SMALL_ALPHAS),
        ),
        Claim(
            "the loss is U-shaped in α: an inner value is best", "Fig. 6 center", "loss",
            tuple((f"{name}, α = 0.6", f"{name}, α = {a:g}") for name in ("α-SVRG", "IVON-PoCo") for a in (0.3, 0.9)),
        ),
        Claim(
            "refreshing more often is better by steps", "Fig. 6 right", "loss",
            (("every 10 steps", "every 20 steps"), ("every 20 steps", "every 40 steps")),
        ),
    ),
    _scale6(
        "from bytes of the standard library on to English prose, and ablations from scratch: GPT of 0.1 M weights, "
        "8 × 64 a batch, 160 steps",
        _continual(ON, _ON_ADAMW, ((5e-4, 1e-3, 2e-3, 4e-3), (0.1, 0.2, 0.4, 0.8))),
        _alphas(ABLATED, _ABLATED_ADAMW, SMALL_ALPHAS, (ADAMW_RATES, IVON_RATES)),
        _loops(ABLATED, 20, (10, 20, 40), IVON_RATES),
    ),
    _scale6(
        "GPT-2 (125 M) from OpenWebText on to 1 B tokens of FineWeb-Edu, 80 × 512 a batch; ablations of 33 M weights "
        "on wikitext103",
        _continual(PAPER_ON, _PAPER_ON_ADAMW, ((), ())),
        _alphas(PAPER_ABLATED, _PAPER_ABLATED_ADAMW, PAPER_ALPHAS, ((), ())),
        _loops(replace(PAPER_ABLATED, burn_in=1000), 50, (25, 50, 100, 200), ()),
    ),
)  # fmt: skip
