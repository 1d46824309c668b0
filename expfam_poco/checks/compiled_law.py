"""The law of compiled steps: what large models run inside their kernels is one graph, and gives the same numbers.

Kept apart because it needs the compiler's front end, and some seconds: `check_family(…, compiled=True)`.
"""

from __future__ import annotations

import itertools
import warnings
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from expfam_poco.checks.density_laws import Findings, Law
from expfam_poco.checks.specimens import SLACK, STEPS, Specimen, Unverified, as_fields, holds, size_of
from expfam_poco.family import fields
from expfam_poco.family.draws import Draws
from expfam_poco.rule.estimators import available

_NUMBERS = itertools.count()


def compiled(s: Specimen) -> Findings:
    """A step, from the draw to the new point, is one graph for the compiler, with the same numbers."""
    family = s.family
    estimator = available(family)[family.default_estimator]
    if family.joint or family.curved:
        return  # whose steps are not compiled
    if estimator.needs != "gradient":
        yield Unverified("compiled: its estimator compares losses; such steps run eagerly")
        return
    if s.dtype == torch.float64:
        return  # the optimizer's kernels are mostly of float32

    def step(state: tuple[Tensor, ...], prior: tuple[Tensor, ...], noise: Tensor, grad: Tensor, rate: Tensor) -> Any:
        now, before = family.State(*state), family.State(*prior)
        theta = estimator.points(family, now, noise)
        site = estimator.natural_gradient(family, now, Draws(noise, theta, grad.new_zeros(1), grad))
        pull = fields.add(site, family.kl_gradient(now, before))
        moved = family.retract(now, pull, family.per_block(rate, rate))
        return theta, tuple(moved), family.point(moved), family.in_domain(moved)

    name = f"step{next(_NUMBERS)}"  # a code object of its own, for Dynamo counts recompilations by code object
    own = FunctionType(step.__code__.replace(co_name=name), step.__globals__, name, None, step.__closure__)
    traced = torch.compile(own, dynamic=True, fullgraph=True, backend="aot_eager_decomp_partition")
    noise = s.noise(1, STEPS, 990)
    grad = 0.1 * s.normal((1, *s.shape), 991)
    rate = torch.tensor(0.01, dtype=s.dtype, device=s.device)
    inputs = (tuple(s.states[0]), tuple(s.states[1]), noise, grad, rate)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler about itself
        try:
            found = traced(*inputs)
        except Exception as error:
            cause = getattr(error, "inner_exception", error)
            line = next((part.strip() for part in str(cause).splitlines() if part.strip()), "no reason given")
            yield holds(
                f"compiling fails, so that steps of large models run eagerly: {type(cause).__name__}: {line}", False
            )
            return
        expected = step(*inputs)
    for what, value, other in zip(("draws", "the state after a step", "its point"), found, expected, strict=False):
        parts, others = as_fields(value), as_fields(other)
        sizes = [SLACK * s.eps * (1.0 + size_of(each)) for each in others]
        yield s.near(f"{what}, compiled against eager", parts, others, sizes)


COMPILED = Law(
    "compiled", compiled, "use torch operations alone, without branches on data, .item() or numpy; floats are constants"
)
