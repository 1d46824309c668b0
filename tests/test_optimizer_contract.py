"""What holds for every optimizer alike, and the shell against the pure functions for every registered family."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from family_cases import takes, weights_in
from optimizer_cases import (
    INNER,
    MEGA,
    ON_GRADIENTS,
    OPTIMIZERS,
    OVER_A_BASE,
    PROBE_INNER,
    PROBE_MEGA,
    SHELL,
    Task,
    differentiates,
    equal,
    flat,
    network,
    run,
    takes_second_derivatives,
    those,
    weights,
)
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco import blr, correction
from expfam_poco.estimators import LOSSES_ALONE, Draws, available
from expfam_poco.noise import NoiseKey, noise

# ---- the shell on a model, and the pure functions ----------------------------------------------------------


class AnyWeights(nn.Module):
    """A model with two tensors of weights anywhere in a family's support, and a smooth loss."""

    def __init__(self, family: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in (("a", (3, 2)), ("b", (2,))):
            free = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, nn.Parameter(weights_in(family, free)))
        self.x = torch.randn(12, 3, generator=generator, dtype=torch.float64)

    def loss(self, values: dict[str, Tensor], batch: int) -> Tensor:
        z = self.x[3 * batch : 3 * batch + 3] @ values["a"] + values["b"] - 0.5
        return torch.log(1.0 + z * z).mean()

    def closure(self, batch: int) -> Any:
        return lambda: self.loss(dict(self.named_parameters()), batch)


