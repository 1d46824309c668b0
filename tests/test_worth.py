"""What a correction is worth: laws against sums of known noise, the measurement against closed forms, and no traces."""

import copy
import itertools
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
from expfam_poco.correction.worth import (
    BatchLaw,
    CachedLaw,
    Law,
    MomentumLaw,
    Pairs,
    RecursiveLaw,
    SnapshotLaw,
    kept,
    per_step,
    worth_of,
)
from expfam_poco.tools import stretch

ALIKE = Pairs.alike(signal=0.0)


@pytest.mark.parametrize("every, size, alpha", [(10, 10, 0.5), (4, 12, 0.75), (20, 5, 1.0), (3, 7, 0.0)])
def test_the_law_of_mega_batches(every: int, size: int, alpha: float) -> None:
    law = SnapshotLaw(every, size, alpha)
    product = law.power(ALIKE, 0.0) * law.evaluations
    assert product == pytest.approx(((1 - alpha) ** 2 + alpha**2 * every / size) * (size + 2 * every) / every)
    best = SnapshotLaw.best(every, size, ALIKE)
    assert best.alpha == pytest.approx(size / (size + every))
    assert worth_of(best, ALIKE) == pytest.approx((size + every) / (size + 2 * every))
    assert product >= 1.0 / worth_of(best, ALIKE) - 1e-12
    assert worth_of(SnapshotLaw.best(every, size, ALIKE, fresh=0.0), ALIKE) == math.inf  # all data: SVRG


@pytest.mark.parametrize("law", [BatchLaw(1), BatchLaw(3), MomentumLaw(0.9), MomentumLaw(0.99)])
def test_any_batch_and_momentum_is_plain(law: Law) -> None:
    assert law.power(ALIKE, 0.0) * law.evaluations == pytest.approx(1.0)


@pytest.mark.parametrize("law", [CachedLaw(10, 0.3), CachedLaw(10), RecursiveLaw(0.9), RecursiveLaw(0.2)])
def test_what_is_evaluated_twice_brings_nothing_new(law: Law) -> None:
    assert law.power(ALIKE, 0.0) * law.evaluations == pytest.approx(2.0)
    apart = ALIKE._replace(step=0.9)
    assert law.power(apart, 0.0) >= law.power(ALIKE, 0.0)


def test_worth_goes_from_one_over_evaluations_to_the_law() -> None:
    law = SnapshotLaw(10, 10, 0.5)
    noisy, quiet = Pairs.alike(signal=1e-9), Pairs.alike(signal=1e9)
    assert worth_of(law, noisy) == pytest.approx(2 / 3, rel=1e-6) and worth_of(law, quiet) == pytest.approx(1 / 3)
    c = 2.5  # the steps that Σ of best progress ‖ḡ‖⁴/(‖ḡ‖² + s v) takes
    assert per_step(law, Pairs.alike(signal=1 / c)) == pytest.approx((1 + c) / (1 + c * 0.5))


# ---- the laws against the algorithms, with exact sums over known noise --------------------------------------


class Oracle:
    """Noises as coefficients: a batch's at one time correlates with its own at another by ρ^|t − t'|."""

    def __init__(self, steps: int, rho: float) -> None:
        self.names: dict[tuple[Any, int], int] = {}
        self.rho, self.steps = rho, steps
        self.rows: list[dict[int, float]] = []

    def __call__(self, batch: Any, time: int) -> dict[int, float]:
        return {self.names.setdefault((batch, time), len(self.names)): 1.0}

    def power(self, directions: list[dict[int, float]], frequency: float) -> float:
        """(1/W) E|Σ_t d_t e^{−iωt}|², from the covariance alone."""
        total = np.zeros(len(self.names), complex)
        for t, direction in enumerate(directions):
            for name, value in direction.items():
                total[name] += value * np.exp(-1j * frequency * t)
        keys = list(self.names)
        by_batch: dict[Any, list[int]] = {}
        for i, (batch, _) in enumerate(keys):
            by_batch.setdefault(batch, []).append(i)
        value = 0.0
        for members in by_batch.values():
            times = np.array([keys[i][1] for i in members])
            part = total[members]
            value += float(np.real(part.conj() @ (self.rho ** np.abs(times[:, None] - times)) @ part))
        return value / len(directions)


