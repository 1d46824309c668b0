"""Networks with weights of one bit on real images: straight-through + Adam, BayesBiNN, BayesBiNN-PoCo, full precision.

    python examples/binary_network.py                                    # digits, MLP, five seeds: a few minutes
    python examples/binary_network.py --model cnn --seeds 1
    python examples/binary_network.py --data mnist --root data --epochs 5 --device cuda

All methods train the same network with the same mini-batches and a cosine schedule. BayesBiNN-PoCo takes `--epochs`
passes; its corrected steps and mega-batches cost more than one gradient evaluation each, and the other methods take as
many more steps as these evaluations buy (`--equal epochs`: as many passes). Accuracy is that of the mode (of exactly ±1
weights), with BatchNorm's statistics recomputed for it. `--validation` keeps the test images out: the settings below
were chosen so, for one rate of all weights; `benchmarks/binary_defaults.py` has the defaults, with a rate for each. The
folder `--output` gets `results.json`, the packed network (`network.safetensors`), and pictures: accuracy curves,
confusion matrix, the network's doubt, and the decision boundary of two moons with its uncertainty.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from binary_models import DATA, MODELS, Batches, Images, binarize_layers, load, moons, network
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import expfam_poco as poco

METHODS = {
    "float": "full precision, Adam",
    "ste": "straight-through + Adam",
    "bayesbinn": "BayesBiNN",
    "bayesbinn-poco": "BayesBiNN-PoCo",
}
EVERY, SIZE = 10, 10  # steps between mega-batches, mini-batches in one
GAUSSIAN = {"lr": 0.1, "hess_init": 0.1, "beta2": 0.999}  # of BatchNorm's scales and shifts
DRAWS = 32


@dataclass(frozen=True)
class Settings:
    """What a method trains with.

    Args:
        lr: of Adam; of the Bernoulli posterior's λ the step per unit of gradient, lr · ess.
        examples: ess = examples · N. Larger than 1, the posterior is colder than Bayes' rule asks.
        strength: |λ| at the beginning.
        estimator: of the natural gradient.
        temperature: of the relaxed one.
        beta1: momentum.
        alpha: of the correction.
        burn_in: the part of the run before the first mega-batch.
    """

    lr: float
    examples: float = 250.0
    strength: float = 1.0
    estimator: str = "straight_through"
    temperature: float = 1.0
    beta1: float = 0.9
    alpha: float = 0.0
    burn_in: float = 1.0


CHOSEN = {
    "mlp": {
        "float": Settings(lr=3e-3),
        "ste": Settings(lr=3e-2),
        "bayesbinn": Settings(lr=300.0),
        "bayesbinn-poco": Settings(lr=300.0, strength=0.3, alpha=0.7, burn_in=0.1),
    },
    "cnn": {
        "float": Settings(lr=3e-3),
        "ste": Settings(lr=3e-2),
        "bayesbinn": Settings(lr=100.0),
        "bayesbinn-poco": Settings(lr=100.0, strength=0.3, alpha=0.7, burn_in=0.1),
    },
}
RELAXED = {"estimator": "relaxed", "lr": 100.0, "temperature": 0.3, "strength": 0.1, "beta1": 0.98}


def cost(settings: Settings, steps: int) -> int:
    """Mini-batch gradients in a run."""
    corrected = steps - int(settings.burn_in * steps)
    return steps + corrected + math.ceil(corrected / EVERY) * SIZE


class Training:
    """A network, its optimizer and its curve.

    Args:
        method: one of `METHODS`.
        settings: its settings.
        model: the network.
        images: what to train on and to be scored by.
        steps: of the run.
        batch: images in a mini-batch.
        seed: of batches and noise.
        groups: makes the posterior's parameter groups; without it all layers are binary.
    """

    def __init__(
        self,
        method: str,
        settings: Settings,
        model: nn.Module,
        images: Images,
        steps: int,
        *,
        batch: int = 32,
        seed: int = 0,
        groups: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.settings, self.model, self.images, self.steps = settings, model, images, steps
        self.bayesian = method.startswith("bayesbinn")
        self.latent = binarize_layers(model) if method == "ste" else []
        self.optimizer: Any
        if self.bayesian:
            ess = settings.examples * len(images.y)
            named = poco.binarize_groups(model, gaussian=GAUSSIAN) if groups is None else groups(model)
            self.optimizer = poco.BayesBiNNPoCo(
                named, lr=settings.lr / ess, ess=ess, square_momentum=None, strength=settings.strength,
                beta1=settings.beta1, curvature=settings.estimator, temperature=settings.temperature,
                alpha=settings.alpha, seed=seed,
            )  # fmt: skip
        else:
            rest = [p for p in model.parameters() if all(p is not other for other in self.latent)]
            rates = [{"params": rest, "lr": min(settings.lr, 1e-2)}, {"params": self.latent}]
            self.optimizer = torch.optim.Adam(rates if self.latent else rest, lr=settings.lr)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / steps))
        )
        self.batches = Batches(images.x, images.y, batch, torch.Generator().manual_seed(seed))
        self.evaluations, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []

    def closure(self, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        """The mean loss of a batch."""
        return lambda: cross_entropy(self.model(batch[0]), batch[1])

    def run(self) -> Iterable[dict[str, float]]:
        """Train; a point of the curve after every epoch."""
        burn_in = int(self.settings.burn_in * self.steps)
        epochs = math.ceil(self.steps / len(self.batches))
        began = time.perf_counter()
        stream = poco.megabatches(self.batches, every=EVERY, size=SIZE, burn_in=burn_in, epochs=epochs)
        for step, (batch, mega) in enumerate(itertools.islice(stream, self.steps), start=1):
            if mega:
                self.optimizer.refresh([self.closure(b) for b in mega])
                self.evaluations += SIZE
            self.step(batch)
            self.evaluations += 2 if step > burn_in else 1
            if step % len(self.batches) == 0 or step == self.steps:
                self.seconds += time.perf_counter() - began
                point = {"epoch": step / len(self.batches), "evaluations": self.evaluations}
                self.curve.append({**point, "accuracy": self.accuracy()})
                yield self.curve[-1]
                began = time.perf_counter()

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        """One step, and one of the schedule."""
        if self.bayesian:
            self.optimizer.step(self.closure(batch))
        else:
            self.optimizer.zero_grad()
            self.closure(batch)().backward()
            self.optimizer.step()
            with torch.no_grad():
                for latent in self.latent:
                    latent.clamp_(-1.0, 1.0)
        self.scheduler.step()

    def accuracy(self) -> float:
        """Held-out accuracy of the point estimate, in a copy with statistics of its own.

        Those of the training network belong to sampled weights: `predict_classes` needs them.
        """
        model = copy.deepcopy(self.model)
        recalibrate(model, self.images)
        return score(model, self.images)

    def prediction(self, x: Tensor) -> poco.ClassPrediction:
        """Averaged over draws from the posterior."""
        return poco.predict_classes(self.model, self.optimizer, x, samples=DRAWS)

    def ship(self, path: Path, fresh: nn.Module) -> dict[str, float]:
        """Pack the mode into a file; its size, and the accuracy of a fresh network that loads it."""
        recalibrate(self.model, self.images)
        packed = poco.save_binary(path, self.model, self.optimizer)
        loaded = score(poco.load_binary(path, fresh), self.images)
        return {"bytes": packed.bytes, "float_bytes": packed.float_bytes, "accuracy": loaded}


def recalibrate(model: nn.Module, images: Images) -> None:
    """BatchNorm's statistics, of the training images, for the weights that the model has."""
    size = min(len(images.x), 1000)
    poco.recalibrate_batchnorm(model, images.x[: len(images.x) // size * size].split(size))


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """In evaluation mode, in parts."""
    return torch.cat([model.eval()(part) for part in x.split(1000)])


def score(model: nn.Module, images: Images) -> float:
    """Accuracy on the held-out images."""
    return float((logits(model, images.held_out_x).argmax(-1) == images.held_out_y).float().mean())


# ---- all methods and seeds -----------------------------------------------------------------------------------


def chosen_settings(options: argparse.Namespace, method: str) -> Settings:
    """The settings of a method."""
    values = asdict(CHOSEN[options.model][method])
    if options.estimator == "relaxed" and method.startswith("bayesbinn"):
        values |= RELAXED
    if options.lr is not None:
        values["lr"] = options.lr
    return Settings(**values)


def plan(options: argparse.Namespace, images: Images) -> dict[str, int]:
    """Steps of every method."""
    corrected = options.epochs * (len(images.y) // options.batch)
    budget = cost(chosen_settings(options, "bayesbinn-poco"), corrected)
    others = budget if options.equal == "evaluations" else corrected
    return {method: corrected if method == "bayesbinn-poco" else others for method in options.methods}


def run(method: str, seed: int, options: argparse.Namespace, images: Images, steps: int, live: Any) -> dict[str, Any]:
    """One run, as numbers; the last Bayesian one of seed 0 leaves its network and pictures in the folder."""
    torch.manual_seed(seed)
    shape, classes = images.x.shape[1:], int(images.y.max()) + 1
    model = network(options.model, shape, classes).to(options.device)
    settings = chosen_settings(options, method)
    training = Training(method, settings, model, images, steps, batch=options.batch, seed=seed)
    for point in training.run():
        live(f"{METHODS[method]}, seed {seed}: {point['accuracy']:.4f}", point["epoch"])
    found: dict[str, Any] = {"seconds": training.seconds, "curve": training.curve}
    if training.bayesian:
        probabilities, entropy, information = training.prediction(images.held_out_x)
        right = probabilities.argmax(-1) == images.held_out_y
        found["averaged"] = {
            "accuracy": float(right.float().mean()),
            "entropy_right": float(entropy[right].mean()),
            "entropy_wrong": float(entropy[~right].mean()),
            "information": float(information.mean()),
        }
        fresh = network(options.model, shape, classes).to(options.device)
        found["shipped"] = training.ship(options.output / "network.safetensors", fresh)
        if seed == 0:
            predicted = logits(fresh, images.held_out_x).argmax(-1)
            draw_confusion(predicted, images.held_out_y, METHODS[method], options.output / "confusion.png")
            draw_doubt(images, probabilities, entropy, METHODS[method], options.output / "uncertainty.png")
    return found


def median_reached(runs: list[dict[str, Any]], target: float, axis: str) -> float | None:
    """Where curves first reach an accuracy, the median over runs; None if most never do."""
    firsts = [next((p[axis] for p in r["curve"] if p["accuracy"] >= target), math.inf) for r in runs]
    return None if math.isinf(median := statistics.median(firsts)) else median


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians over seeds, and ranges."""
    finals = {method: [r["curve"][-1]["accuracy"] for r in runs] for method, runs in results.items()}
    target = statistics.median(finals.get("ste", [math.inf]))
    rows: dict[str, dict[str, Any]] = {}
    for method, runs in results.items():
        last = runs[0]["curve"][-1]
        rows[method] = {
            "epochs": last["epoch"],
            "evaluations": last["evaluations"],
            "accuracy": statistics.median(finals[method]),
            "lowest": min(finals[method]),
            "highest": max(finals[method]),
            "epochs_to_ste": median_reached(runs, target, "epoch"),
            "evaluations_to_ste": median_reached(runs, target, "evaluations"),
            "seconds": statistics.median(r["seconds"] for r in runs),
        }
        if "averaged" in runs[0]:
            rows[method]["averaged"] = statistics.median(r["averaged"]["accuracy"] for r in runs)
            rows[method]["shipped_accuracy"] = statistics.median(r["shipped"]["accuracy"] for r in runs)
            rows[method]["bytes"], rows[method]["float_bytes"] = (
                runs[0]["shipped"][k] for k in ("bytes", "float_bytes")
            )
    return rows


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """For people."""
    heads = ("method", "epochs", "gradients", "accuracy", "range", "averaged", "epochs to STE's", "gradients to STE's",
             "file, bytes", "seconds")  # fmt: skip
    made = Table(*heads, title="held-out accuracy, medians over seeds")
    for method, row in rows.items():
        made.add_row(
            METHODS[method],
            f"{row['epochs']:.0f}",
            f"{row['evaluations']:.0f}",
            f"{row['accuracy']:.4f}",
            f"{row['lowest']:.4f}–{row['highest']:.4f}",
            f"{row['averaged']:.4f}" if "averaged" in row else "",
            *("–" if row[name] is None else f"{row[name]:.0f}" for name in ("epochs_to_ste", "evaluations_to_ste")),
            f"{row['bytes']} of {row['float_bytes']}" if "bytes" in row else "",
            f"{row['seconds']:.1f}",
        )
    return made


# ---- pictures ------------------------------------------------------------------------------------------------


def draw_curves(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy against epochs and gradient evaluations: the median over seeds, and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, axis in zip(panels, ("epoch", "evaluations"), strict=True):
        for method, runs in results.items():
            across = [point[axis] for point in runs[0]["curve"]]
            values = [sorted(p["accuracy"] for p in row) for row in zip(*(r["curve"] for r in runs), strict=True)]
            (line,) = panel.plot(across, [statistics.median(row) for row in values], label=METHODS[method])
            low, high = [row[0] for row in values], [row[-1] for row in values]
            panel.fill_between(across, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        panel.set_xlabel("epochs" if axis == "epoch" else "gradient evaluations (mini-batches)")
        panel.grid(alpha=0.3)
    best = max(p["accuracy"] for runs in results.values() for r in runs for p in r["curve"])
    panels[0].set_ylim(best - 0.08, min(best + 0.005, 1.0))
    panels[0].set_ylabel("held-out accuracy")
    panels[1].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def draw_confusion(predicted: Tensor, true: Tensor, name: str, path: Path) -> None:
    """Counts of predicted against true classes."""
    from matplotlib.figure import Figure

    classes = int(true.max()) + 1
    counts = torch.zeros(classes, classes, dtype=torch.long)
    counts.index_put_((true.cpu(), predicted.cpu()), torch.tensor(1), accumulate=True)
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    panel = figure.subplots()
    panel.imshow(counts.float().log1p().cpu().numpy(), cmap="Blues")
    for row in range(classes):
        for column in range(classes):
            if counts[row, column]:
                colour = "white" if row == column else "black"
                panel.text(column, row, int(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    panel.set(xlabel="predicted", ylabel="true", title=f"{name}, the packed network")
    panel.set_xticks(range(classes))
    panel.set_yticks(range(classes))
    figure.savefig(path, dpi=110)


def draw_doubt(images: Images, probabilities: Tensor, entropy: Tensor, name: str, path: Path) -> None:
    """Entropy of right and wrong predictions, and the images that the posterior doubts most."""
    from matplotlib.figure import Figure

    predicted = probabilities.argmax(-1)
    right = predicted == images.held_out_y
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, rest = figure.subfigures(1, 2)
    panel = left.subplots()
    bins = torch.linspace(0.0, float(entropy.max()) + 1e-6, 25).tolist()
    for part, label in ((right, "right"), (~right, "wrong")):
        panel.hist(entropy[part].tolist(), bins=bins, density=True, alpha=0.6, label=f"{label} ({int(part.sum())})")
    panel.set(xlabel="entropy of the averaged prediction (nats)", ylabel="density", title=name)
    panel.legend()
    low, high = images.x.min(), images.x.max()
    for axis, index in zip(rest.subplots(2, 5).flat, entropy.topk(10).indices.tolist(), strict=True):
        picture = ((images.held_out_x[index] - low) / (high - low)).permute(1, 2, 0).cpu()
        axis.imshow(picture.squeeze(-1).cpu().numpy(), cmap="gray_r")
        colour = "green" if right[index] else "red"
        title = f"{int(images.held_out_y[index])}, taken for {int(predicted[index])}"
        axis.set_title(title, fontsize=8, color=colour)
        axis.axis("off")
    figure.savefig(path, dpi=110)


def two_moons(epochs: int, path: Path) -> float:
    """A network of binary hidden weights on two moons: boundary, doubt and mutual information; held-out accuracy.

    The first layer stays real: from two inputs, signs alone make four directions. ess is the number of examples, so
    that the posterior is as wide as Bayes' rule wants it.
    """
    from matplotlib.figure import Figure

    torch.manual_seed(0)
    images = moons()
    model = network("mlp", images.x.shape[1:], 2, width=64)
    settings = Settings(lr=30.0, examples=1.0, alpha=0.5, burn_in=0.2)

    def groups(model: nn.Module) -> Any:
        return poco.binarize_groups(model, keep_first=True, gaussian=GAUSSIAN)

    steps = epochs * (len(images.y) // 32)
    training = Training("bayesbinn-poco", settings, model, images, steps, groups=groups)
    *_, last = training.run()
    side = torch.linspace(-3.0, 3.0, 120)
    grid = torch.cartesian_prod(side, side)
    found = training.prediction(grid)
    shown = (found.probabilities[:, 1], found.entropy, found.mutual_information)
    titles = ("P(second moon), averaged over draws", "entropy (nats)", "mutual information (nats)")
    figure = Figure(figsize=(13, 4), layout="constrained")
    ticks, points, labels = side.numpy(), images.held_out_x.numpy(), images.held_out_y.numpy()
    fields = [values.reshape(120, 120).T.numpy() for values in shown]
    for panel, field, title in zip(figure.subplots(1, 3), fields, titles, strict=True):
        filled = panel.contourf(ticks, ticks, field, levels=20, cmap="RdBu_r" if field is fields[0] else "viridis")
        panel.contour(ticks, ticks, fields[0], levels=[0.5], colors="black")
        panel.scatter(*points.T, c=labels, cmap="RdBu_r", s=8, edgecolors="white", linewidths=0.3)
        panel.set_title(title)
        figure.colorbar(filled, ax=panel)
    figure.savefig(path, dpi=110)
    return last["accuracy"]


# ---- the command ---------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--root", default="data", help="torchvision's folder, for mnist and cifar10")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20, help="of BayesBiNN-PoCo")
    parser.add_argument("--equal", choices=("evaluations", "epochs"), default="evaluations")
    parser.add_argument("--estimator", choices=("straight_through", "relaxed"), default="straight_through")
    parser.add_argument("--lr", type=float, help="in place of the chosen ones, for all methods")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--validation", action="store_true", help="score on a part of the training images")
    parser.add_argument("--output", type=Path, default=Path("binary-network"), help="folder of results and pictures")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs = 1, 2
    for name in ("seeds", "epochs", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give 1 or more.")
    return options


def main() -> None:
    """Train all methods, with a live line; write the table, the numbers and the pictures."""
    options = parse()
    try:
        images = load(options.data, options.root)
    except (ImportError, FileNotFoundError) as error:
        sys.exit(str(error))
    images = (images.for_validation() if options.validation else images).to(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    steps = plan(options, images)
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in options.methods}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(width=None if sys.stdout.isatty() else 150)
    with Progress(*columns, console=console) as progress:
        for method in options.methods:
            epochs = math.ceil(steps[method] / (len(images.y) // options.batch))
            line = progress.add_task(METHODS[method], total=epochs * options.seeds)
            for seed in range(options.seeds):

                def live(text: str, epoch: float, seed: int = seed, line: Any = line, epochs: int = epochs) -> None:
                    progress.update(line, description=text, completed=seed * epochs + math.ceil(epoch))

                results[method].append(run(method, seed, options, images, steps[method], live))
    rows = summary(results)
    console.print(table(rows))
    moon = two_moons(10 if options.quick else 100, options.output / "moons.png")
    console.print(f"two moons, the mode of binary hidden weights: {moon:.4f}; files in {options.output}")
    draw_curves(results, options.output / "curves.png")
    described = {name: value for name, value in vars(options).items() if name not in ("output", "root")}
    settings = {method: asdict(chosen_settings(options, method)) for method in options.methods}
    written = {"options": described, "settings": settings, "summary": rows, "moons": moon, "runs": results}
    (options.output / "results.json").write_text(json.dumps(written, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
