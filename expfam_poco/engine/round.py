"""One round of evaluations, a step's or a refresh's: trials of all blocks at one or two posteriors, and their steps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expfam_poco.closures.evaluate import Closure, unused_error
from expfam_poco.closures.processes import Processes
from expfam_poco.correction.alpha import Pace
from expfam_poco.correction.paired_variance import DrawMoments
from expfam_poco.correction.snapshot import alpha_at
from expfam_poco.correction.variance import VarianceMeter
from expfam_poco.engine.backend import Backend, plainly
from expfam_poco.engine.block import Block, Record
from expfam_poco.engine.evaluator import Evaluator
from expfam_poco.engine.flat import FlatBlock
from expfam_poco.engine.kernels import Numbers
from expfam_poco.engine.layout import Layout, Unit
from expfam_poco.engine.noise_plan import NoisePlan, Part
from expfam_poco.engine.rehearsal import Rehearsal
from expfam_poco.engine.rows import Selection, selected
from expfam_poco.engine.step import METER_WEIGHTS, Step, age_of
from expfam_poco.engine.tiles import steps_in_place
from expfam_poco.engine.trial import Trial
from expfam_poco.family import fields, recording
from expfam_poco.family.draws import Estimator
from expfam_poco.family.noise import NoiseKey
from expfam_poco.rule import blr

Pair = tuple[float, float]


class Round:
    """The blocks of a step or refresh, and what is tried with them.

    Args:
        layout: of the optimizer's blocks.
        blocks: that take part.
        plan: where noise comes from.
        number: of the step.
        rehearsal: compiles what is missing.
        apart: every block by itself.
    """

    def __init__(
        self,
        layout: Layout,
        blocks: Sequence[Block],
        plan: NoisePlan,
        number: int,
        rehearsal: Rehearsal,
        *,
        apart: bool = False,
    ) -> None:
        self.plan, self.number, self._rehearsal = plan, number, rehearsal
        in_place = plan.backend is not None
        self.units: list[Unit] = layout.units(blocks, plan.correction, in_place=in_place, apart=apart)

    # ---- α -----------------------------------------------------------------------------------------------

    def alphas(self, meter: VarianceMeter, pace: Pace, *, always: bool) -> tuple[list[Pair], list[bool]]:
        """Every unit's α (gradient, curvature) at this step, and whether its pair is to be measured anyway."""
        adaptive = [block.name for block, _ in self.units if block.settings.adaptive is not None]
        alphas, wanted, known = [], [], dict[int, Pair]()
        for block, _ in self.units:
            settings, want = block.settings, always
            if settings.adaptive is not None:
                pair = meter.alpha(block.name, block.family.momentum_block, settings.adaptive, max(1, pace.steps))
                want = always or meter.probes(self.number, adaptive, settings.adaptive)
            else:
                if id(settings) not in known:
                    known[id(settings)] = alpha_at(settings.alpha, self.number, pace)
                pair = known[id(settings)]
            alphas.append(pair)
            wanted.append(want)
        return alphas, wanted

    def alphas_by_name(self, alphas: Sequence[Pair]) -> dict[str, Pair]:
        """The αs of all blocks, by their names."""
        pairs = zip(self.units, alphas, strict=True)
        return {member.name: pair for (block, _), pair in pairs for member in block.members}

    # ---- a step ------------------------------------------------------------------------------------------

    def evaluate(
        self,
        parts: Sequence[tuple[Closure, float]],
        evaluator: Evaluator,
        alphas: Sequence[Pair],
        wanted: Sequence[bool] | None,
        refresh: int,
        always: bool,
    ) -> tuple[Tensor, list[Step]]:
        """The mean loss, and a step for every unit that the batch or its correction moves.

        Args:
            parts: closures, and their shares of the batch.
            evaluator: of closures.
            alphas: of the units.
            wanted: whether units' pairs are measured even where α is 0; None: there is no second evaluation.
            refresh: the number of the last one.
            always: make steps also of what the batch does not use.

        Raises:
            ValueError: if the batch depends on none of the blocks.
        """
        record = recording.active
        if record is None:
            self._rehearsal.of(self.units, self.plan, plain=wanted is None)
        first: list[Trial] = []
        second: list[Trial] | None = None
        rows = [selected(parts, *unit) for unit in self.units]
        if evaluator.processes is not None and any(chosen is not None for chosen in rows):
            raise ValueError("rows: processes would name different ones; step local parameters in one process.")
        numbers = self.numbers(alphas, rows)
        if record is not None:
            numbers = [own.placed(record, f"unit {i}") for i, own in enumerate(numbers)]
        total: Tensor | None = None
        own = evaluator.processes if evaluator.processes is not None and evaluator.processes.own_noise else None
        products, several = None, len(parts) > 1 or own is not None
        begin = 0 if own is None else own.rank * len(parts)
        with contextlib.nullcontext() if own is None else own.failing_together():
            for index, (closure, share) in enumerate(parts, begin):
                first = self._at_present(closure, Part(index, share, None, several), numbers, first, rows)
                if wanted is not None:
                    second = self._at_reference(first, Part(index, share, None, several), refresh, second)
                loss, found = evaluator.evaluate(closure, first, second)
                part = share * loss if several else loss
                total = part if total is None else total + part
                products = evaluator.products.add_products(products, found, share)
        if own is not None:
            total = averaged(own, own.weight, total, *([first] if second is None else [first, second]))
        if total is None or not any([any(trial.used) for trial in first]):
            raise unused_error()
        steps: list[Step] = []
        for i, (alpha, trial) in enumerate(zip(alphas, first, strict=True)):
            compared = second is not None and wanted is not None and (any(alpha) or wanted[i])
            pair = second[i] if second is not None and compared else None
            anchor = None
            if products is not None:
                weight = alpha[1] * trial.block.settings.anchor_weight
                anchor = evaluator.products.term(trial.block, products[i], weight)
            steps += self._steps_of(self.units[i], trial, pair, any(alpha), anchor, always)
        return total, steps

    def _at_present(
        self,
        closure: Closure,
        part: Part,
        numbers: Sequence[Numbers],
        before: Sequence[Trial],
        rows: Sequence[Selection | None],
    ) -> list[Trial]:
        made = []
        for i, (block, record) in enumerate(self.units):
            place = part._replace(before=before[i]) if before else part
            made.append(self.plan.at_present(block, record, numbers[i], self.number, closure, place))
            made[-1].rows = rows[i]
        return made

    def _at_reference(
        self, first: Sequence[Trial], part: Part, refresh: int, before: Sequence[Trial] | None
    ) -> list[Trial]:
        made = []
        for i, (trial, (_, record)) in enumerate(zip(first, self.units, strict=True)):
            place = part._replace(before=before[i]) if before else part
            state = self.plan.correction.reference(record["memory"])
            made.append(self.plan.at_reference(trial, state, self.number, refresh, place))
        return made

    def _steps_of(
        self, unit: Unit, first: Trial, second: Trial | None, corrected: bool, anchor: Any, always: bool
    ) -> list[Step]:
        """A unit's step; one for each member that moves, where not all members of a flat block do."""
        block, record = unit
        moving = _used(first)
        if second is not None and not all(moving):
            parts = zip(moving, _used(second), block.members, strict=True)
            moving = [always or a or (corrected and (b or m.record["in_mega"])) for a, b, m in parts]
        if all(moving):
            return [Step(record, first, second, anchor)]
        if not isinstance(block, FlatBlock) or not any(moving):
            return []
        records = [member.record for member in block.members]
        firsts = first.apart(records, [own["posterior"] for own in records])
        seconds: Sequence[Trial | None] = [None] * len(firsts)
        if second is not None:
            references = [self.plan.correction.reference(own["memory"]) for own in records]
            seconds = second.apart(records, references)
        rows = zip(moving, records, firsts, seconds, strict=True)
        return [Step(own, one, other) for moved, own, one, other in rows if moved]

    def numbers(self, alphas: Sequence[Pair], rows: Sequence[Selection | None] | None = None) -> list[Numbers]:
        """The units' numbers at this step, with their αs (and, of local parameters, the rows that are used)."""
        triples = zip(self.units, alphas, rows or [None] * len(alphas), strict=True)
        return [self.numbers_of(*unit, alpha, chosen) for unit, alpha, chosen in triples]

    @staticmethod
    def numbers_of(block: Block, record: Record, alpha: Pair, rows: Selection | None = None) -> Numbers:
        """A block's numbers at the step after those that its record has seen."""
        settings, family = block.settings, block.family
        age: Any = age_of(block, record)
        if rows is not None and settings.averages:
            age = rows.ages.to(block.dtype)
        unbias = blr.unbias_of(settings.momentum, age, settings.debias)
        squares = settings.square_momentum or 0.0
        return Numbers(
            settings.rates(family),
            family.per_block(*alpha),
            settings.ess,
            settings.momentum,
            unbias,
            settings.share(age),
            squares,
            blr.unbias_of(squares, age, True),
            1.0,
        )

    # ---- a refresh ---------------------------------------------------------------------------------------

    def evaluate_chunks(
        self, chunks: Sequence[tuple[Closure, float]], evaluator: Evaluator, refresh: int, number: int
    ) -> tuple[Tensor, list[Trial]]:
        """The mega-batch's mean loss, and the units' trials with the mean natural gradient of all chunks.

        Args:
            chunks: closures, and their shares of the mega-batch.
            evaluator: of closures.
            refresh: this one's number.
            number: of its first chunk.
        """
        self._rehearsal.of(self.units, self.plan, plain=False)
        trials: list[Trial] = []
        losses = []
        numbers = [self.numbers_of(*unit, (0.0, 0.0)) for unit in self.units]
        processes = None if evaluator.spread is not None else evaluator.processes
        with contextlib.nullcontext() if processes is None else processes.failing_together():
            for chunk, (closure, share) in enumerate(chunks, number):
                now = []
                for i, (block, record) in enumerate(self.units):
                    part = Part(0, share, trials[i] if trials else None)
                    now.append(self.plan.at_mega(block, record, numbers[i], chunk, refresh, closure, part))
                trials = now
                losses.append(share * evaluator.evaluate_chunk(closure, trials, share))
        loss = torch.stack(losses).sum()
        return loss if processes is None else averaged(processes, processes.weight, loss, trials), trials

    def evaluate_mega(
        self,
        chunks: Sequence[tuple[Closure, float]],
        evaluator: Evaluator,
        refresh: int,
        number: int,
        draws: int,
        count: int,
    ) -> tuple[Tensor, list[Trial], dict[str, dict[str, float]]]:
        """`evaluate_chunks` with several draws, and by block and field the variance of their mean, summed over weights.

        Args:
            chunks: closures, and their shares of the mega-batch.
            evaluator: of closures.
            refresh: this one's number.
            number: of its first chunk.
            draws: how many evaluations of all of it are averaged; of one nothing is known of its variance.
            count: by how much chunk numbers differ from draw to draw.
        """
        loss, trials = self.evaluate_chunks(chunks, evaluator, refresh, number)
        if draws == 1:
            return loss, trials, {}
        moments = [DrawMoments(trial.settled()) for trial in trials]
        used = [list(trial.used) for trial in trials]
        for draw in range(1, draws):
            more, trials = self.evaluate_chunks(chunks, evaluator, refresh, number + draw * count)
            loss = loss + more
            for own, flags, trial in zip(moments, used, trials, strict=True):
                own.add(trial.settled())
                flags[:] = [a or b for a, b in zip(flags, trial.used, strict=True)]
        errors = {}
        for own, flags, trial in zip(moments, used, trials, strict=True):
            trial.settle_for(own.mean(), flags)
            share = min(1.0, METER_WEIGHTS / trial.block.whole) if trial.in_place else 1.0  # those that the meter sees
            errors[trial.block.name] = {name: share * value for name, value in own.variance().items()}
        return loss / draws, trials, errors

    def keep(self, memories: Sequence[Any], trials: Sequence[Trial], stamp: int) -> None:
        """Make the memories the blocks'; all of them belong together from now on."""
        for (block, record), memory, trial in zip(self.units, memories, trials, strict=True):
            record["memory"], record["stamp"] = memory, stamp
            if isinstance(block, FlatBlock):
                block.give()
                block.settle()
            for member, used in zip(block.members, _used(trial), strict=True):
                member.record["in_mega"] = used


