r"""The tasks: L2-regularised logistic and softmax regression in float64, with the minimum to machine precision.

The regularised loss is  F(θ) = (1/N) Σ_i ℓ_i(θ) + δ/2 ‖θ‖²,  ℓ_i the negative log-likelihood of example i; the
intercept is regularised like every weight, as IVON's `weight_decay` does. δ > 0 makes F strictly convex, also in
the d × C matrix of softmax regression, whose columns could otherwise be shifted together.

**The gap** F(θ) − F(θ*) is not computed as a difference of two losses, which would leave 1e-16 of noise. With
z = logits, p* = softmax(z*) and ∇F(θ*) = 0,

    F(θ) − F(θ*) = (1/N) Σ_i [ log Σ_k p*_ik exp(Δz_ik) − Σ_k p*_ik Δz_ik ] + δ/2 ‖θ − θ*‖²,

a sum of non-negative terms, the first written with `log1p` and `expm1`; it is accurate to far below 1e-16. What
remains is the error of θ* itself, whose gradient is of the order of 1e-17.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from expfam_poco.compare.table import read_table
from expfam_poco.errors import InputError

BUILT_IN = {"breast-cancer": 1e-2, "digits": 1e-3, "wine": 1e-2}
"""The built-in tasks, and the regularisation δ they have by default."""

DEFAULT_DELTA = 1e-2
MOST_WEIGHTS = 4000


class Minimum(NamedTuple):
    """θ*, the largest entry of ∇F(θ*), F(θ*), and the number of Newton steps."""

    weight: np.ndarray
    gradient: float
    loss: float
    steps: int


@dataclass(frozen=True)
class Task:
    """Data and regularisation of one convex problem; small enough to be sent to worker processes.

    Attributes:
        name: how it is called in reports.
        features: N × d, standardised, the last column 1 (the intercept).
        labels: N class numbers.
        classes: names of the classes, at least two.
        delta: δ, on the scale of the mean loss.
        notes: sentences for the reader, such as columns that were left out.
    """

    name: str
    features: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    delta: float
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """N, the number of examples."""
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of θ: d for two classes, d × C for more."""
        columns = self.features.shape[1]
        return (columns,) if len(self.classes) == 2 else (columns, len(self.classes))

    @property
    def weights(self) -> int:
        """The number of weights in θ."""
        return math.prod(self.shape)

    def __getstate__(self) -> dict[str, object]:
        """What goes to a worker process: the data and the minimum, not what is quickly derived from them."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    @cached_property
    def _inputs(self) -> Tensor:
        return torch.from_numpy(self.features)

    @cached_property
    def _targets(self) -> Tensor:
        """Signs ±1 for two classes, class numbers for more."""
        labels = torch.from_numpy(self.labels)
        return labels.double() * 2.0 - 1.0 if len(self.classes) == 2 else labels

    def loss(self, weight: Tensor, index: Tensor) -> Tensor:
        """The mean negative log-likelihood of the examples at `index`, with its graph; without δ."""
        logits = self._inputs[index] @ weight
        targets = self._targets[index]
        if logits.dim() == 1:
            return -functional.logsigmoid(targets * logits).mean()
        return functional.cross_entropy(logits, targets)

    @cached_property
    def minimum(self) -> Minimum:
        """θ*, found by damped Newton steps until the gradient no longer falls."""
        return _newton(self)

    def evaluate(self, weight: np.ndarray) -> tuple[float, np.ndarray]:
        """F(θ) and ∇F(θ)."""
        return _evaluate(self, weight)

    def gap(self, weight: np.ndarray) -> float:
        """F(θ) − F(θ*); infinite where θ is not finite."""
        if not np.isfinite(weight).all():
            return math.inf
        change = weight - self.minimum.weight
        shift = _two_columns(self.features @ change)
        large = np.abs(shift).max(axis=1) > 1.0
        small = ~large
        tilt = np.empty(self.size)
        tilt[small] = np.log1p((self._best[small] * np.expm1(shift[small])).sum(axis=1))
        tilt[large] = _logsumexp(shift[large] + self._best_log[large])
        data = (tilt - (self._best * shift).sum(axis=1)).mean()
        return float(max(data, 0.0) + 0.5 * self.delta * (change**2).sum())

    @cached_property
    def _best_log(self) -> np.ndarray:
        logits = _two_columns(self.features @ self.minimum.weight)
        return logits - _logsumexp(logits)[:, None]

    @cached_property
    def _best(self) -> np.ndarray:
        return np.exp(self._best_log)


def load_task(name: str, delta: float | None = None) -> Task:
    """A built-in task, from the data sets that come with scikit-learn.

    Raises:
        InputError: for an unknown name, a δ that is not positive, or where scikit-learn is missing.
    """
    if name not in BUILT_IN:
        raise InputError(
            f"--task {name!r} is not known; choose one of {', '.join(BUILT_IN)}, or give --data FILE --target COLUMN."
        )
    try:
        from sklearn import datasets
    except ImportError:
        raise InputError(
            f"--task {name!r} needs scikit-learn, which is not installed; "
            "run: python -m pip install 'expfam_poco[examples]'."
        ) from None
    load = {
        "breast-cancer": datasets.load_breast_cancer,
        "digits": datasets.load_digits,
        "wine": datasets.load_wine,
    }[name]
    data = load()
    features = np.asarray(data.data, dtype=np.float64)
    features = features / 16.0 if name == "digits" else _standardised(features)
    classes = tuple(str(label) for label in data.target_names)
    return _make(name, features, np.asarray(data.target), classes, BUILT_IN[name] if delta is None else delta)


def load_csv(path: Path, target: str, delta: float | None = None) -> Task:
    """The task of predicting column `target` of a CSV file from its other, numeric columns.

    Raises:
        InputError: for whatever is wrong with the file, or a δ that is not positive.
    """
    table = read_table(path, target)
    notes = [f"column {name!r} holds one value only and was left out" for name in table.constant]
    delta = DEFAULT_DELTA if delta is None else delta
    return _make(path.name, _standardised(table.features), table.labels, table.classes, delta, notes)


def _make(
    name: str,
    features: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    delta: float,
    notes: Sequence[str] = (),
) -> Task:
    if not (math.isfinite(delta) and delta > 0.0):
        raise InputError(f"--delta {delta:g}: the minimum is unique only for a positive δ; give one, such as 0.01.")
    features = np.column_stack([features, np.ones(len(features))])
    task = Task(name, features, labels.astype(np.int64), classes, float(delta), tuple(notes))
    if task.weights > MOST_WEIGHTS:
        raise InputError(
            f"{name}: {task.weights} weights are too many for a minimum found by Newton's method; "
            f"keep features × classes below {MOST_WEIGHTS}."
        )
    return task


def _standardised(features: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 in every column; powers of two come out first, exactly, lest squares overflow."""
    scaled = np.ldexp(features, -np.frexp(np.abs(features).max(axis=0))[1])
    return (scaled - scaled.mean(axis=0)) / scaled.std(axis=0)