def plus(*terms: tuple[float, dict[int, float]]) -> dict[int, float]:
    found: dict[int, float] = {}
    for factor, part in terms:
        for name, value in part.items():
            found[name] = found.get(name, 0.0) + factor * value
    return found


def snapshot_directions(g: Oracle, every: int, size: int, alpha: float, cached: bool) -> list[dict[int, float]]:
    made, mega, out = [], [], 0
    for t in range(g.steps):
        if t % every == 0:
            mega, out = [("mega", t, k) for k in range(size)], t
        batch = mega[t % every] if cached else t
        mean = plus(*((alpha / size, g(name, out)) for name in mega))
        made.append(plus((1.0, g(batch, t)), (-alpha, g(batch, out)), (1.0, mean)))
    return made


def recursive_directions(g: Oracle, alpha: float) -> list[dict[int, float]]:
    made = [g(0, 0)]
    for t in range(1, g.steps):
        made.append(plus((alpha, made[-1]), (1.0, g(t, t)), (-alpha, g(t, t - 1))))
    return made


@pytest.mark.parametrize("rho", [1.0, 0.95])
@pytest.mark.parametrize("frequency", [0.0, 2 * math.pi / 30, 2 * math.pi / 5])
def test_spectra_are_those_of_the_algorithms(rho: float, frequency: float) -> None:
    every, size, alpha = 6, 9, 0.6
    mean = float(np.mean(rho ** np.arange(every)))
    pairs = ALIKE._replace(cross=mean, step=rho)
    for cached in (False, True):
        k = every if cached else size
        g = Oracle(10 * every, rho)
        law = CachedLaw(k, alpha) if cached else SnapshotLaw(every, k, alpha)
        directions = snapshot_directions(g, every, k, alpha, cached)
        # A store's noise between frequencies has the mean correlation in the place of its course over the loop.
        allowed = 2e-3 if cached and rho < 1.0 and frequency > 0.0 else 1e-9
        assert law.power(pairs, frequency) == pytest.approx(g.power(directions, frequency), rel=allowed)
    g = Oracle(300, rho)
    found = g.power(recursive_directions(g, 0.5), frequency)
    assert RecursiveLaw(0.5).power(pairs, frequency) == pytest.approx(
        found, rel=0.02
    )  # but for the ends, of 1/300 each


@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0])
def test_what_momentum_keeps_of_an_affine_gradient(gamma: float) -> None:
    beta, steps = 0.8, 400
    far, points = gamma * beta / (1 - beta), [math.cos(0.05 * t) + 1e-3 * t for t in range(steps)]
    ahead = [now + far * (now - last) for last, now in itertools.pairwise(points)]
    mean = sum((1 - beta) * beta**tau * value for tau, value in enumerate(reversed(ahead))) / points[-1]
    alike = {tau: points[-1 - tau] / points[-1] for tau in range(steps)}
    assert kept(beta, alike, gamma) == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("law", [BatchLaw(3), SnapshotLaw(10, 10, 0.5), CachedLaw(10), RecursiveLaw(0.9)])
def test_clipped_steps_go_from_one_over_evaluations_to_the_law(law: Law) -> None:
    pairs = ALIKE._replace(averaged=(1 - 0.9) / (1 + 0.9), clipped=1.0)
    few, many = (worth_of(law, pairs._replace(signal=signal)) for signal in (1.0, 1e-9))
    assert few == pytest.approx(1 / law.evaluations, rel=1e-3)  # c = 1 is nothing after a momentum of 0.9
    assert many == pytest.approx(worth_of(law, ALIKE), rel=1e-3) == worth_of(law, pairs)
    assert worth_of(BatchLaw(1), pairs._replace(signal=0.1)) == 1.0


