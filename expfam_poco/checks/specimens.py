"""What the laws of a family are tested on: members, directions, draws, and how exactly numbers can agree.

A `Specimen` is one family on one device in one dtype. Its members are centred at random θ in the support with
several strengths, and moved off the centre by small steps along the statistics. Since every direction is a
combination of values of T it has the structure of T (a symmetric matrix where T is one), and nothing here needs
to know the family.

Two kinds of agreement are measured:

* *rounding* (`rounded`): an error may be as large as what one rounding of the inputs does to the result, times
  `SLACK`. The response to a relative perturbation of one eps is measured, so ill-conditioned maps get their due.
* *sampling* (`standard_errors`): a mean over K draws may be `SIGMAS` standard errors off, with Bernstein's
  correction for rare large values. The noise is counter-based, so the outcome never varies from run to run.

An expectation that does not rest on `family.sample` comes from `references`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import transform_to

from expfam_poco.checks.references import Member, Reference, represent, unseen
from expfam_poco.family import fields, hyperparameters
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.derived import fisher
from expfam_poco.family.noise import NoiseKey, noise, quantile

SLACK = 256.0
SIGMAS = 6.0
DRAWS = 10_000
STRENGTHS = (None, 0.5, 1.5, 4.0)
# Streams of the counter-based generator.
MEMBERS, STEPS, SAMPLES, MORE_SAMPLES, PROPOSALS, PROBES = range(6)


class Finding(NamedTuple):
    """One comparison of a law: what was compared, its error, and the largest error allowed."""

    what: str
    error: float
    tolerance: float

    @property
    def severity(self) -> float:
        """How the error compares with what is allowed: above 1 the law is broken."""
        if self.error <= self.tolerance:
            return self.error / self.tolerance if self.tolerance > 0.0 else 0.0
        return self.error / self.tolerance if self.tolerance > 0.0 and math.isfinite(self.error) else math.inf


class Unverified(str):
    """A law's remark that it could not be tested: it neither holds nor fails."""

    __slots__ = ()


