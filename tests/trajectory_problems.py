"""What reference trajectories are computed on: problems, training loops on them, and a `Case` of both.

Problems are small and made of `torch.Generator` seeds: a network, wells in the support of each family, and wells with
a tensor of 300,000 weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Closure = Callable[[], Any]

F32, F64 = torch.float32, torch.float64
STEPS, BURN_IN, EVERY, BATCHES = 50, 10, 10, 4


# ---- problems ------------------------------------------------------------------------------------------------


class Problem:
    """A model and its mini-batches; the last batch does not use every parameter."""

    model: nn.Module

    def closure(self, batch: int) -> Closure:
        """The mean loss of mini-batch `batch` modulo `BATCHES`."""
        raise NotImplementedError

    def chunks(self) -> list[Closure]:
        """The mega-batch: all mini-batches."""
        return [self.closure(batch) for batch in range(BATCHES)]

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters with their names."""
        return list(self.model.named_parameters())


class Scaled(nn.Module):
    """A 3-5-2 network with biases, whose outputs are multiplied by positive gains unless it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, scaled: bool = True) -> Tensor:
        out = self.second(torch.tanh(self.first(x)))
        return out * self.gain if scaled else out


class Network(Problem):
    """Regression on 24 examples in mini-batches of 6; the last batch does not use the gains."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=F64)

        self.model = Scaled()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                values = 0.5 * normal(*p.shape)
                p.copy_(values.exp() if name == "gain" else values)
        self.model.to(dtype)
        x = normal(24, 3)
        y = x @ torch.tensor([[1.0, 0.3], [-2.0, 0.1], [0.5, -1.0]], dtype=F64) + 0.1 * normal(24, 2)
        self.x, self.y = x.to(dtype).chunk(BATCHES), y.to(dtype).chunk(BATCHES)

    def closure(self, batch: int) -> Closure:
        number = batch % BATCHES
        x, y = self.x[number], self.y[number]
        return lambda: 0.5 * (self.model(x, scaled=number < BATCHES - 1) - y).square().mean()


SMALL: dict[str, tuple[int, ...]] = {
    "long": (700,), "matrix": (20, 30), "kernel": (4, 3, 5, 5), "transposed": (9, 40), "scalar": (), "spare": (6,),
}  # fmt: skip
LARGE: dict[str, tuple[int, ...]] = {"table": (600, 500), **SMALL}
TINY: dict[str, tuple[int, ...]] = {"matrix": (6, 5), "transposed": (3, 4), "scalar": (), "spare": (3,)}
ROWS: dict[str, tuple[int, ...]] = {"long": (12, 4), "matrix": (2, 3, 3), "spare": (2, 4)}

SUPPORTS: dict[str, Callable[[Tensor], Tensor]] = {
    "real": lambda z: 0.5 * z,
    "positive": lambda z: torch.exp(0.3 * z),
    "unit": lambda z: torch.sigmoid(z),
    "simplex": lambda z: torch.softmax(0.5 * z, -1),
    "angle": lambda z: 3.0 * torch.tanh(0.5 * z),
}


class Wells(Problem):
    """Every weight in a well whose middle depends on the batch; all are coupled. The last batch leaves "spare…" out."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], supports: Mapping[str, str], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)

        def inside(name: str) -> Tensor:
            return SUPPORTS[supports[name]](torch.randn(shapes[name], generator=generator, dtype=F64)).to(dtype)

        self.angles = {name for name, support in supports.items() if support == "angle"}
        weights = {name: inside(name) for name in shapes}
        for name, value in weights.items():
            if name == "kernel":
                weights[name] = value.contiguous(memory_format=torch.channels_last)
            elif name == "transposed":
                weights[name] = value.T
        self.model = nn.ParameterDict({name: nn.Parameter(value) for name, value in weights.items()})
        self.middles = [{name: inside(name).view(p.shape) for name, p in self.model.items()} for _ in range(BATCHES)]

    def closure(self, batch: int) -> Closure:
        number = batch % BATCHES
        middles = self.middles[number]

        def loss() -> Tensor:
            used = {n: p for n, p in self.model.items() if number < BATCHES - 1 or not n.startswith("spare")}
            wells = [self._well(name, p - middles[name]) for name, p in used.items()]
            coupling = torch.stack([p.cos().mean() for p in used.values()]).sum()
            return torch.stack(wells).sum() + 0.05 * coupling.square()

        return loss

    def _well(self, name: str, distance: Tensor) -> Tensor:
        return (1.0 - distance.cos()).sum() if name in self.angles else 0.5 * distance.square().sum()


def wells(support: str = "real", shapes: Mapping[str, tuple[int, ...]] = SMALL) -> Callable[[torch.dtype], Problem]:
    """Wells whose tensors all lie in one support."""
    return lambda dtype: Wells(shapes, dict.fromkeys(shapes, support), dtype)


# The families that are stepped span by span, and where their weights lie.
LEAFWISE = {
    "isotropic_gaussian": "real", "diagonal_gaussian": "real", "bernoulli": "real", "categorical": "real",
    "gamma": "positive", "exponential": "positive", "log_normal": "positive", "inverse_gaussian": "positive",
    "beta": "unit", "dirichlet": "simplex", "von_mises": "angle",
}  # fmt: skip


def mixture(dtype: torch.dtype) -> Problem:
    """Two tensors for every leafwise family, named after it; a few are left out by the last batch."""
    shapes, supports = {}, {}
    for family, support in LEAFWISE.items():
        for name, shape in ((f"{family}.large", (12, 5)), (f"{family}.small", (3, 4)), (f"spare.{family}", (2, 3))):
            key = name.replace(".", "-")
            if not name.startswith("spare") or family in ("diagonal_gaussian", "gamma"):
                shapes[key], supports[key] = shape, support
    return Wells(shapes, supports, dtype)


# ---- training loops ------------------------------------------------------------------------------------------

Make = Callable[[Problem], torch.optim.Optimizer]
Event = Callable[[Any, Problem], None]


@dataclass
class Run:
    """A problem with its optimizer, and the losses so far (of steps and of refreshes)."""

    problem: Problem
    optimizer: Any
    losses: list[Tensor] = field(default_factory=list)
    refreshes: list[Tensor] = field(default_factory=list)


Loop = Callable[["Case"], Run]


def begun(case: Case) -> Run:
    """A run before its first step."""
    problem = case.problem(case.dtype)
    return Run(problem, case.make(problem))


def advance(run: Run, steps: Iterable[int], closure_of: Callable[[Problem, int], Any], **choices: Any) -> Run:
    """Steps with a refresh at every tenth after the burn-in."""
    for step in steps:
        if step >= BURN_IN and step % EVERY == 0:
            run.refreshes.append(run.optimizer.refresh(run.problem.chunks()))
        run.losses.append(run.optimizer.step(closure_of(run.problem, step), **choices))
    return run


def one_batch(problem: Problem, step: int) -> Closure:
    """A mini-batch a step."""
    return problem.closure(step)


def two_batches(problem: Problem, step: int) -> list[Closure]:
    """Two micro-batches a step."""
    return [problem.closure(step), problem.closure(step + 1)]


def corrected(case: Case) -> Run:
    """Steps with refreshes."""
    return advance(begun(case), range(STEPS), one_batch)


def plain(case: Case) -> Run:
    """Steps without any refresh."""
    run = begun(case)
    for step in range(STEPS):
        run.losses.append(run.optimizer.step(run.problem.closure(step)))
    return run


def on_gradients(case: Case) -> Run:
    """The loop of torch's own optimizers, which step with the gradients that `backward()` leaves."""
    run = begun(case)
    for step in range(STEPS):
        run.optimizer.zero_grad()
        loss = run.problem.closure(step)()
        loss.backward()
        run.optimizer.step()
        run.losses.append(loss.detach())
    return run


