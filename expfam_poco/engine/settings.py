"""Hyperparameters of a parameter group: their ranges, and the typed object that the engine reads.

`param_groups` is the face that users and schedulers write; `Settings` is what a group says at a step, checked.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expfam_poco import arguments
from expfam_poco.correction import snapshot
from expfam_poco.correction.alpha import NAMES, AdaptiveAlpha, resolve_alpha
from expfam_poco.correction.base import Averaging
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import LOSSES_ALONE, Estimator
from expfam_poco.family.registry import resolve_family
from expfam_poco.rule import own_site
from expfam_poco.rule.estimators import available, resolve_estimator

RETRACTIONS = ("second_order", "plain")
UNABLE = ("differentiable", "capturable")  # what torch's own optimizers may be told
HESS_APPROX = {"price": "reparam", "gradsq": "gradsq"}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value  # NaN is not itself


def python_number(value: Any) -> Any:
    """A number of NumPy's, such as a schedule's, as one that a checkpoint may hold; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(python_number, value)) if type(value) is tuple else value
    is_numpys = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if is_numpys else value


def number_in(low: float, high: float, *, low_open: bool = False, high_open: bool = False) -> Callable[[Any], bool]:
    """A test whether something is a number (or a tensor with one) in a range."""

    def inside(value: Any) -> bool:
        if isinstance(value, Tensor) and value.numel() == 1:
            value = float(value)
        if not _is_number(value):
            return False
        if LARGEST < abs(value) != math.inf:
            return False
        above = value > low if low_open else value >= low
        below = value < high if high_open else value <= high
        return above and below

    return inside