@dataclass(frozen=True)
class Specimen:
    """One family on one device in one dtype, with the members at which its laws are tested.

    Attributes:
        shape: of the tensor that the family sees.
        states: the members in the family's chart.
        sampling: whether laws that need many draws, or float64, are tested here.
        reference: the specimen in the widest dtype on the first device, or None if it is this one.
    """

    family: ExponentialFamily
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    seed: int
    states: tuple[Any, ...] = ()
    sampling: bool = True
    reference: Specimen | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    # ---- members and directions --------------------------------------------------------------------------

    @property
    def eps(self) -> float:
        """The unit of rounding."""
        return torch.finfo(self.dtype).eps

    @property
    def batch(self) -> torch.Size:
        """One index per weight."""
        return self.shape[: len(self.shape) - self.family.event_dim]

    @cached_property
    def nats(self) -> tuple[Any, ...]:
        """The members in natural coordinates."""
        return tuple(self.family.to_nat(state) for state in self.states)

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Every member with another one, as a prior or as where to go."""
        return zip(self.states, self.states[1:] + self.states[:1], strict=True)

    def key(self, stream: int, step: int = 0) -> NoiseKey:
        """An address of noise; equal addresses in all dtypes give equal noise up to rounding."""
        return NoiseKey(self.seed, stream=stream, step=step)

    def normal(self, shape: tuple[int, ...], step: int, stream: int = STEPS) -> Tensor:
        """Standard normal numbers."""
        return noise("normal", shape, 1, self.key(stream, step), dtype=self.dtype, device=self.device)[0]

    def support_points(self, count: int, step: int = 0) -> Tensor:
        """Random θ in the support, count × P; draws from a member where the support has no transform."""
        numbers = 0.7 * self.normal((count, *self.shape), step, MEMBERS)
        try:
            return transform_to(self.family.support)(numbers)
        except NotImplementedError:
            middle = self.family.centred_at(self.family.reference_like(numbers[0]))
            return self.family.sample(middle, self.noise(count, MEMBERS, step)).to(self.dtype)

    def with_members(self) -> Specimen:
        """This specimen with members: centres × strengths, two moved along the statistics, and the middle one."""
        points = self.support_points(len(STRENGTHS))
        if self.family.curved:
            return self._with(self._curved_members(points))
        nats = [self.family.to_nat(self.family.centred_at(p, s)) for p, s in zip(points, STRENGTHS, strict=True)]
        nats += [self.moved(nats[number], 0.3, number) for number in (0, 3)]
        nats += [self.family.to_nat(self.family.centred_at(self.family.reference_like(points[0])))]
        return self._with(tuple(self.family.from_nat(nat) for nat in nats))

    def _curved_members(self, points: Tensor) -> tuple[Any, ...]:
        """The same of a curved family, moved by its own retraction."""
        family = self.family
        states = [family.centred_at(p, s) for p, s in zip(points, STRENGTHS, strict=True)]
        states += [family.centred_at(family.reference_like(points[0]))]
        moved = []
        for number, state in enumerate(states):
            direction = family.site_from_nat(family.Nat(*self.direction(60 + number)), state)
            moved.append(family.retract(state, direction, family.per_block(0.3, 0.3)))
        return (*moved[:-1], states[0], states[3], moved[-1])

    def seen(self, c: Any, state: Any) -> Any:
        """A natural gradient as the family can represent it: itself, or its projection if the family is curved."""
        if not self.family.curved:
            return c
        return self.family.site_to_nat(self.family.site_from_nat(c, state), state)

    def like(self, dtype: torch.dtype, device: torch.device) -> Specimen:
        """The same members in another dtype or on another device."""
        cast = tuple(fields.map_fields(lambda value: value.to(device, dtype), state) for state in self.states)
        return Specimen(
            fitted(self.family, self.shape, dtype, device), self.shape, dtype, device, self.seed, cast, False, self
        )

    def _with(self, states: tuple[Any, ...]) -> Specimen:
        return Specimen(self.family, self.shape, self.dtype, self.device, self.seed, states)

    def direction(self, step: int) -> Any:
        """Σ_j a_j T(θ_j) with random a and θ, as natural coordinates with entries of size about 1 in each field."""
        count = 16
        statistics = self.family.statistics(self.support_points(count, 100 + step))
        weights = self.normal((count, *self.batch), 100 + step)
        parts = []
        for value, dims in zip(statistics, self.family.statistic_dims, strict=True):
            total = (weights.reshape(*weights.shape, *(1,) * dims) * value).sum(0)
            parts.append(total / total.square().mean().sqrt().clamp_min(self.eps))
        return self.family.Nat(*parts)

    def moved(self, nat: Any, size: float, step: int) -> Any:
        """A member near `nat`: a step along `direction`, halved until a step twice as long stays in the domain."""
        direction = fields.map_fields(lambda v, d: v.abs().max().clamp_min(0.1) * d, nat, self.direction(step))
        for _ in range(40):
            far = fields.add(nat, fields.scale(direction, 2.0 * size))
            inside = bool(self.family.in_domain(self.family.from_nat(far)))  # elsewhere A may raise
            if inside and bool(torch.isfinite(self.family.log_partition(far)).all()):
                return fields.add(nat, fields.scale(direction, size))
            size = 0.5 * size
        return nat

    # ---- draws -------------------------------------------------------------------------------------------

    def noise(self, count: int, stream: int, step: int = 0) -> Tensor:
        """The family's own noise, count × P."""
        return self.family.noise(self.shape, count, self.key(stream, step), dtype=self.dtype, device=self.device)

    def draws(self, number: int) -> Tensor:
        """θ ~ q for member `number`: DRAWS × P."""
        return self._remember(
            ("draws", number), lambda: self.family.sample(self.states[number], self._noise_of(number))
        )

    def _noise_of(self, number: int) -> Tensor:
        return self.noise(DRAWS, SAMPLES, number)

    def deviations(self, number: int) -> Any:
        """√Var[T] at member `number` as the Fisher matrix has it, in the shape of T."""
        return self._remember(("deviations", number), lambda: self._deviations(self.nats[number]))

    def _deviations(self, nat: Any) -> Any:
        diagonal = fisher(self.family, nat).diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
        parts = diagonal.split([math.prod(value.shape[len(self.batch) :]) for value in nat], -1)
        return self.family.Mean(*(part.reshape(value.shape) for part, value in zip(parts, nat, strict=True)))

    def represented(self, number: int) -> Reference | None:
        """Member `number` by points that do not come from `family.sample`, or None where that is not possible."""
        return self._remember(("reference", number), lambda: self._represent(number))

    def _remember(self, name: Any, make: Callable[[], Any]) -> Any:
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def _represent(self, number: int) -> Reference | None:
        where = Member(self.family, self.states[number], self.shape, self.dtype, self.device)
        return represent(where, self.draws(number), self.key(PROPOSALS, number))

    def midpoints(self, count: int) -> Tensor:
        """Noise at the centres of `count` equal cells of probability, count × P, the same for every weight."""
        u = (torch.arange(count, dtype=self.dtype, device=self.device) + 0.5) / count
        epsilon = quantile(self.family.noise_kind, u)
        return epsilon.reshape(-1, *(1,) * len(self.shape)).expand(-1, *self.shape)

    # ---- agreement ---------------------------------------------------------------------------------------

    def rounded(self, function: Callable[..., Any], *inputs: Any) -> tuple[tuple[Tensor, ...], list[float]]:
        """A function's values as a tuple of tensors, and how far rounding may take each from the truth.

        That is SLACK × (eps × its size, at least 0.1, + its largest change when every input changes by one
        relative eps).
        """
        value = as_fields(function(*inputs))
        largest = [0.0] * len(value)
        for trial in range(2):
            generator = torch.Generator().manual_seed(trial)
            nudged = [nudge(argument, self.eps, generator) for argument in inputs]
            change = [size_of(a - b) for a, b in zip(as_fields(function(*nudged)), value, strict=True)]
            largest = [max(a, b) for a, b in zip(largest, change, strict=True)]
        return value, [SLACK * (self.eps * (0.1 + size_of(a)) + b) for a, b in zip(value, largest, strict=True)]

    def near(self, what: str, actual: Any, expected: Any, tolerances: list[float] | float) -> Finding:
        """The field in which two values differ most, compared with its tolerance."""
        actual, expected = as_fields(actual), as_fields(expected)
        if len(actual) != len(expected):
            return Finding(f"{what} ({len(actual)} fields instead of {len(expected)})", math.inf, 0.0)
        if isinstance(tolerances, float):
            tolerances = [tolerances] * len(actual)
        found = []
        for a, b, tolerance in zip(actual, expected, tolerances, strict=True):
            error = size_of(a.to(b.dtype) - b)
            found.append(Finding(f"{what} ({name_of(self.dtype)})", error, tolerance))
        return max(found, key=lambda finding: finding.severity)

    def shaped(self, what: str, value: Tensor, shape: torch.Size | tuple[int, ...]) -> Finding:
        """Whether a tensor has the right shape."""
        return holds(f"{what} has shape {tuple(value.shape)} instead of {tuple(shape)}", value.shape == tuple(shape))

    def averaged(
        self,
        what: str,
        number: int,
        function: Callable[[Tensor], Tensor],
        expected: Tensor,
        spread: Tensor | None = None,
        allowed: Any = 0.0,
    ) -> Finding:
        """E_q[f(θ)] at member `number` against its expectation: summed over a discrete θ's values, or by sampling."""
        reference = self.represented(number)
        if reference is None or not reference.exact or len(reference.theta) > 16:
            return self.sampled(what, function(self.draws(number)), expected, spread=spread, allowed=allowed)
        values = function(reference.theta)
        weight = torch.softmax(reference.log_weight, 0)
        mean = (weight.reshape(*weight.shape, *(1,) * (values.ndim - weight.ndim)) * values).sum(0)
        error = (mean - expected).abs().flatten()
        tolerance = (values.abs().amax(0) * (unseen(reference) + SLACK * self.eps)).flatten()
        worst = int((error / tolerance).nan_to_num(torch.inf).argmax())
        return Finding(f"{what} (all values)", size_of(error[worst]), size_of(tolerance[worst]))

    def sampled(
        self, what: str, values: Tensor, expected: Any, *, spread: Tensor | None = None, allowed: Any = 0.0
    ) -> Finding:
        """A mean over the first axis of `values` against its expectation, in standard errors."""
        error = standard_errors(values, expected, spread=spread, allowed=allowed, rare=True)
        return Finding(f"{what} (standard errors of {len(values)} draws)", error, SIGMAS)


