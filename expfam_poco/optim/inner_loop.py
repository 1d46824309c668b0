"""Whole inner loops of generalised linear models, eagerly or as one compiled call; mixed into `PosteriorCorrected`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from expfam_poco import arguments
from expfam_poco.closures.linear import GeneralisedLinear
from expfam_poco.correction.alpha import MegaBatchAlpha, Pace, refreshed
from expfam_poco.correction.snapshot import alpha_at
from expfam_poco.engine import inner_loop
from expfam_poco.engine.backend import plainly
from expfam_poco.engine.beginning import prior_of
from expfam_poco.engine.block import Block
from expfam_poco.engine.inner_loop import Batches, Kind
from expfam_poco.engine.interrupts import Uninterrupted
from expfam_poco.engine.kernels import Moved, Numbers, Weights
from expfam_poco.engine.noise_plan import Part
from expfam_poco.engine.round import Pair, Round
from expfam_poco.engine.step import begin, domain_error
from expfam_poco.engine.trial import Trial
from expfam_poco.engine.width import PATIENCE, check_reach
from expfam_poco.errors import NonFiniteError
from expfam_poco.family import fields
from expfam_poco.optim.base import Shell

NOISES = ("zero", "shared", "antithetic")


class Looping(Shell):
    """What a `PosteriorCorrected` does with generalised linear models; mixed into it."""

    @torch.no_grad()
    def inner_loop(
        self, data: GeneralisedLinear, batches: Tensor, *, refresh: bool = False, compiled: bool = False
    ) -> Tensor:
        r"""M steps of a generalised linear model in one call, with gradients and Hessians in closed form.

        What `step` does with `lambda: data.mean_loss(weight, rows)` for every row of `batches`, and `refresh` with
        `lambda: data.mean_loss(weight)` before: the same family, estimator, correction and rule, the same noise and
        counters, without autograd and with no looks at values in between. Ordinary steps, refreshes, checkpoints and
        changes of rates may come between loops; hooks of steps are not called.

        Args:
            data: examples and loss; d is the number of weights.
            batches: M × B numbers of rows, one mini-batch a line; R × M × B for R loops, one after the other.
            refresh: begin each loop by making q_out from all data.
            compiled: let the loop be one C++ function, for steps that take microseconds. `torch.compile` makes it at
                the first loop of its kind, which takes seconds (`diagnostics()["compile_seconds"]`); for CPUs.

        Returns:
            the losses of the mini-batches at the sampled weights, M or R × M.

        Raises:
            TypeError, ValueError: for arguments that do not fit, and for what no loop does: several blocks of weights,
                estimators without gradients or with products, noise="independent" or "fixed", an adaptive α,
                max_grad_norm, other anchors, several processes.
            NonFiniteError: if a loop would end outside of the domain or the finite numbers. None of its steps is taken
                then (its refresh and the loops before it are); with nonfinite="skip" it is skipped as a whole.

        Example:
            >>> import torch, expfam_poco as poco
            >>> _ = torch.manual_seed(0)
            >>> x = torch.randn(64, 3)
            >>> data = poco.GeneralisedLinear(x, x.sum(1), "squared")
            >>> weight = torch.nn.Parameter(torch.zeros(3))
            >>> opt = poco.SVRG([weight], lr=0.1)
            >>> batches = torch.stack([torch.randperm(64).view(16, 4) for epoch in range(10)])
            >>> losses = opt.inner_loop(data, batches, refresh=True)
            >>> losses.shape, bool((weight - 1.0).abs().max() < 1e-3)
            (torch.Size([10, 16]), True)
        """
        arguments.instance("data", data, GeneralisedLinear, "give a poco.GeneralisedLinear(x, y, loss)")
        arguments.flag("refresh", refresh)
        arguments.flag("compiled", compiled)
        _check_batches(batches, data)
        self._require_one_process("inner_loop")
        self._settle(raising=True)
        self._opt_called = True  # so that schedulers do not miss a step
        blocks = self._trainable()
        self._check_loop(blocks, data, compiled)
        try:
            with self._weights_restored(blocks):
                if batches.ndim == 2:
                    return self._loop(blocks[0], data, batches, refresh, compiled)
                return torch.stack(list(self._loops(blocks[0], data, batches, refresh, compiled)))
        finally:
            self._layout.recover()

    def _loops(
        self, block: Block, data: GeneralisedLinear, batches: Tensor, refresh: bool, compiled: bool
    ) -> Iterator[Tensor]:
        """One after the other; an error says which one it is of."""
        for number, own in enumerate(batches, 1):
            try:
                yield self._loop(block, data, own, refresh, compiled)
            except NonFiniteError as error:
                if number == 1:
                    raise
                raise NonFiniteError(
                    f"Loop {number} of {len(batches)}, after those before it were taken: {error}"
                ) from None

    def _check_loop(self, blocks: Sequence[Block], data: GeneralisedLinear, compiled: bool) -> None:
        """Refuse what no loop does."""
        if len(blocks) != 1:
            raise ValueError(
                f"params: {len(blocks)} blocks of weights; an inner loop has one, so give one parameter (an intercept "
                "is a column of ones in x), or call step(closure)."
            )
        (block,) = blocks
        estimator, instead = block.settings.estimator, "or call step(closure)"
        if block.numel != data.x.shape[1] or block.is_part:
            raise ValueError(
                f"data: {data.x.shape[1]} columns for the {block.numel} weights of {block.name!r}; give one for each."
            )
        if block.device != data.x.device or block.dtype != data.x.dtype:
            raise ValueError(
                f"data: {data.x.dtype} on {data.x.device}, but {block.name!r} is stepped in {block.dtype} on "
                f"{block.device}; convert x and y."
            )
        if compiled and block.device.type != "cpu":
            raise ValueError(f"compiled=True: {block.name!r} is on {block.device}; loops are compiled for CPUs alone.")
        if estimator.needs not in ("gradient", "hessian") or estimator.compares:
            raise ValueError(
                f"curvature={arguments.shown(estimator)}: inner loops measure gradients and whole Hessians alone; take "
                f"curvature='exact' or 'reparam', {instead}."
            )
        refused = {
            "noise": (self.noise, NOISES),
            "max_grad_norm": (self.max_grad_norm, (None,)),
            "anchor": (self._products.kind, ("curvature",)),
            "one_pass": (self.one_pass, (False,)),
        }
        for name, (value, known) in refused.items():
            if value not in known:
                raise ValueError(f"{name}={value!r}: inner loops do {known[0]!r}; make the optimizer so, {instead}.")
        if block.settings.adaptive is not None:
            raise ValueError(f"alpha='adaptive': no meter looks into an inner loop; give a number, {instead}.")

    @plainly
    def _loop(self, block: Block, data: GeneralisedLinear, batches: Tensor, refresh: bool, compiled: bool) -> Tensor:
        record, clock = block.record, self._clock
        begin(block, record, self.correction, in_place=False)
        if refresh:
            self._refresh_from(block, data)
        elif self._follows and len(batches) > 1 and not self._memory_is_of([block]):
            # The first step of all makes a memory that the next ones compare with.
            parts = batches[:1], batches[1:]
            return torch.cat([self._loop(block, data, part, False, compiled) for part in parts])
        first, last = clock["step"] + 1, clock["step"] + len(batches)
        alphas = self._alphas_of(block, first, last)
        self._alphas = {block.name: alphas[-1]}
        asked = self.correction.compares and any(map(any, alphas))
        self._stale.check(asked, last - clock["refreshed"])
        numbers = [_numbers(block, 0, alphas[0])] * len(alphas)
        if block.settings.averages or len(set(alphas)) > 1:
            numbers = [_numbers(block, i, alpha) for i, alpha in enumerate(alphas)]
        weights = Weights(record["posterior"], record["momentum"], record["memory"], prior_of(block))
        kind = _kind(self._trial(block, numbers[0], first), data, asked and self._memory_is_of([block]))
        found = Batches(batches, numbers, self._noises(block, numbers, first))
        moved, losses = self.backend.loop(kind, weights, data.x, data.y, found, compiled=compiled)
        try:
            _check_end(block, moved, losses)
        except NonFiniteError as error:
            self._fell(error, last)
            return losses
        with Uninterrupted():
            record["posterior"], record["momentum"], record["memory"] = moved
            record["step"] = record["step"] + len(batches) if record["momentum"] else 0
            block.at_point, block.drawn = False, None
            if self._follows and not self._memory_is_of([block]):
                clock["memory"] += 1
                record["stamp"] = clock["memory"]
            clock["step"] = last
        self._skips.stepped()
        if first <= PATIENCE <= last:
            check_reach(PATIENCE, [block])
        return losses

    @property
    def _follows(self) -> bool:
        """Whether steps make the memory that later ones compare with."""
        return self.correction.follows_steps and self.correction.compares

    def _trial(self, block: Block, numbers: Numbers, step: int) -> Trial:
        return self._plan(None).at_present(block, block.record, numbers, step, _nothing, Part(0, 1.0, None, False))

    def _alphas_of(self, block: Block, first: int, last: int) -> list[Pair]:
        """α of every step."""
        alpha, clock = block.settings.alpha, self._clock
        if not callable(alpha) and not isinstance(alpha, MegaBatchAlpha):
            return [alpha_at(alpha, first)] * (last - first + 1)
        return [alpha_at(alpha, number, Pace.of(clock, number)) for number in range(first, last + 1)]

    def _noises(self, block: Block, numbers: Sequence[Numbers], first: int) -> list[Tensor]:
        """Every step's noise (K × P), as ordinary steps have it."""
        if self.noise == "zero":
            return [self._trial(block, numbers[0], first).noise()] * len(numbers)
        return [self._trial(block, own, first + i).noise() for i, own in enumerate(numbers)]

    def _refresh_from(self, block: Block, data: GeneralisedLinear) -> None:
        """q_out from all data as one chunk."""
        record, clock, family, correction = block.record, self._clock, block.family, self.correction
        if correction.compares and not correction.refresh_evaluations:
            raise ValueError(f"correction={correction!r}: no refresh makes it; give it one by set_outer(state).")
        numbers, where = _numbers(block, 0, (0.0, 0.0)), (clock["chunk"] + 1, clock["refresh"] + 1)
        trial = self._plan(None).at_mega(block, record, numbers, *where, _nothing, Part(0, 1.0, None, False))
        kind, theta, posterior = _kind(trial, data, False), trial.points(), record["posterior"]
        found = data.measure_all(theta.flatten(1), kind.curvature)
        site = inner_loop.site_of(kind, posterior, trial.noise(), prior_of(block), numbers.ess, theta, found)
        own, mean = fields.map_fields(torch.clone, posterior), fields.map_fields(torch.clone, site)
        memory = correction.after_refresh(family, record["memory"], own, mean, block.settings.averaging(family))
        if not bool(fields.all_finite(tuple(fields.leaves(memory)))):
            raise NonFiniteError(
                f"data: the mean natural gradient of {block.name!r} over all data is infinite or NaN in "
                f"{block.dtype}; check the data, or lower ess. q_out stays as it was."
            )
        with Uninterrupted():
            clock.update(refreshed(clock, 1), mega=1)
            self._meter.refreshed({}, {block.name: family.per_block(*block.settings.rho)})
            record["memory"], record["stamp"], record["in_mega"] = memory, clock["memory"], True


