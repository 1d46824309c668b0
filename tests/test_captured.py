"""Captured steps are the ordinary ones: recorded on a tape, which does on the CPU what a CUDA graph does on a card."""

import cProfile
import pstats
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import fake_triton
import pytest
import torch
from backend_cases import model_of
from optimizer_cases import ON_GRADIENTS, SHELL, Make, Task, equal, named, network, same, shell, weights
from tape import Tape
from test_backends import CASES as BACKEND_CASES
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.engine import capture, fused
from expfam_poco.family.recording import Counter, Recording
from expfam_poco.optim import capturable
from expfam_poco.optim.captured import CapturedStep
from expfam_poco.optim.captured_gradients import CapturedGradientStep

IVON = {"lr": 0.1, "ess": 100.0, "hess_init": 1.0, "beta2": 0.99}
COMMON = {"lr": 0.01, "ess": 20.0, "weight_decay": 0.1, "momentum": 0.5}
FAMILIES = ("beta", "categorical", "dirichlet", "exponential", "gamma", "inverse_gaussian", "log_normal", "von_mises")
CASES: dict[str, Make] = {
    **BACKEND_CASES,
    **{family: shell(family, **COMMON) for family in FAMILIES},
    "recursive": shell("diagonal_gaussian", correction="recursive", **COMMON),
    "transported": shell("diagonal_gaussian", correction="transported", **COMMON),
    "adaptive": named(poco.IVONPoCo, alpha="adaptive", **IVON),
    "burn-in": named(poco.IVONPoCo, alpha=poco.BurnIn(3, poco.LinearAlpha(0.2, 1.0, 8)), **IVON),
    "mega-batch": named(poco.IVONPoCoMo, **IVON),
    "own-site": shell("diagonal_gaussian", own_site=True, mc_samples=2, **COMMON),
    "ascent": shell("diagonal_gaussian", maximize=True, lr=1e-4, ess=20.0, weight_decay=0.1),
    "plain-retraction": shell("diagonal_gaussian", retraction="plain", **COMMON),
    "as a prior": named(poco.BayesBiNNPoCo, lr=0.001, ess=24.0, mc_samples=2),
}  # fmt: skip
# What has the same passes as others, or takes long; the tests marked `slow` have them.
SLOW = {
    *FAMILIES, "GaussianByHand", "LogNormal", "Exponential", "IVON", "IVONPoCo", "IVONPoCoMo", "old-average", "prior",
    "clipping", "no-momentum", "gradsq", "VSGDPoCo", "straight-through", "as a prior", "VSGD-official",
}  # fmt: skip


def slowly(case: str) -> Any:
    return [pytest.mark.slow] if case in SLOW - {"exponential"} else []


Loss = Callable[[Any], Tensor]


def problem(make: Make, **choices: Any) -> tuple[nn.Module, Any, Loss, list[dict[str, Tensor]]]:
    """A model, its optimizer, and weights in the family's support in wells whose middles are the batch."""
    model = model_of(("long", "matrix", "kernel"))
    opt: Any = make(model.named_parameters(), **choices)
    family = opt.param_groups[0].get("family")
    with torch.no_grad():
        for p in model.parameters() if family is not None else ():
            if family.levels is not None:
                p.copy_((p - 1.0).sign())
            elif family.event_dim:
                p.div_(p.sum(-1, keepdim=True))
            elif family.support is not torch.distributions.constraints.real:
                p.copy_(torch.distributions.transform_to(family.support)(p - 1.0))
    generator = torch.Generator().manual_seed(3)
    batches = [
        {name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in model.items()}
        for _ in range(4)
    ]

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        wells = [0.5 * (p - batch[name]).square().sum() + 0.1 * p.cos().sum() for name, p in model.items()]
        return torch.stack(wells).sum() + 0.05 * torch.stack([p.mean() for p in model.values()]).sum().square()

    return model, opt, loss, batches


