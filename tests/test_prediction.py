"""Prediction: closed forms, one pass and loop, every optimizer, determinism, errors, nothing left changed."""

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
from optimizer_cases import OVER_A_BASE, SHELL, Task, equal, network, run, weights
from torch import Tensor, nn

import expfam_poco as poco

INPUTS = torch.linspace(-1.0, 1.0, 15, dtype=torch.float64).reshape(5, 3)


def trained(name: str, **choices: Any) -> tuple[nn.Module, Any]:
    """A network and its optimizer after a few steps."""
    model = network()
    opt: Any = SHELL[name](model.parameters(), **choices)
    run(opt, Task(model), 3)
    return model, opt


def linear(family: str = "diagonal_gaussian") -> tuple[nn.Module, Any]:
    """A line without bias whose q is known, wide."""
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    opt = poco.PosteriorCorrected(model.parameters(), family, lr=0.1, ess=4.0, hess_init=1.0, weight_decay=0.1, seed=1)
    for step in range(4):
        opt.step(Task(model, seed=step).closure(0))
    return model, opt


# ---- closed forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["diagonal_gaussian", "full_gaussian"])
def test_samples_of_a_linear_model_have_the_mean_and_variance_of_q(family: str) -> None:
    """outputs ~ N(x·m, xᵀΣx): the mean of K draws has variance v/K, their variance the variance 2v²/(K−1)."""
    model, opt = linear(family)
    (q,) = opt.posterior().values()
    mean = q.mean.reshape(3)
    covariance = q.covariance_matrix if family == "full_gaussian" else torch.diag(q.variance.reshape(3))
    draws = 800
    found = poco.predict_samples(model, opt, INPUTS, samples=draws).squeeze(-1)
    assert found.shape == (draws, 5)
    variance = torch.einsum("ni,ij,nj->n", INPUTS, covariance, INPUTS)
    assert ((found.mean(0) - INPUTS @ mean).abs() <= 4.0 * (variance / draws).sqrt()).all()
    assert ((found.var(0) - variance).abs() <= 4.0 * variance * math.sqrt(2.0 / (draws - 1))).all()
    torch.testing.assert_close(
        poco.predict(model, opt, INPUTS, samples=draws).squeeze(-1), found.mean(0), rtol=1e-12, atol=1e-14
    )


