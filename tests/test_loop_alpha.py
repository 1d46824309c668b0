"""α over time: schedules, the adaptive choice, stale corrections; and the numbers an optimizer shows of itself."""

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backend_cases import Wells, model_of
from optimizer_cases import OPTIMIZERS, SHELL, Task, equal, flat, network, run, same, weights
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.correction.variance import EVERY

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_shell = pytest.mark.parametrize("name", SHELL)
CORRECTING = [n for n in OPTIMIZERS if OPTIMIZERS[n](network().parameters()).diagnostics()["alpha"] > 0.0]


def with_alpha(name: str, params: Any, alpha: Any, **choices: Any) -> Any:
    """The optimizer with another α."""
    if name in SHELL:
        return SHELL[name](params, **({} if alpha is None else {"alpha": alpha}), **choices)
    base = OPTIMIZERS[name](params).base
    return poco.AlphaSVRG(base, **({} if alpha is None else {"alpha": alpha}), **choices)


def takes_alpha(name: str) -> bool:
    return name not in ("VON", "IVON")


WITH_ALPHA = [name for name in OPTIMIZERS if takes_alpha(name)]
with_alphas = pytest.mark.parametrize("name", WITH_ALPHA)


# ---- schedules ---------------------------------------------------------------------------------------------


def test_values_of_schedules() -> None:
    linear, cosine = poco.LinearAlpha(0.2, 1.0, steps=4), poco.CosineAlpha(1.0, 0.2, steps=4)
    assert [linear(t) for t in (1, 2, 4, 9)] == pytest.approx([0.4, 0.6, 1.0, 1.0], abs=1e-15)
    half = math.sqrt(0.5)
    assert [cosine(t) for t in (1, 2, 3, 4, 9)] == pytest.approx(
        [0.2 + 0.4 * (1 + half), 0.6, 0.2 + 0.4 * (1 - half), 0.2, 0.2], abs=1e-15
    )
    nested = poco.BurnIn(3, poco.BurnIn(2, poco.LinearAlpha(0.0, 1.0, steps=2)))
    assert [nested(t) for t in range(1, 9)] == [0.0] * 5 + [0.5, 1.0, 1.0]
    assert poco.BurnIn(1, (0.3, 0.6))(2) == (0.3, 0.6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: poco.LinearAlpha(1.5, 0.0, 3), "first=1.5"),
        (lambda: poco.CosineAlpha(0.5, -0.1, 3), "last=-0.1"),
        (lambda: poco.LinearAlpha(0.5, 0.1, 0), "steps=0"),
        (lambda: poco.BurnIn(-1), "steps=-1"),
        (lambda: poco.BurnIn(1, 2.0), "alpha=2.0"),
        (lambda: poco.AdaptiveAlpha(keep=1.0), "keep=1.0"),
        (lambda: poco.AdaptiveAlpha(probe_every=0), "probe_every=0"),
        (lambda: poco.MegaBatchAlpha(0.0), "mini_batches=0.0"),
        (lambda: poco.MegaBatchAlpha(True), "mini_batches=True"),
        (lambda: poco.SVRG([nn.Parameter(torch.ones(1))], lr=0.1, alpha="adaptiv"), "alpha='adaptiv'"),
        (lambda: poco.SVRG([nn.Parameter(torch.ones(1))], lr=0.1, stale_after=0), "stale_after=0"),
    ],
)
def test_schedules_out_of_range_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


SCHEDULES: dict[str, Any] = {
    "linear": poco.LinearAlpha(0.9, 0.1, steps=8),
    "cosine": poco.CosineAlpha(0.1, 0.9, steps=8),
    "nested": poco.BurnIn(2, poco.BurnIn(1, poco.CosineAlpha(0.9, 0.3, steps=4))),
}


# Every optimizer has one schedule, and one of each kind all: α(t) is computed in one place, whoever uses it.
TRIED = [
    (name, label)
    for number, name in enumerate(WITH_ALPHA)
    for place, label in enumerate(SCHEDULES)
    if place == number % len(SCHEDULES) or name in ("IVONPoCoMo", "AlphaSVRG-AdamW")
]


