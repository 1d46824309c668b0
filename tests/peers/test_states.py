"""state_dict and load_state_dict as torch has them: hooks, copies, casts, and nothing half loaded."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import SHELL, Task, equal, network, same, those, weights
from torch import Tensor, nn
from torch.distributions import constraints

import expfam_poco as poco
from peers.habits import EVERY, train, trained

every = pytest.mark.parametrize("name", EVERY)
every_shell = pytest.mark.parametrize("name", SHELL)


@every
def test_hooks_run_around_saving_and_loading_and_see_all_of_it(name: str) -> None:
    _, opt, _ = trained(name)
    seen: list[Any] = []
    plain = opt.state_dict()
    opt.register_state_dict_pre_hook(lambda own: seen.append("before saving"))
    opt.register_state_dict_post_hook(lambda own, found: {**found, "mine": sorted(found)})
    saved = opt.state_dict()
    assert saved.pop("mine") == sorted(plain) and same(saved, plain)

    opt.register_load_state_dict_pre_hook(lambda own, found: {k: v for k, v in found.items() if k != "mine"})
    opt.register_load_state_dict_pre_hook(lambda own, found: seen.append(sorted(found)))
    opt.register_load_state_dict_post_hook(lambda own: own.state.__setitem__("after loading", 1))
    opt.load_state_dict({**saved, "mine": 1})
    assert seen == ["before saving", sorted(plain)] and opt.state["after loading"] == 1


@every
def test_what_others_keep_in_the_state_comes_back(name: str) -> None:
    model, opt, task = trained(name)
    opt.state["note"] = {"of": "somebody"}
    saved = copy.deepcopy(opt.state_dict())
    assert saved["state"]["note"] == {"of": "somebody"}
    other, resumed, _ = trained(name, 0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    assert resumed.state["note"] == {"of": "somebody"}
    assert equal(train(resumed, Task(other), 3, 4), train(opt, task, 3, 4))


@every
def test_it_loads_any_number_of_times_into_copies_and_unpickled_ones(name: str) -> None:
    model, opt, _ = trained(name)
    saved = copy.deepcopy(opt.state_dict())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = train(*trained(name)[1:], 3, 4)
    for how in (lambda pair: pair, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        twin, resumed = how((model, opt))
        for _ in range(2):
            twin.load_state_dict(state)
            resumed.load_state_dict(copy.deepcopy(saved))  # torch's own go on in the tensors that they are given
            assert same(resumed.state_dict(), saved)
            assert equal(train(resumed, Task(twin), 3, 4), expected)


@every
@pytest.mark.parametrize(
    ("from_", "to"), [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.bfloat16)]
)
def test_a_state_of_another_precision_is_cast(name: str, from_: torch.dtype, to: torch.dtype) -> None:
    _, opt, _ = trained(name, 4, from_)
    model, other, task = trained(name, 0, to)
    other.load_state_dict(opt.state_dict())
    found = [v for v in every_tensor(other.state_dict()["state"]) if v.ndim and v.is_floating_point()]
    own = torch.promote_types(to, torch.float32)
    allowed = {own} if name in SHELL else {own, to}  # AlphaSVRG's base decides for itself
    assert found and {value.dtype for value in found} <= allowed
    assert all(bool(torch.isfinite(loss)) for loss in train(other, task, 3, 4))
    assert all(p.dtype == to for p in model.parameters())


@every
def test_a_flag_that_torch_fills_in_may_be_missing(name: str) -> None:
    _, opt, task = trained(name)
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        for flag in ("maximize", "foreach", "fused", "differentiable", "capturable"):
            group.pop(flag, None)
    opt.load_state_dict(saved)
    assert all(not group.get("maximize") for group in opt.param_groups)
    train(opt, task, 1, 4)


def every_tensor(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in inner for tensor in every_tensor(part)]


# ---- looked at as a whole ----------------------------------------------------------------------------------


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every tensor and counter of nested dictionaries and lists."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [place for key, part in pairs for place in places(part, (*above, key))]
    return [above]


def at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def bounds(opt: Any) -> list[str]:
    """The fields of which the negative is outside."""
    return [key for key, inside in opt.param_groups[0]["family"].domain.items() if inside is not constraints.real]


def refused(model: nn.Module, opt: Any, saved: Any, before: Any) -> None:
    with pytest.raises(poco.CheckpointError) as caught:
        opt.load_state_dict(saved)
    assert str(caught.value).startswith("state_dict") and "\n" not in str(caught.value)
    assert same(before, [weights(model), opt.state_dict()]), "a refused checkpoint changed something"


def harmed(saved: Any, place: tuple[Any, ...], value: Any) -> Any:
    wrong = copy.deepcopy(saved)
    at(wrong, place[:-1])[place[-1]] = value
    return wrong


@every
def test_no_number_of_a_state_may_be_wrong(name: str) -> None:
    """NaN and infinity anywhere, counters that are none, a record that is missing or of nobody."""
    model, opt, _ = trained(name, 5)
    before = copy.deepcopy([weights(model), opt.state_dict()])
    whole = copy.deepcopy(before[1])
    own = whole.get("alpha_svrg", whole)  # the base's is the base's

    def check(place: tuple[Any, ...], value: Any) -> None:
        wrong = harmed(own, place, value)
        try:
            refused(model, opt, {**whole, "alpha_svrg": wrong} if own is not whole else wrong, before)
        except BaseException as error:
            error.add_note(f"{place}: {value!r}")
            raise

    header = "poco" if "poco" in own else "vsgd"
    ways = [place for place in places({k: own[k] for k in ("state", header)}) if "meter" not in place]
    for place in ways:
        value = at(own, place)
        if isinstance(value, Tensor) and value.is_floating_point():
            for bad in (math.nan, math.inf):
                check(place, torch.full_like(value, bad))
            check(place, value.to(torch.complex128))
        elif place[-1] in ("step", "stamp", "seed", *own[header]["clock"]) and type(value) is int:
            for number in (2.5, 2**64, True, "1", None, *(() if "drawn" in place else (-1,))):  # −1: no draw
                check(place, number)
    number = next(iter(own["state"]))
    for records in (
        {n: own["state"][n] for n in own["state"] if n != number},
        {**own["state"], 99: own["state"][number]},
    ):
        check(("state",), records)
    assert len(ways) > 8


@every_shell
def test_a_state_outside_its_domain_is_refused_wherever_it_stands(name: str) -> None:
    model, opt, _ = trained(name, 5)
    before = copy.deepcopy([weights(model), opt.state_dict()])
    whole = copy.deepcopy(before[1])
    bounded = bounds(opt)
    ways = [p for p in places(whole["state"]) if p[-1] in bounded and "site" not in p]
    records = [record for record in whole["state"].values() if record]  # of a joint family, the first alone
    assert len(ways) == 2 * len(records) * len(bounded)
    for place in ways:
        value = at(whole["state"], place)
        refused(model, opt, harmed(whole, ("state", *place), -value), before)


@pytest.mark.parametrize("name", those(lambda opt: opt._products.kind == "curvature", SHELL))
def test_set_outer_takes_members_of_the_family_alone(name: str) -> None:
    model, opt, _ = trained(name, 5)
    before = copy.deepcopy([weights(model), opt.state_dict()])
    good = opt.posterior_states()
    first = next(iter(good))
    changes: list[Callable[[Tensor], Any]] = [
        lambda v: v * math.nan, lambda v: v + 1j, lambda v: v > 0, lambda v: torch.stack([v, v]), lambda v: None,
    ]  # fmt: skip
    wrong = [
        good[first]._replace(**{key: f(getattr(good[first], key))}) for key in good[first]._fields for f in changes
    ]
    wrong += [good[first]._replace(**{key: -getattr(good[first], key)}) for key in bounds(opt)]
    for state in wrong:
        with pytest.raises(ValueError, match=rf"^state: it has no finite .* for '{first}'; give what .*\.$"):
            opt.set_outer({**good, first: state})
        assert same(before, [weights(model), opt.state_dict()])


def test_a_stored_reference_is_not_refreshed() -> None:
    model = network()
    opt = poco.PosteriorCorrected(
        model.parameters(), "diagonal_gaussian", 0.1, 24.0, correction="stored", hess_init=1.0
    )
    before = weights(model)
    with pytest.raises(ValueError, match=r"^correction=Stored\(\): .*give it one by set_outer\(state\)\.$"):
        opt.refresh(Task(model).chunks())
    assert equal(before, weights(model))


class FailingLate(torch.optim.SGD):
    """A base that has taken a state over before it refuses it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if any(group.get("broken") for group in self.param_groups):
            raise TypeError("too late")


def test_a_base_that_fails_half_way_leaves_all_as_it_was() -> None:
    model = network()
    opt, task = poco.AlphaSVRG(FailingLate(model.parameters(), lr=0.05, momentum=0.9)), Task(model)
    train(opt, task, 4)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(lr=7.0, broken=True)
    before = copy.deepcopy([weights(model), opt.state_dict()])
    refused(model, opt, saved, before)
    assert opt.param_groups is opt.base.param_groups and opt.param_groups[0]["lr"] == 0.05
    train(opt, task, 1, 4)
