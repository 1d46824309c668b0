"""Closures that evaluate many draws of the weights in one batched pass, through `functional_call` and `vmap`.

`BatchedDraws` evaluates all Monte Carlo samples of a step, and with a correction both sides of every pair, on one
mini-batch: the same numbers as an ordinary closure, sooner where the model is small (`benchmarks/RESULTS.md` says
where). `PerExample` gives every example of a batch a draw of its own (PC App. A's note).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import Parameter

from expfam_poco.errors import NonFiniteError


class Batched(ABC):
    """A closure that is evaluated at many draws of the weights at once, at the memory of as many copies of them.

    Args:
        model: the module whose parameters the optimizer holds.
        loss: `loss(output, target)` → a mean loss.
        inputs: B examples along the first axis.
        targets: B targets along the first axis.
    """

    pairs: ClassVar[bool]

    def __init__(
        self, model: nn.Module, loss: Callable[[Any, Tensor], Tensor], inputs: Tensor, targets: Tensor
    ) -> None:
        if inputs.shape[0] != targets.shape[0] or inputs.shape[0] == 0:
            raise ValueError(
                f"targets: {targets.shape[0]} of them for {inputs.shape[0]} inputs; give one target per example, "
                "at least one example."
            )
        self.model = model
        self.loss = loss
        self.inputs = inputs
        self.targets = targets

    @property
    @abstractmethod
    def draws(self) -> int:
        """How many draws of the weights one Monte Carlo sample takes."""

    @abstractmethod
    def losses(self, leaves: dict[str, Tensor], rows: int) -> Tensor:
        """The losses at `rows` stacked values of the weights."""

    def __call__(self) -> Tensor:
        """The mean loss of the batch at the model's present weights, like an ordinary closure."""
        return self.loss(self.model(self.inputs), self.targets)

    def evaluate(self, stacks: Mapping[Parameter, Tensor]) -> tuple[Tensor, dict[Parameter, Tensor | None]]:
        """Losses (K) and gradients (K × P per parameter; None: unused) at K stacked values of the weights."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        missing = [tuple(p.shape) for p in stacks if p not in names]
        if missing:
            raise ValueError(
                f"model: it has no parameter for {len(missing)} of the optimizer's tensors (first shape "
                f"{missing[0]}); pass the model that the optimizer was made for."
            )
        if any(module.training and hasattr(module, "running_mean") for module in self.model.modules()):
            raise ValueError(
                "model: batch statistics cannot be updated for many draws at once, and of one example they are not "
                "defined; put its normalisation layers into evaluation mode, or use an ordinary closure."
            )
        leaves = {names[p]: stack.detach().requires_grad_() for p, stack in stacks.items()}
        with torch.enable_grad():
            losses = self.losses(leaves, next(iter(stacks.values())).shape[0])
            total = losses.sum()
        if not total.requires_grad:
            raise TypeError(
                "closure: the loss of an example has no graph; return one that depends on the model's weights."
            )
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        grads: dict[Parameter, Tensor | None] = dict(zip(stacks, found, strict=True))
        _require_finite(losses, grads)
        return losses.detach(), grads


class BatchedDraws(Batched):
    """The mean loss of a mini-batch, evaluated at all of a step's draws, inside and outside, in one batched pass.

    The same numbers as an ordinary closure for a model without random numbers of its own; random numbers of the
    model (dropout) are the same for all draws. Pass it where a closure is expected.

    Args:
        model: the module whose parameters the optimizer holds.
        loss: `loss(output, target)` → the mean loss of the batch.
        inputs: B examples along the first axis.
        targets: B targets along the first axis.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=100.0, mc_samples=4)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> loss = opt.step(poco.BatchedDraws(model, torch.nn.functional.mse_loss, x, y))
        >>> loss.shape
        torch.Size([])
    """

    pairs = True

    @property
    def draws(self) -> int:
        """One."""
        return 1

    def losses(self, leaves: dict[str, Tensor], rows: int) -> Tensor:
        """The mean loss of the whole batch at every row."""

        def one(values: dict[str, Tensor]) -> Tensor:
            return self.loss(functional_call(self.model, values, (self.inputs,)), self.targets)

        found: Tensor = vmap(one, randomness="same")(leaves)
        return found


class PerExample(Batched):
    """A closure that the optimizer evaluates with a draw of its own for each example, in one batched pass.

    With B examples the natural gradient averages B independent draws, so the variance due to the noise falls as
    1/B, at the memory of B copies of the weights: for small models. Pass it where a closure is expected.

    Args:
        model: the module whose parameters the optimizer holds. It is called with one example as a batch of one.
        loss: `loss(output, target)` → the mean loss of that batch of one.
        inputs: B examples along the first axis.
        targets: B targets along the first axis.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=100.0)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> loss = opt.step(poco.PerExample(model, torch.nn.functional.mse_loss, x, y))
        >>> loss.shape
        torch.Size([])
    """

    pairs = False

    @property
    def draws(self) -> int:
        """One for every example."""
        return int(self.inputs.shape[0])

    def losses(self, leaves: dict[str, Tensor], rows: int) -> Tensor:
        """Example b alone at rows b K/B … (b+1) K/B − 1, for K rows and B examples."""
        repeats = rows // self.draws
        inputs, targets = (values.repeat_interleave(repeats, 0) for values in (self.inputs, self.targets))

        def one(values: dict[str, Tensor], example: Tensor, target: Tensor) -> Tensor:
            output = functional_call(self.model, values, (example.unsqueeze(0),))
            return self.loss(output, target.unsqueeze(0))

        found: Tensor = vmap(one, randomness="different")(leaves, inputs, targets)
        return found


def _require_finite(losses: Tensor, grads: Mapping[Parameter, Tensor | None]) -> None:
    present = [losses, *(grad for grad in grads.values() if grad is not None)]
    if not all(bool(torch.isfinite(value).all()) for value in present):
        raise NonFiniteError(
            "closure: a loss or gradient of an example is NaN or infinite; lower lr or check the batch. "
            "The weights and the posterior are as before the step."
        )
