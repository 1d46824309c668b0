"""Dedicated solvers beside the optimizers: scikit-learn's saga, and the L-BFGS that its lbfgs calls.

Both get the same regularised loss, with the intercept as a weight like all others. A pass of saga is one of its epochs;
L-BFGS counts evaluations of the whole loss and its gradient. saga shows nothing of its way, so that it is run anew for
every number of epochs, and each point's seconds are those of a whole run.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from expfam_poco.compare.tasks import Task
from expfam_poco.errors import InputError


class Point(NamedTuple):
    """θ after some passes, and the CPU seconds until then."""

    passes: float
    seconds: float
    weight: np.ndarray


def saga(task: Task, seed: int, passes: float) -> Iterator[Point]:
    """Defazio et al. 2014 as scikit-learn has it, with 1, 2, … epochs."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    found = list[Point]()
    for count in range(int(passes + 1e-9) + 1):
        model = LogisticRegression(
            C=1.0 / (task.delta * task.size), solver="saga", max_iter=max(count, 1), tol=0.0, fit_intercept=False,
            random_state=seed,
        )  # fmt: skip
        begun = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(task.features, task.labels)
        spent = time.process_time() - begun
        coefficients = model.coef_
        found.append(Point(float(count), spent, coefficients[0] if len(task.classes) == 2 else coefficients.T))
    least = np.minimum.accumulate([point.seconds for point in reversed(found)])[::-1]
    # The first one has warmed up; and what more epochs take is enough for fewer.
    return iter([point._replace(seconds=float(own)) for point, own in zip(found[1:], least[1:], strict=True)])


def lbfgs(task: Task, seed: int, passes: float) -> Iterator[Point]:
    """Liu and Nocedal 1989 as SciPy has it: an evaluation is a pass; the points are those of its iterations."""
    from scipy.optimize import fmin_l_bfgs_b  # type: ignore[import-untyped]

    evaluations, begun, aside = 0, time.process_time(), 0.0
    found: list[Point] = []

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal evaluations
        evaluations += 1
        loss, gradient = task.evaluate(flat.reshape(task.shape))
        return loss, gradient.ravel()

    def note(flat: np.ndarray) -> None:
        nonlocal aside
        paused = time.process_time()
        found.append(Point(float(evaluations), paused - begun - aside, flat.reshape(task.shape).copy()))
        aside += time.process_time() - paused

    start = np.zeros(task.weights)
    fmin_l_bfgs_b(value, start, factr=0.0, pgtol=1e-15, maxfun=int(passes), callback=note)
    return iter([point for point in found if point.passes <= passes])


SOLVERS: dict[str, Callable[[Task, int, float], Iterator[Point]]] = {"saga": saga, "lbfgs": lbfgs}


def available() -> bool:
    """Whether scikit-learn, which brings SciPy, is installed."""
    return importlib.util.find_spec("sklearn") is not None


def check(name: str) -> None:
    """Refuse a solver that is not installed.

    Raises:
        InputError: names what to install.
    """
    if not available():
        raise InputError(
            f"--methods {name}: it needs scikit-learn, which is not installed; run: python -m pip install "
            "'expfam_poco[examples]', or leave it out."
        )


def points(name: str, task: Task, seed: int, passes: float) -> Iterator[Any]:
    """What a solver passes through within a budget of passes, from θ = 0, on one thread."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped, unused-ignore]  # of scikit-learn

    with threadpool_limits(1):
        return SOLVERS[name](task, seed, passes)
