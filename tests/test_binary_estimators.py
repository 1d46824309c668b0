"""Estimators of binary weights on a two-layer network of 12 weights, against all 4096 networks; what they refuse."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_cases import equal, weights
from reference import slope_at_zero, tensor
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.estimators import Draws, available
from expfam_poco.families import Bernoulli, Relaxed, SingleFlip, StraightThrough
from expfam_poco.families.discrete.binary_estimators import log_sech_squared

ROOT = Path(__file__).resolve().parents[1]
FAMILY = Bernoulli()
DRAWS = 40_000
ONE = [nn.Parameter(torch.ones(1))]


def load_benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("binary_estimators", ROOT / "benchmarks" / "binary_estimators.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark = load_benchmark()
NETWORK = benchmark.TinyNetwork.made()
STORED = json.loads((ROOT / "benchmarks" / "results" / "binary-estimators.json").read_text(encoding="utf-8"))
both = pytest.mark.parametrize("confidence", [0.5, 2.0], ids=["unsure", "sure"])


class Enumerated:
    """Every network, its probability, its loss and its gradient."""

    def __init__(self, confidence: float) -> None:
        self.lam = benchmark.posterior(confidence)
        self.theta = benchmark.signs()
        self.mass = benchmark.probabilities(self.lam, self.theta)
        self.loss = torch.func.vmap(NETWORK.loss)(self.theta)
        self.truth = benchmark.truth(self.lam, NETWORK)

    def moments(self, each: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, and the variance summed over entries, of one estimate for each network."""
        mean = self.mass @ each
        return mean, (self.mass @ (each - mean) ** 2).sum()

    def of(self, estimator: Any) -> Tensor:
        """The estimate at each network."""
        grads = torch.func.vmap(torch.func.grad(NETWORK.loss))(self.theta)
        found = []
        for theta, loss, grad in zip(self.theta, self.loss, grads, strict=True):
            variations = None
            if estimator.needs == "variations":
                flips = torch.stack(list(estimator.variations(FAMILY, theta)))
                variations = torch.func.vmap(NETWORK.loss)(flips)[None]
            draws = Draws(20.0 * theta[None], theta[None], loss[None], grad[None], variations=variations)
            found.append(estimator.natural_gradient(FAMILY, FAMILY.State(self.lam), draws).theta)
        return torch.stack(found)


@both
def test_the_truth_is_the_slope_of_the_expected_loss_in_the_mean(confidence: float) -> None:
    problem = Enumerated(confidence)
    assert float(problem.mass.sum()) == pytest.approx(1.0, abs=1e-13)

    def expected(mean: Tensor) -> float:
        return float(((1.0 + problem.theta * mean) / 2.0).prod(-1) @ problem.loss)

    units = torch.eye(12, dtype=torch.float64)
    slopes = [slope_at_zero(lambda h, u=u: expected(problem.lam.tanh() + h * u)) for u in units]
    torch.testing.assert_close(problem.truth, tensor(slopes), rtol=1e-9, atol=1e-12)


def close_to(sample: Tensor, mean: Tensor, variance: Tensor) -> None:
    """The mean within five standard errors in every entry, the variance within five per cent."""
    error = sample.std(0) / math.sqrt(len(sample))
    assert bool(((sample.mean(0) - mean).abs() <= 5.0 * error + 1e-14).all())
    assert float(sample.var(0).sum()) == pytest.approx(float(variance), rel=0.05)


