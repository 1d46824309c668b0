"""Corrections: their laws, what breaks a law, and the built-in ones against the algorithms that they stand for."""

import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from backend_cases import distance, numbers, trained
from broken_corrections import BROKEN
from optimizer_cases import not_looking, shell
from torch import Tensor

import expfam_poco as poco
from expfam_poco import blr, correction
from expfam_poco.checks import check_correction
from expfam_poco.correction import CORRECTIONS, Correction, Recursive, Snapshot, Stored, Transported, resolve_correction
from expfam_poco.family import fields

NAMES = list(CORRECTIONS)
FAMILIES = ["diagonal_gaussian", "full_gaussian", "isotropic_gaussian", "bernoulli", "gamma"]


@pytest.mark.parametrize("name", NAMES)
def test_every_correction_keeps_the_laws(name: str) -> None:
    assert check_correction(name).passed


@pytest.mark.parametrize("broken, law", BROKEN, ids=lambda value: value if isinstance(value, str) else repr(value))
def test_every_law_is_needed(broken: Correction, law: str) -> None:
    with pytest.raises(poco.LawError) as caught:
        check_correction(broken, ["diagonal_gaussian"])
    assert caught.value.report.failures[0].name == law
    assert f"breaks the law {law!r}" in str(caught.value)


def test_corrections_by_name_class_and_object() -> None:
    assert (
        resolve_correction("snapshot") == resolve_correction(Snapshot) == resolve_correction(Snapshot()) == Snapshot()
    )
    with pytest.raises(ValueError, match=r"correction='sarah' is unknown; give one of 'none', .*'transported'"):
        resolve_correction("sarah")
    with pytest.raises(TypeError, match="neither a name nor a Correction"):
        resolve_correction(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("gamma", [-0.1, 1.5, float("nan"), True, "half"])
def test_gamma_outside_its_range_is_one_sentence(gamma: Any) -> None:
    with pytest.raises(ValueError, match=r"^gamma=.*\[0, 1\].*\.$"):
        Transported(gamma)


# ---- pure functions ------------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """One step: λ before it, where it was evaluated, the corrected natural gradient, and the state after it."""

    state: Any
    at: Any
    found: Any
    after: blr.BLRState


def walk(
    chosen: Correction,
    family: Any,
    start: Any,
    prior: Any,
    site: Callable[[Any, int], Any],
    *,
    steps: int,
    rates: Any,
    ess: float,
    alpha: float = 1.0,
    momentum: float = 0.0,
    debias: bool = True,
    share: float | None = None,
    refresh: Callable[[Any, int], Any] = lambda state, t: None,
) -> Iterator[Trace]:
    """Training by the pure functions; `refresh` gives a mega-batch's mean before step t, or None; `share` fixes w."""
    now, memory, known = blr.BLRState(start, ()), chosen.begin(family, start), False
    for t in range(1, steps + 1):
        mean = refresh(now.posterior, t)
        if mean is not None:
            how = correction.Averaging(family.per_block(0.0, 0.0), True, 1.0)
            memory, known = chosen.after_refresh(family, memory, now.posterior, mean, how), True
        newest = share or (1.0 - momentum) / (1.0 - momentum**t)
        at = now.posterior if memory is None else chosen.where(family, now.posterior, memory, newest)
        found = correction.Corrected(site(at, t), None)
        reference = chosen.reference(memory) if known else None
        if reference is not None:
            pair, weights = (found.site, site(reference, t)), family.per_block(alpha, alpha)
            found = chosen.correct(family, *pair, now.posterior, memory, alpha=weights, anchor_weight=1.0)
        choices = {"momentum": momentum, "debias": debias, "step": t}
        after = blr.update(family, now, prior, found.site, anchor=found.anchor, rates=rates, ess=ess, **choices)
        yield Trace(now.posterior, at, found, after)
        if memory is not None:
            memory, known = chosen.after_step(family, memory, now.posterior, after.posterior, found), True
        now = after


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


D, N = 4, 12
FEATURES = normal(N, D, seed=1)


def slopes(weights: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Gradient and diagonal of the Hessian of the mean of log cosh(xᵀθ − 1) + θ⁴/20 over a mini-batch."""
    x = FEATURES[torch.as_tensor(batch)]
    level = torch.tanh(x @ weights - 1.0)
    gradient = (x * level.unsqueeze(-1)).mean(0) + weights**3 / 5.0
    return gradient, (x * x * (1.0 - level**2).unsqueeze(-1)).mean(0) + 0.6 * weights**2


def picks(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randperm(N, generator=generator)[:3] for _ in range(steps + 1)]


@pytest.mark.parametrize("alpha, every", [(1.0, 5), (0.9, 1000), (1.0, 1000)])
def test_recursive_is_sarah_and_storm(alpha: float, every: int) -> None:
    family, batches, rate = poco.resolve_family("isotropic_gaussian"), picks(17), 0.1
    start, prior = family.centred_at(normal(D, seed=2)), family.centred_at(torch.zeros(D, dtype=torch.float64), 0.0)

    w, before, v, wanted = start.mean, start.mean, torch.zeros(D), []
    for t in range(1, 18):
        if t % every == 0:
            before, v = w, slopes(w, range(N))[0]
        if t == 1:
            v = slopes(w, batches[t])[0]
        else:
            v = slopes(w, batches[t])[0] - alpha * (slopes(before, batches[t])[0] - v)
        before, w = w, w - rate * v
        wanted.append(w)

    def site(state: Any, t: int) -> Any:
        return family.Site(slopes(state.mean, batches[t])[0])

    def refresh(state: Any, t: int) -> Any:
        return family.Site(slopes(state.mean, range(N))[0]) if t % every == 0 else None

    choices = {"steps": 17, "rates": (rate / 8.0,), "ess": 8.0, "alpha": alpha, "refresh": refresh}
    path = [step.after.posterior.mean for step in walk(Recursive(), family, start, prior, site, **choices)]
    torch.testing.assert_close(torch.stack(path), torch.stack(wanted), rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_recursive_carries_its_estimate_with_the_curvature(alpha: float) -> None:
    family, batches = poco.resolve_family("diagonal_gaussian"), picks(12)
    start, prior = (
        family.centred_at(normal(D, seed=2), 4.0),
        family.centred_at(torch.zeros(D, dtype=torch.float64), 1.0),
    )
    ess, eta, rho, delta = 6.0, 0.1, 0.05, 1.0

    m, s = start
    m_old, g_old, h_old, wanted = m, None, None, []
    for t in range(1, 13):
        g, h = slopes(m, batches[t])
        if g_old is not None:
            g_there, h_there = slopes(m_old, batches[t])
            g = g - alpha * (g_there - g_old) + alpha * (h_old - h_there) * (m - m_old)
            h = h - alpha * (h_there - h_old)
        direction = delta - s + ess * h
        s = s + rho * direction + 0.5 * rho**2 * direction**2 / s
        m, m_old, g_old, h_old = m - eta * (delta * m + ess * g) / s, m, g, h
        wanted.append(torch.stack([m, s]))

    def site(state: Any, t: int) -> Any:
        return family.Site(*slopes(state.mean, batches[t]))

    choices = {"steps": 12, "rates": family.Site(eta, rho), "ess": ess, "alpha": alpha}
    found = [torch.stack(step.after.posterior) for step in walk(Recursive(), family, start, prior, site, **choices)]
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.8])
@pytest.mark.parametrize("name", ["isotropic_gaussian", "diagonal_gaussian"])
def test_recursive_has_mean_zero_error_over_all_paths_though_not_given_one(name: str, alpha: float) -> None:
    """All 3³ sequences of mini-batches: the error d − ∇̃L(λ) averages to zero in natural coordinates."""
    family, batches = poco.resolve_family(name), torch.arange(N).chunk(3)
    start, prior = family.centred_at(normal(D, seed=2)), family.centred_at(torch.zeros(D, dtype=torch.float64))

    def mean(state: Any, batch: Any) -> Any:
        return family.Site(*slopes(state.mean, batch)[: len(family.Site._fields)])

    def errors(path: tuple[int, ...]) -> list[Tensor]:
        choices = {"steps": 3, "rates": family.per_block(0.02, 0.02), "ess": 6.0, "alpha": alpha}
        site = lambda state, t: mean(state, batches[path[t - 1]])  # noqa: E731
        made = []
        for step in walk(Recursive(), family, start, prior, site, **choices):
            both = (step.found.total(), mean(step.state, range(N)))
            one, other = (family.site_to_nat(each, step.state) for each in both)
            made.append(torch.cat(fields.subtract(one, other)))
        return made

    every = torch.stack([torch.stack(errors(path)) for path in itertools.product(range(3), repeat=3)])
    assert every.mean(0).abs().max() < 1e-13
    given_two = every.reshape(3, 3, 3, 3, -1)[:, :, :, 2].mean(2)  # the last step's, given the mini-batches before it
    assert given_two.abs().max() > 1e-2


QUADRATIC = normal(D, D, seed=5) @ normal(D, D, seed=5).T + torch.eye(D, dtype=torch.float64)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("name", ["isotropic_gaussian", "diagonal_gaussian", "full_gaussian"])
def test_transported_momentum_is_the_present_gradient_plus_averaged_noise(name: str, debias: bool) -> None:
    """On ½ mᵀQm + bᵀm with another b in every step, γ = 1 makes the average Q m_t + Σ (share of s) b_s."""
    family, beta = poco.resolve_family(name), 0.9
    start, prior = family.centred_at(normal(D, seed=2)), family.centred_at(torch.zeros(D, dtype=torch.float64))
    noise = normal(40, D, seed=6)
    curvature = {1: (), 2: (QUADRATIC if name == "full_gaussian" else QUADRATIC.diagonal(),)}[len(family.Site._fields)]

    def site(state: Any, t: int) -> Any:
        return family.Site(QUADRATIC @ state.mean + noise[t - 1], *curvature)

    choices = {"steps": 40, "rates": family.per_block(0.02, 0.05), "ess": 3.0, "momentum": beta, "debias": debias}
    for t, step in enumerate(walk(Transported(gamma=1.0), family, start, prior, site, **choices), start=1):
        ages = torch.arange(t - 1, -1, -1, dtype=torch.float64)
        shares = (1.0 - beta) * beta**ages / (1.0 - beta**t)
        wanted = QUADRATIC @ step.state.mean + shares @ noise[:t]
        assert (step.after.momentum[0] / (1.0 - beta**t) - wanted).abs().max() < 1e-9
        assert torch.equal(step.at.precision, step.state.precision)
    assert (step.state.mean - start.mean).norm() > 0.5
    _ = debias


def test_transported_at_one_minus_beta_is_nesterov() -> None:
    """m ← y − s∇L(y), y = m + β(m − m_previous), once the average has forgotten its start (w = 1 − β)."""
    family, beta, rate, ess = poco.resolve_family("isotropic_gaussian"), 0.8, 0.2, 5.0
    start, prior = family.centred_at(normal(D, seed=2)), family.centred_at(torch.zeros(D, dtype=torch.float64), 0.0)
    site = lambda state, t: family.Site(slopes(state.mean, range(N))[0])  # noqa: E731
    choices = {"steps": 30, "rates": (rate / ess,), "ess": ess, "momentum": beta, "debias": False, "share": 1.0 - beta}
    path = [step.after.posterior.mean for step in walk(Transported(1.0 - beta), family, start, prior, site, **choices)]

    m, before, wanted = start.mean, start.mean, []
    for _ in range(30):
        y = m + beta * (m - before)
        before, m = m, y - rate * (1.0 - beta) * slopes(y, range(N))[0]
        wanted.append(m)
    torch.testing.assert_close(torch.stack(path), torch.stack(wanted), rtol=0.0, atol=1e-12)


# ---- extrapolation in families -------------------------------------------------------------------------------


EVERY_FAMILY = sorted(set(poco.families_available()) - {"product"})


def members(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any]:
    """A family and two of its members."""
    from expfam_poco.checks import suite
    from expfam_poco.checks.specimens import Specimen

    family = poco.resolve_family(name)
    specimen = Specimen(family, suite.default_shape(family), dtype, torch.device("cpu"), 0).with_members()
    return family, specimen.states[0], specimen.states[1]


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_extrapolation_goes_beyond_and_stays_inside(name: str, dtype: torch.dtype) -> None:
    family, state, before = members(name, dtype)
    still = family.extrapolate(state, before, torch.zeros((), dtype=dtype))
    assert all(torch.equal(a, b) for a, b in zip(still, state, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(family.extrapolate(state, before, 0.0), state, strict=True))
    for factor in (1e-4, 0.5, 9.0):
        ahead = family.extrapolate(state, before, torch.tensor(factor, dtype=dtype))
        assert bool(family.in_domain(ahead)) and all(value.dtype == dtype for value in ahead)
    small = family.extrapolate(state, before, 1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(small, state, strict=True))


@pytest.mark.parametrize("name", [name for name in EVERY_FAMILY if not poco.resolve_family(name).curved])
def test_extrapolation_is_along_the_last_step_of_natural_coordinates_or_of_the_mean(name: str) -> None:
    family, state, before = members(name)
    ahead = family.extrapolate(state, before, 1e-6)
    if "mean" in family.State._fields:
        torch.testing.assert_close(ahead.mean - state.mean, 1e-6 * (state.mean - before.mean), rtol=1e-6, atol=1e-15)
        return
    steps = [family.to_nat(each) for each in (ahead, state, before)]
    for new, old, previous in zip(*steps, strict=True):
        torch.testing.assert_close(new - old, 1e-6 * (old - previous), rtol=1e-3, atol=1e-11)


@pytest.mark.parametrize("name", ["diagonal_gaussian", "isotropic_gaussian", "bernoulli", "gamma", "beta"])
def test_extrapolation_is_one_graph(name: str) -> None:
    family, state, before = members(name)
    compiled = torch.compile(family.extrapolate, fullgraph=True, backend="eager")
    for factor in (0.0, 0.7):
        k = torch.tensor(factor, dtype=torch.float64)
        pairs = zip(compiled(state, before, k), family.extrapolate(state, before, k), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_extrapolation_of_a_product_is_its_parts() -> None:
    from expfam_poco.families import DiagonalGaussian, Gamma, ProductFamily

    product = ProductFamily({"a": DiagonalGaussian(), "b": Gamma()}, sizes=(2, 3))
    now, before = (product.centred_at(torch.rand(5, dtype=torch.float64) + 0.5) for _ in range(2))
    ahead = product.extrapolate(now, before, torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(ahead.a_mean, now.a_mean + 0.5 * (now.a_mean - before.a_mean))
    parts = [Gamma().State(state.b_log, state.b_theta) for state in (now, before)]
    wanted = Gamma().extrapolate(*parts, torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(ahead.b_log, wanted.log) and torch.equal(ahead.b_theta, wanted.theta)


# ---- through the optimizer -----------------------------------------------------------------------------------


def weights_of(seed: int = 2) -> torch.nn.Parameter:
    return torch.nn.Parameter(normal(D, seed=seed))


def loss_on(weight: Tensor, batch: Any) -> Callable[[], Tensor]:
    x = FEATURES[torch.as_tensor(batch)]
    return lambda: torch.log(torch.cosh(x @ weight - 1.0)).mean() + (weight**4).sum() / 20.0


def descent(chosen: Any, *, steps: int, rate: float, every: int = 1000, **choices: Any) -> Tensor:
    """The path of plain weights (a Gaussian of fixed width at zero noise), with a refresh before some steps."""
    weight, batches = weights_of(), picks(steps)
    own = {"noise": "zero", "correction": chosen, "stale_after": None, **choices}
    opt = poco.PosteriorCorrected([weight], "isotropic_gaussian", rate / 8.0, 8.0, **own)
    path = []
    for t in range(1, steps + 1):
        if t % every == 0:
            opt.refresh([loss_on(weight, range(N))])
        opt.step(loss_on(weight, batches[t]))
        path.append(weight.detach().clone())
    return torch.stack(path)


@pytest.mark.parametrize("alpha, every", [(1.0, 5), (0.9, 1000)])
def test_the_optimizer_makes_sarah_and_storm(alpha: float, every: int) -> None:
    found, batches = descent("recursive", steps=17, rate=0.1, every=every, alpha=alpha), picks(17)
    w = weights_of().detach()
    before, v = w, torch.zeros(D)
    for t in range(1, 18):
        if t % every == 0:
            before, v = w, slopes(w, range(N))[0]
        g = slopes(w, batches[t])[0]
        v = g if t == 1 else g - alpha * (slopes(before, batches[t])[0] - v)
        before, w = w, w - 0.1 * v
        torch.testing.assert_close(found[t - 1], w, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.1])
def test_the_optimizer_transports(gamma: float) -> None:
    beta, batches = 0.9, picks(20)
    found = descent(Transported(gamma), steps=20, rate=0.1, momentum=beta)
    w = weights_of().detach()
    before, average = w, torch.zeros(D, dtype=torch.float64)
    for t in range(1, 21):
        share = (1.0 - beta) / (1.0 - beta**t)
        at = w + gamma * (1.0 / share - 1.0) * (w - before)
        average = beta * average + (1.0 - beta) * slopes(at, batches[t])[0]
        before, w = w, w - 0.1 * average / (1.0 - beta**t)
        torch.testing.assert_close(found[t - 1], w, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("neutral", [Transported(0.0), "none"], ids=repr)
def test_neutral_corrections_are_the_plain_rule_bit_for_bit(neutral: Any) -> None:
    plain = descent("snapshot", steps=12, rate=0.1, momentum=0.9, alpha=0.0)
    assert torch.equal(descent(neutral, steps=12, rate=0.1, momentum=0.9), plain)


def test_the_reparameterised_curvature_is_taken_about_the_shifted_mean() -> None:
    """ĥ = ∇ℓ √S ε with θ = m̃ + ε/√S: about the unshifted mean it would be (θ − m) S ∇ℓ."""
    family, weight, beta = poco.resolve_family("diagonal_gaussian"), weights_of(), 0.9
    own = {"momentum": beta, "correction": Transported(1.0), "hess_init": 1.0, "seed": 4, "precision_lr": 0.05}
    opt = not_looking(poco.PosteriorCorrected([weight], family, 0.1, 8.0, **own))
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(weight.detach().clone())
        return loss_on(weight, range(N))()

    opt.step(closure)
    now = next(iter(opt.posterior_states().values()))
    start = family.centred_at(weights_of().detach(), 8.0)
    now = fields.map_fields(torch.clone, now)
    opt.step(closure)
    after = next(iter(opt.posterior_states().values()))
    share = (1.0 - beta) / (1.0 - beta**2)
    shifted = now.mean + (1.0 / share - 1.0) * (now.mean - start.mean)
    point = seen[1].requires_grad_(True)
    (g,) = torch.autograd.grad(loss_on(point, range(N))(), point)
    direction = -now.precision + 8.0 * g * now.precision * (seen[1].detach() - shifted)
    wanted = now.precision + 0.05 * direction + 0.5 * 0.05**2 * direction**2 / now.precision
    torch.testing.assert_close(after.precision, wanted, rtol=1e-10, atol=1e-12)


class Trailing(Snapshot):
    """A user's own: q_out is made by a refresh alone, and follows the steps after it."""

    def after_step(self, family: Any, memory: Any, before: Any, after: Any, found: Any) -> Any:
        moved = family.reanchor(memory.site, memory.posterior, before)
        return correction.Outer(before, fields.mix(moved, found.total(), family.per_block(0.5, 0.5)))


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_memory_that_only_a_refresh_makes_may_follow_steps(backend: str) -> None:
    """Before the refresh steps are plain and cost one evaluation, after it they are corrected and cost two."""
    weight, counts = weights_of(), []
    opt = poco.PosteriorCorrected([weight], "isotropic_gaussian", 0.01, 8.0, correction=Trailing(), backend=backend)

    def closure() -> Tensor:
        counts[-1] += 1
        return loss_on(weight, range(3))()

    for t in range(6):
        if t == 3:
            opt.refresh([loss_on(weight, range(N))])
        counts.append(0)
        opt.step(closure)
    assert counts == [1, 1, 1, 2, 2, 2]


def prepare(opt: Any, chunks: list[Callable[[], Tensor]], reference: Any) -> None:
    """A reference by whatever means the correction has."""
    if opt.correction.refresh_evaluations:
        opt.refresh(chunks)
    elif opt.correction.evaluations > 1 and not opt.correction.follows_steps:
        opt.set_outer(reference)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_resuming_in_the_middle_changes_no_bit(name: str, family: str) -> None:
    batches = picks(12)
    choices = {"lr": 0.02, "ess": 8.0, "momentum": 0.9, "correction": name, "seed": 3, "weight_decay": 0.1}

    def started() -> tuple[torch.nn.Parameter, Any]:
        weight = torch.nn.Parameter(normal(D, seed=2).abs() + 0.5)
        return weight, poco.PosteriorCorrected([weight], family, **choices)

    weight, opt = started()
    reference = opt.posterior_states()
    for t in range(12):
        if t == 4:
            prepare(opt, [loss_on(weight, range(N))], reference)
        if t == 7:
            file = io.BytesIO()
            torch.save({"opt": opt.state_dict(), "weight": weight.detach()}, file)
        opt.step(loss_on(weight, batches[t]))
    other, resumed = started()
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    with torch.no_grad():
        other.copy_(kept["weight"])
    resumed.load_state_dict(kept["opt"])
    for t in range(7, 12):
        resumed.step(loss_on(other, batches[t]))
    assert torch.equal(weight, other)
    for one, two in zip(opt.posterior_states().values(), resumed.posterior_states().values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("family", ["diagonal_gaussian", "isotropic_gaussian", "gamma"])
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"stored"}))
def test_models_stepped_in_place_and_small_ones_agree(name: str, family: str) -> None:
    make = shell(family, lr=0.01, ess=16.0, momentum=0.9, weight_decay=0.1, correction=name)
    whole, tiled = (trained(make, 12, backend=backend) for backend in ("auto", "eager"))
    assert distance(numbers(*whole[:2]), numbers(*tiled[:2])) < 1e-10


def test_stored_takes_a_posterior_and_rests_at_it() -> None:
    """At λ = λ_out the stored site is what a fixed point of the rule needs, whatever the mini-batch; elsewhere not."""
    family = poco.resolve_family("diagonal_gaussian")
    for centre, rests in ((weights_of(), True), (weights_of(7), False)):
        weight, seen = weights_of(), []

        def closure() -> Tensor:
            seen.append(weight.detach().clone())  # noqa: B023
            return loss_on(weight, range(3))()  # noqa: B023

        opt = poco.PosteriorCorrected([weight], family, 0.1, 8.0, correction=Stored(), hess_init=1.0)
        opt.set_outer({name: family.centred_at(centre.detach(), 8.0) for name in opt.posterior_states()})
        not_looking(opt).step(closure)
        assert len(seen) == 2 and torch.equal(*seen) == rests
        (state,) = opt.posterior_states().values()
        assert torch.allclose(state.mean, weights_of(), rtol=0.0, atol=1e-12) == rests
