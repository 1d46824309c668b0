"""What the laws of a correction are tested on: a family's problem of four examples, and steps through it.

The loss of example i is ⟨c_i, T(θ)⟩, measured as in training by an unbiased estimator of the family; mini-batches are
all pairs of examples, so that a mean or a spread over mini-batches is exact and nothing is drawn at random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from expfam_poco.checks.learning_laws import estimate
from expfam_poco.checks.specimens import STEPS, Specimen
from expfam_poco.checks.suite import default_shape
from expfam_poco.correction.base import Averaging, Corrected, Correction
from expfam_poco.family import fields
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Estimator
from expfam_poco.rule.estimators import available

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


def problem_of(correction: Correction, family: ExponentialFamily, seed: int) -> Problem:
    """The correction before a family's problem in float64."""
    specimen = Specimen(family, default_shape(family), torch.float64, torch.device("cpu"), seed)
    return Problem(correction, specimen.with_members())
