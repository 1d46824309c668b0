"""What people do in training loops out of habit: right, or refused with the remedy; faults, which change nothing."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import OPTIMIZERS, SHELL, Make, Task, equal, network, weights
from torch import Tensor, nn
from torch.nn.utils import parametrize

import expfam_poco as poco

OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
PLACES = pytest.mark.parametrize("backend", ["auto", "eager"])


def engine_of(optimizer: Any) -> Any:
    """The `PosteriorCorrected` that an optimizer is, or has inside."""
    return getattr(optimizer, "_engine", optimizer)


def backward(closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The closure, which then leaves its gradients as well."""

    def call() -> Tensor:
        loss = closure()
        loss.backward()
        return loss

    return call


def takes_no_second_derivatives(optimizer: Any) -> bool:
    """Whether closures may call backward(), and estimators take gradients at all."""
    engine = engine_of(optimizer)
    needs = {group["curvature"].needs for group in engine.param_groups}
    return needs <= {"gradient"} and engine._products.kind == "curvature"


# ---- gradients ----------------------------------------------------------------------------------------------


@OPTIMIZER
def test_gradients_that_wait_are_refused(make: Make) -> None:
    model = network()
    task, optimizer = Task(model), make(model.parameters())
    task.closure(0)().backward()
    before = weights(model)
    for call in (lambda: optimizer.step(task.closure(1)), lambda: optimizer.refresh(task.chunks())):
        with pytest.raises(RuntimeError, match=r"wait in \.grad.*step\(\[closure"):
            call()
    assert equal(before, weights(model))
    optimizer.zero_grad(set_to_none=False)  # zeros are no gradients that somebody waits for
    optimizer.step(task.closure(1))


@OPTIMIZER
def test_a_shared_closure_leaves_others_the_gradients_of_one_evaluation(make: Make) -> None:
    model = network()
    first, second = list(model[0].parameters()), list(model[3].parameters())
    task, optimizer = Task(model), make(first)
    if not takes_no_second_derivatives(optimizer):
        pytest.skip("its estimator differentiates twice")
    shared = backward(task.closure(0))
    optimizer.refresh([shared, backward(task.closure(1))])
    assert all(p.grad is None for p in second)
    seen: list[list[Tensor]] = []

    def spied() -> Tensor:
        loss = shared()
        seen.append([p.grad.clone() for p in second])
        return loss

    optimizer.step(spied)
    assert len(seen) > 1 or not engine_of(optimizer).correction.compares or engine_of(optimizer).mc_samples == 1
    assert equal([p.grad for p in second], seen[0]), "the gradients of the first evaluation alone"
    assert all(p.grad is None for p in first)
    make(second).step(shared)  # another of ours is not told that they wait


@OPTIMIZER
def test_gradients_that_an_earlier_optimizer_has_used_do_not_wait(make: Make) -> None:
    model = network()
    task, earlier = Task(model), torch.optim.SGD(model.parameters(), lr=0.1)
    task.closure(0)().backward()
    earlier.step()
    make(model.parameters()).step(task.closure(1))


