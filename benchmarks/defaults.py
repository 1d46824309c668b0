"""Do the defaults do? Named optimizers with nothing but `lr` and `ess` said, beside themselves tuned and beside AdamW.

    python benchmarks/defaults.py search      # every setting at every rate, a seed of its own, validation part
    python benchmarks/defaults.py compare     # former defaults, defaults and the best setting: three seeds, test
    python benchmarks/defaults.py long        # IVON in runs fifteen times as long, by β₂
    python benchmarks/defaults.py report      # the tables into RESULTS.md

Every method has the same budget of mini-batch gradients, in which the second one of a corrected step and those of
mega-batches (10 mini-batches every 10 steps, after a burn-in) count, and a cosine schedule. ess is the number N of
training examples (tokens) unless a setting says otherwise; binary networks have one rate for all weights, lr · ess (for
their present defaults see `binary_defaults.py`). Every setting has the rate that is best for it. Gaussian posteriors
predict with 16 draws, binary networks with their mode and BatchNorm's statistics for it. `--short` takes seconds. Every
run is kept in `--runs`, and not repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import torch  # noqa: E402
from binary_models import binarize_layers, network  # noqa: E402
from corpus import TRAINING, load  # noqa: E402
from gpt import GPT, preset  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from vsgd import conv_mixer, digits  # noqa: E402

import expfam_poco as poco  # noqa: E402

RESULTS, PAGE = HERE / "results" / "defaults.json", HERE / "RESULTS.md"
EVERY, SIZE, DRAWS = 10, 10, 16  # steps between mega-batches, mini-batches in one; draws of a prediction
ADAMW, STE = "AdamW", "straight-through + Adam"
SEARCHED, SEEDS = 100, (0, 1, 2)
Closure = Callable[[], Tensor]
Setting = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What to learn.

    Args:
        model: a fresh model.
        loss: of a model on rows of the training part.
        score: loss and accuracy of a function input → log-probabilities on a part.
        inputs: of a part.
        examples: N.
        rows: number of training rows.
        batch: rows in a mini-batch.
        budget: mini-batch gradients.
        binary: whether weights are signs.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]
    score: Callable[[Callable[[Tensor], Tensor], str], dict[str, float]]
    inputs: Callable[[str], Tensor]
    examples: int
    rows: int
    batch: int
    budget: int
    binary: bool = False


def classified(logits: Tensor, y: Tensor) -> dict[str, float]:
    """Loss and accuracy of log-probabilities."""
    return {"loss": float(cross_entropy(logits, y)), "accuracy": float((logits.argmax(-1) == y).float().mean())}


def on_digits(model: Callable[[], nn.Module], budget: int, *, centred: bool = False, binary: bool = False) -> Task:
    """A classifier of the digits."""
    data = {n: (2.0 * x - 1.0 if centred else x, y) for n, (x, y) in digits().items()}
    x, y = data["train"]
    return Task(
        model, lambda m, rows: cross_entropy(m(x[rows]), y[rows]),
        lambda predict, part: classified(predict(data[part][0]), data[part][1]),
        lambda part: data[part][0], len(y), len(y), 32, budget, binary,
    )  # fmt: skip


def on_text(budget: int) -> Task:
    """A GPT of 0.1 M weights on bytes of the standard library."""
    corpus, context = load("stdlib", 64), 64
    held = corpus.validation(context, 128)
    parts = {"validation": held[0::2], "test": held[1::2]}
    rows = 4096
    train = torch.cat([corpus.batch(context, 256, seed=0, stream=TRAINING, index=i) for i in range(rows // 256)])
    return Task(
        lambda: GPT(preset("nano", context=context, vocabulary=corpus.tokenizer.vocabulary)),
        lambda m, r: cross_entropy(m(train[r, :-1]).flatten(0, 1), train[r, 1:].flatten()),
        lambda predict, part: classified(predict(parts[part][:, :-1]).flatten(0, 1), parts[part][:, 1:].flatten()),
        lambda part: parts[part][:, :-1], rows * context, rows, 8, budget,
    )  # fmt: skip


def mlp() -> nn.Module:
    """64 → 64 → 10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


TASKS: dict[str, Callable[[], Task]] = {
    "digits": functools.cache(lambda: on_digits(mlp, 600)),
    "convmixer": functools.cache(lambda: on_digits(functools.partial(conv_mixer, 16), 400)),
    "language": functools.cache(lambda: on_text(100)),
    "binary": functools.cache(
        lambda: on_digits(lambda: network("mlp", torch.Size([1, 8, 8]), 10, 64), 800, centred=True, binary=True)
    ),
}


