"""What corrections are worth on the tasks of `compare`: a method trains for a while, and then is measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from expfam_poco.compare import plot
from expfam_poco.compare.methods import find_methods
from expfam_poco.compare.runner import mini_batches
from expfam_poco.compare.tasks import Task, load_task
from expfam_poco.errors import InputError
from expfam_poco.tools.worth import Worth, worth

PLAIN = ("SGD", "IVON", "VON")


@dataclass(frozen=True)
class Options:
    """What the command line asks for; the names are those of its options."""

    task: str = "breast-cancer"
    method: str = "SGD"
    passes: float = 2.0
    batch: int = 5
    every: int = 10
    size: int = 10
    seed: int = 0
    picture: Path | None = None


class Batches:
    """One reshuffled pass after another, as long as a pass, of the task's examples."""

    def __init__(self, task: Task, batch: int, seed: int) -> None:
        self._size, self._batch, self._seed = task.size, batch, seed

    def __len__(self) -> int:
        return self._size // self._batch

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.islice(mini_batches(self._size, self._batch, self._seed), len(self))


def worth_on_task(options: Options, out: Console) -> Worth:
    """Train the method, measure, and show the table.

    Args:
        options: what to do.
        out: where the table goes.

    Raises:
        InputError: for wrong input.
    """
    for name, value in (("batch", options.batch), ("every", options.every), ("size", options.size)):
        if value < 1:
            raise InputError(f"--{name} {value}: give a number of 1 or more.")
    if not (math.isfinite(options.passes) and options.passes >= 0.0):
        raise InputError(f"--passes {options.passes:g}: give a number of passes, such as 2.")
    if options.picture is not None and not plot.plotting_available():
        raise InputError("--picture needs matplotlib; run: python -m pip install 'expfam_poco[examples]'.")
    (method,) = find_methods([options.method])
    if method.name not in PLAIN:
        raise InputError(f"--method {method.name}: a plain method is measured; give one of {', '.join(PLAIN)}.")
    task = load_task(options.task)
    if options.batch > task.size:
        raise InputError(f"--batch {options.batch}: the task has {task.size} examples; give fewer.")
    model = nn.ParameterList([nn.Parameter(torch.zeros(task.shape, dtype=torch.float64))])
    settings = {"delta": task.delta, "ess": 100.0 * task.size, **method.settings(task, options.batch)}
    optimizer = method.build(model[0], settings, options.seed)
    on_gradients = isinstance(optimizer, torch.optim.SGD)

    def closure_of(index: Tensor) -> Callable[[], Any]:
        return lambda: task.loss(model[0], index)

    steps = int(options.passes * task.size / options.batch)
    for index in itertools.islice(mini_batches(task.size, options.batch, options.seed), steps):
        if on_gradients:
            optimizer.zero_grad()
            closure_of(index)().backward()
            optimizer.step()
        else:
            optimizer.step(closure_of(index))
    try:
        found = worth(
            model, optimizer, closure_of, Batches(task, options.batch, options.seed + 1), every=options.every,
            size=options.size, seed=options.seed,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from error
    gap = task.gap(np.asarray(model[0].detach()))
    head = f"{task.name}: {method.name}, batch {options.batch}, after {steps} steps (gap {gap:.1e})"
    out.print(head, highlight=False, markup=False, soft_wrap=True)
    out.print(found.table(), highlight=False, markup=False, soft_wrap=True)
    if options.picture is not None:
        try:
            found.picture(options.picture)
        except OSError as error:
            raise InputError(f"--picture: {options.picture} cannot be written ({error.strerror}).") from error
        out.print(f"picture: {options.picture}", highlight=False, markup=False, soft_wrap=True)
    return found
