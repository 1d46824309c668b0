"""`FamilyLaws`: the laws of a family as tests that pytest collects, one for each law.

    class TestMine(FamilyLaws):
        family = MyFamily()

`test_law` runs the laws of `check_family`, each on its own. `test_edges` puts the family where it is likely to break,
at strengths and centres of many magnitudes, and holds it there to the laws that are cheap: hypothesis searches for
members that break one and prints the smallest it finds (nearest strength 1 and the middle of the support).

Neither pytest nor hypothesis is imported before a test runs; without hypothesis the members come from counter-based
noise, and what fails is printed as it is found.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.transforms import identity_transform

from expfam_poco.checks import (  # checks imports this module, too: it is used only when tests run
    density_laws,
    learning_laws,
    suite,
)
from expfam_poco.checks.density_laws import Findings, Law
from expfam_poco.checks.specimens import SAMPLES, Specimen, holds, name_of
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.noise import NoiseKey, noise
from expfam_poco.family.registry import resolve_family

PRECISIONS = (torch.float32, torch.float64)


class Edge(NamedTuple):
    """A member near the edges: its strength as a power of ten, and its centre in unconstrained coordinates."""

    power: float
    centre: tuple[float, ...]


class FamilyLaws:
    """A base class of tests: subclass it, name the family, and pytest runs every law on it.

    Attributes:
        family: an instance, a class, or a registered name.
        seed: of the test points and of the counter-based noise.
        shape: of the tensor that the family is to see, if it needs a particular one.
        strengths: the smallest and the largest `precision` at which `test_edges` centres members. A family that
            is not meant for all of these says so here.
        edge: how far centres go in coordinates u where the support is everything: sinh(u) of real weights, exp(u) of
            positive ones, σ(u) of those between 0 and 1. 12 is 160000, 0.000006 or 0.999994.
        examples: how many members `test_edges` tries for every law and precision.

    Example:
        >>> import expfam_poco as poco
        >>> from expfam_poco.checks import FamilyLaws
        >>> class TestBernoulli(FamilyLaws):
        ...     family = "bernoulli"
        >>> TestBernoulli().test_law("kl")
        >>> TestBernoulli().test_edges("retraction", "float32")
    """

    family: ClassVar[str | type[ExponentialFamily] | ExponentialFamily]
    seed: ClassVar[int] = 0
    shape: ClassVar[Sequence[int] | None] = None
    strengths: ClassVar[tuple[float, float]] = (1e-6, 1e6)
    edge: ClassVar[float] = 12.0
    examples: ClassVar[int] = 20

    _specimens: ClassVar[list[Specimen] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._specimens = None  # a subclass may name another family

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Called by pytest: one test for each law."""
        names = metafunc.fixturenames
        if "law" in names:
            edges = metafunc.function.__name__ == "test_edges"
            metafunc.parametrize("law", [law.name for law in (EDGE_LAWS if edges else suite.LAWS)])
        if "precision" in names:
            metafunc.parametrize("precision", [name_of(dtype) for dtype in PRECISIONS])

    def test_law(self, law: str) -> None:
        """One law of `check_family`.

        Raises:
            LawError: if the family breaks it; the message names the law, its error and its tolerance.
        """
        __tracebackhide__ = True
        family = self._instance()
        chosen = next(each for each in suite.LAWS if each.name == law)
        with suite.isolated(self.seed):
            result = self._judged(chosen)
        if not result.passed:
            raise suite.LawError(_told(f"{family!r} breaks the law {law!r}", chosen, result))

    def test_edges(self, law: str, precision: str) -> None:
        """One cheap law at members near the edges of the domain, in one precision.

        Raises:
            LawError: if the family breaks it; the message describes the smallest member found that does.
        """
        __tracebackhide__ = True
        family, dtype = self._instance(), getattr(torch, precision)
        shape = torch.Size(self.shape) if self.shape is not None else suite.default_shape(family)
        chosen = next(each for each in EDGE_LAWS if each.name == law)

        def check(edge: Edge) -> None:
            __tracebackhide__ = True
            result = _judge_edge(chosen, family, edge, shape, dtype, self.seed)
            if not result.passed:
                what = f"{family!r} breaks the law {law!r} near the edges of its domain"
                raise suite.LawError(_told(what, chosen, result, _described(family, edge, shape, dtype)))

        powers = (math.log10(self.strengths[0]), math.log10(self.strengths[1]))
        with suite.isolated(self.seed):
            _search(check, powers, self.edge, shape.numel(), self.examples, f"{family!r} {law} {precision}")

    def _instance(self) -> ExponentialFamily:
        if not hasattr(type(self), "family"):
            raise TypeError(f"{type(self).__name__} names no family; write `family = MyFamily()` in its body.")
        return resolve_family(type(self).family)

    def _judged(self, law: Law) -> suite.LawResult:
        """The law's outcome on specimens that all tests of the class share."""
        cls = type(self)
        if cls._specimens is None:
            try:
                cls._specimens = suite.specimens_of(self._instance(), seed=self.seed, shape=self.shape)
            except Exception as error:
                return suite.raised(law, error)
        return suite.judge(law, cls._specimens)