def test_entropy_of_known_probabilities() -> None:
    model, opt = linear()
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    found = poco.predict_classes(model, opt, INPUTS, samples=3, transform=lambda _: p.log())
    expected = torch.tensor([1.5 * math.log(2.0), 0.0, math.log(3.0)], dtype=torch.float64)
    torch.testing.assert_close(found.probabilities, p, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(found.entropy, expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(found.mutual_information, torch.zeros_like(expected), rtol=0.0, atol=1e-15)
    assert (found.mutual_information >= 0.0).all() and (found.entropy >= 0.0).all()


def test_mutual_information_of_a_posterior_with_two_points() -> None:
    """One Bernoulli weight w = ±1 and logits ±20w: each draw is certain, so all entropy is about the weight."""
    model = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    model.weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
    opt = poco.PosteriorCorrected(model.parameters(), "bernoulli", lr=0.01, ess=1.0, seed=1)
    inputs = torch.tensor([[20.0], [0.0]], dtype=torch.float64)
    found = poco.predict_classes(model, opt, inputs, samples=64, transform=lambda z: torch.cat([z, -z], -1))
    signs = poco.predict_samples(model, opt, inputs, samples=64)[:, 0, 0].sign()
    share = float((signs > 0).double().mean())
    assert 0.0 < share < 1.0
    entropy = -share * math.log(share) - (1 - share) * math.log1p(-share)
    assert abs(float(found.mutual_information[0]) - entropy) < 1e-12
    assert abs(float(found.probabilities[0, 0]) - share) < 1e-12
    assert abs(float(found.mutual_information[1])) < 1e-15 and abs(float(found.entropy[1]) - math.log(2.0)) < 1e-15


def test_classes_may_be_in_another_dimension_and_need_two() -> None:
    model, opt = linear()
    logits = torch.randn(4, 2, 3, dtype=torch.float64)
    first = poco.predict_classes(model, opt, INPUTS, samples=2, transform=lambda _: logits)
    second = poco.predict_classes(model, opt, INPUTS, samples=2, transform=lambda _: logits.mT, dim=1)
    torch.testing.assert_close(first.entropy, second.entropy, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(first.probabilities, second.probabilities.mT, rtol=1e-14, atol=0.0)
    for dim in (-1, 2, -3):
        with pytest.raises(ValueError, match=rf"dim={dim}: outputs of shape \(5, 1\) have no two classes"):
            poco.predict_classes(model, opt, INPUTS, dim=dim)


# ---- one pass and loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHELL)
def test_one_pass_and_loop_agree_for_every_optimizer(name: str) -> None:
    model, opt = trained(name)
    before = weights(model)
    loop, one = (poco.predict_samples(model, opt, INPUTS, samples=5, seed=3, batched=b) for b in (False, True))
    assert loop.shape == (5, 5, 1)
    torch.testing.assert_close(one, loop, rtol=1e-12, atol=1e-12)
    for number in range(5):
        with opt.sampled(3 + number), torch.no_grad():
            assert torch.equal(loop[number], model(INPUTS))
    for batched in (False, True, None):
        mean = poco.predict(model, opt, INPUTS, samples=5, seed=3, batched=batched)
        torch.testing.assert_close(mean, loop.mean(0), rtol=1e-12, atol=1e-12)
    assert equal(weights(model), before)


def test_convolutions_normalisation_frozen_and_tied_weights_run_in_one_pass() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(1, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.head = nn.Linear(4, 3)
            self.head.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(self.norm(self.convolution(x)).mean((2, 3))).tanh()))

    model = Net().double()
    opt = poco.IVON(model.parameters(), lr=0.1, ess=20.0, seed=1)
    x = torch.randn(6, 1, 5, 5, dtype=torch.float64)
    loop, one = (poco.predict_samples(model, opt, x, samples=4, batched=batched) for batched in (False, True))
    torch.testing.assert_close(one, loop, rtol=1e-12, atol=1e-12)
    assert loop.std(0).min() > 0.0
    model.requires_grad_(False)
    for batched in (False, True):
        found = poco.predict_samples(model, opt, x, samples=2, batched=batched)
        assert torch.equal(found[0], found[1])


def test_groups_of_several_families() -> None:
    model = network()
    groups = [
        {"params": [model[0].weight], "family": "bernoulli"},
        {"params": [model[0].bias, model[3].weight], "family": "full_gaussian"},
        {"params": [model[3].bias], "family": "diagonal_gaussian"},
    ]
    opt = poco.PosteriorCorrected(groups, "diagonal_gaussian", lr=0.01, ess=24.0, hess_init=2.0, seed=1)
    opt.step(Task(model).closure(0))
    loop, one = (poco.predict_samples(model, opt, INPUTS, samples=4, batched=batched) for batched in (False, True))
    torch.testing.assert_close(one, loop, rtol=1e-12, atol=1e-12)


class Fussy(nn.Module):
    """A model that looks at its numbers, which vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z if float(z.sum()) > 0 else -z


def test_a_model_that_vmap_cannot_run_is_looped_over() -> None:
    model = Fussy()
    opt = poco.IVON(model.parameters(), lr=0.1, ess=20.0, seed=1)
    assert torch.equal(poco.predict(model, opt, INPUTS), poco.predict(model, opt, INPUTS, batched=False))
    with pytest.raises(ValueError, match=r"batched=True: the model did not run under vmap .*give batched="):
        poco.predict(model, opt, INPUTS, batched=True)


def test_a_transform_that_uses_a_part_of_the_model_sees_the_same_draw() -> None:
    model, opt = trained("IVON")
    found = [
        poco.predict_samples(model, opt, INPUTS, samples=3, transform=lambda z: model[0].bias + 0 * z, batched=batched)
        for batched in (False, True)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert found[0].std(0).min() > 0.0


# ---- inputs and outputs ------------------------------------------------------------------------------------


class Output(NamedTuple):
    logits: Tensor


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, a: Tensor, b: Tensor) -> Output:
        return Output(self.layer(a + b))


@pytest.mark.parametrize("batched", [False, True, None])
def test_tuples_dictionaries_and_outputs_that_are_no_tensors(batched: bool | None) -> None:
    model = Sum()
    opt = poco.IVON(model.parameters(), lr=0.1, ess=20.0, seed=1)
    logits = {"transform": lambda output: output.logits, "batched": batched}
    first = poco.predict(model, opt, (INPUTS, 2 * INPUTS), **logits)
    second = poco.predict(model, opt, {"b": 2 * INPUTS, "a": INPUTS}, **logits)
    assert first.shape == (5, 2) and torch.equal(first, second)
    assert poco.predict_classes(model, opt, (INPUTS, INPUTS), **logits).probabilities.shape == (5, 2)
    for transform in (None, lambda output: [output]):
        with pytest.raises(TypeError, match=r"transform: .* returned a (Output|list), not a tensor; give a function"):
            poco.predict(model, opt, (INPUTS, INPUTS), transform=transform, batched=batched)


def test_means_of_whole_numbers_truth_values_and_half_precision() -> None:
    model, opt = linear()
    values = poco.predict_samples(model, opt, INPUTS, samples=9)
    positive = poco.predict(model, opt, INPUTS, samples=9, transform=lambda z: z > 0)
    torch.testing.assert_close(positive, (values > 0).float().mean(0))
    whole = poco.predict(model, opt, INPUTS, samples=9, transform=lambda z: (z > 0).long())
    assert torch.equal(whole, positive)
    half = poco.predict(model, opt, INPUTS, samples=9, transform=lambda z: z.bfloat16())
    assert torch.equal(half, (values.bfloat16().float().sum(0) / 9).bfloat16())


def test_no_draws_is_the_point() -> None:
    model, opt = trained("IVON")
    with torch.no_grad():
        output = model(INPUTS)
    assert torch.equal(poco.predict(model, opt, INPUTS, samples=0), output)
    assert torch.equal(poco.predict_samples(model, opt, INPUTS, samples=0), output[None])
    logits = {"samples": 0, "transform": lambda z: torch.cat([z, -z], -1)}
    assert torch.equal(poco.predict_classes(model, opt, INPUTS, **logits).mutual_information, torch.zeros(5).double())


# ---- determinism, and what is left behind ------------------------------------------------------------------


class Noisy(nn.Module):
    """Random also in evaluation mode, and it counts calls in buffers, once in place, once by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("others", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1.0
        self.others = self.others + 1.0
        return self.layer(x) + torch.rand(len(x), 1, dtype=torch.float64) + self.calls + self.others


def test_a_function_of_the_seed_alone_that_leaves_generators_and_buffers_alone() -> None:
    model = Noisy()
    opt = poco.IVON(model.parameters(), lr=0.1, ess=20.0, seed=1)
    state, calls, others = torch.get_rng_state(), model.calls, model.others
    first = poco.predict_samples(model, opt, INPUTS, samples=3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(poco.predict_samples(model, opt, INPUTS, samples=3, seed=5), first)
    assert not torch.equal(poco.predict_samples(model, opt, INPUTS, samples=3, seed=6), first)
    assert model.calls is calls and model.others is others and calls == 0.0 and others == 0.0
    with torch.no_grad(), opt.sampled(5):
        assert ((first[0] - model.layer(INPUTS) - 2.0).abs() <= 1.0).all(), "every draw starts from the same buffers"


@pytest.mark.parametrize("batched", [False, True, None])
def test_nothing_is_left_changed_also_when_the_model_raises(batched: bool | None) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    model[3].eval()
    opt = poco.IVON(model.parameters(), lr=0.1, ess=50.0, seed=1)
    (0.0 * model(INPUTS)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    before, buffers = weights(model), [b.clone() for b in model.buffers()]
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()

    def broken(_: Tensor) -> Tensor:
        model[1].running_mean += 1.0
        model.train()
        raise RuntimeError("broken")

    poco.predict(model, opt, INPUTS, samples=3, batched=batched)
    with pytest.raises(ValueError if batched else RuntimeError, match="broken"):
        poco.predict(model, opt, INPUTS, samples=3, transform=broken, batched=batched)
    assert equal(weights(model), before) and equal(list(model.buffers()), buffers)
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("one_pass", [False, True])
def test_training_continues_as_if_nobody_had_looked(one_pass: bool) -> None:
    model, opt = trained("IVONPoCo", one_pass=one_pass, backend="eager")
    twin = copy.deepcopy(model)
    other: Any = SHELL["IVONPoCo"](twin.parameters(), one_pass=one_pass, backend="eager")
    other.load_state_dict(opt.state_dict())
    for batched in (False, True):
        poco.predict_classes(model, opt, INPUTS, transform=lambda z: torch.cat([z, -z], -1), batched=batched)
    opt.step(Task(model).closure(0))
    other.step(Task(twin).closure(0))
    with opt.sampled(at_point=True), other.sampled(at_point=True):
        assert equal(weights(model), weights(twin))


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVER_A_BASE)
def test_an_optimizer_without_a_posterior_is_refused(name: str) -> None:
    model = network()
    for samples in (0, 4):
        with pytest.raises(TypeError, match="optimizer=AlphaSVRG: it has no posterior to draw from; call the model"):
            poco.predict(model, OVER_A_BASE[name](model.parameters()), INPUTS, samples=samples)  # type: ignore[arg-type]


def test_bad_arguments_name_themselves() -> None:
    model, opt = linear()
    for samples in (-1, 1.5, True, "many"):
        with pytest.raises(ValueError, match=r"samples=.*give an integer, 0 or larger"):
            poco.predict_samples(model, opt, INPUTS, samples=samples)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batched='yes': give True"):
        poco.predict(model, opt, INPUTS, batched="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer: it holds none of the model's parameters"):
        poco.predict(network(), opt, INPUTS)
    with pytest.raises(ValueError, match="seed"):
        poco.predict(model, opt, INPUTS, seed=-1)


# ---- what surrounds a prediction ---------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True, None])
@pytest.mark.parametrize("around", ["autocast", "cached", "inference_mode"])
def test_draws_differ_under_whatever_is_around_them(around: str, batched: bool | None) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    opt, x = poco.IVON(model.parameters(), lr=0.1, ess=64.0, seed=1), torch.randn(5, 4)
    opt.step(lambda: model(x).square().mean())
    expected = poco.predict_samples(model, opt, x, samples=4, batched=batched)
    contexts: dict[str, Any] = {
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "cached": torch.nn.utils.parametrize.cached(),
        "inference_mode": torch.inference_mode(),
    }
    with contexts[around]:
        before = model(x)
        found = poco.predict_samples(model, opt, x, samples=4, batched=batched)
        after = model(x)
    assert torch.equal(before, after)
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
    assert float(found.float().std(0).mean()) > 0.5 * float(expected.std(0).mean()) > 0.0


def test_a_model_with_statistics_from_training_is_reminded_once() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    opt, x = poco.IVON(model.parameters(), lr=0.1, ess=64.0), torch.randn(8, 2)

    def train() -> None:
        model.train()
        opt.step(lambda: model(x).square().mean())

    poco.predict(model, opt, x)  # nothing has been trained
    for _ in range(3):
        train()
    poco.recalibrate_batchnorm(model, [x])
    poco.predict(model, opt, x)
    other, restored = copy.deepcopy((model, opt))  # as after loading: not known to be recalibrated
    poco.predict(other, restored, x)
    train()
    with pytest.warns(UserWarning, match="call poco.recalibrate_batchnorm"):
        poco.predict(model, opt, x)
    poco.predict(model, opt, x)