@both
def test_flip_is_exact_in_the_mean(confidence: float) -> None:
    problem = Enumerated(confidence)
    mean, variance = problem.moments(problem.of(SingleFlip()))
    torch.testing.assert_close(mean, problem.truth, rtol=1e-11, atol=1e-14)
    close_to(benchmark.estimates(SingleFlip(), problem.lam, NETWORK, DRAWS // 4), mean, variance)


@both
@pytest.mark.parametrize("clip", [None, 1.0], ids=["identity", "clipped"])
def test_straight_through_has_a_bias_and_this_variance(confidence: float, clip: float | None) -> None:
    problem, estimator = Enumerated(confidence), StraightThrough(clip=clip)
    mean, variance = problem.moments(problem.of(estimator))
    bias = float((mean - problem.truth).norm() / problem.truth.norm())
    assert bias > 0.3
    close_to(benchmark.estimates(estimator, problem.lam, NETWORK, DRAWS), mean, variance)
    label = {0.5: "unsure", 2.0: "sure"}[confidence]
    stored = STORED["moments"]["straight_through" if clip is None else "clipped_straight_through"][label]
    assert stored["bias"] == pytest.approx(bias, abs=5.0 * stored["error"] + 1e-12)
    assert stored["variance"] == pytest.approx(float(variance / problem.truth.square().sum()), rel=0.05, abs=1e-12)
    if clip is not None:
        passed = problem.lam.abs() <= clip
        assert bool((mean[~passed] == 0.0).all()) and bool((mean[passed] != 0.0).all())
        plain = problem.moments(problem.of(StraightThrough()))[0]
        assert torch.equal(mean[passed], plain[passed])


@both
def test_score_has_no_bias_and_this_variance(confidence: float) -> None:
    """Two draws: F⁻¹ ½ (ℓ − ℓ')(θ − θ'), whose moments are those of single draws."""
    problem = Enumerated(confidence)
    mass, loss, theta, mu = problem.mass, problem.loss, problem.theta, problem.lam.tanh()
    fisher = 1.0 - mu**2
    first, second = (mass * loss) @ theta, (mass * loss**2) @ theta
    mean = (first - mass @ loss * mu) / fisher
    torch.testing.assert_close(mean, problem.truth, rtol=1e-9, atol=1e-12)
    square = (mass @ loss**2 - (mass @ loss) ** 2 - second * mu + first**2) / fisher**2
    close_to(
        benchmark.estimates(poco.estimators.ScoreFunction(), problem.lam, NETWORK, DRAWS),
        mean, (square - mean**2).sum(),
    )  # fmt: skip


@both
def test_arm_has_no_bias(confidence: float) -> None:
    problem = Enumerated(confidence)
    sample = benchmark.estimates(available(FAMILY)["arm"], problem.lam, NETWORK, DRAWS)
    error = sample.std(0) / math.sqrt(len(sample))
    assert bool(((sample.mean(0) - problem.truth).abs() <= 5.0 * error).all())
    assert float(error.norm()) < 0.1 * float(problem.truth.norm())


def test_the_relaxed_bias_falls_and_its_variance_grows_as_the_temperature_falls() -> None:
    problem = Enumerated(0.5)
    scale = problem.truth.norm()
    bias, variance = {}, {}
    for temperature in (1.0, 0.2, 0.02):
        sample = benchmark.estimates(Relaxed(temperature), problem.lam, NETWORK, DRAWS)
        variance[temperature] = float(sample.var(0).sum())
        squared = (sample.mean(0) - problem.truth).square().sum() - sample.var(0).sum() / DRAWS
        bias[temperature] = float(squared) / float(scale**2)
    assert bias[1.0] > 0.1 > 0.03 > bias[0.2]
    assert variance[0.2] / variance[1.0] > 3.0
    assert variance[0.02] / variance[0.2] == pytest.approx(10.0, rel=0.25)


def test_the_page_shows_what_was_measured() -> None:
    text = (ROOT / "docs" / "binary-networks.md").read_text(encoding="utf-8")
    assert STORED.keys() == benchmark.PARTS.keys()
    for part, content in STORED.items():
        assert f"<!-- table {part} -->\n\n{benchmark.markdown(part, content)}\n<!-- end -->" in text, part
    known = {name.split(",")[0] for name in STORED["moments"]}
    assert known == {name for name, each in available(FAMILY).items() if not each.compares}, (
        "an estimator is missing in benchmarks/binary_estimators.py"
    )


def test_shared_noise_is_worth_as_much_as_the_page_says() -> None:
    """The factor falls as λ_in leaves λ_out; fresh noise only adds."""
    found = benchmark.corrections(500)
    factors = {distance: cell["plain"] / cell["shared"] for distance, cell in found.items()}
    assert factors["0.02"] > 500.0 and factors["0.1"] > 25.0 and factors["0.5"] > 1.5
    assert all(cell["plain"] / cell["independent"] < 1.2 for cell in found.values())


# ---- numerics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sech_squared_is_sound_far_out(dtype: torch.dtype) -> None:
    lam = torch.cat([torch.linspace(-40.0, 40.0, 801), torch.tensor([1e-8, 1e4])]).to(dtype)
    exact = tensor([-2.0 * (abs(x) + math.log1p(math.exp(-2.0 * abs(x))) - math.log(2.0)) for x in lam.tolist()])
    found, eps = log_sech_squared(lam), torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=4 * eps, atol=4 * eps)
    if dtype == torch.float32:
        assert float(1.0 - torch.tanh(torch.tensor(10.0)) ** 2) == 0.0  # what must not be computed
    assert bool((log_sech_squared(lam[:-1]).exp() > 0.0).all())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.1, 0.01])
