"""Saving and resuming continues bit for bit wherever it happens; what does not belong is refused, and harms nothing."""

import copy
import functools
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from optimizer_cases import (
    OPTIMIZERS,
    OVER_A_BASE,
    SHELL,
    Task,
    equal,
    network,
    run,
    same,
    shell,
    through_a_file,
    weights,
)
from torch import Tensor, nn

import expfam_poco as poco

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_shell = pytest.mark.parametrize("name", SHELL)


def trained(
    name: str, steps: int, *, dtype: torch.dtype = torch.float64, **choices: Any
) -> tuple[nn.Module, Any, Task]:
    torch.manual_seed(0)
    model = network(dtype, dropout=0.3)
    opt = OPTIMIZERS[name](model.parameters(), **choices)
    task = Task(model)
    run(opt, task, steps)
    return model, opt, task


def continued(model: nn.Module, opt: Any, task: Task, start: int, steps: int = 6) -> list[Tensor]:
    """Losses and weights of further steps; the dropout masks depend on torch's generator."""
    torch.manual_seed(start)
    return [*run(opt, task, steps, start=start), *weights(model)]


# ---- resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@every_optimizer
def test_resuming_continues_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Before the first step, before the first refresh, right after one, and in the middle of an inner loop."""
    orders = [(0, False, True), (3, False, False), (4, True, True), (6, False, False), (6, False, True)]
    if dtype == torch.bfloat16:  # is about what becomes of the dtypes
        orders = orders[2:4]
    for steps, refreshed, optimizer_first in orders:
        model, opt, task = trained(name, steps, dtype=dtype)
        if refreshed:
            opt.refresh(task.chunks())
        saved = through_a_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
        expected = continued(model, opt, task, steps)

        other = network(dtype, dropout=0.3, seed=8)
        resumed = OPTIMIZERS[name](other.parameters())
        if optimizer_first:
            resumed.load_state_dict(saved["optimizer"])
        other.load_state_dict(saved["model"])
        if not optimizer_first:
            resumed.load_state_dict(saved["optimizer"])
        assert equal(continued(other, resumed, Task(other), steps), expected), f"saved after {steps} steps"
        assert same(through_a_file(resumed.state_dict()), through_a_file(opt.state_dict()))


@every_shell
def test_a_posterior_that_is_shown_before_the_first_step_begins_as_it_would_have(name: str) -> None:
    """Its point may be elsewhere than the weights, which stay until then."""
    found = []
    for looks in (False, True):
        model, opt, task = trained(name, 0)
        if looks:
            opt.posterior_states()
            opt.diagnostics()
        other, resumed, own = trained(name, 0)
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(through_a_file(opt.state_dict()))
        found += [continued(model, opt, task, 0), continued(other, resumed, own, 0)]
    assert all(same(found[0], one) for one in found[1:])


@every_shell
def test_resuming_into_an_optimizer_that_has_been_used(name: str) -> None:
    model, opt, task = trained(name, 6)
    saved = through_a_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
    expected = continued(model, opt, task, 6)
    other, resumed, another = trained(name, 11, seed=77)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.seed == opt.seed and resumed.diagnostics()["steps"] == 6
    assert equal(continued(other, resumed, another, 6), expected)
    found = resumed.diagnostics()
    found.pop("flips", None)  # since the call above
    assert found == opt.diagnostics()


def test_the_step_after_the_checkpoint_is_taken_again() -> None:
    """An optimizer that is set back by a step steps again: the number of the step has been seen, the step has not."""
    model, opt, task = trained("IVON", 3)
    saved, before = opt.state_dict(), [p.detach().clone() for p in model.parameters()]
    found = []
    for _ in range(2):
        found.append(continued(model, opt, task, 3, steps=1))
        with torch.no_grad():
            for p, value in zip(model.parameters(), before, strict=True):
                p.copy_(value)
        opt.load_state_dict(saved)
    assert equal(found[0], found[1]) and not equal(found[0][1:], before)


@every_shell
def test_a_checkpoint_is_a_copy_of_its_moment(name: str) -> None:
    _, opt, task = trained(name, 6)
    saved = opt.state_dict()
    frozen = copy.deepcopy(saved)
    run(opt, task, 6, start=6)
    assert same(saved, frozen), "training went on in the checkpoint"
    opt.load_state_dict(saved)
    run(opt, task, 3, start=6)
    assert same(saved, frozen), "training went on in the loaded checkpoint"


@every_shell
def test_a_float32_posterior_of_bfloat16_weights_survives(name: str) -> None:
    model, opt, _ = trained(name, 6, dtype=torch.bfloat16)
    saved = through_a_file(opt.state_dict())
    other = network(torch.bfloat16, dropout=0.3)
    other.load_state_dict(model.state_dict())
    resumed = OPTIMIZERS[name](other.parameters())
    resumed.load_state_dict(saved)
    pairs = list(zip(resumed.posterior_states().values(), opt.posterior_states().values(), strict=True))
    assert pairs
    for loaded, own in pairs:
        assert equal(loaded, own) and {value.dtype for value in loaded} == {torch.float32}
    states = filter(None, saved["state"].values())  # of a joint block, the first parameter has it
    tensors = [
        v for s in states for v in (*s["posterior"].values(), *s["momentum"].values(), *s["memory"]["site"].values())
    ]
    assert {value.dtype for value in tensors} == {torch.float32}


def test_schedules_priors_and_scheduled_rates_come_back() -> None:
    def make() -> tuple[nn.Module, Any]:
        model = network()
        prior = {name: poco.resolve_family("diagonal_gaussian").centred_at(p.detach() + 1.0, 3.0)
                 for name, p in list(model.named_parameters())[:2]}  # fmt: skip
        opt = poco.IVONPoCoMo(
            model.named_parameters(), lr=0.1, ess=50.0, prior=prior, alpha=poco.BurnIn(5, 0.6), rho1=0.5, seed=3
        )
        return model, opt

    model, opt = make()
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.7)
    for step in range(7):
        if step == 3:
            opt.refresh(Task(model).chunks())
        opt.step(Task(model).closure(step))
        scheduler.step()
    saved = through_a_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
    other, resumed = make()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["lr"] == opt.param_groups[0]["lr"] < 0.1
    assert isinstance(resumed.param_groups[0]["alpha"], poco.BurnIn)
    assert same(resumed.param_groups[0]["prior"], opt.param_groups[0]["prior"])
    assert equal(continued(other, resumed, Task(other), 7, 3), continued(model, opt, Task(model), 7, 3))


@pytest.mark.parametrize("way", ["checkpoint", "deep copy", "pickle"])
def test_closures_are_not_part_of_a_checkpoint_or_a_copy(way: str) -> None:
    """A copy's closures would evaluate the original's model."""
    make = shell("diagonal_gaussian", lr=0.05, ess=100.0, hess_init=2.0, anchor="products", anchor_weight=1.0)
    model = network()
    opt, task = make(model.parameters()), Task(model)
    run(opt, task, 6)
    if way == "checkpoint":
        resumed = make(model.parameters())
        resumed.load_state_dict(through_a_file(opt.state_dict()))
    else:
        pair = (model, opt)
        model, resumed = copy.deepcopy(pair) if way == "deep copy" else pickle.loads(pickle.dumps(pair))
        task = Task(model)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"anchor='products': a checkpoint or copy has no closures; call refresh"):
        resumed.step(task.closure(6))
    assert equal(weights(model), before)
    resumed.refresh(task.chunks())
    assert torch.isfinite(resumed.step(task.closure(6)))


# ---- refusing ----------------------------------------------------------------------------------------------


def refused(opt: Any, model: nn.Module, wrong: Any, *entries: str, before: Any = None) -> None:
    """Loading raises a `CheckpointError` of one sentence that names the entry, and changes nothing."""
    before = copy.deepcopy([weights(model), opt.state_dict()]) if before is None else before
    with pytest.raises(poco.CheckpointError) as caught:
        opt.load_state_dict(wrong)
    message = str(caught.value)
    assert message.startswith("state_dict") and "\n" not in message and len(message) < 900, message
    assert all(entry in message for entry in entries), message
    assert same(before, [weights(model), opt.state_dict()]), "a refused checkpoint changed something"


def other_model(*, hidden: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1)).double()


@every_optimizer
def test_a_checkpoint_of_another_model_is_refused(name: str) -> None:
    model, opt, task = trained(name, 6)
    wider = other_model()
    foreign = OPTIMIZERS[name](wider.parameters())
    run(foreign, Task(wider), 6)
    refused(opt, model, foreign.state_dict())
    deeper = nn.Sequential(network(), nn.Linear(1, 1)).double()
    foreign = OPTIMIZERS[name](deeper.parameters())
    run(foreign, Task(deeper), 6)
    refused(opt, model, foreign.state_dict())
    assert torch.isfinite(opt.step(task.closure(0)))


@functools.cache
def started(name: str) -> Any:
    """The state after one step."""
    return trained(name, 1)[1].state_dict()


@every_optimizer
def test_a_checkpoint_of_another_kind_of_optimizer_is_refused(name: str) -> None:
    model, opt, _ = trained(name, 6)
    for other in OPTIMIZERS:
        own, theirs = opt.state_dict(), started(other)
        mine = [{k: v for k, v in g.items() if k in ("family", "curvature")} for g in own["param_groups"]]
        ours = [{k: v for k, v in g.items() if k in ("family", "curvature")} for g in theirs["param_groups"]]
        settings = [s.get("poco", {}).get("settings") for s in (own, theirs)]
        if mine != ours or settings[0] != settings[1]:
            refused(opt, model, theirs)
    plain = torch.optim.AdamW(network().parameters()).state_dict()
    refused(opt, model, plain, "state_dict['")


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "noise": ({"noise": "independent"}, "['settings']['noise']"),
    "draws": ({"mc_samples": 3}, "['settings']['mc_samples']"),
    "anchor": ({"anchor": "stored"}, "['settings']['anchor']"),
    "curvature": ({"curvature": "exact"}, "['curvature']"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_checkpoint_of_other_settings_is_refused(setting: str) -> None:
    choices, entry = SETTINGS[setting]
    model, opt, _ = trained("IVONPoCo", 6)
    _, foreign, _ = trained("IVONPoCo", 6, **choices)
    refused(opt, model, foreign.state_dict(), entry)


def test_a_family_with_other_hyperparameters_is_refused() -> None:
    model, opt, _ = trained("VSGDPoCo", 6)
    _, foreign, _ = trained("VSGDPoCo", 6, precision=101.0)
    refused(opt, model, foreign.state_dict(), "['param_groups'][0]['family']", "101.0", "100.0")


def test_parameters_of_other_names_are_refused() -> None:
    model, other = network(), network()
    opt = poco.IVON(model.named_parameters(), lr=0.1, ess=10.0)
    renamed = [(f"net.{name}" if "3" in name else name, p) for name, p in other.named_parameters()]
    foreign = poco.IVON(renamed, lr=0.1, ess=10.0)
    refused(opt, model, foreign.state_dict(), "net.3.weight", "'3.weight'")


def test_another_version_is_refused() -> None:
    model, opt, _ = trained("IVON", 2)
    later = copy.deepcopy(opt.state_dict())
    later["poco"]["format"] += 1
    refused(opt, model, later, "state_dict['poco']", "format 9", "8 is needed")
    del later["poco"], later["state"][0]["header"]
    refused(opt, model, later, "state_dict['poco']", "not a checkpoint")


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every entry of nested dictionaries."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield (*above, key)
            yield from paths(entry, (*above, key))
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, entry in enumerate(value):
            yield from paths(entry, (*above, number))


def damaged(state_dict: Any, path: tuple[Any, ...], harm: Callable[[Any, Any], None]) -> Any:
    """A copy (of the containers on the way; the rest is shared) in which the entry is harmed."""
    copied = inner = copy.copy(state_dict)
    for key in path[:-1]:
        inner[key] = copy.copy(inner[key])
        inner = inner[key]
    harm(inner, path[-1])
    return copied


def own_entries(state_dict: Any) -> list[tuple[Any, ...]]:
    """What this library wrote: all entries, or those beside the base optimizer's."""
    if "alpha_svrg" in state_dict:
        return [p for p in paths(state_dict) if p[0] == "alpha_svrg" and len(p) <= 2]
    # torch fills this in, too, and the meter starts when it starts.
    optional = {("param_groups", number, "maximize") for number in range(len(state_dict["param_groups"]))}
    # The header in the first state is for torch.distributed.checkpoint: it is read where "poco" is missing.
    return [p for p in paths(state_dict) if p not in optional and p[:2] != ("poco", "meter") and "header" not in p]


