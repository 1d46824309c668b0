"""Several processes that train one model: which they are, and what they must agree about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expfam_poco.arguments import flag
from expfam_poco.closures import processes
from expfam_poco.closures.batched import Batched
from expfam_poco.closures.evaluate import Closure, no_batch
from expfam_poco.closures.shards import is_spread, made
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
        if together is not None or (made and any([block.is_part for block in blocks])):
            self._refuse_together(parts, blocks)
        if together is None:
            if self._is_alone or not processes.are_many(self._process_group):
                return
            params, closures = [p for block in blocks for p in block.params], [closure for closure, _ in parts]
            together = processes.find(self._process_group, lambda: self._evaluator.modules(params, closures), params)
            self._is_alone = together is None
            if together is None:
                return
            together.own_noise, self._evaluator.processes = self._noise_per_rank, together
            self._evaluator.spread = together if together.spread else None
            if not self._seed_is_given:
                self.seed = together.first(self.seed)
            for block in blocks:
                if together.spread and block.shard is None:
                    block.share = 1.0 / together.size
            self._refuse_together(parts, blocks)
        together.weight = 1.0 if weights is None else float(sum(weights))
        counted = len(parts) if doing == "a step" or together.spread else 0
        facts = {
            "what comes next, a step or a refresh": [doing],
            "the number of steps": self._clock["step"],
            "the number of refreshes": self._clock["refresh"],
            "the model (names, shapes and data types of its parameters)": [
                (name, tuple(p.shape), p.dtype) for b in blocks for name, p in zip(b.names, b.params, strict=True)
            ],
            "families and hyperparameters": [
                [{**group, "params": (), "prior": _told(group["prior"])} for group in self.param_groups], self.noise,
                self.mc_samples, self.correction, self.max_grad_norm, self.nonfinite, self._noise_per_rank,
            ],
            "the seed": [self.seed],
            "the number of closures": 0 if counted == 1 and parts[0][0] is no_batch and together.spread else counted,
        }  # fmt: skip
        if together.spread:  # micro-batches are evaluated by all together
            inner = [getattr(closure, "shares", ()) for closure, _ in parts]
            facts["the weights of closures (with parameters spread over processes all count alike)"] = [weights, inner]
        together.agree(facts)

    def _refuse_together(self, parts: Sequence[tuple[Closure, float]], blocks: Sequence[Block]) -> None:
        """Say what several processes cannot do, or parameters that are spread over them."""
        spread = next((block.name for block in blocks if block.shard is not None), None)
        if spread is None and self._evaluator.processes is None:
            return
        if self._products.kind != "curvature":
            raise ValueError(
                f"anchor={self._products.kind!r}: it needs the whole mega-batch, of which each process has a part; use "
                "anchor='curvature' with several processes."
            )
        batched = [closure for closure, _ in parts if isinstance(closure, Batched)]
        if batched:
            raise ValueError(
                f"closure: {type(batched[0]).__name__} is for one process; use an ordinary closure, with "
                "noise_per_rank=True if each process is to have draws of its own."
            )
        if spread is None:
            return
        if self._noise_per_rank:
            raise ValueError(
                f"noise_per_rank=True: {spread!r} is spread over processes (fully_shard, DTensor), which so have one "
                "draw together; use mc_samples for more draws."
            )
        if any(getattr(closure, "scaling", None) is not None for closure, _ in parts):
            raise ValueError(
                f"scaler: {spread!r} is spread over processes (fully_shard, DTensor), which would scale differently; "
                "use bfloat16, as by MixedPrecisionPolicy, without a scaler."
            )

    def _require_one_process(self, what: str) -> None:
        """Refuse what is for one process where there may be several."""
        many = not self._is_alone and processes.are_many(self._process_group)
        if many or any([block.is_part for block in self._blocks]):
            raise ValueError(
                f"{what}: its graphs know of no other processes, of which there are some; call step(closure)."
            )

    def _chunks(self, own: int) -> tuple[int, int, int]:
        """Of a mega-batch: the chunks of the processes before this one, of all, and how many mini-batches they are."""
        together = self._evaluator.processes
        if together is None or together.spread:  # which evaluate every chunk together
            return 0, own, own
        counts = together.each(own)
        total = sum(counts)
        return sum(counts[: together.rank]), total, max(1, round(total / together.size))

    def _summed(self, numbers: Sequence[float], blocks: Sequence[Block]) -> list[float]:
        """The sums over processes of what each has of parts; all of them have to ask."""
        if all(block.shard is None for block in blocks):
            return list(numbers)
        together = self._evaluator.processes
        if together is None:
            together = processes.find(None, list, [p for block in blocks for p in block.params])
        return list(numbers) if together is None else together.totals(numbers)


def _told(prior: Any) -> Any:
    """A prior as it is compared: of one that is spread, each process has other parts."""
    states = prior.values() if isinstance(prior, dict) else [] if prior is None else [prior]
    return [[is_spread(value) or value for value in state] for state in states]