@pytest.mark.parametrize(("name", "label"), TRIED)
def test_a_schedule_is_its_values_and_survives_a_checkpoint(name: str, label: str) -> None:
    schedule, found = SCHEDULES[label], []
    for alpha in (schedule, lambda step: schedule(step)):
        model = network()
        opt = with_alpha(name, model.named_parameters(), alpha)
        task = Task(model)
        run(opt, task, 6)
        assert opt.diagnostics()["alpha"] == pytest.approx(schedule(6), abs=1e-15)
        saved, values = copy.deepcopy(opt.state_dict()), weights(model)
        run(opt, task, 5, start=6)
        found.append(weights(model))
    model = network()
    opt = with_alpha(name, model.named_parameters(), schedule)
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)
    opt.load_state_dict(saved)
    run(opt, Task(model), 5, start=6)
    assert equal(found[0], found[1]) and equal(weights(model), found[0])


# ---- the adaptive α ----------------------------------------------------------------------------------------


class Noisy:
    """Gradients with a given correlation: mean 0, and b + c of a batch inside, √… of the same b outside.

    The loss is linear in the weights, z·w: inside z = b + own, outside z = b + other, so that Cov = 1 and
    Var = 1 + spread². At the refresh the gradient is 0.
    """

    def __init__(self, weight: nn.Parameter, shared: float, own: float, seed: int = 0) -> None:
        self.weight, self.shared, self.own = weight, shared, own
        self.generator = torch.Generator().manual_seed(seed)
        self.calls = 0
        self.batch = torch.zeros_like(weight.detach())

    def randn(self) -> Tensor:
        return torch.randn(self.weight.shape, generator=self.generator, dtype=self.weight.dtype)

    def mega(self) -> Tensor:
        return (0.0 * self.weight).sum()

    def step(self) -> Callable[[], Tensor]:
        batch = self.randn()

        def closure() -> Tensor:
            self.calls += 1
            return ((self.shared * batch + self.own * self.randn()) * self.weight).sum()

        return closure


def adaptive(kind: str, params: Any, **choices: Any) -> Any:
    alpha = poco.AdaptiveAlpha(**choices) if choices else "adaptive"
    if kind == "SVRG":
        return poco.SVRG(params, lr=1e-6, alpha=alpha, stale_after=None)
    if kind == "AlphaSVRG":
        return poco.AlphaSVRG(torch.optim.SGD(params, lr=1e-6), alpha=alpha, stale_after=None)
    choices = {"noise": "zero", "curvature": "exact", "stale_after": None}
    return poco.IVONPoCo(params, lr=1e-6, ess=1e6, beta2=1.0, alpha=alpha, **choices)


kinds = pytest.mark.parametrize("kind", ["SVRG", "IVONPoCo", "AlphaSVRG"])


@kinds
@pytest.mark.parametrize(("shared", "own"), [(1.0, 0.5), (1.0, 0.2), (1.0, 0.0)])
def test_the_adaptive_alpha_is_covariance_over_variance(kind: str, shared: float, own: float) -> None:
    """The moving average of keep = 0.9 has 19 looks at 4000 entries: a standard error of 1/√76000 = 0.004."""
    weight = nn.Parameter(torch.zeros(4000, dtype=torch.float64))
    opt, source = adaptive(kind, [weight]), Noisy(weight, shared, own)
    opt.refresh([source.mega])
    for _ in range(40):
        opt.step(source.step())
    expected = shared**2 / (shared**2 + own**2)
    assert abs(opt.diagnostics()["alpha"] - expected) < 5 * 0.004
    assert source.calls == 80


@kinds
def test_every_tensor_has_an_alpha_of_its_own(kind: str) -> None:
    """Each in a group shows its own; in one group they are the same, of which the mean is shown."""
    shown = []
    for apart in (True, False):
        tensors = [nn.Parameter(torch.zeros(4000, dtype=torch.float64)) for _ in range(3)]
        kinds_of_noise = zip(tensors, (1, 1, 0), (0.0, 1.0, 1.0), strict=True)
        sources = [Noisy(t, s, o, seed) for seed, (t, s, o) in enumerate(kinds_of_noise)]
        opt = adaptive(kind, [{"params": [t]} for t in tensors] if apart else tensors)
        opt.refresh([lambda sources=sources: torch.stack([s.mega() for s in sources]).sum()])
        for _ in range(40):
            parts = [source.step() for source in sources]
            opt.step(lambda parts=parts: torch.stack([part() for part in parts]).sum())
        shown.append(opt.diagnostics())
    alphas = [shown[0][f"alpha.group{i}"] for i in range(3)]
    assert alphas == pytest.approx([1.0, 0.5, 0.0], abs=0.02) and alphas[2] == 0.0
    assert abs(shown[1]["alpha"] - sum(alphas) / 3) < 1e-12