def _two_columns(logits: np.ndarray) -> np.ndarray:
    """Logits as N × C: the single column of a binary task is class 1 against a zero for class 0."""
    return np.column_stack([np.zeros_like(logits), logits]) if logits.ndim == 1 else logits


def _logsumexp(values: np.ndarray) -> np.ndarray:
    top = values.max(axis=1)
    return top + np.log(np.exp(values - top[:, None]).sum(axis=1))


def _newton(task: Task, most_steps: int = 100) -> Minimum:
    """Newton's method with backtracking, until neither the loss nor the gradient falls any further."""
    weight = np.zeros(task.shape)
    best = _evaluate(task, weight)
    for step in range(most_steps):
        direction = np.linalg.solve(_hessian(task, weight), best.gradient.ravel()).reshape(task.shape)
        trial, found = _backtrack(task, weight, direction, best)
        if found is None:
            return Minimum(weight, float(np.abs(best.gradient).max()), best.loss, step)
        weight, best = trial, found
    raise InputError(
        f"{task.name}: Newton's method found no minimum in {most_steps} steps; raise --delta above {task.delta:g}."
    )


class _Value(NamedTuple):
    loss: float
    gradient: np.ndarray


def _evaluate(task: Task, weight: np.ndarray) -> _Value:
    """F and ∇F."""
    logits = _two_columns(task.features @ weight)
    normaliser = _logsumexp(logits)
    rows = np.arange(task.size)
    loss = (normaliser - logits[rows, task.labels]).mean() + 0.5 * task.delta * (weight**2).sum()
    residual = np.exp(logits - normaliser[:, None])
    residual[rows, task.labels] -= 1.0
    if weight.ndim == 1:
        residual = residual[:, 1]
    return _Value(float(loss), task.features.T @ residual / task.size + task.delta * weight)


def _hessian(task: Task, weight: np.ndarray) -> np.ndarray:
    """∇²F as a matrix over the flat weights."""
    features, size = task.features, task.size
    logits = _two_columns(features @ weight)
    share = np.exp(logits - _logsumexp(logits)[:, None])
    if weight.ndim == 1:
        data = features.T @ (features * (share[:, 0] * share[:, 1])[:, None]) / size
        return data + task.delta * np.eye(task.weights)
    columns, classes = task.shape
    data = np.zeros((columns, classes, columns, classes))
    for j in range(classes):
        for k in range(j, classes):
            scale = share[:, j] * ((j == k) - share[:, k])
            data[:, j, :, k] = data[:, k, :, j] = features.T @ (features * scale[:, None]) / size
    return data.reshape(task.weights, task.weights) + task.delta * np.eye(task.weights)


def _backtrack(task: Task, weight: np.ndarray, direction: np.ndarray, here: _Value) -> tuple[np.ndarray, _Value | None]:
    """The first of θ − d, θ − d/2, … that lowers the loss, or near the minimum the gradient; None: there is none."""
    slope = float((here.gradient * direction).sum())
    near = slope < 1e-10 * max(abs(here.loss), 1e-3)
    scale = 1.0
    for _ in range(1 if near else 40):
        trial = weight - scale * direction
        value = _evaluate(task, trial)
        if near and np.abs(value.gradient).max() < np.abs(here.gradient).max():
            return trial, value
        if not near and value.loss <= here.loss - 1e-4 * scale * slope:
            return trial, value
        scale *= 0.5
    return weight, None