# ---- one run -------------------------------------------------------------------------------------------------


def stream(task: Task, seed: int) -> Iterator[Tensor]:
    """Shuffled mini-batches without end, as rows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randperm(task.rows, generator=generator)
        yield from rows[: task.rows // task.batch * task.batch].split(task.batch)


def made(task: Task, model: nn.Module, method: str, lr: float, seed: int, given: Mapping[str, Any]) -> Any:
    """The optimizer."""
    if method in (ADAMW, STE):
        latent = binarize_layers(model) if task.binary else []
        rest = [p for p in model.parameters() if all(p is not other for other in latent)]
        groups = [{"params": rest, "lr": min(lr, 1e-2)}, {"params": latent}] if latent else rest
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0 if latent else 0.01)
    own = dict(given)
    ess = own.pop("examples", 1.0) * task.examples
    params: Any = list(model.named_parameters())
    if task.binary:
        params = poco.binarize_groups(model, gaussian=own.pop("gaussian", None))
        lr = lr / ess
        own["square_momentum"] = None  # one rate for all weights; `binary_defaults.py` has the defaults since then
    return getattr(poco, method.replace("-", ""))(params, lr, ess, seed=seed, **own)


def run(name: str, method: str, lr: float, seed: int, given: Mapping[str, Any], share: float = 1.0) -> dict[str, Any]:
    """Train; losses and accuracies on the validation and test parts."""
    task, began = TASKS[name](), time.perf_counter()
    torch.manual_seed(seed)
    model = task.model()
    optimizer = made(task, model, method, lr, seed, given)
    corrected, posterior = "PoCo" in method, hasattr(optimizer, "posterior")
    batches, mega, budget = stream(task, seed), stream(task, 1000 + seed), int(share * task.budget)
    rates = [group["lr"] for group in optimizer.param_groups]
    burn_in = min(task.rows // task.batch, budget // 4)
    spent, step = 0, 0

    def closure(rows: Tensor) -> Closure:
        return lambda: task.loss(model, rows)

    try:
        while spent < budget:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = 0.5 * rate * (1.0 + math.cos(math.pi * spent / budget))
            if corrected and step >= burn_in and (step - burn_in) % EVERY == 0:
                optimizer.refresh([closure(next(mega)) for _ in range(SIZE)])
                spent += SIZE
            rows = next(batches)
            if posterior:
                optimizer.step(closure(rows))
            else:
                optimizer.zero_grad()
                closure(rows)().backward()
                optimizer.step()
                with torch.no_grad():
                    for p in optimizer.param_groups[-1]["params"] if task.binary else []:
                        p.clamp_(-1.0, 1.0)
            step += 1
            spent += 2 if corrected and step > burn_in else 1
    except poco.NonFiniteError:
        failed = {"loss": math.inf, "accuracy": 0.0}
        return {"validation": failed, "test": failed, "seconds": time.perf_counter() - began}
    found = evaluated(task, model, optimizer if posterior else None)
    return {**found, "steps": step, "evaluations": spent, "seconds": time.perf_counter() - began}


@torch.no_grad()
def evaluated(task: Task, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Scores of the averaged prediction, or, for binary networks, of the mode."""
    if task.binary:
        poco.recalibrate_batchnorm(model, task.inputs("train").split(399))

    def predict(x: Tensor) -> Tensor:
        if optimizer is None or task.binary:
            return model(x).log_softmax(-1)
        return poco.predict(model, optimizer, x, samples=DRAWS, transform=lambda z: z.softmax(-1)).log()

    model.eval()
    return {part: task.score(predict, part) for part in ("validation", "test")}


# ---- what is compared ----------------------------------------------------------------------------------------

