"""The loop: one run, from its recipe to a list of points. The counter stands in the closure, so nothing escapes it.

An evaluation is the gradient of one mini-batch of `recipe.batch` examples, wherever it is spent: a corrected step
costs two, a mega-batch one for each of its mini-batches, a batch three times as large three.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from expfam_poco.reproduce.corpus import MEGA_BATCH, TRAINING
from expfam_poco.reproduce.data import Source
from expfam_poco.reproduce.problems import Batch, Problem
from expfam_poco.reproduce.recipe import DRAWN, Recipe, make_optimizer

Point = dict[str, float | None]
DIVERGED = 1e6
"""A measure beyond this ends a run: nothing that far out comes back."""


class Training:
    """A run.

    Args:
        recipe: what to do.
        seed: of weights, batches, augmentation and noise.
        part: of the held-out data, "tune" or "report".
        source: where data and device are.
        folder: where runs that others start from are kept.
    """

    def __init__(self, recipe: Recipe, seed: int, part: str, source: Source, folder: Path) -> None:
        self.recipe, self.seed = recipe, seed
        torch.manual_seed(seed)
        self.problem: Problem = recipe.problem.make(seed, part, source)
        self.optimizer = make_optimizer(recipe, self.problem.model, seed)
        if recipe.start is not None:
            start(self, recipe.start, source, folder)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.device = source.device
        self.step = self.refreshes = self.examples = 0
        self.seconds = 0.0
        self.points: list[Point] = []

    @property
    def evaluations(self) -> float:
        """Gradients of mini-batches so far."""
        return self.examples / self.recipe.batch

    def run(self, tell: Callable[[float], None] = lambda share: None) -> str:
        """Train to the end; empty, or why it ended before."""
        r = self.recipe
        self._record()
        try:
            while self.step < r.steps and self._affordable():
                self.advance()
                if self.step % r.validate_every == 0 or self.step == r.steps:
                    self._record()
                    tell(max(self.step / r.steps, self.evaluations / (r.evaluations or float("inf"))))
            if self.points[-1]["step"] != self.step:
                self._record()
        except (FloatingPointError, torch.linalg.LinAlgError) as error:
            return str(error) or type(error).__name__
        return ""

    def _affordable(self) -> bool:
        limit = self.recipe.evaluations
        return limit is None or self.evaluations + self._cost() <= limit + 1e-9

    def _cost(self) -> float:
        """Evaluations that the next step takes, with the mega-batch that is due."""
        r = self.recipe
        if not r.corrected or self.step < r.burn_in:
            return 1.0
        mega = 0.0 if not self._due() else r.mega or self.problem.size / r.batch
        return 2.0 + mega

    def _due(self) -> bool:
        since = self.step - self.recipe.burn_in
        return self.recipe.corrected and since >= 0 and since % self.recipe.every == 0

    def advance(self) -> None:
        """A mega-batch where one is due, and a step."""
        began = time.perf_counter()
        if self._due():
            self.refresh()
        factor = self.recipe.factor(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        closures, sizes = self._closures(self.problem.batch(TRAINING, self.step, self._rows()))
        if self.recipe.corrected or self.recipe.method in DRAWN:
            self.optimizer.step(closures, weights=sizes) if len(closures) > 1 else self.optimizer.step(closures[0])
        else:
            self.optimizer.zero_grad()
            for closure, size in zip(closures, sizes, strict=True):
                (closure() * (size / sum(sizes))).backward()
            self.optimizer.step()
        self.step += 1
        self.seconds += time.perf_counter() - began

    def refresh(self) -> None:
        """A mega-batch: fresh mini-batches of a stream of its own, or all data in chunks."""
        r, parts = self.recipe, []
        if r.mega:
            first = self.refreshes * r.mega
            parts = [self.problem.batch(MEGA_BATCH, first + number, r.batch) for number in range(r.mega)]
        else:
            parts = self.problem.everything(r.chunks, self.refreshes)
        found = [self._closures(part) for part in parts]
        closures = [closure for several, _ in found for closure in several]
        self.optimizer.refresh(closures, weights=[float(size) for _, sizes in found for size in sizes])
        self.refreshes += 1

    def _rows(self) -> int:
        r = self.recipe
        return r.batch * (r.later_batch if self.step >= r.burn_in else 1)

    def _closures(self, batch: Batch) -> tuple[list[Callable[[], Tensor]], list[int]]:
        """One closure for each micro-batch, and their sizes."""
        parts = list(zip(*(tensor.chunk(self.recipe.accumulate) for tensor in batch), strict=True))
        return [self._closure(part) for part in parts], [len(part[0]) for part in parts]

    def _closure(self, batch: Batch) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            self.examples += len(batch[0])
            with self._precision():
                loss = self.problem.loss(batch)
            if not torch.isfinite(loss.detach()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}")
            return loss

        return evaluate

    def _precision(self) -> Any:
        if self.recipe.dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    def _record(self) -> None:
        found = self.problem.evaluate()
        wrong = [value for name, value in found.items() if not (math.isfinite(value) and value < DIVERGED)]
        measures = {name: value if math.isfinite(value) else None for name, value in found.items()}
        passes = self.examples / self.problem.size
        counted = {"step": self.step, "evaluations": self.evaluations, "passes": passes, "seconds": self.seconds}
        self.points.append({**counted, **measures})
        if wrong:
            raise FloatingPointError(f"diverged at step {self.step}")


def start(training: Training, first: Recipe, source: Source, folder: Path) -> None:
    """Begin with another run's weights, all but layers of other shapes, and its posterior where both have one.

    Rates, ess and correction stay this run's. The other run is made once, and kept in the folder.
    """
    name = sha256(repr((first, training.seed, source.random)).encode()).hexdigest()[:16]
    path = folder / f"start-{name}.pt"
    if not path.is_file():
        before = Training(first, training.seed, "tune", source, folder)
        reason = before.run()
        if reason:
            raise RuntimeError(f"the run to start from ended early: {reason}")
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": before.problem.model.state_dict(), "optimizer": before.optimizer.state_dict()}
        with TemporaryDirectory(prefix=".", dir=folder) as aside:  # other workers may be making the same file
            torch.save(state, Path(aside, path.name))
            os.replace(Path(aside, path.name), path)
    stored = torch.load(path, map_location=source.device, weights_only=True)
    model = training.problem.model
    mine = model.state_dict()
    same = {key: value for key, value in stored["model"].items() if key in mine and value.shape == mine[key].shape}
    model.load_state_dict({**mine, **same})
    whole = len(same) == len(mine)
    if whole and training.recipe.method.startswith("ivon") and first.method.startswith("ivon"):
        own = [{k: v for k, v in group.items() if k != "params"} for group in training.optimizer.param_groups]
        training.optimizer.load_state_dict(stored["optimizer"])
        for group, values in zip(training.optimizer.param_groups, own, strict=True):
            group.update(values)
    torch.manual_seed(training.seed)
