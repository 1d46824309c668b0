"""VSGD and Constant VSGD as torch optimizers: loops, groups, checkpoints, errors, corrected gradients, large models."""

import copy
import json
import math
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from optimizer_cases import ON_GRADIENTS, Task, equal, flat, network, same, states_of, through_a_file, weights
from scripts import load_script
from torch import Tensor, nn

import expfam_poco as poco

F64 = torch.float64
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


every = pytest.mark.parametrize("name", ON_GRADIENTS)


def train(opt: Any, task: Task, steps: int, start: int = 0) -> list[Tensor]:
    """PyTorch's loop; returns the losses."""
    losses = []
    for step in range(start, start + steps):
        opt.zero_grad()
        loss = task.closure(step)()
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    return losses


def prepared(name: str, steps: int = 6, dtype: torch.dtype = F64, **choices: Any) -> tuple[nn.Module, Any, Task]:
    """A network, its optimizer some steps on, and the task."""
    model = network(dtype)
    opt, task = ON_GRADIENTS[name](model.named_parameters(), **choices), Task(model)
    train(opt, task, steps)
    return model, opt, task


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_trains_and_resumes_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model, opt, task = prepared(name, 0, dtype)
    losses = [loss.float() for loss in train(opt, task, 60)]
    assert torch.stack(losses[-8:]).mean() < 0.5 * torch.stack(losses[:8]).mean()
    kept = torch.float64 if dtype == F64 else torch.float32
    assert all(state[n].dtype == kept for state in opt.state.values() for n in opt.state_names)
    other = network(dtype)
    other.load_state_dict(model.state_dict())
    resumed = ON_GRADIENTS[name](other.named_parameters())
    resumed.load_state_dict(through_a_file(opt.state_dict()))
    train(opt, task, 7, 60), train(resumed, Task(other), 7, 60)
    assert equal(weights(model), weights(other)) and same(opt.state_dict(), resumed.state_dict())


@every
def test_copies_go_their_own_way_and_schedulers_set_the_rate(name: str) -> None:
    model, opt, task = prepared(name)
    twin, copied = copy.deepcopy((model, opt))
    third, loaded = pickle.loads(pickle.dumps((model, opt)))
    before, rate = weights(model), opt.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.StepLR(copied, step_size=1, gamma=0.5)
    for step in range(3):
        train(copied, Task(twin), 1, 6 + step)
        scheduler.step()
        loaded.param_groups[0]["lr"] = rate * 0.5**step
        train(loaded, Task(third), 1, 6 + step)
    assert copied.param_groups[0]["lr"] == rate / 8 and equal(weights(twin), weights(third))
    assert equal(weights(model), before) and torch.isfinite(train(opt, task, 1, 6)[0])


def test_groups_frozen_and_unused_parameters() -> None:
    model = network()
    opt = poco.VSGD([{"params": model[0].parameters(), "gamma": 1e-3}], lr=0.05, weight_decay=0.1)
    train(opt, Task(model), 3)
    opt.add_param_group({"params": model[3].parameters(), "init": "official", "lr": 0.01})
    assert [g["kappa1"] for g in opt.param_groups] == [0.9, 0.81] and opt.param_groups[1]["eps"] == 1e-8
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.detach().clone()
    opt.zero_grad()
    unused = model[3].bias.detach().clone()
    model[3].weight.grad = torch.ones_like(model[3].weight)
    opt.step()
    assert torch.equal(model[3].bias, unused) and torch.equal(model[0].bias, frozen)
    assert [opt.state[p]["step"] for p in (model[0].weight, model[3].weight)] == [3, 1]
    assert model[3].bias not in opt.state


@every
def test_decay_is_decoupled_and_a_closure_may_be_given(name: str) -> None:
    moved = []
    for decay in (0.0, 0.5):
        model, opt, task = prepared(name, 0, lr=0.1, weight_decay=decay)
        before = flat(model.parameters())

        def closure(model: nn.Module = model, opt: Any = opt, task: Task = task) -> Tensor:
            opt.zero_grad()
            loss = task.closure(0)()
            loss.backward()
            return loss

        assert opt.step(closure).requires_grad
        moved.append(flat(model.parameters()))
    torch.testing.assert_close(moved[1], moved[0] - 0.1 * 0.5 * before, rtol=1e-13, atol=1e-15)


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradients(name: str, bad: float) -> None:
    for mode in ("raise", "skip"):
        model, opt, task = prepared(name, nonfinite=mode)
        before = copy.deepcopy([weights(model), states_of(opt)])
        task.closure(0)().backward()
        model[0].bias.grad[1] = bad
        if mode == "raise":
            with pytest.raises(poco.NonFiniteError, match="gradient of parameter 1"):
                opt.step()
        else:
            opt.step()
        assert same(before, [weights(model), states_of(opt)])
        assert opt.diagnostics()["skipped_steps"] == 1 and opt.diagnostics()["steps"] == 6
        assert torch.isfinite(train(opt, task, 1)[0])


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradients_of_large_models_leave_their_own_weights(name: str, bad: float) -> None:
    """Stepped in place, span by span: what is NaN keeps its values and is counted; "skip" leaves everything."""
    for mode in ("raise", "skip"):
        weight = nn.Parameter(torch.ones(40))
        weight.grad = torch.ones(40)
        weight.grad[7] = bad
        opt = ON_GRADIENTS[name]([weight], nonfinite=mode, backend="eager")
        if mode == "skip":
            opt.step()
            assert bool((weight == 1.0).all()) and opt.diagnostics()["skipped_steps"] == 1
            continue
        with pytest.raises(poco.NonFiniteError, match="the step of 1 weights would not have been finite") as caught:
            opt.step()
        assert caught.value.stepped and weight[7] == 1.0 and int((weight < 1.0).sum()) == 39
        assert all(
            bool(torch.isfinite(value).all())
            for key, value in opt.state[weight].items()
            if key not in ("step", "header")
        )


