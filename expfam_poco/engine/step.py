"""One block's step from what was measured at the present and the reference posterior: whole, or tile by tile in place.

A block that fits into memory twice is one tile, computed before anything changes. A large one is stepped tile by tile,
in place; that cannot be undone, so weights whose step would not be finite keep their values, and the error comes after.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.closures.processes import Processes
from expfam_poco.correction import snapshot
from expfam_poco.correction.base import Corrected, Correction
from expfam_poco.correction.variance import VarianceMeter
from expfam_poco.engine import kernels, passes
from expfam_poco.engine import spread as spread_over
from expfam_poco.engine.backend import plainly, tile_size
from expfam_poco.engine.beginning import prior_of
from expfam_poco.engine.block import Block, Record, singular_error
from expfam_poco.engine.flat import ROLES, FlatBlock
from expfam_poco.engine.fused import Places
from expfam_poco.engine.kernels import Weights
from expfam_poco.engine.tiles import TILE, spread, tiles
from expfam_poco.engine.trial import Trial, empty_site
from expfam_poco.engine.watch import Unsound
from expfam_poco.errors import NonFiniteError
from expfam_poco.family import fields, recording
from expfam_poco.family.noise import NoiseKey
from expfam_poco.family.transfer import is_ahead, read_now
from expfam_poco.rule import blr

METER_WEIGHTS = 2**12  # of each large block; the meter's ratios need no more


class Sample(NamedTuple):
    """What the variance meter sees of a step, as tensors: terms of every field and a square, of some of the weights."""

    block: Block
    terms: Any
    square: Tensor | None
    scale: float

    def show(self, meter: VarianceMeter | spread_over.PartsMeter, number: int, alpha: Any) -> None:
        """Show it to the meter, as of step `number` with this α of every field."""
        adaptive = self.block.settings.adaptive
        if self.terms is not None:
            meter.add(self.block.name, self.terms, alpha, None if adaptive is None else adaptive.keep)
        if self.square is not None:
            meter.add_square(number, self.block.name, self.square, self.scale)


class Step:
    """One block's step: nothing changes before `commit`.

    Attributes:
        begun: whether `commit` has changed anything.
        unsound: after a step in place, how many weights have kept their values, as their new ones were not finite.

    Args:
        record: the block's.
        first: what was measured at the present posterior.
        second: what was measured at the reference, or None for a plain step.
        anchor: the anchor term, where it comes from Hessian-vector products.
    """

    unsound: Unsound | None = None
    begun = False

    def __init__(self, record: Record, first: Trial, second: Trial | None, anchor: Any = None) -> None:
        self.block, self.record, self.first, self.second, self.anchor = first.block, record, first, second, anchor
        self.age = age_of(self.block, record)
        self.constants = first.constants()
        self.numbers = first.numbers

    @property
    def share(self) -> float:
        """What sums over the block count in sums over processes."""
        return self.block.members[0].share

    @plainly
    def gradient_square(self) -> Tensor:
        """‖corrected gradient‖² of the momentum block."""
        if self.first.fused:
            squares = self.first.run_fused(passes.squared, [], *self._measured_apart(), self.numbers)
            if squares is not None:
                total: Tensor = squares.sum()
                return total
        values = []
        for tile, weights, first, second in self._measured():
            arguments = (weights, first, second, self.numbers, self._real(tile))
            values.append(self.first.runner.square(self.constants.on(tile), self.first.like(tile), *arguments))
        return torch.stack(values).sum()

    @plainly
    def prepare(self, factor: float | Tensor, following: NoiseKey | None = None) -> None:
        """Compute the new posterior of a block that is one tile, with the gradient times `factor`.

        Args:
            factor: of clipping by norm.
            following: the key of the draw to leave in a large model, if any.

        Raises:
            NonFiniteError, ValueError: if it is not finite or not in the domain.
        """
        self.numbers, self.following = self.numbers._replace(factor=factor), following
        if self.first.in_place:
            return
        ((tile, weights, first, second),) = self._measured()
        like = self.first.like(tile)
        self.moved = kernels.advance(self.constants, weights, first, second, self.numbers, like, self.anchor)
        if self.first.rows is not None:
            self.moved = self.first.rows.kept(self.moved, kernels.Moved(*weights[:3]))
        family = self.block.family
        sound = family.in_domain(self.moved.state) if family.joint else kernels.sound(self.constants, self.moved, like)
        if self.first.watched and sound is not None:
            self.unsound = Unsound(self.block, self._counts(sound), TILE, self.block.settings.lr_given, together=True)
        elif sound is not None and not bool(sound.all()):
            self.moved = self._with_sound_gaps(like)

    def _counts(self, sound: Tensor) -> Tensor:
        """How many weights are not sound, or for which something that was measured is not finite."""
        block = self.block
        for trial in (self.first,) if self.second is None else (self.first, self.second):
            spoils = torch.isfinite(trial.spoils())
            sound = sound & (spoils if sound.shape == spoils.shape else spoils.flatten(sound.ndim).all(-1))
        return (block.real & ~sound).view(-1, TILE).sum(1) if isinstance(block, FlatBlock) else (~sound).sum()

    def hold(self, sound: Tensor) -> None:
        """Let the new posterior of a whole block be the old one unless all is `sound`; gaps do not move."""
        record, real = self.record, self.block.real if isinstance(self.block, FlatBlock) else None

        def kept(old: Tensor, new: Tensor) -> Tensor:
            flag = sound if real is None or not new.ndim else sound & real
            return old if new is old else torch.where(flag, new, old)

        before = record["posterior"], record["momentum"], record["memory"]
        self.moved = kernels.Moved(*fields.map_leaves(kept, before, tuple(self.moved)))

    def _with_sound_gaps(self, like: Tensor) -> kernels.Moved:
        """The new posterior of a flat block in which nothing but gaps has left the domain; else the error."""
        flat = self.block
        if not isinstance(flat, FlatBlock):
            raise domain_error(flat, self.moved.state)
        sound = kernels.sound(self.constants, self.moved, like)
        wrong = [] if sound is None else flat.unsound_members(sound)
        if wrong:
            number = flat.members.index(wrong[0])
            raise domain_error(wrong[0], flat.cut(self.moved.state, number))
        healed = fields.map_leaves(lambda v: torch.where(flat.real, v, v[0]) if v.ndim else v, tuple(self.moved))
        return kernels.Moved(*healed)

    def commit(self) -> None:
        """Make the new posterior the block's; in place, the model then holds its point or the next draw."""
        record = self.record
        try:
            self.apply()
        finally:
            if self.begun:
                record["step"] = self.age if record["momentum"] else 0
                rows = self.first.rows
                record["ages"] = rows.ages_after() if rows is not None and record["momentum"] else None

    def count(self) -> None:
        """Let the record be a step older, where a replay has made it."""
        record = self.block.record
        record["step"] = age_of(self.block, record) if record["momentum"] else 0

    def apply(self) -> None:
        """`commit`, less what the record says of its age: of a step that is recorded, all that the device does."""
        block = self.block
        if self.first.in_place:
            self._advance_in_place()
            block.at_point, block.drawn = self.following is None, self.following
        else:
            self._replace(self.moved)
            block.at_point, block.drawn = False, None
            self.begun = True

    def _replace(self, moved: kernels.Moved) -> None:
        """Keep a whole block's new values; a flat one's, and those that are recorded, where the old ones are."""
        record = self.record
        if not isinstance(self.block, FlatBlock) and recording.active is None:
            record["posterior"], record["momentum"], record["memory"] = moved
            return
        known = record["posterior"], record["momentum"], record["memory"]
        changed = [pair for pair in zip(known, moved, strict=True) if pair[0] is not pair[1]]
        old = fields.leaves([before for before, _ in changed])
        new = kernels.unshared(old, fields.leaves([after for _, after in changed]))
        pairs = [(place, value) for place, value in zip(old, new, strict=True) if place.ndim and value is not place]
        torch._foreach_copy_([place for place, _ in pairs], [value for _, value in pairs])

    def _advance_fused(self) -> bool:
        """Step the block by one kernel, if there is one."""
        record, block = self.record, self.block
        with block.rewritten_apart() as out:
            targets: list[Any] = [
                Places(out, out[0].dtype),
                *fields.leaves((record["posterior"], record["momentum"], record["memory"])),
            ]
            arguments = *self._measured_apart(), self.numbers, self.following
            counts = self.first.run_fused(passes.advanced, targets, *arguments)
        if counts is not None:
            self.unsound, self.begun = Unsound(block, counts, block.programs.each, block.settings.lr_given), True
        return counts is not None

    def _advance_in_place(self) -> None:
        if self.first.fused and self._advance_fused():
            return
        block = self.block
        real = block.real if isinstance(block, FlatBlock) else None
        following = None if self.following is None else replace(self.first, key=self.following)
        unsound = []
        with block.rewritten() as out:
            for tile, weights, first, second in self._measured():
                after = None if following is None else following.source(tile, self.constants, 0)
                arguments = (weights, first, second, self.numbers, real, after)
                own = self.constants.on(tile)
                unsound.append(self.first.runner.advance(own, tile.cut(out), block.dtype, *arguments))
                self.begun = True
        counts = unsound[0] if len(unsound) == 1 else torch.stack(unsound).sum()
        self.unsound = Unsound(block, counts, TILE, block.settings.lr_given)

    def meter(self, meter: VarianceMeter | spread_over.PartsMeter, number: int) -> None:
        """Show the meter the weights, of large blocks some; an adaptive α looks at every pair."""
        if meter.samples(number, self.block.settings.adaptive is not None):
            self.sample(squared=meter.samples(number)).show(meter, number, self.numbers.alpha)

    @plainly
    def sample(self, *, squared: bool) -> Sample:
        """What the variance meter sees of this step; with `squared` also ‖corrected gradient‖²."""
        family, only, share = self.block.family, None, self.share
        if self.first.in_place:
            only, share = self._looked_at()
            family = only.of(family)
        ((like, weights, *pair, found),) = self._sites(only)
        real, correction, memory = self._real(only), self.constants.correction, weights.memory
        mean = None if pair[1] is None else correction.mean(memory)
        terms = square = None
        if mean is not None:
            outer = snapshot.Outer(correction.reference(memory), mean)
            there, outer = snapshot.carried(family, pair[1], outer, weights.state)
            own, there, mean = (kernels.without_gaps(site, real) for site in (pair[0], there, outer.site))
            terms = snapshot.variance_terms(own, there, outer._replace(site=mean))
            if share != 1.0:
                terms = fields.map_leaves(lambda value: value * share, terms)
        if squared:
            site = kernels.without_gaps(found.site, real)
            square = blr.square_of([getattr(site, name) for name in family.momentum_block])
        return Sample(self.block, terms, square, self.share * self.block.shape.numel() / max(1, like.numel()))

    def _looked_at(self) -> tuple[Any, float]:
        """In place: the tile that the meter sees, and what it counts; of a part, what is in the first of the whole."""
        shard, most = self.block.shard, METER_WEIGHTS
        if shard is not None:
            most -= self.block.offset // self.block.shape[len(self.block.batch) :].numel()
        tile = next(tiles(self.block, METER_WEIGHTS, most=max(most, 1)))
        return tile, self.share if most > 0 else 0.0

    def _real(self, tile: Any) -> Tensor | None:
        """Which entries of a flat block's tile are weights."""
        if not isinstance(self.block, FlatBlock):
            return None
        return self.block.real if tile is None else tile.cut(self.block.real)

    def gradients(self) -> list[Tensor]:
        """The corrected natural gradient of a family with one field, one tensor for each parameter."""
        if not self.first.in_place:
            ((*_, found),) = self._sites()
            return self.block.split(found.site[0])
        out = torch.empty(self.block.shape, dtype=self.block.dtype, device=self.block.device)
        for tile, (*_, found) in zip(self.first.tiles(), self._sites(), strict=True):
            tile.cut(out).copy_(found.site[0])
        return self.block.split(out)

    def sites(self) -> Iterator[tuple[Any, Any, Corrected]]:
        """Tile by tile: the site at λ̃, the one at λ_ref, and the corrected one with its anchor term."""
        yield from ((first, second, found) for *_, first, second, found in self._sites())

    def _sites(self, only: Any = None) -> Iterator[tuple[Any, ...]]:
        for tile, weights, first, second in self._measured(only):
            like, own = self.first.like(tile), self.constants.on(tile)
            pair = kernels.site_pair(own, weights, first, second, self.numbers, like)
            found = kernels.corrected(own, weights, *pair, self.numbers, like, self.anchor)
            yield like, weights, *pair, found

    def _measured(self, only: Any = None) -> Iterator[tuple[Any, Weights, Any, Any]]:
        """Tile by tile: the weights, and what was measured (zero where the batch did not use the block)."""
        record, prior = self.record, self._prior()
        for tile in [only] if only is not None else self.first.tiles():
            cut = tile.cut
            weights = Weights(cut(record["posterior"]), cut(record["momentum"]), cut(record["memory"]), cut(prior))
            second = None if self.second is None else self.second.evidence(tile, self.constants, beside=self.first)
            yield tile, weights, self.first.evidence(tile, self.constants), second

    def _measured_apart(self) -> tuple[Weights, Any, Any]:
        """`_measured` of the whole block, as `passes` want it."""
        record, first, second = self.record, self.first, self.second
        found = first.evidence_apart(0) if first.total is None else first.total
        other = None if second is None else second.total
        if second is not None and other is None:
            other = second.evidence_apart(0, beside=first)
        return Weights(record["posterior"], record["momentum"], record["memory"], self._prior()), found, other

    def _prior(self) -> Any:
        if isinstance(self.block, FlatBlock):
            return self.block.prior()
        prior = prior_of(self.block)
        return spread(prior, self.record["posterior"], self.block) if self.first.in_place else prior


