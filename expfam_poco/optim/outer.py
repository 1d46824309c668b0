"""How an optimizer's q_out comes about: from a mega-batch, or from a stored posterior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expfam_poco.arguments import whole
from expfam_poco.closures.caches import forget_weights
from expfam_poco.closures.evaluate import Closure, check_chunks, parts_of, unused_error
from expfam_poco.closures.fp16 import ScaledOverflow
from expfam_poco.correction.alpha import refreshed
from expfam_poco.correction.snapshot import outer_from_posterior
from expfam_poco.engine import beginning
from expfam_poco.engine.interrupts import Uninterrupted
from expfam_poco.engine.rows import check_refreshed
from expfam_poco.engine.spread import errors_together, failing_together, meter_names
from expfam_poco.engine.step import remember
from expfam_poco.errors import NonFiniteError
from expfam_poco.family import fields
from expfam_poco.optim.records import posteriors_of
from expfam_poco.optim.together import Together


class Refreshing(Together):
    """What a `PosteriorCorrected` does at the snapshot; mixed into it."""

    @torch.no_grad()
    def refresh(
        self,
        closures: Sequence[Closure],
        weights: Sequence[float] | None = None,
        *,
        draws: int = 1,
        scaler: Any = None,
    ) -> Tensor:
        """Make q_out from a mega-batch: λ_out ← λ_in, ḡ_out ← ρ ḡ_out + (1−ρ) mean over chunks (Eq. 17, 26).

        Args:
            closures: one for each chunk of the mega-batch; each returns the mean loss of its chunk.
            weights: the chunks' numbers of examples; None counts chunks equally.
            draws: how many times all of it is evaluated, each with noise of its own. The noise in ḡ_out stays in every
                step until the next refresh: of a posterior that is wide for its loss one draw is too few. From two on
                it is measured, for "total_variance_ratio.…" of `diagnostics()` and for `alpha="adaptive"`.
            scaler: a `torch.amp.GradScaler` for fp16, told of overflows; call `scaler.update()` after the next step.

        Returns:
            the mega-batch's mean loss at the sampled weights; NaN if its scaled gradients overflow.

        On any other error, also with nonfinite="skip", q_out stays as it was and the error is raised.
        """
        whole("draws", draws, 1)
        self._settle(raising=True)
        try:
            return self._refresh(closures, weights, draws, scaler)
        except ScaledOverflow:
            return NonFiniteError.loss
        finally:
            self._layout.recover()

    def _refresh(self, closures: Sequence[Closure], weights: Sequence[float] | None, draws: int, scaler: Any) -> Tensor:
        if self.correction.compares and not self.correction.refresh_evaluations:
            raise ValueError(f"correction={self.correction!r}: no refresh makes it; give it one by set_outer(state).")
        chunks, shares = check_chunks(closures, weights)
        parts = [part for chunk in chunks for part, _ in parts_of(chunk, None, scaler=scaler)]
        blocks = self._trainable()
        check_refreshed(parts, blocks)
        counts = [1.0] * len(parts) if weights is None else weights
        doing = "a refresh" if draws == 1 else f"a refresh of {draws} draws"
        self._join([(part, 1.0) for part in parts], blocks, doing, counts)
        before, count, mega = self._chunks(len(parts))
        refresh, first = self._clock["refresh"] + 1, self._clock["chunk"] + 1 + before
        now = self._round(blocks, self._clock["step"] + 1)
        self._products.begin()
        with self._weights_restored(blocks):
            chunked = list(zip(parts, shares, strict=True))
            loss, trials, errors = now.evaluate_mega(chunked, self._evaluator, refresh, first, draws, count)
        if not any(any(trial.used) for trial in trials):
            raise unused_error()
        errors = errors_together(errors, self._blocks, self._evaluator.spread)
        with failing_together(self._evaluator.spread):
            memories = [remember(trial, record) for trial, (_, record) in zip(trials, now.units, strict=True)]
        with Uninterrupted():
            self._clock.update(refreshed(self._clock, count * draws), mega=mega)
            names = meter_names(self._blocks)
            rho = {name: b.family.per_block(*b.settings.rho) for b in blocks for name in (b.name, names[b.name])}
            self._meter.refreshed(errors, rho)
            now.keep(memories, trials, self._clock["memory"])
            self._products.commit()
        return loss

    @torch.no_grad()
    def set_posterior(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored or merged posterior: q ← state, and the model holds its point.

        Momentum, which was measured elsewhere, begins anew, and so does a memory that follows steps; q_out stays.

        Args:
            state: as for `set_outer`.
        """
        blocks = self._active()
        states = posteriors_of(state, blocks, self.param_groups)
        self._begun.clear()
        for block in blocks:
            record = self._state(block)
            record["posterior"] = fields.map_fields(torch.clone, states[block.name])
            record["momentum"], record["step"], record["ages"], record["drawn"] = (), 0, None, None
            block.drawn = None
            if self.correction.follows_steps:
                record["memory"], record["stamp"] = None, 0
            self._write_point(block)
            block.note_weights()
        forget_weights()

    @torch.no_grad()
    def set_outer(self, state: Mapping[str, Any]) -> None:
        """Make q_out from a stored posterior (knowledge transfer, PC §3.1): its ḡ_out is the one that a fixed
        point of the rule has, −∇̃KL(q_out ‖ p₀)/N.

        Args:
            state: a `State` for every block by name (as `posterior_states()` gives), or the `state_dict()` of an
                optimizer of the same model.
        """
        blocks = self._active()
        self._products.check_set_outer()
        states = posteriors_of(state, blocks, self.param_groups)
        self._clock.update(refreshed(self._clock, 0))
        self._meter.outer = {}  # this q_out comes of no draws
        for block in blocks:
            own = fields.map_fields(torch.clone, states[block.name])  # steps in place must not reach the caller's
            site = outer_from_posterior(block.family, own, beginning.prior_of(block), block.settings.ess).site
            memory = self.correction.after_refresh(
                block.family, None, own, site, block.settings.averaging(block.family)
            )
            record = self._state(block)
            record["memory"], record["stamp"], record["in_mega"] = memory, self._clock["memory"], True
