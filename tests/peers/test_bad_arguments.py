"""Whatever is passed by mistake, one sentence names the argument, and nothing has changed."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import Task, equal, network, same, weights
from torch import Tensor, nn

import expfam_poco as poco
from peers.habits import trained

BAD: dict[str, Any] = {
    "float": 0.5, "int": 3, "negative": -7, "None": None, "string": "x", "vector": torch.zeros(3), "array": np.zeros(2),
    "list": [1.0], "empty": [], "dict": {}, "object": object(), "huge": 10**400, "nan": float("nan"), "set": {1},
    "module": nn.Tanh(), "fails": len, "complex": 1j, "True": True,
}  # fmt: skip
LEAKS = (
    "object is not", "object has no", "not supported between", "unhashable", "ambiguous", "must be real number",
    "argument must be", "unsupported operand", "expected np", "too large to convert", "too large to be", "unexpected",
    "size of tensor", "required positional", "convert string", "could not be", "only length-1", "out of range for",
)  # fmt: skip


def refuses(call: Callable[[], Any], argument: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(argument) and message.endswith(".") and "\n" not in message, message
    assert len(message) < 600 and not any(leak in message for leak in LEAKS), message


class Fixture:
    """A binary network with running statistics, trained a little."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.opt = poco.BayesBiNNPoCo(poco.binarize_groups(self.model), square_momentum=None, lr=1e-3, ess=24.0, seed=1)
        self.x = torch.randn(8, 3)
        self.opt.step(self.loss)

    def loss(self) -> Tensor:
        out: Tensor = self.model(self.x)
        return out.square().mean()