class Pure:
    """The same training by the pure functions alone: estimators, `blr`, `correction` and the family."""

    def __init__(self, model: AnyWeights, family: Any, estimator: Any, seed: int, draws: int) -> None:
        self.model, self.family, self.estimator, self.seed, self.draws = model, family, estimator, seed, draws
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        values = [p.detach().clone() for p in model.parameters()]
        starts = [flat(values)] if family.joint else values
        self.q = [blr.init(family, start, momentum=0.8) for start in starts]
        self.outer: list[Any] = [None] * len(self.q)
        self.t = 0

    def unpack(self, thetas: list[Tensor]) -> dict[str, Tensor]:
        if self.family.joint:
            parts = thetas[0].split([shape.numel() for shape in self.shapes.values()])
            thetas = [part.reshape(shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]
        return dict(zip(self.shapes, thetas, strict=True))

    def sites(self, states: list[Any], batch: int, stream: int, probes: int, step: int) -> list[Any]:
        family, estimator = self.family, self.estimator
        keys = [NoiseKey(self.seed, stream, step, parameter=i) for i in range(len(states))]
        shapes = [s.shape for s in map(family.point, states)]
        count = self.draws // 2 if estimator.antithetic else self.draws
        eps = [family.noise(shape, count, key, dtype=torch.float64) for shape, key in zip(shapes, keys, strict=True)]
        if estimator.antithetic:
            eps = [torch.stack([e, family.reflect(e)], 1).flatten(0, 1) for e in eps]
        signs = [
            noise("rademacher", shape, self.draws, key.at(stream=probes), dtype=torch.float64)
            for shape, key in zip(shapes, keys, strict=True)
        ]
        losses, measured = [], [([], [], [], []) for _ in states]
        varied: list[list[Tensor]] = [[] for _ in states]
        for k in range(self.draws):
            thetas = [estimator.points(family, s, e[k : k + 1])[0] for s, e in zip(states, eps, strict=True)]
            leaves = [theta.detach().clone().requires_grad_() for theta in thetas]
            loss = self.model.loss(self.unpack(leaves), batch)
            grads = torch.autograd.grad(loss, leaves, create_graph=True)
            losses.append(loss.detach())
            if estimator.needs == "variations":
                for i, theta in enumerate(thetas):
                    others = [[*thetas[:i], v, *thetas[i + 1 :]] for v in estimator.variations(family, theta)]
                    varied[i].append(torch.stack([self.model.loss(self.unpack(o), batch).detach() for o in others]))
            inner = sum((g * z[k]).sum() for g, z in zip(grads, signs, strict=True))
            products = torch.autograd.grad(inner, leaves, retain_graph=True)
            for i, (theta, grad) in enumerate(zip(thetas, grads, strict=True)):
                curvature, pair = None, None
                dense = family.curvature == "dense"
                if family.curvature != "none" and estimator.needs == "hessian":
                    rows = [
                        torch.autograd.grad(grads[i].flatten()[j], leaves[i], retain_graph=True)[0].flatten()
                        for j in range(theta.numel())
                    ]
                    full = torch.stack(rows)
                    curvature = full if dense else full.diagonal().reshape(theta.shape)
                elif estimator.needs == "hvp":
                    pair = products[i], signs[i][k]
                else:
                    pair = None if family.curvature == "none" else estimator.pair(grad.detach(), 50.0)
                for record, value in zip(measured[i], (theta, grad.detach(), curvature, pair), strict=True):
                    record.append(value)
        sites = []
        for state, e, (theta, grad, curvature, pair), other in zip(states, eps, measured, varied, strict=True):
            stacked = None if curvature[0] is None else torch.stack(curvature)
            pairs = None if pair[0] is None else tuple(map(torch.stack, zip(*pair, strict=True)))
            gradient = None if estimator.needs in LOSSES_ALONE else torch.stack(grad)
            variations = torch.stack(other) if other else None
            draws = Draws(e, torch.stack(theta), torch.stack(losses), gradient, stacked, pairs, variations)
            sites.append(estimator.natural_gradient(family, state, draws))
        return sites

    def refresh(self, batches: list[int], sizes: list[float], first: int) -> None:
        states = [q.posterior for q in self.q]
        chunks = [self.sites(states, b, MEGA, PROBE_MEGA, first + i) for i, b in enumerate(batches)]
        for i, state in enumerate(states):
            mean = correction.average_sites([chunk[i] for chunk in chunks], sizes)
            rho = self.family.per_block(0.5, 0.2)
            believed = self.estimator.anchor_weight
            self.outer[i] = correction.update_outer(
                self.family, self.outer[i], state, mean, rho=rho, anchor_weight=believed
            )

    def step(self, batch: int) -> None:
        self.t += 1
        inner = self.sites([q.posterior for q in self.q], batch, INNER, PROBE_INNER, self.t)
        outer = [None] * len(self.q)
        if self.outer[0] is not None:
            outer = self.sites([o.posterior for o in self.outer], batch, INNER, PROBE_INNER, self.t)
        for i, q in enumerate(self.q):
            site, anchor = inner[i], None
            if self.outer[i] is not None:
                site, anchor = correction.correct(
                    self.family, site, outer[i], q.posterior, self.outer[i],
                    alpha=self.family.per_block(0.7, 0.4), anchor_weight=self.estimator.anchor_weight,
                )  # fmt: skip
            point = self.family.point(q.posterior)
            middle = self.family.reference_like(torch.zeros_like(point))
            self.q[i] = blr.update(
                self.family, q, self.family.centred_at(middle, 50.0 * 0.02), site,
                rates=self.family.per_block(0.02, 0.01), ess=50.0, anchor=anchor, momentum=0.8, step=self.t,
                clip_radius=3.0,
            )  # fmt: skip


def pairs() -> list[Any]:
    """Every registered family that is the same for all parameters, with every estimator that fits it."""
    found = []
    for name in poco.families_available():
        family = poco.resolve_family(name)
        if family.for_shape(torch.Size([3])) != family or family.parts_of(["any"]) is not None:
            continue
        if not takes(family, (3, 2)) or not takes(family, (2,)):
            continue
        marks = [pytest.mark.slow] if len(family.Nat._fields) > 2 else []
        for label, estimator in sorted(available(family).items()):
            found.append(pytest.param(family, estimator, id=f"{name}-{label}", marks=marks))
    return found


def as_good_as_equal(first: Any, second: Any) -> bool:
    """Bit for bit, but for what vector units round otherwise at the end of a tensor than inside a longer one."""
    return all(torch.allclose(a, b, rtol=1e-13, atol=1e-14) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("family", "estimator"), pairs())
def test_the_shell_equals_the_pure_functions(family: Any, estimator: Any) -> None:
    model = AnyWeights(family)
    shapes = [p.shape for p in model.parameters()]
    if family.joint:
        shapes = [torch.Size([sum(shape.numel() for shape in shapes)])]
    least = [estimator.least_draws(family, shape) + 3 * estimator.compares for shape in shapes]  # well conditioned
    draws = max(3 if estimator.independent_draws else 2, *least)
    pure = Pure(model, family, estimator, seed=9, draws=draws)
    opt = poco.PosteriorCorrected(
        model.parameters(), family, lr=0.02, ess=50.0, weight_decay=0.02, alpha=(0.7, 0.4), rho=(0.5, 0.2),
        curvature=estimator, momentum=0.8, precision_lr=0.01, clip_radius=3.0, seed=9,
        mc_samples=1 if estimator.antithetic else draws, noise="antithetic" if estimator.antithetic else "shared",
    )  # fmt: skip
    first, starts = 1, [q.posterior for q in pure.q]
    for step in range(10):
        if step in (3, 7):
            batches, sizes = [3, 0, 1], [5.0, 1.0, 3.0]
            opt.refresh([model.closure(b) for b in batches], sizes)
            pure.refresh(batches, sizes, first)
            first += len(batches)
        opt.step(model.closure(step % 4))
        pure.step(step % 4)
        states = [q.posterior for q in pure.q]
        for mine, theirs in zip(opt.posterior_states().values(), states, strict=True):
            assert as_good_as_equal(mine, theirs), f"step {step}"
        expected = pure.unpack([family.point(state) for state in states])
        assert as_good_as_equal(weights(model), list(expected.values())), f"step {step}"
    assert not any(torch.equal(state[0], start[0]) for state, start in zip(states, starts, strict=True))


# ---- what every optimizer is -------------------------------------------------------------------------------

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_shell = pytest.mark.parametrize("name", SHELL)


def prepared(name: str, steps: int = 6, **choices: Any) -> tuple[nn.Module, Any, Task]:
    """A network, its optimizer some steps into an inner loop (one refresh has happened), and the task."""
    model = network()
    opt = OPTIMIZERS[name](model.parameters(), **choices)
    task = Task(model)
    run(opt, task, steps)
    return model, opt, task


def test_every_public_optimizer_is_held_to_the_contract() -> None:
    public = {getattr(poco, name) for name in poco.__all__ if inspect.isclass(getattr(poco, name))}
    public = {kind for kind in public if issubclass(kind, torch.optim.Optimizer)}
    tried = {type(make(network().parameters())) for make in (*OPTIMIZERS.values(), *ON_GRADIENTS.values())}
    assert public <= tried, f"add these to optimizer_cases.py: {public - tried}"


@every_optimizer
def test_it_trains_and_is_deterministic(name: str) -> None:
    model, opt, task = prepared(name, 0)
    assert isinstance(opt, torch.optim.Optimizer)
    losses = run(opt, task, 40)
    assert all(loss.shape == () and not loss.requires_grad and loss.grad_fn is None for loss in losses)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    first, last = torch.stack(losses[:8]).mean(), torch.stack(losses[-8:]).mean()
    assert last < first, (first, last)
    again, opt, task = prepared(name, 0)
    assert equal(run(opt, task, 40), losses) and equal(weights(again), weights(model))


@every_optimizer
def test_refresh_moves_no_weight_and_returns_the_weighted_loss(name: str) -> None:
    model, opt, task = prepared(name)
    before = weights(model)
    seen: list[Tensor] = []

    def recording(batch: int) -> Any:
        def closure() -> Tensor:
            loss = task.closure(batch)()
            seen.append(loss.detach())
            return loss

        return closure

    value = opt.refresh([recording(0), recording(1)], [1.0, 3.0])
    assert equal(weights(model), before)
    half = len(seen) // 2
    expected = 0.25 * torch.stack(seen[:half]).mean() + 0.75 * torch.stack(seen[half:]).mean()
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0.0)
    assert all(p.grad is None for p in model.parameters())


