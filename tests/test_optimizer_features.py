"""The posterior from outside (draws, names, stored ones, priors), schedules, clipping, groups, per-example noise."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import SHELL, Task, equal, flat, network, run, weights
from torch import Tensor, nn

import expfam_poco as poco

every_shell = pytest.mark.parametrize("name", SHELL)


def prepared(name: str, steps: int = 6, **choices: Any) -> tuple[nn.Module, Any, Task]:
    model = network()
    opt: Any = SHELL[name](model.named_parameters(), **choices)
    task = Task(model)
    run(opt, task, steps)
    return model, opt, task


def ivon(model: nn.Module, **choices: Any) -> Any:
    settings = {"lr": 0.1, "ess": 200.0, "beta2": 0.99, "seed": 3}
    return poco.IVONPoCoMo(model.named_parameters(), **{**settings, **choices})


# ---- draws, names and values -------------------------------------------------------------------------------


@every_shell
def test_sampled_weights_inside_the_point_outside(name: str) -> None:
    model, opt, task = prepared(name)
    point = weights(model)
    with opt.sampled(seed=4):
        first = weights(model)
    assert equal(weights(model), point) and not equal(first, point)
    states = opt.posterior_states()
    with opt.sampled(seed=5):
        inside = opt.posterior_states()
        assert all(equal(inside[key], states[key]) for key in states), "a draw was taken for the mean"
        assert not equal(weights(model), first)
    with opt.sampled(seed=4):
        assert equal(weights(model), first), "one seed, one draw"
    with opt.sampled():
        own = weights(model)
    with opt.sampled():
        assert not equal(weights(model), own), "the next of the optimizer's own draws"
    with opt.sampled(at_point=True):
        assert equal(weights(model), point)
    with pytest.raises(RuntimeError, match="inside"), opt.sampled():
        raise RuntimeError("inside")
    assert equal(weights(model), point) and all(p.grad is None for p in model.parameters())
    assert all(math.isfinite(loss) for loss in run(opt, task, 2, start=6))


# Of every family: draws depend on nothing else of an optimizer.
@pytest.mark.parametrize(
    "name", ["SVRG", "VSGDPoCo", "VONPoCo", "IVONPoCoMo", "BayesBiNNPoCo", "full-reparam", "bernoulli-mean"]
)
def test_draws_come_from_the_posterior(name: str) -> None:
    """Means and standard deviations of 400 draws, every weight within five standard errors."""
    model, opt, _ = prepared(name)
    draws = []
    for seed in range(400):
        with opt.sampled(seed=seed):
            draws.append(flat(model.parameters()))
    seen = torch.stack(draws)
    distributions = opt.posterior().values()
    mean = torch.cat([d.mean.reshape(-1) for d in distributions])
    variance = torch.cat([d.variance.reshape(-1) for d in distributions])
    assert ((seen.mean(0) - mean).abs() <= 5 * (variance / 400).sqrt() + 1e-12).all()
    unclear = variance > 0.05  # of a ±1 weight, whose rarer value may not have been seen
    assert (((seen.var(0) / variance).log().abs() < 0.6) | ~unclear | (variance < 1e-9)).all()


@every_shell
def test_the_posterior_has_the_parameters_names_and_shapes(name: str) -> None:
    model, opt, _ = prepared(name)
    states, distributions = opt.posterior_states(), opt.posterior()
    assert states.keys() == distributions.keys()
    parameters = dict(model.named_parameters())
    family = opt.param_groups[0]["family"]
    expected = {"group0": flat(model.parameters())} if family.joint else parameters
    assert list(states) == list(expected)
    for key, weight in expected.items():
        distribution, state = distributions[key], states[key]
        assert distribution.batch_shape == () and distribution.event_shape == weight.shape
        assert torch.equal(family.point(state), weight)
        value = distribution.sample((3,))
        own = family.log_prob(state, value)
        total = own.flatten(1).sum(1) if own.ndim > 1 else own
        torch.testing.assert_close(distribution.log_prob(value), total, rtol=1e-9, atol=1e-9)
    if not family.joint:
        unnamed = SHELL[name](network().parameters()).posterior_states()
        assert list(unnamed) == [f"group0.param{i}" for i in range(4)]


@every_shell
def test_weights_written_from_outside_move_the_mean(name: str) -> None:
    model, opt, task = prepared(name)
    other, _, _ = prepared(name, 9, seed=50)
    before = opt.posterior_states()
    model.load_state_dict(other.state_dict())
    after = opt.posterior_states()
    family = opt.param_groups[0]["family"]
    found = torch.cat([family.point(state).reshape(-1) for state in after.values()])
    torch.testing.assert_close(found, flat(other.parameters()), rtol=1e-14, atol=1e-14)
    for old, new in zip(before.values(), after.values(), strict=True):
        for field in set(type(old)._fields) - {"mean", "theta"}:
            assert torch.equal(getattr(old, field), getattr(new, field)), "only the mean moves"
    assert all(math.isfinite(loss) for loss in run(opt, task, 3, start=6))


def test_weights_written_from_outside_keep_the_float32_mean_of_the_others() -> None:
    model = network(torch.bfloat16)
    opt = ivon(model)
    run(opt, Task(model), 5)
    before = opt.posterior_states()
    with torch.no_grad():
        model[0].weight[0, 0] += 1.0
    after = opt.posterior_states()
    moved = after["0.weight"].mean - before["0.weight"].mean
    assert abs(float(moved[0, 0]) - 1.0) < 0.02 and int((moved != 0).sum()) == 1
    assert all(equal(after[key], before[key]) for key in before if key != "0.weight")


# ---- q_out from a stored posterior -------------------------------------------------------------------------


@every_shell
def test_set_outer_from_states_or_a_state_dict_is_the_same(name: str) -> None:
    results = []
    for source in ("posterior_states", "state_dict"):
        _, teacher, _ = prepared(name, 9, seed=70)
        model, opt, task = prepared(name, 0, anchor="curvature", alpha=0.8)
        if teacher.state_dict()["poco"]["settings"] != opt.state_dict()["poco"]["settings"]:
            _, teacher, _ = prepared(name, 9, seed=70, anchor="curvature")
        before = weights(model)
        opt.set_outer(getattr(teacher, source)())
        assert equal(weights(model), before)
        losses = run(opt, task, 4, refresh_every=99)
        results.append([*losses, *(v for s in opt.posterior_states().values() for v in s)])
    assert equal(*results)
    _, opt, task = prepared(name, 0, anchor="curvature", alpha=0.8)
    losses = run(opt, task, 4, refresh_every=99)
    plain = [*losses, *(v for s in opt.posterior_states().values() for v in s)]
    assert not equal(plain, results[0]), "q_out changed nothing"


def test_set_outer_converts_to_the_models_dtype_and_refuses_what_does_not_fit() -> None:
    teacher, model = network(), network(torch.float32)
    states = ivon(teacher).posterior_states()
    opt = ivon(model, alpha=0.5)
    opt.set_outer(states)
    run(opt, Task(model), 3, refresh_every=99)
    assert {v.dtype for state in opt.posterior_states().values() for v in state} == {torch.float32}
    first = next(iter(states))
    wrong = [
        {key: value for key, value in states.items() if key != first},
        {**states, first: states[first]._replace(mean=torch.zeros(2))},
        {**states, first: states[first]._replace(precision=states[first].precision * math.nan)},
        {**states, first: states[first].mean},
        ivon(nn.Linear(3, 2)).state_dict(),
    ]
    before = opt.state_dict()["state"][0]["memory"]["site"]["gradient"].clone()
    for value in wrong:
        with pytest.raises(ValueError, match=r"0\.weight|group0|parameters, the optimizer has"):
            opt.set_outer(value)
    assert torch.equal(opt.state_dict()["state"][0]["memory"]["site"]["gradient"], before)


@pytest.mark.parametrize("family", ["diagonal_gaussian", "full_gaussian"])
def test_at_a_fixed_point_set_outer_knows_the_mean_natural_gradient(family: str) -> None:
    """There ∇̃KL + N ḡ = 0, so that the stored posterior alone gives what a pass over the data would measure."""
    model = nn.Linear(3, 1, dtype=torch.float64)
    task = Task(model)

    def make() -> Any:
        return poco.PosteriorCorrected(
            model.parameters(), family, lr=0.3, ess=24.0, weight_decay=0.05, hess_init=1.0, curvature="exact",
            noise="zero", alpha=1.0,
        )  # fmt: skip

    def everything() -> Tensor:
        logits = torch.cat([task.model(x) for x in task.x])
        return nn.functional.binary_cross_entropy_with_logits(logits, (torch.cat(task.y) > 0).double())

    opt = make()
    for _ in range(300):
        opt.step(everything)
    opt.refresh([everything])
    measured = [s["memory"]["site"] for s in opt.state_dict()["state"].values() if s]
    opt.set_outer(opt.posterior_states())
    stored = [s["memory"]["site"] for s in opt.state_dict()["state"].values() if s]
    for one, other in zip(measured, stored, strict=True):
        for field in ("gradient", "curvature"):
            torch.testing.assert_close(one[field], other[field], rtol=0.0, atol=1e-9)
            assert float(other[field].abs().max()) > 1e-3
    before = weights(model)
    opt.step(everything)
    torch.testing.assert_close(flat(model.parameters()), flat(before), rtol=0.0, atol=1e-9)


# ---- refreshing, alpha, the prior, clipping ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["SVRG", "VSGDPoCo", "VONPoCo", "IVONPoCo", "bernoulli-relaxed"])
def test_unequal_chunks_with_weights_are_one_large_batch(name: str) -> None:
    """With one noise for all chunks; without weights the mean of means is another."""
    results = {}
    for kind in ("whole", "weighted", "unweighted"):
        model, opt, task = prepared(name, 0, noise="fixed", alpha=1.0)
        x, y = torch.cat(task.x), torch.cat(task.y)

        def part(rows: slice, model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Callable[[], Tensor]:
            return lambda: 0.5 * (model(x[rows]) - y[rows]).square().mean()

        cuts = [slice(0, 2), slice(2, 13), slice(13, 24)]
        for _ in range(2):
            if kind == "whole":
                opt.refresh([part(slice(0, 24))])
            else:
                opt.refresh([part(cut) for cut in cuts], [2, 11, 11] if kind == "weighted" else None)
            run(opt, task, 3, refresh_every=99)
        results[kind] = torch.cat([value.reshape(-1) for s in opt.posterior_states().values() for value in s])
    torch.testing.assert_close(results["weighted"], results["whole"], rtol=1e-11, atol=1e-12)
    assert float((results["unweighted"] - results["whole"]).abs().max()) > 1e-4


def test_alpha_as_number_pair_schedule_and_burn_in() -> None:
    def trained(alpha: Any, steps: int = 12) -> list[Tensor]:
        model = network()
        opt = ivon(model, alpha=alpha)
        run(opt, Task(model), steps)
        return [*weights(model), *(v for s in opt.posterior_states().values() for v in s)]

    constant = trained(0.7)
    assert equal(trained((0.7, 0.7)), constant) and equal(trained(lambda step: 0.7), constant)
    assert equal(trained(lambda step: (0.7, 0.7)), constant) and equal(trained(poco.BurnIn(0, 0.7)), constant)
    assert not equal(trained((0.7, 0.0)), constant) and not equal(trained((0.0, 0.7)), constant)
    assert equal(trained(poco.BurnIn(10, 0.7), 10), trained(0.0, 10))
    assert not equal(trained(poco.BurnIn(10, 0.7), 11), trained(0.0, 11))
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.5

    trained(schedule, 6)
    assert sorted(set(asked)) == [1, 2, 3, 4, 5, 6]


def test_alpha_out_of_range_is_refused_when_a_schedule_gives_it() -> None:
    model = network()
    opt = ivon(model, alpha=lambda step: 0.5 * step)
    task = Task(model)
    run(opt, task, 2)
    before = weights(model)
    with pytest.raises(ValueError, match=r"alpha=1\.5: give a number between 0 and 1"):
        opt.step(task.closure(0))
    assert equal(weights(model), before)


@every_shell
def test_a_prior_in_place_of_weight_decay(name: str) -> None:
    """The same prior given as a State, with fields that broadcast, and by parameter name."""

    def trained(**choices: Any) -> list[Tensor]:
        model, opt, _ = prepared(name, 7, **choices)
        return [*weights(model), *(v for s in opt.posterior_states().values() for v in s)]

    _, opt, _ = prepared(name, 1)
    (group,) = opt.param_groups
    family = group["family"]
    strength = group["ess"] * group["weight_decay"]
    priors = {
        key: family.centred_at(torch.zeros_like(family.point(state)), strength)
        for key, state in opt.posterior_states().items()
    }
    plain = trained()
    assert equal(trained(prior=priors), plain)
    if not family.joint:
        assert equal(trained(prior=family.centred_at(torch.zeros((), dtype=torch.float64), strength)), plain)
    elsewhere = {
        key: family.centred_at(torch.ones_like(family.point(s)), 3.0) for key, s in opt.posterior_states().items()
    }
    assert not equal(trained(prior=elsewhere), plain)
    with pytest.raises(ValueError, match=r"prior\['misspelled'\]: no such parameter"):
        prepared(name, 0, prior={**priors, "misspelled": next(iter(priors.values()))})


def test_a_prior_pulls_to_its_own_mean() -> None:
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    family = poco.resolve_family("diagonal_gaussian")
    target = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    opt = poco.PosteriorCorrected(
        [w], family, lr=0.5, ess=10.0, prior=family.centred_at(target, 4.0), hess_init=1.0, curvature="exact", seed=0
    )
    for _ in range(60):
        opt.step(lambda: 0.0 * w.sum())
    (state,) = opt.posterior_states().values()
    torch.testing.assert_close(state.mean, target, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(state.precision, torch.full_like(target, 4.0), rtol=1e-10, atol=0.0)


def test_clipping_acts_on_the_corrected_gradient_of_all_groups_together() -> None:
    """SVRG on quadratics ½ k ‖w − c‖², written out: every single gradient is far longer than the limit."""
    a, b = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    opt = poco.SVRG([{"params": [a]}, {"params": [b]}], lr=0.1, max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(0)
    stiffness = 5.0 + 5.0 * torch.rand(4, generator=generator, dtype=torch.float64)
    centres = 9.0 + torch.randn(4, 4, generator=generator, dtype=torch.float64)

    def closure(i: int) -> Callable[[], Tensor]:
        return lambda: 0.5 * stiffness[i] * (torch.cat([a, b]) - centres[i]).square().sum()

    def gradient(i: int, at: Tensor) -> Tensor:
        return stiffness[i] * (at - centres[i])

    w = torch.zeros(4, dtype=torch.float64)
    lengths = []
    for step in range(240):
        if step % 10 == 0:
            opt.refresh([closure(i) for i in range(4)])
            outer, mean = w, torch.stack([gradient(i, w) for i in range(4)]).mean(0)
        i = step % 3
        opt.step(closure(i))
        g = gradient(i, w) - gradient(i, outer) + mean
        lengths.append(float(g.norm()))
        w = w - 0.1 * g / max(1.0, lengths[-1])
        torch.testing.assert_close(torch.cat([a, b]).detach(), w, rtol=0.0, atol=1e-11)
        assert step > 100 or min(float(gradient(i, point).norm()) for point in (w, outer)) > 10.0
    assert lengths[0] > 10.0 > 1.0 > lengths[-1], "clipped at first, not at the end"


def test_groups_of_different_families() -> None:
    """Bernoulli weights beside Gaussian ones, diagonal and full, each with its own estimator."""

    def make() -> tuple[nn.Module, Any]:
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        for number, p in enumerate(model.parameters()):
            nn.init.normal_(p, 0.0, 0.5, torch.Generator().manual_seed(number))
        groups = [
            {"params": list(model[0].named_parameters(prefix="0")), "family": "bernoulli", "lr": 0.003},
            {"params": list(model[2].named_parameters(prefix="2")), "curvature": "hutchinson"},
            {"params": list(model[4].named_parameters(prefix="4")), "family": "full_gaussian", "curvature": "exact"},
        ]
        opt = poco.PosteriorCorrected(
            groups, "diagonal_gaussian", lr=0.03, ess=100.0, hess_init=2.0, weight_decay=0.01, seed=0
        )
        return model, opt

    model, opt = make()
    task = Task(model)
    losses = torch.stack([loss for loss in run(opt, task, 80) if loss.ndim == 0])
    assert losses[-20:].mean() < 0.8 * losses[:20].mean()
    assert list(opt.posterior()) == ["0.weight", "0.bias", "2.weight", "2.bias", "group2"]
    assert (model[0].weight.abs() == 1.0).all()
    numbers = opt.diagnostics()
    assert {"alpha.group0", "alpha.group1", "alpha.group2", "variance_ratio.theta"} <= numbers.keys()
    saved = {"model": model.state_dict(), "opt": opt.state_dict()}
    other, resumed = make()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    assert equal(run(resumed, Task(other), 5, start=80), run(opt, task, 5, start=80))
