"""Calling closures: gradients and curvatures of a mini-batch at given weights. No optimizer state, no update.

A closure returns the mean loss of its batch at the current weights. It may call `backward()` itself, or return
the loss with its graph; second derivatives need the latter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

Closure = Callable[[], Any]
ROWS_AT_ONCE = 256


class NonFiniteError(FloatingPointError):
    """A loss or a gradient was NaN or infinite; the weights and the posterior are as they were, unless `stepped`.

    `stepped` is true after a step in place (of a large model) that was taken but for some weights whose new numbers
    would not have been finite.

    Example:
        >>> import torch, expfam_poco as poco
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> opt = poco.IVON([weight], lr=0.1, ess=8.0)
        >>> try:
        ...     opt.step(lambda: (weight / 0.0).sum())
        ... except poco.NonFiniteError:
        ...     print(weight.data)
        tensor([0., 0.])
    """

    loss: Tensor = torch.tensor(float("nan"))
    stepped: bool = False


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


def evaluate(closure: Closure, params: Sequence[Parameter], request: Request) -> Measured:
    """Call the closure at the current weights and measure what was requested.

    Raises:
        TypeError: if the closure does not return a scalar loss, or has none to differentiate.
        NonFiniteError: if the loss or a gradient is NaN or infinite.
    """
    loss, by_closure = _call(closure, params)
    called_backward = any(grad is not None for grad in by_closure)
    value = _finite_loss(loss)
    if not request.gradient:
        return Measured(value, [None] * len(params), [], {})
    if called_backward:
        if request.second_order:
            raise TypeError(
                "closure: this curvature or anchor estimator differentiates the gradient again; return the loss "
                "without calling backward()."
            )
        grads = by_closure
    else:
        grads = _differentiate(loss, params, create_graph=request.second_order)
    products = [hessian_product(grads, params, vectors) for vectors in request.vectors]
    hessians = {key: _hessian_block(grads, params, *asked) for key, asked in request.hessian.items()}
    detached = [None if grad is None else _dense(grad.detach()) for grad in grads]
    _require_finite(detached)
    _require_finite_curvature([*(part for product in products for part in product), *hessians.values()])
    return Measured(value, detached, products, hessians)


def _call(closure: Closure, params: Sequence[Parameter]) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and the gradients that the closure left; whatever happens, none stay on the parameters."""
    for p in params:
        p.grad = None
    try:
        with torch.enable_grad():
            loss = _checked_loss(closure())
        return loss, [p.grad for p in params]
    finally:
        for p in params:
            p.grad = None


