"""A block tried at one posterior: where its weights are drawn, what was measured there, and the site made of it.

Noise is looked up wherever it is needed. A block of a large model is *in place*: it is worked on tile by tile, keeps
one gradient, and adds what several draws (or chunks of a mega-batch) give to `total`. Any other block is one tile, and
keeps what all its draws have measured, so that estimators may compare them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.closures.batched import Batched
from expfam_poco.closures.evaluate import Closure, Measured
from expfam_poco.correction import snapshot
from expfam_poco.correction.snapshot import Outer
from expfam_poco.engine import settings
from expfam_poco.engine.backend import EAGER, Backend, plainly, span_size
from expfam_poco.engine.block import Block
from expfam_poco.engine.kernels import Evidence, Recipe, numbers_of
from expfam_poco.engine.noise_plan import FIXED, INNER, MEGA, OUTER, PROBE_INNER, PROBE_MEGA, PROBE_OUTER
from expfam_poco.engine.tiles import TILE, Bucket, can_stream, spans
from expfam_poco.family import fields
from expfam_poco.family.draws import LOSSES_ALONE, Draws, Estimator
from expfam_poco.family.noise import Address, NoiseKey, noise


class _Whole:
    """The tile that is a whole block."""

    def cut(self, values: Any) -> Any:
        """All of them."""
        return values


WHOLE = _Whole()


@dataclass
class Trial:
    """A block at one posterior (inner or outer) with its draws: what is measured for it, and the record.

    `total` is the sum of earlier parts (chunks, micro-batches), to which this one is added with `weight`;
    `used_before` says whether one of them depended on the block.
    """

    block: Block
    estimator: Estimator
    state: Any
    key: NoiseKey
    probe_key: NoiseKey
    mode: str = "shared"
    draws: int = 1
    backend: Backend | None = None
    total: Any = None
    weight: float = 1.0
    used_before: bool = False
    noises: dict[int, Tensor] = field(default_factory=dict)
    grad: list[Tensor | None] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    hessian: list[Tensor] = field(default_factory=list)
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    variations: list[Tensor] = field(default_factory=list)
    _site: Any = None

    def again(self, **changed: Any) -> Trial:
        """The same trial, or one that differs so, with nothing recorded yet."""
        return replace(self, grad=[], loss=[], hessian=[], pairs=[], variations=[], _site=None, **changed)

    @property
    def count(self) -> int:
        """The number of evaluations, K."""
        return 2 * self.draws if self.mode == "antithetic" else self.draws

    @property
    def in_place(self) -> bool:
        """Whether the block belongs to a large model."""
        return self.backend is not None

    @property
    def runner(self) -> Backend:
        """What runs the kernels."""
        return self.backend or EAGER

    @property
    def bucket(self) -> Bucket | None:
        """The bucket that the block is laid into."""
        return None if self.backend is None else self.backend.buckets.get(self.block)

    def tiles(self) -> Iterator[Any]:
        """All of the block: whole, or in tiles as long as the backend likes them; a bucket is one."""
        if self.backend is None:
            return iter([WHOLE])
        whole = isinstance(self.block, Bucket)
        return spans(self.block, self.block.numel if whole else span_size(self.backend.mode, self.block.device))

    def like(self, tile: Any) -> Tensor:
        """A tensor of the tile's shape, dtype and device; its values mean nothing."""
        shape = self.block.shape if tile is WHOLE else tile.shape
        return torch.empty(shape, dtype=self.block.dtype, device=self.block.device)

    # ---- draws -------------------------------------------------------------------------------------------

    def recipe(self, draw: int = 0) -> Recipe:
        """The constants of this block's kernels at one draw."""
        group, reflected = self.block.group, self.mode == "antithetic" and draw % 2 == 1
        return Recipe(
            self.block.family,
            self.estimator,
            float(group["momentum"]) > 0.0,
            float(group["clip_radius"]),
            group["retraction"],
            settings.anchor_weight(group),
            "zero" if self.mode == "zero" else "reflected" if reflected else "random",
            group["prior_in_momentum"],
        )

    def source(self, tile: Any, recipe: Recipe, draw: int) -> Tensor | Address:
        """One draw's noise on a tile, or its address."""
        number = draw // 2 if self.mode == "antithetic" else draw
        start = 0 if tile is WHOLE else tile.start * tile.event.numel() * numbers_of(self.block.family)
        key = self.key.at(parameter=self.block.index, draw=self.key.draw + number, offset=start)
        tiles = self.block.tiles if isinstance(self.block, Bucket) else None
        return self.runner.noise(recipe, key, self.like(tile), tiles)

    def noise(self) -> Tensor:
        """The noise of all draws of a whole block, K × P."""
        for draw in range(self.count):
            if draw not in self.noises:
                recipe, like = self.recipe(draw), self.like(WHOLE)
                self.noises[draw] = recipe.noise_of(self.source(WHOLE, recipe, draw), like)
        return torch.stack([self.noises[draw] for draw in range(self.count)])

    def points(self) -> Tensor:
        """Where the loss is to be evaluated, K × P."""
        return self.estimator.points(self.block.family, self.state, self.noise())

    def probes(self, draw: int) -> Tensor | None:
        """Random signs for Hessian-vector products at one draw, probes × P, or None where none are needed."""
        if self.estimator.needs != "hvp":
            return None
        count: int = getattr(self.estimator, "probes", 1)
        key = self.probe_key.at(parameter=self.block.index, draw=(self.probe_key.draw + draw) * count)
        shape, where = tuple(self.block.shape), self.block.device
        return noise("rademacher", shape, count, key, dtype=self.block.dtype, device=where)

    @plainly
    def write(self, draw: int) -> None:
        """Put draw number `draw` into the model, unless it is there."""
        if self.backend is None:
            self.block.write(self.points()[draw])
            return
        if draw == 0 and self._take_first_draw():
            return
        recipe = self.recipe(draw)
        with self.block.rewritten() as out:
            for tile in self.tiles():
                source = self.source(tile, recipe, draw)
                self.runner.draw(recipe, tile.cut(self.state), source, tile.cut(out), self.block.dtype)

    def _take_first_draw(self) -> bool:
        """Whether the last step has left this draw in the model; it counts once, for λ_out may have the same key."""
        blocks = self.block.blocks if isinstance(self.block, Bucket) else [self.block]
        held = all(block.drawn == self.key for block in blocks)
        for block in blocks:
            block.drawn = None
        return held

    # ---- what was measured -------------------------------------------------------------------------------

    def record(self, draw: int, measured: Measured, position: slice) -> None:
        """Keep what an evaluation measured of this block's parameters, which stand at `position` among all."""
        grad = self.block.gather(measured.grads[position])
        if self.in_place:
            if grad is not None:
                (self.grad, self.loss), self.used_before = ([measured.grads[position][0]], [measured.loss]), True
            return
        self.loss.append(measured.loss)
        self.grad.append(grad)
        family, probes = self.block.family, self.probes(draw)
        if probes is not None:
            gathered = (self.block.gather(product[position]) for product in measured.products)
            products = [product for product in gathered if product is not None]
            self.pairs.extend(zip(products, probes, strict=False))  # the anchor's own product comes last
        elif self.measures_hessian:
            hessian = measured.hessians[position.start].to(self.block.dtype)
            self.hessian.append(hessian if family.curvature == "dense" else hessian.reshape(self.block.shape))
        else:
            self.record_pair(grad)

    def record_pair(self, grad: Tensor | None) -> None:
        """Keep what the estimator makes of the gradient alone."""
        grad = torch.zeros_like(self.like(WHOLE)) if grad is None else grad
        pair = None if self.block.family.curvature == "none" else self.estimator.pair(grad, self.block.group["ess"])
        self.pairs.extend([] if pair is None else [pair])

    @property
    def measures_hessian(self) -> bool:
        """Whether the estimator wants this block's Hessian, whole or its diagonal."""
        return self.estimator.needs == "hessian" and self.block.family.curvature != "none"

    def used(self) -> bool:
        """Whether any evaluation depended on the block."""
        return self.used_before or self.estimator.needs in LOSSES_ALONE or any(grad is not None for grad in self.grad)

    def collect(self, draw: int) -> None:
        """Add the natural gradient of the draw just recorded to the total, and drop the gradient."""
        if not self.grad or self.grad[0] is None:
            return
        recipe, grad = self.recipe(draw), self.grad[0]
        for tile in self.tiles():
            evidence = Evidence(self.source(tile, recipe, draw), tile.cut(grad), self.loss[0])
            arguments = (recipe, tile.cut(self.state), evidence, tile.cut(self.total), self.weight)
            self.runner.collect(*arguments, float(self.block.group["ess"]), self.like(tile))
        self.grad, self.loss = [], []

    def settled(self) -> Any:
        """The total with this part."""
        if self.in_place:
            return self.total
        if self._site is None:
            site = self.natural_gradient()
            site = site if self.weight == 1.0 else fields.scale(site, self.weight)
            self._site = site if self.total is None else fields.add(self.total, site)
        return self._site

    def natural_gradient(self) -> Any:
        """The estimator's site from all recorded evaluations."""
        theta = self.points()
        grads = [torch.zeros_like(theta[0]) if grad is None else grad for grad in self.grad]
        hessian = torch.stack(self.hessian) if self.hessian else None
        pairs = (
            (torch.stack([a for a, _ in self.pairs]), torch.stack([b for _, b in self.pairs])) if self.pairs else None
        )
        grad = None if self.estimator.needs in LOSSES_ALONE else torch.stack(grads)
        loss = torch.stack(self.loss).to(theta.dtype)
        variations = torch.stack(self.variations).to(theta.dtype) if self.variations else None
        draws = Draws(self.noise(), theta, loss, grad, hessian, pairs, variations)
        return self.estimator.natural_gradient(self.block.family, self.state, draws)

    def evidence(self, tile: Any, recipe: Recipe, *, beside: Trial | None = None) -> Any:
        """What was measured on a tile: the site, or one draw's gradient (zero where the batch did not use it).

        Where the noise is that of the evidence of another trial `beside`, it is left out.
        """
        if not self.in_place or self.total is not None:
            return tile.cut(self.settled())
        source = None if beside is not None and self.key == beside.key else self.source(tile, recipe, 0)
        if not self.grad or self.grad[0] is None:
            return Evidence(source, torch.zeros_like(self.like(tile)), torch.zeros((), device=self.block.device))
        return Evidence(source, tile.cut(self.grad[0]), self.loss[0])

    def make_ready(self, state: dict[str, Any]) -> None:
        """In place a block's record is contiguous, with a momentum where the group has one."""
        if not self.in_place:
            return
        posterior = state["posterior"]
        if not all(value.is_contiguous() for value in posterior):
            state["posterior"] = fields.map_fields(Tensor.contiguous, posterior)
        if self.block.group["momentum"] == 0.0:
            state["momentum"] = ()
        elif not state["momentum"]:
            zero = empty_site(self.block, posterior)
            state["momentum"] = tuple(getattr(zero, name) for name in self.block.family.momentum_block)

    @plainly
    def outer(self, record: dict[str, Any]) -> Outer:
        """The block's new q_out, from its mega-batch's mean natural gradient, which is used up."""
        family, group, old, mean = self.block.family, self.block.group, record["outer"], self.settled()
        posterior = fields.map_fields(torch.clone, record["posterior"])
        if self.in_place and old is not None:
            old = Outer(*(fields.map_fields(Tensor.contiguous, part) for part in old))
        for tile in self.tiles() if old is not None else ():
            averaged = snapshot.update_outer(
                family,
                Outer(tile.cut(old.posterior), tile.cut(old.site)),
                tile.cut(record["posterior"]),
                tile.cut(mean),
                rho=family.per_block(*settings.pair(group["rho"])),
                reanchor_average=group["reanchor_average"],
                anchor_weight=settings.anchor_weight(group),
            )
            for value, new in zip(tile.cut(mean), averaged.site, strict=True):
                value.copy_(new)
        return Outer(posterior, mean)


