"""A small GPT from scratch on the standard library's own sources, with AdamW or the IVON family.

    python examples/language_model.py                                   # 1.8 M weights, IVON-PoCoMo, 400 steps
    python examples/language_model.py --method adamw --output runs/adamw
    python examples/language_model.py --resume --output runs/adamw --steps 800
    python examples/language_model.py --text topics --start runs/first/checkpoint.pt --lr 0.05 --output runs/second

A run leaves `curve.json`, `curve.csv`, `curve.png` (validation loss against steps, gradient evaluations and seconds)
and `checkpoint.pt` in its output folder. `--start` is continual pretraining: weights, tokenizer and, within the IVON
family, the posterior come from a checkpoint. `--resume` continues a run bit for bit.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from corpus import MEASUREMENT, MEGA_BATCH, TRAINING, Corpus, load, restored
from gpt import GPT, PRESETS, parameters_of, preset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import expfam_poco as poco

METHODS = ("adamw", "nadamw", "alpha-svrg", "ivon", "ivon-poco", "ivon-pocomo", "kronecker", "kronecker-poco")
CORRECTED = ("alpha-svrg", "ivon-poco", "ivon-pocomo", "kronecker-poco")
WITHOUT_POSTERIOR = ("adamw", "nadamw", "alpha-svrg")
RATES = dict.fromkeys(METHODS, 0.3) | dict.fromkeys(WITHOUT_POSTERIOR, 3e-3)
COUNTERS = ("step", "tokens", "evaluated", "seconds", "losses", "curve")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on but the text. The command line has an option for each.

    Args:
        method: one of `METHODS`.
        preset: the model's shape, see `gpt.PRESETS`.
        positions: "rope" or "learned"; None takes the preset's.
        dropout: of the model.
        steps: of training.
        batch: windows in a mini-batch.
        context: tokens in a window.
        lr: the peak learning rate, after a linear warm-up and before a cosine to zero; None takes `RATES`. For the
            IVON family it is the paper's, of which `clip_radius` times it is the longest step of a weight.
        warmup: steps of the linear warm-up.
        seed: of the initial weights, of the batches and of the noise.
        burn_in: steps before the first mega-batch.
        every: steps between mega-batches.
        mega: mini-batches in a mega-batch.
        later_batch: windows in a mini-batch after the burn-in; None: `batch`. The control for the corrected methods,
            which evaluate 2 + mega/every gradients a step from there on.
        alpha: α of the correction.
        rho1: ρ₁ of IVON-PoCoMo.
        rho2: ρ₂ of IVON-PoCoMo.
        noise: "shared", "independent", "fixed" or "antithetic" (two evaluations for one).
        ess: κ; the paper's 1e10 is for 10⁵ steps.
        hess_init: h₀.
        beta1: β₁, of AdamW too.
        transport: γ, by which gradients are evaluated ahead of the weights (`expfam_poco.correction.Transported`).
        beta2: β₂ of the IVON family; 1/(1−β₂) must be well below `steps` (the paper's 0.99999 is for 10⁵ steps).
        curvature: "reparam" or "gradsq", of the Kronecker-factored posterior.
        clip_radius: ξ of the IVON family; the paper has 1e-3.
        weight_decay: of AdamW (decoupled) or δ of the IVON family; None: 0.1 and 1e-6.
        dtype: "float32", or "bf16" for autocast.
        device: "cpu", "cuda", …
        validation: held-out windows that the validation loss is the mean of.
        validate_every: steps between validations.
    """

    method: str = "ivon-pocomo"
    preset: str = "small"
    positions: str | None = None
    dropout: float = 0.0
    steps: int = 400
    batch: int = 16
    context: int = 128
    lr: float | None = None
    warmup: int = 20
    seed: int = 0
    burn_in: int = 100
    every: int = 10
    mega: int = 10
    later_batch: int | None = None
    alpha: float = 0.7
    rho1: float = 0.6
    rho2: float = 0.1
    noise: str = "shared"
    ess: float = 1e8
    hess_init: float = 1e-3
    beta1: float = 0.9
    transport: float = 0.0
    beta2: float = 0.99
    curvature: str = "reparam"
    clip_radius: float = 1e-2
    weight_decay: float | None = None
    dtype: str = "float32"
    device: str = "cpu"
    validation: int = 64
    validate_every: int = 20

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("dtype", tuple(DTYPES)), ("preset", tuple(PRESETS))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose from {', '.join(choices)}.")
        for name in ("steps", "batch", "context", "every", "mega", "validation", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more.")

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return RATES[self.method] if self.lr is None else self.lr


def make_optimizer(settings: Settings, model: GPT) -> torch.optim.Optimizer:
    """The method's optimizer. Its learning rate is what the schedule multiplies."""
    if settings.method in WITHOUT_POSTERIOR:
        decay = 0.1 if settings.weight_decay is None else settings.weight_decay
        shared: dict[str, Any] = {"lr": settings.rate, "betas": (settings.beta1, 0.95), "weight_decay": decay}
        if settings.method == "nadamw":  # β₁ of every step the same: no schedule of its own
            return torch.optim.NAdam(model.parameters(), **shared, decoupled_weight_decay=True, momentum_decay=1e4)
        adamw = torch.optim.AdamW(model.parameters(), **shared)
        if settings.method == "adamw" and settings.transport == 0.0:
            return adamw
        alpha = settings.alpha if settings.method == "alpha-svrg" else 0.0
        return poco.AlphaSVRG(adamw, alpha=alpha, transport=settings.transport)
    chosen: dict[str, Any] = {
        "lr": settings.rate,
        "ess": settings.ess,
        "hess_init": settings.hess_init,
        "transport": settings.transport,
        "beta2": settings.beta2,
        "weight_decay": 1e-6 if settings.weight_decay is None else settings.weight_decay,
        "clip_radius": settings.clip_radius,
        "rescale_lr": False,  # as in the paper: lr is what multiplies the clipped step
        "noise": settings.noise,
        "seed": settings.seed,
    }
    named = list(model.named_parameters())
    if settings.method.startswith("kronecker"):
        return make_kronecker(settings, named, chosen)
    chosen["beta1"] = settings.beta1
    if settings.method == "ivon":
        return poco.IVON(named, **chosen)
    if settings.method == "ivon-poco":
        return poco.IVONPoCo(named, alpha=settings.alpha, **chosen)
    return poco.IVONPoCoMo(named, alpha=settings.alpha, rho1=settings.rho1, rho2=settings.rho2, **chosen)


def make_kronecker(settings: Settings, named: list[Any], chosen: dict[str, Any]) -> torch.optim.Optimizer:
    """IVON's rule with a matrix-normal posterior for every matrix of the model, a diagonal one for vectors."""
    del chosen["rescale_lr"]
    return poco.PosteriorCorrected(
        named,
        "kronecker_gaussian",
        momentum=settings.beta1,
        precision_lr=1 - chosen.pop("beta2"),
        curvature=settings.curvature,
        alpha=settings.alpha,
        **chosen,
    )


def schedule(settings: Settings, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine to zero."""

    def factor(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / max(settings.steps - settings.warmup, 1)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Training:
    """A run: model, optimizer, schedule, counters and the curve so far.

    Args:
        settings: what to do.
        corpus: the text.
    """

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        self.settings, self.corpus = settings, corpus
        shape = {"context": settings.context, "vocabulary": corpus.tokenizer.vocabulary, "dropout": settings.dropout}
        if settings.positions is not None:
            shape["positions"] = settings.positions
        torch.manual_seed(settings.seed)
        self.model = GPT(preset(settings.preset, **shape)).to(settings.device)
        self.optimizer: Any = make_optimizer(settings, self.model)
        self.scheduler = schedule(settings, self.optimizer)
        self.step = 0
        self.tokens = 0  # that inner steps have read
        self.evaluated = 0  # tokens whose gradient was evaluated, at θ_out and in mega-batches too
        self.seconds = 0.0  # of training, without validation
        self.losses: list[float] = []  # of the mini-batches since the last point of the curve
        self.curve: list[dict[str, float]] = []
        self._validation = corpus.validation(settings.context, settings.validation).to(settings.device)

    # ---- one step ----------------------------------------------------------------------------------------

    def closure(self, tokens: Tensor) -> Callable[[], Tensor]:
        """The mean loss of a batch with its gradient, as every torch optimizer wants it."""

        def evaluate() -> Tensor:
            self.optimizer.zero_grad()
            with self.precision():
                loss = self.model.loss(tokens)
            loss.backward()
            return loss

        return evaluate

    def batches(self, stream: int, first: int, count: int) -> list[Tensor]:
        """`count` mini-batches of a stream, of the size that mini-batches have at this step."""
        s = self.settings
        rows = s.batch if s.later_batch is None or self.step < s.burn_in else s.later_batch
        return [
            self.corpus.batch(s.context, rows, seed=s.seed, stream=stream, index=index).to(s.device)
            for index in range(first, first + count)
        ]

    def advance(self) -> None:
        """A mega-batch where one is due, and a step."""
        since = self.step - self.settings.burn_in
        if self._corrected() and since % self.settings.every == 0:
            self.refresh()
        self.inner_step()

    def refresh(self) -> None:
        """q_out from fresh mini-batches."""
        began, s = time.perf_counter(), self.settings
        self.model.train()
        self._set_alpha()
        chunks = self.batches(MEGA_BATCH, self.step * s.mega, s.mega)
        self.optimizer.refresh([self.closure(chunk) for chunk in chunks])
        self.evaluated += sum(map(_targets, chunks)) * self._draws()
        self.seconds += time.perf_counter() - began

    def inner_step(self) -> None:
        """One step on one mini-batch."""
        began = time.perf_counter()
        self.model.train()
        self._set_alpha()
        (batch,) = self.batches(TRAINING, self.step, 1)
        loss = self.optimizer.step(self.closure(batch))
        self.scheduler.step()
        self.tokens += _targets(batch)
        self.evaluated += _targets(batch) * self._draws() * (2 if self._corrected() else 1)
        self.losses.append(loss.item())
        self.step += 1
        self.seconds += time.perf_counter() - began

    def _set_alpha(self) -> None:
        """No correction before the burn-in ends: a posterior that was loaded may bring its q_out."""
        if self.settings.method not in WITHOUT_POSTERIOR:
            for group in self.optimizer.param_groups:
                group["alpha"] = self.settings.alpha if self._corrected() else 0.0

    def _corrected(self) -> bool:
        return self.settings.method in CORRECTED and self.step >= self.settings.burn_in

    def _draws(self) -> int:
        return 2 if self.settings.noise == "antithetic" and self.settings.method not in WITHOUT_POSTERIOR else 1

    def measure_variance(self, count: int) -> dict[str, float]:
        """Variance corrected/plain of gradient and curvature over fresh mini-batches, at the present q_in and q_out."""
        batches = self.batches(MEASUREMENT, self.step * count, count)
        found: dict[str, float] = self.optimizer.measure_variance([self.closure(batch) for batch in batches])
        return found

    def precision(self) -> Any:
        """The context that losses are evaluated in."""
        device = torch.device(self.settings.device).type
        return torch.autocast(device, DTYPES[self.settings.dtype], enabled=self.settings.dtype != "float32")

    # ---- looking at it -----------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss (nats a token) of the held-out windows at the present weights: the posterior's mean."""
        self.model.eval()
        with self.precision():
            losses = [float(self.model.loss(part)) * len(part) for part in self._validation.split(32)]
        return sum(losses) / len(self._validation)

    def record(self) -> dict[str, float]:
        """Add a point to the curve."""
        point = {
            "step": self.step,
            "tokens": self.tokens,
            "evaluated": self.evaluated,
            "evaluations": self.evaluated / (self.settings.batch * self.settings.context),
            "seconds": round(self.seconds, 3),
            "loss": self.validate(),
            "training_loss": sum(self.losses) / len(self.losses) if self.losses else None,
        }
        self.losses = []
        self.curve.append(point)
        return point

    def run(self, until: int | None = None) -> Iterator[dict[str, float] | None]:
        """Train up to a step (default: all); gives the new point of the curve, or None, after every step."""
        if not self.curve:
            self.record()
        for _ in range(self.step, min(until or self.settings.steps, self.settings.steps)):
            self.advance()
            due = self.step % self.settings.validate_every == 0 or self.step == self.settings.steps
            yield self.record() if due else None

    def samples(self, prompt: str, count: int, *, draws: int = 0, seed: int = 0) -> list[str]:
        """A text from the mean, then one from each of `draws` draws of the posterior (none with AdamW)."""
        start = self.corpus.tokenizer.encode(prompt.encode()).long().to(self.settings.device)
        found = []
        for number in range(1 + (draws if "ivon" in self.settings.method else 0)):
            with self._weights(None if number == 0 else seed + number):
                found.append(self.corpus.tokenizer.decode(self.model.generate(start, count, seed=seed).tolist()))
        return found

    @contextmanager
    def _weights(self, seed: int | None) -> Iterator[None]:
        if seed is None:
            yield
        else:
            with self.optimizer.sampled(seed):
                yield

    # ---- checkpoints -------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write everything that the run continues from; an interruption leaves the old file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {name: getattr(self, name) for name in COUNTERS}
        more = {"settings": asdict(self.settings), "tokenizer": self.corpus.tokenizer.saved()}
        poco.save(path, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, **values, **more)

    def load(self, path: Path) -> None:
        """Continue a run from its checkpoint, bit for bit."""
        values = poco.load(path, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)
        for name in COUNTERS:
            setattr(self, name, values[name])

    def start_from(self, path: Path) -> None:
        """Continual pretraining: weights of another run, and its posterior where both are of the IVON family.

        Rates, ess and correction are this run's. AdamW starts its moments afresh, as in the paper.
        """
        both = "ivon" in self.settings.method and "ivon" in poco.load(path)["settings"]["method"]
        own = [dict(group) for group in self.optimizer.param_groups]
        poco.load(path, model=self.model, **({"optimizer": self.optimizer} if both else {}))
        torch.manual_seed(self.settings.seed)  # loading has put back the other run's generators
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group.update({name: value for name, value in values.items() if name != "params"})


def _targets(batch: Tensor) -> int:
    return batch.shape[0] * (batch.shape[1] - 1)


# ---- files of a run --------------------------------------------------------------------------------------


def write_curve(training: Training, folder: Path) -> None:
    """curve.json, curve.csv and curve.png."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"settings": asdict(training.settings), "curve": training.curve}
    (folder / "curve.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with (folder / "curve.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(training.curve[0]))
        writer.writeheader()
        writer.writerows(training.curve)
    draw({training.settings.method: [training.curve]}, folder / "curve.png")


def draw(curves: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Validation loss against steps, evaluations and seconds: the median of several curves, and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = {"step": "steps", "evaluations": "gradient evaluations (mini-batches)", "seconds": "seconds"}
    for panel, (axis, title) in zip(panels, titles.items(), strict=True):
        for name, runs in curves.items():
            rows = list(zip(*runs, strict=True))
            across = [sorted(point[axis] for point in row)[len(row) // 2] for row in rows]
            losses = [sorted(point["loss"] for point in row) for row in rows]
            (line,) = panel.plot(across, [values[len(values) // 2] for values in losses], label=name)
            low, high = [values[0] for values in losses], [values[-1] for values in losses]
            panel.fill_between(across, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    finals = [run[-1]["loss"] for runs in curves.values() for run in runs]
    panels[0].set_ylim(min(finals) - 0.1, max(finals) + 1.2)
    panels[0].set_ylabel("validation loss (nats a token)")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=110)


# ---- the command -----------------------------------------------------------------------------------------


def options() -> argparse.ArgumentParser:
    """The command line: an option for each setting, and what is not a setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds: dict[str, Any] = {"int": int, "int | None": int, "float": float, "float | None": float}
    for field in fields(Settings):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(
            name, type=kinds.get(str(field.type), str), default=None, help=f"(default: {field.default})"
        )
    parser.add_argument("--text", default="stdlib", help="'stdlib', 'topics' or a text file")
    parser.add_argument("--tokenizer", default="bytes", choices=["bytes", "bpe"])
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of --tokenizer bpe")
    parser.add_argument("--output", type=Path, default=Path("language-model"), help="folder of the run's files")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output with its settings")
    parser.add_argument("--start", type=Path, help="checkpoint to pretrain further from")
    parser.add_argument("--prompt", default="def ", help="how the sample of text begins")
    parser.add_argument("--sample", type=int, default=200, help="tokens of it; 0: no sample")
    parser.add_argument("--draws", type=int, default=1, help="further samples, each from a draw of the posterior")
    return parser


def prepare(chosen: argparse.Namespace) -> Training:
    """The run that the command line asks for."""
    changes = {f.name: getattr(chosen, f.name) for f in fields(Settings) if getattr(chosen, f.name) is not None}
    checkpoint = chosen.output / "checkpoint.pt"
    source = checkpoint if chosen.resume else chosen.start
    stored = None if source is None else poco.load(source)
    if stored is None:
        settings = Settings(**changes)
        return Training(settings, load(chosen.text, settings.context, chosen.tokenizer, chosen.vocabulary))
    if chosen.resume:
        settings = replace(Settings(**stored["settings"]), **changes)
    else:
        shape = {name: stored["settings"][name] for name in ("preset", "positions", "context")}
        settings = Settings(**{**shape, **changes})
    training = Training(settings, load(chosen.text, settings.context, restored(stored["tokenizer"])))
    if chosen.resume:
        training.load(checkpoint)
    else:
        training.start_from(chosen.start)
    return training


def main() -> None:
    """Train, with a live line, and write the run's files."""
    chosen = options().parse_args()
    try:
        training = prepare(chosen)
    except (ValueError, ImportError, FileNotFoundError, poco.CheckpointError) as error:
        sys.exit(str(error))
    settings = training.settings
    print(
        f"{settings.method}, lr {settings.rate:g}: {parameters_of(training.model.config):,d} weights, "
        f"{len(training.corpus.train):,d} tokens to train on, {len(training.corpus.held_out):,d} held out"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        line = progress.add_task("", total=settings.steps, completed=training.step)
        for point in training.run():
            if point is not None:
                text = f"validation {point['loss']:.4f}, training {point['training_loss']:.4f}"
                progress.update(line, description=text)
                write_curve(training, chosen.output)
            if training.step % chosen.checkpoint_every == 0:
                training.save(chosen.output / "checkpoint.pt")
            progress.advance(line)
    training.save(chosen.output / "checkpoint.pt")
    write_curve(training, chosen.output)
    last = training.curve[-1]
    print(
        f"step {last['step']}: validation loss {last['loss']:.4f} nats a token after {last['evaluations']:.0f} "
        f"gradient evaluations and {last['seconds']:.0f} s; files in {chosen.output}"
    )
    if chosen.sample:
        texts = training.samples(chosen.prompt, chosen.sample, draws=chosen.draws, seed=settings.seed)
        for number, text in enumerate(texts):
            print(f"--- a sample from {'the mean' if number == 0 else f'posterior draw {number}'}\n{text}")


if __name__ == "__main__":
    main()