@every_optimizer
def test_a_closure_may_call_backward_itself_and_zero_gradients(name: str) -> None:
    """Second derivatives need the loss's graph; the optimizers that take them say so."""
    returns_graph, opt, task = prepared(name, 0)
    plain = run(opt, task, 10)
    calls_backward, opt, task = prepared(name, 0)
    closure_of = task.closure

    def closure(batch: int) -> Any:
        def evaluate() -> float:
            opt.zero_grad()
            loss = closure_of(batch)()
            loss.backward()
            return loss.item()

        return evaluate

    task.closure = closure
    if takes_second_derivatives(opt):
        with pytest.raises(TypeError, match="return the loss without calling backward"):
            run(opt, task, 10)
        return
    losses = run(opt, task, 10)
    torch.testing.assert_close(torch.stack(losses).double(), torch.stack(plain), rtol=1e-6, atol=0.0)
    assert equal(weights(calls_backward), weights(returns_graph))


@pytest.mark.parametrize("name", those(lambda opt: differentiates(opt) and not takes_second_derivatives(opt)))
def test_accumulated_gradients_equal_one_large_batch(name: str) -> None:
    model, opt, task = prepared(name)
    other, twin, same = prepared(name)

    def accumulated() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for batch in range(4):
            loss = task.closure(batch)() / 4
            loss.backward()
            total += loss.detach()
        return total

    opt.step(accumulated)
    twin.step(lambda: torch.stack([chunk() for chunk in same.chunks()]).mean())
    torch.testing.assert_close(flat(model.parameters()), flat(other.parameters()), rtol=1e-12, atol=1e-13)


# ---- what wrappers and schedulers expect of an optimizer ---------------------------------------------------


def continued(model: nn.Module, opt: Any, steps: int = 7) -> list[Tensor]:
    return [*run(opt, Task(model), steps, start=6), *weights(model)]


@every_optimizer
def test_a_deep_copy_goes_its_own_way(name: str) -> None:
    model, opt, _ = prepared(name)
    twin, copied = copy.deepcopy((model, opt))
    before = weights(model)
    results = continued(twin, copied)
    assert equal(weights(model), before), "the copy moved the original"
    assert equal(continued(model, opt), results)


