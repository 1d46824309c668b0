"""Captured steps of a `PosteriorCorrected`: the device's part is recorded once for each kind of step, and replayed.

The host's part is done at every replay as ever: it looks for writes of others, reads what the groups say, chooses α,
counts. What follows from that for the device goes into the graph's slots (`family.recording`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.closures.evaluate import Closure
from expfam_poco.correction.alpha import Pace
from expfam_poco.engine import fused
from expfam_poco.engine.beginning import prior_of
from expfam_poco.engine.block import Block, Record
from expfam_poco.engine.capture import Captured, CudaGraph, Graph, Recorder, check_captured, loss_elsewhere
from expfam_poco.engine.flat import ROLES, FlatBlock
from expfam_poco.engine.interrupts import Uninterrupted
from expfam_poco.engine.kernels import Numbers, is_flat, unshared
from expfam_poco.engine.layout import Restored, Unit
from expfam_poco.engine.round import Pair, Round
from expfam_poco.engine.step import Sample, Step, clip_factor, hold_together
from expfam_poco.engine.tiles import steps_in_place
from expfam_poco.engine.watch import Unsound
from expfam_poco.engine.width import check_reach
from expfam_poco.errors import NonFiniteError
from expfam_poco.family import fields
from expfam_poco.family.recording import Counter
from expfam_poco.family.transfer import AHEAD, Later
from expfam_poco.optim.base import Shell
from expfam_poco.optim.capturable import Last, constants_of, refuse


class Plan(NamedTuple):
    """What the host knows of the next step.

    Attributes:
        now: its round.
        blocks: that take part.
        alphas: of the units.
        wanted: as `Round.evaluate` has it.
        numbers: of the units.
        sampled: whether the variance meter sees squares, and for every unit whether it sees that.
        kind: steps of one kind differ in numbers alone.
    """

    now: Round
    blocks: Sequence[Block]
    alphas: Sequence[Pair]
    wanted: Sequence[bool] | None
    numbers: Sequence[Numbers]
    sampled: tuple[bool, ...]
    kind: Hashable


class Done(NamedTuple):
    """What a graph's run leaves: tensors that every replay fills, and what tells whose they are."""

    loss: Tensor
    steps: list[Step]
    samples: list[tuple[int, Sample]]
    counts: Tensor
    found: list[tuple[Unsound, slice]]
    units: list[Block]
    state: list[list[Tensor]]
    priors: list[tuple[Block, Any]]


