"""Does a family keep the laws? The public conformance suite, for built-in families and those of users alike.

`check_family` puts a family into specimens (members in float32 and float64, on every device there is), runs every
law of the four modules of laws on them, and says which law fails, by how much, and where to look. `FamilyLaws` is
the same as a class of tests for pytest, with a search for members that break a law near the edges. Laws that
compare with a mean over draws use counter-based noise, so a family that passes once passes always.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributions import constraints

from expfam_poco.checks import curved_laws, density_laws, fit_law, learning_laws, noiseless_laws, output_laws
from expfam_poco.checks.compiled_law import COMPILED
from expfam_poco.checks.density_laws import Law
from expfam_poco.checks.specimens import Finding, Specimen, Unverified, fitted
from expfam_poco.errors import LawError
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.hyperparameters import is_per_weight, tensors
from expfam_poco.family.registry import resolve_family

LAWS: tuple[Law, ...] = (
    Law("declarations", density_laws.declarations, "correct the class attribute", essential=True),
    Law(
        "centred_at", density_laws.centred_at, "check centred_at, statistics, log_partition and domain", essential=True
    ),
    Law("noise", density_laws.noise, "it must follow from shape, draws and key alone (expfam_poco.noise makes such)"),
    Law("round_trips", density_laws.round_trips, "check to_nat and from_nat, site_to_nat and site_from_nat"),
    Law("samples", density_laws.samples, "check sample, and whether support and noise_kind belong to it"),
    Law(
        "goodness_of_fit",
        fit_law.goodness_of_fit,
        "check sample against h exp(⟨λ, T⟩ − A); a density of another form is not an exponential family",
    ),
    Law(
        "gradient_of_log_partition",
        density_laws.gradient_of_log_partition,
        "check log_partition, and to_mean if you wrote one",
    ),
    Law("fisher", density_laws.fisher_information, "check log_partition, and fisher_vector_product if you wrote one"),
    Law("to_natural", density_laws.to_natural, "check to_natural, and that domain is declared"),
    Law("log_prob", density_laws.log_prob, "check log_partition, including its constants, and log_base_measure"),
    Law("entropy", density_laws.entropy, "check entropy, and expected_log_base_measure where h is not constant"),
    Law("kl", density_laws.kl, "check kl if you wrote one, else log_partition"),
    Law("distribution", density_laws.distribution, "check the object that distribution returns, and its .to_event"),
    Law("point", density_laws.point, "check point, recentre and centred_at against each other"),
    Law("kl_gradient", learning_laws.kl_gradient, "check the sign and the coordinates of kl_gradient"),
    Law(
        "natural_gradient",
        learning_laws.natural_gradient,
        "check natural_gradient, the estimators and what they declare (unbiased, needs)",
    ),
    Law("zero_variance", learning_laws.zero_variance, "natural_gradient must be a function of state and draws alone"),
    Law("own_site", noiseless_laws.own_site, "check log_ratio and log_ratio_gradient if you wrote them"),
    Law("regression", noiseless_laws.regression, "check the regressed natural gradients and least_draws"),
    Law("reanchor", learning_laws.reanchor, "a site moved to another state is the same function ⟨∇̃L, T(θ)⟩"),
    Law("retraction", learning_laws.retraction, "check retract (a precision moves before its mean) and domain"),
    Law("chart", learning_laws.chart, "check retract, reanchor, kl_gradient and the sites"),
    Law("conjugate", learning_laws.conjugate, "check retract with equal rates and variant 'plain'"),
    Law("expansion", curved_laws.expansion, "check expand, project and carry of the curved family against each other"),
    Law(
        "spans",
        output_laws.spans,
        "large tensors are stepped in parts: let no weight depend on others, or declare joint or event_dim",
    ),
    Law(
        "as_trained",
        output_laws.as_trained,
        "the optimizer runs under torch.no_grad: let nothing depend on the surrounding grad mode, nor write to inputs",
    ),
    Law("dtypes", output_laws.dtypes, "make new tensors with the dtype of the inputs, and avoid cancellation"),
    Law("devices", output_laws.devices, "make new tensors on the device of the inputs"),
)


@dataclass(frozen=True)
class LawResult:
    """The outcome of one law.

    Attributes:
        name: of the law.
        error: the worst error found, relative to what is allowed; infinite for a yes-or-no rule that is broken.
        tolerance: what is allowed for it.
        passed: whether nothing was found against the law.
        verified: whether all of it could be tested; where not, `status` is "not verified".
        detail: what was compared, remarks on what could not be tested, or the exception that was raised.

    Example:
        >>> from expfam_poco.checks import LawResult
        >>> LawResult("kl", 0.5, 1e-3, False, "kl at equality against 0").passed
        False
    """

    name: str
    error: float
    tolerance: float
    passed: bool
    detail: str = ""
    verified: bool = True

    @property
    def status(self) -> str:
        """What reports print: "ok", "FAILS" or "not verified"."""
        return "FAILS" if not self.passed else "ok" if self.verified else "not verified"


@dataclass(frozen=True)
class Report:
    """The outcome of all laws for one family; `str(report)` is a table.

    Example:
        >>> import expfam_poco as poco
        >>> report = poco.check_family("isotropic_gaussian", dtypes=(torch.float64,))
        >>> report.passed, report.laws[0].name
        (True, 'declarations')
    """

    family: str
    laws: tuple[LawResult, ...]

    @property
    def passed(self) -> bool:
        """Whether every law holds."""
        return all(law.passed for law in self.laws)

    @property
    def unverified(self) -> tuple[LawResult, ...]:
        """The laws of which some part could not be tested, though nothing was found against them."""
        return tuple(law for law in self.laws if law.status == "not verified")

    @property
    def failures(self) -> tuple[LawResult, ...]:
        """The laws that fail, the most elementary first."""
        return tuple(law for law in self.laws if not law.passed)

    def __str__(self) -> str:
        broken = len(self.failures)
        open_ = len(self.unverified)
        verdict = "keeps every law" if not broken else f"breaks {broken} of {len(self.laws)} laws"
        if open_ and not broken:
            verdict = f"breaks no law, but {open_} of {len(self.laws)} are not verified"
        width = max(len(law.name) for law in self.laws)
        wide = max(6, *(len(law.status) for law in self.laws))
        lines = [
            f"{self.family} {verdict}",
            f"  {'law':<{width}}  {'result':<{wide}}     error  tolerance  what was compared",
        ]
        for law in self.laws:
            row = f"  {law.name:<{width}}  {law.status:<{wide}}  {law.error:8.2g}  {law.tolerance:9.2g}  {law.detail}"
            lines.append(row.rstrip())
        return "\n".join(lines)


def check_family(
    family: str | type[ExponentialFamily] | ExponentialFamily,
    *,
    seed: int = 0,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    devices: Sequence[torch.device | str] | None = None,
    shape: Sequence[int] | None = None,
    compiled: bool = False,
    raise_on_failure: bool = True,
) -> Report:
    """Run every law on a family.

    Args:
        family: an instance, a class, or a registered name.
        seed: of the test points and of the counter-based noise.
        dtypes: the precisions to test, float32 and float64 or one of them; laws by sampling use the widest.
        devices: where to test; the CPU, and CUDA where there is one, if None.
        shape: of the tensor that the family is to see, if it needs a particular one.
        compiled: also whether a step can be compiled, as steps of large models are; takes some seconds.
        raise_on_failure: raise at the end if some law failed; False only reports.

    Returns:
        A `Report`.

    Raises:
        LawError: if a law fails; the sentence names it, the error, the tolerance and what to look at.
        ValueError: for dtypes other than float32 and float64, or none.

    Example:
        >>> import expfam_poco as poco
        >>> poco.check_family("bernoulli").passed
        True
    """
    __tracebackhide__ = True
    instance = resolve_family(family)
    if not dtypes or not set(dtypes) <= {torch.float32, torch.float64}:
        raise ValueError(f"dtypes={tuple(dtypes)}: posteriors are kept in torch.float32 or torch.float64; give these.")
    places = [torch.device(device) for device in devices or _devices()]
    with isolated(seed, places):
        report = _run(instance, seed, dtypes, places, shape, (*LAWS, COMPILED) if compiled else LAWS)
    if raise_on_failure and not report.passed:
        raise LawError(sentence(report, (*LAWS, COMPILED)), report)
    return report


@contextmanager
def isolated(seed: int, places: Sequence[torch.device] | None = None) -> Iterator[None]:
    """Torch's generators seeded inside and put back afterwards, and one thread.

    On a busy machine several threads wait for each other many times longer than these small tensors take.
    """
    cuda = [place.index or 0 for place in places or map(torch.device, _devices()) if place.type == "cuda"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _run(
    family: ExponentialFamily,
    seed: int,
    dtypes: Sequence[torch.dtype],
    places: Sequence[torch.device],
    shape: Sequence[int] | None,
    laws: Sequence[Law],
) -> Report:
    """Run the laws in order; one that the others rest on ends the run where it fails."""
    size = torch.Size(shape) if shape is not None else default_shape(family)
    specimens = [Specimen(family, size, max(dtypes, key=_digits), places[0], seed)]
    results: list[LawResult] = []
    for law in laws:
        if law.name == "centred_at":
            try:
                specimens = specimens_of(family, seed=seed, dtypes=dtypes, places=places, shape=shape)
            except Exception as error:
                results.append(raised(law, error))
                break
        result = judge(law, specimens)
        results.append(result)
        if law.essential and not result.passed:
            break
    return Report(repr(family), tuple(results))


def specimens_of(
    family: ExponentialFamily,
    *,
    seed: int = 0,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    places: Sequence[torch.device] | None = None,
    shape: Sequence[int] | None = None,
) -> list[Specimen]:
    """Members in the widest dtype on the first device, and the same in the other dtypes and on the other devices."""
    size = torch.Size(shape) if shape is not None else default_shape(family)
    places = places or [torch.device(device) for device in _devices()]
    twins = [(dtype, place) for place in places for dtype in sorted(dtypes, key=_digits, reverse=True)]
    first = Specimen(fitted(family, size, *twins[0]), size, *twins[0], seed).with_members()
    return [first, *(first.like(dtype, place) for dtype, place in twins[1:])]


def _digits(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps


def default_shape(family: ExponentialFamily) -> torch.Size:
    """A small tensor that the family can see."""
    if family.event_dim:
        if isinstance(family.support, constraints.cat):  # which says how long a weight is
            return torch.Size((2, sum(family.support.lengths)))
        event = (8 if family.joint and family.curved else 3,) * family.event_dim
        return torch.Size(event if family.joint else (2, *event))
    own = [value.shape for name, value in tensors(family).items() if is_per_weight(family, name)]
    if own and not family.joint:
        return torch.broadcast_shapes(*own)
    return torch.Size((3,) if family.joint else (2, 3))


def judge(law: Any, specimens: Sequence[Any]) -> LawResult:
    """Run one law (of families or of corrections) on everything to be tested, and keep its worst finding."""
    worst, remarks, verified = Finding("", 0.0, 0.0), dict[str, None](), True
    try:
        for specimen in specimens:
            for finding in law.test(specimen):
                if isinstance(finding, str):
                    remarks[finding] = None
                    verified = verified and not isinstance(finding, Unverified)
                elif finding.severity > worst.severity:
                    worst = finding
    except Exception as error:
        if worst.severity <= 1.0:
            return raised(law, error)
    statement = (law.test.__doc__ or "").splitlines()[0]
    what = worst.what if worst.severity > 0.0 else statement.removesuffix(".")
    return LawResult(
        law.name, worst.error, worst.tolerance, worst.severity <= 1.0, "; ".join([what, *remarks]), verified
    )


def raised(law: Any, error: Exception) -> LawResult:
    """The outcome of a law that met an exception."""
    text = " ".join(str(error).split()) or "no message"
    return LawResult(law.name, math.inf, 0.0, False, f"raised {type(error).__name__}: {text}")


def remedy_of(name: str, laws: Sequence[Any] | None = None) -> str:
    """What to look at where this law fails."""
    return next((law.hint for law in laws or (*LAWS, COMPILED) if law.name == name), "")


def sentence(report: Report, laws: Sequence[Any]) -> str:
    """Which law fails, by how much, and what to look at."""
    first, *others = report.failures
    hint = remedy_of(first.name, laws)
    measured = "" if math.isinf(first.error) else f": error {first.error:.3g} where {first.tolerance:.3g} is allowed"
    also = f" (then also fail: {', '.join(law.name for law in others)})" if others else ""
    return f"{report.family} breaks the law {first.name!r}: {first.detail}{measured}; {hint}{also}."


__all__ = ["LAWS", "LawError", "LawResult", "Report", "check_family"]