def _optional(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def _pair_or(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: len(value) == 2 and all(map(test, value)) if isinstance(value, tuple) else test(value)


INF = math.inf
LARGEST = torch.finfo(torch.float32).max
_factor = number_in(0.0, INF, low_open=True, high_open=True)
INITIAL_HESSIAN = "initial_hessian"
MEAN_LOSS = "mean_loss"
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (number_in(0.0, INF, high_open=True), "a finite number, 0 or larger"),
    "precision_lr": (_optional(number_in(0.0, 1.0)), "a number between 0 and 1, or None for lr"),
    "ess": (
        number_in(0.0, INF, low_open=True, high_open=True),
        "a positive number, usually the number of examples",
    ),
    "weight_decay": (number_in(0.0, INF, high_open=True), "a finite number, 0 or larger"),
    "hess_init": (_optional(number_in(0.0, INF, low_open=True, high_open=True)), "a positive number, or None"),
    "rho": (_pair_or(number_in(0.0, 1.0, high_open=True)), "a number in [0, 1), or a pair of them"),
    "anchor_weight": (_optional(number_in(0.0, 1.0)), "a number between 0 and 1, or None for the estimator's"),
    "momentum": (number_in(0.0, 1.0, high_open=True), "a number in [0, 1)"),
    "square_momentum": (_optional(number_in(0.0, 1.0, high_open=True)), "a number in [0, 1), or None"),
    "kl_weight": (number_in(0.0, INF, low_open=True, high_open=True), "a positive finite number, 1 for Bayes' rule"),
    "clip_radius": (number_in(0.0, INF, low_open=True), "a positive number, inf for no clipping"),
    # Last, because named optimizers derive it from the others. `lr_scale` in a group is others' label for a layer.
    "lr_convention": (
        lambda value: value in (INITIAL_HESSIAN, MEAN_LOSS) if isinstance(value, str) else _factor(value),
        f"a positive number, {INITIAL_HESSIAN!r} or {MEAN_LOSS!r}",
    ),
}


# All that a group holds beside its parameters; what a checkpoint must have.
HYPERPARAMETERS = (
    *_RULES,
    "family",
    "curvature",
    "prior",
    "alpha",
    "retraction",
    "debias",
    "reanchor_average",
    "prior_in_momentum",
    "own_site",
    "maximize",
)


def precision_rate(beta2: float) -> float:
    """1 − β₂, the rate of the precision in IVON's terms."""
    if not number_in(0.0, 1.0)(beta2):
        raise ValueError(f"beta2={arguments.shown(beta2)}: it must be a number between 0 and 1.")
    return 1.0 - beta2


def estimator_of(hess_approx: str) -> str:
    """The estimator that `ivon-opt` calls "price" or "gradsq"."""
    remedy = "choose 'price' or 'gradsq', or name any other estimator by curvature="
    arguments.choice("hess_approx", hess_approx, tuple(HESS_APPROX), remedy)
    return HESS_APPROX[hess_approx]


def translate(group: dict[str, Any]) -> None:
    """Give other names of hyperparameters in a group, most of them `ivon-opt`'s, their meaning here."""
    if "beta1" in group:
        group.setdefault("momentum", group.pop("beta1"))
    if "beta2" in group:
        group.setdefault("precision_lr", precision_rate(group.pop("beta2")))
    if "rho1" in group or "rho2" in group:
        group.setdefault("rho", (group.pop("rho1", 0.0), group.pop("rho2", 0.0)))
    if "hess_approx" in group:
        group.setdefault("curvature", estimator_of(group.pop("hess_approx")))
    if "rescale_lr" in group:
        arguments.flag("rescale_lr", rescale := group.pop("rescale_lr"))
        group.setdefault("lr_convention", INITIAL_HESSIAN if rescale else 1.0)
    if isinstance(group.get("lr_scale"), str):
        group.setdefault("lr_convention", group.pop("lr_scale"))


def check_foreign(group: Mapping[str, Any], wide: Mapping[str, Any]) -> None:
    """What a group says that it cannot say; its further keys are others' labels, which it carries as in torch.

    Args:
        group: as it was given.
        wide: what the optimizer has for all groups; wrappers repeat it in each.

    Raises:
        TypeError: if it is no dictionary.
        ValueError: names the key.
    """
    if not isinstance(group, dict):
        raise TypeError(f"param_group={type(group).__name__}: it must be a dict, such as {{'params': [tensor]}}.")
    check_params(group.get("params"))
    for name, value in wide.items():
        if name in group and (type(group[name]) is not type(value) or group[name] != value):
            raise ValueError(
                f"{name}={arguments.shown(group[name])} in a group: it holds for all groups; give it to the optimizer."
            )
    for name in UNABLE:
        if group.get(name):
            raise ValueError(f"{name}={group[name]!r} in a group: no step of this library is {name}; leave it out.")


def check_params(params: Any) -> None:
    """Refuse what holds no parameters; what torch knows better, a tensor alone among them, is left to torch.

    Raises:
        TypeError: if nothing can be listed, or what is listed is neither tensors, named tensors nor groups.
    """
    remedy = "give an iterable of parameters, of pairs (name, parameter), or of groups"
    given = params.values() if isinstance(params, Mapping) else params
    if not isinstance(given, Iterable):
        raise TypeError(f"params={arguments.shown(params)}: {remedy}.")
    if hasattr(given, "__len__"):  # what is not used up by looking at it
        for each in given:
            pair = isinstance(each, tuple) and len(each) == 2
            if not isinstance(each[1] if pair else each, Tensor | dict):
                raise TypeError(f"params: {arguments.shown(each)} is no parameter; {remedy}.")


def split_group(group: dict[str, Any], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups that a group stands for: itself, or one for each part of a family that consists of several.

    Raises:
        ValueError: if the family cannot tell which part a parameter belongs to.
    """
    family = resolve_family(group.get("family", defaults["family"]))
    if isinstance(group["params"], (Tensor, set, frozenset)):
        params, named = [group["params"]], False
    else:
        params = group["params"] = list(group["params"])
        named = bool(params) and all(isinstance(p, tuple) for p in params)
    names = [name for name, _ in params] if named else group.get("param_names")
    parts = family.parts_of(names)
    if parts is None:
        return [group]
    own = {key: value for key, value in group.items() if key not in ("params", "param_names", "family")}
    chosen = [({names[i] for i in indices}, indices) for _, _, indices in parts] if names else []
    made = []
    for (part, settings, _), (mine, indices) in zip(parts, chosen, strict=True):
        others = set(names or ()) - mine
        prior = {**defaults, **own, **settings}["prior"]
        if isinstance(prior, dict):
            settings = {**settings, "prior": {name: value for name, value in prior.items() if name not in others}}
        new = {**own, **settings, "family": part, "params": [params[i] for i in indices]}
        if "param_names" in group:
            new["param_names"] = [group["param_names"][i] for i in indices]
        made += split_group(new, defaults)
    return made


def check_group(group: dict[str, Any]) -> None:
    """Turn names into objects and refuse what is out of range, one sentence each.

    Raises:
        ValueError: names the argument, its value and what it should be.
    """
    group["family"] = resolve_family(group["family"])
    group["curvature"] = resolve_estimator(group["curvature"], group["family"])
    check_numbers(group)
    _check_strength(group)
    arguments.choice("retraction", group["retraction"], RETRACTIONS, f"choose one of {', '.join(RETRACTIONS)}")
    if group["lr_convention"] == INITIAL_HESSIAN and group["hess_init"] is None:
        raise ValueError(f"hess_init=None: lr_scale={INITIAL_HESSIAN!r} needs it; give a positive number.")
    if group["lr_convention"] == MEAN_LOSS and not arguments.is_real(getattr(group["family"], "precision", None)):
        raise ValueError(
            f"lr_scale={MEAN_LOSS!r}: it is for families of a fixed precision, not {type(group['family']).__name__}; "
            "give a number."
        )
    if group["square_momentum"] is not None and group["family"].momentum_block != group["family"].Site._fields:
        raise ValueError(
            f"square_momentum={group['square_momentum']}: {type(group['family']).__name__} scales its steps by its own "
            "precision; leave it out (None)."
        )
    for name in ("debias", "reanchor_average", "prior_in_momentum", "own_site", "maximize"):
        arguments.flag(name, group[name])
    if group["own_site"]:
        own_site.check(group["curvature"])
    group["alpha"] = checked_alpha(python_number(group["alpha"]))


def checked_alpha(alpha: Any) -> Any:
    """α, with its names resolved; a function is looked at when it is called.

    Raises:
        ValueError: for anything but a number or pair in [0, 1], a schedule, "adaptive" or "mega_batch".
    """
    alpha = resolve_alpha(alpha)
    if not callable(alpha) and not isinstance(alpha, tuple(NAMES.values())):
        snapshot.alpha_at(alpha, 1)
    return alpha


def _check_strength(group: Mapping[str, Any]) -> None:
    """Refuse `hess_init` for a family whose precision is its own: such a state would not be a member of it."""
    family = group["family"]
    if group["hess_init"] is None or family.curved:
        return
    event = group["params"][0].shape[-family.event_dim :] if family.event_dim else (1,)
    middle = family.reference_like(torch.zeros(event, dtype=torch.float64))
    state = family.centred_at(middle, group["ess"] * (group["hess_init"] + group["weight_decay"]))
    again = family.from_nat(family.to_nat(state))
    centred = bool(family.levels) or not family.in_domain(state) or torch.allclose(family.point(state), middle)
    if not centred or not all(torch.allclose(a, b) for a, b in zip(state, again, strict=True)):
        raise ValueError(
            f"hess_init={group['hess_init']}: {type(family).__name__} has a precision of its own; leave it out, and "
            "give the family its precision."
        )


def check_numbers(group: dict[str, Any]) -> None:
    """The ranges of the numbers in a group; called again at every step, since schedulers change them."""
    for name, (test, remedy) in _RULES.items():
        value = group[name] = python_number(group[name])
        ok = False
        try:
            ok = test(value)
        except TypeError:
            ok = False
        if not ok:
            raise ValueError(f"{name}={arguments.shown(value)}: it must be {remedy}.")


def check_shell(
    params: Any,
    noise: str,
    modes: Sequence[str],
    mc_samples: int,
    nonfinite: str,
    one_pass: bool,
    lr_scale: Any,
) -> None:
    """The ranges of what holds for all groups, and of what they call otherwise."""
    test, remedy = _RULES["lr_convention"]
    if not test(python_number(lr_scale)):
        raise ValueError(f"lr_scale={arguments.shown(lr_scale)}: it must be {remedy}.")
    check_params(params)
    arguments.flag("one_pass", one_pass)
    check_nonfinite(nonfinite)
    arguments.choice("noise", noise, modes, f"choose one of {', '.join(modes)}")
    arguments.whole("mc_samples", mc_samples, 1)


def check_nonfinite(nonfinite: str) -> None:
    """Refuse what is none of the two ways to meet a NaN."""
    arguments.choice("nonfinite", nonfinite, ("raise", "skip"), "choose 'raise' or 'skip'")


def checked_max_grad_norm(max_grad_norm: Any) -> float | None:
    """The number; refuses what is not positive, nor None."""
    max_grad_norm = python_number(max_grad_norm)
    if max_grad_norm is not None and not number_in(0.0, INF, low_open=True)(max_grad_norm):
        raise ValueError(
            f"max_grad_norm={arguments.shown(max_grad_norm)}: give a positive number, or None for no clipping."
        )
    return None if max_grad_norm is None else float(max_grad_norm)


def check_noise(noise: str, mc_samples: int, group: Mapping[str, Any]) -> None:
    """Refuse noise modes under which an estimator measures nothing, or measures it wrongly."""
    estimator: Estimator = group["curvature"]
    losses = estimator.needs in LOSSES_ALONE
    family = group["family"]
    if noise == "zero" and estimator.needs_noise and (losses or not family.delta_method):
        others = [name for name, other in available(family).items() if not other.needs_noise]
        remedy = (
            f"choose another curvature ({', '.join(map(repr, others))}) or another noise"
            if others
            else "choose another noise"
        )
        raise ValueError(
            f"noise='zero': {type(estimator).__name__} measures with the noise and would find nothing of the width of "
            f"{type(family).__name__}; {remedy}."
        )
    if estimator.antithetic and noise != "antithetic":
        raise ValueError(
            f"noise={noise!r}: {type(estimator).__name__} compares pairs of draws ±ε; give noise='antithetic'."
        )
    if estimator.independent_draws and (mc_samples < 2 or noise == "antithetic"):
        raise ValueError(
            f"mc_samples={mc_samples}, noise={noise!r}: {type(estimator).__name__} compares independent draws; "
            "give mc_samples of 2 or more and a noise other than 'antithetic'."
        )


def check_prior_names(param_groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Refuse dictionaries of priors with a name that no block has."""
    for group in param_groups:
        unknown = [name for name in group["prior"] if name not in names] if isinstance(group["prior"], dict) else []
        if unknown:
            raise ValueError(f"prior[{unknown[0]!r}]: no such parameter; the known names are {', '.join(names)}.")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a group says at a step.

    Attributes:
        family: the group's exponential family.
        estimator: of natural gradients ("curvature" in the group).
        lr: η of the momentum block, in the rule's convention.
        lr_given: the same as the group has it, for sentences.
        precision_lr: η of the other fields.
        ess: N/T, for N examples under a KL of weight T.
        weight_decay: δ.
        hess_init: h₀, or None for the family's own width.
        prior: a State, a dictionary of them by parameter name, or None for precision ess · δ.
        alpha: α: a number, a pair, a schedule, or adaptive.
        rho: ρ of gradient and curvature.
        anchor_weight: of the anchor term.
        momentum: β₁.
        square_momentum: β₂ of the average of squares; None: there is none.
        kl_weight: T.
        debias: whether the momentum's average is divided by 1 − β₁ᵗ.
        clip_radius: ξ.
        retraction: its variant.
        reanchor_average: whether the old mega-batch average is moved to the new posterior.
        prior_in_momentum: whether momentum averages the prior's pull, too.
        own_site: whether the posterior's own site is the control variate of every natural gradient.
        maximize: whether the loss is to be large.
    """

    family: ExponentialFamily
    estimator: Estimator
    lr: float
    lr_given: Any
    precision_lr: float
    ess: float
    weight_decay: float
    hess_init: float | None
    prior: Any
    alpha: Any
    rho: tuple[float, float]
    anchor_weight: float
    momentum: float
    square_momentum: float | None
    kl_weight: float
    debias: bool
    clip_radius: float
    retraction: str
    reanchor_average: bool
    prior_in_momentum: bool
    own_site: bool
    maximize: bool

    @property
    def kind(self) -> tuple[Any, ...]:
        """What decides whether blocks can be laid side by side."""
        return self.family, self.estimator, self.adaptive, self.retraction

    @property
    def averages(self) -> int:
        """How many averages are kept of every field of the momentum block."""
        return (self.momentum > 0.0) if self.square_momentum is None else 2

    @property
    def adaptive(self) -> AdaptiveAlpha | None:
        """How α follows the measured variances, if it does."""
        return self.alpha if isinstance(self.alpha, AdaptiveAlpha) else None

    def rates(self, family: ExponentialFamily) -> Any:
        """The step sizes of a posterior's fields, as a Site of numbers."""
        return family.per_block(self.lr, self.precision_lr)

    def share(self, age: Any) -> Any:
        """w_t = (1 − β₁)/(1 − β₁ᵗ), the share of the newest natural gradient in the momentum's average."""
        return (1.0 - self.momentum) / (1.0 - self.momentum**age)

    def averaging(self, family: ExponentialFamily) -> Averaging:
        """How a mega-batch's mean joins the old one."""
        return Averaging(family.per_block(*self.rho), self.reanchor_average, self.anchor_weight)


def read(group: dict[str, Any]) -> Settings:
    """A group's settings.

    Raises:
        ValueError: for a number out of range, since schedulers and users change them between steps.
    """
    check_numbers(group)
    family, estimator, weight = group["family"], group["curvature"], group["anchor_weight"]
    lr = float(group["lr"]) * _scale_of(group)
    other, rho = group["precision_lr"], group["rho"]
    return Settings(
        family=family,
        estimator=estimator,
        lr=lr,
        lr_given=group["lr"],
        precision_lr=lr if other is None else float(other),
        ess=float(group["ess"]) / float(group["kl_weight"]),
        weight_decay=float(group["weight_decay"]),
        hess_init=None if group["hess_init"] is None else float(group["hess_init"]),
        prior=group["prior"],
        alpha=group["alpha"],
        rho=(float(rho[0]), float(rho[1])) if isinstance(rho, tuple) else (float(rho), float(rho)),
        anchor_weight=float(estimator.anchor_weight if weight is None else weight),
        momentum=float(group["momentum"]),
        square_momentum=None if group["square_momentum"] is None else float(group["square_momentum"]),
        kl_weight=float(group["kl_weight"]),
        debias=group["debias"],
        clip_radius=float(group["clip_radius"]),
        retraction=group["retraction"],
        reanchor_average=group["reanchor_average"],
        prior_in_momentum=group["prior_in_momentum"],
        own_site=group["own_site"],
        maximize=group["maximize"],
    )


def _scale_of(group: Mapping[str, Any]) -> float:
    """The factor on lr, which stands for a convention."""
    scale = group["lr_convention"]
    if scale == INITIAL_HESSIAN:
        return float(group["hess_init"]) + float(group["weight_decay"])
    if scale == MEAN_LOSS:
        return float(group["family"].precision) * float(group["kl_weight"]) / float(group["ess"])
    return float(scale)


class Reading:
    """The settings of one group, read anew when something in it has changed."""

    def __init__(self) -> None:
        self._seen: tuple[Any, ...] = ()
        self._settings: Settings | None = None

    def of(self, group: dict[str, Any]) -> Settings:
        """The group's present settings; the same object as long as its values are the same objects."""
        values = tuple(map(group.__getitem__, HYPERPARAMETERS))
        if self._settings is None or not all(map(operator.is_, values, self._seen)):
            self._settings = read(group)
            values = tuple(map(group.__getitem__, HYPERPARAMETERS))  # those that it has made Python's numbers
            # A tensor or dictionary may be changed in place: look at it every time.
            lasting = not any(isinstance(value, Tensor | dict) for value in values)
            self._seen = values if lasting else (None,) * len(values)
        return self._settings
