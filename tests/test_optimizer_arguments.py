"""Arguments out of range are refused by one sentence that names argument, value and remedy; nothing is half made."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import SHELL, Task, differentiates, equal, network, run, those, weights
from torch import nn

import expfam_poco as poco

NAN, INF = math.nan, math.inf
GAUSSIAN: Callable[..., Any] = poco.get_family("diagonal_gaussian")

# Argument, values that are refused, and words of the sentence beside "argument=value".
SHELL_TABLE: list[tuple[str, list[Any], str]] = [
    ("lr", [-0.1, NAN, INF, "fast", None, 10**40], "a finite number, 0 or larger"),
    ("ess", [0.0, -1.0, INF, NAN, "100", 1e39], "a positive number, usually the number of examples"),
    ("weight_decay", [-1e-4, NAN, INF], "a finite number, 0 or larger"),
    ("precision_lr", [-0.1, 1.5, NAN], "between 0 and 1, or None for lr"),
    ("hess_init", [0.0, -1.0, INF, "1"], "a positive number, or None"),
    ("rho", [1.0, -0.1, (0.5, 1.0), (0.1, 0.2, 0.3), "high"], "a number in [0, 1), or a pair"),
    ("anchor_weight", [-0.1, 1.5, NAN], "between 0 and 1, or None for the estimator's"),
    ("momentum", [1.0, -0.1, NAN], "a number in [0, 1)"),
    ("clip_radius", [0.0, -1.0, NAN, 1e39], "a positive number, inf for no clipping"),
    ("lr_scale", [0.0, -1.0, "large"], "a positive number"),
    ("alpha", [1.5, -0.1, NAN, "all", None, (0.5, 1.5), (0.1, 0.2, 0.3), (0.5,)], "a number between 0 and 1, a pair"),
    ("retraction", ["linear", None], "choose one of second_order, plain"),
    ("debias", [None, 1], "give True or False"),
    ("reanchor_average", ["yes"], "give True or False"),
    ("maximize", [None, 1, "yes"], "give True or False"),
    ("noise", ["gaussian", None], "choose one of shared, independent, fixed, antithetic, zero"),
    ("anchor", ["hessian", None], "choose one of curvature, stored, products"),
    ("nonfinite", ["ignore", None], "choose 'raise' or 'skip'"),
    ("mc_samples", [0, -1, 1.5, True], "give an integer, 1 or larger"),
    ("max_grad_norm", [0.0, -1.0, NAN], "give a positive number, or None"),
    ("curvature", ["fisher"], "choose one of: exact, gradsq, hutchinson, reparam, score"),
    ("family", ["gauss"], f"known families: {', '.join(poco.families_available())}"),
]


def make(params: Any, **choices: Any) -> Any:
    family = choices.pop("family", "diagonal_gaussian")
    return poco.PosteriorCorrected(params, family, **{"lr": 0.1, "ess": 10.0, **choices})


def refused(attempt: Callable[[], Any], argument: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        attempt()
    message = str(caught.value)
    assert message.startswith(f"{argument}={value!r}"), message
    assert all(word in message for word in words.split(", ")) and "\n" not in message and message.endswith("."), message


@pytest.mark.parametrize(("argument", "values", "words"), SHELL_TABLE, ids=[row[0] for row in SHELL_TABLE])
def test_arguments_out_of_range_are_refused(argument: str, values: list[Any], words: str) -> None:
    model = network()
    for value in values:
        refused(lambda: make(model.parameters(), **{argument: value}), argument, value, words)  # noqa: B023


SHELL_WIDE = {"noise", "anchor", "nonfinite", "mc_samples", "max_grad_norm"}


# In a group `lr_scale` is a label of others.
GROUP_TABLE = [("lr_convention" if row[0] == "lr_scale" else row[0], *row[1:]) for row in SHELL_TABLE]


@pytest.mark.parametrize(("argument", "values", "words"), GROUP_TABLE, ids=[row[0] for row in GROUP_TABLE])
def test_a_refused_group_is_not_added(argument: str, values: list[Any], words: str) -> None:
    model = network()
    opt = make(model[0].parameters())
    others = list(model[3].parameters())
    for value in values:
        group = {"params": others, argument: value}
        words_here = "holds for all groups; give it to the optimizer" if argument in SHELL_WIDE else words
        refused(lambda: opt.add_param_group(group), argument, value, words_here)  # noqa: B023
        assert len(opt.param_groups) == 1
    opt.add_param_group({"params": others})
    assert len(opt.param_groups) == 2
    assert torch.isfinite(torch.stack(run(opt, Task(model), 5))).all()


@pytest.mark.parametrize("argument", ["lr", "ess", "weight_decay", "momentum", "precision_lr", "rho"])
def test_numbers_that_a_scheduler_sets_are_checked_at_every_step(argument: str) -> None:
    model = network()
    opt, task = make(model.parameters()), Task(model)
    run(opt, task, 2)
    before, good = weights(model), opt.param_groups[0][argument]
    opt.param_groups[0][argument] = -1.0
    for attempt in (lambda: opt.step(task.closure(0)), lambda: opt.refresh(task.chunks())):
        refused(attempt, argument, -1.0, "must be")
    assert equal(weights(model), before)
    opt.param_groups[0][argument] = good
    assert torch.isfinite(opt.step(task.closure(0)))


# The named optimizers' own arguments: the sentence names what was written.
NAMED_TABLE: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (poco.IVON, {"beta2": 1.5}, r"beta2=1\.5: it must be a number between 0 and 1"),
    (poco.IVON, {"beta2": "high"}, r"beta2='high'"),
    (poco.IVON, {"beta1": 1.0}, r"(beta1|momentum)=1\.0: it must be a number in \[0, 1\)"),
    (poco.IVON, {"hess_init": -1.0}, r"hess_init=-1\.0: it must be a positive number"),
    (poco.IVON, {"hess_init": "1"}, r"hess_init='1': it must be a positive number"),
    (poco.IVON, {"weight_decay": -2.0}, r"weight_decay=-2\.0"),
    (poco.IVON, {"hess_approx": "exact"}, r"hess_approx='exact': choose 'price' or 'gradsq'"),
    (poco.IVON, {"ess": -1.0}, r"ess=-1\.0"),
    (poco.IVONPoCoMo, {"rho1": 1.0}, r"rho=\(1\.0, 0\.0\)"),
    (poco.IVONPoCo, {"alpha": 2.0}, r"alpha=2\.0"),
    (poco.VSGDPoCo, {"precision": 0.0}, r"precision=0\.0: a Gaussian needs"),
    (poco.VSGDPoCo, {"ess": 0.0}, r"ess=0\.0"),
    (poco.VSGDPoCo, {"ess": -3.0}, r"ess=-3\.0"),
    (poco.SVRG, {"weight_decay": -1.0}, r"weight_decay=-1\.0"),
    (poco.VONPoCo, {"precision_lr": 2.0}, r"precision_lr=2\.0"),
    (poco.VONPoCo, {"hess_init": 0.0}, r"hess_init=0\.0"),
]


@pytest.mark.parametrize(("kind", "choices", "sentence"), NAMED_TABLE)
def test_the_named_optimizers_name_their_own_arguments(
    kind: Callable[..., Any], choices: dict[str, Any], sentence: str
) -> None:
    takes_ess = kind is not poco.SVRG and kind is not poco.VSGDPoCo
    settings: dict[str, Any] = {"lr": 0.1, **({"ess": 10.0} if takes_ess else {}), **choices}
    with pytest.raises(ValueError, match=f"^{sentence}") as caught:
        kind(network().parameters(), **settings)
    assert str(caught.value).endswith(".")


def test_what_does_not_go_together_is_refused() -> None:
    model = network()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"noise": "zero"}, r"noise='zero': Reparameterised measures with the noise and would find nothing.*'exact'"),
        ({"curvature": "score"}, r"mc_samples=1, noise='shared': ScoreFunction compares independent draws"),
        (
            {"curvature": "score", "mc_samples": 4, "noise": "antithetic"},
            r"mc_samples=4, noise='antithetic': ScoreFunction",
        ),
        (
            {"family": "isotropic_gaussian", "curvature": "exact"},
            r"curvature='exact' is not an estimator for Isotropic",
        ),
        ({"family": "bernoulli", "curvature": "reparam"}, r"curvature='reparam' is not an estimator for Bernoulli"),
        ({"family": "bernoulli", "curvature": poco.estimators.Reparameterised()}, r"curvature='reparam' does not fit"),
        ({"curvature": "relaxed"}, r"curvature='relaxed' is not an estimator for DiagonalGaussian"),
        ({"lr_scale": "initial_hessian"}, r"hess_init=None"),
        ({"lr_scale": "mean_loss"}, r"lr_scale='mean_loss'.*fixed precision, not DiagonalGaussian"),
    ]
    for choices, sentence in cases:
        with pytest.raises(ValueError, match=f"^{sentence}"):
            make(model.parameters(), **choices)
    with pytest.raises(TypeError, match="family=3 is neither a registered name nor an ExponentialFamily"):
        make(model.parameters(), family=3)


def test_priors_that_do_not_fit_are_refused() -> None:
    model = network()
    isotropic = poco.get_family("bernoulli")().centred_at(torch.zeros(()), 1.0)
    own = GAUSSIAN().centred_at(torch.zeros(()), 1.0)
    cases: list[tuple[Any, str]] = [
        (isotropic, "prior=Theta: DiagonalGaussian needs a prior of type GaussianState"),
        (3.0, "prior=float: DiagonalGaussian needs"),
        (own._replace(mean=torch.zeros(7)), r"prior\.mean has shape \(7,\) for a block 'group0\.param0'"),
        (own._replace(precision=torch.tensor(NAN)), r"prior\.precision .* NaN"),
        ({"group0.param0": own._replace(mean=torch.zeros(7))}, r"prior\.mean has shape \(7,\)"),
        ({"weight": own}, r"prior\['weight'\]: no such parameter; the known names are group0\.param0, group0\.param1"),
    ]
    for prior, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            make(model.parameters(), prior=prior)


@pytest.mark.parametrize("seed", [-1, 2**64, "one", 1.5])
def test_a_seed_that_is_no_counter_is_refused(seed: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"seed"):
        make(network().parameters(), seed=seed)


def test_alpha_svrg_wants_an_optimizer_and_an_alpha() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"base_optimizer=.*give a torch\.optim\.Optimizer"):
        poco.AlphaSVRG(model.parameters())
    with pytest.raises(ValueError, match=r"alpha=2\.0: give a number between 0 and 1"):
        poco.AlphaSVRG(torch.optim.SGD(model.parameters(), lr=0.1), alpha=2.0)


def test_boundary_values_are_accepted() -> None:
    model = network()
    accepted = {"lr": 0.0, "weight_decay": 0.0, "precision_lr": 0.0, "rho": (0.0, 0.9), "anchor_weight": 1.0,
                "momentum": 0.0, "clip_radius": INF, "alpha": (0.0, 1.0), "max_grad_norm": INF}  # fmt: skip
    for argument, value in accepted.items():
        assert torch.isfinite(torch.stack(run(make(model.parameters(), **{argument: value}), Task(model), 5))).all()
    opt = make(model.parameters(), lr=torch.tensor(0.05), seed=2**64 - 1)
    assert torch.isfinite(torch.stack(run(opt, Task(model), 5))).all()


# ---- what groups and wrappers do to optimizers -------------------------------------------------------------


def test_names_of_ivon_opt_in_a_group_have_their_meaning() -> None:
    model = network()
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[3].parameters()), "beta1": 0.5, "beta2": 0.9, "hess_approx": "gradsq"},
    ]
    opt = poco.IVONPoCoMo(groups, lr=0.1, ess=50.0)
    first, second = opt.param_groups
    assert (first["momentum"], second["momentum"]) == (0.9, 0.5)
    assert abs(second["precision_lr"] - 0.1) < 1e-15 and second["curvature"] == poco.estimators.SquaredGradient()
    assert first["curvature"] == poco.estimators.Reparameterised()
    with pytest.raises(ValueError, match=r"beta2=7: it must be"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "beta2": 7})


def test_tied_weights_by_shared_storage_are_refused() -> None:
    first = nn.Parameter(torch.ones(3))
    second = nn.Parameter(torch.zeros(3))
    second.data = first.data
    with pytest.raises(ValueError, match="two parameters of a group share their storage"):
        make([first, second])


@pytest.mark.parametrize("name", those(differentiates, SHELL))
def test_no_training_inside_inference_mode(name: str) -> None:
    model = network()
    opt, task = SHELL[name](model.parameters()), Task(model)
    run(opt, task, 5)
    before = weights(model)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\); call it outside"):
        opt.step(task.closure(0))
    assert equal(weights(model), before)
    assert torch.isfinite(opt.step(task.closure(0)))
