"""Loss scaling for fp16 through torch's GradScaler, whose own `step` refuses closures."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco.errors import NonFiniteError


class ScaledOverflow(NonFiniteError):
    """A scaled gradient overflowed: the step is skipped, and the scaler will lower its scale."""


class _Evaluation:
    """What a GradScaler takes for an optimizer: the gradients of one evaluation, and a step that says it was taken."""

    def __init__(self, params: Sequence[Parameter]) -> None:
        self.param_groups = [{"params": list(params)}]

    def step(self) -> bool:
        return True


# A scaler knows an evaluation by its id until update(): they must live as long.
_alive: weakref.WeakKeyDictionary[Any, list[_Evaluation]] = weakref.WeakKeyDictionary()


def owned(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same gradients, fit to be changed in place: autograd may give one tensor for several parameters."""
    seen: set[int] = set()
    result: list[Tensor | None] = []
    for grad in grads:
        if grad is not None and grad.layout == torch.strided:
            shared = grad.untyped_storage().data_ptr() in seen or not grad.is_contiguous()
            grad = grad.clone(memory_format=torch.contiguous_format) if shared else grad
            seen.add(grad.untyped_storage().data_ptr())
        result.append(grad)
    return result


class Scaling:
    """One step's use of a scaler: every evaluation is unscaled, and checked, by the scaler itself.

    Args:
        scaler: a `torch.amp.GradScaler`; `scaler.update()` stays the training loop's business.
    """

    def __init__(self, scaler: Any) -> None:
        missing = [name for name in ("scale", "unscale_", "step", "update") if not hasattr(scaler, name)]
        if missing:
            raise TypeError(f"scaler={type(scaler).__name__}: it has no {missing[0]}(); give a torch.amp.GradScaler.")
        self._scaler = scaler

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        with torch.enable_grad():
            scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale(self, params: Sequence[Parameter], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients divided by the scale; the scaler takes note of overflows.

        Raises:
            ScaledOverflow: if a gradient is infinite or NaN.
        """
        evaluation = _Evaluation(params)
        # After an update the scaler has forgotten all of them.
        known = getattr(self._scaler, "_per_optimizer_states", {})
        _alive[self._scaler] = [*(old for old in _alive.get(self._scaler, []) if id(old) in known), evaluation]
        if all(grad is None for grad in grads):
            return list(grads)
        for p, grad in zip(params, owned(grads), strict=True):
            p.grad = grad
        try:
            self._scaler.unscale_(evaluation)
            sound = self._scaler.step(evaluation)
            unscaled = [p.grad for p in params]
        finally:
            for p in params:
                p.grad = None
        if sound is None:
            raise ScaledOverflow(
                "scaler: a scaled gradient is infinite or NaN; call scaler.update(), which lowers the scale, and go on."
            )
        return unscaled
