"""Cutting tensors into spans, laying small ones side by side, resuming and one-pass steps change no number."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backend_cases import FLAT, SHAPES, Vectors, Wells, compiles, distance, model_of, numbers, trained
from optimizer_cases import Make, equal, named, run, same, shell, through_a_file, weights
from torch import nn
from user_families import Exponential

import expfam_poco as poco
from expfam_poco.engine import backend, flat

IVON = {"lr": 0.1, "ess": 100.0, "beta2": 0.99}
CASES: dict[str, Make] = {
    "IVONPoCoMo": named(poco.IVONPoCoMo, rho1=0.6, rho2=0.1, alpha=0.7, **IVON),
    "antithetic": named(poco.IVONPoCo, noise="antithetic", mc_samples=2, **IVON),
    "independent": named(poco.IVONPoCo, noise="independent", **IVON),
    "fixed": named(poco.IVONPoCo, noise="fixed", **IVON),
    "SVRG": named(poco.SVRG, lr=0.1, weight_decay=0.01),
    "VSGDPoCo": named(poco.VSGDPoCo, lr=0.1, precision=100.0, momentum=0.9),
    "Bernoulli": shell("bernoulli", lr=0.001, ess=24.0, momentum=0.5),
    "BayesBiNNPoCo": named(poco.BayesBiNNPoCo, square_momentum=None, lr=0.001, ess=24.0, temperature=0.5, strength=2.0),
    "Exponential": shell(Exponential(), lr=0.01, ess=5.0, momentum=0.5),
}
VECTORS = shell(Vectors(), lr=0.02, ess=2.0, momentum=0.5, mc_samples=2)
ROWS = ("matrix", "kernel", "transposed")
every_case = pytest.mark.parametrize("case", CASES)


def flat_blocks(opt: Any) -> list[flat.FlatBlock]:
    """Those that its small tensors are laid into."""
    return [block for block in opt._layout._laid if isinstance(block, flat.FlatBlock)]


# ---- tiles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=["float32", "float64"]
)
@every_case
def test_cut_tensors_give_the_same_numbers(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles of 256 and 512 entries, each block by itself, as side by side and as one tile."""
    together = numbers(*trained(CASES[case], 10, dtype=dtype, backend="eager")[:2])
    monkeypatch.setattr(flat, "SMALL", 0)
    expected = numbers(*trained(CASES[case], 10, dtype=dtype, backend="eager")[:2])
    assert distance(expected, together) < 10 * torch.finfo(dtype).eps  # vector units round tails of tensors otherwise
    for size in (2**18, 512, 256):
        monkeypatch.setitem(backend.TILES, "eager", size)
        model, opt, _ = trained(CASES[case], 10, dtype=dtype, backend="eager")
        assert not flat_blocks(opt)
        assert distance(numbers(model, opt), expected) < 10 * torch.finfo(dtype).eps, f"tiles of {size}"


