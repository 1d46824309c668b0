"""Evaluates closures at the draws of trials, and hands these what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco.closures.batched import Batched
from expfam_poco.closures.evaluate import Closure, Request, evaluate
from expfam_poco.engine.block import Block
from expfam_poco.engine.trial import Trial
from expfam_poco.family.draws import LOSSES_ALONE


def measure_draw(
    closure: Closure,
    views: Sequence[Trial],
    draw: int,
    product_with: Sequence[Tensor] | None = None,
    *,
    together: Callable[[Sequence[Trial]], Sequence[Trial]] = list,
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
    closure: Closure, views: Sequence[Trial], draw: int, replayed: Callable[[], AbstractContextManager[None]]
) -> None:
    """Losses at the variations of the draw just measured, for the views that need them, one after the other.

    `replayed` makes a context in which the model sees the random numbers that it saw at the draw.
    """
    params = [p for view in views for p in view.block.params]
    for view in views:
        if view.estimator.needs != "variations":
            continue
        theta, losses = view.points()[draw], []
        for varied in view.estimator.variations(view.block.family, theta):
            view.block.write(varied)
            with replayed():
                losses.append(evaluate(closure, params, Request(gradient=False)).loss)
        view.block.write(theta)
        view.variations.append(torch.stack(losses))


def measure_batched(closure: Batched, *sides: Sequence[Trial]) -> Tensor:
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


def _record_batched(view: Trial, losses: Tensor, grads: Mapping[Parameter, Tensor | None]) -> None:
    view.loss.extend(losses)
    for row in range(len(losses)):
        grad = view.block.gather([None if g is None else g[row] for g in map(grads.__getitem__, view.block.params)])
        view.grad.append(grad)
        view.record_pair(grad)


def dense_hessian(closure: Closure, views: Sequence[Trial], draw: int) -> Tensor:
    """The dense Hessian over all views' entries at draw number `draw` (small models)."""
    for view in views:
        view.block.write(view.points()[draw])
    params = [p for view in views for p in view.block.params]
    measured = evaluate(closure, params, Request(hessian={0: (list(range(len(params))), True)}))
    return measured.hessians[0]


def _request(views: Sequence[Trial], draw: int, product_with: Sequence[Tensor] | None) -> Request:
    vectors: list[list[Tensor]] = []
    signs = [view.probes(draw) for view in views]
    for number in range(max((len(own) for own in signs if own is not None), default=0)):
        vectors.append(
            [part for view, own in zip(views, signs, strict=True) for part in _probe_parts(view, own, number)]
        )
    if product_with is not None:
        vectors.append([p for view, v in zip(views, product_with, strict=True) for p in view.block.split(v)])
    hessian = {
        position.start: (list(range(position.start, position.stop)), view.block.family.curvature == "dense")
        for view, position in zip(views, _positions(views), strict=True)
        if view.measures_hessian
    }
    gradient = any(view.estimator.needs not in LOSSES_ALONE for view in views)
    return Request(gradient=gradient or bool(vectors), vectors=vectors, hessian=hessian)


def _positions(views: Sequence[Trial]) -> list[slice]:
    """Where each view's parameters stand among those of all."""
    stops = list(itertools.accumulate(len(view.block.params) for view in views))
    return [slice(stop - len(view.block.params), stop) for stop, view in zip(stops, views, strict=True)]


def _probe_parts(view: Trial, signs: Tensor | None, number: int) -> list[Tensor]:
    """The signs of one view; zeros for a view that needs none, so that its entries leave the product alone."""
    if signs is None or number >= len(signs):
        return [torch.zeros_like(p) for p in view.block.params]
    return view.block.split(signs[number])


def _present(parts: list[Any], block: Block) -> Tensor:
    value = block.gather(parts)
    assert value is not None
    return value
