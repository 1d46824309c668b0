"""The anchor term by Hessian-vector products, the objective, the variance meter, prediction, mega-batches."""

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from optimizer_cases import SHELL, Task, equal, flat, network, run, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

import expfam_poco as poco
from expfam_poco.correction.variance import EVERY

every_shell = pytest.mark.parametrize("name", SHELL)

# ---- the anchor term ---------------------------------------------------------------------------------------


def anchored(anchor: str, family: str = "diagonal_gaussian", **choices: Any) -> tuple[nn.Module, Any, Task]:
    model = network()
    settings = {
        "lr": 0.1, "ess": 100.0, "hess_init": 2.0, "weight_decay": 0.05, "anchor_weight": 1.0, "alpha": 0.8, "seed": 1
    }  # fmt: skip
    opt = poco.PosteriorCorrected(model.parameters(), family, anchor=anchor, **{**settings, **choices})
    return model, opt, Task(model)


def trajectory(*arguments: Any, steps: int = 12, **choices: Any) -> Tensor:
    model, opt, task = anchored(*arguments, **choices)
    points = []
    for step in range(steps):
        if step % 4 == 2:
            opt.refresh(task.chunks(), [6.0, 2.0, 6.0, 6.0])
        opt.step(task.closure(step))
        points.append(flat(model.parameters()))
    return torch.stack(points)


@pytest.mark.parametrize(
    ("noise", "curvature"),
    [
        (noise, curvature)
        for noise in ("fixed", "zero", "shared", "antithetic")
        for curvature in ("exact", "reparam", "hutchinson", "gradsq")
        if (noise, curvature) != ("zero", "reparam")  # refused: nothing to measure
    ],
)
def test_stored_and_products_are_one_anchor(noise: str, curvature: str) -> None:
    stored = trajectory("stored", noise=noise, curvature=curvature)
    products = trajectory("products", noise=noise, curvature=curvature)
    torch.testing.assert_close(stored, products, rtol=0.0, atol=1e-10)
    unanchored = trajectory("stored", noise=noise, curvature=curvature, anchor_weight=0.0)
    assert float((stored - unanchored).abs().max()) > 1e-5, "the anchor did nothing"


@pytest.mark.parametrize("anchor", ["stored", "products"])
@pytest.mark.parametrize("noise", ["fixed", "zero"])
def test_products_equal_the_dense_curvatures_own_anchor(noise: str, anchor: str) -> None:
    """For a full Gaussian with the exact Hessian measured at the same points they are the same numbers."""
    expected = trajectory("curvature", "full_gaussian", noise=noise, curvature="exact")
    found = trajectory(anchor, "full_gaussian", noise=noise, curvature="exact")
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("anchor", ["stored", "products", "curvature"])
def test_the_anchor_has_mean_zero_over_the_mini_batches(anchor: str) -> None:
    """With the precision held, a step is linear in the anchor: weight 1 minus weight 0, averaged, is nothing."""
    model, opt, task = anchored(anchor, noise="fixed", curvature="exact", precision_lr=0.0)
    run(opt, task, 3, refresh_every=99)
    opt.refresh(task.chunks())
    run(opt, task, 3, refresh_every=99)
    terms = []
    for batch in range(4):
        moved = []
        for weight in (1.0, 0.0):
            twin, copied = copy.deepcopy((model, opt))
            copied.param_groups[0]["anchor_weight"] = weight
            copied._products._chunks = [  # a copy has no closures; give it those of its own model
                (chunk, [replace(view, block=block) for view, block in zip(views, copied._blocks, strict=True)], share)
                for (_, views, share), chunk in zip(opt._products._chunks, Task(twin).chunks(), strict=False)
            ]
            copied.step(Task(twin).closure(batch))
            moved.append(flat(twin.parameters()))
        terms.append(moved[0] - moved[1])
    each = torch.stack(terms)
    assert float(each.abs().max()) > 1e-6
    assert float(each.mean(0).abs().max()) < 1e-12


