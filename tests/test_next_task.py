"""The posterior of one task as the prior of the next: what it equals, where it is exact, what is not forgotten."""

from typing import Any

import pytest
import torch
from optimizer_cases import Task, equal, network, run, same, weights
from torch import Tensor, nn

import expfam_poco as poco

GROUPS: dict[str, dict[str, Any]] = {
    "bernoulli": {"lr": 0.01},
    "isotropic_gaussian": {"lr": 0.01},
    "diagonal_gaussian": {"lr": 0.05, "hess_init": 2.0, "weight_decay": 0.1},
    "full_gaussian": {"lr": 0.05, "hess_init": 2.0, "weight_decay": 0.1},
}
FAMILIES = [*GROUPS, "several groups"]


def built(model: nn.Module, family: str, **choices: Any) -> Any:
    """An optimizer of one family, or of a Bernoulli and a diagonal Gaussian group."""
    common = {"ess": 24.0, "seed": 1, "momentum": 0.8, **choices}
    named = list(model.named_parameters())
    if family != "several groups":
        return poco.PosteriorCorrected(named, family, **GROUPS[family], **common)
    groups = [
        {"params": [(n, p) for n, p in named if n.endswith("weight")], "family": "bernoulli", **GROUPS["bernoulli"]},
        {"params": [(n, p) for n, p in named if n.endswith("bias")], "family": "diagonal_gaussian",
         **GROUPS["diagonal_gaussian"]},
    ]  # fmt: skip
    return poco.PosteriorCorrected(groups, "bernoulli", 0.01, **common)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_an_optimizer_with_that_prior(family: str) -> None:
    """The posterior stays, the prior is it, and all that belonged to the old task is gone: the steps are the same."""
    model = network()
    opt = built(model, family)
    run(opt, Task(model), 6)
    states = opt.posterior_states()
    opt.next_task()
    assert all(equal(a, b) for a, b in zip(states.values(), opt.posterior_states().values(), strict=True))

    twin = network()
    other = built(twin, family)
    other.step(Task(twin).closure(0))  # so that there is a state to fill
    for block, state in zip(other._blocks, states.values(), strict=True):
        other.state[block.params[0]].update(posterior=type(state)(*(v.clone() for v in state)), momentum=(), step=0)
        block.write(block.family.point(state))
        block.note_weights()
    for group in other.param_groups:
        group["prior"] = {
            name: states[name]
            for name in states
            if name in {b.name for b in other._blocks if other.param_groups[b.group_number] is group}
        }
    other._clock.update(opt._clock)
    assert equal(weights(model), weights(twin))
    first, second = Task(model, seed=1), Task(twin, seed=1)
    assert equal(run(opt, first, 7, start=0), run(other, second, 7, start=0))
    assert equal(weights(model), weights(twin))
    for a, b in zip(opt.posterior_states().values(), other.posterior_states().values(), strict=True):
        assert equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prior_is_a_copy_and_survives_a_checkpoint(family: str) -> None:
    model = network()
    opt = built(model, family)
    run(opt, Task(model), 6)
    opt.next_task()
    kept = [{n: [v.clone() for v in s] for n, s in g["prior"].items()} for g in opt.param_groups]
    run(opt, Task(model, seed=1), 6)
    assert all(
        same(k, {n: list(s) for n, s in g["prior"].items()}) for k, g in zip(kept, opt.param_groups, strict=True)
    )
    twin = network()
    resumed = built(twin, family)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    assert equal(run(opt, Task(model, seed=1), 6), run(resumed, Task(twin, seed=1), 6))
    assert equal(weights(model), weights(twin))


def test_frozen_parameters_take_part_as_far_as_they_were_trained() -> None:
    """One frozen midway has a posterior, which becomes its prior; one that was always frozen keeps its prior."""
    model = network()
    model[3].bias.requires_grad_(False)
    opt = built(model, "diagonal_gaussian")
    task = Task(model)
    run(opt, task, 2)
    opt.refresh(task.chunks())
    before = opt.posterior_states()
    model[0].requires_grad_(False)
    opt.next_task()
    prior = opt.param_groups[0]["prior"]
    assert set(prior) == {"0.weight", "0.bias", "3.weight"}
    assert all(equal(prior[name], before[name]) for name in prior)
    model[0].requires_grad_(True)
    assert not opt._memory_is_of(opt._active()), "q_out of the old task"


