"""Calling closures: gradients and curvatures of a mini-batch at given weights. No optimizer state, no update.

A closure returns the mean loss of its batch at the current weights. It may call `backward()` itself, or return
the loss with its graph; second derivatives need the latter. `Accumulated` closures stand for one batch in parts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco.arguments import flag, is_real, listed, number, shown
from expfam_poco.closures.batched import Batched
from expfam_poco.closures.caches import forget_weights
from expfam_poco.closures.fp16 import Scaling
from expfam_poco.closures.hessians import hessian_block, hessian_product
from expfam_poco.closures.shards import any_spread, gradients, is_spread, made, own_parts
from expfam_poco.errors import NonFiniteError

Closure = Callable[[], Any]


class Measured(NamedTuple):
    """One evaluation: the loss, a gradient per parameter (None: unused), and what else was requested, by its key."""

    loss: Tensor
    grads: list[Tensor | None]
    products: list[list[Tensor]]
    hessians: dict[int, Tensor]


class Request(NamedTuple):
    """What an evaluation measures beside the loss.

    `gradient`: any gradients at all. `vectors`: lists of one vector per parameter, each for one product with the
    Hessian of the whole. `hessian`: groups of parameter positions, by any key, each with True for its dense block,
    False for its diagonal.
    """

    gradient: bool = True
    vectors: Sequence[Sequence[Tensor]] = ()
    hessian: Mapping[int, tuple[list[int], bool]] = MappingProxyType({})

    @property
    def second_order(self) -> bool:
        """Whether the loss must come with its graph."""
        return len(self.vectors) > 0 or len(self.hessian) > 0


PLAIN_REQUEST = Request()


class NoBatchError(ValueError):
    """This process has no part of the batch, which is right where others have."""


def no_batch() -> Any:
    """The closure of an empty list of closures."""
    raise NoBatchError(
        "closures: give a list of functions, at least one; an empty list is for one of several processes that has no "
        "batch now."
    )


@dataclass(frozen=True)
class Accumulated:
    """Closures of micro-batches that are evaluated, at the same weights, as one batch of their weighted mean loss.

    `shares` sum to 1. With `scaling`, gradients are taken of the scaled loss and unscaled (fp16).
    """

    closures: Sequence[Closure]
    shares: Sequence[float]
    scaling: Scaling | None = None

    def __call__(self) -> Any:
        """Not a function: `evaluate` calls the parts one by one."""
        raise TypeError("Accumulated closures are evaluated by the optimizer.")


def evaluate(
    closure: Closure, params: Sequence[Parameter], request: Request = PLAIN_REQUEST, *, check: bool = True
) -> Measured:
    """Call the closure at the current weights and measure what was requested.

    Args:
        closure: returns the loss, or is `Accumulated`.
        params: what to differentiate by.
        request: what to measure; gradients alone unless told.
        check: look for NaN and infinity at once; otherwise it is the caller's part (see `require_sound`).

    Raises:
        TypeError: if the closure does not return a scalar loss, or has none to differentiate.
        NonFiniteError: if the loss or a gradient is NaN or infinite.
    """
    if not isinstance(closure, Accumulated):
        return _evaluate(closure, params, request, check)
    total: Measured | None = None
    for part, share in zip(closure.closures, closure.shares, strict=True):
        if closure.scaling is None:
            measured = _evaluate(part, params, request, check)
        else:
            measured = _evaluate_scaled(part, params, request, closure.scaling)
        if len(closure.closures) == 1:
            return measured
        total = _accumulate(total, measured, share)
    assert total is not None
    return total


def _accumulate(total: Measured | None, part: Measured, share: float) -> Measured:
    """total + share · part, sums of gradients in float32 at least."""

    def weighed(value: Tensor) -> Tensor:
        return value.to(torch.promote_types(value.dtype, torch.float32)).mul(share)

    def add(old: Tensor | None, new: Tensor | None) -> Tensor | None:
        if new is None:
            return old
        return weighed(new) if old is None else old.add_(new, alpha=share)

    if total is None:
        grads = [add(None, new) for new in part.grads]
        products = [[weighed(new) for new in news] for news in part.products]
        hessians = {key: weighed(value) for key, value in part.hessians.items()}
        return Measured(share * part.loss, grads, products, hessians)
    grads = [add(old, new) for old, new in zip(total.grads, part.grads, strict=True)]
    products = [
        [_present(add(old, new)) for old, new in zip(olds, news, strict=True)]
        for olds, news in zip(total.products, part.products, strict=True)
    ]
    hessians = {key: _present(add(total.hessians.get(key), value)) for key, value in part.hessians.items()}
    return Measured(total.loss + share * part.loss, grads, products, hessians)


def _present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _evaluate_scaled(closure: Closure, params: Sequence[Parameter], request: Request, scaling: Scaling) -> Measured:
    """Gradients by way of the scaled loss, in the range of fp16."""
    if request.second_order:
        raise TypeError(
            "scaler: this curvature or anchor estimator differentiates twice, which loss scaling does not cover; use "
            "curvature='reparam' or 'gradsq', or bfloat16 without a scaler."
        )
    if not request.gradient:
        raise TypeError(
            "scaler: this estimator takes no gradients, so there is nothing to scale; leave the scaler out."
        )
    loss, by_closure = _call(closure, params)
    value = loss.detach()
    if by_closure is None:
        by_closure = _differentiate(scaling.scale(loss), params, create_graph=False)
    grads = scaling.unscale(params, _plain(by_closure))
    require_finite(grads)
    _require_finite_loss(value)
    return Measured(value, grads, [], {})


def _evaluate(closure: Closure, params: Sequence[Parameter], request: Request, check: bool) -> Measured:
    loss, by_closure = _call(closure, params)
    value = loss.detach()
    if check and (value.is_cpu or not request.gradient):
        _require_finite_loss(value)  # elsewhere it is looked at with the gradients, to wait for the device only once
    if not request.gradient:
        forget_weights()  # what a backward pass would have dropped
        return Measured(value, [None] * len(params), [], {})
    again = request.second_order
    if by_closure is not None:
        if again:
            raise TypeError(
                "closure: this curvature or anchor estimator differentiates the gradient again; return the loss "
                "without calling backward()."
            )
        grads = by_closure
    else:
        grads = _differentiate(loss, params, create_graph=again)
    products = [hessian_product(grads, params, vectors) for vectors in request.vectors]
    hessians = {key: hessian_block(grads, params, *asked) for key, asked in request.hessian.items()}
    measured = Measured(value, _plain(grads), products, hessians)
    if check:
        require_sound(measured, loss=not value.is_cpu)
    return measured


def require_sound(measured: Measured, *, loss: bool = True, gathered: Sequence[Tensor | None] | None = None) -> None:
    """Raise a `NonFiniteError` where an evaluation has a NaN or infinity.

    Args:
        measured: the evaluation.
        loss: look at its loss, too.
        gathered: the gradients in fewer tensors, which are looked at first.
    """
    grads = measured.grads if gathered is None else gathered
    if not _adds_up([measured.loss, *grads] if loss else grads):
        if loss:
            _require_finite_loss(measured.loss)
        _require_finite_each(measured.grads)
    curvature = [*(part for product in measured.products for part in product), *measured.hessians.values()]
    if curvature and not _adds_up(curvature):
        _require_finite_curvature(curvature)


def _plain(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients as numbers: without graphs, and dense, for rows of an embedding without one move by the prior."""
    plain: list[Tensor | None] = []
    for grad in grads:
        value = grad.detach() if grad is not None and grad.requires_grad else grad
        plain.append(value if value is None or value.layout is torch.strided else value.to_dense())
    return plain