# ---- how wide a posterior begins ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [poco.IVON, poco.IVONPoCoMo, poco.VON])
def test_a_first_draw_that_destroys_the_model_is_told(kind: Callable[..., Any]) -> None:
    model = network()
    task = Task(model)
    trained = poco.SVRG(model.parameters(), lr=0.5)
    for step in range(300):
        trained.step(task.closure(step))
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        return task.closure(0)()

    state = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"ess: the first draw.*σ = 0\.2, .* times the ess .*suggest_ess"):
        kind(model.parameters(), lr=1e-3, ess=24.0, hess_init=1.0, weight_decay=0.0, seed=0).step(closure)
    assert len(calls) == 2
    scale = torch.cat([p.detach().flatten() for p in model.parameters()]).square().mean().sqrt().item()
    for ess, evaluations in (((0.11 * scale) ** -2, 2), (1e6, 1)):  # suspicious, but harmless; not even suspicious
        calls.clear()
        model.load_state_dict(state)
        optimizer = kind(model.parameters(), lr=1e-3, ess=ess, hess_init=1.0, weight_decay=0.0, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(closure)
            assert len(calls) == evaluations
            optimizer.step(closure)
            assert len(calls) == evaluations + 1


def test_binary_networks_are_not_told_that_their_draws_are_far() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = poco.BayesBiNN(poco.binarize_groups(model), square_momentum=None, lr=1e-3, ess=512.0)
    x, y = torch.randn(32, 64), torch.randint(10, (32,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))


# ---- weights that change under a context --------------------------------------------------------------------


@OPTIMIZER
def test_autocast_around_a_step_is_autocast_inside_the_closure(make: Make) -> None:
    def trained(inside: bool) -> list[Tensor]:
        model = network(torch.float32)
        task, optimizer = Task(model), make(model.parameters())

        def cast(batch: int) -> Callable[[], Tensor]:
            def call() -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                    return task.closure(batch)().float()

            return call if inside else lambda: task.closure(batch)().float()

        for step in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
                if step == 1:
                    optimizer.refresh([cast(batch) for batch in range(4)])
                optimizer.step(cast(step))
        return weights(model)

    if not takes_no_second_derivatives(make(network().parameters())):
        pytest.skip("second derivatives have no bfloat16 of every operation")
    assert equal(trained(inside=True), trained(inside=False))


@pytest.mark.parametrize("around", [lambda: torch.autocast("cpu", torch.bfloat16), parametrize.cached])
def test_sampled_weights_are_seen_under_a_context(around: Callable[[], Any]) -> None:
    model = network(torch.float32)
    parametrize.register_parametrization(model[0], "weight", _Doubled())
    task, optimizer = Task(model), poco.IVON(model.parameters(), lr=0.1, ess=24.0)
    optimizer.step(task.closure(0))
    with torch.no_grad(), around():
        point = model(task.x[0])
        draws = []
        for seed in range(3):
            with optimizer.sampled(seed):
                draws.append(model(task.x[0]))
        assert torch.equal(point, model(task.x[0]))
    assert not any(torch.equal(a, b) for a, b in [(point, draws[0]), (draws[0], draws[1]), (draws[1], draws[2])])


def test_the_objective_moves_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    task, optimizer = Task(model), poco.IVON(model.parameters(), lr=0.1, ess=24.0)
    optimizer.step(task.closure(0))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    optimizer.objective(task.chunks(), samples=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


class _Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2.0 * value


@OPTIMIZER
def test_cached_parametrizations_are_computed_anew(make: Make) -> None:
    def trained(cached: bool) -> list[Tensor]:
        model = network()
        parametrize.register_parametrization(model[0], "weight", _Doubled())
        task, optimizer = Task(model), make(model.parameters())
        for step in range(3):
            if step == 1:
                optimizer.refresh(task.chunks())
            if cached:
                with parametrize.cached():
                    model(task.x[0])  # the cache is full when the step begins
                    optimizer.step(task.closure(step))
            else:
                optimizer.step(task.closure(step))
        return weights(model)

    assert equal(trained(cached=True), trained(cached=False))


# ---- weights that others write ------------------------------------------------------------------------------


@PLACES
@pytest.mark.parametrize("make", SHELL.values(), ids=SHELL)
def test_a_write_through_data_is_noticed(make: Make, backend: str) -> None:
    def trained(write: Callable[[nn.Parameter, Tensor], None]) -> list[Tensor]:
        model = network()
        task, optimizer = Task(model), make(model.parameters(), backend=backend)
        start = weights(model) if "bernoulli" not in str(optimizer.param_groups[0]["family"]).lower() else None
        optimizer.step(task.closure(0))
        for p, value in zip(model.parameters(), start or [-p.detach() for p in model.parameters()], strict=True):
            write(p, value)
        optimizer.step(task.closure(1))
        return weights(model)

    def aside(p: nn.Parameter, value: Tensor) -> None:
        p.data.copy_(value)

    def openly(p: nn.Parameter, value: Tensor) -> None:
        with torch.no_grad():
            p.copy_(value)

    def not_at_all(p: nn.Parameter, value: Tensor) -> None:
        """As if nobody had."""

    assert equal(trained(aside), trained(openly))
    assert not equal(trained(aside), trained(not_at_all))


@PLACES
def test_a_write_into_some_rows_of_a_large_tensor_is_noticed(backend: str) -> None:
    weight = nn.Parameter(torch.randn(500, 40))
    optimizer = poco.IVON([weight], lr=0.1, ess=1e6, seed=0, backend=backend)
    optimizer.step(lambda: weight.square().mean())
    weight.data[:50] = 3.0
    optimizer.step(lambda: weight.square().mean())
    assert (weight[:50] > 2.5).all()


@PLACES
@pytest.mark.parametrize("where", [(slice(None), 5), (3, 7)], ids=["column", "entry"])
def test_a_write_into_a_few_weights_is_noticed(backend: str, where: Any) -> None:
    weight = nn.Parameter(torch.randn(64, 1024))
    optimizer = poco.SVRG([weight], lr=1e-3, backend=backend)
    optimizer.step(lambda: weight.square().mean())
    weight.data[where] = 50.0
    optimizer.step(lambda: weight.square().mean())
    assert (weight[where] > 49.0).all()


def test_a_write_into_a_column_of_a_very_large_tensor_is_noticed_before_long() -> None:
    weight = nn.Parameter(torch.zeros(2048, 2048))
    optimizer = poco.SVRG([weight], lr=1e-3, backend="eager")
    for _ in range(5):
        optimizer.step(lambda: weight.square().mean())
    weight.data[:, 5] = 50.0
    optimizer.step(lambda: weight.square().mean())
    assert (weight[:, 5] > 49.0).all()


def test_a_write_within_the_closure_that_begins_late_is_refused_before_long() -> None:
    model = network()
    task, optimizer = Task(model), poco.IVON(model.parameters(), lr=0.1, ess=100.0)
    calls: list[int] = []

    def clamped() -> Tensor:
        calls.append(1)
        if len(calls) > 8:
            model[0].weight.data.clamp_(-0.01, 0.01)
        return task.closure(0)()

    with pytest.raises(RuntimeError, match="wrote into the weights"):
        for _ in range(100):
            optimizer.step(clamped)


def test_a_closure_may_step_there_and_back() -> None:
    """As sharpness-aware minimisation does: what is left of the step is rounding."""
    model = network(torch.float32)
    task, optimizer = Task(model), poco.IVON(model.parameters(), lr=0.1, ess=100.0)
    steps = [0.05 * torch.randn_like(p) for p in model.parameters()]

    def closure() -> Tensor:
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), steps)
        task.closure(0)().backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), steps)
        return task.closure(0)().detach()

    for _ in range(5):
        optimizer.step(closure)