@pytest.mark.parametrize("signal", [3.0, 0.3, 1e-3, 1e-300])
def test_steps_of_weights_that_are_clipped_and_of_others_are_put_together(signal: float) -> None:
    c, s, q, kappa = 1 / signal, 0.4, 0.3, 0.2
    law, pairs = SnapshotLaw(4, 8, 0.0), ALIKE._replace(signal=signal, clipped=q, averaged=kappa, plain=1.0)
    pairs = pairs._replace(cross=0.0, outer=0.0)
    assert law.power(pairs, 0.0) == 1.0
    law = BatchLaw(5)

    def steps(noise: float) -> float:
        sign = math.pi / 2 * kappa * noise if noise > 1e7 else math.erf(1 / math.sqrt(2 * kappa * noise)) ** -2
        return (1 - q) * (1 + noise) + q * sign

    s = law.power(pairs, 0.0)
    assert per_step(law, pairs) == pytest.approx(steps(c) / steps(c * s), rel=1e-5)


# ---- the optimizers themselves: how far noise alone moves them ----------------------------------------------


@pytest.mark.parametrize(
    "choices, law",
    [
        ({"alpha": 0.0}, BatchLaw(1)),
        ({"alpha": 0.5}, SnapshotLaw(5, 10, 0.5)),
        ({"alpha": 1.0}, SnapshotLaw(5, 10, 1.0)),
        ({"alpha": 0.5, "correction": "recursive"}, RecursiveLaw(0.5)),
    ],
)
def test_noise_moves_the_optimizers_as_far_as_the_law_says(choices: dict[str, Any], law: Law) -> None:
    generator, size, steps = torch.Generator().manual_seed(0), 4000, 200
    weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = poco.SVRG([weight], lr=1.0, **choices)

    def closure() -> Callable[[], Tensor]:
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        return lambda: (noise * weight).sum()

    for step in range(steps):
        if step % 5 == 0 and isinstance(law, SnapshotLaw):
            optimizer.refresh([closure() for _ in range(10)])
        optimizer.step(closure())
    found = float(weight.detach().square().mean()) / steps
    # The mean of `size` squares has a relative standard error of √(2/size); a recursion's ends are 1/steps of it.
    assert found == pytest.approx(law.power(ALIKE, 0.0), rel=4 * math.sqrt(2 / size) + 2 / steps)


@pytest.mark.parametrize("noise", [1.0, 4.0])
def test_clipped_steps_go_by_the_sign_of_momentums_average(noise: float) -> None:
    """The mean step over η ξ is erf(ḡ/√(2 κ v)), and the sum of W steps has a variance of W κ⁻¹ within π/2."""
    size, steps, beta, generator = 4000, 300, 0.9, torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(2, size, dtype=torch.float64))
    optimizer = poco.PosteriorCorrected(
        [weight], "isotropic_gaussian", 1.0, 1.0, noise="zero", momentum=beta, clip_radius=1e-6, hess_init=1.0, seed=0
    )
    signal = torch.tensor([[1.0], [0.0]], dtype=torch.float64)  # what is learnt, and what noise alone does
    for step in range(steps):
        if step == 100:
            begun = weight.detach().clone()
        drawn = noise * torch.randn(2, size, generator=generator, dtype=torch.float64)
        optimizer.step(lambda drawn=drawn: ((signal + drawn) * weight).sum())
    moved, window, kappa = (begun - weight.detach()) / 1e-6, steps - 100, (1 - beta) / (1 + beta)
    # Signs of neighbouring steps go together over some 1/κ of them.
    error = math.sqrt(1 / kappa / (size * window))
    assert abs(float(moved[0].mean()) / window - math.erf(1 / math.sqrt(2 * kappa * noise**2))) < 4 * error
    adds_up = float(moved[1].square().mean()) / window * kappa
    arcsines = sum(2 / math.pi * math.asin(beta ** abs(lag)) * (1 - abs(lag) / window) for lag in range(-199, 200))
    assert adds_up == pytest.approx(arcsines * kappa, rel=5 * math.sqrt(2 / size)) and 2 / math.pi < adds_up < 1.0


# ---- the measurement ----------------------------------------------------------------------------------------


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