@plainly
def empty_site(block: Block, state: Any) -> Any:
    """A site of zeros for the whole block."""
    first = next(spans(block, TILE, most=1)).cut(state)
    example = block.family.kl_gradient(first, first)
    return fields.map_fields(lambda value: value.new_zeros(*block.batch, *value.shape[1:]), example)


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

    `streamed` is the backend for blocks that are large enough to be stepped in place, or None.
    """

    mode: str
    mc_samples: int
    seed: int
    streamed: Backend | None = None

    def inner_key(self, step: int) -> NoiseKey:
        """Where the noise of an inner step is."""
        return NoiseKey(self.seed, INNER, step)

    def at_inner(self, block: Block, state: Any, step: int, closure: Closure, part: Part) -> Trial:
        """A block at λ_in: fresh noise at every step (and for every part of it, where there are several)."""
        return self._trial(block, state, closure, self.inner_key(step), NoiseKey(self.seed, PROBE_INNER, step), part)

    def at_outer(self, inner: Trial, state: Any, step: int, refresh: int, part: Part) -> Trial:
        """The same block at λ_out; its noise is the inner one unless the mode says otherwise."""
        made = inner.again(state=state)
        keys = {"independent": NoiseKey(self.seed, OUTER, step), "fixed": NoiseKey(self.seed, FIXED, refresh)}
        if self.mode in keys:
            probe_key = NoiseKey(self.seed, PROBE_OUTER if self.mode == "independent" else PROBE_INNER, step)
            key = self._of_part(keys[self.mode], part)
            made = inner.again(state=state, key=key, noises={}, probe_key=self._probes(probe_key, inner, part))
        return self._carrying(made, part)

    def at_mega(self, block: Block, state: Any, chunk: int, refresh: int, closure: Closure, part: Part) -> Trial:
        """A block at the posterior that becomes λ_out; fresh noise for every chunk unless the mode is "fixed"."""
        fixed = self.mode == "fixed"
        key = NoiseKey(self.seed, FIXED, refresh) if fixed else NoiseKey(self.seed, MEGA, chunk)
        return self._trial(block, state, closure, key, NoiseKey(self.seed, PROBE_MEGA, chunk), part)

    def _trial(self, block: Block, state: Any, closure: Closure, key: NoiseKey, probe: NoiseKey, part: Part) -> Trial:
        in_place = self.streamed is not None and not isinstance(closure, Batched) and can_stream(block)
        backend, draws = (self.streamed if in_place else None), self._count(closure)
        made = Trial(block, block.group["curvature"], state, self._of_part(key, part), probe, self.mode, draws, backend)
        made.probe_key = self._probes(probe, made, part)
        return self._carrying(made, part)

    @staticmethod
    def _carrying(trial: Trial, part: Part) -> Trial:
        """The trial with what the parts before it have brought."""
        trial.weight, trial.total, trial.used_before = part.share, None, False
        if part.before is not None:
            trial.total, trial.used_before = part.before.settled(), part.before.used()
        if trial.in_place:
            trial.weight = part.share / trial.count
            if trial.total is None and (part.collecting or trial.count > 1):
                trial.total = empty_site(trial.block, trial.state)
        return trial

    @staticmethod
    def _probes(key: NoiseKey, trial: Trial, part: Part) -> NoiseKey:
        return key.at(draw=part.number * trial.count)

    def _of_part(self, key: NoiseKey, part: Part) -> NoiseKey:
        """The draws of one part of a step follow those of the parts before it; a fixed draw stays."""
        return key if key.stream == FIXED else key.at(draw=part.number * self.mc_samples)

    def _count(self, closure: Closure) -> int:
        if not isinstance(closure, Batched) or closure.draws == 1:
            return self.mc_samples
        if self.mode == "fixed":
            raise ValueError(
                "noise='fixed': with PerExample every example would keep the draw of its place in the batch; use "
                "noise='shared'."
            )
        return self.mc_samples * closure.draws
