"""Every optimizer on one small task, stepped as it wants to be."""

from collections.abc import Callable
from typing import Any

import torch
from optimizer_cases import ON_GRADIENTS, OPTIMIZERS, Make, Task, network
from torch import Tensor, nn

EVERY: dict[str, Make] = {**OPTIMIZERS, **ON_GRADIENTS}


def closure_of(opt: Any, task: Task, batch: int) -> Callable[[], Tensor]:
    """The batch's loss; with gradients where the optimizer steps with those it finds."""
    loss_of = task.closure(batch)
    if hasattr(opt, "refresh"):
        return loss_of

    def backward() -> Tensor:
        opt.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return backward


def train(opt: Any, task: Task, steps: int, start: int = 0) -> list[Tensor]:
    """Steps, with a refresh before every third where there is one."""
    losses = []
    for step in range(start, start + steps):
        if step % 3 == 2 and hasattr(opt, "refresh"):
            opt.refresh(task.chunks())
        losses.append(opt.step(closure_of(opt, task, step)).detach())
    return losses


def trained(
    name: str, steps: int = 4, dtype: torch.dtype = torch.float64, **choices: Any
) -> tuple[nn.Module, Any, Task]:
    """A network, its optimizer some steps on, and the task."""
    model = network(dtype)
    opt = EVERY[name](model.parameters(), **choices)
    task = Task(model)
    train(opt, task, steps)
    return model, opt, task
