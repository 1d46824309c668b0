"""α = K/(K+M), which follows from the pace of refreshes."""

import copy
from typing import Any

import pytest
import torch
from optimizer_cases import SHELL, Make, Task, equal, network, weights

import expfam_poco as poco
from expfam_poco.correction.alpha import Pace

CASES: dict[str, Make] = {
    name: (lambda params, kind=name: SHELL[kind](params, alpha="mega_batch"))
    for name in ("SVRG", "IVONPoCoMo", "BayesBiNNPoCo")
}
CASES["AlphaSVRG"] = lambda params: poco.AlphaSVRG(torch.optim.AdamW(params, lr=0.02), alpha="mega_batch")


def paced(opt: Any, task: Task, steps: int, every: int, chunks: int, start: int = 0) -> list[float]:
    """α of every step, with refreshes from so many chunks."""
    found = []
    for step in range(start, start + steps):
        if step >= 3 and step % every == 0:
            opt.refresh([task.closure(batch) for batch in range(chunks)])
        opt.step(task.closure(step))
        found.append(opt.diagnostics()["alpha"])
    return found


@pytest.mark.parametrize("name", CASES)
def test_alpha_of_mega_batches_follows_the_pace_of_refreshes(name: str) -> None:
    """K/(K+M); before the second refresh, and when one is late, M is the age of q_out; the state has all of it."""
    model = network()
    opt, task = CASES[name](model.named_parameters()), Task(model)
    found = paced(opt, task, 10, 4, 3)
    assert found[4:8] == pytest.approx([3 / (3 + age) for age in (1, 2, 3, 4)])
    assert found[8:] == pytest.approx([3 / 7] * 2)
    saved, values = copy.deepcopy(opt.state_dict()), weights(model)
    late = paced(opt, task, 4, 99, 3, start=10)
    assert late == pytest.approx([3 / 7, 3 / 7, 3 / 8, 3 / 9])
    expected = weights(model)
    model = network()
    opt = CASES[name](model.named_parameters())
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)
    opt.load_state_dict(saved)
    assert paced(opt, Task(model), 4, 99, 3, start=10) == late and equal(weights(model), expected)


def test_alpha_of_mega_batches_is_1_where_their_size_is_unknown() -> None:
    model = network()
    opt, task = poco.IVONPoCoMo(model.named_parameters(), lr=0.1, ess=24.0), Task(model)
    assert opt.param_groups[0]["alpha"] == poco.MegaBatchAlpha()
    assert paced(opt, task, 7, 3, 1)[3:] == [1.0] * 4
    opt.set_outer(opt.posterior_states())
    assert paced(opt, task, 1, 99, 1, start=7) == [1.0]
    model = network()
    told, task = poco.IVONPoCo(model.parameters(), lr=0.1, ess=24.0, alpha=poco.MegaBatchAlpha(6)), Task(model)
    assert paced(told, task, 7, 3, 1)[3:] == pytest.approx([6 / 7, 6 / 8, 6 / 9, 6 / 9])


def test_alpha_of_mega_batches_has_the_least_error_over_the_steps_that_share_one() -> None:
    """Σ over M steps of what mini-batches and one mean of K add, by simulation: no other α does better."""
    k, m = 5, 8
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(20_000, m, generator=generator)
    mean = torch.randn(20_000, k, generator=generator).mean(1, keepdim=True)

    def error(alpha: float) -> float:
        return float(((1.0 - alpha) * steps + alpha * mean).sum(1).square().mean())

    best = poco.MegaBatchAlpha().at(Pace(k, m))
    assert all(error(best) < error(best + shift) for shift in (-0.1, 0.1))
