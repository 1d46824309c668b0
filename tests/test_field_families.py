"""Families as people write them: no step, mode or hyperparameter is wrong in silence."""

import functools
import math
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, NamedTuple

import mpmath
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints
from user_families import Exponential, GaussianByHand, Poisson, UnitGaussian

import expfam_poco as poco
from expfam_poco.engine import backend
from expfam_poco.families import Beta, Dirichlet, LowRankGaussian
from expfam_poco.family import derived, registry

# ---- families -----------------------------------------------------------------------------------------------


class Interval(UnitGaussian):
    domain: ClassVar = {"theta": constraints.interval(-2.0, 2.0)}

    def centred_at(self, theta, precision=None):
        return self.State(theta.clamp(-1.9, 1.9))


class Rate(NamedTuple):
    rate: Tensor


class Renamed(Exponential):
    """The chart is the rate −λ > 0."""

    State = Rate
    domain: ClassVar = {"rate": constraints.positive}

    def to_nat(self, state):
        return self.Nat(-state.rate)

    def from_nat(self, nat):
        return Rate(-nat.theta)

    def sample(self, state, noise):
        return -torch.log(noise) / state.rate

    def centred_at(self, theta, precision=None):
        return Rate(1.0 / theta)


class Undeclared(GaussianByHand):
    """Its domain is known to A alone."""

    domain: ClassVar = {}


class Cov(NamedTuple):
    matrix: Tensor


class Scatter(poco.ExponentialFamily):
    """Rows N(0, Λ⁻¹) with T = −½ θθᵀ, λ = Λ positive definite."""

    Statistics = Cov
    event_dim = 1
    statistic_dims = (2,)
    domain: ClassVar = {"matrix": constraints.positive_definite}

    def statistics(self, theta):
        return Cov(-0.5 * theta.unsqueeze(-1) * theta.unsqueeze(-2))

    def log_partition(self, nat):
        return -0.5 * torch.linalg.slogdet(nat.matrix)[1]

    def log_base_measure(self, theta):
        return theta.new_full(theta.shape[:-1], -0.5 * theta.shape[-1] * math.log(2.0 * math.pi))

    def sample(self, state, noise):
        root = torch.linalg.cholesky(state.matrix)
        return torch.linalg.solve_triangular(root.mT, noise.unsqueeze(-1), upper=True).squeeze(-1)

    def centred_at(self, theta, precision=None):
        eye = torch.eye(theta.shape[-1], dtype=theta.dtype)
        return Cov((1.0 if precision is None else precision) * eye + 0.1 * theta.unsqueeze(-1) * theta.unsqueeze(-2))


class OwnInit(Exponential):
    def __init__(self, scale: float) -> None:
        self.scale = scale


@dataclass(frozen=True)
class Field(Exponential):
    scale: float = 1.0

    def log_partition(self, nat):
        return -torch.log(-nat.theta * self.scale) + math.log(self.scale) + 0.5 * (self.scale * nat.theta) ** 2


