"""What only a card can show: steps do not wait for it, its numbers are the CPU's, and a fault is told a step later."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from backend_cases import FLAT, Wells, model_of
from optimizer_cases import ON_GRADIENTS, SHELL, equal, run, weights
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.engine import block, evaluator

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


@contextmanager
def not_waiting() -> Iterator[None]:
    """torch raises an error where the host waits for the card."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def prepared(name: str, **choices: Any) -> tuple[nn.ParameterDict, Any, Wells]:
    model = model_of(FLAT).to(DEVICE)
    return model, (SHELL | ON_GRADIENTS)[name](model.named_parameters(), **choices), Wells(model)


def gradients(model: nn.Module, step: int) -> None:
    """Gradients that are the same on every device."""
    for p in model.parameters():
        p.grad = torch.sin((step + 1.0) * torch.arange(p.numel(), dtype=p.dtype)).view(p.shape).to(p.device)


@pytest.mark.parametrize("backend", ["auto", "compiled"])
@pytest.mark.parametrize("name", ["SVRG", "IVON", "IVONPoCo", "IVONPoCoMo", "BayesBiNN", "BayesBiNNPoCo"])
def test_steps_do_not_wait(monkeypatch: pytest.MonkeyPatch, name: str, backend: str) -> None:
    for module, setting, value in ((evaluator, "FIRST", 0), (evaluator, "AGAIN", 2**30), (block, "LOOKS", 0)):
        monkeypatch.setattr(module, setting, value)
    model, opt, task = prepared(name, backend=backend)
    run(opt, task, 6)
    middles = [torch.full_like(p, 0.3) for p in model.parameters()]

    def closure() -> Tensor:
        return torch.stack([(p - m).square().sum() for p, m in zip(model.parameters(), middles, strict=True)]).sum()

    with not_waiting():
        for _ in range(3):
            opt.step(closure)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("backend", ["auto", "compiled"])
@pytest.mark.parametrize("name", ON_GRADIENTS)
def test_what_keeps_no_posterior(name: str, backend: str, nonfinite: str) -> None:
    """It does not wait, and gives the CPU's numbers."""
    model, opt, _ = prepared(name, backend=backend, nonfinite=nonfinite, weight_decay=0.1)
    twin = model_of(FLAT)
    other = ON_GRADIENTS[name](twin.named_parameters(), nonfinite=nonfinite, weight_decay=0.1)
    for step in range(5):
        for each, own in ((model, opt), (twin, other)):
            gradients(each, step)
            if step < 3 or each is twin:
                own.step()
            else:
                with not_waiting():
                    own.step()
    for mine, reference in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(mine.cpu(), reference, rtol=1e-10, atol=1e-12)
    assert opt.backend.fallback is None


@pytest.mark.parametrize("name", ["IVON", "IVONPoCoMo", "VSGD"])
def test_a_small_model_is_all_or_nothing(name: str) -> None:
    model, opt, task = prepared(name)

    def step(spoil: float) -> None:
        if name in ON_GRADIENTS:
            gradients(model, 1)
            model["long"].grad[5] *= spoil
            opt.step()
        else:
            opt.step(lambda: task.closure(0)() + (spoil - 1.0) * model["long"].sum())

    step(1.0)
    before, held = copy.deepcopy(opt.state_dict()["state"]), weights(model)
    step(torch.nan)
    assert equal(weights(model), held) and len(before) == len(FLAT)
    with pytest.raises(poco.NonFiniteError, match=r"^step 2: "):
        step(1.0)
    step(1.0)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
