"""Stepping span by span, eagerly or compiled, gives the numbers of stepping whole tensors, and fails as clearly."""

from typing import Any

import pytest
import torch
from backend_cases import FLAT, SHAPES, Wells, compiles, distance, model_of, numbers, trained
from optimizer_cases import Make, equal, flat, named, run, same, shell, weights
from torch import Tensor
from user_families import Exponential, GaussianByHand, LogNormal

import expfam_poco as poco
from expfam_poco.engine import backend

GAUSSIAN = poco.resolve_family("diagonal_gaussian")
BROAD = GAUSSIAN.State(torch.tensor(0.5), torch.tensor(30.0))
ROWS = GAUSSIAN.State(torch.linspace(0.0, 1.0, 30), torch.linspace(10.0, 20.0, 20).unsqueeze(1))
IVON = {"lr": 0.1, "ess": 100.0, "hess_init": 1.0, "beta2": 0.99}
CASES: dict[str, Make] = {
    "IVON": named(poco.IVON, **IVON),
    "IVON-3": named(poco.IVON, mc_samples=3, **IVON),
    "IVONPoCo": named(poco.IVONPoCo, **IVON),
    "IVONPoCoMo": named(poco.IVONPoCoMo, rho1=0.6, rho2=0.1, alpha=0.7, **IVON),
    "IVONPoCoMo-3": named(poco.IVONPoCoMo, rho1=0.6, rho2=0.1, mc_samples=3, debias=False, **IVON),
    "old-average": named(poco.IVONPoCoMo, rho1=0.6, rho2=0.1, reanchor_average=False, **IVON),
    "independent": named(poco.IVONPoCo, noise="independent", **IVON),
    "fixed": named(poco.IVONPoCo, noise="fixed", **IVON),
    "antithetic": named(poco.IVONPoCo, noise="antithetic", mc_samples=3, **IVON),
    "norm-clipping": named(poco.IVONPoCo, max_grad_norm=1.0, **IVON),
    "clipping": named(poco.IVONPoCo, clip_radius=0.05, **IVON),
    "no-momentum": named(poco.IVONPoCo, beta1=0.0, **IVON),
    "gradsq": named(poco.IVONPoCo, curvature="gradsq", **IVON),
    "gradsq-zero": named(poco.IVONPoCo, curvature="gradsq", noise="zero", **IVON),
    "prior": named(poco.IVONPoCo, prior=BROAD, **IVON),
    "priors": named(poco.IVONPoCo, prior={"matrix": ROWS, "kernel": BROAD}, **IVON),
    "SVRG": named(poco.SVRG, lr=0.1, weight_decay=0.01),
    "VSGDPoCo": named(poco.VSGDPoCo, lr=0.1, precision=100.0, weight_decay=0.01, noise="fixed"),
    "VSGDPoCo-momentum": named(poco.VSGDPoCo, lr=0.1, precision=100.0, momentum=0.9),
    "Bernoulli": shell("bernoulli", lr=0.001, ess=24.0, momentum=0.5),
    "BayesBiNNPoCo": named(poco.BayesBiNNPoCo, lr=1e-3, ess=24.0, temperature=0.5, strength=2.0),
    "straight-through": shell("bernoulli", lr=0.001, ess=24.0, curvature="straight_through"),
    "Exponential": shell(Exponential(), lr=0.01, ess=5.0, momentum=0.5),
    "LogNormal": shell(LogNormal(), lr=0.01, ess=5.0),
    "GaussianByHand": shell(GaussianByHand(), lr=0.01, ess=20.0, hess_init=2.0, rho=0.3),
}

# One family for each kind of noise, and one in both precisions; a compiler takes 20 s for the whole step of one.
COMPILED = {
    ("IVONPoCoMo", torch.float32, 1e-5): (),
    ("IVONPoCoMo", torch.float64, 1e-10): pytest.mark.slow,
    ("Bernoulli", torch.float32, 1e-5): (),
    ("Exponential", torch.float32, 1e-5): pytest.mark.slow,
}


@pytest.mark.parametrize("case", CASES)
def test_spans_give_what_whole_tensors_give(case: str) -> None:
    whole, spans = (numbers(*trained(CASES[case], backend=name)[:2]) for name in ("auto", "eager"))
    assert distance(spans, whole) < 1e-9


@pytest.mark.parametrize("name", SHAPES)
def test_a_tensor_alone_gives_what_it_gives_whole(name: str) -> None:
    """A single tensor is in no bucket."""
    make = CASES["IVONPoCoMo-3"]
    whole, spans = (numbers(*trained(make, names=[name], backend=b)[:2]) for b in ("auto", "eager"))
    assert distance(spans, whole) < 1e-9