def hessian_product(
    grads: Sequence[Tensor | None], params: Sequence[Parameter], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """∇²ℓ v over all parameters at once, from gradients that carry their graph."""
    pairs = [(g, v) for g, v in zip(grads, vectors, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return [torch.zeros_like(p) for p in params]
    with torch.enable_grad():
        inner = torch.stack([(g * v.to(g.dtype)).sum() for g, v in pairs]).sum()
    found = torch.autograd.grad(inner, list(params), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if f is None else f for p, f in zip(params, found, strict=True)]


def _hessian_block(
    grads: Sequence[Tensor | None], params: Sequence[Parameter], where: list[int], dense: bool
) -> Tensor:
    """The Hessian of the parameters at `where` (flat, d × d) or its diagonal (d), by batched products."""
    chosen = [params[i] for i in where]
    size = sum(p.numel() for p in chosen)
    like = chosen[0]
    with torch.enable_grad():
        parts = [grads[i] for i in where]
        flat = torch.cat([torch.zeros_like(p) if g is None else g for g, p in _zip(parts, chosen)])
    out = like.new_zeros((size, size) if dense else (size,))
    if not flat.requires_grad:
        return out
    for start in range(0, size, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, size)
        picks = torch.zeros(stop - start, size, dtype=like.dtype, device=like.device)
        picks[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        found = torch.autograd.grad(flat, chosen, picks, is_grads_batched=True, retain_graph=True, allow_unused=True)
        rows = torch.cat(
            [
                picks.new_zeros(stop - start, p.numel()) if f is None else f.reshape(stop - start, -1)
                for f, p in zip(found, chosen, strict=True)
            ],
            dim=1,
        )
        if dense:
            out[start:stop] = rows
        else:
            out[start:stop] = rows[torch.arange(stop - start), torch.arange(start, stop)]
    return out


def _zip(parts: list[Tensor | None], chosen: list[Parameter]) -> Iterator[tuple[Tensor | None, Tensor]]:
    for part, p in zip(parts, chosen, strict=True):
        yield (None if part is None else part.reshape(-1)), p.reshape(-1)


def _checked_loss(returned: Any) -> Tensor:
    if isinstance(returned, (int, float)):
        return torch.tensor(float(returned))
    if not isinstance(returned, Tensor) or returned.numel() != 1 or returned.is_complex():
        what = f"a tensor of shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else repr(returned)
        raise TypeError(f"closure: it returned {what}; return the mean loss of the batch as a real scalar.")
    return returned.reshape(())


def _differentiate(loss: Tensor, params: Sequence[Parameter], *, create_graph: bool) -> list[Tensor | None]:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("step: gradients cannot be taken inside torch.inference_mode(); call it outside.")
    if not loss.requires_grad:
        raise TypeError(
            "closure: its loss has no graph and no gradients were left on the parameters; return the loss of a "
            "model that uses this optimizer's parameters, or call backward() inside."
        )
    return list(torch.autograd.grad(loss, list(params), create_graph=create_graph, allow_unused=True))


def _finite_loss(loss: Tensor) -> Tensor:
    value = loss.detach()
    if not bool(torch.isfinite(value)):
        raise NonFiniteError(
            f"closure: its loss is {float(value)}; lower lr or the noise (raise ess), or check the batch for NaN. "
            "The weights and the posterior are as before the step."
        )
    return value


def _require_finite(grads: Sequence[Tensor | None]) -> None:
    sums = [grad.sum(dtype=torch.float32 if grad.dtype.itemsize < 4 else None) for grad in grads if grad is not None]
    if not sums or math.isfinite(sum(torch.stack(values).sum().item() for values in _by_device(sums))):
        return  # a NaN or infinity survives summing; finite numbers whose sum overflows are looked at one by one
    for position, grad in enumerate(grads):
        if grad is not None and not bool(torch.isfinite(grad).all()):
            raise NonFiniteError(
                f"closure: the gradient of parameter {position} has a NaN or infinite entry; lower lr or check the "
                "batch. The weights and the posterior are as before the step."
            )


def _dense(grad: Tensor) -> Tensor:
    """Sparse gradients (of embeddings) as what they stand for: rows without one move by the prior."""
    return grad if grad.layout == torch.strided else grad.to_dense()


def _by_device(values: Sequence[Tensor]) -> list[list[Tensor]]:
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


class RandomState(NamedTuple):
    """The states of torch's global generators, on the CPU and on the CUDA devices that hold parameters."""

    cpu: Tensor
    cuda: dict[int, Tensor]


def capture_random(params: Sequence[Parameter]) -> RandomState:
    """The generators' states now, to show a second evaluation the same dropout masks."""
    devices = {p.device.index or 0 for p in params if p.device.type == "cuda"}
    return RandomState(torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices})


@contextmanager
def replay_random(state: RandomState) -> Iterator[None]:
    """Run a block with the generators as they were, and put them back to the present afterwards."""
    now_cpu = torch.get_rng_state()
    now_cuda = {device: torch.cuda.get_rng_state(device) for device in state.cuda}
    _restore(state)
    try:
        yield
    finally:
        _restore(RandomState(now_cpu, now_cuda))


def _restore(state: RandomState) -> None:
    torch.set_rng_state(state.cpu)
    for device, value in state.cuda.items():
        torch.cuda.set_rng_state(value, device)
