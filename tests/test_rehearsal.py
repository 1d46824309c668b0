"""All kernels of a run are compiled before its first step, or its first refresh, and none later."""

import logging
from typing import Any

import fake_triton
import pytest
import torch
from backend_cases import FLAT, compiles, distance, numbers, trained
from optimizer_cases import run
from test_backends import CASES
from torch._dynamo.utils import counters

from expfam_poco.engine import backend, fused


def first_step(case: str, names: Any, **more: Any) -> tuple[Any, Any]:
    """An optimizer after one step, which is not corrected, and its task."""
    _, opt, task = trained(CASES[case], 0, names, backend="compiled", **more)
    opt.step(task.closure(0))
    return opt, task


@compiles
@pytest.mark.slow
def test_the_compiler_has_nothing_to_do_after_the_first_step() -> None:
    """Neither for a kernel that is new, nor for one whose guards fail."""
    opt, task = first_step("IVONPoCoMo", FLAT, dtype=torch.float32)
    graphs, seconds = counters["stats"]["unique_graphs"], opt.backend.compile_seconds
    run(opt, task, 8)
    assert counters["stats"]["unique_graphs"] == graphs and opt.diagnostics()["compile_seconds"] == seconds


@pytest.mark.parametrize(
    ("case", "names", "more"),
    [
        ("IVONPoCoMo", (*FLAT, "kernel", "transposed"), {"max_grad_norm": 1.0}),
        ("IVONPoCoMo-3", FLAT, {}),
        ("independent", FLAT, {}),
        ("antithetic", FLAT, {}),
        ("priors", ("matrix", "kernel"), {"one_pass": True}),
        ("BayesBiNNPoCo", FLAT, {"alpha": lambda step: 0.0 if step < 6 else 1.0}),
        ("LogNormal", FLAT, {}),
    ],
)
def test_no_kernel_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str, names: Any, more: Any
) -> None:
    """With kernels that are run as they stand. What is tried leaves no trace."""
    monkeypatch.setattr(backend, "_COMPILED", {})
    monkeypatch.setattr(backend, "_compile", lambda kernel, constants: lambda *rest: kernel(*constants, *rest))
    with caplog.at_level(logging.INFO, "expfam_poco"):
        opt, task = first_step(case, names, **more)
    told = [record.getMessage() for record in caplog.records if record.name == "expfam_poco"]
    assert told[0].startswith("compiling what steps of ") and told[1].startswith("compiled it in ")
    known = set(backend._COMPILED)
    run(opt, task, 8)
    assert set(backend._COMPILED) == known
    _, other, twin = trained(CASES[case], 0, names, backend="eager", **more)
    other.step(twin.closure(0))
    run(other, twin, 8)
    with opt.sampled(at_point=True), other.sampled(at_point=True):
        assert distance(numbers(task.model, opt), numbers(twin.model, other)) < 1e-12


@pytest.mark.parametrize("case", ["IVONPoCoMo", "Bernoulli"])
def test_nor_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(fused, "is_at_hand", lambda device: True)
    monkeypatch.setattr(fused, "_loaded", fake_triton.loaded)
    monkeypatch.setattr(fused, "KERNELS", {})
    opt, task = first_step(case, FLAT)
    known = set(fused.KERNELS)
    run(opt, task, 8)
    assert set(fused.KERNELS) == known


def test_steps_that_are_never_corrected_rehearse_none_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_COMPILED", {})
    monkeypatch.setattr(backend, "_compile", lambda kernel, constants: lambda *rest: kernel(*constants, *rest))
    first_step("IVON", FLAT)
    assert [key[0] for key in backend._COMPILED] == ["draw", "advance"]


def test_what_begins_with_a_refresh_rehearses_no_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until there is one: when a tensor is frozen, the refresh is no longer of just those that are stepped."""
    monkeypatch.setattr(backend, "_COMPILED", {})
    monkeypatch.setattr(backend, "_compile", lambda kernel, constants: lambda *rest: kernel(*constants, *rest))
    model, opt, task = trained(CASES["IVONPoCoMo"], 0, FLAT, backend="compiled")
    opt.refresh(task.chunks())
    run(opt, task, 1)
    assert sorted(key[0] for key in backend._COMPILED) == ["advance", "collect", "draw", "draw"]
    model["long"].requires_grad_(False)
    run(opt, task, 1, start=1)
    known = [key[0] for key in backend._COMPILED]
    assert known.count("advance") == 3  # for one tensor alone, plain and corrected
    opt.refresh(task.chunks())
    run(opt, task, 1, start=2)
    assert [key[0] for key in backend._COMPILED] == known
