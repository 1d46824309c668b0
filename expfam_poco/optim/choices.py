"""What each named optimizer chooses, in one table; docs/optimizers.md shows it.

The papers: PC is *SVRG and Beyond via Posterior Correction*; IVON is Shen et al. 2024; BayesBiNN is Meng, Bachmann and
Khan 2020. Where another default than theirs is measurably better (`benchmarks/defaults.py`), it stands here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from expfam_poco.engine.settings import INITIAL_HESSIAN, MEAN_LOSS
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.optim.optimizer import PosteriorCorrected

_SGD = {"family": "isotropic_gaussian", "ess": 1.0, "lr_scale": MEAN_LOSS}
_NEWTON = {"family": "full_gaussian", "curvature": "exact", "hess_init": 1.0, "weight_decay": 1e-4}
_IVON = {
    "family": "diagonal_gaussian", "curvature": "reparam", "momentum": 0.9, "precision_lr": 1.0 - 0.99999,
    "hess_init": 10.0, "weight_decay": 1e-4, "lr_scale": INITIAL_HESSIAN,
}  # fmt: skip
_SIGNS = {
    "family": "bernoulli", "curvature": "straight_through", "momentum": 0.9, "prior_in_momentum": True,
    "square_momentum": 0.999, "lr_scale": 100.0, "kl_weight": 0.004,
}  # fmt: skip
# λ is of size 10, not 1/√n as real weights are: counted in hundreds, `lr` has Adam's range. Where one rate is for all,
# lr is the rule's.
STRENGTH, SIGNS_LR = 10.0, 0.01
ONE_RATE: Mapping[str, Any] = {"lr_scale": 1.0, "kl_weight": 1.0, "strength": 1.0}


class OwnRateScale(float):
    """A group's `lr_convention` or `kl_weight` where weights have rates of their own; with one rate for all it is 1.

    Example:
        >>> from expfam_poco.optim.choices import OwnRateScale
        >>> OwnRateScale(30.0)
        30.0
    """


# Of binary weights whose sums nothing normalises: a step that flips a share f of n of them changes a sum of size √n by
# f n, and the next layer's by that much more. Longer steps do not settle.
UNNORMALISED = OwnRateScale(30.0)
# What Meng et al. 2020 have, with the rate and temperature of their code to be given; `BayesBiNN.as_published`.
PUBLISHED: Mapping[str, Any] = {"square_momentum": None, "curvature": "relaxed", "strength": 10.0}
# What `ivon-opt` has where nothing is said; `IVON.like_ivon_opt`.
IVON_OPT: Mapping[str, Any] = {
    "hess_init": 1.0, "beta1": 0.9, "beta2": 0.99999, "weight_decay": 1e-4, "mc_samples": 1, "hess_approx": "price",
    "clip_radius": math.inf, "debias": True, "rescale_lr": True,
}  # fmt: skip

# Arguments of `PosteriorCorrected`, where an optimizer has others than that one's defaults. The numbers that a
# signature in `named` shows as well, for whoever reads it in an editor, are held to these by a test.
CHOICES: Mapping[str, Mapping[str, Any]] = {
    "SVRG": {**_SGD, "alpha": 1.0, "noise": "zero"},  # PC Alg. 1, Eq. 2
    "VSGDPoCo": {**_SGD, "alpha": 1.0},  # PC Alg. 3 (there VSGD-PC)
    "VON": {**_NEWTON, "alpha": 0.0, "own_site": True},  # PC Eq. 8
    "VONPoCo": {**_NEWTON, "alpha": 1.0},  # PC Alg. 5, Eq. 15, 16, 24
    "IVON": {**_IVON, "alpha": 0.0},  # Shen et al. 2024; PC Alg. 4 without red
    "IVONPoCo": {**_IVON, "alpha": 1.0},  # PC Alg. 4 without outer momentum (IVON-PC)
    "IVONPoCoMo": {**_IVON, "alpha": "mega_batch", "rho": (0.0, 0.0)},  # PC Alg. 4 (IVON-PCM)
    "BayesBiNN": {**_SIGNS, "alpha": 0.0},  # Meng et al. 2020
    "BayesBiNNPoCo": {**_SIGNS, "alpha": "mega_batch"},  # PC Eq. 13, 18
}


def scaled(params: Any, *, own: bool) -> Any:
    """The parameters, where groups have numbers for own rates: as such, or 1 where all weights have one rate."""
    if not isinstance(params, list | tuple) or not any(isinstance(group, dict) for group in params):
        return params
    found = []
    for group in params:
        named = group if isinstance(group, dict) else {}
        scales = {name: value for name, value in named.items() if isinstance(value, OwnRateScale)}
        found.append({**group, **{n: float(v) if own else 1.0 for n, v in scales.items()}} if scales else group)
    return found


class Named(PosteriorCorrected):
    """A named optimizer: a `PosteriorCorrected` with other defaults.

    Args:
        params: parameters or groups.
        lr: η, in the convention that is chosen.
        ess: N; None: the chosen one.
        member: the family as an object, where it has hyperparameters; None: the chosen one.
        **given: what the caller says, over what is chosen; for α and the curvature, None is what is chosen.
    """

    chosen: ClassVar[Mapping[str, Any]]

    def __init__(
        self, params: Any, lr: float, ess: float | None = None, *, member: ExponentialFamily | None = None, **given: Any
    ) -> None:
        self._refuse(given, family="")
        for name in ("alpha", "curvature"):
            if given.get(name, 0) is None:
                del given[name]
        settings = {**self.chosen, **given}
        family, usual = settings.pop("family"), settings.pop("ess", math.nan)
        super().__init__(params, member or family, lr, usual if ess is None else ess, **settings)

    def _refuse(self, given: Mapping[str, Any], **own: str) -> None:
        """Refuse arguments for which this optimizer has another name, or none."""
        for name, other in own.items():
            if name in given:
                does = f"calls it {other}; give that" if other else "chooses it; use PosteriorCorrected for another"
                raise TypeError(f"{name}={given[name]!r}: {type(self).__name__} {does}.")
