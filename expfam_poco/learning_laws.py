"""The laws of a family under the Bayesian learning rule: natural gradients, steps, corrections, precision.

The losses here are ⟨c, T(θ)⟩, whose natural gradient is c exactly, whatever the family.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import blr, correction, fields
from .curved_laws import along_the_tangent
from .derive import _flatten, _unflatten
from .estimators import Draws, Estimator, available, curvature_of_gradient
from .family import ExponentialFamily
from .laws import Findings
from .noise import noise
from .specimens import (
    PROBES,
    SAMPLES,
    SIGMAS,
    SLACK,
    STEPS,
    Finding,
    Specimen,
    as_fields,
    holds,
    name_of,
    nudge,
    size_of,
    standard_errors,
)

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
    per_draw = estimator.needs in ("hvp", "hessian", "variations") or _makes_curvature(s, estimator)
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
    if estimator.antithetic:
        epsilon = torch.stack([epsilon, s.family.reflect(epsilon)], 1).flatten(0, 1)
    theta = estimator.points(s.family, state, epsilon).detach().requires_grad_(True)

    def loss_of(points: Tensor) -> Tensor:
        return s.family.inner(c, s.family.statistics(points)).reshape(len(points), -1).sum(-1)

    loss = loss_of(theta)
    gradient, curvature, variations = None, None, None
    if estimator.needs == "variations":
        variations = torch.stack(
            [loss_of(torch.stack(list(estimator.variations(s.family, each)))) for each in theta.detach()]
        )
    elif estimator.needs != "loss":
        (gradient,) = torch.autograd.grad(loss.sum(), theta, create_graph=estimator.needs in ("hvp", "hessian"))
        curvature = _curvature(s, estimator, theta, gradient, group)
        gradient = gradient.detach()
    return estimator.natural_gradient(
        s.family, state, Draws(epsilon, theta.detach(), loss.detach(), gradient, curvature, variations)
    )


def _makes_curvature(s: Specimen, estimator: Estimator) -> bool:
    kind = type(estimator)
    made = {
        "factor": kind.factor_of_gradient is not Estimator.factor_of_gradient,
        "none": False,
    }
    return made.get(s.family.curvature, kind.curvature_of_gradient is not Estimator.curvature_of_gradient)


def _curvature(s: Specimen, estimator: Estimator, theta: Tensor, gradient: Tensor, group: int) -> Tensor | None:
    """What the optimizer would measure for this estimator: exact Hessians, products with signs, or ∇ℓ alone."""
    if s.family.curvature == "none":
        return None
    dense = s.family.curvature == "dense"
    if estimator.needs == "hessian":
        hessians = _hessians(theta, gradient)
        return hessians if dense else hessians.diagonal(dim1=-2, dim2=-1).reshape(theta.shape)
    if estimator.needs == "hvp":
        key = s.key(PROBES, group)
        signs = noise("rademacher", s.shape, len(theta), key, dtype=s.dtype, device=s.device)
        products = (_hessians(theta, gradient) @ signs.flatten(1).unsqueeze(-1)).reshape(theta.shape)
        pairs = zip(signs, products, strict=True)
        return torch.stack([estimator.curvature_of_product(z, product, dense) for z, product in pairs])
    if not _makes_curvature(s, estimator):
        return None
    made = [curvature_of_gradient(estimator, s.family, each, ESS) for each in gradient]
    return torch.stack([each for each in made if each is not None])


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
        while rate > s.eps and not bool(family.in_domain(_retract(family, state, direction, rate, "plain"))):
            rate = 0.5 * rate
        rate = 0.25 * rate

        def added(value: Any, at: Any, rate: float = rate) -> Any:
            return family.to_nat(_retract(family, at, family.site_from_nat(value, at), rate, "plain"))

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


def _retract(family: ExponentialFamily, state: Any, direction: Any, rate: float, variant: str) -> Any:
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
        moved = _retract(family, state, direction, 1.0, variant)
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
        one, two = (_retract(s.family, state, direction, size, v) for v in ("plain", "second_order"))
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
            outer = correction.update_outer(family, outer, state, site, rho=rho)
            nat_outer = mean if nat_outer is None else fields.mix(nat_outer, mean, (rho,) * len(mean))
        assert outer is not None and nat_outer is not None
        target = s.nats[(number + 3) % len(s.nats)]
        g_out = s.direction(700 + number)
        excess = fields.map_fields(lambda a, b: alpha * (a - b), g_out, nat_outer)
        g_in = fields.map_fields(lambda p, t, e: (p - t) / ESS + e, nat_prior, target, excess)
        site_in = family.site_from_nat(family.Site(*g_in), state)
        site_out = family.site_from_nat(family.Site(*g_out), outer.posterior)
        corrected = correction.correct(family, site_in, site_out, state, outer, alpha=alpha)
        state = _step(family, state, prior, corrected.site, rate, corrected.anchor)
        g = correction.natural_correct(g_in, g_out, nat_outer, alpha)
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
        outer = correction.Outer(state, family.site_from_nat(s.direction(850 + number), state))
        epsilon = s.noise(4, STEPS, number)
        site_in, site_out = (estimate(s, estimator, state, epsilon, c) for _ in range(2))
        found = correction.correct(family, site_in, site_out, state, outer, alpha=1.0)
        total = found.site if found.anchor is None else fields.add(found.site, found.anchor)
        sizes = [8.0 * s.eps * (size_of(a) + size_of(b)) for a, b in zip(site_in, outer.site, strict=True)]
        if family.curved:  # which sends the difference through a projection
            sizes = s.rounded(family.reanchor, fields.subtract(site_out, outer.site), state, state)[1]
        yield s.near("corrected natural gradient at λ_in = λ_out against ḡ_out", total, outer.site, sizes)


# ---- precision and devices --------------------------------------------------------------------------------


def outputs(s: Specimen, inputs: dict[str, Any]) -> dict[str, Any]:
    """Every method's value at one member, by name."""
    f, state, prior = s.family, inputs["state"], inputs["prior"]
    theta, site, nat, epsilon = inputs["theta"], inputs["site"], f.to_nat(state), inputs["noise"]
    estimator = available(f)[f.default_estimator]
    return {
        "statistics": f.statistics(theta),
        "log_base_measure": f.log_base_measure(theta),
        "expected_log_base_measure": f.expected_log_base_measure(state),
        "log_partition": f.log_partition(nat),
        "to_mean": f.to_mean(nat),
        "to_nat": nat,
        "from_nat": state if f.curved else f.from_nat(nat),
        "site_to_nat": f.site_to_nat(site, state),
        "site_from_nat": f.site_from_nat(f.site_to_nat(site, state), state),
        "sample": f.sample(state, epsilon),
        "point": f.point(state),
        "recentre": f.recentre(state, f.point(prior)),
        "natural_gradient": estimate(s, estimator, state, epsilon, inputs["c"]),
        "kl_gradient": f.kl_gradient(state, prior),
        "retract": _retract(f, state, f.kl_gradient(state, prior), 0.1, "second_order"),
        "reanchor": f.reanchor(site, state, prior),
        "log_prob": f.log_prob(state, theta),
        "entropy": f.entropy(state),
        "kl": f.kl(state, prior),
        "score": f.score(state, theta),
        "fisher_vector_product": f.fisher_vector_product(nat, inputs["c"]),
    }