def prepare(steps: Sequence[Step], factor: float | Tensor, following: NoiseKey | None) -> None:
    """`Step.prepare` of all blocks.

    Raises:
        NonFiniteError: names the block of which a matrix is singular.
    """
    try:
        for step in steps:
            step.prepare(factor, following)
    except torch.linalg.LinAlgError:
        raise singular_error(step.block) from None


@plainly
def hold_together(steps: Sequence[Step], processes: Processes | None = None) -> None:
    """Let none of the whole blocks move if one must not, without the host's waiting for the devices to say so.

    Args:
        steps: of all blocks.
        processes: over which parameters are spread.

    Raises:
        NonFiniteError: if one must not, and blocks are on several devices, of which one has to be waited for.
    """
    held = [step for step in steps if not step.first.in_place]
    found = [step.unsound for step in held if step.unsound is not None]
    if processes is not None and is_ahead(processes.device):
        counts = [own.counts.sum().float() for own in found] or [torch.zeros((), device=processes.device)]
        sound = spread_over.summed(processes, torch.stack(counts).sum()) == 0
        for step in held:
            step.hold(sound)
        return
    if not found:
        return
    if len({step.block.device for step in held}) > 1:
        for own in found:
            if bool(own.counts.any()):
                raise own.error("")
    else:
        sound = torch.stack([own.counts.sum() for own in found]).sum() == 0
        for step in held:
            step.hold(sound)