@kinds
def test_alpha_stays_between_zero_and_one(kind: str) -> None:
    """Outside half of what is inside would ask for α = 2, the opposite for α = −1."""
    for factor, expected in ((0.5, 1.0), (-1.0, 0.0)):
        weight = nn.Parameter(torch.zeros(50, dtype=torch.float64))
        opt = adaptive(kind, [weight])
        opt.refresh([lambda weight=weight: 0.0 * weight.sum()])
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            z = torch.randn(50, generator=generator, dtype=torch.float64)
            calls = []

            def closure(z: Tensor = z, calls: list[int] = calls, factor: float = factor, w: Any = weight) -> Tensor:
                calls.append(1)
                return (z * w).sum() * (1.0 if len(calls) == 1 else factor)

            opt.step(closure)
        assert opt.diagnostics()["alpha"] == expected


@kinds
def test_without_correlation_steps_cost_one_evaluation_but_for_probes(kind: str) -> None:
    weight = nn.Parameter(torch.zeros(4000, dtype=torch.float64))
    opt, source = adaptive(kind, [weight], keep=0.5, probe_every=8), Noisy(weight, 0.0, 1.0)
    opt.refresh([source.mega])
    counts = []
    for _ in range(33):
        before = source.calls
        opt.step(source.step())
        counts.append(source.calls - before)
    assert counts == [2 if number == 1 or number % 8 == 0 else 1 for number in range(1, 34)]
    assert opt.diagnostics()["alpha"] == 0.0
    source.shared, source.own = 1.0, 0.1
    for _ in range(47):
        before = source.calls
        opt.step(source.step())
        counts.append(source.calls - before)
    assert opt.diagnostics()["alpha"] > 0.9 and counts[-20:] == [2] * 20, "the correction did not come back"


# Sites without a curvature: that of a linear layer may be the same for all batches, and its α 1 whatever is asked.
GRADIENTS_ALONE = ["SVRG", "VSGDPoCo", "bernoulli-relaxed", "bernoulli-mean", "AlphaSVRG-SGD", "AlphaSVRG-AdamW"]