def test_cut_vectors_give_what_whole_tensors_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a family whose weights are rows, tiles have whole rows."""
    names, shapes = ROWS, {name: (8 * SHAPES[name][0], *SHAPES[name][1:]) for name in ROWS}
    for name, shape in shapes.items():
        monkeypatch.setitem(SHAPES, name, shape)
    whole = numbers(*trained(VECTORS, 10, names)[:2])
    uncut = numbers(*trained(VECTORS, 10, names, backend="eager")[:2])
    assert distance(uncut, whole) < 1e-9
    for size in (256, 512):
        monkeypatch.setitem(backend.TILES, "eager", size)
        assert same(numbers(*trained(VECTORS, 10, names, backend="eager")[:2]), uncut), f"tiles of {size}"


def test_tensors_too_large_for_one_flat_block_fill_several(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = numbers(*trained(CASES["IVONPoCoMo"], 10, backend="eager")[:2])
    monkeypatch.setattr(flat, "LARGEST", 1024)
    model, opt, _ = trained(CASES["IVONPoCoMo"], 10, backend="eager")
    assert same(numbers(model, opt), expected)
    assert flat_blocks(opt) and all(block.shape.numel() <= 1024 for block in flat_blocks(opt))


# ---- side by side -----------------------------------------------------------------------------------------------


def test_small_tensors_share_storage() -> None:
    model, opt, _ = trained(CASES["IVONPoCoMo"], 6, backend="eager")
    together = [opt.state[model[name]] for name in ("long", "matrix", "one")]
    for role in ("posterior", "momentum"):
        for values in zip(*(state[role] for state in together), strict=True):
            assert len({value.untyped_storage().data_ptr() for value in values}) == 1, role
            assert all(value.is_contiguous() for value in values)
    (block,) = flat_blocks(opt)
    assert {member.name for member in block.members} >= {"long", "matrix", "one"}


Trained = tuple[nn.ParameterDict, Any, Wells]


def frozen(model: nn.ParameterDict, opt: Any, task: Wells) -> Trained:
    """Two members are frozen, then one of them and later both are back."""
    for start, trainable in ((6, (False, False)), (9, (True, False)), (13, (True, True))):
        for name, requires in zip(("matrix", "kernel"), trainable, strict=True):
            model[name].requires_grad_(requires)
        run(opt, task, 4, start=start)
    return model, opt, task


def first_frozen(model: nn.ParameterDict, opt: Any, task: Wells) -> Trained:
    """A member is frozen at first, and younger than the others when it joins them."""
    model, opt, task = trained(lambda p, **_: opt, 0)
    return model, opt, task


def unused(model: nn.ParameterDict, opt: Any, task: Wells) -> Trained:
    """Some batches do not depend on some members."""
    for start, skip in (
        (6, {"matrix"}),
        (7, {"matrix", "one"}),
        (8, set()),
        (9, {"long"}),
        (14, set(SHAPES) - {"one"}),
    ):
        task.skip = skip
        run(opt, task, 2, start=start)
    task.skip = set()
    return model, opt, task


def loaded(model: nn.ParameterDict, opt: Any, task: Wells) -> Trained:
    """The optimizer goes back to an earlier checkpoint of its own."""
    saved = copy.deepcopy([model.state_dict(), opt.state_dict()])
    run(opt, task, 3, start=6)
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    return model, opt, task


def moved(model: nn.ParameterDict, opt: Any, task: Wells) -> Trained:
    """Somebody else changes some of the weights."""
    changed = {name: value.clone() for name, value in model.state_dict().items()}
    changed["matrix"][3] += 0.25
    changed["one"] *= 1.5
    changed["kernel"][..., 0] += 0.25
    model.load_state_dict(changed)
    return model, opt, task


def joined(model: nn.ParameterDict, opt: Any, task: Wells) -> Trained:
    """A second group joins, with a step size of its own."""
    more = model_of(("long", "one"))
    for name, p in list(more.items()):
        model[f"more-{name}"] = p
    opt.add_param_group({"params": [(f"more-{name}", p) for name, p in more.items()], "lr": 0.05})
    return model, opt, task


def deep_copied(model: nn.ParameterDict, opt: Any, task: Wells) -> Trained:
    model, opt = copy.deepcopy((model, opt))
    return model, opt, Wells(model)


def pickled(model: nn.ParameterDict, opt: Any, task: Wells) -> Trained:
    model, opt = pickle.loads(pickle.dumps((model, opt)))
    return model, opt, Wells(model)


EVENTS: dict[str, Callable[[nn.ParameterDict, Any, Wells], Trained]] = {
    event.__name__: event for event in (frozen, unused, loaded, moved, joined, deep_copied, pickled)
}
CHANGES_NOTHING = ("loaded", "deep_copied", "pickled")  # held bit for bit, for every case, below


@pytest.mark.parametrize(
    ("event", "case"),
    [
        *((event, "IVONPoCoMo") for event in EVENTS),
        *((event, case) for event in EVENTS if event not in CHANGES_NOTHING for case in ("antithetic", "VSGDPoCo")),
    ],
)
def test_whatever_happens_to_a_bucket_whole_tensors_give_the_same(event: str, case: str) -> None:
    results = []
    for name in ("auto", "eager"):
        model, opt, task = EVENTS[event](*trained(CASES[case], 6, backend=name))
        run(opt, task, 7, start=17)
        results.append(numbers(model, opt))
    assert distance(results[1], results[0]) < 1e-9


@pytest.mark.parametrize("event", CHANGES_NOTHING)
@every_case
def test_copies_and_loading_change_no_bit(event: str, case: str) -> None:
    """The copy and the original go on alike, each by itself."""
    original, reference, task = trained(CASES[case], 6, backend="eager")
    model, opt, other = EVENTS[event](*trained(CASES[case], 6, backend="eager"))
    assert equal(run(opt, other, 7, start=6), run(reference, task, 7, start=6))
    assert same(numbers(model, opt), numbers(original, reference))


@pytest.mark.parametrize("event", ["deep_copied", "pickled"])
def test_a_copy_leaves_the_original_alone(event: str) -> None:
    model, opt, task = trained(CASES["IVONPoCoMo"], 6, backend="eager")
    before = copy.deepcopy(numbers(model, opt))
    _, other, another = EVENTS[event](model, opt, task)
    run(other, another, 5, start=6)
    assert same(numbers(model, opt), before)


def test_a_member_that_joins_later_gives_what_it_gives_whole() -> None:
    """It has made fewer steps than the others, which the momentum's debiasing shows."""
    results = []
    for name in ("auto", "eager"):
        model = model_of()
        model["matrix"].requires_grad_(False)
        opt, task = CASES["IVONPoCoMo"](model.named_parameters(), backend=name), Wells(model)
        run(opt, task, 6)
        model["matrix"].requires_grad_(True)
        run(opt, task, 9, start=6)
        results.append(numbers(model, opt))
    assert distance(results[1], results[0]) < 1e-9


# ---- resuming ----------------------------------------------------------------------------------------------