def clip_factor(steps: Sequence[Step], max_norm: float, processes: Processes | None = None) -> float | Tensor:
    """The factor of clipping by the norm of all gradients together; a tensor where the host would have to wait.

    `processes`: over which parameters are spread.
    """
    squares = [step.gradient_square() for step in steps]
    if processes is not None:
        own = squares[0].device
        shares = [square.to(own) * step.share for square, step in zip(squares, steps, strict=True)]
        squares = [spread_over.summed(processes, torch.stack(shares).sum())]
    return read_now(blr.norm_clip_factor(squares, max_norm))


def show_meter(
    meter: VarianceMeter, steps: Sequence[Step], number: int, blocks: Sequence[Block], processes: Processes | None
) -> None:
    """Show the variance meter step `number` of some of an optimizer's blocks.

    `processes`: over which parameters are spread.
    """
    if processes is None:
        for step in steps:
            step.meter(meter, number)
        return
    parts = spread_over.PartsMeter(meter, blocks, processes)
    for step in steps:
        step.meter(parts, number)
    parts.show()


def age_of(block: Block, record: Record) -> int:
    """The number of steps in the averages after the next step; 1 where there are none."""
    return record["step"] + 1 if block.settings.averages else 1


def begin(block: Block, record: Record, correction: Correction, *, in_place: bool) -> bool:
    """Give a block what its next step needs: a momentum, a memory, contiguous storage; whether anything was missing."""
    has_averages = len(record["momentum"]) == block.settings.averages * len(block.family.momentum_block)
    if has_averages and record["memory"] is not None and not in_place:
        return False
    return _begin(block, record, correction, in_place)


