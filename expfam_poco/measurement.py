"""From closures to natural gradients: draws weights, evaluates, and hands the estimators what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import fields
from .batched import Batched
from .blocks import Block
from .estimators import LOSSES_ALONE, Draws, Estimator, curvature_of_gradient
from .evaluation import Closure, Measured, Request, evaluate
from .noise import NoiseKey, noise

# Streams of the counter-based generator: noises of different purposes never share a counter.
INNER, OUTER, MEGA, FIXED, SAMPLE, PROBE_INNER, PROBE_OUTER, PROBE_MEGA, ELBO = range(9)
NOISE_MODES = ("shared", "independent", "fixed", "antithetic", "zero")


@dataclass
class View:
    """A block seen at one posterior (inner or outer) with its draws: what is measured for it, and the record.

    `total` is the sum of earlier parts (chunks, micro-batches), to which this one is added with `weight`;
    `used_before` says whether one of them depended on the block.
    """

    block: Block
    estimator: Estimator
    state: Any
    noise: Tensor
    probes: Tensor | None
    theta: list[Tensor] = field(default_factory=list)
    grad: list[Tensor | None] = field(default_factory=list)
    curvature: list[Tensor | None] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    variations: list[Tensor] = field(default_factory=list)
    total: Any = None
    weight: float = 1.0
    used_before: bool = False

    @property
    def count(self) -> int:
        """The number of evaluations, K."""
        return int(self.noise.shape[0])

    def again(self) -> View:
        """The same view with nothing recorded yet."""
        return View(self.block, self.estimator, self.state, self.noise, self.probes)

    def points(self) -> Tensor:
        """Where the loss is to be evaluated, K × P."""
        return self.estimator.points(self.block.family, self.state, self.noise)

    def write(self, draw: int) -> None:
        """Put draw number `draw` into the model."""
        theta = self.estimator.points(self.block.family, self.state, self.noise[draw : draw + 1])[0]
        self.theta.append(theta)
        self.block.write(theta)

    def record(self, draw: int, measured: Measured, position: slice) -> None:
        """Keep what an evaluation measured of this block's parameters, which stand at `position` among all."""
        grad = self.block.gather(measured.grads[position])
        self.loss.append(measured.loss)
        self.grad.append(grad)
        if self.probes is not None:
            self.curvature.append(_curvature_of_products(self, draw, [p[position] for p in measured.products]))
        elif self.measures_hessian:
            self.curvature.append(_shaped(measured.hessians[position.start], self.block))
        else:
            self.curvature.append(_curvature_of_gradient(self, grad))

    @property
    def measures_hessian(self) -> bool:
        """Whether the estimator wants this block's Hessian, whole or its diagonal."""
        return self.estimator.needs == "hessian" and self.block.family.curvature != "none"

    def used(self) -> bool:
        """Whether any evaluation depended on the block."""
        return self.used_before or self.estimator.needs in LOSSES_ALONE or any(grad is not None for grad in self.grad)

    def settled(self) -> Any:
        """The total with this part."""
        site = self.natural_gradient()
        site = site if self.weight == 1.0 else fields.scale(site, self.weight)
        return site if self.total is None else fields.add(self.total, site)

    def natural_gradient(self) -> Any:
        """The estimator's site from all recorded evaluations."""
        theta = torch.stack(self.theta)
        grads = [torch.zeros_like(theta[0]) if grad is None else grad for grad in self.grad]
        curvature = torch.stack([c for c in self.curvature if c is not None]) if self._has_curvature() else None
        grad = None if self.estimator.needs in LOSSES_ALONE else torch.stack(grads)
        loss = torch.stack(self.loss).to(theta.dtype)
        variations = torch.stack(self.variations).to(theta.dtype) if self.variations else None
        draws = Draws(self.noise, theta, loss, grad, curvature, variations)
        return self.estimator.natural_gradient(self.block.family, self.state, draws)

    def _has_curvature(self) -> bool:
        return all(c is not None for c in self.curvature)


def draw_noise(block: Block, mode: str, count: int, key: NoiseKey) -> Tensor:
    """K × P standardised noise: `count` draws, `count` antithetic pairs, or `count` times the median."""
    family = block.family
    key = key.at(parameter=block.index)
    if mode == "zero":
        like = torch.empty(count, *block.shape, dtype=block.dtype, device=block.device)
        return family.neutral_noise(like)
    drawn = family.noise(block.shape, count, key, dtype=block.dtype, device=block.device)
    if mode == "antithetic":
        return torch.stack([drawn, family.reflect(drawn)], 1).flatten(0, 1)
    return drawn


def draw_probes(block: Block, estimator: Estimator, count: int, key: NoiseKey) -> Tensor | None:
    """Random signs for Hessian-vector products: count × probes × P, or None where none are needed."""
    if estimator.needs != "hvp":
        return None
    probes: int = getattr(estimator, "probes", 1)
    key = key.at(parameter=block.index, draw=key.draw * probes)
    signs = noise("rademacher", tuple(block.shape), count * probes, key, dtype=block.dtype, device=block.device)
    return signs.reshape(count, probes, *block.shape)


def measure_draw(
    closure: Closure,
    views: Sequence[View],
    draw: int,
    product_with: Sequence[Tensor] | None = None,
    *,
    together: Callable[[Sequence[View]], Sequence[View]] = list,
) -> tuple[Tensor, list[Tensor]]:
    """Evaluate the closure at draw number `draw` of every view and record it.

    Args:
        closure: see `evaluation`.
        views: all blocks that take part.
        draw: which of the K draws.
        product_with: one vector per view; their product with the whole Hessian is returned.
        together: turns views into fewer that write the same weights.

    Returns:
        the loss, and one product per view (empty where none was asked).
    """
    for view in together(views):
        view.write(draw)
    params = [p for view in views for p in view.block.params]
    measured = evaluate(closure, params, _request(views, draw, product_with))
    for view, position in zip(views, _positions(views), strict=True):
        view.record(draw, measured, position)
    products: list[Tensor] = []
    if product_with is not None:
        last = measured.products[-1]
        products = [_present(last[at], view.block) for view, at in zip(views, _positions(views), strict=True)]
    return measured.loss, products