@pytest.mark.parametrize("version", [4, 7])
def test_formats_are_read_which_did_not_count_the_pace_of_refreshes_or_weigh_the_kl(version: int) -> None:
    model, opt, task = trained("IVONPoCoMo", 6)
    older = copy.deepcopy(opt.state_dict())
    older["poco"]["format"] = version
    for name in ("mega", "every") if version == 4 else ():
        del older["poco"]["clock"][name]
    for group in older["param_groups"]:
        del group["square_momentum"], group["kl_weight"]
    expected = continued(model, opt, task, 6, 3)
    model, opt, task = trained("IVONPoCoMo", 6)
    opt.load_state_dict(older)
    assert equal(continued(model, opt, task, 6, 3), expected)


@pytest.mark.parametrize("name", ["SVRG", "IVONPoCoMo", "full-reparam", "diagonal-stored", *OVER_A_BASE])
def test_damaged_checkpoints_are_refused(name: str) -> None:
    """Every entry in turn is missing, or something else than it should be."""
    model, opt, task = trained(name, 6)
    before = copy.deepcopy([weights(model), opt.state_dict()])
    _, other, _ = trained(name, 9)
    for group in other.param_groups:
        group["lr"] *= 0.5  # so that half a checkpoint would show
    whole = other.state_dict()

    def remove(inner: Any, key: Any) -> None:
        del inner[key]

    def garble(inner: Any, key: Any) -> None:
        inner[key] = "damaged"

    entries = own_entries(whole)
    assert len(entries) >= 4
    for path in entries:
        for harm in (remove, garble):
            if harm is remove and (path[-1] in ("poco", "alpha_svrg") or damaged_entry(whole, path) == {}):
                continue  # another copy is in the states, as torch.distributed.checkpoint needs it
            try:
                refused(opt, model, damaged(whole, path, harm), before=before)
            except BaseException as error:
                error.add_note(f"{harm.__name__} {path}")
                raise
    expected = continued(*trained(name, 6), 6, 2)
    opt.load_state_dict(before[1])
    assert equal(continued(model, opt, task, 6, 2), expected)