def fitted(family: ExponentialFamily, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> ExponentialFamily:
    """The family with its own tensors, if there are any, for a tensor of this shape."""
    batch = shape[: len(shape) - family.event_dim]
    own: ExponentialFamily = hyperparameters.fitted(family, batch, f"shape={tuple(shape)}", dtype=dtype, device=device)
    return own


def standard_errors(
    values: Tensor,
    expected: Tensor | float,
    *,
    spread: Tensor | None = None,
    allowed: Tensor | float = 0.0,
    rare: bool = False,
) -> float:
    """The largest |mean − expected| over the entries, in standard errors of the mean over the first axis.

    The standard error of few values is itself uncertain: it grows so that SIGMAS is as unlikely for Student's t as
    for the normal distribution.

    Args:
        values: K × anything.
        expected: what the mean should be.
        spread: a known standard deviation, used where it exceeds the observed one.
        allowed: how far the expectation itself may be off; SIGMAS standard errors grow by it.
        rare: add Bernstein's term 2 max|value − mean| / K to each standard error, for values that a few rare draws
            dominate.

    Example:
        >>> import torch
        >>> round(standard_errors(torch.tensor([[0.0], [2.0]] * 5000), torch.tensor([0.9])), 1)
        9.9
    """
    count = len(values)
    mean = values.mean(0)
    deviation = values - mean
    sigma = deviation.square().mean(0).sqrt()
    if spread is not None:
        sigma = torch.maximum(sigma, torch.nan_to_num(spread))
    degrees = max(1, count - 1)
    student = math.sqrt(degrees * math.expm1(min(SIGMAS**2 / (degrees + 1), 100.0))) / SIGMAS
    error = student * sigma / math.sqrt(count)
    if rare:
        error = error + 2.0 * deviation.abs().amax(0) / count
    floor = SLACK * torch.finfo(values.dtype).eps * (values.abs().amax(0) + torch.as_tensor(expected).abs())
    return size_of((mean - expected) / (error + allowed / SIGMAS + floor + torch.finfo(values.dtype).tiny))


def holds(fault: str, condition: bool | Tensor) -> Finding:
    """A yes-or-no comparison: error 0, or infinite where the condition is false and `fault` describes it."""
    return Finding(fault, 0.0 if bool(condition) else math.inf, 0.0)


def as_fields(value: Any) -> tuple[Tensor, ...]:
    """A tensor as a tuple of one, tuples as they are."""
    return value if isinstance(value, tuple) else (value,)


def size_of(value: Tensor) -> float:
    """The largest magnitude; infinite where there is a NaN."""
    if value.numel() == 0:
        return 0.0
    largest = float(value.detach().abs().max())
    return math.inf if math.isnan(largest) else largest


def nudge(value: Any, eps: float, generator: torch.Generator) -> Any:
    """Every entry times 1 ± eps, the signs at random."""
    if isinstance(value, tuple):
        return fields.map_fields(lambda part: nudge(part, eps, generator), value)
    signs = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2.0 - 1.0
    return value * (1.0 + eps * signs)


def name_of(dtype: torch.dtype) -> str:
    """The name "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")
