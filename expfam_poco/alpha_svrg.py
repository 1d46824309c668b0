"""α-SVRG over any torch optimizer: corrected gradients for SGD, AdamW, … before their moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import correction
from .checkpoint import CheckpointError
from .evaluation import Closure, Request, capture_random, evaluate, replay_random
from .family import Theta
from .posterior import check_chunks


class AlphaSVRG(torch.optim.Optimizer):
    """α-SVRG (Yin et al. 2025), the isotropic case of PC Eq. 18 without noise, handing its gradient to `base`.

        g = ∇ℓ_B(θ) − α (∇ℓ_B(θ_out) − g_out),     then base.step() with g as the parameters' gradients

    It shares `param_groups` and `state` with the base, so that schedulers and wrappers see a real optimizer.
    Weight decay, momentum and moments are the base's.

    Args:
        base_optimizer: any torch optimizer whose step needs only gradients.
        alpha: α in [0, 1] or a schedule step → α; no effect before `refresh`.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = poco.AlphaSVRG(torch.optim.AdamW(model.parameters(), lr=1e-2), alpha=0.5)
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> closure = lambda: torch.nn.functional.mse_loss(model(x), y)
        >>> _ = opt.refresh([closure])
        >>> loss = opt.step(closure)
    """

    def __init__(self, base_optimizer: torch.optim.Optimizer, *, alpha: correction.Alpha = 1.0) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"base_optimizer={type(base_optimizer).__name__}: give a torch.optim.Optimizer, made for the "
                "model's parameters."
            )
        if not callable(alpha):
            correction.alpha_at(alpha, 1)
        self.base = base_optimizer
        self.alpha = alpha
        self._steps = 0
        self._outer: dict[Parameter, tuple[Tensor, Tensor]] = {}
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.param_groups = base_optimizer.param_groups
        self.state = base_optimizer.state

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the `step` that a scheduler has wrapped, which would step this optimizer, not the copy."""
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; steps are plain until the next `refresh`."""
        if not any(param_group is group for group in self.base.param_groups):
            self.base.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Evaluate the closure here and, after a `refresh`, at the snapshot; correct; let the base step.

        Returns:
            the mini-batch loss at the current weights.
        """
        if closure is None or not callable(closure):
            raise TypeError(
                "closure: step() evaluates the loss at two points; call step(closure) with a function that returns "
                "the mini-batch's mean loss."
            )
        params = self._params()
        alpha, _ = correction.alpha_at(self.alpha, self._steps + 1)
        random = capture_random(params)
        inner = evaluate(closure, params, Request())
        grads = list(inner.grads)
        # Frozen, unfrozen or added since the snapshot: g_out belongs to another function, so the step is plain.
        if alpha > 0.0 and set(params) == set(self._outer):
            with replay_random(random), self._snapshot_weights(params):
                outer = evaluate(closure, params, Request())
            grads = [self._corrected(p, g, o, alpha) for p, g, o in zip(params, inner.grads, outer.grads, strict=True)]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        self.base.step()
        for p in params:
            p.grad = None
        self._steps += 1
        return inner.loss

    @torch.no_grad()
    def refresh(self, closures: Sequence[Closure], weights: Sequence[float] | None = None) -> Tensor:
        """Take the snapshot: θ_out ← θ, g_out ← mean of the chunks' gradients there (weighted by `weights`)."""
        closures, shares = check_chunks(closures, weights)
        params = self._params()
        means = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
        losses = []
        for closure, share in zip(closures, shares, strict=True):
            measured = evaluate(closure, params, Request())
            losses.append(share * measured.loss)
            for mean, grad in zip(means, measured.grads, strict=True):
                if grad is not None:
                    mean.add_(grad.to(mean.dtype), alpha=share)
        self._outer = {p: (p.detach().clone(), mean) for p, mean in zip(params, means, strict=True)}
        return torch.stack(losses).sum()

    def state_dict(self) -> dict[str, Any]:
        """The base's state, and the snapshot by parameter number."""
        numbered = list(enumerate(p for group in self.param_groups for p in group["params"]))
        outer = {i: list(self._outer[p]) for i, p in numbered if p in self._outer}
        shapes = [tuple(p.shape) for _, p in numbered]
        return {**self.base.state_dict(), "alpha_svrg": {"outer": outer, "steps": self._steps, "shapes": shapes}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            CheckpointError: if it belongs to another model or base optimizer, or is damaged; nothing is changed.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        own = self._checked(state_dict.get("alpha_svrg"), params)
        try:
            self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "alpha_svrg"})
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"state_dict: the base optimizer refuses it ({error}).") from error
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        self._steps = own["steps"]
        self._outer = {
            params[i]: (
                snapshot.to(params[i].device, copy=True),
                mean.to(params[i].device, copy=True),
            )
            for i, (snapshot, mean) in own["outer"].items()
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's."""
        self.base.zero_grad(set_to_none)

    def _checked(self, own: Any, params: Sequence[Parameter]) -> Mapping[str, Any]:
        if not isinstance(own, Mapping):
            raise CheckpointError("state_dict['alpha_svrg']: missing; this is not a checkpoint of AlphaSVRG.")
        for name, kind in (("outer", Mapping), ("steps", int), ("shapes", list)):
            if not isinstance(own.get(name), kind):
                raise CheckpointError(f"state_dict['alpha_svrg'][{name!r}]: missing or damaged; use another file.")
        shapes = [tuple(p.shape) for p in params]
        if [tuple(shape) for shape in own["shapes"]] != shapes:
            raise CheckpointError(
                f"state_dict['alpha_svrg']['shapes']: {own['shapes']}, the model has {shapes}; load the checkpoint of "
                "this model."
            )
        for i, pair in own["outer"].items():
            if not 0 <= i < len(params) or any(tensor.shape != params[i].shape for tensor in pair) or len(pair) != 2:
                raise CheckpointError(
                    f"state_dict['alpha_svrg']['outer'][{i}]: it does not fit the model; load the checkpoint of this "
                    "model."
                )
        return own

    def _params(self) -> list[Parameter]:
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not params:
            raise ValueError("params: no parameter requires a gradient, so there is nothing to step.")
        return params

    def _corrected(self, p: Parameter, inner: Tensor | None, outer: Tensor | None, alpha: float) -> Tensor | None:
        """In the mean's precision; a batch that does not use p has gradient 0, and p still moves by α g_out."""
        mean = self._outer[p][1]
        if inner is None and outer is None and not bool(mean.any()):
            return None
        here, there = (
            Theta(torch.zeros_like(mean) if grad is None else grad.to(mean.dtype)) for grad in (inner, outer)
        )
        return correction.natural_correct(here, there, Theta(mean), alpha).theta.to(p.dtype)

    @contextmanager
    def _snapshot_weights(self, params: Sequence[Parameter]) -> Iterator[None]:
        """Inside, the weights are θ_out; outside they are what they were, bit for bit."""
        present = {p: p.detach().clone() for p in params if p in self._outer}
        try:
            for p in present:
                p.data.copy_(self._outer[p][0])
            yield
        finally:
            for p, value in present.items():
                p.data.copy_(value)