@every
def test_a_gradient_too_large_to_square_moves_the_other_weights(name: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, 1e30, 1.0])
    opt = ON_GRADIENTS[name]([weight])
    with pytest.raises(poco.NonFiniteError, match=r"1 weights .* kept their values\. Find the NaN, clip") as caught:
        opt.step()
    assert caught.value.stepped and weight[1] == 1.0 and weight[0] < 1.0
    weight.grad = torch.ones(3)
    opt.step()
    assert bool(torch.isfinite(weight).all())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": -1.0}, "lr=-1.0: it must be a finite number, 0 or larger."),
    "gamma": ({"gamma": 0.0}, "gamma=0.0: it must be a number from 1e-30 to 1e30."),
    "K_g": ({"K_g": float("nan")}, "K_g=nan: it must be a number from 1e-30 to 1e30."),
    "both": ({"K_g": 1e-20, "gamma": 1e-20}, "K_g=1e-20: K_g · gamma, the prior's rate, must be a number from"),
    "kappa": ({"kappa2": 1.5}, "kappa2=1.5: it must be a number between 0 and 1."),
    "eps": ({"eps": "small"}, "eps='small': it must be a finite number, 0 or larger."),
    "init": ({"init": "code"}, "init='code': choose one of 'paper', 'official'."),
    "nonfinite": ({"nonfinite": "ignore"}, "nonfinite='ignore': choose 'raise' or 'skip'."),
    "backend": ({"backend": "fast"}, "backend='fast': choose one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_out_of_range_are_refused(case: str) -> None:
    choices, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        poco.VSGD([nn.Parameter(torch.zeros(2))], **{"lr": 0.1, **choices})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_tensors_and_groups_that_cannot_be_stepped_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(2))
    opt = poco.VSGD([weight], lr=0.1)
    with pytest.raises(ValueError, match=r"params: parameter 0 of group 1 is complex; split it"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    with pytest.raises(ValueError, match=r"nonfinite='skip' in a group: it holds for all groups; give it to the"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "nonfinite": "skip"})
    assert len(opt.param_groups) == 1
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"params: a gradient has layout torch.sparse_coo.*sparse=False"):
        poco.VSGD(table.parameters(), lr=0.1).step()
    opt.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match=r"lr=nan: it must be"):
        opt.step()


@every
def test_foreign_and_damaged_checkpoints_are_refused(name: str) -> None:
    model, opt, _ = prepared(name)
    whole = opt.state_dict()
    before = copy.deepcopy([weights(model), whole])
    wrong: list[tuple[str, Any]] = [("state_dict['vsgd']", torch.optim.AdamW(network().parameters()).state_dict())]
    for path in (["vsgd", "kind"], ["vsgd", "clock"], ["param_groups"], ["param_groups", 0, "gamma"], ["state"],
                 ["state", 0, "step"], ["state", 2, "mu"], ["state", 1, "b_ghat"]):  # fmt: skip
        for harm in ("missing", "damaged"):
            broken = copy.deepcopy(whole)
            inner: Any = broken
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = "damaged"
            if harm == "missing":
                del inner[path[-1]]
            wrong.append((f"state_dict[{path[0]!r}]", broken))
    for change in (lambda v: -v, lambda v: v.half(), lambda v: torch.stack([v, v]), lambda v: v * float("nan")):
        broken = copy.deepcopy(whole)
        broken["state"][0]["b_ghat"] = change(broken["state"][0]["b_ghat"])
        wrong.append(("state_dict['state'][0]", broken))
    strangers = [make(network().parameters()) for make in ON_GRADIENTS.values()]
    wrong += [("state_dict['vsgd']['kind']", other.state_dict()) for other in strangers if type(other) is not type(opt)]
    for entry, state_dict in wrong:
        with pytest.raises(poco.CheckpointError) as caught:
            opt.load_state_dict(state_dict)
        assert str(caught.value).startswith(entry) and "\n" not in str(caught.value)
        assert same(before, [weights(model), opt.state_dict()])


