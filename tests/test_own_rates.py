"""A rate of its own for every weight (`square_momentum`) and a KL of its own weight: what a step then is."""

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from optimizer_cases import Task, equal, network, run, weights
from sklearn.datasets import load_digits
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco import blr
from expfam_poco.families import Bernoulli, Categorical
from expfam_poco.tools.few_levels import few_levels

F64 = torch.float64
ZERO = {"curvature": "straight_through", "noise": "zero", "beta1": 0.9, "seed": 0}


def theta(opt: Any) -> Tensor:
    """λ of the only parameter."""
    return opt.posterior_states()["w"].theta


@pytest.mark.parametrize("squares", [0.0, 0.9])
def test_a_step_is_the_proximal_one_with_the_weight_s_own_reach(squares: float) -> None:
    """N ĝ + λ′ − λ₀ + (λ′ − λ)/ρ = 0 with ρ = r/(N √v̂)."""
    generator = torch.Generator().manual_seed(0)
    lam, lam0, gradient, before = torch.randn(4, 50, generator=generator, dtype=F64)
    family, rate, ess, step = Bernoulli(), 0.3, 40.0, 7
    state = blr.BLRState(family.State(lam), (torch.zeros_like(lam), before**2))
    moved = blr.update(
        family, state, family.State(lam0), family.Site(gradient), rates=(rate,), ess=ess, squares=squares,
        unsquare=1.0 - squares**step,
    )  # fmt: skip
    square = (squares * before**2 + (1.0 - squares) * gradient**2) / (1.0 - squares**step)
    reach = rate / (ess * square.sqrt())
    new = moved.posterior.theta
    torch.testing.assert_close(ess * gradient + new - lam0, (lam - new) / reach, rtol=1e-10, atol=1e-9)
    assert torch.equal(moved.momentum[1], squares * before**2 + (1.0 - squares) * gradient**2)


def test_far_from_the_prior_it_is_adam_on_lambda() -> None:
    """torch's own Adam on latent weights with gradients at their signs gives the same λ."""
    generator = torch.Generator().manual_seed(1)
    x, start = torch.randn(32, 6, generator=generator, dtype=F64), torch.randn(6, generator=generator, dtype=F64)
    y = x @ torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0], dtype=F64)
    weight, latent = nn.Parameter(start.clone()), nn.Parameter(3.0 * start.sign())
    opt = poco.BayesBiNN([("w", weight)], lr=2e-3, ess=1e13, strength=3.0, **ZERO)
    adam = torch.optim.Adam([latent], lr=0.2, betas=(0.9, 0.999), eps=0.0)
    for t in range(60):
        rows = slice(8 * (t % 4), 8 * (t % 4) + 8)
        opt.step(lambda rows=rows: (x[rows] @ weight - y[rows]).square().mean())
        sign = latent.detach().sign().requires_grad_()
        (latent.grad,) = torch.autograd.grad((x[rows] @ sign - y[rows]).square().mean(), sign)
        adam.step()
    torch.testing.assert_close(theta(opt), latent.detach(), rtol=1e-8, atol=1e-8)
    assert not torch.equal(weight.sign(), start.sign())  # something has flipped


def test_a_factor_on_the_loss_changes_nothing_and_one_rate_for_all_does() -> None:
    def trained(factor: float, **choices: Any) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False)).double()
        x, y = torch.randn(40, 5, dtype=F64), torch.randn(40, 1, dtype=F64)
        opt = poco.BayesBiNN(model.named_parameters(), **{"ess": 1e25, "seed": 0, **choices})
        for _ in range(30):
            opt.step(lambda: factor * (model(x) - y).square().mean())
        return torch.cat([state.theta.flatten() for state in opt.posterior_states().values()])

    torch.testing.assert_close(trained(1.0), trained(1e3), rtol=1e-6, atol=1e-6)
    one = {"square_momentum": None, "lr": 1e-2, "ess": 40.0}
    assert (trained(1.0, **one) - trained(1e3, **one)).abs().max() > 1.0


