"""Evaluates closures at the draws of trials, and hands these what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco.closures.batched import Batched
from expfam_poco.closures.evaluate import PLAIN_REQUEST, Closure, Measured, Request, evaluate, require_sound
from expfam_poco.closures.processes import Processes
from expfam_poco.engine.block import Block
from expfam_poco.engine.trial import Trial
from expfam_poco.family.draws import LOSSES_ALONE


def measure_draw(
    closure: Closure,
    trials: Sequence[Trial],
    draw: int,
    product_with: Sequence[Tensor] | None = None,
    *,
    check: bool = True,
    processes: Processes | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Evaluate the closure at draw number `draw` of every trial and record it.

    Args:
        closure: see `closures.evaluate`.
        trials: all blocks that take part.
        draw: which of the K draws.
        product_with: one vector per trial; their product with the whole Hessian is returned.
        check: look for NaN and infinity at once.
        processes: over which the evaluation is averaged.

    Returns:
        the loss, and one product per trial (empty where none was asked).
    """
    params, places = list[Parameter](), list[slice]()
    for trial in trials:
        trial.write(draw)
        params += trial.block.params
        places.append(slice(len(params) - len(trial.block.params), len(params)))
    measured = evaluate_together(processes, closure, params, _request(trials, places, draw, product_with), check=False)
    gathered: list[Tensor | None] = []
    for trial, place in zip(trials, places, strict=True):
        gathered += trial.record(draw, measured, place)
    if check:
        require_sound(measured, gathered=gathered)
    products: list[Tensor] = []
    if product_with is not None:
        last = measured.products[-1]
        products = [_present(last[place], trial.block) for trial, place in zip(trials, places, strict=True)]
    return measured.loss, products


def evaluate_together(
    processes: Processes | None, closure: Closure, params: Sequence[Parameter], request: Request, *, check: bool = True
) -> Measured:
    """One evaluation, averaged over the processes where there are several."""
    if processes is None:
        return evaluate(closure, params, request, check=check)
    return processes.average(lambda: evaluate(closure, params, request, check=check), params, request)


def measure_variations(
    closure: Closure,
    trials: Sequence[Trial],
    draw: int,
    replayed: Callable[[], AbstractContextManager[None]],
    processes: Processes | None = None,
) -> None:
    """Losses at the variations of the draw just measured, for the trials that need them, one after the other.

    `replayed` makes a context in which the model sees the random numbers that it saw at the draw.
    """
    params = params_of(trials)
    for trial in trials:
        if trial.estimator.needs != "variations":
            continue
        theta, losses = trial.points()[draw], []
        for varied in trial.estimator.variations(trial.block.family, theta):
            trial.block.write(varied)
            with replayed():
                losses.append(evaluate_together(processes, closure, params, Request(gradient=False)).loss)
        trial.block.write(theta)
        trial.variations.append(trial.signed(torch.stack(losses)))


def measure_batched(closure: Batched, *sides: Sequence[Trial]) -> Tensor:
    """Evaluate all draws of all trials in one batched pass, on all sides alike; the first side's mean loss."""
    for trial in sides[0]:
        if trial.estimator.needs not in ("gradient", "loss") or (not closure.pairs and trial.estimator.needs == "loss"):
            raise ValueError(
                f"closure: {type(closure).__name__} measures gradients alone, which does not do for "
                f"{type(trial.estimator).__name__}; choose curvature='reparam', or use an ordinary closure."
            )
    stacks: dict[Parameter, Tensor] = {}
    for members in zip(*sides, strict=True):
        theta = torch.cat([trial.points() for trial in members])
        parts = [members[0].block.split(row) for row in theta]
        for position, p in enumerate(members[0].block.params):
            stacks[p] = torch.stack([row[position] for row in parts])
    losses, grads = closure.evaluate(stacks)
    for members in zip(*sides, strict=True):
        start = 0
        for trial in members:
            found = [grads[p] for p in trial.block.params]
            rows = range(start, start + trial.count)
            trial.record_rows(
                losses[rows.start : rows.stop], [[None if g is None else g[k] for g in found] for k in rows]
            )
            start += trial.count
    return losses[: sides[0][0].count].mean()


def dense_hessian(closure: Closure, trials: Sequence[Trial], draw: int) -> Tensor:
    """The dense Hessian over all trials' entries at draw number `draw` (small models)."""
    for trial in trials:
        trial.block.write(trial.points()[draw])
    params = params_of(trials)
    measured = evaluate(closure, params, Request(hessian={0: (list(range(len(params))), True)}))
    return measured.hessians[0]


def params_of(trials: Sequence[Trial]) -> list[Parameter]:
    """The parameters of all blocks."""
    return [p for trial in trials for p in trial.block.params]


def _request(
    trials: Sequence[Trial], places: Sequence[slice], draw: int, product_with: Sequence[Tensor] | None
) -> Request:
    """What the trials need, whose parameters stand at these places among all."""
    needs = {trial.estimator.needs for trial in trials}
    if needs == {"gradient"} and product_with is None:
        return PLAIN_REQUEST
    vectors: list[list[Tensor]] = []
    signs = [trial.signs(draw) for trial in trials]
    for number in range(max((len(own) for own in signs if own is not None), default=0)):
        vectors.append(
            [part for trial, own in zip(trials, signs, strict=True) for part in _sign_parts(trial, own, number)]
        )
    if product_with is not None:
        vectors.append([p for trial, v in zip(trials, product_with, strict=True) for p in trial.block.split(v)])
    hessian = {
        position.start: (list(range(position.start, position.stop)), trial.block.family.curvature == "dense")
        for trial, position in zip(trials, places, strict=True)
        if trial.measures_hessian
    }
    gradient = bool(needs - set(LOSSES_ALONE))
    return Request(gradient=gradient or bool(vectors), vectors=vectors, hessian=hessian)


def _sign_parts(trial: Trial, signs: Tensor | None, number: int) -> list[Tensor]:
    """The signs of one trial; zeros for a trial that needs none, so that its entries leave the product alone."""
    if signs is None or number >= len(signs):
        return [torch.zeros_like(p) for p in trial.block.params]
    return trial.block.split(signs[number])


def _present(parts: list[Any], block: Block) -> Tensor:
    value = block.gather(parts)
    assert value is not None
    return value
