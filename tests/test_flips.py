"""Diagnostics of weights of few levels: |λ|, flips between looks, and the warnings that follow from them."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import expfam_poco as poco


def steps(opt: Any, weight: nn.Parameter, push: torch.Tensor, count: int) -> None:
    for _ in range(count):
        opt.step(lambda: (weight * push).sum())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("point", ["mode", "mean"])
@pytest.mark.parametrize("family", ["bernoulli", "categorical"])
def test_flips_and_lambda_are_those_of_the_posterior(family: str, point: str) -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(40, 5)), nn.Parameter(torch.zeros(3))
    groups: Any = [{"params": [weight], "family": poco.get_family(family)(point_estimate=point)}, {"params": [bias]}]
    opt = poco.PosteriorCorrected(groups, "diagonal_gaussian", lr=0.1, ess=4.0, hess_init=1.0, seed=0)
    push, halves = torch.randn(40, 5), torch.tensor([0.0]) if family == "bernoulli" else torch.tensor([-0.5, 0.5])

    def seen() -> tuple[torch.Tensor, float]:
        state = opt.posterior_states()["group0.param0"]
        values = opt.param_groups[0]["family"].point(state)
        return torch.bucketize(values, halves, right=True), float(state[0].abs().mean())

    assert "flips" not in opt.diagnostics()
    before, _ = seen()
    total = 0.0
    for count in (1, 20):
        steps(opt, weight, push, count)
        found, (now, size) = opt.diagnostics(), seen()
        assert found["flips"] == pytest.approx(float((now != before).float().mean()), abs=1e-7)
        assert found["mean_abs_lambda"] == pytest.approx(size, rel=1e-5)
        before, total = now, total + found["flips"]
    assert total > 0.0
    assert opt.diagnostics() == found, "reading again changes nothing"
    plain = poco.IVON([nn.Parameter(torch.ones(2))], lr=0.1, ess=1.0).diagnostics()
    assert not {"flips", "mean_abs_lambda"} & plain.keys()


def test_weights_that_never_flip_are_told_once() -> None:
    weight = nn.Parameter(torch.randn(50))
    opt = poco.BayesBiNN([weight], square_momentum=None, lr=1e-6, ess=1.0, seed=0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(8):
            steps(opt, weight, torch.ones(50), 30)
            opt.diagnostics()
    assert [str(w.message) for w in seen] == [
        "lr: none of 50 weights of few levels has flipped in 120 steps; raise lr, see docs/binary-networks.md."
    ]


def test_weights_that_flip_like_coins_are_told_once_and_those_that_learn_are_not() -> None:
    for random in (True, False):
        torch.manual_seed(0)
        weight, push = nn.Parameter(torch.randn(400)), torch.randn(400)
        opt = poco.BayesBiNN([weight], square_momentum=None, lr=0.9 if random else 0.1, ess=100.0, beta1=0.0, seed=0)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            opt.diagnostics()
            for _ in range(12):
                steps(opt, weight, torch.randn(400) if random else push, 5)
                opt.diagnostics()
        assert len(seen) == int(random)
        assert all("as coins do; lower lr" in str(w.message) for w in seen)


@pytest.mark.parametrize("kind", [poco.BayesBiNN, poco.BayesBiNNPoCo])
def test_weight_decay_of_binary_weights_is_refused(kind: Any) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"weight_decay=0.1: it has no meaning for binary weights"):
        kind(poco.binarize_groups(model), lr=0.1, ess=1.0, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight_decay=0.1: it has no meaning for binary weights"):
        poco.binarize_groups(model, binary={"weight_decay": 0.1})
    kind(poco.binarize_groups(model, gaussian={"weight_decay": 0.1}), lr=0.1, ess=1.0, weight_decay=0.0)
