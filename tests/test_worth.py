"""What a correction is worth, measured: against closed forms, the present setting, and without traces."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import ON_GRADIENTS, OPTIMIZERS, Task, network, run, same, weights
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.correction.worth import BatchLaw, Law, MomentumLaw, RecursiveLaw, SnapshotLaw, worth_of
from expfam_poco.tools import stretch


class Quadratic(nn.Module):
    """Σ ½ h (θ − 1)² + ⟨ξ, θ⟩: the gradient is h (θ − 1), and its noise ξ, a mini-batch, the same everywhere."""

    def __init__(self, size: int, curvature: float = 0.1) -> None:
        super().__init__()
        self.weight, self.curvature = nn.Parameter(torch.zeros(size, dtype=torch.float64)), curvature

    def closure(self, noise: Tensor) -> Callable[[], Tensor]:
        return lambda: 0.5 * self.curvature * (self.weight - 1).square().sum() + (noise * self.weight).sum()


def noises(count: int, size: int, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(count, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain(model: nn.Module, **choices: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 1e-3, "momentum": 0.9, **choices})


class Unsized:
    """Mini-batches that do not say how many they are: fresh data."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def test_additive_noise_has_the_worths_of_the_law() -> None:
    size = 2000
    model = Quadratic(size)
    found = poco.worth(model, plain(model), model.closure, Unsized(noises(40, size)), alphas=(1.0,))
    assert found.fresh == 1.0 and found.evaluations <= 200
    assert found.alike == pytest.approx(1.0) and found.alpha == pytest.approx(0.5)
    noise = 0.3**2 * size / (0.1**2 * size)  # v/‖ḡ‖² at the start, from which 10 steps of 1e-3 hardly lead away
    assert abs(found.noise - noise) < 4 * found.noise_error and found.noise_error < 0.2 * noise
    assert abs(found.block_sums - 1.0) < 4 * found.block_error + 0.05
    for start, power, evaluations in (
        ("snapshot K=10 M=10 alpha=0.50", 0.5, 3), ("snapshot K=10 M=10 alpha=1.00", 1.0, 3), ("cached", 1.0, 2),
        ("recursive", 1.0, 2), ("3x", 1 / 3, 3), ("momentum", 1.0, 1), ("transport", 1.0, 1),
    ):  # fmt: skip
        row = found[start]
        assert (row.power, row.evaluations) == (pytest.approx(power, rel=1e-6), evaluations)
        c = found.noise
        assert row.worth == pytest.approx((1 + c) / (evaluations * (1 + c * power)), rel=1e-6)
        assert row.limit == pytest.approx(1 / (power * evaluations), rel=1e-6)


