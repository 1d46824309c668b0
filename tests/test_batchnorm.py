"""Running statistics recomputed: against torch's own, at draws, and nothing changed when it fails."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optimizer_cases import equal, weights
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import expfam_poco as poco


def network(dropout: float = 0.0) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(dropout), nn.BatchNorm1d(4, momentum=0.3), nn.Linear(4, 2))
    return model.double()


def batches(count: int = 4) -> list[Tensor]:
    return [torch.randn(8, 3, dtype=torch.float64) for _ in range(count)]


def statistics(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def test_statistics_are_those_of_update_bn_and_the_mean_of_batches() -> None:
    model, data = network(), batches()
    other = copy.deepcopy(model)
    assert poco.recalibrate_batchnorm(model, data) == 1
    update_bn(data, other)
    assert equal(statistics(model), statistics(other))
    with torch.no_grad():
        hidden = torch.stack([model[0](x) for x in data])
    torch.testing.assert_close(model[2].running_mean, hidden.mean((0, 1)), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(model[2].running_var, hidden.var(1).mean(0), rtol=1e-13, atol=1e-14)
    assert model[2].momentum == 0.3 and model[2].num_batches_tracked == 4


def test_dropout_is_off_and_modes_weights_and_generators_are_left_alone() -> None:
    model, data = network(dropout=0.5), batches()
    plain = copy.deepcopy(model)
    plain[1].p = 0.0
    model[2].eval()
    before, state = weights(model), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.cat(data), batch_size=8, shuffle=True)
    poco.recalibrate_batchnorm(model, loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, True, False, True] and model.training
    assert equal(weights(model), before) and all(p.grad is None for p in model.parameters())
    poco.recalibrate_batchnorm(model, data)
    update_bn(data, plain)
    assert equal(statistics(model), statistics(plain))


class Keywords(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.model(left + right)


def test_batches_of_every_kind() -> None:
    data = batches()
    model = network()
    poco.recalibrate_batchnorm(model, data)
    expected = statistics(model)
    for loader in ([(x, 0) for x in data], [[x, 0, 1] for x in data], iter(data)):
        poco.recalibrate_batchnorm(model, loader)
        assert equal(statistics(model), expected)
    poco.recalibrate_batchnorm(model, [{"x": x, "y": 0} for x in data], inputs=lambda batch: batch["x"])
    assert equal(statistics(model), expected)
    two = Keywords(model)
    halves: list[Any] = [{"left": x / 2, "right": x / 2} for x in data]
    poco.recalibrate_batchnorm(two, halves)
    assert equal(statistics(model), expected)
    poco.recalibrate_batchnorm(two, halves, inputs=lambda batch: (batch["left"], batch["right"]))
    assert equal(statistics(model), expected)


def test_statistics_of_a_draw() -> None:
    model, data = network(), batches()
    opt = poco.IVON(model.parameters(), lr=0.1, ess=20.0, seed=1)
    poco.recalibrate_batchnorm(model, data)
    at_point, point = statistics(model), weights(model)
    with opt.sampled(seed=3):
        drawn = weights(model)
        poco.recalibrate_batchnorm(model, data)
        assert equal(weights(model), drawn)
    assert equal(weights(model), point) and not torch.equal(model[2].running_mean, at_point[0])
    hidden = torch.stack([x @ drawn[0].T + drawn[1] for x in data])
    torch.testing.assert_close(model[2].running_mean, hidden.mean((0, 1)), rtol=1e-13, atol=1e-14)


def test_a_model_without_statistics_needs_no_batches() -> None:
    def never() -> Iterator[Tensor]:
        raise AssertionError("the loader is not needed")
        yield torch.zeros(())

    assert poco.recalibrate_batchnorm(nn.Linear(3, 1), never()) == 0
    assert poco.recalibrate_batchnorm(nn.BatchNorm1d(3, track_running_stats=False), never()) == 0


def test_a_layer_that_no_batch_reaches_keeps_its_statistics() -> None:
    model = network()
    model.spare = nn.BatchNorm1d(7)
    model.spare.running_mean += 2.0
    model.forward = lambda x: nn.Sequential(*list(model)[:4])(x)
    before = [b.clone() for b in model.spare.buffers()]
    assert poco.recalibrate_batchnorm(model, batches()) == 1
    assert equal(list(model.spare.buffers()), before) and model[2].num_batches_tracked == 4


@pytest.mark.parametrize("kind", ["empty", "nan", "model", "loader", "batch"])
def test_old_statistics_are_back_after_an_error(kind: str) -> None:
    model, data = network(), batches()
    model(data[0])
    before, modes = statistics(model), [m.training for m in model.modules()]

    def failing() -> Iterator[Any]:
        yield data[0]
        if kind == "loader":
            raise OSError("lost")
        yield {"nan": math.nan * data[1], "model": data[1][:, :2], "batch": ()}[kind]

    expected = {
        "empty": (ValueError, "loader: it gives no batches"),
        "nan": (poco.NonFiniteError, "loader: with its batches a running statistic is NaN or infinite"),
        "model": (RuntimeError, "shapes"),
        "loader": (OSError, "lost"),
        "batch": (ValueError, "loader: a batch is empty"),
    }
    error, message = expected[kind]
    with pytest.raises(error, match=message):
        poco.recalibrate_batchnorm(model, [] if kind == "empty" else failing())
    assert equal(statistics(model), before) and [m.training for m in model.modules()] == modes
    assert model[2].momentum == 0.3
