"""Does a correction keep the laws? The conformance suite for built-in corrections and those of users alike.

`check_correction` puts a correction before small problems, one for each of several families, and runs every law on
them. The loss of example i is ⟨c_i, T(θ)⟩, measured as in training by an unbiased estimator of the family; mini-batches
are all pairs of examples, so that a mean or a spread over mini-batches is exact and nothing is drawn at random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from expfam_poco.checks import suite
from expfam_poco.checks.density_laws import Findings
from expfam_poco.checks.learning_laws import ESS, estimate
from expfam_poco.checks.specimens import SLACK, STEPS, Finding, Specimen, holds, size_of
from expfam_poco.correction import memory as memories
from expfam_poco.correction.base import Averaging, Corrected, Correction
from expfam_poco.correction.registry import resolve_correction
from expfam_poco.errors import LawError
from expfam_poco.family import fields
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Estimator
from expfam_poco.family.registry import resolve_family
from expfam_poco.rule import blr
from expfam_poco.rule.estimators import available

FAMILIES = ("diagonal_gaussian", "full_gaussian", "isotropic_gaussian", "bernoulli", "gamma")
EXAMPLES = 4
BATCHES = tuple(combinations(range(EXAMPLES), 2))
EVERYTHING = tuple(range(EXAMPLES))
ALPHA, SHARE = 0.7, 0.25
Sites = Callable[[Any], Any]  # the natural gradient of one mini-batch at a State


class Flow(NamedTuple):
    """What a step is made of: where it was evaluated, and the corrected natural gradient."""

    at: Any
    found: Corrected


@dataclasses.dataclass(frozen=True)
class Problem:
    """One correction before one family's problem of four examples."""

    correction: Correction
    specimen: Specimen

    @property
    def family(self) -> ExponentialFamily:
        """The family."""
        return self.specimen.family

    def noise(self, step: int = 0) -> Tensor:
        """The noise of all mini-batches at a step."""
        s = self.specimen
        value: Tensor = s._remember(("noise", step), lambda: s.noise(4, STEPS, 1000 + step))
        return value

    def loss(self, example: int) -> Any:
        """c of one example's loss ⟨c, T(θ)⟩."""
        s = self.specimen
        return s._remember(("loss", example), lambda: s.direction(1000 + example))

    def sites(self, batch: Sequence[int], step: int = 0) -> Sites:
        """State ↦ the mini-batch's natural gradient there, always with the same noise."""
        s = self.specimen
        mean = fields.map_fields(lambda *parts: sum(parts) / len(batch), *map(self.loss, batch))
        return lambda at: estimate(s, _unbiased(s.family), at, self.noise(step), mean)

    def averaging(self) -> Averaging:
        """No average of mega-batches, but the freshest."""
        return Averaging(self.family.per_block(0.0, 0.0), reanchor=True, anchor_weight=1.0)

    def refreshed(self, posterior: Any, step: int = 0) -> Any:
        """The memory after a refresh on all data, None if the correction has none."""
        begun = self.correction.begin(self.family, posterior)
        site = self.sites(EVERYTHING, step)(posterior)
        return self.correction.after_refresh(self.family, begun, posterior, site, self.averaging())

    def flow(self, state: Any, memory: Any, sites: Sites, *, alpha: float = 1.0, share: float = SHARE) -> Flow:
        """The corrected natural gradient as the optimizer makes it."""
        return corrected_flow(self.correction, self.family, state, memory, sites, alpha=alpha, share=share)

    def stepped(self, state: Any, memory: Any) -> Any:
        """The memory after one more step from `state`, towards the second member."""
        found = self.flow(state, memory, self.sites(BATCHES[0])).found
        return self.correction.after_step(self.family, memory, state, self.specimen.states[1], found)

    def memories(self) -> Iterator[tuple[str, Any]]:
        """A memory of every origin, with the method that it is from."""
        state, other = self.specimen.states[:2]
        begun = self.correction.begin(self.family, state)
        refreshed = self.refreshed(other)
        made = {"begin": begun, "after_refresh": refreshed, "after_step": self.stepped(state, refreshed)}
        yield from ((name, memory) for name, memory in made.items() if memory is not None)