@pytest.mark.parametrize("uses", ["all-used", "some-unused"])
@pytest.mark.parametrize("name", GRADIENTS_ALONE)
def test_while_alpha_is_zero_probes_change_nothing(name: str, uses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trajectory of α = 0, bit for bit, also of parameters that a batch does not use."""
    monkeypatch.setattr("expfam_poco.correction.variance.optimal_alpha", lambda *_: 0.0)  # no pair gains enough
    found = []
    for probed in (False, True):
        model = nn.ModuleDict({"net": network(), "rare": nn.Linear(3, 1).double()})
        with torch.no_grad():
            for p in model["rare"].parameters():
                p.fill_(0.3)
        opt = with_alpha(name, model.named_parameters(), poco.AdaptiveAlpha(probe_every=2) if probed else 0.0)
        task = Task(model["net"])

        def both(batch: int, model: nn.ModuleDict = model, task: Task = task) -> Callable[[], Tensor]:
            inner = task.closure(batch)
            return lambda: inner() + model["rare"](task.x[batch % 4]).square().mean()

        opt.refresh([both(batch) for batch in range(4)])
        for step in range(9):
            opt.step(task.closure(step) if step % 2 and uses == "some-unused" else both(step))
        assert opt.diagnostics()["alpha"] == 0.0
        found.append(weights(model))
    assert equal(*found)


@with_alphas
def test_an_adaptive_run_resumes_bit_for_bit(name: str) -> None:
    def build() -> tuple[nn.Module, Any, Task]:
        model = network()
        opt = with_alpha(name, model.named_parameters(), poco.AdaptiveAlpha(keep=0.7, least_gain=0.3, probe_every=3))
        return model, opt, Task(model)

    model, opt, task = build()
    run(opt, task, 9)
    values, saved = weights(model), copy.deepcopy(opt.state_dict())
    run(opt, task, 9, start=9)
    twin, other, again = build()
    with torch.no_grad():
        for p, value in zip(twin.parameters(), values, strict=True):
            p.copy_(value)
    other.load_state_dict(saved)
    run(other, again, 9, start=9)
    assert equal(weights(twin), weights(model)) and other.diagnostics()["alpha"] == opt.diagnostics()["alpha"]
    assert same(other.state_dict()["state"], opt.state_dict()["state"])


# ---- stale corrections -------------------------------------------------------------------------------------


# The age of q_out is counted in one place: one optimizer of each kind of step.
of_each_kind = pytest.mark.parametrize(
    "name",
    ["SVRG", "VONPoCo", "IVONPoCoMo", "diagonal-stored", "bernoulli-relaxed", "bernoulli-score", "AlphaSVRG-SGD"],
)


@of_each_kind
def test_a_stale_correction_warns_once(name: str) -> None:
    model = network()
    opt, task = with_alpha(name, model.named_parameters(), 0.5, stale_after=5), Task(model)
    run(opt, task, 3, refresh_every=99)
    opt.refresh(task.chunks())
    run(opt, task, 5, refresh_every=99)
    with pytest.warns(UserWarning, match=r"alpha: no refresh\(\) for 5 steps"):
        opt.step(task.closure(0))
    run(opt, task, 20, refresh_every=99)
    assert opt.diagnostics()["steps"] == 29


@of_each_kind
def test_nothing_is_stale_without_alpha_or_a_limit_or_in_a_burn_in(name: str) -> None:
    for alpha, after in ((0.0, 3), (0.5, None), (poco.BurnIn(12, 0.5), 3)):
        model = network()
        opt, task = with_alpha(name, model.named_parameters(), alpha, stale_after=after), Task(model)
        run(opt, task, 12, refresh_every=99)
        opt.refresh(task.chunks())
        run(opt, task, 3, refresh_every=99)


@every_shell
def test_measuring_a_stale_outer_does_not_warn(name: str) -> None:
    model = network()
    opt, task = with_alpha(name, model.named_parameters(), None, stale_after=2), Task(model)
    opt.refresh(task.chunks())
    run(opt, task, 2, refresh_every=99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.measure_variance(task.chunks())


# ---- measured variances ------------------------------------------------------------------------------------


def test_measured_variances_of_svrg_by_hand() -> None:
    model = network()
    opt, task = poco.SVRG(model.parameters(), lr=0.05, alpha=0.6), Task(model)
    start = flat(model.parameters())
    opt.refresh(task.chunks())
    run(opt, task, 6, refresh_every=99)
    present = flat(model.parameters())
    numbers = opt.measure_variance(task.chunks())

    def gradients(at: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(at, model.parameters())
        return torch.stack([flat(torch.autograd.grad(c(), list(model.parameters()))) for c in task.chunks()])

    inside, outside = gradients(present), gradients(start)
    plain, outer = inside.var(0).sum(), outside.var(0).sum()
    cross = ((inside - inside.mean(0)) * (outside - outside.mean(0))).sum() / 3
    assert numbers["variance.theta"] == pytest.approx(float(plain), rel=1e-10)
    ratio = float((inside - 0.6 * outside).var(0).sum() / plain)
    assert numbers["variance_ratio.theta"] == pytest.approx(ratio, rel=1e-10)
    assert numbers["anchored_variance_ratio.theta"] == pytest.approx(ratio, rel=1e-10)
    assert numbers["optimal_alpha.theta"] == pytest.approx(float(cross / outer), rel=1e-10)
    assert numbers["optimal_variance_ratio.theta"] == pytest.approx(1 - float(cross**2 / outer / plain), rel=1e-10)


@every_shell
def test_measuring_changes_nothing(name: str) -> None:
    """With dropout and batch statistics: the next steps are bit for bit the same."""
    found = []
    for measured in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.BatchNorm1d(3, affine=False), network(dropout=0.3)).double()
        opt: Any = SHELL[name](model.named_parameters())
        task = Task(model)
        run(opt, task, 6)
        if measured:
            before = (weights(model), [b.clone() for b in model.buffers()], opt.state_dict(), torch.get_rng_state())
            shown = opt.diagnostics()
            opt.measure_variance(task.chunks())
            after = (weights(model), list(model.buffers()), opt.state_dict(), torch.get_rng_state())
            assert all(same(a, b) for a, b in zip(before, after, strict=True)) and opt.diagnostics() == shown
        run(opt, task, 3, start=6)
        found.append([*weights(model), *(b.clone() for b in model.buffers())])
    assert equal(*found)


@pytest.mark.parametrize("noise", ["shared", "antithetic"])
@pytest.mark.parametrize("name", [n for n in SHELL if takes_alpha(n)])
def test_right_after_a_refresh_the_ratio_is_one_minus_alpha_squared(name: str, noise: str) -> None:
    if noise != "shared" and name.startswith("bernoulli"):
        pytest.skip("its noise is not symmetric")
    model = network()
    opt = with_alpha(name, model.named_parameters(), 0.3, noise=noise)
    task = Task(model)
    run(opt, task, 5, refresh_every=99)
    opt.refresh(task.chunks())
    numbers = opt.measure_variance(task.chunks())
    for field in opt.param_groups[0]["family"].Site._fields:
        if numbers[f"variance.{field}"] > 1e-20:
            for key in ("variance_ratio", "anchored_variance_ratio"):
                assert numbers[f"{key}.{field}"] == pytest.approx(0.49, rel=1e-6)
            assert numbers[f"optimal_alpha.{field}"] == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("name", ["VSGDPoCo", "IVONPoCoMo", "diagonal-gradsq", "bernoulli-relaxed"])
def test_measured_variances_of_streamed_blocks_are_those_of_whole_tensors(name: str) -> None:
    found = []
    for backend in ("auto", "eager"):
        model = model_of()
        opt: Any = SHELL[name](model.named_parameters(), backend=backend)
        task = Wells(model)
        run(opt, task, 6)
        before = (weights(model), opt.posterior_states())
        found.append(opt.measure_variance(task.chunks()))
        assert same((weights(model), opt.posterior_states()), before)
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_parameter_that_one_batch_alone_uses_has_a_variance(backend: str) -> None:
    """Where a batch does not use it its gradient is 0, and counts."""
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    opt = poco.SVRG([a, b], lr=0.1, backend=backend)
    opt.refresh([lambda: a.square().sum()])
    numbers = opt.measure_variance([lambda: a.square().sum(), lambda: a.square().sum() + 3.0 * b.sum()])
    assert numbers["variance.theta"] == pytest.approx(2 * 9.0 / 2)


def test_a_variance_needs_batches_and_an_outer() -> None:
    model = network()
    opt, task = poco.SVRG(model.parameters(), lr=0.1), Task(model)
    with pytest.raises(ValueError, match=r"call refresh\(closures\) first"):
        opt.measure_variance(task.chunks())
    opt.refresh(task.chunks())
    with pytest.raises(ValueError, match="two mini-batches or more, not 1"):
        opt.measure_variance([task.closure(0)])


# ---- what is shown and logged ------------------------------------------------------------------------------


@every_optimizer
def test_diagnostics_are_finite_and_norms_are_right(name: str) -> None:
    model = network()
    opt: Any = OPTIMIZERS[name](model.named_parameters())
    run(opt, Task(model), EVERY + 2)
    shown = opt.diagnostics()
    assert all(math.isfinite(value) for value in shown.values()) and shown["steps"] == EVERY + 2
    assert shown["weight_norm"] == pytest.approx(float(flat(model.parameters()).norm()), rel=1e-12)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_the_gradient_norm_is_that_of_the_corrected_gradient_of_a_sampled_step(backend: str) -> None:
    model = network()
    opt, task = poco.SVRG(model.parameters(), lr=0.05, max_grad_norm=1e-3, backend=backend), Task(model)
    for step in range(EVERY):
        before = flat(model.parameters())
        opt.step(task.closure(step))
    shown = opt.diagnostics()["gradient_norm"]
    nn.utils.vector_to_parameters(before, model.parameters())
    norm = flat(torch.autograd.grad(task.closure(EVERY - 1)(), list(model.parameters()))).norm()
    assert shown == pytest.approx(float(norm), rel=1e-9)


@every_optimizer
def test_tensorboard_reads_back_what_was_logged(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter
    model = network()
    opt: Any = OPTIMIZERS[name](model.named_parameters())
    task = Task(model)
    with SummaryWriter(str(tmp_path)) as writer:
        handle = poco.log_diagnostics(opt, writer, every=4, prefix="run/")
        run(opt, task, 9)
        shown = None
        for step in range(9, 12):
            opt.step(task.closure(step))
        shown = opt.diagnostics()
        handle.remove()
        run(opt, task, 8, start=12)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"run/{key}" for key in shown}
    for key, value in shown.items():
        entries = events.Scalars(f"run/{key}")
        assert entries[-1].step == 12 and entries[-1].value == pytest.approx(np.float32(value))
    assert [e.step for e in events.Scalars("run/steps")] == [4, 8, 12]
