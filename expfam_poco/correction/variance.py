"""The live variance meter: by how much the correction lowers the spread of gradients and curvatures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from expfam_poco.correction.alpha import AdaptiveAlpha
from expfam_poco.correction.snapshot import VarianceTerms, optimal_alpha, variance_ratio
from expfam_poco.family.transfer import Later, is_ahead

# Prime, so that refreshes every 10 or 20 steps do not always show it the same step after them.
EVERY = 11
KEEP = 0.9
SUMS = len(VarianceTerms._fields)


class VarianceMeter:
    """Moving averages of the sums in `correction.variance_terms`, for every tensor and field of its sites.

    Tensors with a fixed α are looked at every eleventh step, those with an adaptive one at every step that measures a
    pair.
    """

    def __init__(self) -> None:
        # Per tensor and field: ⟨a,a⟩, ⟨a,d⟩, ⟨d,d⟩, and ‖a − α d‖² with the α that was used.
        self._averages: dict[str, dict[str, list[float]]] = {}
        # Var(ḡ_out) of every tensor and field, where a refresh has measured it.
        self.outer: dict[str, dict[str, float]] = {}
        self._alphas: dict[str, dict[str, float]] = {}  # last used
        self._squares: dict[str, float] = {}
        self._square_step = 0
        # What has been measured on an accelerator, which is not waited for, and who takes it in.
        self._waiting: list[tuple[Later, Callable[[Any], None]]] = []

    def refreshed(self, errors: dict[str, dict[str, float]], rho: Mapping[str, Any]) -> None:
        """Take in the variances of a mega-batch's mean, of which ḡ ← ρ ḡ + (1−ρ) new has ρ² Var ḡ + (1−ρ)² Var new.

        Args:
            errors: by tensor and field; {} where none was measured.
            rho: a Site of ρ by tensor.
        """
        kept = {}
        for name, own in errors.items():
            old, kept[name] = self.outer.get(name, {}), dict(own)
            for field in own.keys() & old.keys():
                weight = float(getattr(rho[name], field))
                kept[name][field] = weight**2 * old[field] + (1.0 - weight) ** 2 * own[field]
        self.outer = kept

    def __getstate__(self) -> dict[str, Any]:
        """With all that has been measured."""
        self._take_in()
        return self.__dict__

    @staticmethod
    def samples(step: int, adaptive: bool = False) -> bool:
        """Whether this step is one of those that are sampled."""
        return adaptive or step % EVERY == 0

    def add(self, name: str, terms: Any, alphas: Iterable[float], keep: float | None = None) -> None:
        """Take in one tensor's `VarianceTerms` of every field, and the α that was used for each."""
        values = [value if is_ahead(value.device) else value.cpu() for term in terms for value in term]
        numbers = torch.stack([value.double() for value in values]).view(len(terms), SUMS)
        self._wait(numbers, partial(self._add, name, terms._fields, tuple(alphas), KEEP if keep is None else keep))

    def _add(
        self, name: str, names: Iterable[str], alphas: Iterable[float], keep: float, numbers: list[list[float]]
    ) -> None:
        if not all(map(math.isfinite, itertools.chain(*numbers))):
            return  # of a step that was none
        known = self._averages.setdefault(name, {})
        for field, (plain, cross, outer), alpha in zip(names, numbers, alphas, strict=True):
            corrected = variance_ratio(plain, cross, outer, alpha) * plain if plain > 0.0 else 0.0
            new = [plain, cross, outer, corrected]
            old = known.get(field, new)
            self._alphas.setdefault(name, {})[field] = alpha
            known[field] = [keep * a + (1.0 - keep) * b for a, b in zip(old, new, strict=True)]

    def add_square(self, step: int, name: str, square: Tensor, scale: float = 1.0) -> None:
        """Take in ‖corrected gradient‖² of one tensor, times `scale`."""
        self._wait(square, partial(self._add_square, step, name, scale))

    def _add_square(self, step: int, name: str, scale: float, square: float) -> None:
        if not math.isfinite(square):
            return
        if step != self._square_step:
            self._squares, self._square_step = {}, step
        self._squares[name] = square * scale

    def _wait(self, values: Tensor, take: Callable[[Any], None]) -> None:
        """Take in values in the order in which they were measured, as soon as they can be had without waiting."""
        self._waiting.append((Later(values), take))
        self._take_in(waiting=False)

    def _take_in(self, *, waiting: bool = True) -> None:
        while self._waiting and (waiting or self._waiting[0][0].arrived):
            values, take = self._waiting.pop(0)
            take(values.read())

    def alpha(
        self, name: str, momentum_block: Iterable[str], adaptive: AdaptiveAlpha, steps: int = 1
    ) -> tuple[float, float]:
        """α* of a tensor's gradient (the fields that momentum averages) and of its curvature; 0 before any look.

        `steps`: how many steps share one ḡ_out, and its error.
        """
        self._take_in()
        first = set(momentum_block)
        pair = []
        for belongs in (lambda field: field in first, lambda field: field not in first):
            sums = [values[:SUMS] for field, values in self._averages.get(name, {}).items() if belongs(field)]
            error = sum(value for field, value in self.outer.get(name, {}).items() if belongs(field))
            _, cross, outer = (sum(values) for values in zip(*sums, strict=True)) if sums else (0.0, 0.0, 0.0)
            pair.append(optimal_alpha(cross, outer, adaptive.least_gain, adaptive.share, error, steps))
        return pair[0], pair[1]

    def probes(self, step: int, names: Iterable[str], adaptive: AdaptiveAlpha) -> bool:
        """Whether pairs are to be measured though α may be 0: none of these tensors has been, or it is time to."""
        return step % adaptive.probe_every == 0 or not any(name in self._averages for name in names)

    def read(self) -> dict[str, float]:
        """For every field, over all tensors: the ratios corrected/plain and the α of the least first one; norms."""
        self._take_in()
        totals: dict[str, list[float]] = {}
        for name, fields in self._averages.items():
            for field, values in fields.items():
                error = self.outer.get(name, {}).get(field, 0.0)
                # ‖a − α d‖² holds (1 − α)² of the error, by which ḡ_out lies off; the estimate holds α² of it.
                moved = (2.0 * self._alphas.get(name, {}).get(field, 0.0) - 1.0) * error
                old = totals.get(field, [0.0] * (len(values) + 2))
                totals[field] = [a + b for a, b in zip(old, [*values, error, moved], strict=True)]
        numbers = {}
        for field, (plain, cross, outer, corrected, error, moved) in totals.items():
            numbers[f"variance_ratio.{field}"] = corrected / plain if plain > 0.0 else float("nan")
            numbers[f"optimal_alpha.{field}"] = cross / outer if outer > 0.0 else float("nan")
            if any(field in known for known in self.outer.values()):
                less = plain - error
                total = (corrected + moved) / less if less > 0.0 else float("nan")
                numbers[f"total_variance_ratio.{field}"] = total
        if self._squares:
            numbers["gradient_norm"] = math.sqrt(sum(self._squares.values()))
        return numbers

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        self._take_in()
        averages = {name: {f: list(v) for f, v in fields.items()} for name, fields in self._averages.items()}
        outer, alphas = ({name: dict(fields) for name, fields in own.items()} for own in (self.outer, self._alphas))
        return {
            "averages": averages, "squares": dict(self._squares), "square_step": self._square_step,
            "outer": outer, "alphas": alphas,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._waiting = []
        self._averages = {name: {f: list(v) for f, v in fs.items()} for name, fs in state["averages"].items()}
        self._squares, self._square_step = dict(state["squares"]), state["square_step"]
        self.outer, self._alphas = (
            {name: dict(fields) for name, fields in state.get(own, {}).items()} for own in ("outer", "alphas")
        )


def is_meter_state(state: Any) -> bool:
    """Whether it has the form of `VarianceMeter.state()`."""
    if not isinstance(state, Mapping) or not all(isinstance(state.get(n), Mapping) for n in ("averages", "squares")):
        return False
    if not all(isinstance(fields, Mapping) for fields in state["averages"].values()):
        return False
    rows = [row for fields in state["averages"].values() for row in fields.values()]
    for known in (state.get("outer", {}), state.get("alphas", {})):  # which older checkpoints lack
        if not isinstance(known, Mapping) or not all(isinstance(fields, Mapping) for fields in known.values()):
            return False
        if not all(type(value) is float for fields in known.values() for value in fields.values()):
            return False
    whole = all(isinstance(row, list) and [type(v) for v in row] == [float] * (SUMS + 1) for row in rows)
    return whole and all(type(v) is float for v in state["squares"].values()) and type(state.get("square_step")) is int