# ---- members near the edges ----------------------------------------------------------------------------------


def _search(
    check: Callable[[Edge], None], powers: tuple[float, float], edge: float, size: int, examples: int, name: str
) -> None:
    """Look for an edge that fails the check: with hypothesis, which then shrinks it, or else by counted noise."""
    __tracebackhide__ = True
    try:
        import hypothesis
        from hypothesis import strategies
    except ImportError:
        for each in _counted(powers, edge, size, examples, name):
            check(each)
        return
    numbers = strategies.floats(-edge, edge, allow_nan=False, width=32)
    centres = strategies.lists(numbers, min_size=size, max_size=size).map(tuple)
    edges = strategies.builds(Edge, strategies.floats(*powers, allow_nan=False), centres)
    quietly = hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )

    def searched(edge: Edge) -> None:
        __tracebackhide__ = True
        check(edge)

    test = hypothesis.given(edge=edges)(searched)
    quietly(test)()
    for corner in _corners(powers, edge, size):
        check(corner)  # last, because what hypothesis finds it also shrinks


def _corners(powers: tuple[float, float], edge: float, size: int) -> list[Edge]:
    """The least and the largest strength at centres in the middle and at both ends."""
    return [Edge(power, (corner,) * size) for corner in (0.0, -edge, edge) for power in powers]


def _counted(powers: tuple[float, float], edge: float, size: int, examples: int, name: str) -> Iterator[Edge]:
    """The corners, then members from counter-based noise."""
    yield from _corners(powers, edge, size)
    key = NoiseKey(zlib.crc32(name.encode()))
    for numbers in noise("uniform", (1 + size,), examples, key, dtype=torch.float64).tolist():
        power = powers[0] + (powers[1] - powers[0]) * numbers[0]
        yield Edge(power, tuple(edge * (2.0 * number - 1.0) for number in numbers[1:]))