# Name, argument, the call with a value for it, and the values that it takes.
Call = tuple[str, str, Callable[[Fixture, Any], Any], set[str]]
ITEMS = {"string", "vector", "array", "list", "set"}  # whose items are the model's to refuse
CALLS: list[Call] = [
    ("step", "closure", lambda f, v: f.opt.step(v), {"module", "fails"}),
    ("step weights", "weights", lambda f, v: f.opt.step([f.loss, f.loss], weights=v), {"None"}),
    ("step fresh_noise", "fresh_noise", lambda f, v: f.opt.step(f.loss, fresh_noise=v), {"True"}),
    ("step scaler", "scaler", lambda f, v: f.opt.step(f.loss, scaler=v), {"None"}),
    ("refresh", "closures", lambda f, v: f.opt.refresh(v), {"module", "fails"}),
    ("refresh of", "closures", lambda f, v: f.opt.refresh([f.loss, v]), {"module", "fails"}),
    ("refresh weights", "weights", lambda f, v: f.opt.refresh([f.loss, f.loss], weights=v), {"None"}),
    ("objective", "closures", lambda f, v: f.opt.objective(v), {"module", "fails"}),
    ("measure_variance", "closures", lambda f, v: f.opt.measure_variance(v), {"module", "fails"}),
    ("set_outer", "state", lambda f, v: f.opt.set_outer(v), set()),
    ("load_state_dict", "state_dict", lambda f, v: f.opt.load_state_dict(v), set()),
    ("add_param_group", "param", lambda f, v: f.opt.add_param_group(v), set()),
    (
        "add_param_group params",
        "params",
        lambda f, v: f.opt.add_param_group({"params": v}),
        {"vector", "empty", "dict", "module"},
    ),
    ("find_lr model", "model", lambda f, v: poco.find_lr(v, f.opt, [f.loss]), {"module"}),
    ("find_lr optimizer", "optimizer", lambda f, v: poco.find_lr(f.model, v, [f.loss]), set()),
    ("find_lr", "closures", lambda f, v: poco.find_lr(f.model, f.opt, v), {"module", "fails"}),
    ("find_lr lowest", "lowest", lambda f, v: poco.find_lr(f.model, f.opt, [f.loss], lowest=v), {"float", "int"}),
    ("find_lr highest", "highest", lambda f, v: poco.find_lr(f.model, f.opt, [f.loss], highest=v), {"float", "int"}),
    ("find_lr steps", "steps", lambda f, v: poco.find_lr(f.model, f.opt, [f.loss], steps=v), set()),
    ("suggest_ess model", "model", lambda f, v: poco.suggest_ess(v, f.loss), {"module"}),
    ("suggest_ess", "closure", lambda f, v: poco.suggest_ess(f.model, v), {"module", "fails"}),
    ("suggest_ess samples", "samples", lambda f, v: poco.suggest_ess(f.model, f.loss, samples=v), {"int"}),
    ("suggest_ess most", "most", lambda f, v: poco.suggest_ess(f.model, f.loss, most=v), {"int"}),
    (
        "suggest_ess hess_init",
        "hess_init",
        lambda f, v: poco.suggest_ess(f.model, f.loss, hess_init=v),
        {"None", "float", "int"},
    ),
    (
        "suggest_ess tolerance",
        "tolerance",
        lambda f, v: poco.suggest_ess(f.model, f.loss, tolerance=v),
        {"float", "int"},
    ),
    ("suggest_ess seed", "seed", lambda f, v: poco.suggest_ess(f.model, f.loss, seed=v), {"int", "negative"}),
    ("export_binary model", "model", lambda f, v: poco.export_binary(v, f.opt), {"module"}),
    ("export_binary", "optimizer", lambda f, v: poco.export_binary(f.model, v), set()),
    ("export_binary seed", "seed", lambda f, v: poco.export_binary(f.model, f.opt, seed=v), {"None", "int", "True"}),
    ("binarize_groups", "model", lambda f, v: poco.binarize_groups(v), {"module"}),
    ("binarize_groups layers", "layers", lambda f, v: poco.binarize_groups(f.model, layers=v), {"empty", "dict"}),
    ("binarize_groups keep", "keep", lambda f, v: poco.binarize_groups(f.model, keep=v), {"empty", "dict"}),
    ("binarize_groups keep_first", "keep_first", lambda f, v: poco.binarize_groups(f.model, keep_first=v), {"True"}),
    ("binarize_groups binary", "binary", lambda f, v: poco.binarize_groups(f.model, binary=v), {"None", "dict"}),
    ("predict model", "model", lambda f, v: poco.predict(v, f.opt, f.x), {"module"}),
    ("predict", "optimizer", lambda f, v: poco.predict(f.model, v, f.x), set()),
    ("predict transform", "transform", lambda f, v: poco.predict(f.model, f.opt, f.x, transform=v), {"None", "module"}),
    ("predict samples", "samples", lambda f, v: poco.predict(f.model, f.opt, f.x, samples=v), {"int"}),
    ("predict seed", "seed", lambda f, v: poco.predict(f.model, f.opt, f.x, seed=v), {"int"}),
    ("predict batched", "batched", lambda f, v: poco.predict(f.model, f.opt, f.x, batched=v), {"None", "True"}),
    ("predict_classes dim", "dim", lambda f, v: poco.predict_classes(f.model, f.opt, f.x, dim=v), set()),
    ("recalibrate model", "model", lambda f, v: poco.recalibrate_batchnorm(v, [f.x]), {"module"}),
    ("recalibrate", "loader", lambda f, v: poco.recalibrate_batchnorm(f.model, v), ITEMS),
    (
        "recalibrate inputs",
        "inputs",
        lambda f, v: poco.recalibrate_batchnorm(f.model, [f.x], inputs=v),
        {"None", "module", "fails"},
    ),
]


@pytest.mark.parametrize(("name", "argument", "call", "taken"), CALLS, ids=[row[0] for row in CALLS])
@pytest.mark.filterwarnings("ignore")
def test_bad_arguments_of_methods_and_tools(
    name: str, argument: str, call: Callable[[Fixture, Any], Any], taken: set[str]
) -> None:
    fixture = Fixture()
    before = copy.deepcopy([weights(fixture.model), fixture.opt.state_dict()])
    failed = []
    for kind, value in BAD.items():
        if kind in taken:
            continue
        try:
            refuses(lambda: call(fixture, value), argument)  # noqa: B023
            assert same(before, [weights(fixture.model), fixture.opt.state_dict()]), "something has changed"
        except BaseException as error:
            failed.append(f"{kind}: {type(error).__name__}: {error}"[:300])
    assert not failed, "\n".join(failed)


