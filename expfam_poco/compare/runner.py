"""One method on one seed, with everything it evaluates counted.

A pass is N gradient evaluations of single examples, wherever they are spent: a mini-batch costs B, a corrected step
2B (θ_in and θ_out), antithetic draws twice that, a refresh the N examples of its mega-batch. The counter stands in
the closure itself, so nothing escapes it. Second derivatives are counted beside, one for each example too.

Dedicated solvers count as they do (`solvers`).

Mini-batches come from reshuffled epochs, without the incomplete last batch. Shuffling, chunks and noise depend on the
seed alone: every method sees the same mini-batches in the same order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco.compare import solvers
from expfam_poco.compare.methods import Method, Settings
from expfam_poco.compare.tasks import Task

RECORD_EVERY = 0.1
"""Passes between two records of the gap."""

DIVERGED = 1e6
"""A gap beyond this ends a run: nothing that far out comes back within the budget."""

Progress = Callable[[float], None]


@dataclass
class Curve:
    """What one run recorded: the gap at the posterior mean, and what had been spent by then.

    `times` are CPU seconds of steps and refreshes, without those of records; `outer` holds (begin, end) in passes of
    every refresh. `reason` is empty, or says why the run ended early.
    """

    method: str
    seed: int
    passes: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    hessians: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    outer: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Budget:
    """How long and with which mini-batches: the same for every method."""

    passes: float
    batch: int


class _Counter:
    """Closures of a task at one weight, which count the examples they evaluate."""

    def __init__(self, task: Task, weight: Parameter) -> None:
        self.task = task
        self.weight = weight
        self.examples = 0

    def closure(self, index: Tensor) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            self.examples += len(index)
            return self.task.loss(self.weight, index)

        return evaluate


def train(
    task: Task,
    method: Method,
    settings: Settings,
    seed: int,
    budget: Budget,
    progress: Progress = lambda passes: None,
) -> Curve:
    """Run a method from θ = 0 until its budget of passes is spent or it diverges.

    Args:
        task: the problem.
        method: what to run.
        settings: its hyperparameters, with `delta` and `ess`.
        seed: of mini-batches, chunks and noise.
        budget: passes and batch size.
        progress: called with the passes spent so far, now and then.
    """
    if method.solver:
        return _solve(task, method, seed, budget, progress)
    weight = Parameter(torch.zeros(task.shape, dtype=torch.float64))
    optimizer: Any = method.build(weight, settings, seed)
    counter = _Counter(task, weight)
    run = _Run(task, method, settings, budget, counter, optimizer, Curve(method.name, seed))
    started = time.perf_counter()
    try:
        run.go(seed, progress)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        run.curve.reason = str(error)
    run.curve.seconds = time.perf_counter() - started
    return run.curve


def _solve(task: Task, method: Method, seed: int, budget: Budget, progress: Progress) -> Curve:
    """A solver's curve; its steps are those of one pass over the data by examples, or of one over all of them."""
    curve, started = Curve(method.name, seed), time.perf_counter()
    each = task.size if method.solver == "saga" else 1
    start = solvers.Point(0.0, 0.0, np.zeros(task.shape))
    for point in (start, *solvers.points(method.solver, task, seed, budget.passes)):
        curve.passes.append(point.passes)
        curve.steps.append(round(point.passes) * each)
        curve.hessians.append(0.0)
        curve.times.append(point.seconds)
        curve.gaps.append(task.gap(point.weight))
        progress(point.passes)
    curve.seconds = time.perf_counter() - started
    return curve


@dataclass
class _Run:
    task: Task
    method: Method
    settings: Settings
    budget: Budget
    counter: _Counter
    optimizer: Any
    curve: Curve
    steps: int = 0
    spent: float = 0.0

    @property
    def passes(self) -> float:
        return self.counter.examples / self.task.size

    def go(self, seed: int, progress: Progress) -> None:
        """Inner steps, and for a corrected method a refresh after the burn-in and after every inner loop."""
        batches = mini_batches(self.task.size, self.budget.batch, seed)
        chunk_order = np.random.default_rng([seed, 1])
        inner = self.settings.get("inner") or max(1, round(0.5 * self.task.size / self.budget.batch))
        since_refresh = math.inf
        self._record()
        while self._affordable(self._step_cost(since_refresh)):
            ready = self.passes >= self.settings.get("burn_in", 0.0) and since_refresh >= inner
            if self.method.corrected and ready and self._affordable(self._draws + self._step_cost(0)):
                self._refresh(chunk_order)
                since_refresh = 0
            self._step(self.counter.closure(next(batches)))
            since_refresh += 1
            if self.passes >= self.curve.passes[-1] + RECORD_EVERY - 1e-9:
                self._record()
                progress(self.passes)
                if not self.curve.gaps[-1] < DIVERGED:
                    self.curve.reason = f"the gap is {self.curve.gaps[-1]:.0e}"
                    return
        self._record()

    @property
    def _draws(self) -> int:
        """Evaluations of the loss for each point of q."""
        return 2 if self.settings.get("noise") == "antithetic" else 1

    def _step_cost(self, since_refresh: float) -> float:
        """Passes that the next step takes."""
        pair = 2 if self.method.corrected and math.isfinite(since_refresh) else 1
        return self._draws * pair * self.budget.batch / self.task.size

    def _affordable(self, cost: float) -> bool:
        return self.passes + cost <= self.budget.passes + 1e-9

    def _step(self, closure: Callable[[], Tensor]) -> None:
        begun = time.process_time()
        if self.settings.get("schedule") == "cosine":
            share = min(1.0, self.passes / self.budget.passes)
            self.optimizer.param_groups[0]["lr"] = self.settings["lr"] * 0.5 * (1.0 + math.cos(math.pi * share))
        if isinstance(self.optimizer, torch.optim.SGD):
            self.optimizer.zero_grad()
            closure().backward()
            self.optimizer.step()
        else:
            self.optimizer.step(closure)
        self.steps += 1
        self.spent += time.process_time() - begun

    def _refresh(self, order: np.random.Generator) -> None:
        """All examples in random chunks that weigh as many examples as they have."""
        self._record()
        parts = np.array_split(order.permutation(self.task.size), int(self.settings["chunks"]))
        chunks = [torch.from_numpy(part) for part in parts if len(part)]
        begin, begun = self.passes, time.process_time()
        self.optimizer.refresh([self.counter.closure(c) for c in chunks], weights=[len(c) for c in chunks])
        self.spent += time.process_time() - begun
        self.curve.outer.append((begin, self.passes))
        self._record()

    def _record(self) -> None:
        curve = self.curve
        if curve.passes and curve.passes[-1] == self.passes:
            return
        curve.passes.append(self.passes)
        curve.steps.append(self.steps)
        curve.times.append(self.spent)
        second = self.method.curvature_evaluations(self.settings)
        curve.hessians.append(self.passes if second else 0.0)
        curve.gaps.append(self.task.gap(self.counter.weight.detach().numpy()))


def mini_batches(size: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless mini-batches from reshuffled epochs; an incomplete last batch is left out."""
    random = np.random.default_rng([seed, 0])
    while True:
        order = torch.from_numpy(random.permutation(size))
        for start in range(0, size - batch + 1, batch):
            yield order[start : start + batch]
