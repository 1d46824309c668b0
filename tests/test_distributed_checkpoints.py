"""torch.distributed.checkpoint's state_dicts of every optimizer, within one process (test_processes.py has several)."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import OPTIMIZERS, Task, equal, network, run, same, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import expfam_poco as poco

STORED = "diagonal-stored"  # refused, see below
NAMES = [name for name in OPTIMIZERS if name != STORED]
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def trained(name: str, steps: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = network()
    optimizer = OPTIMIZERS[name](model.named_parameters())
    run(optimizer, Task(model), steps)
    return model, optimizer


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", NAMES)
def test_what_torch_keeps_resumes_new_and_used_optimizers_bit_for_bit(name: str, flat: bool) -> None:
    """Before the first step and in the middle of an inner loop."""
    options = FLAT if flat else StateDictOptions()
    for steps in (0, 6):
        model, optimizer = trained(name, steps)
        saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, optimizer, options=options)))
        run(optimizer, Task(model), 4, start=steps)
        expected = weights(model)
        for used in (0, 9):
            other, resumed = trained(name, used)
            other.load_state_dict(saved[0])
            set_optimizer_state_dict(other, resumed, copy.deepcopy(saved[1]), options=options)
            run(resumed, Task(other), 4, start=steps)
            assert equal(weights(other), expected), (steps, used)


@pytest.mark.parametrize("name", NAMES)
def test_asking_for_the_state_dict_of_a_new_optimizer_moves_nothing(name: str) -> None:
    model, optimizer = trained(name, 0)
    other, asked = trained(name, 0)
    saved = get_optimizer_state_dict(other, asked)
    reached = [network_shapes(saved)]
    if "BiNN" not in name and "bernoulli" not in name:  # whose points are ±1
        assert equal(weights(model), weights(other))
    run(asked, Task(other), 6)
    reached.append(network_shapes(get_optimizer_state_dict(other, asked)))
    assert reached[0] == reached[1], "a new optimizer has places for all that training makes"
    if "AdamW" not in name:  # torch's own count such a step
        run(optimizer, Task(model), 6)
        assert equal(weights(model), weights(other))


def network_shapes(value: Any) -> Any:
    """What torch.distributed.checkpoint compares: names of entries and shapes of tensors."""
    if isinstance(value, dict):
        return {key: network_shapes(entry) for key, entry in value.items() if entry != {}}
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def test_a_dense_hessian_is_refused_by_name() -> None:
    model, optimizer = trained(STORED, 6)
    saved = get_optimizer_state_dict(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(poco.CheckpointError, match=r"anchor='stored' save by poco.save"):
        set_optimizer_state_dict(model, optimizer, saved)
    assert same(before, optimizer.state_dict())


HARMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "no header": lambda first: first.pop("header"),
    "half a header": lambda first: first.update(header=first["header"][:20]),
    "no bytes": lambda first: first.update(header=first["header"].float()),
    "another step": lambda first: first.update(step=-1),
    "no memory": lambda first: first["memory"]["site"]["gradient"].fill_(torch.inf),
    "half a memory": lambda first: first["memory"].pop("site"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_refused(harm: str) -> None:
    model, optimizer = trained("IVONPoCoMo", 6)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    HARMS[harm](saved["state"]["0.weight"])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(poco.CheckpointError) as caught:
        set_optimizer_state_dict(model, optimizer, saved)
    assert "\n" not in str(caught.value) and same(before, optimizer.state_dict())


def test_a_frozen_parameter_that_torch_leaves_out_is_noticed() -> None:
    model, optimizer = trained("IVON", 6)
    saved = get_optimizer_state_dict(model, optimizer)
    model[3].weight.requires_grad_(False)
    with pytest.raises(poco.CheckpointError, match="let them require gradients while it loads"):
        set_optimizer_state_dict(model, optimizer, saved)


@pytest.mark.parametrize("name", ["IVON", "AlphaSVRG-AdamW"])
def test_only_steps_that_could_move_nothing_need_no_closure(name: str) -> None:
    model, optimizer = trained(name, 0)
    for group, p in ((g, p) for g in optimizer.param_groups for p in g["params"]):
        group["lr"], p.grad = 0.0, torch.zeros_like(p)
    model[0].weight.grad.view(-1)[0] = 1.0
    with pytest.raises(TypeError, match="step\\(\\) evaluates the loss itself"):
        optimizer.step()


@pytest.mark.parametrize("name", ["IVON", "IVONPoCoMo", "VONPoCo"])
def test_format_6_is_read_whose_records_had_no_places_for_what_is_not_yet(name: str) -> None:
    for steps in (3, 6):
        model, optimizer = trained(name, steps)
        older = copy.deepcopy(optimizer.state_dict())
        older["poco"]["format"] = 6
        older["state"] = {number: of_format_6(state) for number, state in older["state"].items() if state}
        before = model.state_dict()
        other, resumed = trained(name, 0)
        other.load_state_dict(before)
        resumed.load_state_dict(older)
        run(optimizer, Task(model), 4, start=steps)
        run(resumed, Task(other), 4, start=steps)
        assert equal(weights(model), weights(other))


def of_format_6(state: dict[str, Any]) -> dict[str, Any]:
    def known(value: Any) -> bool:
        return all(map(known, value.values())) if isinstance(value, dict) else bool(torch.isfinite(value).all())

    momentum = [value for value in state["momentum"].values() if known(value)]
    memory = state["memory"] if state["memory"] and known(state["memory"]) else None
    kept = {key: value for key, value in state.items() if key != "header"}
    return {**kept, "ages": None, "drawn": None, "momentum": momentum, "memory": memory}
