"""One step's evaluations: every draw at both posteriors, with paired random numbers and buffers that move once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from expfam_poco.closures.batched import Batched
from expfam_poco.closures.effects import Buffers, ModuleState, Replay, capture_random, replay_random
from expfam_poco.closures.evaluate import Closure, Request, require_sound
from expfam_poco.closures.processes import Processes
from expfam_poco.engine.measure import evaluate_together, measure_batched, measure_draw, measure_variations, params_of
from expfam_poco.engine.products import Products
from expfam_poco.engine.trial import Trial
from expfam_poco.family import recording
from expfam_poco.family.transfer import told

FIRST, AGAIN = 3, 61  # evaluations that are looked at more closely: so many, and every so many


class Evaluator:
    """Evaluates closures at the draws of trials; only a batch's first evaluation moves the model's buffers.

    Attributes:
        processes: that train the model together, once they are known, if they are several.
        spread: the same, if parameters are spread over them.
    """

    def __init__(self, products: Products) -> None:
        self.products = products
        self._buffers = Buffers()
        self._moved: list[ModuleState] = []
        self._evaluations = 0
        self._watched = False
        self._averaged: Processes | None = None
        self.processes: Processes | None = None
        self.spread: Processes | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks for its own processes."""
        return {**self.__dict__, "processes": None, "spread": None, "_averaged": None}

    def modules(self, params: Sequence[Parameter], closures: Sequence[Closure]) -> list[nn.Module]:
        """The modules around these parameters, and those that closures may call."""
        return self._buffers.modules(params, closures)

    @contextmanager
    def undone_on_error(self, *, watched: bool = False) -> Iterator[None]:
        """If the block raises, the buffers that its evaluations have moved go back.

        `watched`: steps follow, whose kernels notice what is not finite where the host does not wait for the device.
        """
        self._watched = watched
        try:
            yield
        except BaseException:
            for record in reversed(self._moved):
                record.restore()
            raise
        finally:
            self._watched = False
            self._moved.clear()

    @contextmanager
    def undone(self, params: Sequence[Parameter], closures: Sequence[Closure]) -> Iterator[None]:
        """After the block, random numbers and buffers are what they were."""
        with replay_random(capture_random(params)), self._buffers.kept(params, closures):
            try:
                yield
            finally:
                self._moved.clear()

    def evaluate(
        self, closure: Closure, first: Sequence[Trial], second: Sequence[Trial] | None
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Call the closure for every draw, the one at λ first, both with the same random numbers.

        Returns:
            the mean loss there, and the anchor's H̄ (m − m_ref) for every trial, where it comes from products.
        """
        params = params_of(first)
        averaged = self.processes is not None and not self.processes.own_noise
        self._averaged = self.processes if averaged else None
        if isinstance(closure, Batched):
            return self._evaluate_batched(closure, params, first, second), None
        shift, record = None, recording.active
        if second is not None and self.products.kind != "curvature":
            with self._buffers.kept(params, self.products.closures()):
                shift = self.products.shift(first, second)
        losses, terms = [], []
        evaluations = self._buffers.evaluations(params, closure)
        self._moved.append(evaluations.before)
        for draw in range(first[0].count):
            random = None if second is None else Replay(params) if record is None else record.paired(params)
            if draw == 0:
                losses.append(self._measure(closure, first, draw)[0])
                evaluations.before.mark_gradients()
            else:
                with evaluations.kept():
                    losses.append(self._measure(closure, first, draw)[0])
            if second is not None and random is not None:
                with random.again(), evaluations.kept():
                    products = self._measure(closure, second, draw, shift)[1]
                if shift is not None:
                    terms.append(self.products.difference(products))
        mean_terms = [torch.stack(values).mean(0) for values in zip(*terms, strict=True)] if terms else None
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean(), mean_terms

    def loss(self, closure: Closure, params: Sequence[Parameter]) -> Tensor:
        """The loss of a batch, of all processes, at the weights as they are."""
        measured = evaluate_together(self.processes, closure, params, Request(gradient=False), check=False)
        require_sound(measured)
        return measured.loss

    def evaluate_chunk(self, closure: Closure, trials: Sequence[Trial], share: float) -> Tensor:
        """Evaluate one chunk of a mega-batch, which moves no buffers, and show it to the anchor."""
        params = params_of(trials)
        self._averaged = self.spread  # else the natural gradients of all chunks are
        with self._buffers.kept(params, closure):
            if isinstance(closure, Batched):
                loss = measure_batched(closure, trials)
            else:
                loss = torch.stack([self._measure(closure, trials, draw)[0] for draw in range(trials[0].count)]).mean()
            self.products.collect(closure, trials, share)
        return loss

    @staticmethod
    def _evaluate_batched(
        closure: Batched, params: Sequence[Parameter], first: Sequence[Trial], second: Sequence[Trial] | None
    ) -> Tensor:
        random = capture_random(params)
        if second is None or closure.pairs:
            return measure_batched(closure, first, *([] if second is None else [second]))
        loss = measure_batched(closure, first)
        with replay_random(random):
            measure_batched(closure, second)
        return loss

    def _measure(
        self, closure: Closure, trials: Sequence[Trial], draw: int, product_with: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """One draw of all trials, added to the totals of those that keep one."""
        varying = [trial for trial in trials if trial.estimator.needs == "variations"]
        random = capture_random(params_of(trials)) if varying else None
        check = not self._watched or not all([trial.watched for trial in trials])
        measured = measure_draw(closure, trials, draw, product_with, check=check, processes=self._averaged)
        self._require_untouched(trials, draw)
        if random is not None:
            with self._buffers.kept(params_of(trials), closure):
                measure_variations(closure, trials, draw, lambda: replay_random(random), self._averaged)
        for trial in trials:
            if trial.in_place:
                trial.collect(draw)
        return measured

    def _require_untouched(self, trials: Sequence[Trial], draw: int) -> None:
        """Refuse a closure that has written into the weights, a draw for the time, to which a write would be lost.

        Raises:
            RuntimeError: names a parameter.
        """
        for trial in trials:
            if (
                trial.block.is_part
            ):  # which the first forward pass of `fully_shard` may have laid anew, with these values
                trial.block.has_moved()
        self._evaluations += 1
        recorded = recording.active is not None  # there are no values to look at
        # Writes through `p.data` leave no trace: some evaluations look at the weights themselves.
        looks = not recorded and (self._evaluations <= FIRST or self._evaluations % AGAIN == 0)
        looked_at = [t for t in trials if looks or any([member.weights_changed() for member in t.block.members])]
        answers = told([False if recorded else trial.is_there(draw) for trial in looked_at])
        for trial, is_there in zip(looked_at, answers, strict=True):
            if not is_there:
                raise RuntimeError(
                    f"closure: it wrote into the weights of {trial.block.name!r} while they were a draw, where a write "
                    "is lost (nn.Embedding(max_norm=…), clipping or pruning in forward?); write between steps, under "
                    "torch.no_grad(), when the model holds the posterior's point."
                )
            for member in trial.block.members:
                member.note_weights()
