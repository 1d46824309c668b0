"""The laws of a family under the Bayesian learning rule: natural gradients, steps, corrections, precision.

The losses here are ⟨c, T(θ)⟩, whose natural gradient is c exactly, whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expfam_poco.checks.curved_laws import along_the_tangent
from expfam_poco.checks.density_laws import Findings
from expfam_poco.checks.specimens import (
    PROBES,
    SAMPLES,
    SIGMAS,
    SLACK,
    STEPS,
    Finding,
    Specimen,
    holds,
    name_of,
    size_of,
    standard_errors,
)
from expfam_poco.correction import snapshot
from expfam_poco.family import fields
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.derived import _flatten, _unflatten
from expfam_poco.family.draws import Draws, Estimator
from expfam_poco.family.noise import noise
from expfam_poco.rule import blr
from expfam_poco.rule.estimators import available

GROUPS, NODES, ESS = 32, 2048, 7.0
MANY, FEW = 512, 24  # draws in a group, for estimators that measure all draws at once or one by one


# ---- natural gradients ------------------------------------------------------------------------------------


def kl_gradient(s: Specimen) -> Findings:
    """kl_gradient is λ − λ₀, the gradient of the KL in μ: F(λ)(λ − λ₀) = ∇_λ KL."""
    family = s.family
    for state, prior in s.pairs():
        nat, nat_prior = family.to_nat(state), family.to_nat(prior)
        difference = fields.subtract(nat, nat_prior)
        slope, tolerances = s.rounded(lambda at, to: family.site_to_nat(family.kl_gradient(at, to), at), state, prior)
        seen, more = s.rounded(s.seen, difference, state)
        allowed = [a + b for a, b in zip(tolerances, more, strict=True)] if family.curved else tolerances
        yield s.near("kl_gradient in natural coordinates against λ − λ₀", slope, seen, allowed)
        zero = family.kl_gradient(state, state)
        sizes = [SLACK * s.eps * (1.0 + size_of(value)) for value in family.kl_gradient(state, prior)]
        yield s.near("kl_gradient at equality against 0", zero, fields.scale(zero, 0.0), sizes)

        if family.curved:
            continue

        def divergence(value: Any, to: Any) -> Tensor:
            return family.kl(family.from_nat(value), to).sum()

        in_nat, tolerances = s.rounded(torch.func.grad(divergence), nat, prior)
        expected, more = s.rounded(family.fisher_vector_product, nat, difference)
        allowed = [a + b for a, b in zip(tolerances, more, strict=True)]
        yield s.near("∇_λ kl by autograd against F(λ)(λ − λ₀)", in_nat, expected, allowed)


def natural_gradient(s: Specimen) -> Findings:
    """Every estimator's natural gradient of ⟨c, T⟩ has expectation c, or its own by quadrature if it is biased."""
    if not s.sampling:
        return
    for name, estimator in available(s.family).items():
        estimator.check(s.family)
        if estimator.compares:  # see `noiseless_laws.regression`
            continue
        for number in (0, 2):
            c = s.direction(200 + number)
            if estimator.unbiased:
                yield _unbiased(s, name, estimator, number, c)
            elif not _has_quadrature(s.family, estimator):
                yield f"natural_gradient: {name} is biased, and its expectation has no quadrature for this family"
            else:
                yield from _biased(s, name, estimator, number, c)


def _has_quadrature(family: ExponentialFamily, estimator: Estimator) -> bool:
    """Whether weights are independent of each other, with noise whose quantiles are known."""
    leafwise = not family.joint and family.event_dim == 0 and not family.noise_dims and estimator.needs != "loss"
    return leafwise and type(family).noise is ExponentialFamily.noise


def _unbiased(s: Specimen, name: str, estimator: Estimator, number: int, c: Any) -> Finding:
    estimates = _flat(_estimates(s, estimator, number, c))
    what = f"mean estimate of ∇̃⟨c, T⟩ by {name!r} against c (standard errors)"
    return Finding(what, standard_errors(estimates, _flat([s.seen(c, s.states[number])])[0]), SIGMAS)