def _call(closure: Closure, params: Sequence[Parameter]) -> tuple[Tensor, list[Tensor | None] | None]:
    """The loss, and the gradients if the closure left any; whatever happens, none stay on the parameters."""
    for p in params:
        p.grad = None
    forget_weights()
    try:
        with torch.enable_grad():
            loss = _checked_loss(closure())
        left = [p.grad for p in params]
        forget_weights(gathered=False)
        return loss, own_parts(left, params) if any([grad is not None for grad in left]) else None
    except BaseException:
        forget_weights()
        raise
    finally:
        for p in params:
            p.grad = None


def is_evaluating(params: Sequence[Parameter]) -> bool:
    """Whether we are inside of a closure that is being evaluated for some of these parameters."""
    ours, frame = set(map(id, params)), sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        own = _CALLS.get(frame.f_code)
        if own is not None and any(id(p) in ours for p in frame.f_locals[own]):
            return True
    return False


# Who calls closures, and the argument that holds the parameters.
_CALLS = {_call.__code__: "params", Batched.evaluate.__code__: "stacks"}


def _checked_loss(returned: Any) -> Tensor:
    if not isinstance(returned, Tensor) and is_real(returned):
        return torch.tensor(float(returned))
    if not isinstance(returned, Tensor) or returned.numel() != 1 or returned.is_complex():
        what = f"a tensor of shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else shown(returned)
        raise TypeError(f"closure: it returned {what}; return the mean loss of the batch as a real scalar.")
    if type(returned) is not Tensor and is_spread(returned):
        returned = returned.full_tensor()  # type: ignore[attr-defined]
    return returned.reshape(()) if returned.ndim else returned


def _differentiate(loss: Tensor, params: Sequence[Parameter], *, create_graph: bool) -> list[Tensor | None]:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("step: gradients cannot be taken inside torch.inference_mode(); call it outside.")
    if not loss.requires_grad:
        raise TypeError(
            "closure: its loss has no graph and no gradients were left on the parameters; return the loss of a "
            "model that uses this optimizer's parameters, or call backward() inside."
        )
    if made and any_spread(params):
        if create_graph:
            raise ValueError(
                "curvature: second derivatives cannot be taken where parameters are spread over processes "
                "(fully_shard, DTensor); use 'reparam' or 'gradsq' in all groups."
            )
        return gradients(loss, params)
    return list(torch.autograd.grad(loss, list(params), create_graph=create_graph, allow_unused=True))


