"""The `pyro.param`s of a model, its kernels' and other hyperparameters, trained beside the posterior of its latents."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from expfam_poco.arguments import function


class Params:
    """Steps the unconstrained `pyro.param`s along the gradient of the negative ELBO, averaged over a step's draws.

    Args:
        optimizer: one of `pyro.optim`, a function from a list of parameters to a torch optimizer, or None: they stay as
            they are, which is said once.
    """

    def __init__(self, optimizer: Any) -> None:
        function("param_optimizer", optimizer, "give one of pyro.optim, or a function: parameters → torch optimizer")
        self._make = optimizer
        self._torch: torch.optim.Optimizer | None = None
        self._names: list[str] = []
        self._pending: Any = None
        self._told = False
        self._found: list[dict[str, Tensor]] = []
        self._known: dict[str, Tensor] = {}

    @property
    def any(self) -> bool:
        """Whether parameters are trained."""
        return bool(self._names) and self._make is not None

    def begin(self) -> None:
        """Forget what earlier evaluations have left."""
        self._found = []

    def measure(self, loss: Tensor, params: Mapping[str, Tensor]) -> None:
        """Take the gradients at one evaluation."""
        free = {name: p for name, p in params.items() if p.requires_grad and p.is_leaf}
        if not free:
            return
        if self._make is None:
            self._tell(free)
            return
        if not torch.is_grad_enabled():
            return
        grads = torch.autograd.grad(loss, list(free.values()), retain_graph=True, allow_unused=True)
        self._known.update(free)
        self._found.append({name: g for name, g in zip(free, grads, strict=True) if g is not None})

    def step(self, draws: int) -> None:
        """Step along the mean gradient; of each pair of evaluations, where a step is corrected, the first counts.

        Args:
            draws: how many evaluations there were at the present posterior.
        """
        found = self._found[:: max(1, len(self._found) // max(draws, 1))]
        names = sorted({name for grads in found for name in grads})
        if not names:
            return
        for name in names:
            grads = [each[name] for each in found if name in each]
            self._known[name].grad = torch.stack(grads).sum(0) / len(found)
        self._apply(names)
        for name in names:
            self._known[name].grad = None

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer of the parameters keeps; their values are Pyro's to save."""
        if isinstance(self._make, PyroOptim):
            return {"names": list(self._names), "state": self._make.get_state()}
        return {"names": list(self._names), "state": None if self._torch is None else self._torch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the parameters are found at the next step."""
        if isinstance(self._make, PyroOptim):
            self._make.set_state(state["state"])
            self._names = list(state["names"])
        elif state["state"] is not None:
            self._pending = state

    def _apply(self, names: Sequence[str]) -> None:
        if isinstance(self._make, PyroOptim):
            self._names = sorted({*self._names, *names})
            self._make([self._known[name] for name in names])
            return
        if self._torch is None:
            self._names = list(names if self._pending is None else self._pending["names"])
            self._torch = self._make([self._known[name] for name in self._names])
            if self._pending is not None:
                self._torch.load_state_dict(self._pending["state"])
                self._pending = None
        for name in names:
            if name not in self._names:
                self._names.append(name)
                self._torch.add_param_group({"params": [self._known[name]]})
        self._torch.step()

    def _tell(self, free: Mapping[str, Tensor]) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"param_optimizer=None: nothing trains the model's parameters {', '.join(map(repr, free))}; give one "
                "of pyro.optim, or a function such as lambda params: torch.optim.Adam(params, lr=0.01).",
                UserWarning,
                stacklevel=2,
            )
