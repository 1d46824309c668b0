"""The methods of `expfam-poco compare`: names → an optimizer, its choices, and tuned hyperparameters.

A method is nothing but choices over the optimizers of `expfam_poco`. SGD is `torch.optim.SGD`.

**How the defaults were tuned.** On each task, batch 5, δ as in `tasks.BUILT_IN`, ess = 100 N, 20 passes, by the
median final gap over seeds from 1000 on (never those that are reported), and by its spread where medians were near:
lr in steps of a factor of at most 1.5, hess_init in {0.1, 1, 3, 10, 30}, beta2 in {0.998, 0.999, 0.9995, 0.9998,
0.9999, 0.99999}, beta1 in {0, 0.5, 0.9}. VON and VON-PoCo have one rate for mean and precision (Theorem 3 asks for
that); both have the same coarser grid, lr in {0.003, 0.01, 0.03, 0.1, 0.2, 0.3} and hess_init in {0.1, 1}. Burn-in
(one pass) and inner loop (N/2B steps, whose pairs cost one pass) are the same for all corrected methods; inner loops
of N/B steps have similar medians, but now and then a bad seed. `benchmarks/RESULTS.md` has the numbers.

**Other tasks.** A step of gradient size is stable up to a multiple of 1/L, and L grows with the mean squared norm of
a row. So for a user's data lr is breast-cancer's × 31 / (mean squared norm), which on wine and digits comes within a
factor of 1.5 of the tuned value. VON's rate has no unit; it is inversely proportional to the number of steps in a
pass, as the tuned values are, and at most 0.3. `--tune` finds better ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Parameter

from expfam_poco.compare import solvers
from expfam_poco.compare.tasks import Task
from expfam_poco.errors import InputError
from expfam_poco.optim.alpha_svrg import AlphaSVRG
from expfam_poco.optim.named import IVON, SVRG, VON, IVONPoCo, VONPoCo, VSGDPoCo

Settings = dict[str, Any]
Build = Callable[[Parameter, Settings, int], torch.optim.Optimizer]

BREAST_CANCER_NORM = 31.0
BREAST_CANCER_SIZE = 569
TUNED_BATCH = 5
HIGHEST_UNITLESS_RATE = 0.3

DENSE_LIMIT = 200
"""Methods that keep a dense matrix are in the default list up to this many weights."""


@dataclass(frozen=True)
class Method:
    """A name for an optimizer and its choices.

    Attributes:
        name: as given to `--methods`.
        summary: one line for the table of methods.
        build: makes the optimizer from the weights, the settings and a seed.
        tuned: hyperparameters by task.
        choices: settings that are the same for every task; `--noise`, `--curvature` and `--set` change them.
        exact: the method whose hyperparameters it takes with `--curvature exact`, if they are others.
        corrected: whether it refreshes an outer posterior.
        dense: whether it keeps a matrix of all pairs of weights.
        unitless: whether lr has no unit (Newton-like), so that it suits data of any scale.
        literal: whether `--noise` and `--curvature` leave it alone, because it stands for a printed algorithm.
        solver: the dedicated solver that it is, if it is no optimizer (`solvers`).
    """

    name: str
    summary: str
    build: Build
    tuned: Mapping[str, Settings]
    choices: Settings = field(default_factory=dict)
    exact: str = ""
    corrected: bool = False
    dense: bool = False
    unitless: bool = False
    literal: bool = False
    solver: str = ""

    def settings(self, task: Task, batch: int = TUNED_BATCH) -> Settings:
        """The default hyperparameters on a task; see "Other tasks" above for those that are not listed."""
        if self.solver:
            return {}
        known = task.name in self.tuned
        found = dict(self.tuned[task.name if known else "breast-cancer"])
        factor = 1.0
        if self.unitless:
            factor = (1.0 if known else BREAST_CANCER_SIZE / task.size) * batch / TUNED_BATCH
        elif not known:
            factor = BREAST_CANCER_NORM / float((task.features**2).sum(axis=1).mean())
        rate = found["lr"] * factor
        found["lr"] = float(f"{min(rate, HIGHEST_UNITLESS_RATE) if self.unitless else rate:.2g}")
        return {**self.choices, **found}

    def curvature_evaluations(self, settings: Settings) -> bool:
        """Whether an evaluation of the loss is also one of second derivatives."""
        return settings.get("curvature") in ("exact", "hutchinson")


def _sgd(weight: Parameter, s: Settings, seed: int) -> torch.optim.Optimizer:
    return torch.optim.SGD([weight], lr=s["lr"], weight_decay=s["delta"])


def _svrg(weight: Parameter, s: Settings, seed: int) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = SVRG([weight], lr=s["lr"], weight_decay=s["delta"], alpha=s["alpha"])
    return made


def _alpha_svrg(weight: Parameter, s: Settings, seed: int) -> torch.optim.Optimizer:
    base = torch.optim.SGD([weight], lr=s["lr"], weight_decay=s["delta"])
    made: torch.optim.Optimizer = AlphaSVRG(base, alpha=s["alpha"])
    return made


def _vsgd(weight: Parameter, s: Settings, seed: int) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = VSGDPoCo(
        [weight],
        lr=s["lr"],
        weight_decay=s["delta"],
        alpha=s["alpha"],
        precision=s["ess"],
        ess=s["ess"],
        noise=s["noise"],
        seed=seed,
    )
    return made


def _ivon_arguments(s: Settings, seed: int) -> Settings:
    names = ("lr", "ess", "hess_init", "beta1", "beta2", "curvature")
    return {name: s[name] for name in names} | {"weight_decay": s["delta"], "seed": seed}


def _ivon(weight: Parameter, s: Settings, seed: int) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = IVON([weight], noise=s["noise"], **_ivon_arguments(s, seed))
    return made


def _ivon_poco(weight: Parameter, s: Settings, seed: int) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = IVONPoCo(
        [weight],
        alpha=s["alpha"],
        noise=s["noise"],
        anchor_weight=s["anchor_weight"],
        **_ivon_arguments(s, seed),
    )
    return made


def _von_arguments(s: Settings, seed: int) -> Settings:
    names = ("lr", "ess", "hess_init", "curvature", "noise")
    return {name: s[name] for name in names} | {"weight_decay": s["delta"], "seed": seed}


def _von(weight: Parameter, s: Settings, seed: int) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = VON([weight], **_von_arguments(s, seed))
    return made


def _von_poco(weight: Parameter, s: Settings, seed: int) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = VONPoCo(
        [weight], alpha=s["alpha"], anchor_weight=s["anchor_weight"], **_von_arguments(s, seed)
    )
    return made


def _solved(weight: Parameter, s: Settings, seed: int) -> torch.optim.Optimizer:
    raise TypeError("a solver has no optimizer")


def _rates(*values: float) -> dict[str, Settings]:
    """lr on breast-cancer, wine and digits."""
    return {name: {"lr": value} for name, value in zip(("breast-cancer", "wine", "digits"), values, strict=True)}


def _ivon_rates(*values: tuple[float, float, float, float]) -> dict[str, Settings]:
    """(lr, hess_init, beta1, beta2) on breast-cancer, wine and digits."""
    names = ("lr", "hess_init", "beta1", "beta2")
    return {
        task: dict(zip(names, value, strict=True))
        for task, value in zip(("breast-cancer", "wine", "digits"), values, strict=True)
    }


def _von_rates(*values: tuple[float, float]) -> dict[str, Settings]:
    """(lr, hess_init) on breast-cancer, wine and digits."""
    return {
        task: {"lr": value[0], "hess_init": value[1]}
        for task, value in zip(("breast-cancer", "wine", "digits"), values, strict=True)
    }


SCHEDULES = ("cosine", "constant")
CORRECTED: Settings = {"alpha": 1.0, "chunks": 20, "burn_in": 1.0, "inner": None}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("SGD", "torch.optim.SGD", _sgd, _rates(0.05, 0.15, 0.15)),
        Method(
            "SGD-cosine",
            "the same, its rate annealed to 0 by a cosine",
            _sgd,
            _rates(0.2, 0.45, 0.45),
            {"schedule": "cosine"},
        ),
        Method(
            "SVRG",
            "PC Alg. 1: isotropic Gaussian, delta method",
            _svrg,
            _rates(0.45, 1.0, 1.0),
            CORRECTED,
            corrected=True,
        ),
        Method(
            "alpha-SVRG",
            "Yin et al. 2025: SGD, correction weighted by α",
            _alpha_svrg,
            _rates(0.3, 0.7, 0.5),
            CORRECTED | {"alpha": 0.9},
            corrected=True,
        ),
        Method(
            "VSGD-PoCo",
            "PC Alg. 3: isotropic Gaussian, sampled",
            _vsgd,
            _rates(0.45, 1.0, 1.0),
            CORRECTED | {"noise": "shared"},
            corrected=True,
        ),
        Method(
            "IVON",
            "Shen et al. 2024: diagonal Gaussian",
            _ivon,
            _ivon_rates((0.06, 1.0, 0.9, 0.99999), (0.15, 3.0, 0.9, 0.99999), (0.1, 1.0, 0.9, 0.99999)),
            {"curvature": "reparam", "noise": "shared"},
        ),
        Method(
            "IVON-PoCo",
            "PC Alg. 4 improved: shared noise, 20 chunks",
            _ivon_poco,
            _ivon_rates((0.5, 3.0, 0.9, 0.99999), (1.0, 3.0, 0.0, 0.99999), (1.0, 3.0, 0.9, 0.9999)),
            CORRECTED | {"curvature": "reparam", "noise": "shared", "anchor_weight": 0.0},
            exact="IVON-PoCo-exact",
            corrected=True,
        ),
        Method(
            "IVON-PoCo-exact",
            "the same with the exact diagonal Hessian, anchor weight 1",
            _ivon_poco,
            _ivon_rates((0.4, 30.0, 0.5, 0.999), (0.85, 10.0, 0.0, 0.998), (1.0, 3.0, 0.9, 0.9999)),
            CORRECTED | {"curvature": "exact", "noise": "shared", "anchor_weight": 1.0},
            corrected=True,
        ),
        Method(
            "IVON-PoCo-literal",
            "PC Alg. 4 as printed: fresh noise for θ_out, one chunk",
            _ivon_poco,
            _ivon_rates((0.4, 1.0, 0.9, 0.99999), (0.7, 3.0, 0.0, 0.99999), (0.3, 0.1, 0.9, 0.99999)),
            CORRECTED | {"curvature": "reparam", "noise": "independent", "anchor_weight": 0.01, "chunks": 1},
            corrected=True,
            literal=True,
        ),
        Method(
            "VON",
            "PC Eq. 8: full Gaussian, delta method",
            _von,
            _von_rates((0.003, 0.1), (0.01, 0.1), (0.003, 0.1)),
            {"curvature": "exact", "noise": "zero"},
            dense=True,
            unitless=True,
        ),
        Method(
            "VON-PoCo",
            "PC Alg. 5: full Gaussian, delta method",
            _von_poco,
            _von_rates((0.1, 0.1), (0.2, 0.1), (0.03, 0.1)),
            CORRECTED | {"curvature": "exact", "noise": "zero", "anchor_weight": 1.0},
            corrected=True,
            dense=True,
            unitless=True,
        ),
        Method("saga", "scikit-learn's solver: a table of gradients", _solved, {}, solver="saga"),
        Method("lbfgs", "SciPy's L-BFGS, which scikit-learn's lbfgs is: all data at once", _solved, {}, solver="lbfgs"),
    )
}

DEFAULT_METHODS = (
    "SGD",
    "SGD-cosine",
    "SVRG",
    "IVON",
    "IVON-PoCo-literal",
    "IVON-PoCo",
    "VON",
    "VON-PoCo",
    "saga",
    "lbfgs",
)


def default_methods(task: Task) -> list[str]:
    """The default methods, without dense ones where their matrix would be large and solvers that are not installed."""
    small, solved = task.weights <= DENSE_LIMIT, solvers.available()
    chosen = [METHODS[name] for name in DEFAULT_METHODS]
    return [own.name for own in chosen if (small or not own.dense) and (solved or not own.solver)]


def find_methods(names: Iterable[str]) -> list[Method]:
    """Methods by name, upper and lower case alike.

    Raises:
        InputError: for an unknown name, one given twice, or none at all.
    """
    known = {name.lower(): method for name, method in METHODS.items()}
    found: list[Method] = []
    for name in names:
        if name.strip().lower() not in known:
            raise InputError(f"--methods {name.strip()!r} is not known; choose from {', '.join(METHODS)}.")
        method = known[name.strip().lower()]
        if method in found:
            raise InputError(f"--methods names {method.name} twice; name it once.")
        found.append(method)
    if not found:
        raise InputError(f"--methods is empty; choose from {', '.join(METHODS)}.")
    return found


def check_settings(method: Method, settings: Settings) -> None:
    """Build the optimizer once, so that a hyperparameter out of range is known before any work begins.

    Raises:
        InputError: naming the method, the argument and its value.
    """
    if method.solver:
        solvers.check(method.name)
        return
    if settings.get("schedule", "cosine") not in SCHEDULES:
        raise InputError(f"{method.name}: schedule={settings['schedule']} is not known; choose from {SCHEDULES}.")
    bounds = {"lr": (0.0, math.inf), "burn_in": (0.0, math.inf), "chunks": (0.5, math.inf), "inner": (0.5, math.inf)}
    for name, (low, high) in bounds.items():
        value = settings.get(name)
        if value is not None and not low < value < high and not (name == "burn_in" and value == 0.0):
            raise InputError(f"{method.name}: {name}={value:g} is out of range; give a positive number.")
    try:
        method.build(Parameter(torch.zeros(2, dtype=torch.float64)), settings, 0)
    except (ValueError, TypeError) as error:
        raise InputError(f"{method.name}: {error}") from error