def _nothing() -> None:
    """Where a closure is asked for, which a loop does not have."""


def _numbers(block: Block, later: int, alpha: Pair) -> Numbers:
    """The numbers of a step that comes some steps later than the next."""
    aged: Any = {**block.record, "step": block.record["step"] + later}
    return Round.numbers_of(block, aged, alpha)


def _kind(trial: Trial, data: GeneralisedLinear, corrected: bool) -> Kind:
    settings = trial.block.settings
    return Kind(trial.constants(), data.loss, settings.own_site, -1.0 if settings.maximize else 1.0, corrected)


def _check_end(block: Block, moved: Moved, losses: Tensor) -> None:
    """Refuse the end of a loop that has left the domain or the finite numbers on its way: both stay left."""
    if not bool(torch.isfinite(losses).all()):
        raise NonFiniteError(
            f"lr={block.settings.lr_given}: the loss of a mini-batch in the inner loop is not finite; lower lr. None "
            "of the loop's steps was taken."
        )
    if not bool(block.family.in_domain(moved.state).all()) or not bool(fields.all_finite(moved.momentum or (losses,))):
        raise domain_error(block, moved.state)


def _check_batches(batches: Tensor, data: GeneralisedLinear) -> None:
    arguments.instance("batches", batches, Tensor, "give a tensor of row numbers, M × B or R × M × B")
    whole = batches.dtype in (torch.int32, torch.int64)
    if batches.ndim not in (2, 3) or not batches.numel() or not whole:
        raise ValueError(
            f"batches: {batches.dtype} of shape {tuple(batches.shape)}; give the numbers of rows, M × B (or R × M × B "
            "numbers, torch.int64 or int32)."
        )
    low, high = int(batches.min()), int(batches.max())
    if low < 0 or high >= len(data):
        raise ValueError(f"batches: row {low if low < 0 else high} of {len(data)}; give numbers from 0 to N − 1.")
