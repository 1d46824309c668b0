"""Families from formulas and from torch's distributions, and the integrals that they rest on, against closed forms."""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import constraints
from user_families import Exponential

import expfam_poco as poco
from expfam_poco.checks import suite
from expfam_poco.checks.compiled_law import COMPILED
from expfam_poco.families import Gamma, Poisson, Weibull
from expfam_poco.family import quadrature

RAYLEIGH: dict[str, Any] = {
    "T": {"square": lambda x: x**2},
    "log_h": lambda x: x.log(),
    "support": constraints.positive,
    "domain": {"square": constraints.less_than(0.0)},
}
CLOSED: dict[str, Any] = {"A": lambda nat: -torch.log(-2.0 * nat.square)}
CDF: dict[str, Any] = {"cdf": lambda x, nat: -torch.expm1(nat.square * x * x)}
ICDF: dict[str, Any] = {"icdf": lambda u, nat: (torch.log1p(-u) / nat.square).sqrt()}


# ---- quadrature ---------------------------------------------------------------------------------------------


def test_integrals_of_gammas_of_all_shapes(float64: None) -> None:
    """A, its gradient, E[log h], draws and their derivatives, for shapes from 0.3 to 10⁴, out to 2⁻³³."""
    family = Gamma()
    nat = family.Nat(torch.tensor([0.3, 1.0, 5.0, 100.0, 1e4]), -torch.tensor([1.0, 2.0, 1e-3, 3.0, 1e4]))
    torch.testing.assert_close(quadrature.log_partition(family, nat), family.log_partition(nat), rtol=1e-10, atol=1e-9)
    slope = torch.func.grad(lambda value: quadrature.log_partition(family, value).sum())(nat)
    torch.testing.assert_close(tuple(slope), tuple(family.to_mean(nat)), rtol=1e-9, atol=1e-9)
    found = quadrature.expectation(family, nat, family.log_base_measure)
    torch.testing.assert_close(found, family.expected_log_base_measure(nat), rtol=1e-9, atol=1e-9)
    u = torch.rand(7, 5).clamp(2.0**-33, 1.0 - 2.0**-33)
    u[0], u[1] = 2.0**-33, 1.0 - 2.0**-33
    x, slopes = quadrature.quantile(family, nat, u)
    torch.testing.assert_close(x.exp(), family.sample(nat, u), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(x.exp()[:, 1:], family.sample(nat, u)[:, 1:], rtol=1e-8, atol=0.0)
    exact = torch.func.jacrev(lambda value: family.sample(value, u).sum(1))(nat)
    for slope_x, jacobian in zip(slopes, exact, strict=True):
        torch.testing.assert_close((slope_x * x.exp())[:, 1:], jacobian[:, 1:], rtol=1e-6, atol=1e-12)


def test_an_integral_that_does_not_converge_is_infinite(float64: None) -> None:
    family = Gamma()
    nat = family.Nat(torch.tensor([1.0, -0.5, 2.0]), torch.tensor([-1.0, -1.0, 0.5]))
    assert torch.isfinite(quadrature.log_partition(family, nat)).tolist() == [True, False, False]


def test_tables_are_as_exact_as_they_say(float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against quadrature itself, over five powers of ten of λ; a bound that nothing keeps leaves all to quadrature."""
    family = poco.family_from(T={"theta": lambda x: x}, log_h=lambda x: -(x**4), name="Quartic")
    nat = family.Nat(torch.tensor([0.1, 0.4, -3.0, 50.0, -1e4, 1e5]))
    u = torch.tensor([1e-9, 0.02, 0.5, 0.9, 1.0 - 2.0**-33])[:, None].expand(-1, 6)
    tables, exact = family.tables, quadrature.cumulants(family, nat)  # type: ignore[attr-defined]
    found = torch.stack([tables.cumulant(nat.theta, order) for order in range(4)])
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-9)
    x, slopes = quadrature.quantile(family, nat, u)
    looked_up, inner = tables.quantile(nat.theta, u), slice(1, 4)
    deviation = exact[2].sqrt()
    assert ((looked_up[0] - x).abs()[inner] <= 1e-8 * deviation).all() and ((looked_up[0] - x).abs() <= 1e-2).all()
    torch.testing.assert_close(looked_up[1][inner], slopes[0][inner], rtol=1e-6, atol=0.0)
    assert sum(len(cells._parts) for cells in tables._draws) == 5
    grads = torch.func.grad(lambda v: torch.func.grad(lambda w: family.log_partition(family.Nat(w)).sum())(v).sum())
    torch.testing.assert_close(grads(nat.theta), exact[2], rtol=1e-8, atol=0.0)
    monkeypatch.setattr("expfam_poco.family.tables.BOUND", 0.0)
    other = poco.family_from(T={"theta": lambda x: x}, log_h=lambda x: -(x**4), name="Quartic")
    assert torch.equal(other.tables.quantile(nat.theta, u)[0], x)  # type: ignore[attr-defined]


def test_integers_are_summed(float64: None) -> None:
    family = Poisson()
    nat = family.Nat(torch.tensor([0.01, 1.0, 50.0, 2000.0]).log())
    torch.testing.assert_close(quadrature.log_partition(family, nat), nat.theta.exp(), rtol=1e-10, atol=1e-10)
    u = torch.rand(50, 4)
    x, slopes = quadrature.quantile(family, nat, u)
    assert torch.equal(x, family.sample(nat, u)) and not slopes.any()


# ---- family_from --------------------------------------------------------------------------------------------


def test_draws_by_quantile_by_distribution_function_and_by_integral_are_the_same(float64: None) -> None:
    families = [poco.family_from(**RAYLEIGH, **CLOSED, **ICDF), poco.family_from(**RAYLEIGH, **CLOSED, **CDF),
                poco.family_from(**RAYLEIGH)]  # fmt: skip
    first = families[0]
    state, u = first.centred_at(torch.tensor([0.5, 2.0, 30.0])), torch.rand(6, 3)
    grad, loss = torch.randn(6, 3), torch.zeros(6)
    expected = first.natural_gradient(state, poco.Draws(u, first.sample(state, u), loss, grad))
    for family in families[1:]:
        torch.testing.assert_close(family.sample(state, u), first.sample(state, u), rtol=1e-9, atol=0.0)
        site = family.natural_gradient(state, poco.Draws(u, first.sample(state, u), loss, grad))
        torch.testing.assert_close(tuple(site), tuple(expected), rtol=1e-7, atol=1e-12)
        twice = Weibull().kl(Weibull.State(state.square), Weibull.State(2.0 * state.square))
        for value, closed in ((family.log_partition(state), first.log_partition(state)),
                              (family.entropy(state), first.entropy(state)),
                              (family.kl(state, family.State(2.0 * state.square)), twice)):  # fmt: skip
            torch.testing.assert_close(value, closed, rtol=1e-8, atol=1e-9)


def test_members_are_centred_where_they_are_told_with_the_width_that_they_are_told(float64: None) -> None:
    """Two statistics: the point is θ, and log θ has about the variance 1/precision; 0 is λ = 0."""
    family = poco.family_from(
        T={"log": torch.log, "theta": lambda x: x},
        A=lambda n: torch.lgamma(n.log + 1.0) - (n.log + 1.0) * torch.log(-n.theta),
        support=constraints.positive,
        domain={"log": constraints.greater_than(-1.0), "theta": constraints.less_than(0.0)},
    )
    theta = torch.tensor([0.1, 1.0, 50.0])
    for precision in (25.0, 400.0):
        state = family.centred_at(theta, precision)
        torch.testing.assert_close(family.point(state), theta, rtol=1e-8, atol=0.0)
        relative = family.variance(state) / theta**2
        torch.testing.assert_close(relative * precision, torch.ones(3), rtol=0.05, atol=0.0)
    assert not any(value.any() for value in family.centred_at(theta, 0.0))
    assert family.centred_at(theta.float(), 25.0).log.dtype == torch.float32


def test_a_written_family_trains_and_is_known_by_its_name() -> None:
    family = poco.family_from(name="Rayleigh", **RAYLEIGH, **CLOSED, **ICDF)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = poco.PosteriorCorrected([weight], family, lr=0.05, ess=10.0, seed=0)
    for _ in range(60):
        optimizer.step(lambda: (weight - 3.0).square().sum())
    assert weight.detach().mean() > 1.2 and (weight > 0.0).all()
    assert optimizer.state_dict()["param_groups"][0]["family"]["name"].endswith(":Rayleigh")


@pytest.mark.parametrize(
    "made",
    [
        lambda: poco.family_from(name="Rayleigh", **RAYLEIGH),
        lambda: poco.from_torch(torch.distributions.Gumbel, scale=0.5),  # its bound is declared nowhere
        lambda: poco.from_torch(torch.distributions.Geometric),
    ],
)
def test_random_steps_leave_no_domain(made: Any) -> None:
    """40 weights, 3 steps each at rates up to 10, as large as the coordinates: A stays finite, and draws possible.

    (A thousand steps of each take a minute, and leave none either.)
    """
    family, generator = made(), torch.Generator().manual_seed(0)
    state = start = family.centred_at(torch.full((40,), 1.0))
    for _ in range(3):
        site = family.Site(*(torch.randn(v.shape, generator=generator) * v.abs().clamp_min(0.1) for v in state))
        rate = 10.0 * float(torch.rand((), generator=generator))
        with torch.no_grad():
            moved = family.retract(state, site, family.per_block(rate, rate))
            assert family.in_domain(moved) and torch.isfinite(family.log_partition(moved)).all()
            draws = family.sample(moved, torch.rand(1, 40, generator=generator))
        assert torch.isfinite(draws).all()
        state = type(moved)(*(torch.where(b.abs() > 1e3, a, b) for a, b in zip(start, moved, strict=True)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"support": constraints.real_vector}, "weights that are one number each"),
        ({"domain": {"squares": constraints.positive}}, r"\['squares'\] are no statistics"),
        ({"start": {"other": 1.0}}, "not the fields of λ"),
        ({"start": {"square": 1.0}}, "one finite number for each weight"),
    ],
)
def test_formulas_that_do_not_fit_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        poco.family_from(**{**RAYLEIGH, **CLOSED, **change})


# ---- from_torch ----------------------------------------------------------------------------------------------


def test_ready_made_families_come_first() -> None:
    assert poco.from_torch(td.Gamma) == Gamma()
    assert poco.from_torch(td.Weibull, concentration=1.5) == Weibull(shape=1.5)
    assert type(poco.from_torch(td.Wishart)).__name__ == "Wishart"


@pytest.mark.parametrize(
    ("kind", "fixed", "x"),
    [
        (td.ContinuousBernoulli, {}, (0.1, 0.5, 0.9)),
        (td.Gumbel, {"scale": 0.7}, (-1.0, 0.0, 2.0)),
        (td.Binomial, {"total_count": 10}, (0.0, 3.0, 10.0)),
        (td.Kumaraswamy, {"concentration1": 2.0}, (0.1, 0.5, 0.9)),
    ],
)
def test_members_of_others_have_torch_s_densities(kind: Any, fixed: Any, x: Any, float64: None) -> None:
    """log q(x) − log q(y) is torch's for some parameter: the members are those, wherever λ comes from."""
    family = poco.from_torch(kind, **fixed)
    (name,) = set(kind.arg_constraints) - set(fixed) - {"probs"}
    x = torch.tensor(x)
    free = td.transform_to(kind.arg_constraints[name])
    density = kind(**{name: free(torch.tensor(0.3)), **{k: torch.tensor(v) for k, v in fixed.items()}}).log_prob(x)
    statistic, base = family.statistics(x)[0], family.log_base_measure(x)
    ratio = ((density - base)[1:] - (density - base)[0]) / (statistic[1:] - statistic[0])
    torch.testing.assert_close(ratio[1:], ratio[:1].expand(len(x) - 2), rtol=1e-8, atol=1e-8)
    member = family.State(ratio[:1])
    torch.testing.assert_close(family.log_prob(member, x), density, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "fixed", "sentence"),
    [
        (td.Cauchy, {}, r"Cauchy with free \['loc', 'scale'\] is not an exponential family"),
        (td.StudentT, {"df": 3.0}, "StudentT with .* is not an exponential family"),
        (td.Pareto, {}, "is not an exponential family: members have different supports"),
        (td.Gumbel, {}, "is not an exponential family"),
        (td.MultivariateNormal, {"loc": 0.0}, "is not one real number"),
        (td.Gamma, {"shape": 1.0}, r"has no parameters \['shape'\]"),
    ],
)
def test_what_is_no_exponential_family_is_told_so(kind: Any, fixed: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        poco.from_torch(kind, **fixed)
    with pytest.raises(TypeError, match="give a class of torch"):
        poco.from_torch(kind.__name__)


# ---- what follows from the support -----------------------------------------------------------------------------


class Pair(NamedTuple):
    theta: Tensor


class Vector(poco.ExponentialFamily):
    """Rows N(λ, I), of which E[log h] is not written."""

    event_dim = 1

    def statistics(self, theta):
        return self.Mean(theta)

    def log_base_measure(self, theta):
        return -0.5 * (theta.square() + math.log(2.0 * math.pi)).sum(-1)

    def log_partition(self, nat):
        return 0.5 * nat.theta.square().sum(-1)

    def sample(self, state, noise):
        return state.theta + noise

    def centred_at(self, theta, precision=None):
        return self.State(theta * 1.0)


class Half(Exponential):
    """T(θ) = θ with h(θ) = √θ: a Gamma of shape 3/2."""

    def log_base_measure(self, theta):
        return 0.5 * theta.log()

    def log_partition(self, nat):
        return math.lgamma(1.5) - 1.5 * torch.log(-nat.theta)


def test_the_mean_of_the_base_measure_needs_no_formula(float64: None) -> None:
    rate = torch.tensor([0.5, 3.0])
    exact = td.Gamma(torch.full((2,), 1.5), rate).entropy()
    torch.testing.assert_close(Half().entropy(Half.State(-rate)), exact, rtol=1e-9, atol=1e-9)
    vector = Vector().entropy(Vector.State(torch.zeros(2, 3)))  # by draws: ½ χ² of 3 degrees, 2¹⁴ of them
    exact = torch.full((2,), 1.5 * math.log(2.0 * math.pi * math.e))
    torch.testing.assert_close(vector, exact, rtol=0.0, atol=6.0 * (0.25 * 6.0 / 2**14) ** 0.5)


# ---- sentences -------------------------------------------------------------------------------------------------


def test_declarations_that_are_no_constraints_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"Said.support is 'positive'; give a constraint"):
        type("Said", (Exponential,), {"support": "positive"})
    with pytest.raises(TypeError, match=r"Said.domain\['theta'\] is 0"):
        type("Said", (Exponential,), {"domain": {"theta": 0}})


class ScalarOfVector(Vector):
    def statistics(self, theta):
        return self.Mean(theta.sum(-1))


class TooMuchNoise(Exponential):
    noise_dims = (2,)


class Twice(NamedTuple):
    theta: Tensor
    twice: Tensor


class Redundant(poco.ExponentialFamily):
    Statistics = Twice

    def statistics(self, theta):
        return Twice(theta, 2.0 * theta)

    def log_base_measure(self, theta):
        return -0.5 * (theta.square() + math.log(2.0 * math.pi))

    def log_partition(self, nat):
        return 0.5 * (nat.theta + 2.0 * nat.twice) ** 2

    def sample(self, state, noise):
        return state.theta + 2.0 * state.twice + noise

    def centred_at(self, theta, precision=None):
        return Twice(theta * 1.0, torch.zeros_like(theta))


@pytest.mark.parametrize(
    ("family", "law", "sentence"),
    [
        (ScalarOfVector, "declarations", "declare statistic_dims = (0,)"),
        (TooMuchNoise, "noise", "K × P × noise_dims, with noise_dims = (2,)"),
        (Redundant, "fisher", "not minimal: of 2 entries only 1 are independent"),
    ],
)
def test_what_is_wrong_with_a_family_is_said_in_words(
    family: Any, law: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [each for each in suite.LAWS if each.name in (law, "centred_at")]
    monkeypatch.setattr(suite, "LAWS", tuple(kept))
    report = poco.check_family(family, dtypes=(torch.float64,), raise_on_failure=False)
    (found,) = (each for each in report.laws if each.name == law)
    assert not found.passed and sentence in found.detail


def test_families_that_lack_a_method_are_told_which() -> None:
    class Lacks(Exponential):
        centred_at = poco.ExponentialFamily.centred_at

    Lacks.__abstractmethods__ = frozenset({"centred_at"})  # as of a class that never wrote it
    with pytest.raises(TypeError, match="Lacks lacks centred_at; write it"):
        poco.resolve_family(Lacks)


@pytest.mark.slow
def test_a_step_that_does_not_compile_is_found() -> None:
    class Looks(Exponential):
        def sample(self, state, noise):
            return torch.log(noise) / (state.theta if bool(state.theta.sum() < 0.0) else -state.theta)

    for family, passed in ((Exponential(), True), (Looks(), False)):
        result = suite.judge(COMPILED, suite.specimens_of(family, dtypes=(torch.float32,), shape=(20,)))
        assert result.passed is passed, result.detail
        assert passed or "compiling fails" in result.detail


def test_a_weight_that_no_member_is_found_about_is_refused() -> None:
    gumbel = poco.from_torch(torch.distributions.Gumbel, scale=0.5)
    weight = torch.nn.Parameter(torch.tensor([100.0]))
    optimizer = poco.PosteriorCorrected([("w", weight)], gumbel, lr=0.0, ess=10.0)
    with pytest.raises(ValueError, match=r"no member of .* was found about the weight 100"):
        optimizer.step(lambda: weight.sum() * 0.0)
    assert weight.item() == 100.0


def test_tables_are_not_asked_outside_of_the_domain() -> None:
    family = poco.family_from(
        T={"theta": lambda theta: theta},
        support=torch.distributions.constraints.nonnegative,
        domain={"theta": torch.distributions.constraints.less_than(0.0)},
    )
    inside = family.Nat(torch.tensor([-1.0, -2.0], dtype=torch.float64))
    torch.testing.assert_close(family.log_partition(inside), -(-inside.theta).log(), rtol=1e-9, atol=1e-9)
    outside = family.log_partition(family.Nat(torch.tensor([math.nan, 1.0], dtype=torch.float64)))
    assert not bool(torch.isfinite(outside).any())