def _biased(s: Specimen, name: str, estimator: Estimator, number: int, c: Any) -> Findings:
    """Both means are of the same estimator, one over counter-based noise, one over midpoints of its quantiles."""
    estimates = _flat(_estimates(s, estimator, number, c))
    fine, coarse = (
        _flat([_estimate(s, estimator, number, s.midpoints(count), c, 0)])[0] for count in (NODES, NODES // 2)
    )
    bound = torch.minimum(2.0 * (fine - coarse).abs(), 0.05 * (1.0 + fine.abs()))
    error = standard_errors(estimates, fine, allowed=bound)
    yield Finding(f"mean estimate by the biased {name!r} against its quadrature (standard errors)", error, SIGMAS)
    if s.family.curvature == "none":
        if len(s.family.levels or ()) > 2:
            c = _linear(s, number)
            fine = _flat([_estimate(s, estimator, number, s.midpoints(NODES), c, 0)])[0]
        descent = (fine * _flat([s.family.fisher_vector_product(s.nats[number], c)])[0]).sum()
        yield holds(f"the biased {name!r} does not point downhill for ⟨c, T⟩", descent > 0.0)


def _linear(s: Specimen, step: int) -> Any:
    """⟨c, T⟩ = a θ + constant at all levels, a random: between levels ∇⟨c, T⟩ may point anywhere for another c."""
    points = torch.tensor(s.family.levels, dtype=s.dtype, device=s.device)
    values, shapes = _flatten(s.family, s.family.statistics(points))
    slopes = torch.linalg.lstsq(values[1:] - values[0], points[1:] - points[0]).solution
    return _unflatten(s.family, s.normal(s.shape, step).unsqueeze(-1) * slopes, shapes)


def _estimates(s: Specimen, estimator: Estimator, number: int, c: Any) -> list[Any]:
    per_draw = estimator.needs in ("hvp", "hessian", "variations")
    count = FEW if per_draw else MANY
    whole = s.noise(GROUPS * count, SAMPLES, 300 + number)
    chunks = whole.split(count)
    return [_estimate(s, estimator, number, chunk, c, group) for group, chunk in enumerate(chunks)]


def _estimate(s: Specimen, estimator: Estimator, number: int, epsilon: Tensor, c: Any, group: int) -> Any:
    """One estimate in natural coordinates."""
    site = estimate(s, estimator, s.states[number], epsilon, c, group)
    return s.family.site_to_nat(site, s.states[number])


def estimate(s: Specimen, estimator: Estimator, state: Any, epsilon: Tensor, c: Any, group: int = 0) -> Any:
    """What the estimator makes of ⟨c, T⟩ measured at its own points, as a site at `state`."""

    def loss_of(points: Tensor) -> Tensor:
        return s.family.inner(c, s.family.statistics(points)).reshape(len(points), -1).sum(-1)

    draws = draws_at(s, estimator, state, epsilon, loss_of, group)
    return estimator.natural_gradient(s.family, state, draws)


def draws_at(
    s: Specimen, estimator: Estimator, state: Any, epsilon: Tensor, loss_of: Callable[[Tensor], Tensor], group: int
) -> Draws:
    """What the optimizer would measure of a loss (K × P → K) for this estimator, at its own points."""
    if estimator.antithetic:
        epsilon = torch.stack([epsilon, s.family.reflect(epsilon)], 1).flatten(0, 1)
    theta = estimator.points(s.family, state, epsilon).detach().requires_grad_(True)
    gradient, hessian, pairs, variations = None, None, None, None
    with torch.enable_grad():
        loss = loss_of(theta)
        if estimator.needs == "variations":
            variations = torch.stack(
                [loss_of(torch.stack(list(estimator.variations(s.family, each)))) for each in theta.detach()]
            )
        elif estimator.needs != "loss":
            (gradient,) = torch.autograd.grad(loss.sum(), theta, create_graph=estimator.needs in ("hvp", "hessian"))
            hessian, pairs = _curvature(s, estimator, theta, gradient, group)
            gradient = gradient.detach()
    return Draws(epsilon, theta.detach(), loss.detach(), gradient, hessian, pairs, variations)


def _curvature(s: Specimen, estimator: Estimator, theta: Tensor, gradient: Tensor, group: int) -> tuple[Any, Any]:
    """What the optimizer would measure for this estimator: exact Hessians, or pairs by products or of ∇ℓ alone."""
    if s.family.curvature == "none":
        return None, None
    if estimator.needs == "hessian":
        hessians = _hessians(theta, gradient)
        dense = s.family.curvature == "dense"
        return (hessians if dense else hessians.diagonal(dim1=-2, dim2=-1).reshape(theta.shape)), None
    if estimator.needs == "hvp":
        key = s.key(PROBES, group)
        signs = noise("rademacher", s.shape, len(theta), key, dtype=s.dtype, device=s.device)
        products = (_hessians(theta, gradient) @ signs.flatten(1).unsqueeze(-1)).reshape(theta.shape)
        return None, (products, signs)
    return None, estimator.pair(gradient.detach(), ESS)


def _hessians(theta: Tensor, gradient: Tensor) -> Tensor:
    """The Hessian of every draw's loss: K × n × n."""
    flat = gradient.flatten(1)
    zero = torch.zeros_like(flat)
    if not flat.requires_grad:
        return zero.unsqueeze(-1).expand(-1, -1, flat.shape[1])
    rows = []
    for column in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, column].sum(), theta, retain_graph=True, allow_unused=True)
        rows.append(zero if row is None else row.flatten(1))
    return torch.stack(rows, 1).detach()