@plainly
def _begin(block: Block, record: Record, correction: Correction, in_place: bool) -> bool:
    before = record["posterior"], record["momentum"], record["memory"]
    posterior, family = record["posterior"], block.family
    if in_place and not all(value.is_contiguous() for value in posterior):
        posterior = record["posterior"] = fields.map_fields(Tensor.contiguous, posterior)
    count, wanted = len(family.momentum_block), block.settings.averages
    if len(record["momentum"]) > count * wanted:
        record["momentum"] = record["momentum"][: count * wanted]
    elif len(record["momentum"]) < count * wanted:  # averages of one age: all begin anew
        laid = in_place or isinstance(block, FlatBlock)
        zero = empty_site(block, posterior) if laid else family.kl_gradient(posterior, posterior)
        names = [*family.momentum_block] * wanted
        record["momentum"] = tuple(torch.zeros_like(getattr(zero, name)) for name in names)
        record["step"] = 0
    if record["memory"] is None:
        begun = correction.begin(family, posterior)  # may be λ itself, which steps in place overwrite
        record["memory"] = fields.map_leaves(torch.clone, begun)
    return any(old is not record[role] for old, role in zip(before, ROLES, strict=True))  # type: ignore[literal-required]


@plainly
def remember(trial: Trial, record: Record) -> Any:
    """The correction's memory after a refresh, from the mega-batch's mean natural gradient, which is used up.

    Raises:
        NonFiniteError: if it is not finite; the memory that there is stays as it was in any case.
    """
    family, correction, old, mean = trial.block.family, trial.correction, record["memory"], trial.settled()
    how, posterior = trial.block.settings.averaging(family), fields.map_fields(torch.clone, record["posterior"])
    if not trial.in_place:
        mean = fields.map_fields(torch.clone, mean)  # it may be the gradient itself, which is the closure's
    if not trial.in_place or old is None:
        new = correction.after_refresh(family, old, posterior, mean, how)
    else:
        # Tile by tile, into tensors that are not needed after their tile has been read.
        spent = [*posterior, *mean]
        new = fields.map_leaves(lambda value: _taken(spent, value), old)
        for tile in tiles(trial.block, tile_size("eager", trial.block.device)):
            cut = tile.cut
            there = correction.after_refresh(tile.of(family), cut(old), cut(record["posterior"]), cut(mean), how)
            made = fields.leaves(there)
            written = fields.leaves(cut(new))
            places = {place.data_ptr() for place in written}
            for place, value in zip(written, [v.clone() if v.data_ptr() in places else v for v in made], strict=True):
                if place.ndim:
                    place.copy_(value)
    kept = fields.leaves(new)
    if not math.isfinite(sum([float(v.sum()) for v in kept])) and not bool(fields.all_finite(tuple(kept))):
        raise NonFiniteError(
            f"closures: the mean natural gradient of {trial.block.name!r} over the mega-batch is infinite or NaN in "
            f"{trial.block.dtype}; check the mega-batch, or lower ess. q_out stays as it was."
        )
    return new


