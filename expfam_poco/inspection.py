"""What can be asked of an optimizer: draws and distributions of its posterior, its objective, its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from . import correction, fields, streaming
from . import posterior as inference
from .backend import Backend
from .blocks import Block
from .evaluation import Closure
from .measurement import SAMPLE, draw_noise
from .meter import VarianceMeter
from .noise import NoiseKey
from .posterior import Objective
from .spans import can_stream


class Inspection:
    """The questions that a `PosteriorCorrected` answers; mixed into it."""

    seed: int
    param_groups: list[dict[str, Any]]
    _clock: dict[str, int]
    _meter: VarianceMeter
    _alphas: list[tuple[float, float]]
    backend: Backend

    def _active(self) -> list[Block]:
        raise TypeError("Inspection is mixed into an optimizer, which knows its blocks.")

    def _state(self, block: Block) -> dict[str, Any]:
        raise TypeError("Inspection is mixed into an optimizer, which keeps the state.")

    def _weights_restored(self, blocks: Sequence[Block], *, clear_grad: bool = True) -> AbstractContextManager[None]:
        raise TypeError("Inspection is mixed into an optimizer, which restores the weights.")

    def _streaming(self, blocks: Sequence[Block]) -> Backend | None:
        raise TypeError("Inspection is mixed into an optimizer, which knows its backend.")

    def _write_point(self, block: Block) -> None:
        raise TypeError("Inspection is mixed into an optimizer, which restores the weights.")

    @contextmanager
    def sampled(self, seed: int | None = None, *, at_point: bool = False) -> Iterator[None]:
        """Inside, the weights are a draw from q (with `at_point`, the point); outside, the point again.

        Args:
            seed: fixes the draw; None takes the next of the optimizer's own.
            at_point: no draw at all.
        """
        blocks = self._active()
        if seed is None and not at_point:
            self._clock["sample"] += 1
        key = NoiseKey(self.seed, SAMPLE, self._clock["sample"]) if seed is None else NoiseKey(seed, SAMPLE)
        with self._weights_restored(blocks, clear_grad=False):
            for block in blocks:
                state = self._state(block)["posterior"]
                if at_point:
                    self._write_point(block)
                elif can_stream(block) and self._streaming(blocks) is not None:
                    streaming.sample_into(block, state, self.backend, key)
                else:
                    block.write(block.family.sample(state, draw_noise(block, "shared", 1, key))[0])
            yield

    def posterior(self) -> dict[str, Any]:
        """The trained q as Pyro distributions, by parameter name (by "group<i>" for joint families)."""
        return {b.name: b.family.distribution(_copied(self._state(b)["posterior"])) for b in self._active()}

    def posterior_states(self) -> dict[str, Any]:
        """The trained q as `State`s by the same names: a prior for the next task, or q_out for `set_outer`."""
        return {b.name: _copied(self._state(b)["posterior"]) for b in self._active()}

    @torch.no_grad()
    def objective(
        self,
        closures: Sequence[Closure],
        weights: Sequence[float] | None = None,
        *,
        samples: int = 32,
        seed: int = 0,
    ) -> Objective:
        """The evidence lower bound −(N E_q[ℓ] + KL(q ‖ p₀)) and its standard error over `samples` draws.

        Args:
            closures: chunks that together are the data, each giving its mean loss.
            weights: their numbers of examples.
            samples: draws from q, at least 2.
            seed: of the draws.
        """
        blocks = self._active()
        with self._weights_restored(blocks, clear_grad=False):
            states = {b.name: self._state(b)["posterior"] for b in blocks}
            return inference.objective(blocks, states, closures, weights, samples=samples, seed=seed)

    def diagnostics(self) -> dict[str, float]:
        """Plain numbers worth logging.

        Steps, refreshes and skipped steps; α of the last step; per field of the sites the ratio of squared deviations
        corrected/plain ("variance_ratio.…") and the α that would minimise it ("optimal_alpha.…"), averaged over
        every seventh corrected step; the seconds spent on compiling; "mean_stddev", where the family's distribution
        has one.
        """
        numbers: dict[str, float] = {
            "steps": self._clock["step"],
            "refreshes": self._clock["refresh"],
            "skipped_steps": self._clock["skipped"],
        }
        for i, group in enumerate(self.param_groups):
            suffix = f".group{i}" if len(self.param_groups) > 1 else ""
            used = self._alphas[i] if i < len(self._alphas) else correction.alpha_at(group["alpha"], 1)
            numbers[f"alpha{suffix}"] = used[0]
            if used[1] != used[0]:
                numbers[f"alpha_curvature{suffix}"] = used[1]
        numbers.update(self._meter.read())
        numbers["compile_seconds"] = self.backend.compile_seconds
        present = {b.name: b.family.distribution(self._state(b)["posterior"]) for b in self._active()}
        deviation = inference.mean_stddev(present)
        if deviation is not None:
            numbers["mean_stddev"] = deviation
        return numbers


def _copied(state: Any) -> Any:
    """A state that later steps, which may work in place, do not reach."""
    return fields.map_fields(torch.clone, state)