def test_nothing_collapses_up_to_40_in_float32(temperature: float) -> None:
    """The relaxed estimate agrees with float64 wherever that fits into float32, for every |λ| and the noise seen."""
    lam = torch.linspace(-40.0, 40.0, 81)
    noise = FAMILY.noise((81,), 50, poco.noise.NoiseKey(2), dtype=torch.float32)
    estimator, found = Relaxed(temperature), []
    for dtype in (torch.float32, torch.float64):
        state, eps = FAMILY.State(lam.to(dtype)), noise.to(dtype)
        theta = estimator.points(FAMILY, state, eps)
        draws = Draws(eps[:1], theta[:1], eps[:1, 0], torch.ones(1, 81, dtype=dtype))
        values = [
            estimator.natural_gradient(FAMILY, state, draws._replace(noise=eps[k : k + 1])).theta for k in range(50)
        ]
        found.append(torch.stack(values).double())
    assert bool(found[0].isfinite().all())
    # exp() of a difference of logarithms up to 80/τ: relative errors of 80/τ rounding units
    torch.testing.assert_close(found[0], found[1], rtol=200.0 / temperature * 1.2e-7, atol=1e-30)


@pytest.mark.parametrize("choice", ["relaxed", "straight_through", "clipped_straight_through", "flip"])
@pytest.mark.parametrize("strength", [10.0, 40.0])
def test_a_network_that_is_sure_of_its_weights_trains_on_in_float32(choice: str, strength: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False))
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    opt = poco.BayesBiNNPoCo(
        model.named_parameters(),
        square_momentum=None,
        lr=1e-3,
        ess=16.0,
        strength=strength,
        curvature=choice,
        seed=0,
        alpha=1.0,
    )
    for step in range(20):
        if step % 5 == 0:
            opt.refresh([lambda: (model(x) - y).square().mean()])
        opt.step(lambda: (model(x) - y).square().mean())
    for state in opt.posterior_states().values():
        assert bool(state.theta.isfinite().all())
        assert bool((state.theta.abs() - strength * 0.999**20).abs().max() < 0.5 * strength)


# ---- variations ---------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout, and a buffer that every forward pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1, bias=False).double()
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(self.dropout(x))


