"""A block tried at one posterior: where its weights are drawn, what was measured there, and the site made of it.

Noise is looked up wherever it is needed. A block of a large model is *in place*: it is worked on tile by tile, keeps
one gradient, and adds what several draws (or chunks of a mega-batch) give to `total`. Any other block is one tile, and
keeps what all its draws have measured, so that estimators may compare them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expfam_poco.closures.evaluate import Measured
from expfam_poco.correction.base import Correction
from expfam_poco.engine import passes
from expfam_poco.engine.backend import EAGER, LARGE, SHORTEST, Backend, plainly, tile_size
from expfam_poco.engine.beginning import prior_of
from expfam_poco.engine.block import Block, Record, singular_error
from expfam_poco.engine.flat import FlatBlock
from expfam_poco.engine.fused import Places
from expfam_poco.engine.kernels import Constants, Evidence, Numbers, numbers_of
from expfam_poco.engine.rows import Selection
from expfam_poco.engine.tiles import TILE, Tile, Whole, tiles
from expfam_poco.family import fields
from expfam_poco.family.draws import LOSSES_ALONE, Draws, Estimator
from expfam_poco.family.noise import Address, NoiseKey, noise
from expfam_poco.family.transfer import Answer, all_of, are_near, is_ahead, on_device
from expfam_poco.rule import own_site


@dataclass
class Trial:
    """A block at one posterior with its draws: what is measured for it.

    Attributes:
        block: whose weights are tried.
        estimator: of the natural gradient.
        correction: which says where they are tried.
        state: the posterior.
        memory: the correction's, where the posterior is the present one; None at the reference.
        numbers: those of the step.
        key: of the noise of the first draw.
        sign_key: of the random signs of Hessian-vector products.
        mode: of the noise.
        draws: how many draws, or pairs of them for "antithetic".
        backend: what steps the block in place; None: it is one tile.
        is_present: whether the posterior is the present one, not the reference.
        total: the sum of earlier parts (chunks, micro-batches), to which this one is added with `weight`.
        used: which parameters an evaluation has depended on.
        grads: of a whole block, its gradients at all draws; None where nothing depended on it.
        raw: in place, the gradient of the last draw as each parameter has it.
        rows: of a local parameter, those that the batch has used.
        noises: the noise of all draws of a whole block, once it has been made, for all trials of one key.
        spoil: of a whole block that is watched: NaN where what earlier parts measured is not finite, else 0.
    """

    block: Block
    estimator: Estimator
    correction: Correction
    state: Any
    memory: Any
    numbers: Numbers
    key: NoiseKey
    sign_key: NoiseKey
    mode: str = "shared"
    draws: int = 1
    backend: Backend | None = None
    is_present: bool = True
    total: Any = None
    weight: float = 1.0
    used: list[bool] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)
    raw: Sequence[Tensor | None] = ()
    losses: list[Tensor] = field(default_factory=list)
    hessians: list[Tensor] = field(default_factory=list)
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    variations: list[Tensor] = field(default_factory=list)
    rows: Selection | None = None
    noises: list[Tensor] = field(default_factory=list)
    spoil: Tensor | None = None
    _points: Tensor | None = None
    _site: Any = None

    def again(self, **changed: Any) -> Trial:
        """The same trial, or one that differs so, with nothing recorded yet."""
        made = object.__new__(Trial)
        made.__dict__.update(self.__dict__, used=[], grads=[], losses=[], hessians=[], pairs=[], variations=[])
        made.__dict__.update({"raw": (), "spoil": None, "_points": None, "_site": None, **changed})
        return made

    @property
    def count(self) -> int:
        """The number of evaluations, K."""
        return 2 * self.draws if self.mode == "antithetic" else self.draws

    @property
    def in_place(self) -> bool:
        """Whether the block belongs to a large model."""
        return self.backend is not None

    @functools.cached_property
    def watched(self) -> bool:
        """Whether the host does not wait to see that what was measured is finite: its steps notice, on the device."""
        return is_ahead(self.block.device)

    @property
    def fused(self) -> bool:
        """Whether passes over the whole block are kernels of their own (`passes`), without tiles."""
        if self.backend is None or self.block.shape.numel() < SHORTEST or self.block.offset:
            return False
        return self.backend.fuses(self.constants(), self.block.device)

    def run_fused(self, function: Any, targets: Sequence[Tensor | Places], *arguments: Any, draw: int = 0) -> Any:
        """Run one of `passes` over the whole block: its sums, or None where it turns out that it cannot."""
        return self.runner.fused(
            function, self.constants(draw), self.block.programs, self.block.dtype, targets, *arguments
        )

    @property
    def runner(self) -> Backend:
        """What runs the kernels."""
        return self.backend or EAGER

    def tiles(self) -> Iterator[Tile | Whole]:
        """All of the block: whole, or in tiles as long as the backend likes them; a flat block is one."""
        if self.backend is None:
            return iter([Whole(self.block.shape)])
        size = self.block.shape.numel() if isinstance(self.block, FlatBlock) else None
        return tiles(self.block, size or tile_size(self.backend.mode, self.block.device))

    def like(self, tile: Tile | Whole) -> Tensor:
        """A tensor of the tile's shape, dtype and device; its values mean nothing."""
        return torch.empty(tile.shape, dtype=self.block.dtype, device=self.block.device)

    # ---- draws -------------------------------------------------------------------------------------------

    def constants(self, draw: int = 0) -> Constants:
        """The constants of this block's kernels at one draw."""
        noise = "zero" if self.mode == "zero" else "reflected" if self.mode == "antithetic" and draw % 2 else "random"
        known = self.block.constants.get(noise)
        fits = known is not None and known.estimator is self.estimator and known.correction is self.correction
        if known is None or not fits or known.watched is not self.watched:
            settings = self.block.settings
            known = self.block.constants[noise] = Constants(
                self.block.family,
                self.estimator,
                self.correction,
                settings.momentum > 0.0,
                settings.clip_radius,
                settings.retraction,
                settings.anchor_weight,
                noise,
                settings.prior_in_momentum,
                settings.square_momentum is not None,
                self.watched,
                torch.finfo(torch.float16).max if self.block.params[0].dtype is torch.float16 else math.inf,
            )
        return known

    def source(self, tile: Tile | Whole, constants: Constants, draw: int) -> Tensor | Address:
        """One draw's noise on a tile, or its address."""
        if constants.noise == "zero":
            return torch.empty(0, dtype=self.block.dtype, device=self.block.device)
        block, whole = self.block, tile.shape.numel() == self.block.shape.numel()
        by_kernel = not block.offset and self.runner.makes_noise(constants, block.device)
        if by_kernel and not whole and block.shape.numel() <= LARGE:  # one launch
            return tile.cut(self.source(Whole(block.shape), constants, draw))
        key = self.key_of(draw).at(parameter=block.index)
        addresses = block.addresses(tile) if isinstance(block, FlatBlock) else None
        if addresses is None:
            key = key.at(offset=(block.offset + tile.start * tile.event.numel()) * numbers_of(block.family))
        programs = block.programs if whole and by_kernel else None
        return self.runner.noise(constants, key, self.like(tile), addresses, programs)

    def key_of(self, draw: int) -> NoiseKey:
        """The key of one draw's noise."""
        return self.key.at(draw=self.key.draw + (draw // 2 if self.mode == "antithetic" else draw))

    def noise(self) -> Tensor:
        """The noise of all draws of a whole block, K × P."""
        if not self.noises:
            whole, rows = Whole(self.block.shape), list[Tensor]()
            for draw in range(self.count):
                constants = self.constants(draw)
                source = self.like(whole) if self.mode == "zero" else self.source(whole, constants, draw)
                like = source if isinstance(source, Tensor) else self.like(whole)  # recorded: an address
                rows.append(constants.noise_of(source, like))
            self.noises.append(stacked(rows))
        return self.noises[0]

    @property
    def where(self) -> Any:
        """The posterior that a whole block is tried at."""
        return self.constants().where(self.state, self.memory, self.numbers.share)

    def points(self) -> Tensor:
        """Where the loss is to be evaluated, K × P."""
        if self._points is None:
            where, noise = self.where, self.noise()
            rows = [noise] if self.count == 1 else noise.split(1)
            try:
                points = [self.estimator.points(self.block.family, where, row) for row in rows]
            except torch.linalg.LinAlgError:
                raise singular_error(self.block) from None
            self._points = points[0] if len(points) == 1 else torch.cat(points)
        return self._points

    def signs(self, draw: int) -> Tensor | None:
        """Random signs for Hessian-vector products at one draw, any number × P, or None where none are needed."""
        if self.estimator.needs != "hvp":
            return None
        count: int = getattr(self.estimator, "probes", 1)
        key = self.sign_key.at(parameter=self.block.index, draw=(self.sign_key.draw + draw) * count)
        shape, where = tuple(self.block.shape), self.block.device
        return noise("rademacher", shape, count, key, dtype=self.block.dtype, device=where)

    @plainly
    def write(self, draw: int) -> None:
        """Put draw number `draw` into the model, unless it is there."""
        if self.backend is None:
            points = self.points()[draw]
            if not self._holds(points):
                self.block.write(points)
            return
        if draw == 0 and self._take_first_draw():
            return
        if self.fused:
            with self.block.rewritten_apart() as out:
                if self._draw_fused(out, draw):
                    return
        constants = self.constants(draw)
        with self.block.rewritten() as flat:
            for tile in self.tiles():
                source, own = self.source(tile, constants, draw), (tile.cut(self.state), tile.cut(self.memory))
                self.runner.draw(constants.on(tile), tile.cut(flat), self.block.dtype, *own, self.numbers, source)

    def _draw_fused(self, out: Sequence[Tensor], draw: int) -> bool:
        """Put a draw into one tensor for each parameter, if there is a kernel for that."""
        places, arguments = Places(out, out[0].dtype), (self.state, self.memory, self.numbers, self.key_of(draw))
        return self.run_fused(passes.drawn, [places], *arguments, draw=draw) is not None

    @plainly
    def is_there(self, draw: int) -> Answer:
        """Whether the model still holds, up to rounding, draw number `draw`, which has been written into it."""
        if self.backend is None:
            parts = zip(self.block.split(self.points()[draw]), self.block.tensors, strict=True)
            return all_of(_are_near(part.to(p.dtype), p.detach()) for part, p in parts)
        constants, params = self.constants(draw), self.block.tensors
        drawn_apart = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in params if self.fused]
        if drawn_apart and self._draw_fused(drawn_apart, draw):
            return all_of(_are_near(drawn, p.detach()) for drawn, p in zip(drawn_apart, params, strict=True))
        near = list[Answer]()
        present = self.block.beside(params) if isinstance(self.block, FlatBlock) else params[0].detach()
        for tile in self.tiles():
            source, own = self.source(tile, constants, draw), (tile.cut(self.state), tile.cut(self.memory))
            drawn = torch.zeros(tile.shape, dtype=present.dtype, device=present.device)
            self.runner.draw(constants.on(tile), drawn, self.block.dtype, *own, self.numbers, source)
            if isinstance(self.block, FlatBlock):
                drawn = torch.where(tile.cut(self.block.real), drawn, 0.0)
            near.append(_are_near(drawn, tile.cut(present)))
        return all_of(near)

    def _holds(self, points: Tensor) -> bool:
        """Whether the model is known to hold these points, since they are the posterior's own."""
        known = self.mode == "zero" and not self.watched and self.is_present
        known = known and all([m.at_point for m in self.block.members])
        return known and torch.equal(points, self.block.family.point(self.state))

    def _take_first_draw(self) -> bool:
        """Whether the last step has left this draw in the model; it counts once, for λ_ref may have the same key."""
        blocks = self.block.members if isinstance(self.block, FlatBlock) else [self.block]
        held = all(block.drawn == self.key for block in blocks)
        for block in blocks:
            block.drawn = None
        return held

    # ---- what was measured -------------------------------------------------------------------------------

    @plainly
    def record(self, draw: int, measured: Measured, position: slice) -> Sequence[Tensor | None]:
        """Keep what an evaluation measured of this block's parameters, at `position` among all; the kept gradients."""
        self._keep(measured.loss, measured.grads[position])
        if self.in_place:
            return self.raw
        self._keep_curvature(draw, measured, position)
        return self.grads[-1:]

    def _keep_curvature(self, draw: int, measured: Measured, position: slice) -> None:
        curvature, signs = self.block.family.curvature, self.signs(draw)
        if signs is not None:
            gathered = (self.block.gather(product[position]) for product in measured.products)
            products = [self.signed(product) for product in gathered if product is not None]
            self.pairs.extend(zip(products, signs, strict=False))  # the anchor's own product comes last
        elif curvature == "none":
            return
        elif self.measures_hessian:
            hessian = self.signed(measured.hessians[position.start].to(self.block.dtype))
            self.hessians.append(hessian if curvature == "dense" else hessian.reshape(self.block.shape))
        else:
            self._keep_pair()

    def record_rows(self, losses: Tensor, grads: list[list[Tensor | None]]) -> None:
        """Keep the losses, and the gradients of every parameter, of all draws at once."""
        for loss, row in zip(losses, grads, strict=True):
            self._keep(loss, row)
            self._keep_pair()

    @property
    def factor(self) -> float:
        """What makes the loss the objective that becomes small, of the rows that the batch has used."""
        share = 1.0 if self.rows is None else self.rows.share
        return -share if self.block.settings.maximize else share

    def signed(self, measured: Tensor) -> Tensor:
        """What was measured of the loss, as it is of the objective."""
        return measured if self.factor == 1.0 else measured * self.factor

    def _keep(self, loss: Tensor, grads: list[Tensor | None]) -> None:
        if self.factor != 1.0:
            loss, grads = self.signed(loss), [None if grad is None else self.signed(grad) for grad in grads]
        losses_alone = self.estimator.needs in LOSSES_ALONE
        if not all(self.used) or not self.used:
            before = self.used or [losses_alone] * len(grads)
            self.used = [a or grad is not None for a, grad in zip(before, grads, strict=True)]
        if self.in_place:
            if loss.is_cpu and self.block.device.type != "cpu":  # a closure may return a plain number
                loss = on_device([float(loss)], loss.dtype, self.block.device)[0]
            self.raw, self.losses = grads, [loss]
        else:
            self.grads.append(None if losses_alone else self.block.gather(grads))
            self.losses.append(loss)

    def _keep_pair(self) -> None:
        """Keep what the estimator makes of the gradient alone."""
        if self.block.family.curvature == "none":
            return
        pair = self.estimator.pair(self.gradient(-1), self.numbers.ess)
        self.pairs.extend([] if pair is None else [pair])

    def gradient(self, draw: int) -> Tensor:
        """The block's gradient at a draw, zero where nothing depended on it."""
        grad = self.grads[draw]
        return torch.zeros_like(self.like(Whole(self.block.shape))) if grad is None else grad

    @property
    def measures_hessian(self) -> bool:
        """Whether the estimator wants this block's Hessian, whole or its diagonal."""
        return self.estimator.needs == "hessian" and self.block.family.curvature != "none"

    @plainly
    def collect(self, draw: int) -> None:
        """In place: add the natural gradient of the draw just recorded to the total, if there is one."""
        if self.total is None or not self.in_place:
            return
        if self.fused:
            own = self.state, self.memory, self.numbers, self.evidence_apart(draw), self.total, self.weight
            if self.run_fused(passes.collected, fields.leaves(self.total), *own, draw=draw) is not None:
                self.raw, self.losses = (), []
                return
        constants = self.constants(draw)
        for tile in self.tiles():
            grad = self._raw_gradient(tile)
            if grad is None:
                break
            here = constants.on(tile)
            where = here.where(tile.cut(self.state), tile.cut(self.memory), self.numbers.share)
            evidence = Evidence(self.source(tile, constants, draw), grad, self.losses[0])
            arguments = (here, where, evidence, tile.cut(self.total), self.weight)
            self.runner.collect(*arguments, self.numbers.ess, self.like(tile))
        self.raw, self.losses = (), []

    def _raw_gradient(self, tile: Tile | Whole) -> Tensor | None:
        """In place: the last gradient on a tile, in its own dtype, or None."""
        if all(grad is None for grad in self.raw):
            return None
        if not isinstance(self.block, FlatBlock):
            return tile.cut(self.raw[0])
        stop = tile.start + tile.shape.numel()
        return self.block.beside(self.raw, stop)[tile.start : stop]

    @plainly
    def settled(self) -> Any:
        """The total with this part."""
        if self.in_place:
            return self.total
        if self._site is None:
            site = self.natural_gradient()
            site = site if self.weight == 1.0 else fields.scale(site, self.weight)
            self._site = site if self.total is None else fields.add(self.total, site)
        return self._site

    def spoils(self) -> Tensor:
        """Of a whole block: NaN for every weight for which something that was measured is not finite, else 0."""
        values = [*self.losses, *[grad for grad in self.grads if grad is not None]]
        if self.estimator.needs != "gradient":
            values += [*self.hessians, *self.variations, *[side for pair in self.pairs for side in pair]]
        parts = [value * 0.0 for value in values]
        spoil = self.spoil
        for part in [part if part.shape in ((), self.block.shape) else part.sum() for part in parts]:
            spoil = part if spoil is None else spoil + part
        assert spoil is not None
        return spoil.expand(self.block.shape)

    def settle_for(self, site: Any, used: list[bool]) -> None:
        """Go by a mean natural gradient that was formed elsewhere of this one and others."""
        self.used = used
        if self.in_place:
            self.total = site
        else:
            self._site = site

    def natural_gradient(self) -> Any:
        """The estimator's site from all recorded evaluations."""
        theta = self.points()
        hessian = stacked(self.hessians) if self.hessians else None
        first, second = zip(*self.pairs, strict=True) if self.pairs else ((), ())
        pairs = (stacked(first), stacked(second)) if self.pairs else None
        grad = None
        if self.estimator.needs not in LOSSES_ALONE:
            grad = stacked([self.gradient(draw) for draw in range(len(self.grads))])
        loss = stacked(self.losses).to(theta.dtype)
        variations = stacked(self.variations).to(theta.dtype) if self.variations else None
        draws = Draws(self.noise(), theta, loss, grad, hessian, pairs, variations)
        family, where, settings = self.block.family, self.where, self.block.settings
        if not settings.own_site:
            return self.estimator.natural_gradient(family, where, draws)
        return own_site.natural_gradient(self.estimator, family, where, prior_of(self.block), self.numbers.ess, draws)

    def evidence(self, tile: Tile | Whole, constants: Constants, *, beside: Trial | None = None) -> Any:
        """What was measured on a tile: the site, or one draw's gradient (zero where the batch did not use it).

        Where the noise is that of the evidence of another trial `beside`, it is left out.
        """
        if not self.in_place or self.total is not None:
            return tile.cut(self.settled())
        source = None if beside is not None and self.key == beside.key else self.source(tile, constants, 0)
        grad = self._raw_gradient(tile)
        if grad is None:
            return Evidence(source, torch.zeros_like(self.like(tile)), torch.zeros((), device=self.block.device))
        return Evidence(source, grad, self.losses[0])

    def evidence_apart(self, draw: int, *, beside: Trial | None = None) -> Evidence:
        """`evidence` of one draw for `passes`, on the whole block: noise by its key, gradients where they are."""
        grads = self.raw or [None] * len(self.block.params)
        loss = self.losses[0] if self.losses else torch.zeros((), device=self.block.device)
        places: Any = Places(grads, self.block.params[0].dtype)
        key: Any = None if beside is not None and self.key == beside.key else self.key_of(draw)
        return Evidence(key, places, loss)

    def apart(self, records: list[Record], states: list[Any]) -> list[Trial]:
        """The trials of a flat block's members, with what was measured for each.

        Args:
            records: the members'.
            states: the members' posteriors of this trial.
        """
        flat = self.block
        assert isinstance(flat, FlatBlock)
        made = []
        for number, (block, record, state) in enumerate(zip(flat.members, records, states, strict=True)):
            total = None if self.total is None else flat.cut(self.total, number)
            memory = None if self.memory is None else record["memory"]
            noises = [torch.stack([flat.views(row)[number] for row in noise]) for noise in self.noises]
            trial = self.again(block=block, state=state, memory=memory, total=total, noises=noises)
            trial.raw = self.raw[number : number + 1]
            trial.grads = [None if row is None else flat.views(row)[number] for row in self.grads]
            trial.losses, trial.used = list(self.losses), [self.used[number]]
            trial.spoil = None if self.spoil is None else flat.views(self.spoil)[number]
            if not self.in_place:
                trial._site = None if self._site is None else flat.cut(self._site, number)
                trial.pairs = [tuple(flat.views(side)[number] for side in pair) for pair in self.pairs]  # type: ignore[misc]
            made.append(trial)
        return made


def _are_near(first: Tensor, second: Tensor) -> Answer:
    """Equal up to what adding and subtracting a step leaves (sharpness-aware minimisation does that)."""
    near = max(1e-4, 4.0 * torch.finfo(first.dtype).eps)
    return are_near(first, second, near, 1e-2 * near)


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """The rows as one tensor; of a single one a view."""
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(list(rows))


@plainly
def empty_site(block: Block, state: Any) -> Any:
    """A site of zeros for the whole block."""
    tile = next(tiles(block, TILE, most=1))
    first = tile.cut(state)
    example = tile.of(block.family).kl_gradient(first, first)
    return fields.map_fields(lambda value: value.new_zeros(*block.batch, *value.shape[1:]), example)