# Constructors: the argument, and the values that it takes.
NETWORK: dict[str, Callable[..., Any]] = {
    "BayesBiNN": lambda p, **own: poco.BayesBiNN(p, **{"lr": 0.1, "ess": 9.0, **own}),
    "IVON": lambda p, **own: poco.IVON(p, **{"lr": 0.1, "ess": 9.0, **own}),
    "VSGDPoCo": lambda p, **own: poco.VSGDPoCo(p, **{"lr": 0.1, **own}),
    "VSGD": lambda p, **own: poco.VSGD(p, **{"lr": 0.1, **own}),
    "shell": lambda p, **own: poco.PosteriorCorrected(
        p, own.pop("family", "diagonal_gaussian"), **{"lr": 0.1, "ess": 9.0, **own}
    ),
}
POSITIVE = {"float", "int"}
MADE: list[tuple[str, str, set[str]]] = [
    ("BayesBiNN", "strength", {*POSITIVE, "None"}), ("BayesBiNN", "square_momentum", {"float", "None"}),
    ("BayesBiNN", "temperature", {*POSITIVE, "None"}),
    ("BayesBiNN", "initial", set()),
    ("BayesBiNN", "stale_mean", {"True"}), ("BayesBiNN", "curvature", {"None"}), ("VSGDPoCo", "precision", POSITIVE),
    ("IVON", "hess_approx", set()), ("IVON", "rescale_lr", {"True"}), ("IVON", "beta2", {"float"}),
    ("IVON", "alpha", {"float", "None", "module", "fails"}), ("shell", "alpha", {"float", "module", "fails"}),
    ("shell", "noise", set()), ("shell", "anchor", set()), ("shell", "nonfinite", set()), ("shell", "backend", set()),
    ("shell", "curvature", {"None"}), ("shell", "correction", set()), ("shell", "family", set()),
    ("shell", "retraction", set()), ("shell", "lr", POSITIVE), ("shell", "ess", POSITIVE),
    ("shell", "mc_samples", {"int"}), ("shell", "max_grad_norm", {*POSITIVE, "None"}), ("shell", "one_pass", {"True"}),
    ("shell", "stale_after", {"int", "None"}), ("shell", "seed", {"int", "None", "True"}),
    ("shell", "lr_scale", POSITIVE), ("shell", "prior", {"None", "empty", "dict"}), ("VSGD", "init", set()),
    ("VSGD", "nonfinite", set()), ("VSGD", "gamma", POSITIVE), ("VSGD", "eps", {*POSITIVE, "None"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "argument", "taken"), MADE, ids=[f"{row[0]} {row[1]}" for row in MADE])
@pytest.mark.filterwarnings("ignore")
def test_bad_arguments_of_constructors(kind: str, argument: str, taken: set[str]) -> None:
    model, failed = network(), []
    before = weights(model)
    for name, value in BAD.items():
        if name in taken:
            continue
        try:
            refuses(lambda: NETWORK[kind](model.parameters(), **{argument: value}), argument)  # noqa: B023
        except BaseException as error:
            failed.append(f"{name}: {type(error).__name__}: {error}"[:300])
    assert not failed, "\n".join(failed)
    assert equal(before, weights(model))


def test_groups_say_whether_lr_is_rescaled() -> None:
    for value in ("False", None, 0):
        with pytest.raises(ValueError, match=r"^rescale_lr=.*: give True or False\.$"):
            poco.IVON([{"params": network().parameters(), "rescale_lr": value}], lr=0.1, ess=9.0)


@pytest.mark.parametrize("schedule", [len, lambda step: step.nothing, lambda step: "0.5", lambda step: 10**400])
def test_a_schedule_that_fails_is_named(schedule: Any) -> None:
    model = network()
    opt, task = poco.IVONPoCo(model.parameters(), lr=0.1, ess=9.0, alpha=schedule), Task(model)
    before = weights(model)
    with pytest.raises(ValueError, match=r"^alpha=[^\n]*: (at step 1 it fails|give a number between 0 and 1)[^\n]*\.$"):
        opt.step(task.closure(0))
    assert equal(before, weights(model)) and opt._clock["step"] == 0


@pytest.mark.parametrize("precision", [-2.0, 0.0])
def test_a_stored_posterior_has_a_positive_precision(precision: float) -> None:
    _, opt, _ = trained("SVRG")
    states = {
        name: own._replace(precision=torch.full_like(own.precision, precision))
        for name, own in opt.posterior_states().items()
    }
    refuses(lambda: opt.set_outer(states), "state: it has no finite")


@pytest.mark.parametrize("number", [np.float32(1.5), np.float64(1.5), 1.5, 2])
@pytest.mark.parametrize("name", ["IVON", "AlphaSVRG-SGD"])
def test_a_closure_may_return_any_real_number(name: str, number: Any) -> None:
    model, opt, task = trained(name)

    def loss_is(value: Any) -> Any:
        task.closure(0)().backward()
        return value

    assert float(opt.step(lambda: loss_is(number))) == float(number)
    before = weights(model)
    refuses(lambda: opt.step(lambda: loss_is(True)), "closure: it returned True")
    assert equal(before, weights(model))