def trajectory(make: Make, captured: bool, steps: int = 12, **choices: Any) -> tuple[list[Tensor], Any, Any]:
    """Losses of a run with a schedule of rates and priors, refreshes, and a step of the other kind in between."""
    _, opt, loss, batches = problem(make, **choices)
    on_gradients = not hasattr(opt, "refresh")
    kind = CapturedGradientStep if on_gradients else CapturedStep
    run = kind(opt, loss, batches[0], Tape) if captured else None

    def step(batch: Any) -> Tensor:
        if not on_gradients:
            return opt.step(lambda: loss(batch))
        opt.zero_grad()
        value = loss(batch)
        value.backward()
        opt.step()
        opt.zero_grad()
        return value.detach()

    losses = []
    for number in range(steps):
        if not on_gradients and number in (3, 8):
            losses.append(opt.refresh([lambda b=b: loss(b) for b in batches]))
        for group in opt.param_groups:
            if number % 4 == 1:
                group["lr"] *= 0.8
            if number == 6:
                group["weight_decay"] = group["weight_decay"] * 2.0
            if number == 7 and "ess" in group:
                group["ess"] = group["ess"] * 1.5
        batch = batches[number % 4]
        losses.append(step(batch) if run is None or number == 5 else run(batch))
    return losses, opt, run


