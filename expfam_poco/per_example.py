"""Per-example noise: every example of a batch sees its own draw of the weights (PC App. A's note), through `vmap`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import Parameter


class PerExample:
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

    def __len__(self) -> int:
        """The number of examples."""
        return int(self.inputs.shape[0])

    def __call__(self) -> Tensor:
        """The mean loss of the batch at the model's present weights, like an ordinary closure."""
        return self.loss(self.model(self.inputs), self.targets)

    def evaluate(self, stacks: Mapping[Parameter, Tensor]) -> tuple[Tensor, dict[Parameter, Tensor | None]]:
        """Losses (K) and gradients (K × P per parameter; None: unused), K a multiple of B.

        Example b is evaluated at rows b K/B … (b+1) K/B − 1 of every stack.
        """
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        missing = [tuple(p.shape) for p in stacks if p not in names]
        if missing:
            raise ValueError(
                f"model: it has no parameter for {len(missing)} of the optimizer's tensors (first shape "
                f"{missing[0]}); pass the model that the optimizer was made for."
            )
        if any(module.training and hasattr(module, "running_mean") for module in self.model.modules()):
            raise ValueError(
                "model: batch statistics of one example are not defined; put its normalisation layers into evaluation "
                "mode, or use an ordinary closure."
            )
        repeats = next(iter(stacks.values())).shape[0] // len(self)
        inputs, targets = (values.repeat_interleave(repeats, 0) for values in (self.inputs, self.targets))
        leaves = {names[p]: stack.detach().requires_grad_() for p, stack in stacks.items()}

        def one(values: dict[str, Tensor], example: Tensor, target: Tensor) -> Tensor:
            output = functional_call(self.model, values, (example.unsqueeze(0),))
            return self.loss(output, target.unsqueeze(0))

        with torch.enable_grad():
            losses = vmap(one, randomness="different")(leaves, inputs, targets)
            total = losses.sum()
        if not total.requires_grad:
            raise TypeError(
                "closure: the loss of an example has no graph; return one that depends on the model's weights."
            )
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        grads: dict[Parameter, Tensor | None] = dict(zip(stacks, found, strict=True))
        _require_finite(losses, grads)
        return losses.detach(), grads


def _require_finite(losses: Tensor, grads: Mapping[Parameter, Tensor | None]) -> None:
    from .evaluation import NonFiniteError

    present = [losses, *(grad for grad in grads.values() if grad is not None)]
    if not all(bool(torch.isfinite(value).all()) for value in present):
        raise NonFiniteError(
            "closure: a loss or gradient of an example is NaN or infinite; lower lr or check the batch. "
            "The weights and the posterior are as before the step."
        )