FORMER_IVON: Setting = {"hess_init": 1.0, "beta2": 0.99999}
FORMER_SIGNS: Setting = {"curvature": "relaxed"}
COLD: Setting = {"examples": 250.0}
CORRECTED: dict[str, Setting] = {"α = 1": {"alpha": 1.0}, "α = 0.3": {"alpha": 0.3}}
IVONS: dict[str, Setting] = {
    "former": FORMER_IVON,
    "defaults": {},
    "beta2 = 0.999": {"beta2": 0.999},
    "beta2 = 0.999, ess = 10 N": {"beta2": 0.999, "examples": 10.0},
    "beta2 = 0.999, hess_init = 100": {"beta2": 0.999, "hess_init": 100.0},
    "beta2 = 0.999, gradsq": {"beta2": 0.999, "curvature": "gradsq"},
    "beta2 = 0.99": {"beta2": 0.99},
    "beta2 = 0.99, ess = 10 N": {"beta2": 0.99, "examples": 10.0},
    "beta2 = 0.99, hess_init = 100": {"beta2": 0.99, "hess_init": 100.0},
    "beta2 = 0.99, hess_init = 1, clip_radius = 0.01": {"beta2": 0.99, "hess_init": 1.0, "clip_radius": 0.01},
}
SIGNS: dict[str, Setting] = {
    "former": FORMER_SIGNS,
    "defaults, ess = N": {},
    "defaults": COLD,
    "ess = 1000 N": {"examples": 1000.0},
    "strength = 0.3": {**COLD, "strength": 0.3},
    "beta1 = 0.95": {**COLD, "beta1": 0.95},
    "BatchNorm's lr = 0.3": {**COLD, "gaussian": {"lr": 0.3}},
}
REAL, SIGNED, ADAM = (0.1, 0.3, 1.0, 3.0), (30.0, 100.0, 300.0), (3e-3, 1e-2, 3e-2)
ALSO_CORRECTED = (
    "defaults",
    "beta2 = 0.999",
    "beta2 = 0.999, ess = 10 N",
    "beta2 = 0.99",
    "beta2 = 0.99, hess_init = 100",
)
Settings = tuple[dict[str, Setting], tuple[float, ...]]


def real(*but: str) -> dict[str, Settings]:
    """What is tried on a task of real weights; some settings left out where runs are long."""
    plain = {label: given for label, given in IVONS.items() if label not in but}
    corrected = {label: given for label, given in plain.items() if label in ALSO_CORRECTED}
    corrected = {"former": {**FORMER_IVON, "alpha": 1.0}, **corrected, **CORRECTED}
    return {ADAMW: ({"tuned": {}}, ADAM), "IVON": (plain, REAL), "IVON-PoCoMo": (corrected, REAL)}


PLAN: dict[str, dict[str, Settings]] = {
    "digits": real(),
    "convmixer": real("beta2 = 0.999, gradsq"),
    "language": real(
        *(label for label in IVONS if label not in ("former", "defaults", "beta2 = 0.999", "beta2 = 0.99"))
    ),
    "binary": {
        STE: ({"tuned": {}}, ADAM),
        "BayesBiNN": (SIGNS, SIGNED),
        "BayesBiNN-PoCo": (
            {**SIGNS, "former": {**FORMER_SIGNS, "alpha": 1.0}} | {n: {**COLD, **c} for n, c in CORRECTED.items()},
            SIGNED,
        ),
    },
}


class Runs:
    """Runs that are made once.

    Args:
        folder: of their file.
        share: of every budget.
    """

    def __init__(self, folder: Path, share: float = 1.0) -> None:
        self.path, self.share = folder / "runs.jsonl", share
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        self.known: dict[str, Any] = dict(map(json.loads, lines))

    def __call__(self, name: str, method: str, lr: float, seed: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """One run; see `run`."""
        key = json.dumps([name, method, lr, seed, given, self.share], sort_keys=True)
        if key not in self.known:
            found = self.known[key] = run(name, method, lr, seed, given, self.share)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, found]) + "\n")
            print(
                name, method, lr, seed, given, f"{found['validation']['loss']:.3f} {found['seconds']:.1f} s", flush=True
            )
        found = self.known[key]
        return found


def search(runs: Runs, tasks: Sequence[str]) -> dict[str, Any]:
    """Validation losses of every setting at every rate."""
    return {
        name: {
            method: {
                label: {f"{lr:g}": runs(name, method, lr, SEARCHED, given)["validation"] for lr in rates}
                for label, given in settings.items()
            }
            for method, (settings, rates) in PLAN[name].items()
        }
        for name in tasks
    }


def best(searched: Mapping[str, Mapping[str, Mapping[str, float]]], labels: Sequence[str]) -> tuple[str, str]:
    """The setting, of some, and the rate of least validation loss."""
    pairs = [(label, lr) for label in labels for lr in searched[label]]
    return min(pairs, key=lambda pair: searched[pair[0]][pair[1]]["loss"])