def _flat(values: list[Any]) -> Tensor:
    """Naturals side by side: one row for each."""
    return torch.stack([torch.cat([part.reshape(-1) for part in value]) for value in values])


# ---- steps ------------------------------------------------------------------------------------------------


def _step(family: ExponentialFamily, state: Any, prior: Any, site: Any, rate: float, anchor: Any = None) -> Any:
    """One plain step with the same rate for every block."""
    start, rates = blr.BLRState(state, ()), family.per_block(rate, rate)
    step = blr.update(family, start, prior, site, rates=rates, ess=ESS, anchor=anchor, retraction="plain")
    return step.posterior


def retraction(s: Specimen) -> Findings:
    """Variant "plain" adds in natural coordinates; "second_order" agrees to first order and stays in the domain."""
    family = s.family
    for number, (state, nat) in enumerate(zip(s.states, s.nats, strict=True)):
        raw = s.direction(400 + number)
        direction = family.site_from_nat(raw, state)
        rate = 0.05
        while rate > s.eps and not bool(family.in_domain(retracted(family, state, direction, rate, "plain"))):
            rate = 0.5 * rate
        rate = 0.25 * rate

        def added(value: Any, at: Any, rate: float = rate) -> Any:
            return family.to_nat(retracted(family, at, family.site_from_nat(value, at), rate, "plain"))

        if family.curved:
            yield from along_the_tangent(s, state, direction, rate)
        else:
            plain, tolerances = s.rounded(added, raw, state)
            expected = fields.map_fields(lambda a, b: a - rate * b, nat, raw)  # noqa: B023
            yield s.near("plain retraction against λ − η d", plain, expected, tolerances)
        if s.sampling:
            yield from _first_order(s, state, direction, rate)
        for sign in (-1.0, 1.0):
            for scale in _scales(s):
                yield from _stays_inside(s, state, fields.scale(direction, sign * scale), scale)


def retracted(family: ExponentialFamily, state: Any, direction: Any, rate: float, variant: str) -> Any:
    """The state after a step with the same rate for every block."""
    return family.retract(state, direction, family.per_block(rate, rate), variant=variant)


def _scales(s: Specimen) -> tuple[float, ...]:
    """Sizes of directions. Their squares must not exhaust the digits where entries of one weight are coupled."""
    coupled = s.family.joint or s.family.event_dim > 0
    largest = (0.01 / s.eps) ** 0.5 if coupled else s.eps**-0.75
    return (1.0, 10.0, 100.0, largest)


def _stays_inside(s: Specimen, state: Any, direction: Any, scale: float) -> Findings:
    family = s.family
    where = f"a direction of size {scale:.0e} in {name_of(s.dtype)}"
    for variant in ("second_order", "plain"):
        moved = retracted(family, state, direction, 1.0, variant)
        inside = bool(family.in_domain(moved))
        if variant == "second_order":
            yield holds(f"a second_order step leaves the domain for {where}", inside)
        if inside:
            undefined = torch.isnan(family.log_partition(family.to_nat(moved))).any()
            yield holds(f"in_domain accepts a state where A is NaN (after a {variant} step along {where})", ~undefined)


def _first_order(s: Specimen, state: Any, direction: Any, rate: float) -> Findings:
    """The distance between both variants falls with the square of the rate."""
    gaps = []
    for size in (rate, 0.25 * rate):
        one, two = (retracted(s.family, state, direction, size, v) for v in ("plain", "second_order"))
        gaps.append(max(size_of(a - b) for a, b in zip(one, two, strict=True)))
    scale = max(size_of(value) for value in state)
    allowed = 0.125 * gaps[0] + SLACK * s.eps * (1.0 + scale)
    yield Finding("gap between the retractions at a quarter of the rate (O(η²) is allowed)", gaps[1], allowed)


