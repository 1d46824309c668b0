"""α-SVRG and the optimizer below it: what its state may be, and what becomes of a step that fails."""

import copy
import math
from typing import Any

import pytest
import torch
from optimizer_cases import Task, equal, network, same, weights

import expfam_poco as poco
from peers.habits import EVERY, train, trained

NAN = math.nan
HARMS: list[tuple[tuple[Any, ...], Any]] = [
    (("state", 0, "exp_avg"), torch.tensor(NAN)), (("state", 0, "exp_avg"), None), (("state", 0, "exp_avg"), "x"),
    (("state", 0, "exp_avg"), torch.zeros(7)), (("state", 0, "exp_avg_sq"), -1), (("state", 0, "step"), NAN),
    (("state", 9), {}), (("param_groups", 0, "betas"), (NAN, 0.9)), (("param_groups", 0, "lr"), -3.0),
    (("param_groups", 0, "lr"), NAN), (("param_groups", 0, "lr"), "x"), (("param_groups", 0, "weight_decay"), -1.0),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), HARMS, ids=[f"{'.'.join(map(str, p))}={v}" for p, v in HARMS])
@pytest.mark.parametrize("steps", [0, 5])
def test_a_damaged_base_is_refused_as_a_whole(place: tuple[Any, ...], value: Any, steps: int) -> None:
    saved = copy.deepcopy(trained("AlphaSVRG-AdamW", 5)[1].state_dict())
    model, opt, task = trained("AlphaSVRG-AdamW", steps)
    if steps == 0 and place[-1] in ("exp_avg_sq", "exp_avg") and isinstance(value, torch.Tensor) and value.ndim:
        return  # nothing yet says of which shape it should be
    inner = saved
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = torch.full((4, 3), NAN, dtype=torch.float64) if value is HARMS[0][1] else value
    before = copy.deepcopy([weights(model), opt.state_dict()])
    with pytest.raises(poco.CheckpointError, match=r"^state_dict[^\n]*\.$"):
        opt.load_state_dict(saved)
    assert same(before, [weights(model), opt.state_dict()])
    train(opt, task, 2)


@pytest.mark.parametrize("name", ["lr", "betas", "eps"])
def test_hyperparameters_of_the_base_may_not_be_missing(name: str) -> None:
    _, opt, _ = trained("AlphaSVRG-AdamW", 3)
    saved = copy.deepcopy(opt.state_dict())
    del saved["param_groups"][0][name]
    with pytest.raises(poco.CheckpointError, match=rf"'{name}'\]: "):
        opt.load_state_dict(saved)


class HalfWay(torch.optim.SGD):
    """A base that fails after it has moved the first weights."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["params"][0].data.add_(1.0)
        raise RuntimeError("no more")


def test_a_base_that_fails_in_its_step_leaves_the_weights() -> None:
    model = network()
    opt, task = poco.AlphaSVRG(HalfWay(model.parameters(), lr=0.1)), Task(model)
    before = weights(model)
    with pytest.raises(RuntimeError, match="no more"):
        opt.step(task.closure(0))
    assert equal(before, weights(model)) and opt.diagnostics()["steps"] == 0


@pytest.mark.parametrize("name", ["IVON", "VON", "AlphaSVRG-SGD"])
def test_data_of_another_shape_is_named(name: str) -> None:
    model, opt, task = trained(name)
    next(model.parameters()).data = torch.zeros(2, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^params: '.*' has another shape than its posterior.*\.$"):
        opt.step(task.closure(0))


DAMAGE = [torch.zeros(3), [], [[1]], "x", None, torch.zeros(2, 2).to_sparse(), torch.zeros(1, device="meta")]


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("AlphaSVRG")])
def test_damage_is_one_sentence(name: str) -> None:
    model, opt, _ = trained(name, 4)
    before = copy.deepcopy([weights(model), opt.state_dict()])
    header = "vsgd" if "vsgd" in before[1] else "poco"
    record = next(iter(before[1]["state"]))
    ways: list[tuple[Any, ...]] = [(header, key) for key in before[1][header]]
    ways += [
        ("state", record, key)
        for key in before[1]["state"][record]
        if key not in ("drawn", "memory", "momentum", "header")
    ]
    ways += [("param_groups", 0, "params"), ("param_groups", 0, "params", 0)]
    for place in ways:
        for value in DAMAGE:
            saved = copy.deepcopy(before[1])
            inner: Any = saved
            for key in place[:-1]:
                inner = inner[key]
            if value is None and place[-1] == "anchor_hessian":
                continue
            inner[place[-1]] = value
            with pytest.raises(poco.CheckpointError, match=r"^state_dict[^\n]*$"):
                opt.load_state_dict(saved)
            assert same(before, [weights(model), opt.state_dict()]), (place, value)


def test_an_average_of_many_steps_may_not_be_missing() -> None:
    _, opt, _ = trained("IVONPoCo", 4)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["momentum"] = {}
    with pytest.raises(poco.CheckpointError, match=r"momentum is dict where .* are needed"):
        opt.load_state_dict(saved)
