"""BayesBiNN and BayesBiNNPoCo: the published update, the corrected one by hand, and what correction does."""

from typing import Any

import pytest
import torch
from backend_cases import FLAT, compiles, distance, model_of, numbers, trained
from optimizer_cases import INNER, MEGA, named, noises
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.families import Bernoulli, Relaxed
from expfam_poco.families.discrete.binary_estimators import log_sech_squared

N, TAU, BETA, DRAWS, LR, STRENGTH = 40.0, 0.5, 0.9, 3, 1e-3, 2.0


class Regression:
    """tanh(x Wᵀ) against targets, 40 examples, 2 × 6 weights."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((40, 6), (40, 2), (2, 6))]
        self.x, self.y, start = (value.to(dtype) for value in made)
        self.weight = nn.Parameter(start)

    def loss(self, weight: Tensor, rows: Any = slice(None)) -> Tensor:
        return ((self.x[rows] @ weight.T).tanh() - self.y[rows]).square().mean()

    def closure(self, rows: Any = slice(None)) -> Any:
        return lambda: self.loss(self.weight, rows)

    def gradient(self, weight: Tensor, rows: Any = slice(None)) -> Tensor:
        leaf = weight.detach().clone().requires_grad_()
        return torch.autograd.grad(self.loss(leaf, rows), leaf)[0]


def lam_of(opt: Any) -> Tensor:
    (state,) = opt.posterior_states().values()
    return state.theta


@pytest.mark.parametrize("prior", [False, True], ids=["uniform", "prior"])
@pytest.mark.parametrize("stale", [True, False], ids=["stale", "present"])
def test_the_published_update(stale: bool, prior: bool) -> None:
    """ĝ = (N/S) Σ (1−w²+ε)/τ/(1−μ²+ε) ∇ℓ(w); m ← βm + (1−β)(ĝ + λ − λ₀); λ ← λ − η m/(1−βᵗ), in 100 steps."""
    problem, epsilon = Regression(), 1e-10
    lam0 = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(2, 6) if prior else torch.zeros(2, 6).double()
    family = Bernoulli().stale_variant()() if stale else Bernoulli()
    opt = poco.BayesBiNN(
        [problem.weight], square_momentum=None, lr=LR, ess=N, beta1=BETA, mc_samples=DRAWS,
        strength=STRENGTH, stale_mean=stale, curvature=Relaxed(TAU, epsilon=epsilon), seed=3,
        prior=family.from_nat(Bernoulli.State(lam0)) if prior else None,
    )  # fmt: skip
    lam = STRENGTH * problem.weight.data.sign()
    mu, m = torch.tanh(lam), torch.zeros_like(lam)
    for t in range(1, 101):
        drawn = noises(opt, INNER, t)[0]
        opt.step(problem.closure())
        g = torch.zeros_like(lam)
        for eps in drawn:
            w = torch.tanh((lam + eps) / TAU)
            g += N / DRAWS * (1 - w**2 + epsilon) / TAU / (1 - mu**2 + epsilon) * problem.gradient(w)
        m = BETA * m + (1 - BETA) * (g + lam - lam0)
        if stale:
            mu = torch.tanh(lam)
        lam = lam - LR * m / (1 - BETA**t)
        if not stale:
            mu = torch.tanh(lam)
        torch.testing.assert_close(lam_of(opt), lam, rtol=1e-13, atol=1e-14)
    assert float((lam.abs() - STRENGTH).abs().max()) > 0.02, "it moved"


def test_stale_and_present_means_differ() -> None:
    found = []
    for stale in (True, False):
        problem = Regression()
        opt = poco.BayesBiNN(
            [problem.weight],
            square_momentum=None,
            lr=LR,
            ess=N,
            strength=STRENGTH,
            stale_mean=stale,
            curvature="relaxed",
            seed=3,
        )
        for _ in range(20):
            opt.step(problem.closure())
        found.append(lam_of(opt))
    assert 1e-6 < float((found[0] - found[1]).abs().max()) < 1e-2


def test_the_corrected_update_by_hand() -> None:
    """λ ← (1−η)λ + ηλ₀ − ηN[ĝ_in − α(ĝ_out − ḡ_out)] with momentum, mega-batches of two chunks, ρ and a prior."""
    problem, alpha, rho = Regression(), 0.7, 0.3
    lam0 = torch.full((2, 6), 0.25, dtype=torch.float64)
    opt = poco.BayesBiNNPoCo(
        [problem.weight], square_momentum=None, lr=LR, ess=N, temperature=TAU, beta1=BETA, mc_samples=2,
        strength=STRENGTH, seed=3, alpha=alpha, rho=rho, prior=Bernoulli.State(lam0),
    )  # fmt: skip
    chunks, weights = [slice(0, 20), slice(20, 30)], [2.0, 1.0]

    def site(lam: Tensor, rows: slice, drawn: Tensor) -> Tensor:
        total = torch.zeros_like(lam)
        for eps in drawn:
            w = torch.tanh((lam + eps) / TAU)
            ratio = torch.exp(log_sech_squared((lam + eps) / TAU) - log_sech_squared(lam)) / TAU
            total += ratio * problem.gradient(w, rows) / len(drawn)
        return total

    lam = STRENGTH * problem.weight.data.sign()
    m, outer, mean, chunk = torch.zeros_like(lam), None, None, 0
    for t in range(1, 31):
        if t > 5 and t % 6 == 0:  # a burn-in of five plain steps
            opt.refresh([problem.closure(rows) for rows in chunks], weights)
            fresh = torch.zeros_like(lam)
            for rows, weight in zip(chunks, weights, strict=True):
                chunk += 1
                fresh += weight / 3.0 * site(lam, rows, noises(opt, MEGA, chunk)[0])
            mean, outer = fresh if mean is None else rho * mean + (1.0 - rho) * fresh, lam
        rows = slice(8 * (t % 5), 8 * (t % 5) + 8)
        drawn = noises(opt, INNER, t)[0]
        opt.step(problem.closure(rows))
        g = site(lam, rows, drawn)
        plain = g + (lam - lam0) / N
        if outer is not None:
            plain = plain - alpha * (site(outer, rows, drawn) - mean)
        m = BETA * m + (1 - BETA) * plain
        lam = lam - LR * N * m / (1 - BETA**t)
        torch.testing.assert_close(lam_of(opt), lam, rtol=1e-12, atol=1e-13)
    (state,) = opt.state.values()
    torch.testing.assert_close(state["memory"].site.theta, mean, rtol=1e-11, atol=1e-13)


def test_without_momentum_it_is_the_rule_on_natural_parameters() -> None:
    problem, lr = Regression(), 0.01
    opt = poco.BayesBiNN(
        [problem.weight], square_momentum=None, lr=lr, ess=N, beta1=0.0, strength=STRENGTH, curvature="relaxed", seed=3
    )
    lam = STRENGTH * problem.weight.data.sign()
    drawn = noises(opt, INNER, 1)[0]
    opt.step(problem.closure())
    w = torch.tanh(lam + drawn[0])
    g = (1 - w**2) / (1 - torch.tanh(lam) ** 2) * problem.gradient(w)
    expected = poco.blr.natural_step(
        Bernoulli.State(lam), Bernoulli.State(torch.zeros_like(lam)), Bernoulli.State(g), rate=lr, ess=N
    )
    torch.testing.assert_close(lam_of(opt), expected.theta, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("choice", ["straight_through", "clipped_straight_through"])
def test_straight_through_corrected_is_svrg_right_after_a_refresh(choice: str) -> None:
    """The model's mode is where the loss is evaluated, so any mini-batch gives the full-batch step."""
    found = []
    for rows in (slice(0, 4), slice(10, 14), slice(25, 40), slice(None)):
        problem = Regression()
        opt = poco.BayesBiNNPoCo(
            [problem.weight],
            square_momentum=None,
            lr=LR,
            ess=N,
            strength=0.5,
            curvature=choice,
            noise="zero",
            seed=3,
            alpha=1.0,
        )
        for _ in range(4):
            opt.step(problem.closure())
        opt.refresh([problem.closure()])
        opt.step(problem.closure(rows))
        found.append(lam_of(opt))
    for other in found[:-1]:
        torch.testing.assert_close(other, found[-1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("noise", ["shared", "antithetic"])
def test_any_estimator_gives_the_mega_batch_right_after_a_refresh(noise: str) -> None:
    """ĝ_in − ĝ_out is exactly 0 with shared noise at λ_in = λ_out: no noise of draws or of batches is left."""
    for choice in ("relaxed", "straight_through"):
        found = []
        for rows in (slice(0, 4), slice(10, 14), slice(None)):
            problem = Regression()
            opt = poco.BayesBiNNPoCo(
                [problem.weight], square_momentum=None, lr=LR, ess=N, curvature=choice, noise=noise, seed=3
            )
            opt.refresh([problem.closure()])
            opt.step(problem.closure(rows))
            found.append(lam_of(opt))
        for other in found[:-1]:
            torch.testing.assert_close(other, found[-1], rtol=1e-14, atol=1e-14)


CASES = {
    "relaxed": named(poco.BayesBiNNPoCo, square_momentum=None, lr=1e-3, ess=24.0, temperature=0.5, strength=2.0),
    "clipped": named(poco.BayesBiNNPoCo, square_momentum=None, lr=1e-3, ess=24.0, curvature="clipped_straight_through"),
    "epsilon": named(
        poco.BayesBiNN, square_momentum=None, lr=1e-4, ess=24.0, strength=2.0, curvature=Relaxed(0.5, epsilon=1e-10)
    ),
    "stale": named(poco.BayesBiNN, square_momentum=None, lr=1e-4, ess=24.0, strength=2.0, stale_mean=True),
}


@compiles
@pytest.mark.slow
def test_compiled_steps_average_the_prior_too() -> None:
    """The other cases compile what test_backends.py compiles."""
    eager, own = (numbers(*trained(CASES["stale"], names=FLAT, backend=b)[:2]) for b in ("eager", "compiled"))
    assert distance(own, eager) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_streamed_steps_average_the_prior_too(case: str) -> None:
    whole, eager = (numbers(*trained(CASES[case], backend=name)[:2]) for name in ("auto", "eager"))
    assert distance(eager, whole) < 1e-9
    eager = numbers(*trained(CASES[case], names=FLAT, backend="eager")[:2])
    without = trained(CASES[case], names=FLAT, backend="eager", prior_in_momentum=False)[:2]
    assert distance(numbers(*without), eager) > 1e-6, "the prior's part in the momentum shows"


def test_the_prior_in_the_momentum_serves_gaussians_as_well() -> None:
    made = named(poco.IVON, lr=0.1, ess=100.0, beta2=0.99, weight_decay=0.1, prior_in_momentum=True)
    whole, eager = (numbers(*trained(made, backend=name)[:2]) for name in ("auto", "eager"))
    assert distance(eager, whole) < 1e-9


def test_an_initial_posterior_from_a_trained_network_keeps_its_confidence() -> None:
    model = model_of(("matrix",))
    values = model["matrix"].detach().clone()
    sign = poco.BayesBiNN(model_of(("matrix",)).named_parameters(), square_momentum=None, lr=0.1, ess=1.0, strength=3.0)
    assert torch.equal(lam_of(sign), torch.full_like(values, 3.0))
    value = poco.BayesBiNN(
        model.named_parameters(), square_momentum=None, lr=0.1, ess=1.0, strength=3.0, initial="value"
    )
    assert torch.equal(lam_of(value), 3.0 * values)


def test_a_bayesbinn_is_the_corrected_one_with_alpha_0() -> None:
    found = []
    for kind, choices in ((poco.BayesBiNN, {}), (poco.BayesBiNNPoCo, {"alpha": 0.0})):
        problem = Regression()
        opt = kind([problem.weight], square_momentum=None, lr=LR, ess=N, seed=3, **choices)
        for step in range(6):
            if step == 3:
                opt.refresh([problem.closure()])
            opt.step(problem.closure(slice(step, step + 8)))
        found.append(lam_of(opt))
    assert torch.equal(*found)
