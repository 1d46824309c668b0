"""The laws of every method's output: part by part as on the whole, in the inputs' dtype, on the inputs' device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from expfam_poco.checks.density_laws import Findings
from expfam_poco.checks.learning_laws import estimate, retracted
from expfam_poco.checks.specimens import SLACK, STEPS, Specimen, as_fields, holds, name_of, nudge, size_of
from expfam_poco.family import fields
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.hyperparameters import mapped
from expfam_poco.rule.estimators import available


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
        "retract": retracted(f, state, f.kl_gradient(state, prior), 0.1, "second_order"),
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
    half = replace(s, family=mapped(s.family, lambda value: rows("family", value)))
    whole, part = outputs(s, inputs), outputs(half, {name: rows(name, value) for name, value in inputs.items()})
    response = _response(s, inputs, whole, s.eps)  # a kernel's vectors and their remainders round differently
    estimator = available(s.family)[s.family.default_estimator]
    for name, value in whole.items():
        own = type(s.family).expected_log_base_measure is not ExponentialFamily.expected_log_base_measure
        if name in ("expected_log_base_measure", "entropy") and not own:
            continue  # by draws, which are others for fewer weights
        if name == "natural_gradient" and (estimator.needs != "gradient" or estimator.independent_draws):
            continue  # losses alone are of all weights together
        expected = rows(name, value)
        pairs = zip(as_fields(value), response[name], strict=True)
        sizes = [64.0 * (s.eps * size_of(v) + change) for v, change in pairs]
        yield s.near(f"{name} of half the weights against half of {name}", part[name], expected, sizes)


def as_trained(s: Specimen) -> Findings:
    """Under torch.no_grad, as the optimizer runs, every method gives finite values, the same as with gradients."""
    for number in (0, 3, 5):
        inputs = _inputs(s, number)
        kept = {name: _copied(value) for name, value in inputs.items()}
        with torch.enable_grad():
            free = outputs(s, inputs)
            response = _response(s, inputs, free, s.eps)
        with torch.no_grad():
            values = outputs(s, inputs)
        for name, value in values.items():
            parts, others = as_fields(value), as_fields(free[name])
            pairs = list(zip(parts, others, strict=True))
            blind = any(bool((torch.isfinite(b) & ~torch.isfinite(a)).any()) for a, b in pairs)
            yield holds(f"{name} is not finite under no_grad, but is with gradients", not blind)
            allowed = [SLACK * (s.eps * size_of(b) + r) for b, r in zip(others, response[name], strict=True)]
            same = [torch.where(torch.isfinite(b), a, b) for a, b in pairs]
            known = [torch.where(torch.isfinite(b), b, 0.0) for b in others]
            finite = [torch.where(torch.isfinite(a), a, 0.0) for a in same]
            yield s.near(f"{name} under no_grad against the same with gradients", tuple(finite), tuple(known), allowed)
        for name, value in inputs.items():
            same_as_before = (torch.equal(a, b) for a, b in zip(as_fields(value), as_fields(kept[name]), strict=True))
            yield holds(f"some method writes to its argument ({name})", all(same_as_before))


def _copied(value: Any) -> Any:
    return fields.map_fields(torch.clone, value) if isinstance(value, tuple) else value.clone()


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