class CapturedStep(Captured):
    """`optimizer.step` of one closure, recorded. Call it with a batch.

    Args:
        optimizer: whose steps these are.
        closure: gives the loss of a batch.
        example: a batch.
        recorder: makes recorders for a device.
    """

    def __init__(
        self,
        optimizer: Shell,
        closure: Callable[..., Any],
        example: Any,
        recorder: Callable[[torch.device], Recorder] = CudaGraph,
    ) -> None:
        device = check_captured(closure, {b.device for b in optimizer._blocks if b.active}, recorder)
        refuse(optimizer)
        self._optimizer = optimizer
        self._last: tuple[Last, Plan, Graph] | None = None
        super().__init__(closure, example, device, recorder)
        before = optimizer._alphas
        with _begun_undone(optimizer), torch.no_grad():
            self._graph_of(self._plan(optimizer._trainable()))
        optimizer._alphas = before

    @torch.no_grad()
    def __call__(self, batch: Any) -> Tensor:
        """One step on this batch.

        Args:
            batch: like the example in all but the values of its tensors.

        Returns:
            the loss, on the device, as `step` does.

        Raises:
            ValueError: for a batch of another shape.
            NonFiniteError: about an earlier step, whose weights have kept their values (with nonfinite="raise").
        """
        optimizer = self._optimizer
        self._batch.take(batch)
        at_weights, optimizer._opt_called = None, True  # so that schedulers do not miss a step
        with _begun_undone(optimizer):
            plan, graph = self._as_before() or self._afresh()
            number, blocks = plan.now.number, plan.blocks
            if number == 1 and optimizer.noise != "zero":
                at_weights = optimizer._width.loss([(self._closure, 1.0)], blocks, optimizer._evaluator)
            graph.numbers.count("step", number)
            with Uninterrupted():
                graph.replay()
                loss: Tensor = graph.result.loss.clone()
                self._follow(graph, plan)
        if at_weights is not None:
            optimizer._width.compare(float(loss), at_weights)
        try:
            for error in optimizer._watch.errors(number if self._device.type in AHEAD else number + 1):
                raise error
        except NonFiniteError as error:
            optimizer._fell(error, number)
        else:
            optimizer._skips.stepped()
            check_reach(number, blocks)
        return loss

    # ---- the host's part -----------------------------------------------------------------------------------

    def _afresh(self) -> tuple[Plan, Graph]:
        """The next step, whatever has happened since the last one, and its graph with all that it is about."""
        optimizer = self._optimizer
        refuse(optimizer)
        blocks = optimizer._trainable()
        plan = self._plan(blocks)
        graph = self._graph_of(plan)
        self._prepare(graph, plan)
        _write(graph, plan)
        # After a step that the meter has seen the next is like the one before that; it sees all where α is adaptive.
        if not any(plan.sampled):
            self._last = Last.of(optimizer, blocks, plan.now.units), plan, graph
        return plan, graph

    def _as_before(self) -> tuple[Plan, Graph] | None:
        """The next step and its graph, if it is like the last one in all but its number (and α): all is in place."""
        optimizer = self._optimizer
        if self._last is None:
            return None
        last, plan, graph = self._last[0].still(optimizer), *self._last[1:]
        if last is None:
            return None
        number = optimizer._clock["step"] + 1
        plan.now.number = number
        if not last.settled:
            alphas, _ = plan.now.alphas(optimizer._meter, Pace.of(optimizer._clock, number), always=False)
            if [any(pair) for pair in alphas] != [any(pair) for pair in plan.alphas]:
                return None
            optimizer._alphas = plan.now.alphas_by_name(alphas)
            plan = plan._replace(alphas=alphas)
        optimizer._stale.check(plan.wanted is not None, number - optimizer._clock["refreshed"])
        if not last.settled:
            before, plan = plan.numbers, plan._replace(numbers=plan.now.numbers(plan.alphas))
            _write(graph, plan)
            self._last = last._replace(settled=last.steady and plan.numbers == before), plan, graph
        return plan, graph

    def _plan(self, blocks: Sequence[Block]) -> Plan:
        """What the next step is."""
        optimizer = self._optimizer
        number = optimizer._clock["step"] + 1
        noise = optimizer._plan(blocks)
        if noise.backend is None and all([_gets_kernels(block, optimizer) for block in blocks]):
            noise = noise._replace(backend=optimizer.backend)
        now = Round(optimizer._layout, blocks, noise, number, optimizer._rehearsal)
        alphas, wanted = optimizer._choices(now, blocks)
        meter = optimizer._meter
        adaptive = [block.settings.adaptive is not None for block, _ in now.units]
        sampled = (meter.samples(number), *[meter.samples(number, own) for own in adaptive])
        members = [member for block, _ in now.units for member in block.members]
        kind = (
            noise, sampled, None if wanted is None else (*wanted, *map(any, alphas)),
            *[block for block, _ in now.units],
            *[len(fields.leaves(record[role])) for _, record in now.units for role in ROLES],  # type: ignore[literal-required]
            *[constants_of(block.settings) for block, _ in now.units],
            *[p.data_ptr() for member in members for p in member.params],
            optimizer.max_grad_norm,
            None if wanted is None else tuple(member.record["in_mega"] for member in members),
        )  # fmt: skip
        return Plan(now, blocks, alphas, wanted, now.numbers(alphas), sampled, kind)

    def _prepare(self, graph: Graph, plan: Plan) -> None:
        """Let the graph find this step's state, priors and q_out."""
        done: Done = graph.result
        for unit, places in zip(plan.now.units, done.state, strict=True):
            _bring(unit, places)
        for block, prior in done.priors:
            present = prior_of(block)
            if present is not prior:
                for place, value in zip(prior, present, strict=True):
                    place.copy_(value)
                assert block.known_prior is not None
                block.known_prior = block.known_prior[0], prior
        graph.numbers.count("refresh", self._optimizer._clock["refresh"])

    def _follow(self, graph: Graph, plan: Plan) -> None:
        """Count a step that a replay has made, as the ordinary one does."""
        optimizer, done, number = self._optimizer, graph.result, plan.now.number
        torch.autograd.graph.increment_version([p for block in plan.blocks for p in block.params])
        for step in done.steps:
            step.count()
        for block in plan.blocks:
            block.at_point, block.drawn = True, None
            block.note_weights()
        for block, _ in plan.now.units:
            block.at_point, block.drawn = True, None
        for step in done.steps:
            if isinstance(step.block, FlatBlock):
                step.block.settle()
        if optimizer.correction.follows_steps and optimizer.correction.compares:
            optimizer._stamp(done.steps)
        optimizer._clock["step"] = number
        for unit, sample in done.samples:
            sample.show(optimizer._meter, number, plan.numbers[unit].alpha)
        if done.found:
            counts = Later(done.counts)
            found = [_Found(own, counts, place) for own, place in done.found]
            optimizer._watch.wait(number, found, _Totals(found))

    # ---- the device's part ---------------------------------------------------------------------------------

    def _graph_of(self, plan: Plan) -> Graph:
        """The graph of this kind of step; those of blocks that are laid otherwise by now are forgotten."""
        if plan.kind not in self._graphs:
            present = [block for block, _ in plan.now.units]
            kept = {k: g for k, g in self._graphs.items() if g.result.units == present}
            self._graphs = kept
        return self._graph(plan.kind, lambda: self._run(plan), lambda: _undone(self._optimizer, plan, self._closure))

    def _run(self, plan: Plan) -> Done:
        """A step, less what the host does besides: what `PosteriorCorrected.step` does with the same functions."""
        optimizer, now = self._optimizer, plan.now
        number, most = now.number, optimizer.max_grad_norm
        refresh: Any = Counter(optimizer._clock["refresh"], "refresh")
        now.number = Counter(number, "step")
        try:
            with Restored(optimizer._layout, plan.blocks, []), optimizer._evaluator.undone_on_error(watched=True):
                parts: list[tuple[Closure, float]] = [(self._closure, 1.0)]
                loss, steps = now.evaluate(parts, optimizer._evaluator, plan.alphas, plan.wanted, refresh, False)
                factor = clip_factor(steps, most) if most is not None and steps else 1.0
                for step in steps:
                    step.prepare(factor)
                hold_together(steps)
                samples = self._samples(plan, steps)
                for step in steps:
                    step.apply()
                    if isinstance(step.block, FlatBlock):
                        step.block.settle()  # the members hold the point, where the block does
        finally:
            now.number = number
        if loss.device.type != self._device.type:
            raise TypeError(loss_elsewhere(loss, self._device))
        own = [step.unsound for step in steps if step.unsound is not None]
        flat = [unsound.counts.reshape(-1) for unsound in own]
        ends = [sum(map(len, flat[: i + 1])) for i in range(len(flat))]
        found = [(u, slice(end - len(c), end)) for u, c, end in zip(own, flat, ends, strict=True)]
        counts = torch.cat(flat) if flat else torch.zeros(0)
        state = [_leaves(record) for _, record in now.units]
        known = {member for block, _ in now.units for member in (block, *block.members)}
        priors = [(b, b.known_prior[1]) for b in known if b.known_prior is not None and prior_of(b) is b.known_prior[1]]
        return Done(loss, steps, samples, counts, found, [block for block, _ in now.units], state, priors)

    @staticmethod
    def _samples(plan: Plan, steps: Sequence[Step]) -> list[tuple[int, Sample]]:
        units = {id(own): i for i, (block, _) in enumerate(plan.now.units) for own in (block, *block.members)}
        squared, *sampled = plan.sampled
        pairs = [(units[id(step.block)], step) for step in steps]
        return [(i, step.sample(squared=squared)) for i, step in pairs if sampled[i]]


