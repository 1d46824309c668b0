r"""A family from the formulas of its density: `family_from(T=…, A=…)` derives all else.

For weights of one number each, on a line, a half line, an interval or integers. What is derived:

* A, where it is not given, and E_q[log h]: by `quadrature`.
* draws: by the quantile, where that is given; by inversion of the distribution function, where that is given; else by
  inversion of the integral of the density. All have the derivatives of the implicit function theorem.
* the member centred at θ with a precision: the nearest, in KL(p ‖ q), to a normal distribution p around θ in
  coordinates in which the support is the line, of variance 1/precision; then moved until its point is θ. Its μ is
  E_p[T], which always has a λ.
* the point: E_q[θ] if θ is a statistic, else the median.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from expfam_poco.family import derived, quadrature
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.inversion import implicit, increasing_root
from expfam_poco.family.tables import Tables, cumulant

CENTRE_TRIES, ROOT_STEPS, INTEGER_STEPS = 40, 60, 64
_HERMITE = np.polynomial.hermite_e.hermegauss(24)


class Written(ExponentialFamily):
    """The base of what `family_from` makes; the functions are attributes of the class."""

    noise_kind: ClassVar[str] = "uniform"
    formulas: ClassVar[Mapping[str, Any]] = {}
    first: ClassVar[tuple[float, ...]] = ()
    width: ClassVar[float] = 1.0

    def statistics(self, theta: Tensor) -> Any:
        """T(θ)."""
        return self.Mean(*(function(theta) for function in self.formulas["T"].values()))

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """log h(θ)."""
        given = self.formulas["log_h"]
        return torch.zeros_like(theta) if given is None else given(theta)

    def log_partition(self, nat: Any) -> Tensor:
        """A(λ)."""
        given = self.formulas["A"]
        if given is not None:
            return torch.as_tensor(given(nat))
        if self._has_tables(nat):
            (value,) = nat
            return cumulant(value.double(), self.tables, 0).to(value.dtype)
        return quadrature.log_partition(self, nat)

    def _has_tables(self, nat: Any) -> bool:
        """Whether integrals are looked up: one statistic, on a CPU, eagerly."""
        return len(nat) == 1 and nat[0].is_cpu and not torch.compiler.is_compiling()

    @cached_property
    def tables(self) -> Tables:
        """Those of this family, for as long as it is."""

        def quantile(nat: Tensor, u: Tensor) -> Tensor:
            x, slopes = quadrature.quantile(self, self.Nat(nat), u)
            return torch.stack((x, slopes[0]))

        def cumulants(nat: Tensor) -> Tensor:
            return quadrature.chunked(lambda parts: quadrature.cumulants(self, self.Nat(*parts)), [nat])

        return Tables(self.domain.get(self.Nat._fields[0]), cumulants, quantile)

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """F⁻¹(u), rounded into the support."""
        icdf, cdf = self.formulas["icdf"], self.formulas["cdf"]
        if icdf is not None:
            return torch.as_tensor(icdf(noise, state))
        wide, u = self.Nat(*(value.double() for value in state)), noise.double()
        if cdf is None:
            theta = self._inverted(wide, u)
        elif quadrature.is_integer(self.support):
            theta = self._searched(wide, u)
        else:
            theta = self._solved(wide, u)
        return theta.to(noise.dtype)

    def _inverted(self, nat: Any, u: Tensor) -> Tensor:
        """From the density alone."""
        still = self.Nat(*(value.detach() for value in nat))
        if self._has_tables(nat) and not quadrature.is_integer(self.support):
            found = self.tables.quantile(still[0], u)
            x, slopes = found[0], found[1:]
        else:
            x, slopes = quadrature.quantile(self, still, u)
        if quadrature.is_integer(self.support):
            return x
        moved = x
        for slope, value in zip(slopes, nat, strict=True):
            moved = moved + slope * (value - value.detach())
        return torch.as_tensor(quadrature.coordinates(self.support)(moved))

    def _solved(self, nat: Any, u: Tensor) -> Tensor:
        """The root of F(θ) = u between the ends of the density, in coordinates x."""
        transform = quadrature.coordinates(self.support)
        still = self.Nat(*(value.detach() for value in nat))
        found = quadrature.panels(self, still)
        low, high = found.begin[0], found.begin[-1] + found.width[-1]

        def density(x: Tensor) -> Tensor:
            theta = transform(x)
            jacobian = transform.log_abs_det_jacobian(x, theta)
            return (self.log_prob(self.from_nat(still), theta) + jacobian).exp()

        def short(x: Tensor) -> tuple[Tensor, Tensor]:
            return self.formulas["cdf"](transform(x), still) - u, density(x)

        start = (low + u * (high - low)).detach()
        x = increasing_root(short, start, low.expand_as(start), high.expand_as(start), iterations=ROOT_STEPS).detach()
        theta = transform(x)
        return torch.as_tensor(transform(implicit(x, self.formulas["cdf"](theta, nat), density(x))))

    def _searched(self, nat: Any, u: Tensor) -> Tensor:
        """The first integer with F ≥ u, by halving [lower bound, 2⁵³]."""
        support: Any = self.support
        high = torch.full_like(u, getattr(support, "upper_bound", 2.0**53))
        low = torch.full_like(u, support.lower_bound - 1.0)
        for _ in range(INTEGER_STEPS):
            middle = torch.floor(0.5 * (low + high))
            enough = self.formulas["cdf"](middle.clamp_min(support.lower_bound), nat) >= u
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return high

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Any:
        """The member whose point is θ, of that precision in coordinates of the support; λ = 0 for precision 0."""
        given = self.formulas["centred_at"]
        if given is not None:
            return given(theta, precision)
        dtype, theta = theta.dtype, theta.detach().double()
        size = torch.as_tensor(1.0 / self.width**2 if precision is None else precision).to(theta)
        proper = size > 0.0
        nat = self._projected(theta, torch.where(proper, size, 1.0 / self.width**2).rsqrt())
        return self.State(*(torch.where(proper, value, 0.0).to(dtype) for value in nat))

    def _projected(self, theta: Tensor, sigma: Tensor) -> Any:
        transform = quadrature.coordinates(self.support)
        goal = transform.inv(theta)
        z, weight = (torch.tensor(v, dtype=theta.dtype, device=theta.device) for v in _HERMITE)
        shape = (-1, *(1,) * theta.ndim)
        z, weight = z.reshape(shape), (weight / weight.sum()).reshape(shape)
        x, nat = goal, None
        for _ in range(CENTRE_TRIES):
            mean = self.Mean(*((weight * value).sum(0) for value in self.statistics(transform(x + sigma * z))))
            nat = derived.invert_mean(self, mean, start=self._start(theta) if nat is None else nat)
            off = goal - transform.inv(self.point(self.from_nat(nat)))
            if bool((off.abs() <= 1e-9 * (1.0 + goal.abs())).all()):
                return nat
            x = x + off
        far = (off.abs() > 1e-3 * (1.0 + goal.abs())).broadcast_to(theta.shape)
        if bool(far.any()):
            raise ValueError(
                f"params: no member of {type(self).__name__} was found about the weight {float(theta[far][0]):.6g} in "
                f"{CENTRE_TRIES} tries; begin where its draws are, or write it by family_from(…, centred_at=…)."
            )
        return nat

    def _start(self, like: Tensor) -> Any:
        return self.Nat(*(torch.full_like(like, value) for value in self.first))

    def to_natural(self, mean: Any) -> Any:
        """Newton on the dual, from a member that is known."""
        return derived.invert_mean(self, mean, start=self._start(mean[0]))

    def point(self, state: Any) -> Tensor:
        """E_q[θ] if θ is a statistic, else the median."""
        given = self.formulas["point"]
        if given is not None:
            return torch.as_tensor(given(state))
        if "theta" in self.Nat._fields:
            return super().point(state)
        return self.sample(state, torch.full_like(torch.broadcast_tensors(*state)[0], 0.5).unsqueeze(0))[0]


def family_from(
    *,
    T: Mapping[str, Callable[[Tensor], Tensor]] | Callable[[Tensor], Tensor],
    A: Callable[[Any], Tensor] | None = None,
    log_h: Callable[[Tensor], Tensor] | None = None,
    support: constraints.Constraint = constraints.real,
    domain: Mapping[str, constraints.Constraint] | None = None,
    cdf: Callable[[Tensor, Any], Tensor] | None = None,
    icdf: Callable[[Tensor, Any], Tensor] | None = None,
    centred_at: Callable[..., Any] | None = None,
    point: Callable[[Any], Tensor] | None = None,
    start: Mapping[str, float] | None = None,
    width: float | None = None,
    name: str = "Written",
) -> ExponentialFamily:
    r"""The exponential family h(θ) exp(⟨λ, T(θ)⟩ − A(λ)) of weights that are one number each.

    Functions are of tensors, entry by entry; those of λ get a NamedTuple with the fields of T.

    Args:
        T: the statistics by name, or one function, which is then named "statistic". Call θ itself "theta".
        A: the log-partition function; None: by quadrature, for small tensors.
        log_h: the logarithm of the base measure; None: 0.
        support: where θ lives: a line, a half line, an interval, or integers.
        domain: constraints on fields of λ, as of every family.
        cdf: F(θ, λ); draws invert it. It must be differentiable in λ unless weights are integers.
        icdf: θ(u, λ), differentiable in λ: the fastest.
        centred_at: (θ, precision) → λ, in place of the one that is derived.
        point: λ → what the model holds, in place of the mean or median.
        start: some λ in the domain; None: what torch's transform to `domain` makes of 0.
        width: of the first members, in coordinates in which the support is the line; 1 there for reals, else 0.1.
        name: of the class, by which checkpoints know it; numbers inside the functions are not seen, so name them there.

    Raises:
        ValueError: for supports that are none of these, and for a `start` outside of the domain of A.

    Example:
        >>> import torch, expfam_poco as poco
        >>> from torch.distributions import constraints
        >>> rayleigh = poco.family_from(
        ...     name="Rayleigh",
        ...     T={"square": lambda x: x**2},
        ...     log_h=lambda x: x.log(),
        ...     A=lambda nat: -torch.log(-2.0 * nat.square),
        ...     support=constraints.positive,
        ...     domain={"square": constraints.less_than(0.0)},
        ...     icdf=lambda u, nat: (torch.log1p(-u) / nat.square).sqrt(),
        ... )
        >>> rayleigh.point(rayleigh.centred_at(torch.tensor([0.5, 2.0]))).round(decimals=4)
        tensor([0.5000, 2.0000])
    """
    statistics = dict(T) if isinstance(T, Mapping) else {"statistic": T}
    formulas = {
        "T": statistics, "A": A, "log_h": log_h, "cdf": cdf, "icdf": icdf, "centred_at": centred_at, "point": point,
    }  # fmt: skip
    bounds = dict(domain or {})
    strangers = sorted(set(bounds) - set(statistics))
    if strangers:
        raise ValueError(f"domain: {strangers} are no statistics; the fields of λ are {list(statistics)}.")
    beginning = _beginning(statistics, bounds, start)
    fields = _fields(tuple(statistics))
    discrete = bool(getattr(support, "is_discrete", False))
    body: dict[str, Any] = {
        "__doc__": "Made by `family_from`.",
        "__module__": sys._getframe(1).f_globals.get("__name__", __name__),
        "Statistics": fields,
        "support": support,
        "domain": bounds,
        "formulas": formulas,
        "first": beginning,
        "width": (1.0 if _unbounded(support) else 0.1) if width is None else width,
        "default_estimator": "score" if discrete else "reparam",
    }
    made: Written = type(name, (Written,), body)()
    _check(made, support)
    return made


def _unbounded(support: Any) -> bool:
    return support is constraints.real


@lru_cache
def _fields(names: tuple[str, ...]) -> Any:
    return NamedTuple("Statistics", [(name, Tensor) for name in names])


def _beginning(
    statistics: Mapping[str, Any], bounds: Mapping[str, constraints.Constraint], start: Mapping[str, float] | None
) -> tuple[float, ...]:
    if start is not None:
        if set(start) != set(statistics):
            raise ValueError(f"start: {sorted(start)} are not the fields of λ, {list(statistics)}; give one for each.")
        return tuple(float(start[name]) for name in statistics)
    zero = torch.zeros((), dtype=torch.float64)
    return tuple(float(transform_to(bounds[name])(zero)) if name in bounds else 0.0 for name in statistics)


def _check(family: Written, support: Any) -> None:
    """One sentence for each of the things that would fail later."""
    if not isinstance(support, constraints.Constraint):
        raise ValueError(
            f"support={support!r}: give a constraint of torch.distributions, such as constraints.positive."
        )
    if not quadrature.is_known(family):
        raise ValueError(
            f"support={support}: family_from makes families of weights that are one number each, on a line, a half "
            "line, an interval or integers; write a class for others (docs/add-a-family.md)."
        )
    like = torch.zeros(1, dtype=torch.float64)
    nat = family._start(like)
    value = family.log_partition(nat)
    if value.shape != like.shape or not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"start: A is {value.tolist()} at λ = {dict(zip(nat._fields, family.first, strict=True))}, where one "
            "finite number for each weight is needed; give a λ in its domain by start=, or correct A."
        )