RESUMED = [
    *(pytest.param(case, "eager", False) for case in CASES),
    *(pytest.param(case, "eager", True, marks=pytest.mark.slow) for case in CASES),
    pytest.param("IVONPoCoMo", "compiled", True, marks=[compiles, pytest.mark.slow]),
]


@pytest.mark.parametrize(("case", "name", "one_pass"), RESUMED)
def test_resuming_continues_bit_for_bit(case: str, name: str, one_pass: bool) -> None:
    """Before the first step, before the first refresh, right before the next one, and in the middle."""
    choices = {"backend": name, "one_pass": one_pass}
    names = {"eager": tuple(SHAPES), "compiled": FLAT}[name]
    model, opt, task = trained(CASES[case], 0, names, **choices)
    for steps in (0, 3, 4, 6):
        run(opt, task, steps - opt.diagnostics()["steps"], start=opt.diagnostics()["steps"])
        saved = through_a_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
        other = model_of(names)
        resumed = CASES[case](other.named_parameters(), **choices)
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        twin_model, twin = copy.deepcopy((model, opt))
        assert equal(run(resumed, Wells(other), 6, start=steps), run(twin, Wells(twin_model), 6, start=steps))
        assert same(numbers(other, resumed), numbers(twin_model, twin)), f"saved after {steps} steps"
        assert same(through_a_file(resumed.state_dict()), through_a_file(twin.state_dict()))


# ---- one pass, and what was handed out earlier -------------------------------------------------------------


@every_case
def test_one_pass_steps_give_the_same_bits(case: str) -> None:
    """Between steps the model holds a draw; on request it shows the point."""
    expected = numbers(*trained(CASES[case], 10, backend="eager")[:2])
    model, opt, task = trained(CASES[case], 10, backend="eager", one_pass=True)
    with opt.sampled(at_point=True):
        assert same(numbers(model, opt), expected)
    reference, other, another = trained(CASES[case], 10, backend="eager")
    run(opt, task, 5, start=10)
    run(other, another, 5, start=10)
    with opt.sampled(at_point=True):
        assert same(numbers(model, opt), numbers(reference, other))


def test_between_one_pass_steps_the_model_holds_the_next_draw() -> None:
    model, _opt, _task = trained(CASES["IVONPoCoMo"], 6, FLAT, backend="eager", one_pass=True)
    reference, other, another = trained(CASES["IVONPoCoMo"], 6, FLAT, backend="eager")
    assert not equal(weights(model), weights(reference))
    drawn = []
    other.step(lambda: (drawn.extend(weights(reference)), another.closure(6)())[1])
    assert equal(weights(model), drawn[: len(weights(model))])


@pytest.mark.parametrize("one_pass", [False, True], ids=["plain", "one-pass"])
@every_case
def test_steps_in_place_do_not_reach_what_was_handed_out(case: str, one_pass: bool) -> None:
    _model, opt, task = trained(CASES[case], 3, backend="eager", one_pass=one_pass)
    states, distributions, saved = opt.posterior_states(), opt.posterior(), opt.state_dict()
    means = {name: q.sample().shape for name, q in distributions.items()}
    parameters = [[getattr(q, name) for name in ("loc", "scale", "rate", "probs") if hasattr(q, name)]
                  for q in map(base, distributions.values())]  # fmt: skip
    before = copy.deepcopy([states, parameters, saved])
    run(opt, task, 6, start=3)
    assert same([states, parameters, saved], before) and means
    opt.set_outer(states)
    run(opt, task, 6, start=9)
    assert same(states, before[0])


def base(distribution: Any) -> Any:
    """The distribution inside `Independent` and the like."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


@pytest.mark.parametrize("event", ["loaded", "copied", "pickled"])
def test_a_draw_left_by_a_one_pass_step_survives_copies_and_files(event: str) -> None:
    """The weights of a copy are not taken for weights that somebody has changed."""
    model, opt, task = trained(CASES["IVONPoCoMo"], 6, backend="eager", one_pass=True)
    if event == "loaded":
        other = model_of()
        resumed = CASES["IVONPoCoMo"](other.named_parameters(), backend="eager", one_pass=True)
        saved = through_a_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
    else:
        copied = {"copied": copy.deepcopy, "pickled": lambda pair: pickle.loads(pickle.dumps(pair))}[event]
        other, resumed = copied((model, opt))
    assert same(list(resumed.posterior_states().values()), list(opt.posterior_states().values()))
    assert equal(run(resumed, Wells(other), 6, start=6), run(opt, task, 6, start=6))
    assert same(numbers(other, resumed), numbers(model, opt))


def test_weights_changed_between_one_pass_steps_move_the_posterior() -> None:
    model, opt, _ = trained(CASES["IVONPoCoMo"], 6, backend="eager", one_pass=True)
    with torch.no_grad():
        model["matrix"].fill_(2.0)
    assert bool((opt.posterior_states()["matrix"].mean == 2.0).all())