def test_noise_that_changes_on_the_way_is_followed() -> None:
    """Gradients cos(θ + φ) with random phases correlate by cos(θ − θ'), and the way is known."""
    size, drift = 3000, 0.5
    weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    model = nn.ParameterList([weight])
    phases = 2 * math.pi * torch.rand(60, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def closure_of(phase: Tensor) -> Callable[[], Tensor]:
        return lambda: (0.1 * torch.sin(weight + phase) - drift * weight).sum()

    optimizer = torch.optim.SGD([weight], lr=0.2)
    found = poco.worth(model, optimizer, closure_of, Unsized(phases), every=9, size=6)
    way = [weight.detach().clone()]
    for phase in phases[:9]:
        optimizer.zero_grad()
        closure_of(phase)().backward()
        optimizer.step()
        way.append(weight.detach().clone())
    cosines = [float(torch.cos(point - way[0]).mean()) for point in way]
    mean = float(np.interp(range(9), [0, 3, 6, 8], [cosines[a] for a in (0, 3, 6, 8)]).mean())
    assert found.alike == pytest.approx(mean, abs=0.02) and mean < 0.9
    assert found.alpha == pytest.approx(mean / (1 + 9 / 6), abs=0.02)
    step = float(torch.cos(way[-1] - way[-2]).mean())
    assert found["recursive"].power == pytest.approx(1 + 2 * 0.9 * (1 - step) / 0.1**2, rel=0.1)


@pytest.mark.parametrize("kind", ["torch", "IVON"])
def test_a_transports_noise_is_measured_where_it_evaluates(kind: str) -> None:
    """Curvatures that differ from batch to batch: the noise's variance goes as ‖θ‖², here that of the point ahead."""
    model = nn.ParameterList([nn.Parameter(torch.ones(500, dtype=torch.float64))])
    generator = torch.Generator().manual_seed(3)
    factors = 1 + 0.5 * torch.randn(60, 500, generator=generator, dtype=torch.float64)

    def closure_of(factor: Tensor) -> Callable[[], Tensor]:
        return lambda: 0.5 * (factor * model[0].square()).sum()

    optimizer: Any = plain(model, lr=0.05)
    if kind == "IVON":
        optimizer = poco.IVON(model.parameters(), lr=0.2, ess=1e12, hess_init=1.0, seed=0)
    found = poco.worth(model, optimizer, closure_of, Unsized(factors), transports=(0.5,), every=5)
    way = [model[0].detach().clone()]
    for factor in factors[:5]:
        if kind == "torch":
            optimizer.zero_grad()
            closure_of(factor)().backward()
            optimizer.step()
        else:
            optimizer.step(closure_of(factor))
        way.append(model[0].detach().clone())
    ahead = way[-1] + 0.5 * 9 * (way[-1] - way[-2])
    measured = factors[5 : 5 + 16]
    ratio = float((measured * ahead).var(0).sum() / (measured * way[-1]).var(0).sum())
    assert abs(ratio - 1) > 0.02 and found["transport"].power == pytest.approx(ratio, rel=1e-4)
    lags = [1.0 - found[start].kept for start in ("momentum", "transport")]  # type: ignore[operator]
    assert abs(lags[0]) > 0.02 and lags[1] == pytest.approx(0.5 * lags[0])


def test_all_data_in_a_mega_batch_leave_no_error_of_its_mean() -> None:
    model = Quadratic(300)
    found = poco.worth(model, plain(model), model.closure, noises(30, 300), size=30)
    assert found.fresh == 0.0 and found.alpha == pytest.approx(1.0)
    assert found["snapshot"].limit > 1e3 and found["snapshot"].worth > 1.0
    assert found.advice.startswith("On this run a mega-batch of 30 every 10 steps is worth ")
    assert "use it" in found.advice


def test_a_loader_that_is_not_shuffled_is_told() -> None:
    model = Quadratic(300)
    sorted_ones = noises(10, 300).repeat_interleave(4, 0)
    found = poco.worth(model, plain(model), model.closure, Unsized(sorted_ones), every=8, samples=28)
    # Seven windows of four equal noises have sums of variance 16 s² and, all 28 together, the variance (28/27)(6/7) s².
    assert found.block_sums == pytest.approx(16 / 4 * 27 / 24)
    assert "shuffle the loader" in found.advice and found.advice in str(found)


def test_large_models_are_seen_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Quadratic(6000)
    whole = poco.worth(model, plain(model), model.closure, Unsized(noises(40, 6000)))
    monkeypatch.setattr(stretch, "SEEN", 1000)
    part = poco.worth(model, plain(model), model.closure, Unsized(noises(40, 6000)))
    assert part.noise == pytest.approx(whole.noise, rel=0.25) and part.pairs.plain < 0.25 * whole.pairs.plain


def test_table_and_picture(tmp_path: Path) -> None:
    model = Quadratic(300)
    found = poco.worth(model, plain(model), model.closure, Unsized(noises(40, 300)), corrections=("snapshot",))
    lines = found.table().splitlines()
    assert lines[0].split()[0] == "setting" and len(lines) == len(found.rows) + 4
    assert "if steps, not evaluations, are what you lack" in found.advice
    found.picture(tmp_path / "worth.png")
    assert (tmp_path / "worth.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(KeyError, match="rows are plain"):
        found["cached"]


@pytest.mark.parametrize("radius, wanted", [(1e-9, 1.0), (1e9, 0.0), (math.inf, 0.0)])
def test_the_share_of_clipped_weights_is_seen(radius: float, wanted: float) -> None:
    model = Quadratic(300)
    optimizer = poco.IVON(model.parameters(), lr=1e-2, ess=1e8, beta1=0.8, clip_radius=radius, seed=0)
    found = poco.worth(model, optimizer, model.closure, Unsized(noises(40, 300)))
    assert found.pairs.clipped == wanted
    assert ("100% of the weights are clipped" in str(found)) == (wanted == 1.0)
    assert found.pairs.averaged == pytest.approx(0.2 / 1.8 if wanted else 1.0)


def test_clipped_groups_have_a_momentum_of_their_own() -> None:
    model = Quadratic(300)
    other = nn.Parameter(torch.zeros(100, dtype=torch.float64))
    groups = [{"params": [other], "momentum": 0.0}, {"params": [model.weight], "momentum": 0.5, "clip_radius": 1e-9}]
    optimizer = poco.PosteriorCorrected(groups, "diagonal_gaussian", 0.01, 1e8, hess_init=1.0, seed=0)
    closure_of = lambda noise: lambda: model.closure(noise)() + (other - noise[:100]).square().sum()  # noqa: E731
    holder = nn.ParameterList([other, model.weight])
    pairs = poco.worth(holder, optimizer, closure_of, Unsized(noises(40, 300))).pairs
    assert pairs.clipped == pytest.approx(0.75) and pairs.averaged == pytest.approx(0.5 / 1.5)


# ---- the present setting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choices, law",
    [
        ({"alpha": 0.0}, BatchLaw(1)),
        ({"alpha": 0.5}, SnapshotLaw(6, 4, 0.5, fresh=1 - 4 / 40)),
        ({"alpha": 0.25, "correction": "recursive"}, RecursiveLaw(0.25)),
        ({"alpha": 0.0, "transport": 0.3, "momentum": 0.8}, MomentumLaw(0.8, 0.3)),
        ({"correction": "none"}, BatchLaw(1)),
    ],
)
def test_diagnostics_have_the_worth_of_the_present_setting(choices: dict[str, Any], law: Law) -> None:
    model, batches = Quadratic(300), noises(40, 300)
    optimizer = poco.PosteriorCorrected(model.parameters(), "isotropic_gaussian", 1e-3, 1e4, seed=0, **choices)
    if isinstance(law, SnapshotLaw):  # six steps from refresh to refresh
        for start in (0, 6):
            optimizer.refresh([model.closure(batch) for batch in batches[start : start + 4]])
            for batch in batches[start : start + 6]:
                optimizer.step(model.closure(batch))
    assert "predicted_worth" not in optimizer.diagnostics()
    found = poco.worth(model, optimizer, model.closure, batches, corrections=(), transports=(), every=6, size=4)
    row = next(row for row in found.rows if row.law == law)
    assert optimizer.diagnostics()["predicted_worth"] == row.worth == worth_of(law, found.pairs)


def test_the_worth_goes_with_alpha_and_a_correction_without_a_law_has_none() -> None:
    class Own(poco.correction.Snapshot):
        pass

    model, batches = Quadratic(300), noises(40, 300)
    for correction in (poco.correction.Snapshot(), Own()):
        optimizer = poco.SVRG(model.parameters(), lr=1e-3, alpha=1.0, correction=correction)
        for _ in range(2):
            optimizer.refresh([model.closure(batch) for batch in batches[:4]])
            optimizer.step(model.closure(batches[0]))
        found = poco.worth(model, optimizer, model.closure, batches)
        assert ("predicted_worth" in optimizer.diagnostics()) == (type(correction) is not Own)
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = poco.AlphaSVRG(base, alpha=1.0)
    found = poco.worth(model, optimizer, model.closure, batches, size=10, every=10)
    for loop, alpha in enumerate((1.0, 0.4, 0.8)):
        optimizer.alpha = alpha
        optimizer.refresh([model.closure(batch) for batch in batches[:10]])
        for batch in batches[:10]:
            optimizer.step(model.closure(batch))
        law = SnapshotLaw(10, 10, alpha, fresh=0.75)
        wanted = worth_of(law, found.pairs) if loop else None  # the first loop's length is not known before its end
        assert optimizer.diagnostics().get("predicted_worth") == pytest.approx(wanted)


def test_nothing_is_foretold_of_what_is_not_known() -> None:
    """A loop whose length is not known, chunks that are no mini-batches, a look-ahead that was not measured."""
    model, batches = Quadratic(300), noises(40, 300)
    optimizer = poco.SVRG(model.parameters(), lr=1e-3, alpha=0.5)
    poco.worth(model, optimizer, model.closure, batches)
    optimizer.refresh([model.closure(batch) for batch in batches[:4]])
    assert "predicted_worth" not in optimizer.diagnostics()
    optimizer.step(model.closure(batches[0]))
    assert "predicted_worth" not in optimizer.diagnostics()
    optimizer.refresh([model.closure(batch) for batch in batches[:4]])
    assert "predicted_worth" in optimizer.diagnostics()
    optimizer.refresh([lambda: sum(model.closure(batch)() for batch in batches) / 40])
    assert "predicted_worth" not in optimizer.diagnostics()
    optimizer.param_groups[0]["alpha"] = poco.MegaBatchAlpha(mini_batches=40)
    optimizer.step(model.closure(batches[0]))
    optimizer.refresh([lambda: sum(model.closure(batch)() for batch in batches) / 40])
    optimizer.step(model.closure(batches[0]))
    law = SnapshotLaw(1, 40, 40 / 41, fresh=0.0)
    assert optimizer.diagnostics()["predicted_worth"] == pytest.approx(worth_of(law, optimizer._noise_seen[0]))
    ahead = poco.SVRG(model.parameters(), lr=1e-3, alpha=0.0, momentum=0.9, transport=0.3)
    ahead.param_groups[0]["momentum"] = 0.0
    poco.worth(model, ahead, model.closure, batches)
    ahead.param_groups[0]["momentum"] = 0.9
    assert "predicted_worth" not in ahead.diagnostics()
    found = poco.worth(model, ahead, model.closure, batches, corrections=(MomentumLaw(0.9, 0.2),), transports=())
    assert {row.law.gamma for row in found.rows if isinstance(row.law, MomentumLaw)} == {0.0, 0.2, 0.3}


def test_what_an_optimizer_remembers_beside_its_state_stays() -> None:
    model, batches = Quadratic(30), noises(40, 30)
    schedule = poco.BurnIn(steps=3, alpha=0.7)
    optimizer = poco.IVONPoCo(
        model.parameters(), lr=1e-3, ess=1e4, alpha=schedule, anchor="products", stale_after=2, seed=0
    )
    optimizer.refresh([model.closure(batch) for batch in batches[:4]])
    optimizer.step(model.closure(batches[0]))
    before = optimizer.diagnostics()
    poco.worth(model, optimizer, model.closure, batches)
    after = optimizer.diagnostics()
    assert {name: after[name] for name in before} == before and before["alpha"] == 0.0
    optimizer.step(model.closure(batches[0]))  # with the closures of the mega-batch
    with pytest.warns(UserWarning, match="no refresh"):
        for batch in batches[:5]:
            optimizer.step(model.closure(batch))


# ---- no traces, and refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [0, 3], ids=["fresh", "used"])
@pytest.mark.parametrize("name", ["IVONPoCoMo", "SVRG", "BayesBiNN", "VON", "AlphaSVRG-AdamW", "VSGD"])
def test_training_goes_on_as_if_nobody_had_measured(name: str, used: int) -> None:
    results = []
    on_gradients = name in ON_GRADIENTS
    for look in (False, True):
        model = nn.Sequential(nn.BatchNorm1d(3), *network(dropout=0.2)).double()
        optimizer, task = (ON_GRADIENTS if on_gradients else OPTIMIZERS)[name](model.parameters()), Task(model)
        torch.manual_seed(0)
        for step in range(0 if on_gradients else used):
            run(optimizer, task, 1, start=step)
        generator = torch.Generator().manual_seed(5)
        loader = torch.utils.data.DataLoader(range(4), batch_size=None, shuffle=True, generator=generator)
        if look:
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            found = poco.worth(model, optimizer, lambda i, task=task: task.closure(int(i)), loader, every=3, samples=6)
            assert found.evaluations <= 200 and all(math.isfinite(row.evaluations) for row in found.rows)
            assert same((model.state_dict(), optimizer.state_dict()), before)
            assert all(p.grad is None for p in model.parameters())
        results.append([list(loader), torch.rand(3)])
        results[-1] += [] if on_gradients else [*run(optimizer, task, 3, start=used), *weights(model), *model.buffers()]
    assert same(results[0], results[1])


def test_wrong_arguments_are_refused() -> None:
    model = Quadratic(10)
    optimizer, loader = plain(model), noises(20, 10)
    for words, error, match in (
        ({"corrections": ("stored",)}, ValueError, "corrections='stored'"),
        ({"every": 180}, ValueError, "most=200"),
        ({"batches": (0,)}, ValueError, "batches=0"),
        ({"momenta": (1.0,)}, ValueError, "momenta=1.0"),
        ({"samples": 2}, ValueError, "samples=2"),
    ):
        with pytest.raises(error, match=match):
            poco.worth(model, optimizer, model.closure, loader, **words)
    with pytest.raises(TypeError, match="closure_of"):
        poco.worth(model, optimizer, lambda batch: model.closure(batch)(), loader)
    with pytest.raises(ValueError, match="loader"):
        poco.worth(model, optimizer, model.closure, [])
    with pytest.raises(TypeError, match="loader=None: give an iterable"):
        poco.worth(model, optimizer, model.closure, None)
    with pytest.raises(ValueError, match="do not differ"):
        poco.worth(model, optimizer, model.closure, loader[:1].expand(20, -1))
    with pytest.raises(ValueError, match=r"momentum is 1\.0 and never forgets"):
        poco.worth(model, plain(model, momentum=1.0), model.closure, loader)
    with pytest.raises(ValueError, match=r"alpha=1\.0"):
        RecursiveLaw(1.0)
