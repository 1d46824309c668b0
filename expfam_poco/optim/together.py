"""Several processes that train one model: which they are, and what they must agree about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expfam_poco.arguments import flag
from expfam_poco.closures import processes
from expfam_poco.closures.batched import Batched
from expfam_poco.closures.evaluate import Closure
from expfam_poco.engine.block import Block
from expfam_poco.optim.base import Shell


class Together(Shell):
    """What a `PosteriorCorrected` shares with those of other processes; mixed into it."""

    def _start_together(self, process_group: Any, noise_per_rank: bool, seed_is_given: bool) -> None:
        """Keep what was said of processes, which are looked for at the first step."""
        flag("noise_per_rank", noise_per_rank)
        self._process_group, self._noise_per_rank = process_group, noise_per_rank
        self._seed_is_given, self._is_alone = seed_is_given, False

    def _join(
        self,
        parts: Sequence[tuple[Closure, float]],
        blocks: Sequence[Block],
        doing: str,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Find the other processes, once, and compare with them what comes next.

        Args:
            parts: closures that are about to be evaluated, and their shares.
            blocks: that take part.
            doing: what comes.
            weights: what this process's closures count; None: as much as those of any other.

        Raises:
            RuntimeError: on every process, where they disagree.
            ValueError: for what several processes cannot do.
        """
        together = self._evaluator.processes
        if together is None:
            if self._is_alone or not processes.are_many(self._process_group):
                return
            params, closures = [p for block in blocks for p in block.params], [closure for closure, _ in parts]
            together = processes.find(self._process_group, lambda: self._evaluator.modules(params, closures), params)
            self._is_alone = together is None
            if together is None:
                return
            together.own_noise, self._evaluator.processes = self._noise_per_rank, together
            if not self._seed_is_given:
                self.seed = together.first(self.seed)
        together.weight = 1.0 if weights is None else float(sum(weights))
        self._refuse_together(parts)
        together.agree(
            {
                "what comes next, a step or a refresh": [doing],
                "the number of steps": self._clock["step"],
                "the number of refreshes": self._clock["refresh"],
                "the model (names, shapes and data types of its parameters)": [
                    (name, tuple(p.shape), p.dtype) for b in blocks for name, p in zip(b.names, b.params, strict=True)
                ],
                "families and hyperparameters": [
                    [{**group, "params": ()} for group in self.param_groups], self.noise, self.mc_samples,
                    self.correction, self.max_grad_norm, self.nonfinite, self._noise_per_rank,
                ],
                "the seed": [self.seed],
                "the number of closures": len(parts) if doing == "a step" else 0,
            }
        )  # fmt: skip

    def _refuse_together(self, parts: Sequence[tuple[Closure, float]]) -> None:
        if self._products.kind != "curvature":
            raise ValueError(
                f"anchor={self._products.kind!r}: it needs the whole mega-batch, of which each process has a part; use "
                "anchor='curvature' with several processes."
            )
        batched = [closure for closure, _ in parts if isinstance(closure, Batched)]
        if batched:
            raise ValueError(
                f"closure: {type(batched[0]).__name__} is for one process; use an ordinary closure, or "
                "noise_per_rank=True for as many draws as processes."
            )

    def _chunks(self, own: int) -> tuple[int, int, int]:
        """Of a mega-batch: the chunks of the processes before this one, of all, and how many mini-batches they are."""
        together = self._evaluator.processes
        if together is None:
            return 0, own, own
        total = round(together.totals([own])[0])
        return together.before(own), total, max(1, round(total / together.size))