def _centre(family: ExponentialFamily, edge: Edge, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """θ in the support; its middle, where the support has no coordinates."""
    numbers = torch.tensor(edge.centre, dtype=dtype).reshape(shape)
    if family.levels is not None:
        return torch.where(numbers >= 0.0, family.levels[-1], family.levels[0]).to(dtype)
    try:
        transform = transform_to(family.support)
    except NotImplementedError:
        return family.reference_like(numbers)
    real = transform == identity_transform or family.support is constraints.real_vector
    return transform(torch.sinh(numbers) if real else numbers)


def _member(family: ExponentialFamily, edge: Edge, shape: torch.Size, dtype: torch.dtype) -> Any:
    return family.centred_at(_centre(family, edge, shape, dtype), 10.0**edge.power)


def _judge_edge(
    law: Law, family: ExponentialFamily, edge: Edge, shape: torch.Size, dtype: torch.dtype, seed: int
) -> suite.LawResult:
    """The law at this member and the one in the middle of the support."""
    try:
        states = (
            _member(family, edge, shape, dtype),
            family.centred_at(family.reference_like(torch.zeros(shape, dtype=dtype))),
        )
        if not family.curved:  # as the coordinates have it, so that both ways can be compared
            states = tuple(family.from_nat(family.to_nat(state)) for state in states)
        specimen = Specimen(family, shape, dtype, torch.device("cpu"), seed, states, sampling=False)
    except Exception as error:
        return suite.raised(law, error)
    return suite.judge(law, [specimen])


def in_support(s: Specimen) -> Findings:
    """Samples lie in the support, and log_prob is finite there."""
    family = s.family
    for number, state in enumerate(s.states):
        theta = family.sample(state, s.noise(32, SAMPLES, number))
        yield holds("samples are not finite", torch.isfinite(theta).all())
        yield holds("samples lie outside the support", family.support.check(theta).all())
        yield holds("log_prob is not finite at samples", torch.isfinite(family.log_prob(state, theta)).all())


def in_domain(s: Specimen) -> Findings:
    """The member lies in the domain, with a finite A and a finite mean."""
    family = s.family
    for state, nat in zip(s.states, s.nats, strict=True):
        yield holds("centred_at leaves the domain", family.in_domain(state))
        yield holds("log_partition is not finite", torch.isfinite(family.log_partition(nat)).all())
        for name, value in zip(family.Mean._fields, family.to_mean(nat), strict=True):
            yield holds(f"the mean of {name} is not finite", torch.isfinite(value).all())


def round_trips(s: Specimen) -> Findings:
    """Chart → λ → chart is the identity, for states and for sites, up to what rounding does on the way.

    Coordinates may be badly conditioned at an edge, so an error of one eps half way counts with what the way back
    makes of it.
    """
    family = s.family
    if family.curved:
        yield "round_trips: a curved family has no way back from the ambient coordinates"
        return
    for number, (state, nat) in enumerate(zip(s.states, s.nats, strict=True)):
        back, tolerances = s.rounded(family.from_nat, nat)
        yield s.near("from_nat(to_nat(state)) against state", back, state, tolerances)
        back, tolerances = s.rounded(family.to_nat, family.from_nat(nat))
        yield s.near("to_nat(from_nat(λ)) against λ", back, nat, tolerances)
        site = s.direction(number)
        back, tolerances = s.rounded(family.site_to_nat, family.site_from_nat(site, state), state)
        yield s.near("site_to_nat(site_from_nat(c)) against c", back, site, tolerances)


def divergence(s: Specimen) -> Findings:
    """KL ≥ 0 up to rounding, = 0 at equality, and finite."""
    for state, prior in s.pairs():
        yield holds("kl is not finite", torch.isfinite(s.family.kl(state, prior)).all())
    yield from density_laws.kl(s)


EDGE_LAWS: tuple[Law, ...] = (
    Law("in_domain", in_domain, "check centred_at, and that log_partition loses no digits or range there"),
    Law("round_trips", round_trips, "check to_nat and from_nat, site_to_nat and site_from_nat"),
    Law(
        "gradient_of_log_partition",
        density_laws.gradient_of_log_partition,
        "check log_partition, and to_mean if you wrote one",
    ),
    Law("in_support", in_support, "let sample end inside the support, e.g. clamp to the dtype's range"),
    Law("kl", divergence, "check kl if you wrote one, else log_partition"),
    Law("retraction", learning_laws.retraction, "check retract, and domain"),
)


# ---- the report of one law -----------------------------------------------------------------------------------


def _told(what: str, law: Law, result: suite.LawResult, member: str | None = None) -> str:
    """Which law, its statement, error and tolerance, at which member, and where to look."""
    statement = (law.test.__doc__ or "").partition("\n")[0]
    rows = {"law": statement, "found": result.detail}
    if math.isfinite(result.error):
        rows |= {"error": f"{result.error:.3g}", "tolerance": f"{result.tolerance:.3g}"}
    else:
        rows |= {"error": "inf", "tolerance": "none: it holds or it does not"}
    if member is not None:
        rows["member"] = member
    rows["remedy"] = law.hint
    return "\n".join([f"{what}:", *(f"  {name:<9}  {text}" for name, text in rows.items())])


def _described(family: ExponentialFamily, edge: Edge, shape: torch.Size, dtype: torch.dtype) -> str:
    centre = " ".join(f"{value:.6g}" for value in _centre(family, edge, shape, dtype).flatten().tolist())
    return f"centred_at({centre}, precision={10.0**edge.power:.6g}) in {name_of(dtype)}"