def accumulated(**choices: Any) -> Loop:
    """Two micro-batches a step, with these arguments of `step`."""
    return lambda case: advance(begun(case), range(STEPS), two_batches, **choices)


def batched(kind: Callable[..., Closure]) -> Loop:
    """Steps on `BatchedDraws` or `PerExample` of a `Network`."""

    def closure_of(problem: Problem, step: int) -> Closure:
        assert isinstance(problem, Network)
        number = step % BATCHES
        return kind(problem.model, nn.functional.mse_loss, problem.x[number], problem.y[number])

    return lambda case: advance(begun(case), range(STEPS), closure_of)


def resumed(case: Case) -> Run:
    """Half the steps; then another model and optimizer go on from the state of the first."""
    first = advance(begun(case), range(STEPS // 2), one_batch)
    second = begun(case)
    second.problem.model.load_state_dict(copy.deepcopy(first.problem.model.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.losses, second.refreshes = first.losses, first.refreshes
    return advance(second, range(STEPS // 2, STEPS), one_batch)


def interrupted(**events: Event) -> Loop:
    """Steps with refreshes, and events: `at_25=f` calls f(optimizer, problem) before step 25."""
    moments = {int(name.removeprefix("at_")): event for name, event in events.items()}

    def loop(case: Case) -> Run:
        run = begun(case)
        for step in range(STEPS):
            if step in moments:
                moments[step](run.optimizer, run.problem)
            advance(run, [step], one_batch)
        return run

    return loop


def transferred(case: Case) -> Run:
    """A first optimizer's posterior becomes q_out of a second one, which is refreshed no more."""
    source = begun(case)
    for step in range(BURN_IN):
        source.losses.append(source.optimizer.step(source.problem.closure(step)))
    run = begun(case)
    run.losses = source.losses
    for step in range(BURN_IN, STEPS):
        if step == 2 * BURN_IN:
            run.optimizer.set_outer(source.optimizer.posterior_states())
        run.losses.append(run.optimizer.step(run.problem.closure(step)))
    return run


def next_task(optimizer: Any, problem: Problem) -> None:
    """The posterior becomes the prior."""
    optimizer.next_task()


def scheduled(optimizer: Any, problem: Problem) -> None:
    """Rates change, as by a scheduler."""
    for group in optimizer.param_groups:
        group.update(lr=0.5 * group["lr"], momentum=0.5, ess=2.0 * group["ess"])


def frozen(optimizer: Any, problem: Problem) -> None:
    """The first parameter is frozen; steps are plain until the next refresh."""
    problem.named()[0][1].requires_grad_(False)


def thawed(optimizer: Any, problem: Problem) -> None:
    """The first parameter is trained again."""
    problem.named()[0][1].requires_grad_(True)


def edited(optimizer: Any, problem: Problem) -> None:
    """Someone else changes the weights, and the posterior follows."""
    with torch.no_grad():
        for _, p in problem.named():
            p.mul_(0.5)


# ---- cases ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An optimizer, made for a problem, in a training loop."""

    make: Make
    dtype: torch.dtype = F64
    problem: Callable[[torch.dtype], Problem] = Network
    loop: Loop = corrected