def _taken(spent: list[Tensor], like: Tensor) -> Tensor:
    """A tensor like this one to write into, one of those that are spent if one fits."""
    for number, value in enumerate(spent):
        if value.shape == like.shape and value.dtype == like.dtype and value.is_contiguous() and like.ndim:
            return spent.pop(number)
    return torch.empty_like(like, memory_format=torch.contiguous_format) if like.ndim else like


def domain_error(block: Block, state: Any) -> Exception:
    """The error for a step that would leave the domain, or the finite numbers."""
    where = f"the posterior of {block.name!r} ({type(block.family).__name__})"
    bounded = [getattr(state, name) for name in block.family.domain]
    finite = fields.all_finite(tuple(bounded)) if bounded else fields.all_finite(state)
    if bool(finite) and any(p.dtype is torch.float16 for p in block.params) and bool(block.family.in_domain(state)):
        return NonFiniteError(
            f"lr={block.settings.lr_given}: the step would take weights of {block.name!r} beyond 65504, the largest "
            "number of float16; lower lr, or use bfloat16. Nothing was changed."
        )
    if not bool(finite) or bool(block.family.in_domain(state)):
        return NonFiniteError(
            f"lr={block.settings.lr_given}: the step would make {where} infinite or NaN; lower lr or precision_lr, or "
            "clip (clip_radius, max_grad_norm). Nothing was changed."
        )
    if block.settings.retraction == "plain":
        return ValueError(
            f"retraction='plain': the step would take {where} out of its domain; lower lr or precision_lr, or use "
            "retraction='second_order'. Nothing was changed."
        )
    return NonFiniteError(
        f"precision_lr: the step would take {where} out of its domain by rounding in {block.dtype}; lower lr or "
        "precision_lr, or use float64 parameters. Nothing was changed."
    )
