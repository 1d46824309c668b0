"""Seconds and passes of L2-regularised logistic regression to a gap, against scikit-learn's dedicated solvers.

    python benchmarks/convex.py                 # all three data sets, or the named ones, and what compiling takes
    python benchmarks/convex.py --light         # breast cancer alone, eagerly, one repeat (what the tests run)
    python benchmarks/convex.py --tune digits   # the grid from which SETTINGS are taken, on seeds from 1000 on

CPU seconds of one thread from θ = 0, the data and their labels in memory, without the gap's evaluation: medians of
REPEATS runs, the methods taking turns. saga, lbfgs and compiled loops run anew for every point, with just
the iterations (or loops, in one call) that lead to it; compiling comes before, and is timed apart.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import expfam_poco as poco
from expfam_poco.compare.report import versions
from expfam_poco.compare.tasks import Task, load_task

HERE = Path(__file__).resolve().parent
LEVELS = (1e-6, 1e-12)
REPEATS = 5
LONGEST = 10.0  # CPU seconds after which a run has not got there
RESULT = HERE / "results" / "convex.json"
NAMES = ("breast-cancer", "digits", "synthetic")


class Setting(NamedTuple):
    """What is tuned: η, the batch, steps between two refreshes in passes, and η of the precision (Newton alone)."""

    lr: float
    batch: int
    inner: float
    first: float = 1.0  # of the precision's own curvature: hess_init


Point = tuple[float, float, np.ndarray]
"""Passes, seconds and θ."""
Method = Callable[[Task, int], Iterator[Point]]

# Tuned for seconds to 1e-6 (`--tune`); SVRG and VON-PoCo as optimizers run with the same.
SETTINGS: dict[str, dict[str, Setting]] = {
    "SVRG": {
        "breast-cancer": Setting(2.0, 50, 4.0),
        "digits": Setting(1.4, 20, 4.0),
        "synthetic": Setting(1.0, 50, 0.5),
    },
    "VON-PoCo": {
        "breast-cancer": Setting(0.9, 95, 0.5, 0.3),
        "digits": Setting(0.9, 300, 0.5, 0.1),
        "synthetic": Setting(0.9, 500, 0.1, 0.1),
    },
}
GRID: dict[str, dict[str, Sequence[Any]]] = {
    "SVRG": {"lr": (0.5, 0.7, 1.0, 1.5, 2.0, 3.0), "batch": (10, 20, 50), "inner": (1.0, 2.0, 4.0)},
    "VON-PoCo": {"lr": (0.3, 0.5, 0.7, 0.9), "batch": (0.05, 0.1, 0.25), "inner": (0.5, 1.0), "first": (0.1, 0.3)},
}


def load(name: str) -> Task:
    """A data set of the table, standardised or scaled, with an intercept."""
    if name == "breast-cancer":
        return load_task(name)
    if name == "digits":
        task = load_task(name)
        return Task("digits", task.features, task.labels % 2, ("even", "odd"), task.delta)
    random = np.random.default_rng(0)
    x = np.column_stack([random.normal(size=(20000, 100)), np.ones(20000)])
    chance = 1.0 / (1.0 + np.exp(-x[:, :100] @ random.normal(size=100) / 5.0))
    return Task("synthetic", x, (random.random(20000) < chance).astype(np.int64), ("0", "1"), 1e-3)


def made(name: str, task: Task, setting: Setting) -> tuple[torch.nn.Parameter, Any]:
    """The weights, and one of our optimizers for them."""
    weight = torch.nn.Parameter(torch.zeros(task.shape, dtype=torch.float64))
    if name == "SVRG":
        return weight, poco.SVRG([weight], lr=setting.lr, weight_decay=task.delta, stale_after=None)
    ess, first = 100.0 * task.size, setting.first
    return weight, poco.VONPoCo(
        [weight], lr=setting.lr, ess=ess, weight_decay=task.delta, hess_init=first, noise="zero", stale_after=None
    )  # fmt: skip


def ours(name: str, how: str, settings: dict[str, Setting]) -> Method:
    """One of our methods: by ordinary "steps", or in "eager" or "compiled" inner loops."""

    def run(task: Task, seed: int) -> Iterator[Point]:
        setting = settings[task.name]
        data = poco.GeneralisedLinear(torch.from_numpy(task.features), torch.from_numpy(task.labels))
        each = 1.0 + 2.0 * inner_batches(task, setting, seed, 1).numel() / task.size
        weight, optimizer = made(name, task, setting)
        spent = 0.0
        for count in itertools.count(1):
            begun = time.process_time()
            if how == "compiled":  # anew, in one call
                weight, optimizer = made(name, task, setting)
                loops = inner_batches(task, setting, seed, count)
                optimizer.inner_loop(data, loops, refresh=True, compiled=True)
                spent = time.process_time() - begun
            else:  # goes on
                batches = inner_batches(task, setting, seed, count)[-1]
                begun = time.process_time()
                if how == "eager":
                    optimizer.inner_loop(data, batches, refresh=True)
                else:
                    optimizer.refresh([partial(data.mean_loss, weight)])
                    for own in batches:
                        optimizer.step(partial(data.mean_loss, weight, own))
                spent += time.process_time() - begun
            yield each * count, spent, weight.detach().numpy()

    return run


def inner_batches(task: Task, setting: Setting, seed: int, count: int) -> torch.Tensor:
    """The mini-batches of `count` inner loops, R × M × B: reshuffled epochs without the incomplete last mini-batch."""
    orders, steps = np.random.default_rng(seed), max(1, round(setting.inner * task.size / setting.batch))
    whole = task.size // setting.batch
    epochs = [orders.permutation(task.size)[: whole * setting.batch] for _ in range(-(-count * steps // whole))]
    rows = np.concatenate(epochs).reshape(-1, setting.batch)[: count * steps]
    return torch.from_numpy(rows.reshape(count, steps, setting.batch))


def solver(name: str) -> Method:
    """A solver of scikit-learn, from the start with ever more iterations: every point's seconds are a whole run's."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    def run(task: Task, seed: int) -> Iterator[Point]:
        for count in itertools.count(1):
            model = LogisticRegression(
                C=1.0 / (task.delta * task.size), solver=name, max_iter=count, tol=1e-14 if name == "lbfgs" else 0.0,
                fit_intercept=False, random_state=seed,
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                begun = time.process_time()
                model.fit(task.features, task.labels)
                spent = time.process_time() - begun
            yield float(model.n_iter_[0]), spent, model.coef_[0]

    return run


def reached(
    method: Method, task: Task, seed: int, levels: Sequence[float] = LEVELS
) -> dict[float, tuple[float, float]]:
    """Passes and seconds at the first point whose gap is at most each level; levels not reached are left out."""
    found: dict[float, tuple[float, float]] = {}
    try:
        for passes, seconds, weight in method(task, seed):
            gap = task.gap(weight)
            found.update({level: (passes, seconds) for level in levels if gap <= level and level not in found})
            if len(found) == len(levels) or not gap < 1e6 or seconds > LONGEST or passes > 3000:
                break
    except (FloatingPointError, ValueError):
        pass  # diverged
    return found


METHODS: dict[str, Method] = {
    "saga (scikit-learn)": solver("saga"),
    "lbfgs (scikit-learn)": solver("lbfgs"),
    **{
        f"{name}, {label}": ours(name, how, SETTINGS[name])
        for name in SETTINGS
        for label, how in (("optimizer", "steps"), ("inner loop", "eager"), ("inner loop, compiled", "compiled"))
    },
}


def tune(name: str) -> None:
    """Print the best settings of both methods, by the worst of two seeds' seconds to 1e-6, in compiled loops."""
    task = load(name)
    for method, grid in GRID.items():
        rows = []
        for values in itertools.product(*grid.values()):
            setting = Setting(**dict(zip(grid, values, strict=True)))
            if setting.batch < 1:
                setting = setting._replace(batch=int(setting.batch * task.size))
            run = ours(method, "compiled", {name: setting})
            for seed in (1000, 1001):
                found = reached(run, task, seed)
                rows.append((*(found.get(level, (0.0, 99.0))[1] for level in LEVELS), setting))
        worst = {setting: max(row[:2] for row in rows if row[2] == setting) for *_, setting in rows}
        for setting, (first, second) in sorted(worst.items(), key=lambda item: item[1])[:6]:
            print(f"{name} {method}: {1e3 * first:.1f} ms, {1e3 * second:.1f} ms to 1e-12, {setting}", flush=True)


def compile_seconds(name: str) -> float:
    """Seconds of a first compiled loop of a method."""
    task = load("breast-cancer")
    data = poco.GeneralisedLinear(torch.from_numpy(task.features), torch.from_numpy(task.labels))
    _, optimizer = made(name, task, SETTINGS[name]["breast-cancer"])
    batches = inner_batches(task, SETTINGS[name]["breast-cancer"], 0, 1)
    optimizer.inner_loop(data, batches, refresh=True, compiled=True)
    seconds: float = optimizer.diagnostics()["compile_seconds"]
    return seconds


def compiling() -> dict[str, dict[str, float]]:
    """What compiling takes in a new process, with an empty cache on disk and with what that has left there."""
    found: dict[str, dict[str, float]] = {}
    for name in SETTINGS:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--compile", name]
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            runs = [subprocess.run(command, env=environment, capture_output=True, check=True) for _ in range(2)]
        found[name] = dict(zip(("first", "from the cache"), (float(run.stdout) for run in runs), strict=True))
    return found


def measure(names: Sequence[str], methods: dict[str, Method], repeats: int) -> list[dict[str, Any]]:
    """Median passes and seconds to every level, of repeats with seeds of their own, the methods taking turns."""
    rows = []
    for name in names:
        task = load(name)
        found: dict[str, list[dict[float, tuple[float, float]]]] = {method: [] for method in methods}
        for repeat in range(-1, repeats):
            for method, run in methods.items():
                if "optimizer" in method and repeat != 0:
                    continue  # so slow that one run says enough
                result = reached(run, task, max(repeat, 0), LEVELS[:1] if repeat < 0 else LEVELS)
                if repeat >= 0:  # the first warms up, and compiles
                    found[method].append(result)
        for method, results in found.items():
            row: dict[str, Any] = {"task": name, "method": method}
            for level in LEVELS:
                known = [result[level] for result in results if level in result]
                there = len(known) == len(results)
                row[f"{level:.0e}"] = {
                    "passes": statistics.median(p for p, _ in known) if there else None,
                    "seconds": statistics.median(t for _, t in known) if there else None,
                    "lowest": min(t for _, t in known) if there else None,
                    "highest": max(t for _, t in known) if there else None,
                }
            rows.append(row)
            print(row, flush=True)
    return rows


def table(content: dict[str, Any]) -> str:
    """The table in Markdown: milliseconds (passes) to both levels on each data set."""
    rows = content["rows"]
    names = list(dict.fromkeys(row["task"] for row in rows))
    head = ["", *(f"{name}, {level:.0e}" for name in names for level in LEVELS)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        known = {row["task"]: row for row in rows if row["method"] == method}
        for name, level in itertools.product(names, LEVELS):
            own = known.get(name, {}).get(f"{level:.0e}", {})
            there = own.get("seconds") is not None
            cells.append(f"{1e3 * own['seconds']:.3g} ({own['passes']:.0f})" if there else "–")
        lines.append([method, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(content: dict[str, Any]) -> None:
    """Write the numbers, and the table into RESULTS.md."""
    RESULT.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    path = HERE / "RESULTS.md"
    pattern = re.compile(r"(<!-- table convex -->\n).*?(<!-- end -->)", re.DOTALL)
    text = path.read_text(encoding="utf-8")
    path.write_text(pattern.sub(lambda found: f"{found[1]}\n{table(content)}\n{found[2]}", text), encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """As the module says."""
    torch.set_num_threads(1)
    if arguments[:1] == ["--tune"]:
        for chosen in arguments[1:]:
            tune(chosen)
    elif arguments[:1] == ["--compile"]:
        print(compile_seconds(arguments[1]))
    elif arguments == ["--light"]:
        some = {name: method for name, method in METHODS.items() if "compiled" not in name and "optimizer" not in name}
        print(table({"rows": measure(NAMES[:1], some, 1)}))
    else:
        names = [name for name in arguments if name != "compiling"] or ([] if arguments else list(NAMES))
        content = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"rows": []}
        content |= {"versions": versions(), "repeats": REPEATS, "settings": plain_settings()}
        rows = measure(names, METHODS, REPEATS) + [row for row in content["rows"] if row["task"] not in names]
        content["rows"] = sorted(rows, key=lambda row: NAMES.index(row["task"]))
        if not arguments or "compiling" in arguments:
            content["compile seconds"] = compiling()
        report(content)


def plain_settings() -> dict[str, Any]:
    """SETTINGS in plain types."""
    return {name: {task: own._asdict() for task, own in settings.items()} for name, settings in SETTINGS.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