def _write(graph: Graph, plan: Plan) -> None:
    """Let a graph have the numbers of a step."""
    for i, own in enumerate(plan.numbers):
        graph.numbers.write(f"unit {i}", own.known())


class _Found(NamedTuple):
    """Unsound weights whose counts are on their way to the host."""

    unsound: Unsound
    counts: Later
    place: slice

    def error(self, late: str) -> NonFiniteError:
        """As of `Unsound`."""
        return self.unsound._replace(counts=torch.tensor(self.counts.read()[self.place])).error(late)


class _Totals(NamedTuple):
    """How many weights were unsound, for each that was found."""

    found: list[_Found]

    def read(self) -> list[int]:
        """The numbers, as the host's."""
        return [sum(own.counts.read()[own.place]) for own in self.found]


def _leaves(record: Record) -> list[Tensor]:
    return [leaf for role in ROLES for leaf in fields.leaves(record[role])]  # type: ignore[literal-required]


def _bring(unit: Unit, places: Sequence[Tensor]) -> None:
    """Let a unit's state lie where a graph has it, if somebody has put other tensors in its place."""
    block, record = unit
    present = _leaves(record)
    if all([value is place for value, place in zip(present, places, strict=True)]):
        return
    for place, value in zip(places, unshared(places, present), strict=True):
        if value is not place:
            place.copy_(value)
    rest = iter(places)
    for role in ROLES:
        record[role] = fields.map_leaves(lambda _: next(rest), record[role])  # type: ignore[literal-required]
    if isinstance(block, FlatBlock):
        block.give()


