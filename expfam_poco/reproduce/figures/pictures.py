"""PC Fig. 4 (ResNet-50 on ImageNet) and Fig. 5 (ResNet-20 on CIFAR-10): correction in networks with BatchNorm."""

from __future__ import annotations

from dataclasses import replace

from expfam_poco.reproduce.figure import Claim, Curve, Figure, Panel, Scale
from expfam_poco.reproduce.figures.text import corrected
from expfam_poco.reproduce.problems import Images
from expfam_poco.reproduce.recipe import Recipe

SGD_RATES, ADAMW_RATES, IVON_RATES = (0.025, 0.05, 0.1, 0.2), (2e-3, 4e-3, 8e-3, 1.6e-2), (0.05, 0.1, 0.2, 0.4)
DIGITS = 1797 - 2 * (1797 // 6)
SMALL_IVON = {"ess": 100.0 * DIGITS, "hess_init": 1.0, "beta2": 0.999, "weight_decay": 1e-4}


def _panels(names: list[str], zoom: str) -> tuple[Panel, ...]:
    labels = tuple(names)
    return (
        Panel(f"by steps{zoom}", labels, "step", "accuracy"),
        Panel("by examples seen", labels, "evaluations", "accuracy"),
        Panel("loss by steps", labels, "step", "loss"),
        Panel("loss by examples seen", labels, "evaluations", "loss"),
    )


def _scale(about: str, curves: tuple[Curve, ...], zoom: str = "") -> Scale:
    return Scale(about, curves, _panels([curve.label for curve in curves], zoom))


def plain(base: Recipe, rates: bool = True) -> dict[str, Curve]:
    """SGD, AdamW and IVON of one recipe, the IVON one; rates and options of the others as in Shen et al. 2024."""
    sgd = replace(base, method="sgd", options={"momentum": 0.9, "weight_decay": base.options["weight_decay"]}, lr=0.1)
    adamw = replace(base, method="adamw", options={"weight_decay": 0.05}, lr=2e-3)
    return {
        "SGD": Curve("SGD", sgd, SGD_RATES if rates else ()),
        "AdamW": Curve("AdamW", adamw, ADAMW_RATES if rates else ()),
        "IVON": Curve("IVON", base, IVON_RATES if rates else ()),
    }


# ---- Fig. 4: annealed to zero, correction in the final stage, α = 0.6, mega-batches of 50, no momentum -----


def _fig4(base: Recipe, rates: bool) -> tuple[Curve, ...]:
    three = plain(base, rates)
    ivon = IVON_RATES if rates else ()
    return (
        *three.values(),
        Curve("IVON-PoCo", corrected(base, "ivon-poco", 0.6), ivon),
        Curve("IVON, 3× batch", replace(base, later_batch=3), ivon),
    )


SMALL4 = Recipe(
    Images("digits", "bottlenecks"), "ivon", 0.2, steps=240, batch=25, options=SMALL_IVON, warmup=10, burn_in=160,
    every=20, mega=20, validate_every=16,
)  # fmt: skip
# 90 epochs of 3,336 steps; warm-up of 5 epochs and IVON's settings as in Shen et al. 2024. When the correction starts
# is not said: the last third. Inner loops as long as mega-batches.
PAPER4 = Recipe(
    Images("imagenet", "resnet50"), "ivon", 2.0, steps=300_240, batch=384, warmup=16_680, burn_in=200_160, every=50,
    options={"ess": 1_281_167.0, "hess_init": 0.05, "beta2": 0.99999, "weight_decay": 5e-5, "mc_samples": 1},
    mega=50, validate_every=3336, accumulate=4, dtype="bf16",
)  # fmt: skip
FIG4 = Figure(
    "fig4",
    "PC Fig. 4: a ResNet of bottlenecks, rate annealed to zero",
    (
        Claim(
            "IVON-PoCo reaches an accuracy in fewer steps than IVON; by examples seen they are level", "Fig. 4",
            "accuracy", (("IVON-PoCo", "IVON"),), (("IVON-PoCo", "IVON, 3× batch"),),
        ),
        Claim(
            "the same by the held-out loss", "Fig. 4, our measure", "loss", (("IVON-PoCo", "IVON"),),
            (("IVON-PoCo", "IVON, 3× batch"),),
        ),
    ),
    _scale(
        "digits of 8 × 8 pixels, shifted by up to one: a ResNet of three bottlenecks (BatchNorm), batch 25, 240 steps, "
        "correction from step 160 on",
        _fig4(SMALL4, True),
    ),
    _scale("ImageNet, ResNet-50, batch 384, 90 epochs", _fig4(PAPER4, False), " (correction in the last third)"),
)  # fmt: skip


# ---- Fig. 5: annealed to a quarter; α of D.1, mega-batches of 10, ρ = 0.3 ----------------------------------


def _fig5(base: Recipe, rates: bool) -> tuple[Curve, ...]:
    three = plain(base, rates)
    sgd, adamw = three["SGD"], three["AdamW"]
    ivon = IVON_RATES if rates else ()
    return (
        *three.values(),
        Curve("α-SVRG + SGD", corrected(sgd.recipe, "sgd+alpha-svrg", 0.4), sgd.rates),
        Curve("α-SVRG + AdamW", corrected(adamw.recipe, "adamw+alpha-svrg", 0.2), adamw.rates),
        Curve("IVON-PoCoMo", corrected(base, alpha=0.1, rho1=0.3, rho2=0.3), ivon),
        Curve("SGD, 3× batch", replace(sgd.recipe, later_batch=3), sgd.rates),
        Curve("IVON, 3× batch", replace(base, later_batch=3), ivon),
    )


SMALL5 = Recipe(
    Images("digits", "resnet", {"width": 8, "depth": 1}), "ivon", 0.2, steps=200, batch=25, options=SMALL_IVON,
    warmup=10, final=0.25, burn_in=48, validate_every=10,
)  # fmt: skip
# 100 epochs of 1,000 steps; a burn-in of one epoch (D.1 does not say), mega-batches every 10 steps.
PAPER5 = Recipe(
    Images("cifar10", "resnet"), "ivon", 0.2, steps=100_000, batch=50, final=0.25, burn_in=1000, validate_every=1000,
    options={"ess": 5e5, "hess_init": 0.5, "beta2": 0.99999, "weight_decay": 2e-4},
)  # fmt: skip
FIG5 = Figure(
    "fig5",
    "PC Fig. 5: a ResNet of basic blocks, rate annealed to a quarter",
    (
        Claim(
            "IVON-PoCo improves IVON, by steps and by examples seen", "Fig. 5", "accuracy",
            (("IVON-PoCoMo", "IVON"),), (("IVON-PoCoMo", "IVON, 3× batch"),),
        ),
        Claim(
            "α-SVRG improves SGD, by steps and by examples seen", "Fig. 5", "accuracy",
            (("α-SVRG + SGD", "SGD"),), (("α-SVRG + SGD", "SGD, 3× batch"),),
        ),
        Claim(
            "IVON-PoCo is best of all at the end", "Fig. 5", "accuracy",
            tuple(("IVON-PoCoMo", name) for name in ("SGD", "AdamW", "IVON", "α-SVRG + SGD", "α-SVRG + AdamW")),
        ),
        Claim(
            "IVON-PoCo improves IVON, by the held-out loss", "Fig. 5, our measure", "loss",
            (("IVON-PoCoMo", "IVON"),), (("IVON-PoCoMo", "IVON, 3× batch"),),
        ),
        Claim(
            "α-SVRG improves SGD, by the held-out loss", "Fig. 5, our measure", "loss",
            (("α-SVRG + SGD", "SGD"),), (("α-SVRG + SGD", "SGD, 3× batch"),),
        ),
    ),
    _scale(
        "digits of 8 × 8 pixels, shifted by up to one: a ResNet of three basic blocks (BatchNorm), batch 25, 200 steps",
        _fig5(SMALL5, True),
    ),
    _scale("CIFAR-10, ResNet-20, batch 50, 100 epochs", _fig5(PAPER5, False)),
)  # fmt: skip