def compare(runs: Runs, searched: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Test losses and accuracies of former defaults, defaults and the best setting, each at its best rate."""
    rows = []
    for name, methods in searched.items():
        for method, found in methods.items():
            every = list(found)
            shown = {label: [label] for label in ("former", "defaults, ess = N", "defaults") if label in found}
            for label, among in {**shown, "tuned": every}.items():
                setting, lr = best(found, among)
                given = PLAN[name][method][0][setting]
                tests = [runs(name, method, float(lr), seed, given)["test"] for seed in SEEDS]
                rows.append(
                    {"task": name, "method": method, "label": label, "setting": setting, "lr": lr, "runs": tests}
                )
    return rows


def at_rates(runs: Runs) -> list[dict[str, Any]]:
    """Test losses of former defaults and defaults at the same rates."""
    return [
        {
            "task": name, "method": method, "lr": lr,
            **{label: [runs(name, method, lr, seed, PLAN[name][method][0][label])["test"] for seed in SEEDS]
               for label in ("former", "defaults")},
        }
        for name in ("digits", "convmixer") for method in ("IVON", "IVON-PoCoMo") for lr in REAL[1:]
    ]  # fmt: skip


def long_runs(runs: Runs) -> dict[str, Any]:
    """IVON on the digits in runs of 9000 steps: validation losses by β₂ and ess."""
    given: dict[str, Setting] = {f"beta2 = {beta2:g}": {"beta2": beta2} for beta2 in (0.99999, 0.9999, 0.999)}
    given["beta2 = 0.999, ess = 100 N"] = {"beta2": 0.999, "examples": 100.0}
    return {label: runs("digits", "IVON", 0.3, SEARCHED, setting)["validation"] for label, setting in given.items()}


# ---- tables --------------------------------------------------------------------------------------------------


def _markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def table_compare(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians and ranges on the test part."""
    lines = [["task", "method", "setting", "lr", "test loss", "accuracy"]]
    for row in rows:
        label = row["label"] if row["setting"] in (row["label"], "tuned") else f"{row['label']}: {row['setting']}"
        numbers = [_spread([found[key] for found in row["runs"]]) for key in ("loss", "accuracy")]
        lines.append([row["task"], row["method"], label, row["lr"], *numbers])
    return _markdown(lines)


def table_search(searched: Mapping[str, Any]) -> str:
    """Validation losses of every setting, over the rates."""
    lines = [["task", "method", "setting", "validation loss at each lr"]]
    for name, methods in searched.items():
        for method, found in methods.items():
            for label, losses in found.items():
                text = ", ".join(f"{lr}: {value['loss']:.3f}" for lr, value in losses.items())
                lines.append([name, method, label, text])
    return _markdown(lines)


def table_rates(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians and ranges on the test part, at the same rates."""
    lines = [["task", "method", "lr", "former", "defaults"]]
    for row in rows:
        losses = [_spread([found["loss"] for found in row[label]]) for label in ("former", "defaults")]
        lines.append([row["task"], row["method"], f"{row['lr']:g}", *losses])
    return _markdown(lines)


def table_long(found: Mapping[str, Mapping[str, float]]) -> str:
    """Losses and accuracies of the long runs."""
    lines = [["IVON, digits, 9000 steps, lr = 0.3", "validation loss", "accuracy"]]
    lines += [[label, f"{value['loss']:.3f}", f"{value['accuracy']:.3f}"] for label, value in found.items()]
    return _markdown(lines)


TABLES: dict[str, Callable[[Any], str]] = {
    "compare": table_compare,
    "rates": table_rates,
    "long": table_long,
    "search": table_search,
}


def report(content: Mapping[str, Any], page: Path) -> None:
    """Put the tables between their marks."""
    text = page.read_text(encoding="utf-8")
    for part, table in TABLES.items():
        marks = f"<!-- table defaults-{part} -->\n", "<!-- end -->"
        before, _, rest = text.partition(marks[0])
        text = f"{before}{marks[0]}\n{table(content[part])}\n{marks[1]}{rest.partition(marks[1])[2]}"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["search", "compare", "long", "report"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--runs", type=Path, default=Path("runs-defaults"), help="folder of finished runs")
    parser.add_argument("--short", action="store_true", help="a twentieth of every budget; writes nothing but runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="model: its BatchNorm")  # draws have the statistics of draws
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    runs = Runs(options.runs, 0.05 if options.short else 1.0)
    if "search" in options.parts:
        content["search"] = search(runs, options.tasks)
    if "compare" in options.parts:
        content["compare"], content["rates"] = compare(runs, content["search"]), at_rates(runs)
    if "long" in options.parts:
        content["long"] = long_runs(Runs(options.runs, 15.0 * runs.share))
    if not options.short:
        RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if "report" in options.parts:
            report(content, PAGE)


if __name__ == "__main__":
    main()
