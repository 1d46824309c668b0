"""A whole training step under torch.compile: the optimizer is one break in its graph, and the numbers are the same."""

from typing import Any

import pytest
import torch
from backend_cases import compiles
from optimizer_cases import ON_GRADIENTS, OPTIMIZERS, equal, weights
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

NAMES = ("IVON", "IVONPoCoMo", "VON", "BayesBiNNPoCo", "AlphaSVRG-AdamW", "VSGD")


def trained(name: str, how: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and losses after three steps, of which `how` makes the function, and a refresh."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 1, bias=False)).double()
    x, y = torch.randn(16, 8).double(), torch.randn(16, 1).double()
    opt = (OPTIMIZERS | ON_GRADIENTS)[name](model.named_parameters())

    def closure() -> Tensor:
        return nn.functional.mse_loss(model(x), y)

    def train() -> Tensor:
        if name in ON_GRADIENTS:
            opt.zero_grad()
            loss = closure()
            loss.backward()
            opt.step()
            return loss.detach()
        return opt.step(closure)

    def refresh() -> Tensor:
        return opt.refresh([closure, closure])

    step, losses = how(train), []
    for number in range(3):
        if number == 1 and hasattr(opt, "refresh"):
            how(refresh)()
        losses.append(step())
    return weights(model), losses


@compiles
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_training_step_may_be_compiled(name: str) -> None:
    plain = trained(name, lambda function: function)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = trained(name, lambda function: torch.compile(function, backend=counter))
    assert equal(plain[0], compiled[0]) and equal(plain[1], compiled[1])
    assert counter.frame_count > 0 or name not in ON_GRADIENTS


@compiles
@pytest.mark.parametrize("name", ["IVONPoCo", "VSGD"])
def test_the_optimizer_is_one_break(name: str) -> None:
    """Which is explained by itself; nothing of the library is traced."""
    model = nn.Linear(4, 1).double()
    x = torch.ones(3, 4).double()
    opt = (OPTIMIZERS | ON_GRADIENTS)[name](model.named_parameters())

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    def train(scale: Tensor) -> Tensor:
        before = scale * 2.0
        loss = opt.step(closure)
        return loss * before

    torch._dynamo.reset()
    found = torch._dynamo.explain(train)(torch.ones(()).double())
    assert found.graph_break_count == 1, found.break_reasons
