"""Where a posterior begins, and what pulls at it: the start and the prior of a block, with their checks."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from expfam_poco.engine.block import Block, new_record
from expfam_poco.family.base import ExponentialFamily


def initial_posterior(block: Block) -> Any:
    """q centred at the model's weights, of precision ess·(hess_init + weight_decay) or the family's own.

    Raises:
        ValueError: where finite weights are outside the support, or no centre of a member.
    """
    block.fit()  # the model may have moved
    settings, strength = block.settings, None
    if settings.hess_init is not None:
        strength = settings.ess * (settings.hess_init + settings.weight_decay)
    weights, family = block.read(), block.family
    finite = bool(torch.isfinite(weights).all())
    if finite and not family.event_dim:  # rows of a simplex, or unit vectors, are so up to rounding: see below
        _check_support(block, weights)
    try:
        state = family.centred_at(weights, strength)
    except Exception:
        if finite:
            _check_support(block, weights)
        raise
    check_point(block, state, weights)
    if finite and not (bool(family.in_domain(state)) and _is_centre(family, state, weights)):
        _check_support(block, weights)
        raise ValueError(
            f"params: {block.name!r} holds weights on which no {type(family).__name__} can be centred "
            f"(smallest {float(weights.min()):.3g}); initialise it inside the support, {family.support}."
        )
    return state


def _check_support(block: Block, weights: Tensor) -> None:
    """Refuse weights where the density is zero; those of few values are rounded to them, and means of integers pass.

    Raises:
        ValueError: names the parameter, a weight, the support and what to do.
    """
    family, bound = block.family, block.family.support
    around = (getattr(bound, "lower_bound", None), getattr(bound, "upper_bound", None)) == (-math.pi, math.pi)
    if family.levels is not None or around:  # angles come round
        return
    if bound.is_discrete:  # a parameter is the mean of integers
        low, high = getattr(bound, "lower_bound", None), getattr(bound, "upper_bound", None)
        inside = torch.ones_like(weights, dtype=torch.bool)
        inside = inside if low is None else inside & (weights >= low)
        inside = inside if high is None else inside & (weights <= high)
    else:
        inside = bound.check(weights)
    if bool(inside.all()):
        return
    first = weights.reshape(-1, *weights.shape[inside.ndim :])[~inside.flatten()][0]
    shown = f"{float(first):.3g}" if first.ndim == 0 else str([round(v, 3) for v in first.flatten()[:4].tolist()])
    raise ValueError(
        f"params: {block.name!r} holds {shown}, which is outside the support of {type(family).__name__}, {bound}; "
        "initialise it inside, for example with family.reference_like(weights), or choose another family."
    )


def check_point(block: Block, state: Any, weights: Tensor) -> None:
    """Refuse to put one and the same point in place of weights that differ.

    Raises:
        ValueError: says what the point is, and what to do with the weights.
    """
    family, point = block.family, block.family.point(state)
    if family.levels is not None or not point.numel() or torch.equal(point, weights):
        return
    first = point.flatten()[0]
    deaf = False
    if family.event_dim == 0 and not family.support.is_discrete and bool((point == first).all()):
        elsewhere = family.point(family.centred_at(family.reference_like(weights)))
        deaf = torch.equal(elsewhere, point) and not torch.allclose(point, weights, rtol=0.02, atol=0.02)
    if family.fixed_point or deaf:
        raise ValueError(
            f"params: the posterior of {block.name!r} ({type(family).__name__}) has its point at {float(first):.3g} "
            "whatever the weights are, and would erase them; write the model's weights as a constant plus this "
            "parameter, started at that point, or use another family."
        )


class Beginning:
    """A block's first posterior, which becomes its record's; until a step or refresh has succeeded, it can be undone.

    Only a point that differs from the weights (±1, levels) makes a difference: others' weights are as they were.

    Args:
        block: without a posterior.
        state: the optimizer's, where the record is kept.
    """

    def __init__(self, block: Block, state: MutableMapping[Any, Any]) -> None:
        self.block, self._state = block, state
        block.record["posterior"] = posterior = initial_posterior(block)
        block.provisional = False
        state[block.params[0]] = block.record
        block.note_weights()
        point = block.split(block.family.point(posterior))
        same = all(torch.equal(a, b) for a, b in zip(point, block.tensors, strict=True))
        self._weights = None if same else [p.detach().clone() for p in block.tensors]

    @property
    def is_elsewhere(self) -> bool:
        """Whether the point is another than the weights that were there."""
        return self._weights is not None

    def undo(self) -> None:
        """Give back the weights, where the posterior's point is another, and forget the posterior."""
        if self._weights is None:
            return
        block = self.block
        with torch.no_grad():
            for p, before in zip(block.tensors, self._weights, strict=True):
                p.copy_(before)
        self._state.pop(block.params[0], None)
        block.record = new_record(None)
        block.forget_weights()


def _is_centre(family: ExponentialFamily, state: Any, weights: Tensor) -> bool:
    """Whether a weight of several numbers is where its posterior is centred: rows of a simplex have to sum to one."""
    if not family.event_dim or family.levels is not None or family.default_estimator != "reparam":
        return True
    return torch.allclose(family.point(state), weights, rtol=0.02, atol=0.02)


def check_device(block: Block, posterior: Any) -> None:
    """Refuse a block whose parameters have moved to another device than their posterior.

    Raises:
        RuntimeError: names the parameter and both devices.
    """
    where = posterior[0].device
    if where != block.device:
        raise RuntimeError(
            f"params: {block.name!r} is on {block.device} but its posterior on {where}; move the model before the "
            "first step, or call optimizer.load_state_dict(optimizer.state_dict()) after moving it."
        )


def prior_of(block: Block) -> Any:
    """The block's prior: the given State, or precision ess·weight_decay around the middle of the support."""
    prior, dtype, device = block.settings.prior, block.dtype, block.device
    if isinstance(prior, dict):
        prior = prior.get(block.name)
    if prior is not None:
        return type(prior)(*(block.part_of(v).to(device=device, dtype=dtype) for v in prior))
    key = (block.family, block.settings.ess * block.settings.weight_decay, dtype, device)
    if block.known_prior is None or block.known_prior[0] != key:
        event = block.family.event_dim
        shape = block.shape[len(block.shape) - event :] if event else ()
        middle = block.family.reference_like(torch.zeros(shape, dtype=dtype, device=device))
        block.known_prior = key, block.family.centred_at(middle, key[1])
    return block.known_prior[1]


def check_prior(block: Block, prior: Any) -> None:
    """Refuse a group's prior of another type, of a shape that does not broadcast to the block, or with NaN."""
    if isinstance(prior, dict):
        prior = prior.get(block.name)
    if prior is None:
        return
    family = block.family
    if not isinstance(prior, family.State):
        raise ValueError(
            f"prior={type(prior).__name__}: {type(family).__name__} needs a prior of type "
            f"{family.State.__name__} (or a dictionary of them by parameter name)."
        )
    own = family.centred_at(family.reference_like(torch.zeros(block.shape, dtype=block.dtype, device=block.device)))
    for name, value, reference in zip(prior._fields, prior, own, strict=True):
        try:
            value = block.part_of(value)
            fits = torch.broadcast_shapes(value.shape, reference.shape) == reference.shape
        except RuntimeError:
            fits = False
        if not fits or not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"prior.{name} has shape {tuple(value.shape)} for a block {block.name!r} of shape "
                f"{tuple(reference.shape)}, or holds NaN or infinities; give finite values that broadcast to it."
            )