def test_an_anchor_that_does_not_fit_is_refused() -> None:
    for anchor in ("stored", "products"):
        with pytest.raises(ValueError, match="IsotropicGaussian keeps no curvature; use anchor='curvature'"):
            poco.SVRG(network().parameters(), lr=0.1, anchor=anchor)
        model, opt, task = anchored(anchor)
        batch = poco.PerExample(model, nn.functional.mse_loss, task.x[0], task.y[0])
        with pytest.raises(ValueError, match="it needs closures, not PerExample"):
            opt.refresh([batch])
    wide = nn.Linear(150, 150)
    opt = poco.PosteriorCorrected(wide.parameters(), "diagonal_gaussian", lr=0.1, ess=10.0, anchor="stored")
    with pytest.raises(ValueError, match=r"anchor='stored': 22650 entries would need a Hessian of 22650²"):
        opt.refresh([lambda: wide(torch.ones(1, 150)).square().mean()])


# ---- the objective -----------------------------------------------------------------------------------------


class Linear:
    """y = xᵀw with independent weights: the expected loss and the KL divergence in closed form."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
        self.y = self.x @ torch.tensor([1.0, -1.0, 0.5, 2.0]).double() + 0.3
        self.model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(self.model.weight, 0.5)

    def closure(self, rows: slice, *, backward: bool = False) -> Any:
        def evaluate() -> Tensor:
            loss = 0.5 * (self.model(self.x[rows]).squeeze(-1) - self.y[rows]).square().mean()
            if backward:
                loss.backward()
            return loss

        return evaluate

    def expected(self, mean: Tensor, variance: Tensor) -> float:
        residual = (self.y - self.x @ mean).square().mean()
        return 0.5 * float(residual + (self.x.square() @ variance).mean())


def gaussian() -> tuple[Linear, Any, float, float]:
    task = Linear()
    opt = poco.IVON(task.model.parameters(), lr=0.1, ess=30.0, weight_decay=0.2, hess_init=0.5, beta2=0.99, seed=0)
    for _ in range(20):
        opt.step(task.closure(slice(None)))
    (state,) = opt.posterior_states().values()
    m, s, s0 = state.mean[0], state.precision[0], 30.0 * 0.2
    kl = 0.5 * float((s0 / s + s0 * m * m - 1.0 + torch.log(s / s0)).sum())
    return task, opt, task.expected(m, 1.0 / s), kl


def bernoulli() -> tuple[Linear, Any, float, float]:
    task = Linear()
    opt = poco.PosteriorCorrected(task.model.parameters(), "bernoulli", lr=0.02, ess=30.0, seed=0)
    for _ in range(10):
        opt.step(task.closure(slice(None)))
    (state,) = opt.posterior_states().values()
    p = torch.sigmoid(2.0 * state.theta[0])
    kl = float((p * torch.log(2.0 * p) + (1.0 - p) * torch.log(2.0 * (1.0 - p))).sum())
    mean = torch.tanh(state.theta[0])
    return task, opt, task.expected(mean, 1.0 - mean * mean), kl


@pytest.mark.parametrize("posterior", [gaussian, bernoulli])
def test_the_objective_is_the_evidence_lower_bound(posterior: Any) -> None:
    task, opt, expected_loss, kl = posterior()
    before, generator = weights(task.model), torch.get_rng_state()
    chunks, sizes = [task.closure(slice(0, 10)), task.closure(slice(10, 30), backward=True)], [10, 20]
    found = opt.objective(chunks, sizes, samples=400)
    assert equal(weights(task.model), before) and torch.equal(torch.get_rng_state(), generator)
    assert task.model.weight.grad is None
    elbo = -(30.0 * expected_loss + kl)
    assert abs(found.elbo - elbo) < 5 * found.standard_error and 0 < found.standard_error < 0.1 * abs(elbo)
    assert abs(found.kl - kl) < 1e-10
    assert abs(found.elbo + 30.0 * found.expected_loss + found.kl) < 1e-10
    assert all(type(value) is float for value in found)
    assert opt.objective(chunks, sizes, samples=400) == found, "the same seed, the same draws"
    # The standard error is honest: over repetitions it is the standard deviation, which falls as 1/√samples.
    estimates = [opt.objective(chunks, sizes, samples=16, seed=seed) for seed in range(150)]
    spread = torch.tensor([e.elbo for e in estimates]).std()
    claimed = torch.tensor([e.standard_error for e in estimates]).square().mean().sqrt()
    assert 0.8 < float(spread / claimed) < 1.25
    assert abs(float(torch.tensor([e.elbo for e in estimates]).mean()) - elbo) < 5 * float(spread) / math.sqrt(150)
    assert 0.7 < float(claimed) / found.standard_error / math.sqrt(400 / 16) < 1.4


def test_an_objective_that_is_not_defined_is_refused() -> None:
    task, opt, _, _ = gaussian()
    chunk = task.closure(slice(None))
    with pytest.raises(ValueError, match="samples=1: a standard error needs 2 draws"):
        opt.objective([chunk], samples=1)
    with pytest.raises(TypeError, match="closure: it returned None"):
        opt.objective([lambda: None])
    with pytest.raises(poco.NonFiniteError):
        opt.objective([lambda: task.model.weight.sum() * math.nan])
    improper = poco.IVON(task.model.parameters(), lr=0.1, ess=30.0, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"weight_decay=0\.0: .*needs a proper prior"):
        improper.objective([chunk])
    w, v = (nn.Parameter(torch.ones(1)) for _ in range(2))
    two = poco.IVON([{"params": [w], "ess": 5.0}, {"params": [v]}], lr=0.1, ess=30.0)
    with pytest.raises(ValueError, match="ess: the groups differ"):
        two.objective([lambda: w.sum() + v.sum()])


# ---- the variance meter and the other numbers --------------------------------------------------------------


@every_shell
def test_diagnostics_are_plain_numbers(name: str) -> None:
    model = network()
    opt: Any = SHELL[name](model.parameters(), alpha=0.5)
    first = opt.diagnostics()
    assert first["steps"] == first["refreshes"] == first["skipped_steps"] == 0 and first["alpha"] == 0.5
    run(opt, Task(model), 21)
    numbers = opt.diagnostics()
    assert json.loads(json.dumps(numbers)) == numbers
    assert all(type(value) in (int, float) for value in numbers.values())
    assert numbers["steps"] == 21 and numbers["refreshes"] == 5
    fields = opt.param_groups[0]["family"].Site._fields
    assert {f"variance_ratio.{f}" for f in fields} | {f"optimal_alpha.{f}" for f in fields} <= numbers.keys()
    assert opt.diagnostics() == numbers, "reading changes nothing"


def test_the_meter_compares_corrected_with_plain() -> None:
    """Written out for SVRG: ‖g_in − α(g_out − ḡ) − ḡ‖² / ‖g_in − ḡ‖² at a metered step, and the best α."""
    model = network()
    opt, task = poco.SVRG(model.parameters(), lr=0.02, alpha=0.6), Task(model)
    opt.refresh(task.chunks())

    def gradient(batch: int, at: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(at, model.parameters())
        grads = torch.autograd.grad(task.closure(batch)(), list(model.parameters()))
        return flat(grads)

    start = flat(model.parameters())
    for step in range(EVERY - 1):
        opt.step(task.closure(step))
    present = flat(model.parameters())
    mean = torch.stack([gradient(b, start) for b in range(4)]).mean(0)
    a, d = gradient(EVERY, present) - mean, gradient(EVERY, start) - mean
    nn.utils.vector_to_parameters(present, model.parameters())
    opt.step(task.closure(EVERY))
    numbers = opt.diagnostics()
    ratio = float((a - 0.6 * d).square().sum() / a.square().sum())
    assert abs(numbers["variance_ratio.theta"] - ratio) < 1e-10 * ratio
    assert abs(numbers["optimal_alpha.theta"] - float(a @ d / (d @ d))) < 1e-10


@pytest.mark.parametrize("noise", ["shared", "antithetic"])
@pytest.mark.parametrize("curvature", ["reparam", "exact"])
def test_near_the_snapshot_shared_noise_lowers_the_variance(noise: str, curvature: str) -> None:
    model = network()
    opt = poco.PosteriorCorrected(
        model.parameters(), "diagonal_gaussian", lr=1e-3, ess=500.0, hess_init=1.0, curvature=curvature, noise=noise,
        seed=0,
    )  # fmt: skip
    task = Task(model, batches=8)
    opt.refresh(task.chunks() * 20)
    run(opt, task, EVERY, refresh_every=99)
    numbers = opt.diagnostics()
    for field in ("gradient", "curvature"):
        assert numbers[f"variance_ratio.{field}"] < 0.2
        assert abs(numbers[f"optimal_alpha.{field}"] - 1.0) < 0.2


# ---- prediction --------------------------------------------------------------------------------------------


def test_predictions_average_over_the_posterior() -> None:
    task, opt, _, _ = gaussian()
    (state,) = opt.posterior_states().values()
    before = weights(task.model)
    outputs = poco.predict(task.model, opt, task.x, samples=600)
    assert outputs.shape == (30, 1) and not outputs.requires_grad
    spread = (task.x.square() @ (1.0 / state.precision[0]) / 600).sqrt()
    assert ((outputs.squeeze(-1) - task.x @ state.mean[0]).abs() < 5 * spread).all()
    squares = poco.predict(task.model, opt, task.x, samples=600, transform=torch.square)
    second = (task.x @ state.mean[0]).square() + task.x.square() @ (1.0 / state.precision[0])
    torch.testing.assert_close(squares.squeeze(-1), second, rtol=0.3, atol=0.05)
    assert torch.equal(poco.predict(task.model, opt, task.x, samples=0), task.model(task.x).detach())
    three = [poco.predict(task.model, opt, task.x, samples=3, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(three[0], three[1]) and not torch.equal(three[0], three[2])
    assert equal(weights(task.model), before)
    for samples in (-1, 1.5, "many"):
        with pytest.raises(ValueError, match=r"samples=.*give an integer, 0 or larger"):
            poco.predict(task.model, opt, task.x, samples=samples)


def test_prediction_leaves_training_mode_and_weights_as_they_were() -> None:
    model = network(dropout=0.5)
    model[0].eval()
    opt = poco.IVON(model.parameters(), lr=0.1, ess=50.0)
    before, modes = weights(model), [module.training for module in model.modules()]
    x = torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(poco.predict(model, opt, x, samples=2), poco.predict(model, opt, (x,), samples=2)), "no dropout"
    with pytest.raises(RuntimeError):
        poco.predict(model, opt, torch.ones(2, 99, dtype=torch.float64))
    assert equal(weights(model), before) and [module.training for module in model.modules()] == modes


# ---- mega-batches ------------------------------------------------------------------------------------------


def test_megabatches_come_every_so_often_after_the_burn_in() -> None:
    drawn = list(poco.megabatches("abcde", every=3, size=2, burn_in=2, epochs=2))
    assert [batch for batch, _ in drawn] == list("abcdeabcde")
    assert [step for step, (_, mega) in enumerate(drawn) if mega is not None] == [2, 5, 8]
    assert [mega for _, mega in drawn if mega is not None] == [["a", "b"], ["c", "d"], ["e", "a"]]


def test_a_mega_batch_is_shuffled_apart_from_the_mini_batches() -> None:
    torch.manual_seed(0)
    loader = DataLoader(list(range(12)), batch_size=2, shuffle=True)
    pairs = list(poco.megabatches(loader, every=6, size=6))
    mini = torch.cat([batch for batch, _ in pairs])
    mega = torch.cat(pairs[0][1])
    assert sorted(mini.tolist()) == sorted(mega.tolist()) == list(range(12))
    assert mini.tolist() != mega.tolist() and all(mega is None for _, mega in pairs[1:])


@pytest.mark.parametrize("choices", [{"every": 0}, {"size": 0}, {"burn_in": -1}, {"epochs": 0}, {"every": 1.5}])
def test_wrong_sizes_of_mega_batches_are_refused_at_once(choices: dict[str, Any]) -> None:
    (name,) = choices
    with pytest.raises(ValueError, match=f"{name}=.*give an integer, [01] or larger"):
        poco.megabatches("abc", **{"every": 1, "size": 1, **choices})


def test_a_loader_that_runs_dry_is_named() -> None:
    once = iter("abc")
    with pytest.raises(ValueError, match="loader: it gives no batches the second time"):
        list(poco.megabatches(once, every=1, size=5))
