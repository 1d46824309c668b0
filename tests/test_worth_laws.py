"""The laws of what a correction is worth, against sums of known noise, and against the optimizers themselves."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
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
    c, q, kappa = 1 / signal, 0.3, 0.2
    pairs = ALIKE._replace(signal=signal, clipped=q, averaged=kappa)

    def steps(noise: float) -> float:
        sign = math.pi / 2 * kappa * noise if noise > 1e7 else math.erf(1 / math.sqrt(2 * kappa * noise)) ** -2
        return (1 - q) * (1 + noise) + q * sign

    assert per_step(BatchLaw(5), pairs) == pytest.approx(steps(c) / steps(c / 5), rel=1e-5)


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