def corrected_flow(
    correction: Correction,
    family: ExponentialFamily,
    state: Any,
    memory: Any,
    sites: Sites,
    *,
    alpha: float,
    share: float,
) -> Flow:
    """One mini-batch's natural gradient at λ̃, corrected if the memory names a reference."""
    at = state if memory is None else correction.where(family, state, memory, share)
    reference = None if memory is None else correction.reference(memory)
    if reference is None:
        return Flow(at, Corrected(sites(at), None))
    weights = family.per_block(alpha, alpha)
    pair = sites(at), sites(reference)
    return Flow(at, correction.correct(family, *pair, state, memory, alpha=weights, anchor_weight=1.0))


def _unbiased(family: ExponentialFamily) -> Estimator:
    """The family's default estimator, or its first unbiased one if the default is biased."""
    fitting = available(family)
    default = fitting[family.default_estimator]
    return default if default.unbiased else next(each for each in fitting.values() if each.unbiased)


def _allowed(s: Specimen, *values: Any) -> float:
    """What rounding may do to sums of these values."""
    largest = max((size_of(tensor) for _, tensor in memories.tensors(values)), default=0.0)
    return SLACK * s.eps * (1.0 + largest)


# ---- what a correction declares and remembers ---------------------------------------------------------------


def declarations(p: Problem) -> Findings:
    """Class attributes fit together: a reference is a State, costs an evaluation, and has a mean Site or none."""
    correction, family = p.correction, p.family
    frozen = dataclasses.is_dataclass(correction) and type(correction).__dataclass_params__.frozen  # type: ignore[attr-defined]
    yield holds("the correction is no frozen dataclass", frozen)
    named = isinstance(correction.Memory, type) and hasattr(correction.Memory, "_fields")
    yield holds("Memory is no NamedTuple", named)
    for name, least in (("evaluations", 1), ("refresh_evaluations", 0)):
        count = getattr(correction, name)
        yield holds(f"{name}={count!r} is no integer from {least} on", isinstance(count, int) and count >= least)
    memory = p.refreshed(p.specimen.states[1])
    reference = None if memory is None else correction.reference(memory)
    costs = "a reference is a second evaluation, without one there is none"
    cost = correction.evaluations
    yield holds(f"evaluations={cost!r}, but {costs}", (cost > 1) == (reference is not None))
    if reference is not None:
        mean = correction.mean(memory)
        yield holds("reference is no State of the family", reference._fields == family.State._fields)
        yield holds("mean is no Site of the family", mean is None or mean._fields == family.Site._fields)


def memory(p: Problem) -> Findings:
    """The memory is a `Memory` of finite tensors, with the weights' axes, dtype and device."""
    s = p.specimen
    for origin, found in p.memories():
        yield holds(f"{origin} gives no Memory", isinstance(found, p.correction.Memory))
        for path, tensor in memories.tensors(found):
            name = f"{path} of {origin}"
            constant = tensor.ndim == 0 and "." in path  # the family's own
            axes = constant or tensor.shape[: len(s.batch)] == s.batch
            yield holds(f"{name} is {tuple(tensor.shape)}, without the weights' axes {tuple(s.batch)}", axes)
            yield holds(f"{name} is not finite", torch.isfinite(tensor).all())
            kept = tensor.dtype == s.dtype and tensor.device.type == s.device.type
            yield holds(f"{name} is {tensor.dtype} on {tensor.device}", kept)
        strangers = [name for name, value in found._asdict().items() if not isinstance(value, tuple | Tensor)]
        yield holds(f"{strangers} of {origin} are no States, Sites or tensors", not strangers)