def test_flips_see_the_dropout_of_their_draw_and_leave_buffers_alone() -> None:
    """The loss is linear in the weights, so the estimate is the dropped-out input of the draw, for every weight."""
    torch.manual_seed(0)
    model, x = Noisy(), torch.rand(1, 8, dtype=torch.float64) + 1.0
    opt = poco.PosteriorCorrected(
        [("weight", model.linear.weight)], "bernoulli", lr=1e-6, ess=1.0, curvature="flip", seed=0
    )
    masks = []

    def closure() -> Tensor:
        value = model(x).sum()
        state = torch.random.get_rng_state()
        masks.append(state)
        return value

    before = opt.posterior_states()["weight"].theta
    torch.manual_seed(5)
    opt.step(closure)
    after = opt.posterior_states()["weight"].theta
    assert len(masks) == 9 and all(torch.equal(mask, masks[0]) for mask in masks)
    assert torch.equal(torch.random.get_rng_state(), masks[0])
    torch.manual_seed(5)
    dropped = model.dropout(x)
    torch.testing.assert_close((before - after) / 1e-6 - before, dropped, rtol=1e-8, atol=1e-8)
    assert float(model.count) == 1.0, "one batch moves buffers once"


def test_flip_refuses_large_tensors_politely() -> None:
    model = nn.Linear(65, 64, bias=False)
    before = weights(model)
    with pytest.raises(ValueError, match="a tensor of 4160 weights would take as many further losses a step; choose"):
        poco.BayesBiNN(model.named_parameters(), square_momentum=None, lr=1e-3, ess=10.0, curvature="flip")
    assert equal(weights(model), before)
    poco.BayesBiNN(
        nn.Linear(64, 64, bias=False).parameters(), square_momentum=None, lr=1e-3, ess=10.0, curvature="flip"
    )
    small = nn.Linear(3, 2, bias=False)
    insisting = poco.BayesBiNN(
        small.parameters(), square_momentum=None, lr=1e-3, ess=10.0, curvature=SingleFlip(most=6)
    )
    insisting.step(lambda: small(torch.ones(3)).sum())
    with pytest.raises(ValueError, match="a tensor of 6 weights"):
        poco.BayesBiNN(small.parameters(), square_momentum=None, lr=1e-3, ess=10.0, curvature=SingleFlip(most=5))


@pytest.mark.parametrize("noise", ["shared", "independent", "fixed", "zero"])
def test_arm_needs_antithetic_noise(noise: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="noise="):
        poco.BayesBiNN([weight], square_momentum=None, lr=1e-3, ess=10.0, curvature="arm", noise=noise)
    assert torch.equal(weight.data, torch.ones(3))


@pytest.mark.parametrize("name", [name for name in FAMILY.estimators])
def test_estimators_of_binary_weights_refuse_other_families(name: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=rf"curvature='{name}' is not an estimator for DiagonalGaussian; choose"):
        poco.PosteriorCorrected([weight], "diagonal_gaussian", lr=0.1, ess=1.0, hess_init=1.0, curvature=name)
    with pytest.raises(ValueError, match=r"is for weights in \{−1, \+1\}, not for DiagonalGaussian"):
        FAMILY.estimators[name].check(poco.resolve_family("diagonal_gaussian"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Relaxed(0.0), "temperature=0.0: it must be a positive, finite number"),
        (lambda: Relaxed(math.inf), "temperature=inf"),
        (lambda: Relaxed(math.nan), "temperature=nan"),
        (lambda: Relaxed(1.0, epsilon=-1e-10), "epsilon=-1e-10: it must be in"),
        (lambda: Relaxed(1.0, epsilon=1.0), "epsilon=1.0"),
        (lambda: StraightThrough(clip=0.0), "clip=0.0: it must be a positive, finite number, or None"),
        (lambda: Bernoulli(initial="zero"), "initial='zero': choose 'value' or 'sign'"),
        (lambda: Bernoulli(strength=0.0), "strength=0.0: it must be a positive, finite number"),
        (lambda: poco.BayesBiNN(ONE, 0.1, 1.0, temperature=0.5, curvature="score"), "only the relaxed estimator has"),
    ],
)  # fmt: skip
def test_choices_out_of_range_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        make()