@every_shell
def test_tensors_of_another_shape_dtype_or_domain_are_refused(name: str) -> None:
    model, opt, _ = trained(name, 6)
    whole = opt.state_dict()
    harms: dict[str, Callable[[Tensor], Tensor]] = {
        "shape": lambda value: torch.stack([value, value]),
        "dtype": lambda value: value.to(torch.float16),
    }
    tensors = [
        p for p in paths(whole["state"]) if "header" not in p and isinstance(damaged_entry(whole["state"], p), Tensor)
    ]
    assert len(tensors) >= 4
    for path in tensors:
        for harm in harms.values():
            wrong = damaged(
                whole, ("state", *path), lambda inner, key, harm=harm: inner.update({key: harm(inner[key])})
            )
            refused(opt, model, wrong, "state_dict: ", "group0", str(path[-1]))
    for path in tensors:
        if path[1] == "posterior":
            wrong = damaged(whole, ("state", *path), lambda inner, key: inner.update({key: inner[key] * torch.nan}))
            refused(opt, model, wrong, "domain", "group0")
    for number, state in whole["state"].items():
        if state:
            wrong = copy.deepcopy(whole)
            momentum = {name: torch.stack([value, value]) for name, value in state["momentum"].items()}
            wrong["state"][number]["momentum"] = momentum
            refused(opt, model, wrong, "momentum")


def damaged_entry(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value