def _gets_kernels(block: Block, optimizer: Shell) -> bool:
    """Whether each pass over the block is one kernel, which is what a graph of few launches needs."""
    fuses = optimizer.backend.mode == "compiled" and fused.is_at_hand(block.device)
    return fuses and is_flat(block.family) and steps_in_place(block)


@contextmanager
def _undone(optimizer: Shell, plan: Plan, closure: Closure) -> Iterator[None]:
    """Run a block after which state, weights, buffers and generators are what they were."""
    params = [p for block in plan.blocks for p in block.params]
    tensors = [*[leaf for _, record in plan.now.units for leaf in _leaves(record)], *[p.detach() for p in params]]
    copies = [value.clone() for value in tensors]
    blocks = [*plan.blocks, *[block for block, _ in plan.now.units]]
    flags = [(block.at_point, block.drawn) for block in blocks]
    with optimizer._evaluator.undone(params, [closure]):
        try:
            yield
        finally:
            for value, copy in zip(tensors, copies, strict=True):
                value.copy_(copy)
            for block, known in zip(blocks, flags, strict=True):
                block.at_point, block.drawn = known
                block.note_weights()


@contextmanager
def _begun_undone(optimizer: Shell) -> Iterator[None]:
    """If the block raises, posteriors that have begun in it have not."""
    try:
        yield
    except BaseException as error:
        if not getattr(error, "stepped", False):
            for begun in optimizer._begun:
                begun.undo()
        raise
    finally:
        optimizer._begun.clear()


class Capturing(Shell):
    """What a `PosteriorCorrected` does in graphs; mixed into it."""

    def captured(self, closure: Callable[..., Any], example_batch: Any) -> CapturedStep:
        """Steps as CUDA graphs, for small models on a GPU, where launches cost more than what they ask for.

        `run = optimizer.captured(closure, batch)` records evaluation (or the pair), correction and update; `run(batch)`
        copies a batch to where the recorded ones are, sends rates, α and the counters of noise along, and replays. The
        numbers are those of `step` up to rounding. Rates, schedules, `ess` and `weight_decay` may change; so may all
        else, for which another graph is recorded when it comes up, as for the first corrected step after a refresh.
        `refresh`, `step`, checkpoints and questions may come in between.

        Args:
            closure: closure(*batch) of a tuple or list, closure(batch) of anything else, returns the mean loss. What
                Python decides inside of it is decided once; values may not be looked at.
            example_batch: tensors (or tuples, lists and dictionaries of them) of the shapes and dtypes to come.

        Returns:
            a function of a batch, which returns the loss as a tensor on the device.

        Raises:
            TypeError, ValueError: for what no graph can be made of; the sentence says why.
            RuntimeError: if the closure cannot be captured. Nothing has changed in any case.

        Example:
            >>> import torch, expfam_poco as poco
            >>> model = torch.nn.Linear(3, 1)
            >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=64.0)
            >>> closure = lambda x, y: torch.nn.functional.mse_loss(model(x), y)
            >>> opt.captured(closure, (torch.randn(8, 3), torch.randn(8, 1)))
            Traceback (most recent call last):
                ...
            ValueError: params: they are on cpu, which has no CUDA graphs; call step(closure).
        """
        self._require_one_process("captured")
        return CapturedStep(self, closure, example_batch)