def test_two_linear_gaussian_tasks_give_the_joint_posterior() -> None:
    """Bayes' rule twice is Bayes' rule once: exact for a full Gaussian with exact curvature and η = 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(4, generator=generator, dtype=torch.float64)
    y = y + 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)
    weight, delta = nn.Parameter(torch.zeros(4, dtype=torch.float64)), 0.5
    opt = poco.PosteriorCorrected(
        [("weight", weight)], "full_gaussian", lr=1.0, ess=1.0, hess_init=1.0, weight_decay=delta, curvature="exact",
        retraction="plain", noise="zero",
    )  # fmt: skip

    def task(rows: slice) -> Any:
        return lambda: 0.5 * (x[rows] @ weight - y[rows]).square().sum()

    for rows in (slice(0, 12), slice(12, 30)):
        opt.step(task(rows))
        opt.step(task(rows))  # it is solved already
        seen = slice(0, rows.stop)
        precision = delta * torch.eye(4, dtype=torch.float64) + x[seen].T @ x[seen]
        (state,) = opt.posterior_states().values()
        torch.testing.assert_close(state.precision, precision, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(
            state.mean, torch.linalg.solve(precision, x[seen].T @ y[seen]), rtol=1e-11, atol=1e-12
        )
        opt.next_task()


def test_two_linear_bernoulli_tasks_add_their_evidence() -> None:
    """A loss linear in ±1 weights is conjugate: λ = λ₀ − Σ N c."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = poco.BayesBiNN(
        [("weight", weight)], square_momentum=None, lr=1.0, ess=5.0, beta1=0.0,
        curvature="straight_through", strength=1.0,
        prior=poco.get_family("bernoulli").State(torch.full((3,), 0.2, dtype=torch.float64)),
    )  # fmt: skip
    total = torch.full((3,), 0.2, dtype=torch.float64)
    for slope in (torch.tensor([0.1, -0.2, 0.0]).double(), torch.tensor([-0.3, 0.1, 0.05]).double()):
        opt.step(lambda c=slope: weight @ c)
        total = total - 5.0 * slope
        torch.testing.assert_close(opt.posterior_states()["weight"].theta, total, rtol=1e-13, atol=1e-14)
        opt.next_task()


def digits(classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 8.0 - 1.0, dtype=torch.float32), torch.tensor(data.target)
    rows = torch.isin(y, torch.tensor(classes))
    return x[rows], y[rows]


@pytest.mark.parametrize("kind", ["binary", "ivon"])
def test_less_is_forgotten(kind: str) -> None:
    """Digits 0–4 and then 5–9, with and without the old posterior as the prior; the same seeds and steps."""
    first, second = digits((0, 1, 2, 3, 4)), digits((5, 6, 7, 8, 9))
    accuracies = {}
    for remember in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 5, bias=False))

        def logits(x: Tensor, model: nn.Module = model) -> Tensor:
            return model[2](torch.tanh(model[0](x) / 8.0)) / 4.0 if kind == "binary" else model(x)

        if kind == "binary":
            opt: Any = poco.BayesBiNN(
                model.named_parameters(), square_momentum=None, lr=3e-3, ess=900.0, seed=0, curvature="straight_through"
            )
        else:
            opt = poco.IVON(model.named_parameters(), lr=0.1, ess=900.0, hess_init=0.1, beta2=0.99, seed=0)
        for number, (x, y) in enumerate((first, second)):
            if number and remember:
                opt.next_task()
            generator = torch.Generator().manual_seed(number)
            for _ in range(150):
                rows = torch.randint(len(x), (32,), generator=generator)
                opt.step(lambda x=x[rows], y=y[rows] % 5: nn.functional.cross_entropy(logits(x), y))
        with torch.no_grad():
            accuracies[remember] = [float((logits(x).argmax(-1) == y % 5).float().mean()) for x, y in (first, second)]
    (kept, learned), (forgotten, _) = accuracies[True], accuracies[False]
    assert kept > forgotten + 0.1
    assert learned > 0.7