def _require_finite_loss(value: Tensor) -> None:
    if not math.isfinite(value.item()):
        raise NonFiniteError(
            f"closure: its loss is {float(value)}; lower lr or the noise (raise ess), or check the batch for NaN. "
            "The weights and the posterior are as before the step."
        )


def require_finite(grads: Sequence[Tensor | None]) -> None:
    """Raise a `NonFiniteError` that names the first gradient with a NaN or infinity."""
    if not _adds_up(grads):
        _require_finite_each(grads)


def _adds_up(values: Sequence[Tensor | None]) -> bool:
    """Whether the sum of everything is finite, which a NaN or infinity never is; an accelerator is waited for once.

    The sum of finite numbers may overflow, so that False only means that each must be looked at.
    """
    total, elsewhere = 0.0, list[Tensor]()
    for value in values:
        if value is not None:
            part = value
            if value.ndim:
                part = value.sum() if value.dtype.itemsize >= 4 else value.sum(dtype=torch.float32)
            if part.is_cpu:
                total += part.item()
            else:
                elsewhere.append(part)
    for parts in by_device(elsewhere):
        total += torch.stack(parts).sum().item()
    return math.isfinite(total)


def _require_finite_each(grads: Sequence[Tensor | None]) -> None:
    for position, grad in enumerate(grads):
        if grad is not None and not bool(torch.isfinite(grad).all()):
            raise NonFiniteError(
                f"closure: the gradient of parameter {position} has a NaN or infinite entry; lower lr or check the "
                "batch. The weights and the posterior are as before the step."
            )


def by_device(values: Sequence[Tensor]) -> list[list[Tensor]]:
    """The values in groups of one device and dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for value in values:
        found.setdefault((value.device, value.dtype), []).append(value)
    return list(found.values())


def _require_finite_curvature(values: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise NonFiniteError(
            "closure: a second derivative of its loss is NaN or infinite; use a curvature made of gradients alone, or "
            "check the model for functions without one. The weights and the posterior are as before the step."
        )


def functions_of(closures: Any, name: str = "closures") -> list[Closure]:
    """One function or several, as a list."""
    remedy = "give a list of functions, one for each chunk, at least one"
    found = [closures] if callable(closures) else listed(name, closures, remedy)
    wrong = [each for each in found if not callable(each)]
    if wrong or not found:
        raise ValueError(f"{name}: {remedy}{f', not {shown(wrong[0])}' if wrong else ''}.")
    return found


def check_chunks(closures: Sequence[Closure], weights: Sequence[float] | None) -> tuple[list[Closure], list[float]]:
    """The chunks of a batch as a list, and their shares of it (summing to 1)."""
    closures = functions_of(closures)
    remedy = f"give one positive number (of examples) for each of the {len(closures)} closures"
    given = [1.0] * len(closures) if weights is None else listed("weights", weights, remedy)
    values = [number("weights", value, lambda v: 0.0 < v < math.inf, remedy) for value in given]
    if len(values) != len(closures):
        raise ValueError(f"weights={shown(weights)}: {remedy}.")
    total = sum(values)
    return closures, [value / total for value in values]


def unused_error() -> Exception:
    """The error for a batch that depends on nothing that is optimised."""
    return ValueError(
        "closure: its loss depends on none of this optimizer's trainable parameters; give it the model that the "
        "optimizer was made for."
    )


def parts_of(
    closure: Any, weights: Sequence[float] | None, *, fresh_noise: bool = False, scaler: Any = None
) -> list[tuple[Closure, float]]:
    """What one step evaluates, and the shares: one closure for all micro-batches, or several with noise of their own.

    Raises:
        TypeError: without a closure: the loss must be evaluated at weights chosen by the optimizer.
    """
    flag("fresh_noise", fresh_noise)
    if callable(closure) and weights is None and scaler is None and not fresh_noise:
        return [(closure, 1.0)]
    if closure is None or not (callable(closure) or isinstance(closure, list | tuple)):
        raise TypeError(
            f"closure={shown(closure)}: step() evaluates the loss itself; call step(closure) with a function that "
            "returns the mini-batch's mean loss, or with a list of such functions."
        )
    if not callable(closure) and not closure and not weights:
        return [(no_batch, 1.0)]
    if weights is not None and callable(closure):
        raise ValueError("weights: they are for a list of closures; leave them out for one closure.")
    closures, shares = check_chunks(closure, weights)
    scaling = None if scaler is None else Scaling(scaler)
    batched = [part for part in closures if isinstance(part, Batched)]
    if batched and (len(closures) > 1 or scaling is not None):
        raise TypeError(
            f"closure: {type(batched[0]).__name__} can be neither accumulated nor scaled; give one with all examples, "
            "or ordinary closures."
        )
    if fresh_noise:
        pairs = zip(closures, shares, strict=True)
        return [(c if scaling is None else Accumulated([c], [1.0], scaling), share) for c, share in pairs]
    if len(closures) == 1 and scaling is None:
        return [(closures[0], 1.0)]
    return [(Accumulated(closures, shares, scaling), 1.0)]