def test_a_weight_without_any_gradient_goes_to_its_prior_and_no_step_is_not_finite() -> None:
    weight = nn.Parameter(torch.ones(3))
    opt = poco.BayesBiNN([("w", weight)], ess=10.0, beta1=0.0, curvature="straight_through", noise="zero", seed=0)
    opt.step(lambda: (weight * torch.tensor([1.0, 0.0, -1.0])).sum())
    moved = theta(opt)
    assert moved[1] == 0.0 and 0.0 < moved[0] < 10.0 < moved[2]
    opt.param_groups[0]["lr"] = 0.0
    opt.step(lambda: (weight * torch.tensor([1.0, 0.0, -1.0])).sum())
    assert torch.equal(theta(opt), moved)


def test_fixed_points_are_those_of_the_objective() -> None:
    """For a linear loss N ⟨c, θ⟩ + T KL the optimum is λ₀ − N c/T, whatever the rates; it is reached, and kept."""
    slope, weight = torch.tensor([0.02, -0.01, 0.005], dtype=F64), nn.Parameter(torch.ones(3, dtype=F64))
    opt = poco.BayesBiNN([("w", weight)], lr=5e-3, ess=10.0, kl_weight=0.5, **{**ZERO, "beta1": 0.0})
    for _ in range(300):
        opt.step(lambda: (weight * slope).sum())
    torch.testing.assert_close(theta(opt), -10.0 * slope / 0.5, rtol=1e-8, atol=1e-10)