@every_optimizer
def test_a_pickled_optimizer_continues(name: str) -> None:
    model, opt, _ = prepared(name)
    twin, loaded = pickle.loads(pickle.dumps((model, opt)))
    assert type(loaded) is type(opt)
    assert equal(continued(twin, loaded), continued(model, opt))


@every_optimizer
def test_a_state_dict_goes_through_a_wrapper_at_any_time(name: str) -> None:
    """Accelerate moves an optimizer to a device by loading its own state_dict into it."""
    for steps in (0, 6):
        (model, opt, _), (other, twin, _) = prepared(name, steps), prepared(name, steps)
        buffer = io.BytesIO()
        torch.save(opt.state_dict(), buffer)
        buffer.seek(0)
        opt.load_state_dict(torch.load(buffer, weights_only=True))
        assert equal(continued(model, opt), continued(other, twin))


@every_optimizer
def test_schedulers_set_the_rates_that_are_used(name: str) -> None:
    model, opt, task = prepared(name)
    other, twin, same = prepared(name)
    rate = opt.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
    for step in range(6):
        opt.step(task.closure(step))
        scheduler.step()
        twin.param_groups[0]["lr"] = rate * 0.5 ** (step // 2)
        twin.step(same.closure(step))
    assert opt.param_groups[0]["lr"] == rate / 8
    assert equal(weights(model), weights(other))


@every_shell
def test_one_cycle_cycles_the_momentum(name: str) -> None:
    model, opt, task = prepared(name)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        opt, max_lr=opt.param_groups[0]["lr"], total_steps=12, base_momentum=0.5, max_momentum=0.9
    )
    seen = set()
    for step in range(10):
        seen.add(round(opt.param_groups[0]["momentum"], 6))
        opt.step(task.closure(step))
        scheduler.step()
    assert len(seen) > 5 and min(seen) >= 0.5 and max(seen) <= 0.9
    assert all(torch.isfinite(w).all() for w in weights(model))


@every_optimizer
def test_a_group_can_be_added_midway(name: str) -> None:
    model = network()
    opt = OPTIMIZERS[name](model[0].parameters())
    task = Task(model)
    run(opt, task, 6)
    last = weights(model[3])
    opt.add_param_group({"params": list(model[3].parameters()), "lr": 0.5 * opt.param_groups[0]["lr"]})
    opt.refresh(task.chunks())
    losses = run(opt, task, 7, start=6)
    assert all(torch.isfinite(loss) for loss in losses)
    assert not equal(weights(model[3]), last)
    assert len(opt.param_groups) == 2 and opt.param_groups[1]["lr"] != opt.param_groups[0]["lr"]


@pytest.mark.parametrize("name", OVER_A_BASE)
def test_alpha_svrg_shares_groups_and_state_with_its_base(name: str) -> None:
    _, opt, _ = prepared(name)
    assert opt.param_groups is opt.base.param_groups and opt.state is opt.base.state
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups is opt.base.param_groups and opt.state is opt.base.state


# ---- the noise is the seed's and the counters' -------------------------------------------------------------


@every_shell
def test_no_seed_means_the_generator_of_torch(name: str) -> None:
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        _, opt, task = prepared(name, 0, seed=None)
        torch.manual_seed(99)  # from here on the key and the counters alone decide
        results.append([*run(opt, task, 5), torch.tensor(opt.seed)])
    assert equal(results[0], results[1])
    assert results[0][-1] != results[2][-1]


@every_shell
def test_a_step_leaves_the_generator_of_torch_alone(name: str) -> None:
    _, opt, task = prepared(name)
    state = torch.get_rng_state()
    opt.step(task.closure(0))
    opt.refresh(task.chunks())
    with opt.sampled():
        pass
    assert torch.equal(torch.get_rng_state(), state)


@every_shell
def test_counters_advance_alike_whatever_alpha_is(name: str) -> None:
    """The inner draws, and the network's own dropout masks, are those of the run without correction."""

    def inner_points(alpha: float) -> list[Tensor]:
        model = network(dropout=0.4)
        opt = SHELL[name](model.parameters(), alpha=alpha)
        for group in opt.param_groups:
            group["lr"] = group["precision_lr"] = 0.0
        task = Task(model)
        calls: list[list[Tensor]] = []

        def recording(batch: int) -> Any:
            def closure() -> Tensor:
                loss = task.closure(batch)()
                calls[-1].append(torch.cat([flat(model.parameters()), loss.detach().reshape(1)]))
                return loss

            return closure

        torch.manual_seed(1)
        for step in range(6):
            calls.append([])
            if step in (2, 4):
                opt.refresh(task.chunks())
            opt.step(recording(step))
        return [record[0] for record in calls]

    assert equal(inner_points(0.0), inner_points(0.8))
