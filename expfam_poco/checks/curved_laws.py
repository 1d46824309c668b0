"""The laws of curved families: the dense truth by expansion, and steps that are projections of the ambient ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from expfam_poco.checks.density_laws import Findings
from expfam_poco.checks.specimens import SAMPLES, SLACK, Finding, Specimen, size_of
from expfam_poco.family import fields
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.curved import CurvedFamily


def expansion(s: Specimen) -> Findings:
    """A curved family agrees with its ambient one, and its projections are orthogonal in the Fisher metric."""
    family = s.family
    if not isinstance(family, CurvedFamily):
        return
    ambient = family.ambient
    for number, (state, prior) in enumerate(s.pairs()):
        theta = family.sample(state, s.noise(4, SAMPLES, number))
        comparisons: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
            "log_prob": (_log_prob_at(family, theta), _log_prob_at(ambient, family.flatten(theta))),
            "entropy": (lambda at, to: family.entropy(at), lambda at, to: ambient.entropy(at)),
            "kl": (family.kl, ambient.kl),
        }
        for name, (own, dense) in comparisons.items():
            value, tolerances = s.rounded(own, state, prior)
            expected, more = s.rounded(dense, family.expand(state), family.expand(prior))
            allowed = [a + b for a, b in zip(tolerances, more, strict=True)]
            yield s.near(f"{name} against the ambient family's", value, expected, allowed)
        yield from _orthogonal(s, number, state)


def _log_prob_at(family: ExponentialFamily, theta: Tensor) -> Callable[..., Tensor]:
    return lambda at, to: family.log_prob(at, theta)


def _orthogonal(s: Specimen, number: int, state: Any) -> Findings:
    """⟨c − projection of c, F Y⟩ = 0 for every tangent Y, against the sizes of the two."""
    family, nat = s.family, s.nats[number]
    c = s.direction(640 + number)
    rest = fields.subtract(c, s.seen(c, state))
    for step in range(3):
        tangent = s.seen(s.direction(660 + 10 * number + step), state)
        image = family.fisher_vector_product(nat, tangent)
        size = sum(size_of(a) * float(b.abs().sum()) for a, b in zip(c, image, strict=True))
        product = sum(float((a * b).sum()) for a, b in zip(rest, image, strict=True))
        yield Finding("⟨c − projection, F · tangent vector⟩ against 0", abs(product), 64.0 * SLACK * s.eps * size)


def along_the_tangent(s: Specimen, state: Any, direction: Any, rate: float) -> Findings:
    """The distance from the ambient step λ − η d falls with the square of the rate, once it is small enough."""
    if not s.sampling:
        return
    family = s.family
    nat, tangent = family.to_nat(state), family.site_to_nat(direction, state)

    def gap(variant: str, rate: float) -> float:
        moved = family.to_nat(family.retract(state, direction, family.per_block(rate, rate), variant=variant))
        off = (size_of(m - (a - rate * b)) for m, a, b in zip(moved, nat, tangent, strict=True))
        return max(off)

    for variant in ("plain", "second_order"):
        found = []
        for size in (rate, 0.1 * rate, 0.01 * rate, 0.001 * rate):
            what = f"gap between the {variant} step and the ambient one at a quarter of the rate"
            floor = SLACK * s.eps * max(size_of(value) for value in nat)
            found.append(Finding(what, gap(variant, 0.25 * size), 0.125 * gap(variant, size) + floor))
        yield min(found, key=lambda finding: finding.severity)