# ---- corrected gradients, and large models -----------------------------------------------------------------


@every
def test_at_the_snapshot_the_corrected_gradient_is_the_full_one(name: str) -> None:
    """α = 1 and θ = θ_out: ∇ℓ_B − ∇ℓ_B + ḡ, whatever the batch; so one step is the step with the full gradient."""
    moved = []
    for batch in (0, 3, None):
        model, opt, task = prepared(name)
        if batch is None:
            opt.zero_grad()
            torch.stack([chunk() for chunk in task.chunks()]).mean().backward()
            opt.step()
        else:
            corrected = poco.AlphaSVRG(opt, alpha=1.0)
            corrected.refresh(task.chunks())
            corrected.step(task.closure(batch))
        moved.append(flat(model.parameters()))
    torch.testing.assert_close(moved[0], moved[2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moved[1], moved[2], rtol=1e-12, atol=1e-14)


@every
def test_the_corrected_gradient_is_unbiased_over_batches(name: str) -> None:
    """Away from the snapshot its mean over all batches is the full gradient (rate 0, so that θ stays)."""
    model, opt, task = prepared(name)
    corrected = poco.AlphaSVRG(opt, alpha=0.7)
    corrected.refresh(task.chunks())
    for step in range(3):
        corrected.step(task.closure(step))
    seen, taken = [], type(opt)._step

    class Watching(type(opt)):  # type: ignore[misc]
        def _step(self, used: Any) -> None:
            seen.extend(p.grad.clone().reshape(-1) for _, p in used)
            taken(self, used)

    opt.__class__, opt.param_groups[0]["lr"] = Watching, 0.0
    for batch in range(4):
        corrected.step(task.closure(batch))
    mean = torch.stack([torch.cat(seen[4 * i : 4 * i + 4]) for i in range(4)]).mean(0)
    full = torch.autograd.grad(torch.stack([chunk() for chunk in task.chunks()]).mean(), list(model.parameters()))
    torch.testing.assert_close(mean, flat(full), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "backend"), [(poco.VSGD, "eager"), (poco.ConstantVSGD, "eager"), (poco.VSGD, "compiled")]
)
def test_spans_and_compiled_kernels_give_the_same_numbers(kind: Any, backend: str) -> None:
    """A tensor of several spans, a small one and a strided one; one kernel serves all lengths, rates and steps."""
    generator, runs = torch.Generator().manual_seed(1), []
    shapes = [(2**18 + 77,), (3, 5), (40, 30)]
    grads = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(4)]
    for choice in ("auto", backend):
        params = [nn.Parameter(torch.linspace(-1.0, 1.0, math.prod(s)).view(s)) for s in shapes[:2]]
        params.append(nn.Parameter(torch.linspace(-1.0, 1.0, 1200).view(30, 40).t()))
        opt = kind(params, lr=0.1, weight_decay=0.1, backend=choice)
        opt.backend.name = "eager" if choice == "auto" else choice
        if choice == "auto":
            opt.backend.streams = lambda weights: False  # type: ignore[method-assign]
        for step in range(4):
            for p, grad in zip(params, grads[step], strict=True):
                p.grad = grad.clone()
            opt.param_groups[0]["lr"] = 0.1 / (step + 1)
            opt.step()
        runs.append([*weights(nn.ParameterList(params)), *(opt.state[p]["b_ghat"] for p in params)])
        assert opt.backend.compile_seconds > 0.0 if choice == "compiled" else opt.backend.compile_seconds == 0.0
    for mine, reference in zip(*runs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=2e-6, atol=1e-7)
    params[0].grad[5] = 1e30
    with pytest.raises(poco.NonFiniteError, match="1 weights"):
        opt.step()


# ---- the benchmark -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(BENCHMARKS / "vsgd.py")


@pytest.mark.parametrize("name", ["VSGD", "AlphaSVRG over VSGD"])
def test_the_benchmark_trains_within_its_budget(script: ModuleType, name: str) -> None:
    data = {part: (x[:130], y[:130]) for part, (x, y) in script.digits().items()}
    run = script.train(script.METHODS[name][0], 0.01, 0, data, 4)
    assert math.isfinite(run["train loss"]) and 12 <= run["evaluations"] <= 13


def test_the_page_shows_what_was_measured(script: ModuleType) -> None:
    text = (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8")
    for part in script.PARTS:
        content = json.loads((BENCHMARKS / "results" / "vsgd" / f"{part}.json").read_text(encoding="utf-8"))
        assert f"<!-- table vsgd-{part} -->\n\n{script.markdown(part, content)}\n<!-- end -->" in text, part
