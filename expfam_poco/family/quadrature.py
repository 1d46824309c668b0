r"""Integrals over one weight, from its density alone: what a family needs where it gives no closed form.

For weights that are one number each, in coordinates x in which the support is the line (`biject_to`), the density

    g(x) = log h(θ(x)) + ⟨λ, T(θ(x))⟩ + log |dθ/dx|

is taken to have one mode. Its mode is found by golden sections, the places where g has fallen by `DROP` by bisection,
and between them lie `PANELS` panels with `NODES` Gauss–Legendre nodes each: what is left out has a mass of e^−56. Of
integers up to `WINDOW` values around the mode are summed instead.

From the nodes follow A(λ) with its derivatives (the nodes held fixed, ∇A = Σ p T and ∇²A = Σ p (T − μ)(T − μ)ᵀ), any
expectation, and draws by inversion, θ = F⁻¹(u), with the derivative of the draw by the implicit function theorem,

    ∂x/∂λ_j = −∂F/∂λ_j / f = −∫_{−∞}^x (T_j − μ_j) f dt / f(x),

from the nearer tail. All in float64, entry by entry, without control flow that depends on data.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from expfam_poco.family.inversion import increasing_root

if TYPE_CHECKING:
    from expfam_poco.family.base import ExponentialFamily

PANELS, NODES, DROP = 24, 8, 56.0  # draws go out to 2⁻³³ = e^−23
WINDOW = 1024  # integers around the mode
SECTIONS, HALVINGS, ITERATIONS = 30, 20, 9
GRADING = 1.5  # panels are narrow at the mode: the tails of densities are often long, and straight in x
OVERFLOW = 1e100  # a logarithm beyond which h exp⟨λ, T⟩ only ends where numbers do
CHUNK = 2**12  # weights at a time: each has a few hundred numbers
_ROOTS = np.polynomial.legendre.leggauss(NODES)
_PLACES, _WEIGHTS = ((0.5 * (_ROOTS[0] + 1.0)).tolist(), (0.5 * _ROOTS[1]).tolist())
_GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)


class Points(NamedTuple):
    """Points of every weight (count × batch) that stand for q: θ, and the logarithms of their measure under h = 1."""

    theta: Tensor
    log_measure: Tensor


class Panels(NamedTuple):
    """Nodes x and log weights (panels × nodes × batch), and where panels begin and how wide they are."""

    x: Tensor
    log_weight: Tensor
    begin: Tensor
    width: Tensor


def is_integer(support: constraints.Constraint) -> bool:
    """Whether weights are integers."""
    return bool(support.is_discrete) and hasattr(support, "lower_bound")


def is_known(family: ExponentialFamily) -> bool:
    """Whether integrals are known here: weights of one number, on a line, a half line, an interval or integers."""
    if family.event_dim or family.joint or family.curved or family.levels is not None:
        return False
    if is_integer(family.support):
        return True
    if family.support.is_discrete or family.support.event_dim:
        return False
    try:
        biject_to(family.support)
    except NotImplementedError:
        return False
    return True


def coordinates(support: constraints.Constraint) -> Any:
    """The bijection from the line onto the support, of integers onto the interval half a step wider."""
    if not is_integer(support):
        return biject_to(support)
    low, high = support.lower_bound - 0.5, getattr(support, "upper_bound", None)  # type: ignore[attr-defined]
    return biject_to(constraints.greater_than(low) if high is None else constraints.interval(low, high + 0.5))


def log_unnormalised(family: ExponentialFamily, nat: Any, theta: Tensor) -> Tensor:
    """log h(θ) + ⟨λ, T(θ)⟩, −∞ where T or h is no number, with a derivative of 0 there."""
    statistics, base = family.statistics(theta), family.log_base_measure(theta)
    known = torch.isfinite(base)
    for value in statistics:
        known = known & torch.isfinite(value)
    finite = type(statistics)(*(torch.where(known, value, 0.0) for value in statistics))
    return torch.where(known, torch.where(known, base, 0.0) + family.inner(nat, finite), -torch.inf)


def points(family: ExponentialFamily, nat: Any) -> Points:
    """Points with weights for every weight; `nat` in float64, and held fixed."""
    nat = type(nat)(*(value.detach() for value in nat))
    if is_integer(family.support):
        return _integers(family, nat)
    found = panels(family, nat)
    transform = coordinates(family.support)
    x = found.x.flatten(0, 1)
    theta = transform(x)
    return Points(theta, transform.log_abs_det_jacobian(x, theta) + found.log_weight.flatten(0, 1))


def log_partition(family: ExponentialFamily, nat: Any) -> Tensor:
    """A(λ), with all its derivatives in λ; infinite where the density does not fall within reach.

    Example:
        >>> import torch, expfam_poco as poco
        >>> from expfam_poco.family import quadrature
        >>> q = poco.resolve_family("exponential")
        >>> quadrature.log_partition(q, q.Nat(torch.tensor([-2.0]))) + 2.0 ** 0.5 * 0.0  # −log 2
        tensor([-0.6931])
    """
    wide = type(nat)(*(value.double() for value in nat))
    at = points(family, wide)
    terms = log_unnormalised(family, wide, at.theta) + at.log_measure
    return torch.where(_lost(family, wide, at, terms.detach()), torch.inf, torch.logsumexp(terms, 0)).to(nat[0].dtype)


def _lost(family: ExponentialFamily, nat: Any, at: Points, terms: Tensor) -> Tensor:
    """Whether some of the mass lies elsewhere than at the points."""
    ends = torch.maximum(_ended(family, terms[0], at.theta[0], "lower_bound"),
                         _ended(family, terms[-1], at.theta[-1], "upper_bound"))  # fmt: skip
    peak = terms.amax(0)
    still = type(nat)(*(value.detach() for value in nat))
    grid = _coarse(torch.broadcast_tensors(*still)[0])
    if is_integer(family.support):
        elsewhere = log_unnormalised(family, still, coordinates(family.support)(grid)).amax(0)
    else:
        elsewhere = _log_density(family, still)(grid).amax(0)  # a hump that the nodes do not see
    return (ends > peak - 0.5 * DROP) | (peak > OVERFLOW) | (elsewhere > peak + DROP)


def cumulants(family: ExponentialFamily, nat: Any) -> Tensor:
    """Of a family of one statistic: A(λ) and the first three cumulants of T, along a new first axis."""
    at = points(family, nat)
    terms = log_unnormalised(family, nat, at.theta) + at.log_measure
    weight = terms.softmax(0)
    (statistic,) = family.statistics(at.theta)
    known = torch.where(weight > 0.0, statistic, 0.0)
    mean = (weight * known).sum(0)
    away = torch.where(weight > 0.0, known - mean, 0.0)
    found = torch.stack((torch.logsumexp(terms, 0), mean, *((weight * away**n).sum(0) for n in (2, 3))))
    return torch.where(_lost(family, nat, at, terms), torch.inf, found)


def _ended(family: ExponentialFamily, term: Tensor, theta: Tensor, bound: str) -> Tensor:
    """The term at an end of the points; −∞ where integers end there."""
    edge = getattr(family.support, bound, None)
    return torch.where(theta == edge, -torch.inf, term) if is_integer(family.support) and edge is not None else term


def expectation(family: ExponentialFamily, nat: Any, function: Any) -> Tensor:
    """E_q[f(θ)] for every weight."""

    def of(part: Any) -> Tensor:
        at = points(family, part)
        weight = torch.softmax(log_unnormalised(family, part, at.theta) + at.log_measure, 0)
        values = function(at.theta)
        return (weight * torch.where(weight > 0.0, values, 0.0)).sum(0)

    wide = [value.double() for value in nat]
    return chunked(lambda parts: of(type(nat)(*parts)), wide).to(nat[0].dtype)


def chunked(function: Any, values: list[Tensor]) -> Tensor:
    """A function of tensors of one shape, entry by entry, some thousand at a time; its last axes are theirs."""
    values = list(torch.broadcast_tensors(*values))
    shape = values[0].shape
    if shape.numel() <= CHUNK:
        return torch.as_tensor(function(values))
    parts = zip(*(value.reshape(-1).split(CHUNK) for value in values), strict=True)
    return torch.cat([function(list(part)) for part in parts], -1).unflatten(-1, shape)


# ---- where the mass lies ------------------------------------------------------------------------------------


def _coarse(like: Tensor) -> Tensor:
    steps = torch.linspace(-14.0, 14.0, 113, dtype=like.dtype, device=like.device)
    return steps.reshape(-1, *(1,) * like.ndim).expand(-1, *like.shape).sinh()


def _mode(log_density: Any, like: Tensor) -> Tensor:
    """The largest of one hump, between sinh(−14) and sinh(14)."""
    best = log_density(_coarse(like)).argmax(0)
    low, high = (0.25 * (best - 1) - 14.0).sinh().to(like), (0.25 * (best + 1) - 14.0).sinh().to(like)
    for _ in range(SECTIONS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        first, second = log_density(torch.stack((left, right)))
        low, high = torch.where(first < second, left, low), torch.where(first < second, high, right)
    return 0.5 * (low + high)


def _reach(log_density: Any, mode: Tensor) -> tuple[Tensor, Tensor]:
    """How far to the left and to the right the density falls by e^DROP."""
    sign = torch.tensor([-1.0, 1.0], dtype=mode.dtype, device=mode.device).reshape(2, *(1,) * mode.ndim)
    goal = log_density(mode) - DROP
    low = (1e-12 * (1.0 + mode.abs())).log().expand(2, *mode.shape)
    high = torch.full_like(low, math.log(1e7))
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        beyond = log_density(mode + sign * middle.exp()) < goal
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    left, right = high.exp()
    return left, right


def panels(family: ExponentialFamily, nat: Any) -> Panels:
    """The nodes of a continuous weight; half of the panels lie on each side of the mode."""
    log_density = _log_density(family, nat)
    like = torch.broadcast_tensors(*nat)[0]
    mode = _mode(log_density, like)
    left, right = _reach(log_density, mode)
    half = PANELS // 2
    edge = (torch.arange(half + 1, dtype=like.dtype, device=like.device) / half) ** GRADING
    edge = edge.reshape(-1, *(1,) * like.ndim)
    begin = torch.cat((mode - left * edge[1:].flip(0), mode + right * edge[:-1]))
    wide = edge[1:] - edge[:-1]
    width = torch.cat((left * wide.flip(0), right * wide))
    place = torch.tensor(_PLACES, dtype=like.dtype, device=like.device).reshape(-1, *(1,) * like.ndim)
    weight = torch.tensor(_WEIGHTS, dtype=like.dtype, device=like.device).reshape(-1, *(1,) * like.ndim)
    x = begin.unsqueeze(1) + width.unsqueeze(1) * place
    return Panels(x, (width.unsqueeze(1) * weight).log(), begin, width)


def _log_density(family: ExponentialFamily, nat: Any) -> Any:
    """g(x)."""
    transform = coordinates(family.support)

    def value(x: Tensor) -> Tensor:
        theta = transform(x)
        total = log_unnormalised(family, nat, theta) + transform.log_abs_det_jacobian(x, theta)
        return torch.nan_to_num(total, nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)

    return value


def _integers(family: ExponentialFamily, nat: Any) -> Points:
    """The integers around the mode; those beyond the support weigh nothing."""
    transform = coordinates(family.support)
    like = torch.broadcast_tensors(*nat)[0]
    mode = transform(_mode(lambda x: log_unnormalised(family, nat, transform(x)), like)).round()
    size = _window(lambda theta: log_unnormalised(family, nat, theta), family.support, mode)
    first = (mode - size // 2).clamp_min(family.support.lower_bound)  # type: ignore[attr-defined]
    theta = first + torch.arange(size, dtype=mode.dtype, device=mode.device).reshape(-1, *(1,) * mode.ndim)
    high = getattr(family.support, "upper_bound", None)
    outside = torch.zeros_like(theta, dtype=torch.bool) if high is None else theta > high
    last = theta if high is None else theta.clamp_max(high)
    return Points(last, torch.where(outside, -torch.inf, torch.zeros_like(theta)))


def _window(log_density: Any, support: Any, mode: Tensor) -> int:
    """How many integers to sum: as few of 64, 128, … as reach where the densities have fallen by e^DROP."""
    if torch.compiler.is_compiling() or not mode.is_cpu:
        return WINDOW
    goal, size = log_density(mode) - DROP, 64
    while size < WINDOW:
        ends = [log_density((mode + side * size // 2).clamp(support.lower_bound, getattr(support, "upper_bound", None))
                            ) < goal for side in (-1, 1)]  # fmt: skip
        inside = mode - size // 2 <= support.lower_bound, mode + size // 2 > getattr(support, "upper_bound", math.inf)
        if all(bool((end | there).all()) for end, there in zip(ends, inside, strict=True)):
            break
        size *= 2
    return size


# ---- draws ----------------------------------------------------------------------------------------------------


def quantile(family: ExponentialFamily, nat: Any, u: Tensor) -> tuple[Tensor, Tensor]:
    """θ = F⁻¹(u) in coordinates x (of integers: θ itself), K × batch, and ∂x/∂λ, statistics × K × batch.

    Args:
        family: of weights of one number each.
        nat: λ, in float64.
        u: uniform numbers, K × batch, in float64.
    """
    count = len(nat)
    batch = torch.broadcast_shapes(u.shape[1:], *(value.shape for value in nat))
    values = [value.expand(batch) for value in (*nat, *u)]

    def of(parts: list[Tensor]) -> Tensor:
        one = type(nat)(*parts[:count])
        if is_integer(family.support):
            theta = _lattice_quantile(family, one, torch.stack(parts[count:]))
            return torch.stack((theta, *(torch.zeros_like(theta) for _ in range(count))))
        return _line_quantile(family, one, torch.stack(parts[count:]))

    found = chunked(of, values)
    return found[0], found[1:]


def _lattice_quantile(family: ExponentialFamily, nat: Any, u: Tensor) -> Tensor:
    """The first integer with F ≥ u; NaN where the window does not hold the mass that A gives it."""
    at = points(family, nat)
    log_weight = log_unnormalised(family, nat, at.theta) + at.log_measure
    whole = log_weight.softmax(0).cumsum(0)
    number = (whole.unsqueeze(1) < u).sum(0).clamp_max(len(whole) - 1)
    theta = at.theta.gather(0, number)
    lost = (torch.logsumexp(log_weight, 0) - family.log_partition(nat)).abs() > 1e-4
    return torch.where(lost, torch.nan, theta)


def _line_quantile(family: ExponentialFamily, nat: Any, u: Tensor) -> Tensor:
    """x and its derivatives along a new first axis."""
    log_density, found = _log_density(family, nat), panels(family, nat)
    logs = log_density(found.x)
    total = torch.logsumexp((logs + found.log_weight).flatten(0, 1), 0)
    mass = torch.exp(logs + found.log_weight - total)
    statistics = family.statistics(coordinates(family.support)(found.x))
    away = [torch.where(mass > 0.0, value - (mass * torch.where(mass > 0.0, value, 0.0)).sum((0, 1)), 0.0)
            for value in statistics]  # fmt: skip
    each = mass.sum(1)
    ends = each.cumsum(0)
    number = (ends[:-1].unsqueeze(1) < u).sum(0)
    begin, width = found.begin.gather(0, number), found.width.gather(0, number)
    before = ends.gather(0, number) - each.gather(0, number)
    after = (each.flip(0).cumsum(0).flip(0) - each).gather(0, number)
    upper = u > 0.5  # where 1 − F has the digits
    place, weight = (
        torch.tensor(v, dtype=u.dtype, device=u.device).reshape(-1, *(1,) * u.ndim) for v in (_PLACES, _WEIGHTS)
    )

    def within(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        nodes = low + (high - low) * place
        return nodes, (high - low) * weight * torch.exp(log_density(nodes) - total)

    def short(x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.where(upper, x, begin), torch.where(upper, begin + width, x)
        part = within(low, high)[1].sum(0)
        return torch.where(upper, (1.0 - u) - (after + part), before + part - u), torch.exp(log_density(x) - total)

    share = ((u - before) / each.gather(0, number)).clamp(0.0, 1.0)
    x = increasing_root(short, begin + share * width, begin, begin + width, iterations=ITERATIONS)
    slopes = []
    lower, low_mass = within(begin, x)
    higher, high_mass = within(x, begin + width)
    density = torch.exp(log_density(x) - total)
    low_values, high_values = (family.statistics(coordinates(family.support)(at)) for at in (lower, higher))
    for value, inner, below, above in zip(statistics, away, low_values, high_values, strict=True):
        mean = (mass * torch.where(mass > 0.0, value, 0.0)).sum((0, 1))
        part = (mass * inner).sum(1)
        left, right = part.cumsum(0) - part, part.flip(0).cumsum(0).flip(0) - part
        from_left = left.gather(0, number) + (low_mass * (below - mean)).sum(0)
        from_right = right.gather(0, number) + (high_mass * (above - mean)).sum(0)
        slopes.append(-torch.where(upper, -from_right, from_left) / density)
    return torch.stack((x, *slopes))