@pytest.mark.filterwarnings("ignore:params", "ignore:alpha", "ignore:ess")
@pytest.mark.parametrize("case", [pytest.param(c, marks=slowly(c)) for c in (*CASES, *ON_GRADIENTS)])
def test_replays_are_the_ordinary_steps(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(capturable, "LOOKS", 0)  # so that steps go by what the one before has found
    make = {**CASES, **ON_GRADIENTS}[case]
    ordinary, first, _ = trajectory(make, False)
    replayed, second, run = trajectory(make, True)
    torch.testing.assert_close(torch.stack(replayed), torch.stack(ordinary), rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(states(second), states(first), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert plain(second) == pytest.approx(plain(first), rel=1e-9, nan_ok=True)
    assert sum(graph._recorder.replays for graph in run._graphs.values()) == 11


def states(opt: Any) -> list[Any]:
    """All that a checkpoint has of the weights, and the weights."""
    return [[p.detach() for g in opt.param_groups for p in g["params"]], opt.state_dict()["state"]]


def plain(opt: Any) -> dict[str, float]:
    """What can be asked, but for the time."""
    return {name: value for name, value in opt.diagnostics().items() if name != "compile_seconds"}


@pytest.mark.parametrize("case", ["IVON-3", "norm-clipping", pytest.param("antithetic", marks=pytest.mark.slow)])
def test_tile_by_tile(case: str) -> None:
    """Models that are stepped in place."""
    found = [torch.stack(trajectory(CASES[case], captured, backend="eager")[0]) for captured in (False, True)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        "IVONPoCoMo",
        "VSGD",
        *[pytest.param(c, marks=pytest.mark.slow) for c in ("IVON-3", "Bernoulli", "norm-clipping")],
    ],
)
def test_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """As on a card: kernels by `fake_triton`, whose launches the tape repeats with the same tensors."""
    make = {**CASES, **ON_GRADIENTS}[case]
    ordinary = torch.stack(trajectory(make, False)[0])

    def loaded(source: str) -> Any:
        kernel = fake_triton.loaded(source)

        class Launched:
            def __getitem__(self, grid: tuple[int]) -> Any:
                def launch(*tensors: Tensor, **how: int) -> None:
                    kernel[grid](*tensors, **how)
                    tape = next((m for m in torch.utils._python_dispatch._get_current_dispatch_mode_stack()), None)
                    if isinstance(tape, Tape):
                        tape.note(lambda: kernel[grid](*tensors, **how))

                return launch

        return Launched()

    for name, value in (("is_at_hand", lambda device: True), ("_loaded", loaded), ("KERNELS", {})):
        monkeypatch.setattr(fused, name, value)
    fake_triton.Jit.launches.clear()
    choices = {"backend": "compiled"} if case in ON_GRADIENTS else {}
    replayed, opt, _ = trajectory(make, True, **choices)
    torch.testing.assert_close(torch.stack(replayed), ordinary, rtol=1e-11, atol=1e-11)
    assert fake_triton.Jit.launches and opt.backend.fallback is None


@pytest.mark.parametrize("name", ["IVON", "IVONPoCoMo"])
def test_a_pair_sees_one_dropout(name: str) -> None:
    def losses(captured: bool) -> Tensor:
        torch.manual_seed(5)
        model = network(dropout=0.5)
        task, opt = Task(model), SHELL[name](model.named_parameters())
        loss = lambda x, y: 0.5 * (model(x) - y).square().mean()  # noqa: E731
        batch = task.x[0], task.y[0]
        run = CapturedStep(opt, loss, batch, Tape) if captured else None
        opt.refresh(task.chunks())
        batches = zip(task.x, task.y, strict=True)
        found = [run(batch) if run else opt.step(lambda batch=batch: loss(*batch)) for batch in batches]
        return torch.stack([*found, torch.rand(())])

    torch.testing.assert_close(losses(True).double(), losses(False).double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_bad_batch_moves_nothing(nonfinite: str, backend: str) -> None:
    model, opt, loss, batches = problem(CASES["IVONPoCo"], nonfinite=nonfinite, backend=backend)
    run = CapturedStep(opt, loss, batches[0], Tape)
    run(batches[0])
    opt.refresh([lambda: loss(batches[1])])
    run(batches[1])
    before, held = opt.posterior_states(), weights(model)
    bad = {name: value * torch.nan for name, value in batches[2].items()}
    if nonfinite == "raise":
        with pytest.raises(poco.NonFiniteError, match="infinite or NaN"):
            run(bad)
    else:
        assert run(bad).isnan() and opt.diagnostics()["skipped_steps"] == 1
    assert equal(weights(model), held) and same(opt.posterior_states(), before)
    assert run(batches[3]).isfinite() and not equal(weights(model), held)


def groups(model: nn.Module, **choices: Any) -> Any:
    """Signs beside real numbers."""
    some = dict(model.named_parameters())
    signs = {"params": [some["0.weight"], some["3.weight"]], "family": "bernoulli", "lr": 0.01}
    rest = {"params": [some["0.bias"], some["3.bias"]]}
    return poco.PosteriorCorrected([signs, rest], "diagonal_gaussian", **COMMON, seed=0)


def one_is_alone(model: nn.Module) -> Any:
    return poco.IVONPoCo([model[0].weight], seed=0, **IVON)  # type: ignore[index]


def one_is_unused(model: nn.Module) -> Any:
    extra = nn.Parameter(torch.ones_like(model[0].bias))  # type: ignore[index, arg-type]
    return poco.IVONPoCo([*model.parameters(), extra], seed=2**63 + 5, **IVON)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [groups, one_is_alone, one_is_unused])
def test_other_models(make: Callable[[nn.Module], Any], dtype: torch.dtype) -> None:
    """Groups of two families, a tensor that lies by itself, one that the batch does not use; narrower numbers."""

    def finished(captured: bool) -> list[Tensor]:
        model = network(dtype)
        task, opt = Task(model), make(model)
        batches = [[x, y] for x, y in zip(task.x, task.y, strict=True)]
        loss = lambda x, y: 0.5 * (model(x) - y).square().mean()  # noqa: E731
        run = CapturedStep(opt, loss, batches[0], Tape) if captured else lambda b: opt.step(lambda: loss(*b))
        for step in range(6):
            if step == 3:
                opt.refresh(task.chunks())
            run(batches[step % 4])
        return [*weights(model), *[v for state in opt.posterior_states().values() for v in state]]

    bound = torch.finfo(dtype).eps
    torch.testing.assert_close(finished(True), finished(False), rtol=8 * bound, atol=8 * bound)


def test_the_tape_notices_what_the_host_bakes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = torch.stack(trajectory(CASES["IVONPoCo"], False)[0])
    for name in ("write", "count"):
        with monkeypatch.context() as patch:
            patch.setattr(Recording, name, lambda self, name, value: None)
            replayed = torch.stack(trajectory(CASES["IVONPoCo"], True)[0])
        assert not torch.allclose(replayed, ordinary, rtol=1e-6)


def test_one_more_kind_of_step_is_one_more_graph() -> None:
    _, opt, loss, batches = problem(CASES["IVONPoCo"])
    run = CapturedStep(opt, loss, batches[0], Tape)
    for _ in range(5):
        run(batches[0])
    assert len(run._graphs) == 1
    for _ in range(2):
        opt.refresh([lambda: loss(batches[0])])
        run(batches[1])
    assert len(run._graphs) == 2


class Host:
    """A recorder that does nothing: what is left of a replay is the host's part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record(self, run: Callable[[], Any]) -> Any:
        return run()

    warm = record

    def replay(self) -> None:
        pass

    def paired(self, params: Any) -> Any:
        return SimpleNamespace(again=nullcontext)


@pytest.mark.parametrize(("name", "most"), [("IVON", 320), ("IVONPoCoMo", 390)])
def test_a_replay_asks_little_of_the_host(name: str, most: int) -> None:
    """About 1.4 times the Python calls that it takes with 6 tensors; an ordinary step with two takes 950."""
    layers = nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
    model, batch = nn.Sequential(*layers), torch.ones(2, 8)
    opt: Any = getattr(poco, name)(model.parameters(), lr=0.1, ess=100.0, seed=0)
    run = CapturedStep(opt, lambda x: model(x).square().mean(), batch, Host)
    if opt.correction.compares:
        opt.refresh([lambda: model(batch).square().mean()])
    for _ in range(capturable.LOOKS + 22):
        run(batch)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(10):  # between two looks of the variance meter
        run(batch)
    profile.disable()
    assert pstats.Stats(profile).total_calls <= most * 10  # type: ignore[attr-defined]


def test_schedulers_see_a_step_and_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that moves at every step does not make the host begin afresh."""
    monkeypatch.setattr(capturable, "LOOKS", 0)
    afresh, calls = CapturedStep._afresh, list[int]()
    monkeypatch.setattr(CapturedStep, "_afresh", lambda self: (calls.append(1), afresh(self))[1])

    def finished(captured: bool) -> list[Tensor]:
        model, opt, loss, batches = problem(CASES["IVONPoCo"])
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        run: Any = CapturedStep(opt, loss, batches[0], Tape) if captured else lambda b: opt.step(lambda: loss(b))
        opt.refresh([lambda: loss(batches[0])])
        for _ in range(5):
            run(batches[1])
            scheduler.step()
        return weights(model)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(finished(True), finished(False), rtol=1e-12, atol=1e-12)
    assert len(calls) == 1


def test_others_may_write_load_and_go_on() -> None:
    """Weights that the user moves, a checkpoint, a posterior that is set."""

    def finished(captured: bool) -> tuple[Tensor, Any]:
        model, opt, loss, batches = problem(CASES["IVONPoCo"])
        run: Any = CapturedStep(opt, loss, batches[0], Tape) if captured else lambda b: opt.step(lambda: loss(b))
        opt.refresh([lambda: loss(batches[0])])
        found = [run(batches[0]), run(batches[1])]
        with torch.no_grad():
            model["long"].mul_(0.5)
        found.append(run(batches[2]))
        saved, kept = opt.state_dict(), weights(model)
        found.append(run(batches[3]))
        opt.load_state_dict(saved)
        with torch.no_grad():
            for p, value in zip(model.parameters(), kept, strict=True):
                p.copy_(value)
        found.append(run(batches[3]))
        opt.set_posterior(opt.posterior_states())
        found += [run(batches[0]), run(batches[1])]
        with opt.sampled(at_point=True):
            pass
        model["matrix"].requires_grad_(False)
        return torch.stack([*found, run(batches[2])]), opt.state_dict()["state"]

    (mine, own), (theirs, other) = finished(True), finished(False)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (SHELL["VON"], r"^family=FullGaussian: .*call step\(closure\)\.$"),
        (
            shell("diagonal_gaussian", lr=0.1, ess=10.0, curvature="exact"),
            "^curvature=.* estimators of gradients alone",
        ),
        (shell("diagonal_gaussian", lr=0.1, ess=10.0, curvature="regression", mc_samples=9), "^curvature=Regression"),
        (named(poco.IVON, one_pass=True, **IVON), "^one_pass=True: "),
        (named(poco.IVONPoCo, anchor="products", **IVON), "^anchor='products': "),
    ],
)
def test_what_cannot_be_captured_says_so(make: Make, sentence: str) -> None:
    model = network()
    opt: Any = make(model.named_parameters())
    before = weights(model)
    with pytest.raises(ValueError, match=sentence):
        CapturedStep(opt, lambda x: model(x).sum(), torch.ones(2, 3), Tape)
    assert equal(weights(model), before) and not opt.state


