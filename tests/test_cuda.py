"""What only a card can show: steps do not wait for it, its numbers are the CPU's, and a fault is told a step later."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from backend_cases import FLAT, Wells, model_of
from optimizer_cases import ON_GRADIENTS, SHELL, equal, network, run, weights
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.engine import block, evaluator
from expfam_poco.optim import capturable

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


@pytest.mark.parametrize("name", ["SVRG", "IVON", "IVONPoCoMo", "BayesBiNNPoCo", "diagonal-gradsq"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_captured_steps_are_the_ordinary_ones(name: str, dropout: float) -> None:
    """With rates that change, a refresh and an ordinary step in between, and dropout that a pair sees twice."""

    def trained(replaying: bool) -> tuple[list[Tensor], nn.Module]:
        torch.manual_seed(3)
        model = network(dropout=dropout).to(DEVICE)
        opt: Any = SHELL[name](model.named_parameters())
        batches = [(torch.randn(6, 3).double().to(DEVICE), torch.randn(6, 1).double().to(DEVICE)) for _ in range(4)]

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return (model(x) - y).square().mean()

        graph: Any = opt.captured(loss, batches[0]) if replaying else None
        found = []
        for step in range(40):
            batch = batches[step % 4]
            if step in (3, 25):
                opt.refresh([lambda b=b: loss(*b) for b in batches])
            if step % 10 == 9:
                opt.param_groups[0]["lr"] *= 0.8
            found.append(graph(batch) if replaying and step != 30 else opt.step(lambda b=batch: loss(*b)))
        return found, model

    (mine, model), (theirs, twin) = trained(True), trained(False)
    torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), rtol=1e-9, atol=1e-9)
    for p, q in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_a_captured_pair_sees_one_dropout() -> None:
    """At α = 1, and q_out where q is, the corrected gradient is the mean's, whatever the mask."""
    torch.manual_seed(3)
    model = network(dropout=0.5).to(DEVICE)
    opt = poco.SVRG(model.named_parameters(), lr=0.1)
    x, y = torch.randn(6, 3).double().to(DEVICE), torch.randn(6, 1).double().to(DEVICE)
    run = opt.captured(lambda x, y: (model(x) - y).square().mean(), (x, y))
    opt.refresh([lambda: (model(x) - y).square().mean()])
    mean = {name: state for name, state in opt.state_dict()["state"].items()}
    before = weights(model)
    run((x, y))
    for number, (old, new) in enumerate(zip(before, weights(model), strict=True)):
        torch.testing.assert_close(new, old - 0.1 * mean[number]["memory"]["site"]["theta"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["IVON", "IVONPoCoMo", "VSGD"])
def test_replays_do_not_wait(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in (block, capturable):
        monkeypatch.setattr(module, "LOOKS", 0)
    model, opt, _ = prepared(name)
    batch = {key: torch.full_like(p, 0.3) for key, p in model.items()}
    loss = lambda b: torch.stack([(p - b[key]).square().sum() for key, p in model.items()]).sum()  # noqa: E731
    run = opt.captured(loss, batch)
    for _ in range(12):
        run(batch)
    with not_waiting():
        for _ in range(9):
            run(batch)


def test_a_captured_step_of_a_bad_batch_moves_nothing() -> None:
    model, opt, _ = prepared("IVON")
    batch = torch.ones((), dtype=torch.float64, device=DEVICE)
    run = opt.captured(lambda b: torch.stack([(p - b).square().sum() for p in model.values()]).sum(), batch)
    run(batch)
    held = weights(model)
    run(batch * torch.nan)
    assert equal(weights(model), held)
    with pytest.raises(poco.NonFiniteError, match=r"^step 2: "):
        run(batch)


def test_a_closure_that_looks_at_values_cannot_be_captured() -> None:
    model, opt, _ = prepared("IVON")
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"^closure: its step cannot be captured"):
        opt.captured(lambda b: model["long"].square().sum() * float(b), torch.ones((), device=DEVICE))
    assert equal(weights(model), before)
    opt.step(lambda: model["long"].square().sum())
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