def reanchor(s: Specimen) -> Findings:
    """A re-anchored site is the same function ⟨∇̃L, T⟩: linear, and the identity at the same state."""
    family = s.family
    for number, (state, other) in enumerate(s.pairs()):
        one, two = (family.site_from_nat(s.direction(500 + number + k), state) for k in (0, 50))
        same = family.reanchor(one, state, state)
        sizes = [SLACK * s.eps * size_of(v) for v in one]
        if family.curved:  # which projects
            sizes = s.rounded(family.reanchor, one, state, state)[1]
        yield s.near("reanchor at the same state against the site", same, one, sizes)
        moved, tolerances = s.rounded(family.reanchor, one, state, other)
        through = family.site_from_nat(family.site_to_nat(one, state), other)
        more = s.rounded(lambda v, a, b: family.site_from_nat(family.site_to_nat(v, a), b), one, state, other)[1]
        allowed = [a + b for a, b in zip(tolerances, more, strict=True)]
        yield s.near("reanchor against the way through natural coordinates", moved, through, allowed)
        combined = fields.add(fields.scale(one, 2.0), two)
        expected = fields.add(fields.scale(family.reanchor(one, state, other), 2.0), family.reanchor(two, state, other))
        allowed = [4.0 * (a + SLACK * s.eps * size_of(v)) for a, v in zip(allowed, expected, strict=True)]
        yield s.near("reanchor of 2a + b", family.reanchor(combined, state, other), expected, allowed)


def chart(s: Specimen) -> Findings:
    """Corrected steps in the chart, with re-anchored averages, are the same steps in natural coordinates."""
    if s.family.curved:
        yield "chart: a step of a curved family is the projection of the step in natural coordinates (expansion)"
        return
    if not s.sampling:
        return
    family, rate, alpha, rho = s.family, 0.4, 0.7, 0.5
    state, prior = s.states[0], s.states[2]
    nat, nat_prior = s.nats[0], s.nats[2]
    outer, nat_outer = None, None
    for number in range(6):
        if number % 2 == 0:
            mean = fields.scale(s.direction(600 + number), 1.0 / ESS)
            site = family.site_from_nat(family.Site(*mean), state)
            outer = snapshot.update_outer(family, outer, state, site, rho=rho)
            nat_outer = mean if nat_outer is None else fields.mix(nat_outer, mean, (rho,) * len(mean))
        assert outer is not None and nat_outer is not None
        target = s.nats[(number + 3) % len(s.nats)]
        g_out = s.direction(700 + number)
        excess = fields.map_fields(lambda a, b: alpha * (a - b), g_out, nat_outer)
        g_in = fields.map_fields(lambda p, t, e: (p - t) / ESS + e, nat_prior, target, excess)
        site_in = family.site_from_nat(family.Site(*g_in), state)
        site_out = family.site_from_nat(family.Site(*g_out), outer.posterior)
        corrected = snapshot.correct(family, site_in, site_out, state, outer, alpha=alpha)
        state = _step(family, state, prior, corrected.site, rate, corrected.anchor)
        g = snapshot.natural_correct(g_in, g_out, nat_outer, alpha)
        nat = blr.natural_step(nat, nat_prior, g, rate=rate, ess=ESS)
        sizes = [40.0 * SLACK * s.eps * (1.0 + size_of(value)) for value in nat]
        yield s.near(
            f"λ after step {number + 1} in the chart against natural coordinates", family.to_nat(state), nat, sizes
        )


def conjugate(s: Specimen) -> Findings:
    """For the loss ⟨c, T⟩ and its exact natural gradient c, one plain step at η = 1 gives λ₀ − N c."""
    family = s.family
    if family.curved:
        yield "conjugate: λ₀ − N c need not belong to a curved family"
        return
    for state, prior in s.pairs():
        target = family.to_nat(s.states[0])

        def solve(at: Any, start: Any, goal: Any) -> Any:
            c = fields.map_fields(lambda a, b: (a - b) / ESS, family.to_nat(start), goal)
            return family.to_nat(_step(family, at, start, family.site_from_nat(family.Site(*c), at), 1.0))

        reached, tolerances = s.rounded(solve, state, prior, target)
        yield s.near("λ after one step against λ₀ − N c", reached, target, tolerances)


def zero_variance(s: Specimen) -> Findings:
    """At λ_in = λ_out under shared noise the corrected natural gradient is ḡ_out, whatever the noise."""
    family = s.family
    estimator = available(family)[family.default_estimator]
    for number, state in enumerate(s.states[:3]):
        c = s.direction(800 + number)
        outer = snapshot.Outer(state, family.site_from_nat(s.direction(850 + number), state))
        epsilon = s.noise(4, STEPS, number)
        site_in, site_out = (estimate(s, estimator, state, epsilon, c) for _ in range(2))
        found = snapshot.correct(family, site_in, site_out, state, outer, alpha=1.0)
        total = found.site if found.anchor is None else fields.add(found.site, found.anchor)
        sizes = [8.0 * s.eps * (size_of(a) + size_of(b)) for a, b in zip(site_in, outer.site, strict=True)]
        if family.curved:  # which sends the difference through a projection
            sizes = s.rounded(family.reanchor, fields.subtract(site_out, outer.site), state, state)[1]
        yield s.near("corrected natural gradient at λ_in = λ_out against ḡ_out", total, outer.site, sizes)