def _inputs(s: Specimen, number: int) -> dict[str, Any]:
    """What `outputs` starts from."""
    state, prior = s.states[number], s.states[(number + 1) % len(s.states)]
    c, epsilon = s.direction(900 + number), s.noise(4, STEPS, number)
    site = s.family.site_from_nat(s.direction(950 + number), state)
    theta = s.family.sample(state, epsilon)
    return {"state": state, "prior": prior, "theta": theta, "site": site, "noise": epsilon, "c": c}


def _cast(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return fields.map_fields(lambda part: part.to(device, dtype), value)
    return value.to(device, dtype)


def _kept(s: Specimen) -> Findings:
    """Whether all outputs have the specimen's dtype and device, and agree with the reference specimen's."""
    for number in (0, 3, 5):
        inputs = _inputs(s, number)
        values = outputs(s, inputs)
        fresh = {
            "noise": inputs["noise"],
            "centred_at": s.family.centred_at(s.support_points(1)[0]),
            "centred_at with a precision": s.family.centred_at(s.support_points(1)[0], 2.0),
            "neutral_noise": s.family.neutral_noise(inputs["theta"]),
            "reflect": s.family.reflect(inputs["noise"]),
            "distribution.sample": s.family.distribution(inputs["state"]).sample(),
            "distribution.log_prob": s.family.distribution(inputs["state"]).log_prob(inputs["theta"]),
            "to_natural": s.family.to_natural(s.family.to_mean(s.nats[0])),
        }
        for name, value in (values | fresh).items():
            for part in as_fields(value):
                kept = part.dtype == s.dtype and part.device.type == s.device.type
                yield holds(f"{name} gives {part.dtype} on {part.device} from {s.dtype} on {s.device}", kept)
        if s.reference is not None:
            yield from _agreement(s, s.reference, inputs, values)


def _agreement(s: Specimen, other: Specimen, inputs: dict[str, Any], values: dict[str, Any]) -> Findings:
    """The same inputs in the reference's precision give the same, up to rounding in this specimen's."""
    exact_inputs = {name: _cast(value, other.dtype, other.device) for name, value in inputs.items()}
    exact = outputs(other, exact_inputs)
    response = _response(other, exact_inputs, exact, s.eps)
    for name, value in values.items():
        expected = as_fields(exact[name])
        allowed = [SLACK * (s.eps * (1.0 + size_of(e)) + r) for e, r in zip(expected, response[name], strict=True)]
        yield s.near(
            f"{name} against {name_of(other.dtype)}", _cast(value, other.dtype, other.device), expected, allowed
        )


def _response(s: Specimen, inputs: dict[str, Any], values: dict[str, Any], eps: float) -> dict[str, list[float]]:
    """How far one relative eps in the inputs (but θ and noise) moves every field of `outputs`."""
    response: dict[str, list[float]] = {}
    for trial in range(2):
        generator = torch.Generator().manual_seed(trial)
        nudged = {name: nudge(value, eps, generator) for name, value in inputs.items()}
        nudged["theta"], nudged["noise"] = inputs["theta"], inputs["noise"]
        for name, value in outputs(s, nudged).items():
            change = [size_of(a - b) for a, b in zip(as_fields(value), as_fields(values[name]), strict=True)]
            response[name] = [max(pair) for pair in zip(change, response.get(name, change), strict=True)]
    return response


_PER_DRAW = frozenset({"theta", "noise", "statistics", "log_base_measure", "sample", "log_prob", "score"})


def spans(s: Specimen) -> Findings:
    """A family that is not joint acts on every weight by itself: on some of the weights it does what it does on all."""
    dims, weights = len(s.batch), s.batch.numel()
    if s.family.joint or weights < 2 or s.reference is not None:
        return

    def rows(name: str, value: Any) -> Any:
        """The second half of the weights, side by side."""
        if isinstance(value, tuple):
            return fields.map_fields(lambda part: rows(name, part), value)
        lead = int(name in _PER_DRAW)
        if value.shape[lead : lead + dims] != s.batch:
            return value  # a constant of the family
        return value.flatten(lead, lead + dims - 1).narrow(lead, weights // 2, weights - weights // 2)

    inputs = _inputs(s, len(s.states) - 3)  # a member whose weights differ in all their parameters
    whole, part = outputs(s, inputs), outputs(s, {name: rows(name, value) for name, value in inputs.items()})
    response = _response(s, inputs, whole, s.eps)  # a kernel's vectors and their remainders round differently
    estimator = available(s.family)[s.family.default_estimator]
    for name, value in whole.items():
        if name == "natural_gradient" and (estimator.needs != "gradient" or estimator.independent_draws):
            continue  # losses alone are of all weights together
        expected = rows(name, value)
        pairs = zip(as_fields(value), response[name], strict=True)
        sizes = [64.0 * (s.eps * size_of(v) + change) for v, change in pairs]
        yield s.near(f"{name} of half the weights against half of {name}", part[name], expected, sizes)


def dtypes(s: Specimen) -> Findings:
    """Every output keeps its inputs' dtype, and float32 agrees with float64 up to rounding."""
    if s.reference is None or s.device == s.reference.device:
        yield from _kept(s)


def devices(s: Specimen) -> Findings:
    """Every output stays on its inputs' device and agrees with the first device's."""
    if s.reference is not None and s.device != s.reference.device:
        yield from _kept(s)
    elif s.reference is None:
        yield holds(f"point is not on {s.device}", s.family.point(s.states[0]).device.type == s.device.type)
