"""`transport=` of every optimizer: the look-ahead where asked for, nothing where it is off, and what is refused."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import Task, network, run, same, weights
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.correction import Transported

IVON = {"lr": 0.1, "ess": 500.0, "hess_init": 1.0, "seed": 1}
# With momentum and without another correction: how `transport=` is given.
MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "PosteriorCorrected": lambda p, **c: poco.PosteriorCorrected(
        p, "diagonal_gaussian", 0.1, 500.0, **{"hess_init": 1.0, "momentum": 0.9, "alpha": 0.0, "seed": 1, **c}
    ),
    "low rank": lambda p, **c: poco.PosteriorCorrected(
        p, "low_rank_gaussian", 0.1, 500.0, **{"momentum": 0.9, "correction": "none", "seed": 1, **c}
    ),
    "SVRG": lambda p, **c: poco.SVRG(p, **{"lr": 0.1, "momentum": 0.9, "alpha": 0.0, "seed": 1, **c}),
    "VSGDPoCo": lambda p, **c: poco.VSGDPoCo(
        p, **{"lr": 0.1, "precision": 100.0, "momentum": 0.9, "alpha": 0.0, "seed": 1, **c}
    ),
    "VON": lambda p, **c: poco.VON(p, **{"lr": 0.05, "ess": 24.0, "momentum": 0.5, "seed": 1, **c}),
    "IVON": lambda p, **c: poco.IVON(p, **{**IVON, **c}),
    "IVONPoCo": lambda p, **c: poco.IVONPoCo(p, **{**IVON, "alpha": 0.0, **c}),
    "BayesBiNN": lambda p, **c: poco.BayesBiNN(p, **{"lr": 0.01, "ess": 24.0, "strength": 1.0, "seed": 1, **c}),
    "AdamW": lambda p, **c: poco.AlphaSVRG(torch.optim.AdamW(p, lr=0.02), **{"alpha": 0.0, **c}),
    "SGD": lambda p, **c: poco.AlphaSVRG(torch.optim.SGD(p, lr=0.05, momentum=0.9), **{"alpha": 0.0, **c}),
}
NAMES = pytest.mark.parametrize("name", MAKE)


def trained(name: str, steps: int = 4, **choices: Any) -> tuple[list[Tensor], torch.optim.Optimizer, nn.Module]:
    model = network()
    optimizer = MAKE[name](model.parameters(), **choices)
    run(optimizer, Task(model), steps)
    return state_of(optimizer, model), optimizer, model


def state_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Tensor]:
    """The weights and, as signs may stay what they are, the posterior."""
    states = optimizer.posterior_states() if isinstance(optimizer, poco.PosteriorCorrected) else {}
    return weights(model) + [value for state in states.values() for value in state]


@NAMES
def test_off_is_the_plain_rule_and_on_is_another(name: str) -> None:
    plain = trained(name)[0]
    assert same(trained(name, transport=0.0)[0], plain)
    assert not same(trained(name, transport=0.5)[0], plain)


@pytest.mark.parametrize("name", [n for n in MAKE if n not in ("AdamW", "SGD")])
def test_it_is_the_transported_correction(name: str) -> None:
    own = trained(name, transport=0.3)[0]
    assert same(own, trained(name, correction=Transported(gamma=0.3))[0])


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "one large tensor"])
def test_a_torch_optimizer_looks_ahead(name: str, apart: bool) -> None:
    """By hand: the gradient at θ + γ(1/w − 1)(θ − θ₋₁), w = (1−β)/(1−βᵗ), handed to the base."""
    rows = 3 if apart else 1
    start = torch.randn(rows, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)

    def loss(theta: Tensor) -> Tensor:
        return (scale * (theta - 1.0).square()).sum() + theta.pow(4).sum()

    def base(p: nn.Parameter) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p], lr=0.02) if name == "AdamW" else torch.optim.SGD([p], lr=0.01, momentum=0.9)

    own, hand = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer, plain = poco.AlphaSVRG(base(own), alpha=0.0, transport=0.4), base(hand)
    before = start.clone()
    for t in range(1, 13):
        far = 0.4 * ((1 - 0.9**t) / 0.1 - 1)
        ahead = (hand.detach() + far * (hand.detach() - before)).requires_grad_()
        (hand.grad,) = torch.autograd.grad(loss(ahead), ahead)
        before = hand.detach().clone()
        plain.step()
        optimizer.step(lambda: loss(own))
        torch.testing.assert_close(own, hand, rtol=1e-10, atol=1e-12)


@NAMES
def test_it_resumes(name: str) -> None:
    whole = trained(name, 6, transport=0.4)[0]
    _, half, model = trained(name, 3, transport=0.4)
    buffer = io.BytesIO()
    torch.save(half.state_dict(), buffer)
    buffer.seek(0)
    other = network()
    other.load_state_dict(model.state_dict())
    resumed = MAKE[name](other.parameters(), transport=0.4)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    run(resumed, Task(other), 3, start=3)
    assert same(state_of(resumed, other), whole)


@NAMES
def test_it_resumes_where_momentum_was_switched_off(name: str) -> None:
    _, optimizer, model = trained(name, 2, transport=0.4)
    for group in optimizer.param_groups:
        group.update({"betas": (0.0, group["betas"][1])} if "betas" in group else {"momentum": 0.0})
    run(optimizer, Task(model), 2, start=2)
    other = network()
    other.load_state_dict(model.state_dict())
    resumed = MAKE[name](other.parameters(), transport=0.4)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's own share their tensors
    for one, net in ((optimizer, model), (resumed, other)):
        run(one, Task(net), 2, start=4)
    assert same(state_of(resumed, other), state_of(optimizer, model))


@NAMES
def test_what_would_do_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"transport=1\.5: give a number in \[0, 1\]"):
        trained(name, transport=1.5)
    correcting = {"correction": "recursive"} if name == "low rank" else {}
    with pytest.raises(ValueError, match=r"transport=0\.1.*give alpha=0"):
        trained(name, transport=0.1, alpha=0.5, **correcting)


def test_without_momentum_it_is_refused() -> None:
    with pytest.raises(ValueError, match="without momentum nothing lags"):
        poco.SVRG(network().parameters(), lr=0.1, alpha=0.0, transport=0.1)
    with pytest.raises(ValueError, match="without momentum nothing lags"):
        poco.AlphaSVRG(torch.optim.SGD(network().parameters(), lr=0.1), alpha=0.0, transport=0.1)
    optimizer = MAKE["AdamW"](network().parameters(), transport=0.1)
    with pytest.raises(ValueError, match="give alpha=0"):
        optimizer.alpha = 0.5  # type: ignore[attr-defined]
