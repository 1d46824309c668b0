"""Where the noise of a step or refresh comes from: the streams of the counter-based generator, and how trials use them.

Noises of different purposes are in different streams, so that they never share a counter.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.closures.batched import Batched
from expfam_poco.closures.evaluate import Closure
from expfam_poco.correction.base import Correction
from expfam_poco.engine.backend import Backend
from expfam_poco.engine.block import Block, Record
from expfam_poco.engine.kernels import Numbers, numbers_of
from expfam_poco.engine.tiles import steps_in_place
from expfam_poco.engine.trial import Trial, empty_site
from expfam_poco.family.noise import NoiseKey

STEP, REFERENCE, MEGA, FIXED, SAMPLE, SIGNS_STEP, SIGNS_REFERENCE, SIGNS_MEGA, ELBO = range(9)
NOISE_MODES = ("shared", "independent", "fixed", "antithetic", "zero")


def draws_of(mode: str, mc_samples: int) -> int:
    """The draws of an evaluation: antithetic ones are pairs."""
    return 2 * mc_samples if mode == "antithetic" else mc_samples


def draw_noise(block: Block, mode: str, count: int, key: NoiseKey) -> Tensor:
    """K × P standardised noise: `count` draws, `count` antithetic pairs, or `count` times the median."""
    family = block.family
    key = key.at(parameter=block.index, offset=block.offset * numbers_of(family))
    if mode == "zero":
        like = torch.empty(count, *block.shape, dtype=block.dtype, device=block.device)
        return family.neutral_noise(like)
    drawn = family.noise(block.shape, count, key, dtype=block.dtype, device=block.device)
    if mode == "antithetic":
        return torch.stack([drawn, family.reflect(drawn)], 1).flatten(0, 1)
    return drawn


_seeded = functools.lru_cache(64)(NoiseKey)  # the seed is checked once, the counters each time


class Part(NamedTuple):
    """Which part of a step or mega-batch a trial is for: its number, its share, the trial of the part before it.

    `collecting`: natural gradients are summed up, so that even a single part has a total.
    """

    number: int
    share: float
    before: Trial | None = None
    collecting: bool = True


class NoisePlan(NamedTuple):
    """The noise mode, draws per evaluation, and the seed: with counters they determine every noise.

    `backend` steps blocks that are large enough in place; None: there are none.
    """

    mode: str
    mc_samples: int
    seed: int
    correction: Correction
    backend: Backend | None = None

    def _key(self, stream: int, step: int) -> NoiseKey:
        return _seeded(self.seed).at(stream=stream, step=step)

    def step_key(self, step: int) -> NoiseKey:
        """Where the noise of a step is."""
        return self._key(STEP, step)

    def at_present(
        self, block: Block, record: Record, numbers: Numbers, step: int, closure: Closure, part: Part
    ) -> Trial:
        """A block at λ: fresh noise at every step (and for every part of it, where there are several)."""
        keys = self.step_key(step), self._key(SIGNS_STEP, step)
        return self._trial(block, record["posterior"], record["memory"], numbers, keys, closure, part)

    def at_reference(self, first: Trial, state: Any, step: int, stamp: int, part: Part) -> Trial:
        """The same block at λ_ref; its noise is that of λ unless the mode says otherwise."""
        changed: dict[str, Any] = {"state": state, "memory": None, "is_present": False}
        if self.mode in ("independent", "fixed"):
            independent = self.mode == "independent"
            key = self._key(REFERENCE, step) if independent else self._key(FIXED, stamp)
            signs = self._key(SIGNS_REFERENCE if independent else SIGNS_STEP, step)
            sign_key = signs.at(draw=part.number * first.count)
            changed.update(key=self._of_part(key, part), noises=[], sign_key=sign_key)
        return self._carrying(first.again(**changed), part)

    def at_mega(
        self, block: Block, record: Record, numbers: Numbers, chunk: int, stamp: int, closure: Closure, part: Part
    ) -> Trial:
        """A block at the posterior that becomes λ_out; fresh noise for every chunk unless the mode is "fixed"."""
        key = self._key(FIXED, stamp) if self.mode == "fixed" else self._key(MEGA, chunk)
        keys = key, self._key(SIGNS_MEGA, chunk)
        return self._trial(block, record["posterior"], None, numbers, keys, closure, part)

    def _trial(
        self,
        block: Block,
        state: Any,
        memory: Any,
        numbers: Numbers,
        keys: tuple[NoiseKey, NoiseKey],
        closure: Closure,
        part: Part,
    ) -> Trial:
        in_place = self.backend is not None and not isinstance(closure, Batched) and steps_in_place(block)
        made = Trial(
            block, block.settings.estimator, self.correction, state, memory, numbers, self._of_part(keys[0], part),
            keys[1], self.mode, self._count(closure), self.backend if in_place else None,
        )  # fmt: skip
        if part.number:
            made.sign_key = keys[1].at(draw=part.number * made.count)
        return self._carrying(made, part)

    @staticmethod
    def _carrying(trial: Trial, part: Part) -> Trial:
        """The trial with what the parts before it have brought."""
        trial.weight, trial.total, trial.used = part.share, None, []
        if part.before is not None:
            trial.total, trial.used = part.before.settled(), part.before.used
            if trial.watched and not trial.in_place:
                trial.spoil = part.before.spoils()
        if trial.in_place:
            trial.weight = part.share / trial.count
            if trial.total is None and (part.collecting or trial.count > 1):
                trial.total = empty_site(trial.block, trial.state)
        return trial

    def _of_part(self, key: NoiseKey, part: Part) -> NoiseKey:
        """The draws of one part of a step follow those of the parts before it; a fixed draw stays."""
        return key if key.stream == FIXED or part.number == 0 else key.at(draw=part.number * self.mc_samples)

    def _count(self, closure: Closure) -> int:
        if not isinstance(closure, Batched) or closure.draws == 1:
            return self.mc_samples
        if self.mode == "fixed":
            raise ValueError(
                "noise='fixed': with PerExample every example would keep the draw of its place in the batch; use "
                "noise='shared'."
            )
        return self.mc_samples * closure.draws
