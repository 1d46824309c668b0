"""The interface of `PosteriorCorrected` for what is mixed into it: attributes and methods, without bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from expfam_poco.closures.evaluate import Closure
    from expfam_poco.correction.alpha import Staleness
    from expfam_poco.correction.base import Correction
    from expfam_poco.correction.variance import VarianceMeter
    from expfam_poco.engine.backend import Backend
    from expfam_poco.engine.beginning import Beginning
    from expfam_poco.engine.block import Block, Record
    from expfam_poco.engine.evaluator import Evaluator
    from expfam_poco.engine.flips import Flips
    from expfam_poco.engine.layout import Layout
    from expfam_poco.engine.noise_plan import NoisePlan
    from expfam_poco.engine.products import Products
    from expfam_poco.engine.rehearsal import Rehearsal
    from expfam_poco.engine.round import Round
    from expfam_poco.engine.settings import Reading
    from expfam_poco.engine.step import Step
    from expfam_poco.engine.watch import Watch
    from expfam_poco.engine.width import StartingWidth
    from expfam_poco.errors import NonFiniteError, Skips


def without_hooks(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's attributes without what others have hung on it: hooks, and a scheduler's wrapped `step`."""
    return {name: v for name, v in attributes.items() if name != "step" and not name.startswith("_optimizer_")}


class Shell:
    """The interface between `PosteriorCorrected` and what is mixed into it, which asks no more of it than this."""

    seed: int
    noise: str
    correction: Correction
    mc_samples: int
    max_grad_norm: float | None
    nonfinite: str
    one_pass: bool
    backend: Backend
    param_groups: list[dict[str, Any]]
    state: Any
    _blocks: list[Block]
    _readings: list[Reading]
    _clock: dict[str, int]
    _committed: tuple[int, set[int]]
    _products: Products
    _evaluator: Evaluator
    _meter: VarianceMeter
    _stale: Staleness
    _alphas: dict[str, tuple[float, float]]
    _begun: list[Beginning]
    _watch: Watch
    _flips: Flips
    _layout: Layout
    _rehearsal: Rehearsal
    _width: StartingWidth
    _skips: Skips
    _process_group: Any
    _is_alone: bool
    _opt_called: bool

    def _active(self) -> list[Block]:
        raise NotImplementedError("the optimizer knows its blocks")

    def _trainable(self) -> list[Block]:
        raise NotImplementedError("the optimizer checks its blocks")

    def _state(self, block: Block) -> Record:
        raise NotImplementedError("the optimizer keeps the state")

    def _memory_is_of(self, blocks: Sequence[Block]) -> bool:
        raise NotImplementedError("the optimizer knows its refreshes")

    def _weights_restored(self, blocks: Sequence[Block], *, evaluating: bool = True) -> AbstractContextManager[None]:
        raise NotImplementedError("the optimizer restores the weights")

    def _round(self, blocks: Sequence[Block], number: int) -> Round:
        raise NotImplementedError("the optimizer plans its rounds")

    def _read_settings(self) -> None:
        raise NotImplementedError("the optimizer reads its groups")

    def _choices(
        self, now: Round, blocks: Sequence[Block], *, always: bool = False
    ) -> tuple[list[tuple[float, float]], list[bool] | None]:
        raise NotImplementedError("the optimizer chooses α")

    def _fell(self, error: NonFiniteError, number: int) -> None:
        raise NotImplementedError("the optimizer counts its steps")

    def _stamp(self, steps: Sequence[Step]) -> None:
        raise NotImplementedError("the optimizer knows its refreshes")

    def _plan(self, blocks: Sequence[Block] | None) -> NoisePlan:
        raise NotImplementedError("the optimizer plans its noise")

    def _write_point(self, block: Block) -> None:
        raise NotImplementedError("the optimizer restores the weights")

    def _settle(self, *, raising: bool) -> None:
        raise NotImplementedError("the optimizer watches its steps")

    def _require_one_process(self, what: str) -> None:
        raise NotImplementedError("the optimizer knows the other processes")

    def _summed(self, numbers: Sequence[float], blocks: Sequence[Block]) -> list[float]:
        raise NotImplementedError("the optimizer knows the other processes")

    def _measured(
        self,
        parts: Sequence[tuple[Closure, float]],
        blocks: Sequence[Block],
        number: int,
        *,
        always: bool = False,
    ) -> tuple[Tensor, list[Any]]:
        raise NotImplementedError("the optimizer evaluates its steps")