def averaged(processes: Processes, weight: float, loss: Tensor | None, *sides: Sequence[Trial]) -> Tensor:
    """Average over processes what trials have made of their parts, each counting `weight`; the mean loss."""
    trials = [trial for side in sides for trial in side]
    used = [float(own) for trial in trials for own in trial.used]
    value = 0.0 if loss is None else float(loss)
    total, loss_sum, *counts = processes.totals([weight, weight * value, *used])
    sites = [trial.settled() for trial in trials]
    values = iter(processes.sums(fields.leaves(tuple(map(tuple, sites))), weight / total))
    flags = iter(counts)
    for trial, site in zip(trials, sites, strict=True):
        mean = fields.map_leaves(lambda own: next(values).to(own.dtype), site)
        trial.settle_for(mean, [next(flags) > 0.0 for _ in trial.used])
    return torch.tensor(loss_sum / total, dtype=torch.get_default_dtype() if loss is None else loss.dtype)


def _used(trial: Trial) -> list[bool]:
    """For every member of a trial's block, whether an evaluation depended on it."""
    return trial.used if isinstance(trial.block, FlatBlock) else [any(trial.used)]


@plainly
def holds_draw(block: Block, record: Record, plan: NoisePlan, backend: Backend) -> bool:
    """Whether the model holds, up to rounding, the draw that a step left there (it may come from a checkpoint)."""
    key, block.drawn = block.drawn, None
    if key is None or not steps_in_place(block):
        return False
    (p,) = block.tensors
    trial = _sampling(block, record["posterior"], block.settings.estimator, plan, key, backend)
    constants, present = trial.constants(), p.detach()
    for tile in trial.tiles():
        drawn = torch.empty(tile.shape, dtype=p.dtype, device=p.device)
        source = trial.source(tile, constants, 0)
        backend.draw(constants.on(tile), drawn, block.dtype, tile.cut(trial.state), None, trial.numbers, source)
        if not torch.allclose(drawn, tile.cut(present), rtol=1e-4, atol=1e-6):
            return False
    return True


def draw_into(block: Block, state: Any, estimator: Estimator, plan: NoisePlan, key: NoiseKey) -> None:
    """Put a sample of q into the model."""
    backend = plan.backend if steps_in_place(block) else None
    _sampling(block, state, estimator, plan._replace(mode="shared"), key, backend).write(0)


def _sampling(
    block: Block, state: Any, estimator: Estimator, plan: NoisePlan, key: NoiseKey, backend: Backend | None
) -> Trial:
    """A trial of which nothing but the draw is wanted."""
    site = block.family.per_block(0.0, 0.0)
    numbers = Numbers(site, site, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0)
    return Trial(block, estimator, plan.correction, state, None, numbers, key, key, plan.mode, 1, backend)