@compiles
@pytest.mark.parametrize(("case", "dtype", "bound"), COMPILED)
def test_mixed_gives_what_eager_gives(case: str, dtype: torch.dtype, bound: float) -> None:
    eager, mixed = (numbers(*trained(CASES[case], dtype=dtype, backend=b)[:2]) for b in ("eager", "mixed"))
    assert distance(mixed, eager) <= bound


@compiles
@pytest.mark.parametrize(("case", "dtype", "bound"), [pytest.param(*c, marks=marks) for c, marks in COMPILED.items()])
def test_compiled_gives_what_eager_gives(case: str, dtype: torch.dtype, bound: float) -> None:
    eager, own = (trained(CASES[case], names=FLAT, dtype=dtype, backend=b)[:2] for b in ("eager", "compiled"))
    assert distance(numbers(*own), numbers(*eager)) <= bound
    assert own[1].backend.fallback is None


@compiles
@pytest.mark.parametrize("name", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_bfloat16_weights_have_a_float32_posterior(name: str) -> None:
    model, opt, _ = trained(CASES["IVON"], 8, FLAT, torch.bfloat16, backend=name)
    whole = trained(CASES["IVON"], 8, FLAT, torch.bfloat16)[:2]
    states = opt.posterior_states().values()
    assert {value.dtype for state in states for value in state} == {torch.float32}
    assert equal(weights(model), [state.mean.to(torch.bfloat16) for state in states])
    assert distance(numbers(model, opt), numbers(*whole)) < 2e-3


# ---- choosing and falling back -----------------------------------------------------------------------------


class Uncompilable(Exponential):
    """Its natural gradient looks at a number."""

    def natural_gradient(self, state: Any, draws: Any) -> Any:
        assert float(state.theta.sum()) < 0.0
        return super().natural_gradient(state, draws)


UNCOMPILABLE = shell(Uncompilable(), lr=0.01, ess=5.0, momentum=0.5)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^backend='fast': choose one of auto, eager, mixed, compiled\.$"):
        poco.IVON(model_of().parameters(), backend="fast", **IVON)


def test_a_small_model_is_never_compiled() -> None:
    _, opt, _ = trained(CASES["IVONPoCo"], 6)
    assert opt.diagnostics()["compile_seconds"] == 0.0


@compiles
def test_a_family_that_cannot_be_compiled_is_stepped_without(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = numbers(*trained(CASES["Exponential"], 6, backend="eager")[:2])
    monkeypatch.setattr(backend, "LARGE", 1)
    with pytest.warns(RuntimeWarning, match="backend='auto': compiling failed .*; steps go on without it"):
        model, opt, _ = trained(UNCOMPILABLE, 6)
    assert opt.backend.fallback in ("mixed", "eager") and opt.backend.mode == opt.backend.fallback
    assert distance(numbers(model, opt), expected) < 1e-9


@compiles
def test_a_family_that_cannot_be_compiled_is_refused_where_compiling_is_asked_for() -> None:
    with pytest.raises(RuntimeError, match=r"^backend='compiled': torch\.compile failed \(.*\); use backend=") as found:
        trained(UNCOMPILABLE, 1, FLAT, backend="compiled")
    assert "\n" not in str(found.value) and str(found.value).endswith(".")


def test_a_failure_of_the_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its cause, where the compiler wraps it; "auto" goes on without."""

    class Wrapped(RuntimeError):
        inner_exception = OSError("\nno compiler here\nsecond line")

    def compile_nothing(*_: Any, **__: Any) -> Any:
        def fail(*_: Any) -> None:
            raise Wrapped("backend='inductor' raised:")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(backend, "_COMPILED", {})
    for name in ("mixed", "compiled"):
        with pytest.raises(RuntimeError, match=r"failed \(OSError: no compiler here\); use backend='auto'"):
            trained(CASES["IVON"], 1, FLAT, backend=name)
    expected = numbers(*trained(CASES["IVON"], 6, FLAT, backend="eager")[:2])
    monkeypatch.setattr(backend, "LARGE", 1)
    with pytest.warns(RuntimeWarning, match=r"compiling failed \(OSError: no compiler here\)"):
        model, opt, _ = trained(CASES["IVON"], 6, FLAT)
    assert opt.backend.fallback == "eager" and same(numbers(model, opt), expected)


@compiles
def test_a_dispatch_mode_runs_what_was_compiled_eagerly() -> None:
    """Tools that look at every operation (counters of FLOPs, say) cannot look into compiled kernels."""
    from torch.utils.flop_counter import FlopCounterMode

    model, opt, task = trained(CASES["IVON"], 2, FLAT, backend="mixed")
    reference, other, another = trained(CASES["IVON"], 2, FLAT, backend="mixed")
    with FlopCounterMode(display=False):
        run(opt, task, 2, start=2)
    run(other, another, 2, start=2)
    assert distance(numbers(model, opt), numbers(reference, other)) < 1e-12


# ---- failures ----------------------------------------------------------------------------------------------


def nan_loss(model: Any) -> Tensor:
    return flat(model.parameters()).sum() * torch.nan


def nan_gradient(model: Any) -> Tensor:
    return torch.sqrt((0.0 * model["long"]).sum())


def broken(model: Any) -> Tensor:
    raise RuntimeError("the batch is broken")


def without_draw(opt: Any) -> Any:
    """The state, less which draw the model holds."""
    saved = opt.state_dict()
    for entry in saved["state"].values():
        del entry["drawn"]
    return saved


FAULTS = {
    "NaN loss": (nan_loss, poco.NonFiniteError),
    "NaN gradient": (nan_gradient, poco.NonFiniteError),
    "exception": (broken, RuntimeError),
}


@pytest.mark.parametrize("one_pass", [False, True], ids=["plain", "one-pass"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_nothing(fault: str, one_pass: bool) -> None:
    """One-pass steps leave a draw in the model; after a fault it holds the point."""
    spoil, kind = FAULTS[fault]
    model, opt, task = trained(CASES["IVONPoCoMo"], 6, backend="eager", one_pass=one_pass)
    reference, other, another = trained(CASES["IVONPoCoMo"], 6, backend="eager")
    before = without_draw(opt)
    with pytest.raises(kind):
        opt.step(lambda: task.closure(0)() + spoil(model))
    assert same(without_draw(opt), before) and equal(weights(model), weights(reference))
    with pytest.raises(kind):
        opt.refresh([task.closure(0), lambda: task.closure(1)() + spoil(model)])
    assert same(without_draw(opt), before) and equal(weights(model), weights(reference))
    assert equal(run(opt, task, 6, start=6), run(other, another, 6, start=6))


class Overflowing(Wells):
    """One entry of a tensor has a gradient of 10³⁸."""

    def closure(self, batch: int) -> Any:
        p = dict(self.model.named_parameters())["matrix"]
        return lambda: super(Overflowing, self).closure(batch)() + 1e38 * (p - p.detach()).view(-1)[7]


@pytest.mark.parametrize("names", [("matrix",), FLAT, tuple(SHAPES)], ids=["alone", "bucket", "all"])
def test_weights_whose_step_overflows_keep_their_values(names: tuple[str, ...]) -> None:
    """All others are stepped as if nothing had happened."""
    model, opt, task = trained(CASES["IVON"], 4, names, torch.float32, backend="eager")
    _twin, other, another = trained(CASES["IVON"], 4, names, torch.float32, backend="eager")
    before = opt.posterior_states()["matrix"]
    with pytest.raises(poco.NonFiniteError, match=r"^lr=0\.1: .* 1 of .*\.$"):
        opt.step(Overflowing(model).closure(0))
    other.step(another.closure(0))
    found, expected = opt.posterior_states(), other.posterior_states()
    for _own, old, new in zip(found["matrix"], before, expected["matrix"], strict=True):
        new.view(-1)[7] = old.view(-1)[7]
    assert all(equal(found[name], expected[name]) for name in names)
    assert equal(weights(model), [state.mean for state in found.values()])
    losses = run(opt, task, 4, start=4)
    assert all(bool(torch.isfinite(loss)) for loss in losses)
    assert all(bool(GAUSSIAN.in_domain(state)) for state in opt.posterior_states().values())


@pytest.mark.parametrize("names", [("matrix",), FLAT], ids=["alone", "bucket"])
def test_an_overflow_is_reported_of_its_tensor(names: tuple[str, ...]) -> None:
    model, opt, _ = trained(CASES["IVON"], 4, names, torch.float32, backend="eager")
    with pytest.raises(poco.NonFiniteError, match=r" 1 of 600 weights of 'matrix' "):
        opt.step(Overflowing(model).closure(0))


def test_skipped_overflows_are_counted() -> None:
    model, opt, _task = trained(CASES["IVON"], 4, FLAT, torch.float32, backend="eager", nonfinite="skip")
    opt.step(Overflowing(model).closure(0))
    assert opt.diagnostics()["skipped_steps"] == 1
    assert all(bool(GAUSSIAN.in_domain(state)) for state in opt.posterior_states().values())