def test_a_weight_of_several_numbers_has_one_rate() -> None:
    """Of levels −1, 0, 1 the natural gradient at straight-through draws is (1, 2) ∇ℓ: the step keeps that ratio."""
    weight = nn.Parameter(torch.tensor([0.4, -0.9]))
    opt = poco.PosteriorCorrected(
        [("w", weight)], Categorical(), lr=0.1, ess=1e12, curvature="straight_through", noise="zero", alpha=0.0,
        square_momentum=0.99,
    )  # fmt: skip
    before = Categorical().centred_at(weight.detach().clone()).level
    opt.step(lambda: (weight * torch.tensor([5.0, 1e-3])).sum())
    step = opt.posterior_states()["w"].level - before
    torch.testing.assert_close(step[:, 1], 2.0 * step[:, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(step[0], step[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bernoulli", "diagonal_gaussian", "gamma"])
def test_the_kl_weight_is_the_inverse_of_a_factor_on_ess(family: str) -> None:
    found = []
    for choices in ({"ess": 6.0, "kl_weight": 0.25}, {"ess": 24.0}):
        model = network()
        if family == "gamma":
            for p in model.parameters():
                p.data.abs_().add_(0.1)
        opt = poco.PosteriorCorrected(model.parameters(), family, 0.01, weight_decay=0.1, seed=1, **choices)
        run(opt, Task(model), 6)
        found.append((weights(model), opt.objective(Task(model).chunks())))
    (first, colder), (second, plain) = found
    assert equal(first, second)
    assert colder.elbo == pytest.approx(0.25 * plain.elbo, rel=1e-9)


def test_averages_follow_the_group_s_choice() -> None:
    model = network()
    opt = poco.BayesBiNN(model.parameters(), ess=24.0, seed=1)
    group, first = opt.param_groups[0], next(model.parameters())
    run(opt, Task(model), 3)
    assert len(opt.state[first]["momentum"]) == 2 and opt.state[first]["step"] == 3
    group["square_momentum"] = None
    run(opt, Task(model), 1, start=3)
    assert len(opt.state[first]["momentum"]) == 1 and opt.state[first]["step"] == 4
    group["square_momentum"] = 0.99
    run(opt, Task(model), 1, start=4)
    assert len(opt.state[first]["momentum"]) == 2 and opt.state[first]["step"] == 1


def test_the_next_task_s_prior_counts_in_full_where_rates_are_the_weights_own() -> None:
    model = network(torch.float32)
    groups: list[dict[str, Any]] = [{"params": [p]} for p in model.parameters()]
    groups[1]["square_momentum"] = None
    opt = poco.BayesBiNN(groups, ess=24.0, kl_weight=0.01, seed=1)
    run(opt, Task(model), 3)
    opt.next_task()
    assert [group["kl_weight"] for group in opt.param_groups] == [1.0, 0.01, 1.0, 1.0]
    opt.next_task(kl_weight=0.5)
    assert opt.param_groups[0]["kl_weight"] == 0.5
    with pytest.raises(ValueError, match=r"^kl_weight=0\.0: "):
        opt.next_task(kl_weight=0.0)


def test_the_published_recipe_is_a_constructor() -> None:
    given = {"temperature": 0.5, "seed": 3}
    found = []
    for make in (poco.BayesBiNN.as_published, poco.BayesBiNN):
        model = network()
        own = {} if make is not poco.BayesBiNN else {"square_momentum": None, "strength": 10.0, "curvature": "relaxed"}
        opt = make(model.parameters(), 0.01, 24.0, **own, **given)
        run(opt, Task(model), 5)
        found.append(weights(model))
        group = opt.param_groups[0]
        assert (group["kl_weight"], group["lr_convention"], group["square_momentum"]) == (1.0, 1.0, None)
    assert equal(*found)


def test_refusals_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"^square_momentum=0\.9: DiagonalGaussian scales its steps by its own"):
        poco.IVON(network().parameters(), 0.1, 24.0, square_momentum=0.9)
    with pytest.raises(ValueError, match=r"^square_momentum=1\.0: it must be a number in \[0, 1\), or None"):
        poco.BayesBiNN(network().parameters(), ess=24.0, square_momentum=1.0)
    with pytest.raises(ValueError, match=r"^kl_weight=0: it must be a positive finite number"):
        poco.BayesBiNN(network().parameters(), ess=24.0, kl_weight=0)
    with pytest.raises(ValueError, match=r"^ess=nan: it must be a positive number, usually the number of examples"):
        poco.BayesBiNN(network().parameters())


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 8.0 - 1.0, torch.tensor(data.target)


def trained_on(model: nn.Module, opt: Any, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        rows = torch.randint(len(y), (50,))
        opt.step(lambda rows=rows: nn.functional.cross_entropy(model(x[rows]), y[rows]))


def test_a_network_without_any_normalisation_trains_with_the_defaults() -> None:
    """Its first losses are some hundreds, and kill its units where one rate is for all weights."""
    x, y = digits()
    found = {}
    for name, choices in (("own", {}), ("one", {"square_momentum": None, "lr": 3e-3})):
        torch.manual_seed(0)
        sizes = (64, 128, 128, 10)
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(*layers[:-1])
        with pytest.warns(UserWarning, match="have no normalisation after them"):
            groups = poco.binarize_groups(model)
        opt = poco.BayesBiNN(groups, ess=1200.0, seed=0, **choices)  # type: ignore[arg-type]
        trained_on(model, opt, x[:1200], y[:1200], 200)
        found[name] = float((model(x[1200:]).argmax(-1) == y[1200:]).float().mean())
    assert found["own"] > 0.75 and found["one"] < 0.2  # chance is 0.1


def test_steps_are_shorter_where_nothing_normalises_and_scales_are_of_own_rates_alone() -> None:
    layers = [nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20)]
    found = {}
    for name, model in (("plain", nn.Sequential(*layers)), ("normalised", nn.Sequential(*layers, nn.BatchNorm1d(20)))):
        with warnings.catch_warnings():
            warnings.simplefilter("error" if name == "normalised" else "ignore")
            groups = [poco.binarize_groups(model, levels=levels) for levels in (None, None, (-1, 0, 1), (-1, 0, 1))]
        own = [poco.BayesBiNN(g, ess=10.0).param_groups[0] for g in groups[::2]]
        one = [poco.BayesBiNN(g, 0.1, 10.0, square_momentum=None).param_groups[0] for g in groups[1::2]]
        assert [group["lr_convention"] for group in one] == [1.0, 1.0]
        assert all(type(group["lr_convention"]) is float for group in own)
        found[name] = [group["lr_convention"] for group in own]
    assert found["plain"][0] == 30.0 and found["normalised"][0] == 100.0 and found["plain"][1] == found["normalised"][1]
    kept = poco.BayesBiNN([{"params": [nn.Parameter(torch.ones(2))], "lr_convention": 5.0}], 0.1, 10.0,
                          square_momentum=None)  # fmt: skip
    assert kept.param_groups[0]["lr_convention"] == 5.0


@pytest.mark.parametrize("levels", [(-1.0, 0.0, 1.0), torch.linspace(-3.0, 3.0, 16).tolist()])
def test_a_step_of_few_levels_moves_the_grid_s_gaussian_by_its_reach(levels: Any) -> None:
    """λ stays that of a Gaussian on the grid, whose mean has moved by 0.03 of half the range at the first step."""
    half, start = 0.5 * (levels[-1] - levels[0]), torch.tensor([0.11, -0.32, 0.05], dtype=F64)
    weight = nn.Parameter(half * start)
    group = {"params": [("w", weight)], **few_levels(levels), "curvature": "straight_through"}
    opt = poco.BayesBiNN([group], ess=1e12, beta1=0.0, noise="zero", seed=0)
    family = opt.param_groups[0]["family"]
    opt.step(lambda: (weight * torch.tensor([5.0, -1e-3, 0.1], dtype=F64)).sum())
    expected = family.centred_at(half * (start - 0.03 * torch.tensor([1.0, -1.0, 1.0], dtype=F64))).level
    torch.testing.assert_close(opt.posterior_states()["w"].level, expected, rtol=1e-6, atol=1e-6)


def test_levels_that_are_no_grid_are_refused() -> None:
    for levels in ((-1.0, 0.0, 3.0), (1.0,), (1.0, 0.0)):
        with pytest.raises(ValueError, match=r"^levels="):
            few_levels(levels)


def test_a_next_task_with_the_defaults_forgets_less() -> None:
    """Digits 0 to 4, then 5 to 9, by the same five outputs."""
    x, y = digits()
    found = {}
    for use in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 5, bias=False)
        )
        model.append(nn.BatchNorm1d(5))
        opt = poco.BayesBiNN(poco.binarize_groups(model), lr=1e-2, ess=600.0, seed=0)
        for first in (True, False):
            part = (y < 5) if first else (y >= 5)
            if not first and use:
                opt.next_task()
            trained_on(model, opt, x[part], y[part] % 5, 100)
        old = y < 5
        poco.recalibrate_batchnorm(model, [x[old]])
        found[use] = float((model.eval()(x[old]).argmax(-1) == y[old]).float().mean())
    assert found[True] > found[False] + 0.2


def test_a_rate_of_zero_without_any_gradient_is_no_step() -> None:
    """As in a warm-up from 0 over inputs that are always 0."""
    family = poco.resolve_family("bernoulli")
    direction = family.Site(torch.tensor([10.0, 10.0]))
    found = poco.blr.own_rates(family, direction, {"theta": torch.tensor([0.0, 1.0])}, (0.0,), ess=10.0).theta
    assert bool(torch.isfinite(found).all()) and bool((0.0 * found == 0.0).all())
    model = torch.nn.Linear(4, 2)
    optimizer = poco.BayesBiNN(poco.binarize_groups(model), ess=10.0, lr=0.0)
    optimizer.step(lambda: model(torch.tensor([[0.0, 1.0, 2.0, 0.0]])).square().mean())


def test_few_levels_without_own_rates_have_none_of_their_numbers() -> None:
    group = poco.binarize_groups(torch.nn.Linear(20, 3), levels=(-1.0, 0.0, 1.0))
    one = poco.BayesBiNN(group, ess=100.0, square_momentum=None).param_groups[0]
    own = poco.BayesBiNN(group, ess=100.0).param_groups[0]
    assert (one["kl_weight"], one["lr_convention"]) == (1.0, 1.0) and own["kl_weight"] == 1e-4