def measure_variations(
    closure: Closure, views: Sequence[View], replayed: Callable[[], AbstractContextManager[None]]
) -> None:
    """Losses at the variations of the draw just measured, for the views that need them, one after the other.

    `replayed` makes a context in which the model sees the random numbers that it saw at the draw.
    """
    params = [p for view in views for p in view.block.params]
    for view in views:
        if view.estimator.needs != "variations":
            continue
        theta, losses = view.theta[-1], []
        for varied in view.estimator.variations(view.block.family, theta):
            view.block.write(varied)
            with replayed():
                losses.append(evaluate(closure, params, Request(gradient=False)).loss)
        view.block.write(theta)
        view.variations.append(torch.stack(losses))


def measure_batched(closure: Batched, *sides: Sequence[View]) -> Tensor:
    """Evaluate all draws of all views in one batched pass, inside and outside alike; the first side's mean loss."""
    for view in sides[0]:
        if view.estimator.needs not in ("gradient", "loss") or (not closure.pairs and view.estimator.needs == "loss"):
            raise ValueError(
                f"closure: {type(closure).__name__} measures gradients alone, which does not do for "
                f"{type(view.estimator).__name__}; choose curvature='reparam', or use an ordinary closure."
            )
    stacks: dict[Parameter, Tensor] = {}
    for members in zip(*sides, strict=True):
        theta = torch.cat([view.points() for view in members])
        for view, rows in zip(members, theta.split([view.count for view in members]), strict=True):
            view.theta.extend(rows)
        parts = [members[0].block.split(row) for row in theta]
        for position, p in enumerate(members[0].block.params):
            stacks[p] = torch.stack([row[position] for row in parts])
    losses, grads = closure.evaluate(stacks)
    for members in zip(*sides, strict=True):
        start = 0
        for view in members:
            found = {p: None if g is None else g[start : start + view.count] for p, g in grads.items()}
            _record_batched(view, losses[start : start + view.count], found)
            start += view.count
    return losses[: sides[0][0].count].mean()


def _record_batched(view: View, losses: Tensor, grads: Mapping[Parameter, Tensor | None]) -> None:
    view.loss.extend(losses)
    for row in range(len(losses)):
        grad = view.block.gather([None if g is None else g[row] for g in map(grads.__getitem__, view.block.params)])
        view.grad.append(grad)
        view.curvature.append(_curvature_of_gradient(view, grad))


def dense_hessian(closure: Closure, views: Sequence[View], draw: int) -> Tensor:
    """The dense Hessian over all views' entries at draw number `draw` (small models)."""
    for view in views:
        view.block.write(view.points()[draw])
    params = [p for view in views for p in view.block.params]
    measured = evaluate(closure, params, Request(hessian={0: (list(range(len(params))), True)}))
    return measured.hessians[0]


def _request(views: Sequence[View], draw: int, product_with: Sequence[Tensor] | None) -> Request:
    vectors: list[list[Tensor]] = []
    probes = max((view.probes.shape[1] for view in views if view.probes is not None), default=0)
    for number in range(probes):
        vectors.append([part for view in views for part in _probe_parts(view, draw, number)])
    if product_with is not None:
        vectors.append([p for view, v in zip(views, product_with, strict=True) for p in view.block.split(v)])
    hessian = {
        position.start: (list(range(position.start, position.stop)), view.block.family.curvature == "dense")
        for view, position in zip(views, _positions(views), strict=True)
        if view.measures_hessian
    }
    gradient = any(view.estimator.needs not in LOSSES_ALONE for view in views)
    return Request(gradient=gradient or bool(vectors), vectors=vectors, hessian=hessian)


def _positions(views: Sequence[View]) -> list[slice]:
    """Where each view's parameters stand among those of all."""
    stops = list(itertools.accumulate(len(view.block.params) for view in views))
    return [slice(stop - len(view.block.params), stop) for stop, view in zip(stops, views, strict=True)]


def _probe_parts(view: View, draw: int, number: int) -> list[Tensor]:
    """The signs of one view; zeros for a view that needs none, so that its entries leave the product alone."""
    if view.probes is None or number >= view.probes.shape[1]:
        return [torch.zeros_like(p) for p in view.block.params]
    return view.block.split(view.probes[draw, number])


def _curvature_of_products(view: View, draw: int, products: Sequence[list[Tensor]]) -> Tensor:
    assert view.probes is not None
    dense = view.block.family.curvature == "dense"
    total: Tensor | None = None
    count = view.probes.shape[1]
    for number in range(count):
        product = _present(products[number], view.block)
        part = view.estimator.curvature_of_product(view.probes[draw, number], product, dense)
        total = part if total is None else total + part
    assert total is not None
    return total / count


def _curvature_of_gradient(view: View, grad: Tensor | None) -> Tensor | None:
    if grad is None:
        grad = torch.zeros(view.block.shape, dtype=view.block.dtype, device=view.block.device)
    return curvature_of_gradient(view.estimator, view.block.family, grad, view.block.group["ess"])


def _shaped(hessian: Tensor, block: Block) -> Tensor:
    hessian = hessian.to(block.dtype)
    return hessian if block.family.curvature == "dense" else hessian.reshape(block.shape)


def _present(parts: list[Any], block: Block) -> Tensor:
    value = block.gather(parts)
    assert value is not None
    return value