def checkpoint(p: Problem) -> Findings:
    """A memory goes through plain dictionaries of tensors and comes back bit for bit."""
    for origin, found in p.memories():
        plain = memories.to_plain(found)
        back = memories.from_plain(p.correction.Memory, p.family, plain)
        same = _identical(back, found)
        yield holds(f"the memory of {origin} comes back changed", same)
        flat = all(isinstance(v, Tensor) or all(isinstance(x, Tensor) for x in v.values()) for v in plain.values())
        yield holds(f"the memory of {origin} is nested deeper than States and Sites", flat)


def _identical(one: Any, two: Any) -> bool:
    """The same tensors by the same paths, bit for bit."""
    first, second = dict(memories.tensors(one)), dict(memories.tensors(two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- functions ----------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What all methods take: λ, another λ, a mini-batch's sites at λ and at the reference, and a memory."""

    state: Any
    other: Any
    site: Any
    site_ref: Any
    memory: Any


def _inputs(p: Problem) -> Inputs:
    state, other = p.specimen.states[:2]
    found = p.refreshed(other)
    reference = None if found is None else p.correction.reference(found)
    sites = p.sites(BATCHES[0])
    return Inputs(state, other, sites(state), sites(other if reference is None else reference), found)


def outputs(p: Problem, given: Inputs, share: Any = SHARE) -> dict[str, Any]:
    """What every method makes of the same inputs, by name."""
    c, family, found = p.correction, p.family, given.memory
    if found is None:
        return {}
    values = {"begin": c.begin(family, given.state), "where": c.where(family, given.state, found, share)}
    corrected = Corrected(given.site, None)
    if c.reference(found) is not None:
        values |= {"reference": c.reference(found), "mean": c.mean(found)}
        weights = family.per_block(ALPHA, ALPHA)
        pair = given.site, given.site_ref
        corrected = c.correct(family, *pair, given.state, found, alpha=weights, anchor_weight=0.5)
        values["correct"] = corrected.total()
    values["after_step"] = c.after_step(family, found, given.state, given.other, corrected)
    values["after_refresh"] = c.after_refresh(family, found, given.state, given.site, p.averaging())
    return {name: value for name, value in values.items() if value is not None}


def pure(p: Problem) -> Findings:
    """No method changes its inputs, and equal inputs give equal results."""
    given = _inputs(p)
    if given.memory is None:
        return
    kept = memories.map_tensors(torch.clone, given)
    first = memories.map_tensors(torch.clone, tuple(outputs(p, given).values()))
    for name, value in zip(given._fields, given, strict=True):
        yield holds(f"some method changes its argument {name}", _identical(value, getattr(kept, name)))
    again = tuple(outputs(p, given).values())
    yield holds("the same inputs give another result the second time", _identical(first, again))


def tiles(p: Problem) -> Findings:
    """A correction acts on every weight by itself: on some of the weights it does what it does on all."""
    s = p.specimen
    dims, weights = len(s.batch), s.batch.numel()
    given = _inputs(p)
    if s.family.joint or weights < 2 or given.memory is None:
        return

    def half(value: Tensor) -> Tensor:
        if value.shape[:dims] != s.batch:
            return value  # a constant of the family
        return value.flatten(0, dims - 1).narrow(0, weights // 2, weights - weights // 2)

    whole, part = outputs(p, given), outputs(p, memories.map_tensors(half, given))
    for name, value in whole.items():
        expected, found = (dict(memories.tensors(each)) for each in (memories.map_tensors(half, value), part[name]))
        allowed = 0.25 * _allowed(s, *given, value)
        for path, tensor in expected.items():
            error = size_of(found[path] - tensor)
            yield Finding(f"{name}.{path} of half the weights against half of it", error, allowed)


def traces(p: Problem) -> Findings:
    """The methods can be traced into a kernel: no value of a tensor decides what is computed."""
    s, given = p.specimen, _inputs(p)
    if s.family.joint or s.family.event_dim or given.memory is None:
        return  # stepped whole, without a kernel
    leaves = [tensor for _, tensor in memories.tensors(given)]
    share = torch.tensor(SHARE, dtype=s.dtype, device=s.device)

    def kernel(share: Tensor, *values: Tensor) -> list[Tensor]:
        source = iter(values)
        traced = outputs(p, memories.map_tensors(lambda _: next(source), given), share)
        return [tensor for _, tensor in memories.tensors(tuple(traced.values()))]

    try:
        graph = make_fx(kernel, tracing_mode="fake")(share, *leaves)
    except Exception as error:
        yield holds(f"tracing ends with {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}", False)
        return
    expected, found = kernel(share, *leaves), graph(share, *leaves)
    same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    yield holds("the traced methods give another result", same)


# ---- mathematics --------------------------------------------------------------------------------------------


def members(p: Problem) -> Findings:
    """Where natural gradients are asked for, λ̃ and λ_ref, there is a member of the family."""
    for _, found in p.memories():
        for state in p.specimen.states[:3]:
            at = p.correction.where(p.family, state, found, SHARE)
            yield holds("where leaves the family's domain", p.family.in_domain(at))
        reference = p.correction.reference(found)
        if reference is not None:
            yield holds("reference lies outside the family's domain", p.family.in_domain(reference))


def unbiased(p: Problem) -> Findings:
    """After a refresh on all data, the corrected natural gradient's mean over mini-batches is the plain one's at λ."""
    if not p.correction.unbiased:
        yield "unbiased: it does not claim to be"
        return
    s = p.specimen
    for state, other in ((s.states[0], s.states[1]), (s.states[2], s.states[0])):
        found = p.refreshed(other)
        every = [p.flow(state, found, p.sites(batch), alpha=ALPHA).found for batch in BATCHES]
        totals = [each.total() for each in every]
        mean = fields.map_fields(lambda *parts: sum(parts) / len(parts), *totals)
        expected = p.sites(EVERYTHING)(state)
        allowed = _allowed(s, expected, found, *totals, *(each.site for each in every))
        yield s.near("mean over all mini-batches against the natural gradient of all data", mean, expected, allowed)


def zero_variance(p: Problem) -> Findings:
    """At λ = λ_ref, with α = 1 and one noise for both, all mini-batches and noises give the same."""
    if not p.correction.exact_at_reference:
        yield "zero_variance: it does not claim to have none"
        return
    s = p.specimen
    for posterior in s.states[:3]:
        found = p.refreshed(posterior)
        state = p.correction.reference(found)
        totals = [
            p.flow(state, found, p.sites(batch, step), share=1.0).found.total() for batch in BATCHES for step in (0, 1)
        ]
        sites = [p.sites(batch, step)(state) for batch in BATCHES for step in (0, 1)]
        allowed = _allowed(s, found, *sites)
        for total in totals[1:]:
            yield s.near("one mini-batch's corrected natural gradient against another's", total, totals[0], allowed)


def neutral(p: Problem) -> Findings:
    """With α = 0 (and its `neutral` settings) it is the plain rule bit for bit, with momentum, steps and refreshes."""
    settings = p.correction.neutral
    still = dataclasses.replace(p, correction=dataclasses.replace(p.correction, **settings))
    plain = dataclasses.replace(p, correction=Correction())
    for number, (one, two) in enumerate(zip(_trajectory(still), _trajectory(plain), strict=True)):
        what = f"step {number + 1} at α = 0{''.join(f', {k} = {v}' for k, v in settings.items())}"
        yield holds(f"{what} is not the plain rule's", _identical(one, two))


def _trajectory(p: Problem, steps: int = 5) -> Iterator[blr.BLRState]:
    """Steps at α = 0 with momentum, and a refresh before the third."""
    family, prior, beta = p.family, p.specimen.states[2], 0.9
    rates = family.per_block(0.02, 0.02)
    now = blr.BLRState(p.specimen.states[0], ())
    found = p.correction.begin(family, now.posterior)
    for step in range(1, steps + 1):
        if step == 3:
            site = p.sites(EVERYTHING, step)(now.posterior)
            found = p.correction.after_refresh(family, found, now.posterior, site, p.averaging())
        share = (1.0 - beta) / (1.0 - beta**step)
        first = step == 1  # the memory that began is no reference yet
        at = now.posterior if found is None else p.correction.where(family, now.posterior, found, share)
        batch = BATCHES[step % len(BATCHES)]
        if first:
            corrected = Corrected(p.sites(batch, step)(at), None)
        else:
            corrected = p.flow(now.posterior, found, p.sites(batch, step), alpha=0.0, share=share).found
        site, anchor = corrected
        after = blr.update(family, now, prior, site, anchor=anchor, rates=rates, ess=ESS, momentum=beta, step=step)
        if found is not None:
            found = p.correction.after_step(family, found, now.posterior, after.posterior, corrected)
        now = after
        yield now


class InNaturalCoordinates(ExponentialFamily):
    """A family kept in natural coordinates, whatever its own chart is; only what corrections and plain steps need."""

    def __init__(self, family: ExponentialFamily) -> None:
        for name, value in {"family": family, "Nat": family.Nat, "State": family.Nat, "Site": family.Nat}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "momentum_block", family.Nat._fields)

    family: ClassVar[Any]

    def statistics(self, theta: Tensor) -> Any:
        """The family's."""
        return self.family.statistics(theta)

    def log_partition(self, nat: Any) -> Tensor:
        """The family's."""
        value: Tensor = self.family.log_partition(nat)
        return value

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """The family's."""
        value: Tensor = self.family.sample(self.family.from_nat(state), noise)
        return value

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Any:
        """The family's."""
        return self.family.to_nat(self.family.centred_at(theta, precision))

    def kl_gradient(self, state: Any, prior: Any) -> Any:
        """λ − λ₀."""
        return fields.subtract(state, prior)


def chart(p: Problem) -> Findings:
    """Corrected steps in the family's chart are the same steps in natural coordinates."""
    s, family = p.specimen, p.family
    if family.curved:
        yield "chart: most natural parameters belong to no member of a curved family"
        return
    if p.correction.moves:
        yield "chart: momentum averages a block of the chart, and where a site is measured follows it"
        return
    nats = _steps_to_members(p, InNaturalCoordinates(family), s.nats)
    states = _steps_to_members(p, family, s.states)
    for number, (nat, state) in enumerate(zip(nats, states, strict=True)):
        sizes = [40.0 * SLACK * s.eps * (1.0 + size_of(value)) for value in nat]
        what = f"λ after step {number + 1} in the chart against natural coordinates"
        yield s.near(what, family.to_nat(state), nat, sizes)


def _steps_to_members(p: Problem, family: ExponentialFamily, states: Sequence[Any]) -> list[Any]:
    """Plain steps, each half way to a member or to its mini-batch's, so that they stay in the domain."""
    prior, now = states[2], states[0]
    targets = p.specimen.nats
    mixed = Averaging(family.per_block(0.5, 0.5), reanchor=True, anchor_weight=1.0)
    rates = family.per_block(0.02, 0.02)
    nat_prior = p.specimen.nats[2]

    def sites(batch: Sequence[int], at: Any) -> Any:
        goal = fields.map_fields(lambda *parts: sum(parts) / len(parts), *(targets[i] for i in batch))
        here = family.to_nat(at)
        g = fields.map_fields(lambda p0, t, lam: (p0 - 0.5 * (t + lam)) / ESS, nat_prior, goal, here)
        return family.site_from_nat(family.Site(*g), at)

    found, path = p.correction.begin(family, now), []
    for step in range(6):
        if step % 3 == 0:
            mean = sites(EVERYTHING, now)
            found = p.correction.after_refresh(family, found, now, mean, mixed)
        one = partial(sites, BATCHES[step % len(BATCHES)])
        site, anchor = corrected_flow(p.correction, family, now, found, one, alpha=ALPHA, share=1.0).found
        start = blr.BLRState(now, ())
        after = blr.update(
            family, start, prior, site, anchor=anchor, rates=rates, ess=ESS, retraction="plain"
        ).posterior
        if found is not None:
            found = p.correction.after_step(family, found, now, after, Corrected(site, anchor))
        now = after
        path.append(now)
    return path


# ---- the suite ----------------------------------------------------------------------------------------------


class CorrectionLaw(NamedTuple):
    """A law's name, its test, what to look at when it fails, and whether the laws after it rest on it."""

    name: str
    test: Callable[[Problem], Findings]
    hint: str
    essential: bool = False


CORRECTION_LAWS: tuple[CorrectionLaw, ...] = (
    CorrectionLaw("declarations", declarations, "correct the class attributes, reference and mean", essential=True),
    CorrectionLaw(
        "memory", memory, "let begin, after_refresh and after_step keep one value per weight", essential=True
    ),
    CorrectionLaw("checkpoint", checkpoint, "let Memory have States, Sites and tensors as fields, nothing else"),
    CorrectionLaw("pure", pure, "make new tensors, and change none that was given"),
    CorrectionLaw("tiles", tiles, "large tensors are stepped in parts: let no weight depend on others"),
    CorrectionLaw("traces", traces, "use torch.where in place of `if` on a tensor's value"),
    CorrectionLaw("members", members, "move by family.retract or extrapolate, or mix natural coordinates"),
    CorrectionLaw("unbiased", unbiased, "check correct, after_refresh and what `unbiased` claims"),
    CorrectionLaw("zero_variance", zero_variance, "check correct, and what `exact_at_reference` claims"),
    CorrectionLaw("neutral", neutral, "at α = 0 let correct give the site itself, or declare `neutral` settings"),
    CorrectionLaw("chart", chart, "bring sites from one posterior to another with family.carry and family.reanchor"),
)


def check_correction(
    correction: str | type[Correction] | Correction,
    families: Sequence[str | type[ExponentialFamily] | ExponentialFamily] | None = None,
    *,
    seed: int = 0,
    raise_on_failure: bool = True,
) -> suite.Report:
    """Run every law on a correction, in float64 on the CPU.

    Args:
        correction: an instance, a class, or the name of a built-in one.
        families: before which families; diagonal, full and isotropic Gaussians, Bernoulli and gamma if None.
        seed: of the test points and of the counter-based noise.
        raise_on_failure: raise at the end if some law failed; False only reports.

    Returns:
        A `Report`.

    Raises:
        LawError: if a law fails; the sentence names it, the error, the tolerance and what to look at.

    Example:
        >>> import expfam_poco as poco
        >>> report = poco.checks.check_correction("snapshot", families=["bernoulli"])
        >>> report.passed, report.laws[-1].name
        (True, 'chart')
    """
    __tracebackhide__ = True
    instance = resolve_correction(correction)
    with suite.isolated(seed):
        problems = [Problem(instance, _specimen(resolve_family(each), seed)) for each in families or FAMILIES]
        report = _run(instance, problems)
    if raise_on_failure and not report.passed:
        raise LawError(suite.sentence(report, CORRECTION_LAWS), report)
    return report


def _specimen(family: ExponentialFamily, seed: int) -> Specimen:
    shape = suite.default_shape(family)
    return Specimen(family, shape, torch.float64, torch.device("cpu"), seed).with_members()


def _run(correction: Correction, problems: Sequence[Problem]) -> suite.Report:
    """Run the laws in order; one that the others rest on ends the run where it fails."""
    results: list[suite.LawResult] = []
    for law in CORRECTION_LAWS:
        results.append(suite.judge(law._replace(test=_telling_family(law.test)), problems))
        if law.essential and not results[-1].passed:
            break
    return suite.Report(repr(correction), tuple(results))


def _telling_family(test: Callable[[Problem], Findings]) -> Callable[[Problem], Findings]:
    """The same law, whose findings say before which family."""

    def told(p: Problem) -> Findings:
        name = type(p.family).__name__
        for finding in test(p):
            yield finding if isinstance(finding, str) else finding._replace(what=f"{finding.what} ({name})")

    told.__doc__ = test.__doc__
    return told