@PLACES
def test_float16_weights_do_not_become_infinite(backend: str) -> None:
    weight = nn.Parameter(torch.full((40,), 6e4, dtype=torch.float16))
    optimizer = poco.SVRG([weight], lr=1.0, backend=backend)
    with pytest.raises(poco.NonFiniteError, match=r"lr=1\.0"):
        optimizer.step(lambda: -3e4 * weight.float().sum())
    assert (weight == 6e4).all()


@OPTIMIZER
def test_a_refusal_under_inference_mode_leaves_nothing(make: Make) -> None:
    model, twin = network(), network()
    optimizer, other = make(model.parameters()), make(twin.parameters())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        optimizer.step(Task(model).closure(0))
    optimizer.step(Task(model).closure(0))
    other.step(Task(twin).closure(0))
    assert equal(weights(model), weights(twin))


@OPTIMIZER
@pytest.mark.parametrize("aside", [False, True])
def test_a_write_within_the_closure_is_refused(make: Make, aside: bool) -> None:
    model = network()
    task, optimizer = Task(model), make(model.parameters())
    before, bias = weights(model), model[0].bias

    def closure() -> Tensor:
        with torch.no_grad():
            (bias.data if aside else bias).clamp_(-0.01, 0.01)
        return task.closure(0)()

    with pytest.raises(RuntimeError, match="wrote into the weights"):
        optimizer.step(closure)
    assert equal(before, weights(model))

    def restoring() -> Tensor:  # as sharpness-aware minimisation does
        with torch.no_grad():
            kept = bias.clone()
            bias.add_(0.1)
        loss = 0.5 * (model(task.x[0]) - task.y[0]).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        with torch.no_grad():
            bias.copy_(kept)
        if takes_no_second_derivatives(optimizer):
            for p, grad in zip(model.parameters(), gradients, strict=True):
                p.grad = grad.detach()
        return loss.detach() if takes_no_second_derivatives(optimizer) else task.closure(0)()

    optimizer.step(restoring)


def test_an_embedding_with_a_largest_norm_is_refused() -> None:
    embedding = nn.Embedding(20, 8, max_norm=1.0)
    with torch.no_grad():
        embedding.weight.mul_(3.0)
    optimizer = poco.IVON(embedding.parameters(), lr=0.1, ess=100.0)
    with pytest.raises(RuntimeError, match="max_norm"):
        optimizer.step(lambda: embedding(torch.arange(5)).square().mean())


# ---- closures that use the optimizer ------------------------------------------------------------------------


@OPTIMIZER
@pytest.mark.parametrize("what", ["step", "refresh", "predict"])
def test_a_closure_that_uses_its_optimizer_is_refused(make: Make, what: str) -> None:
    model = network()
    task, optimizer = Task(model), make(model.parameters())
    if what == "predict" and not hasattr(optimizer, "sampled"):
        pytest.skip("it has no posterior to predict with")
    optimizer.step(task.closure(0))
    before = weights(model)

    def closure() -> Tensor:
        if what == "predict":
            poco.predict(model, optimizer, task.x[0], samples=2)
        else:
            getattr(optimizer, what)(task.closure(1) if what == "step" else task.chunks())
        return task.closure(0)()

    with pytest.raises(RuntimeError, match="uses the optimizer by which it is being evaluated"):
        optimizer.step(closure)
    assert equal(before, weights(model))
    optimizer.step(task.closure(0))


@pytest.mark.parametrize("kind", [poco.BatchedDraws, poco.PerExample])
def test_a_batched_closure_that_uses_its_optimizer_is_refused(kind: Callable[..., Any]) -> None:
    model = network()
    task, optimizer = Task(model), poco.IVON(model.parameters(), lr=0.1, ess=1e4)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        optimizer.posterior_states()
        return (output - target).square().mean()

    optimizer.step(task.closure(0))
    before = weights(model)
    with pytest.raises(RuntimeError, match="uses the optimizer by which it is being evaluated"):
        optimizer.step(kind(model, loss, task.x[0], task.y[0]))
    assert equal(before, weights(model))