@pytest.mark.parametrize(
    ("closure", "error", "sentence"),
    [
        (lambda model, x: model(x).sum() * float(x.sum()), RuntimeError, "a value is looked at"),
        (lambda model, x: (model(x) * torch.tensor(2.0)).sum(), RuntimeError, "a number of the host is on its way"),
        (lambda model, x: model(x[x[:, 0] > 0.0]).sum(), RuntimeError, "a shape depends on values"),
    ],
)
def test_a_closure_that_cannot_be_captured_changes_nothing(closure: Any, error: Any, sentence: str) -> None:
    model = network()
    opt: Any = SHELL["BayesBiNN"](model.named_parameters())
    before = weights(model)
    with pytest.raises(error, match=rf"^closure: its step cannot be captured \(.*{sentence}.*Nothing was changed"):
        CapturedStep(opt, lambda x: closure(model, x), torch.ones(2, 3, dtype=torch.float64), Tape)
    assert equal(weights(model), before) and not opt.state
    opt.step(lambda: model(torch.ones(2, 3, dtype=torch.float64)).square().sum())


def test_batches_have_one_shape() -> None:
    model = network()
    opt: Any = SHELL["IVON"](model.named_parameters())
    example = {"x": torch.ones(2, 3, dtype=torch.float64), "scale": 2.0}
    run = CapturedStep(opt, lambda batch: model(batch["x"]).square().sum() * batch["scale"], example, Tape)
    run(example)
    before = weights(model)
    for wrong in ({**example, "x": example["x"][:1]}, {**example, "x": example["x"].float()}, {"x": example["x"]},
                  {**example, "scale": 3.0}, example["x"]):  # fmt: skip
        with pytest.raises(ValueError, match=r"^batch: .*step\(closure\)"):
            run(wrong)
    assert equal(weights(model), before)


def test_refused_without_a_card() -> None:
    model = network()
    loss = lambda x: model(x).sum()  # noqa: E731
    for opt in (SHELL["IVON"](model.named_parameters()), poco.VSGD(model.parameters(), lr=0.1)):
        with pytest.raises(ValueError, match=r"^params: they are on cpu, which has no CUDA graphs; call step"):
            opt.captured(loss, torch.ones(2, 3))
        with pytest.raises(TypeError, match=r"^closure="):
            opt.captured([loss], torch.ones(2, 3))
    mixed = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]
    with pytest.raises(ValueError, match=r"^params: they are on cpu, meta; captured\(\) is for one CUDA device"):
        capture.check_captured(loss, {p.device for p in mixed}, Tape)


def test_counters_are_not_reckoned_with() -> None:
    counter = Counter(3, "step")
    for wrong in (lambda: counter + 1, lambda: 2 * counter, lambda: counter % 2, lambda: float(counter)):
        with pytest.raises(RuntimeError, match=r"^step: a recorded step would keep this number"):
            wrong()