# ---- as the optimizer runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derived_derivatives_are_the_same_under_no_grad(dtype: torch.dtype) -> None:
    """∇² of −½ log det Λ is ½ Λ⁻¹ ⊗ Λ⁻¹, for several matrices, where torch's is NaN without gradients."""
    family, theta = Scatter(), torch.randn(3, 2, dtype=dtype)
    nat = family.to_nat(family.centred_at(theta, 2.0))
    inverse = torch.linalg.inv(nat.matrix)
    expected = 0.5 * torch.einsum("nij,nkl->njkli", inverse, inverse).reshape(3, 4, 4)
    with torch.no_grad():
        found = derived.fisher(family, nat)
        vector = family.Nat(torch.ones_like(nat.matrix))
        product = family.fisher_vector_product(nat, vector).matrix.flatten(1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(product, expected.sum(-1))
    assert not found.requires_grad


# ---- steps --------------------------------------------------------------------------------------------------

BOUNDED = [Interval, Renamed, Undeclared, Scatter, Exponential, GaussianByHand]


@pytest.mark.parametrize("family", BOUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_step_leaves_the_domain(family: Any, dtype: torch.dtype) -> None:
    """1000 weights, 40 random steps at rates up to 10, each as large as its coordinates."""
    family, generator = family(), torch.Generator().manual_seed(0)
    shape = (1000, 2) if family.event_dim else (1000,)
    start = family.centred_at(torch.rand(shape, generator=generator, dtype=dtype) + 0.5)
    state = start
    for _ in range(40):
        size = 10.0 * float(torch.rand((), generator=generator))
        nat = family.to_nat(state)
        noise = [torch.randn(v.shape, generator=generator, dtype=dtype) * v.abs().clamp_min(0.1) for v in nat]
        if isinstance(family, Scatter):
            noise = [v + v.mT for v in noise]
        moved = family.retract(state, family.site_from_nat(family.Site(*noise), state), family.per_block(size, size))
        assert family.in_domain(moved)
        assert torch.isfinite(family.log_partition(family.to_nat(moved))).all()
        far = derived._flatten(family, family.to_nat(moved))[0].abs().amax(-1) > 1e4
        state = type(moved)(*(torch.where(derived.per_weight(far, b), a, b) for a, b in zip(start, moved, strict=True)))


@pytest.mark.parametrize("family", BOUNDED)
def test_small_steps_are_the_plain_ones_to_first_order(family: Any, float64: None) -> None:
    family = family()
    state = family.centred_at(torch.rand((5, 2) if family.event_dim else (5,)) + 0.5)
    site = family.Site(*(torch.ones_like(v) for v in family.to_nat(state)))
    gaps = []
    for rate in (1e-3, 1e-4):
        pair = [family.retract(state, site, family.per_block(rate, rate), variant=v) for v in ("plain", "second_order")]
        gaps.append(max(float((a - b).abs().max()) for a, b in zip(*pair, strict=True)))
    assert gaps[1] <= 0.011 * gaps[0] + 1e-14


def test_a_chart_step_is_the_one_that_its_author_would_write() -> None:
    """rate ← rate + d + d²/(2 rate), from domain in the chart's names."""
    family, state = Renamed(), Rate(torch.tensor([1.0, 2.0]))
    moved = family.retract(state, family.Site(torch.tensor([-3.0, 1.0])), (1.0,))
    d = -torch.tensor([3.0, -1.0])
    torch.testing.assert_close(moved.rate, state.rate + d + d**2 / (2.0 * state.rate))


def test_steps_are_vmapped_as_they_are_batched() -> None:
    family = Undeclared()
    state = family.centred_at(torch.linspace(0.1, 1.0, 6), 2.0)
    site = family.Site(torch.full((6,), 3.0), torch.linspace(-8.0, 8.0, 6))
    whole = family.retract(state, site, (1.0, 1.0))
    each = torch.func.vmap(lambda s, d: tuple(family.retract(family.State(*s), family.Site(*d), (1.0, 1.0))))
    torch.testing.assert_close(tuple(whole), each(tuple(state), tuple(site)))


# ---- hyperparameters -------------------------------------------------------------------------------------------


def test_hyperparameters_of_an_own_init_count() -> None:
    one, other = OwnInit(1.0), OwnInit(10.0)
    assert one == OwnInit(1.0) and hash(one) == hash(OwnInit(1.0)) and one != other
    assert repr(other) == "OwnInit(scale=10.0)"
    saved = []
    for family in (one, other):
        weight = torch.nn.Parameter(torch.ones(3))
        opt = poco.PosteriorCorrected([weight], family, lr=0.1, ess=10.0)
        opt.step(lambda w=weight: w.sum())
        saved.append(opt.state_dict())
    assert saved[1]["param_groups"][0]["family"]["settings"] == {"scale": 10.0}
    with pytest.raises(poco.CheckpointError):
        opt.load_state_dict(saved[0])


def test_hyperparameters_that_cannot_be_told_apart_are_refused() -> None:
    class Forgets(Exponential):
        def __init__(self, scale):
            self.rate = 1.0 / scale

    class Anything(Exponential):
        def __init__(self, **options):
            self.options = options

    for family, sentence in (
        (Forgets(2.0), "keeps no attribute of this name"),
        (Anything(a=1), r"takes \*options"),
        (OwnInit([1.0]), "OwnInit.scale is a list"),
        (Field(torch.tensor(1.0).numpy()), "Field.scale is a ndarray"),
    ):
        with pytest.raises(TypeError, match=sentence):
            poco.PosteriorCorrected([torch.nn.Parameter(torch.ones(3))], family, lr=0.1, ess=10.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler about itself
def test_a_float_field_in_the_log_partition_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two values, as the optimizer compiles its kernels, without the compiler's last stage."""
    traced = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", traced)
    nat = Exponential().Nat(-torch.linspace(0.5, 2.0, 32))
    for scale in (0.3, 0.7):
        family = Field(scale)
        with torch.no_grad():
            found = backend._compile(derived.fisher, (family,))(nat)
        torch.testing.assert_close(found, derived.fisher(family, nat))


def test_steps_of_derived_domains_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for family in (Renamed(), Scatter()):
        state = family.centred_at(torch.rand(20, 2) + 0.5 if family.event_dim else torch.rand(20) + 0.5)
        step = family.Nat(*(-3.0 * torch.ones_like(v) for v in family.to_nat(state)))
        with torch.no_grad():
            found = backend._compile(derived.retracted, (family,))(state, step)
        torch.testing.assert_close(tuple(found), tuple(derived.retracted(family, state, step)))


# ---- priors, distributions -----------------------------------------------------------------------------------


def test_priors_for_a_support_without_zero_and_for_one_matrix() -> None:
    class Positive(Scatter):
        """Refuses what is not positive."""

        support = constraints.independent(constraints.positive, 1)

        def sample(self, state, noise):
            return super().sample(state, noise).abs()

        def point(self, state):
            return state.matrix.diagonal(dim1=-2, dim2=-1).reciprocal()

        def centred_at(self, theta, precision=None):
            assert bool((theta > 0.0).all()), "outside of the support"
            return super().centred_at(theta, precision)

        natural_gradient = poco.ExponentialFamily.score_natural_gradient
        default_estimator = "score"

    family = Positive()
    for shape in ((2, 3), (3,)):
        weight = torch.nn.Parameter(torch.ones(shape))
        prior = family.centred_at(torch.ones(shape), 1.0)
        poco.PosteriorCorrected([weight], family, lr=1e-3, ess=10.0, prior=prior, mc_samples=2, noise="independent")


def test_a_draw_without_derivative_says_so() -> None:
    class Cut(Exponential):
        def sample(self, state, noise):
            return super().sample(state, noise).detach()

    assert Exponential().distribution(Exponential().centred_at(torch.ones(2))).has_rsample
    for family in (Poisson(), Cut()):
        q = family.distribution(family.centred_at(torch.ones(2)))
        assert not q.has_rsample and q.sample((3,)).shape == (3, 2)
        with pytest.raises(NotImplementedError, match="no derivative"):
            q.rsample()


# ---- plug-ins ---------------------------------------------------------------------------------------------------


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """Modules that offer families by entry points of these names."""

    def offer(**sources: str) -> None:
        own = registry.entry_points(group=registry.GROUP)
        points = []
        for name, source in sources.items():
            (tmp_path / f"plug_{name}.py").write_text(source, encoding="utf-8")
            points.append(EntryPoint(name, f"plug_{name}:Mine", registry.GROUP))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(registry, "entry_points", lambda group: [*own, *points])
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
        monkeypatch.setattr(registry, "_installed", dict(registry._installed))

    return offer


REGISTERING = """
import expfam_poco as poco
from expfam_poco.families import DiagonalGaussian

@poco.register("mine")
class Mine(DiagonalGaussian):
    pass
"""


def test_a_plugin_may_register_its_family_itself(plugins: Any) -> None:
    plugins(mine=REGISTERING)
    assert poco.get_family("mine").__name__ == "Mine"
    assert registry.name_of(poco.get_family("mine")()) == "mine"


def test_a_broken_plugin_breaks_no_other(plugins: Any) -> None:
    plugins(broken="import nothing_of_this_name", mine=REGISTERING)
    assert {"broken", "mine"} <= set(poco.families_available())
    assert poco.get_family("mine").__name__ == "Mine"
    with pytest.raises(ValueError, match=r"'broken': plug_broken:Mine cannot be imported \(ModuleNotFoundError"):
        poco.get_family("broken")
    with pytest.raises(ValueError, match=r"name='broken' is taken by plug_broken\.Mine"):
        poco.register("broken")(Exponential)


# ---- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [(1e7, 1e-3), (1e-12, 1e7), (1e-10, 3.0), (2.5, 4.0), (1e7, 1e7), (1e-8, 1e-8)])
def test_beta_and_dirichlet_lose_no_digits(shapes: tuple[float, float], float64: None) -> None:
    """log B(a, b) and ψ(a) − ψ(a + b) against fifty digits."""
    mpmath.mp.dps = 50
    a, b = (mpmath.mpf(x) for x in shapes)
    exact = mpmath.loggamma(a) + mpmath.loggamma(b) - mpmath.loggamma(a + b)
    means = [mpmath.digamma(x) - mpmath.digamma(a + b) for x in (a, b)]
    pair = torch.tensor(shapes)
    beta = Beta().Nat(*pair)
    dirichlet = Dirichlet().Nat(pair)
    for found in (Beta().log_partition(beta), Dirichlet().log_partition(dirichlet)):
        assert float(found) == pytest.approx(float(exact), rel=4e-15)
    for found in (torch.stack(tuple(Beta().to_mean(beta))), Dirichlet().to_mean(dirichlet).log):
        assert found.tolist() == pytest.approx([float(m) for m in means], rel=1e-13)
    slope = torch.func.grad(lambda v: Dirichlet().log_partition(Dirichlet().Nat(v)))(pair)
    assert slope.tolist() == pytest.approx([float(m) for m in means], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("size", "rank"), [(3, 1), (5, 1)])
def test_a_low_rank_gaussian_of_few_weights_does_not_run_away(size: int, rank: int, float64: None) -> None:
    """‖w − t‖² has S* = 2 N I."""
    target = torch.randn(size)
    weight = torch.nn.Parameter(torch.zeros(size))
    options = {"lr": 0.1, "ess": 1e4, "hess_init": 10.0, "precision_lr": 0.01, "noise": "antithetic", "seed": 0}
    opt = poco.PosteriorCorrected([weight], LowRankGaussian(rank=rank), **options)
    for _ in range(300):
        opt.step(lambda: ((weight - target) ** 2).sum())
    (state,) = opt.posterior_states().values()
    precision = state.diagonal + state.factor.square().sum(-1)
    assert float(precision.max()) < 4.0 * 2e4
    assert float((weight.detach() - target).abs().max()) < 1e-5


@pytest.mark.parametrize("span", [(1.0, 1e-5, 1e-5), (1.0, 1.0, 1e-6), (0.5, 0.6, 0.7)])
def test_the_projection_of_a_low_rank_tangent_is_bounded(span: tuple[float, ...], float64: None) -> None:
    """Near an axis its diagonal part stays within ‖H‖/√FLOOR; away from axes it is the solution."""
    from expfam_poco.families.gaussian.low_rank import FLOOR, _solve_squares

    u = torch.tensor(span).unsqueeze(-1)
    u = u / u.norm()
    plane = torch.eye(3) - u @ u.mT
    curvature = torch.randn(3, 3)
    curvature = curvature + curvature.mT
    target = (plane @ curvature @ plane).diagonal()
    found = _solve_squares(u, target)
    assert float(found.norm()) <= float(curvature.norm()) / math.sqrt(FLOOR)
    if span[0] == 0.5:
        torch.testing.assert_close((plane * plane) @ found, target)
