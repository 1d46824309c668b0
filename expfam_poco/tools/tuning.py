"""Before training: how large a learning rate, and how small a variance of q, this model and these data bear."""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from expfam_poco import arguments
from expfam_poco.closures.caches import fresh_caches
from expfam_poco.closures.effects import ModuleState, capture_random, replay_random
from expfam_poco.closures.evaluate import functions_of
from expfam_poco.correction.alpha import Staleness
from expfam_poco.errors import NonFiniteError
from expfam_poco.optim.alpha_svrg import AlphaSVRG
from expfam_poco.optim.named import IVONPoCo
from expfam_poco.optim.optimizer import PosteriorCorrected
from expfam_poco.tools.files import written_aside
from expfam_poco.tools.pictures import empty_figure

Closure = Callable[[], Any]
WIDTH = 3.0  # steps, the deviation of the kernel that smooths the losses
DIVERGED = 4.0  # a loss that has risen by so many times what the lowest has fallen by ends the test


class LearningRates(NamedTuple):
    """What `find_lr` has seen.

    Attributes:
        lr: the suggestion, of the group with the largest learning rate; the others keep their ratios to it.
        rates: the learning rate of every step.
        losses: the loss at every step, before it.
        smoothed: the losses, less what makes their mini-batches differ, each averaged with its neighbours.

    Example:
        >>> import torch, expfam_poco as poco
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> model = torch.nn.ParameterList([weight])
        >>> found = poco.find_lr(model, poco.SVRG(model.parameters(), lr=0.1), [lambda: weight.square().sum()])
        >>> len(found.rates) == len(found.losses) == len(found.smoothed)
        True
    """

    lr: float
    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the picture of the losses over the rates, with the suggestion; needs matplotlib.

        Args:
            path: of a PNG file.
        """
        figure = empty_figure("find_lr's picture", 6.0, 4.0)
        panel = figure.subplots()
        panel.plot(self.rates, self.losses, color="#999999", linewidth=0.8, label="loss")
        panel.plot(self.rates, self.smoothed, color="#0072B2", label="smoothed")
        panel.axvline(self.lr, color="#D55E00", linestyle="--", label=f"lr = {self.lr:.2g}")
        low, high = min(self.smoothed), max(self.smoothed[0], *self.smoothed[: len(self.smoothed) // 2 + 1])
        panel.set(xscale="log", xlabel="lr", ylabel="loss of a step", ylim=(low - 0.1 * (high - low), high * 1.2))
        panel.legend()
        with written_aside(path) as file:
            figure.savefig(file, dpi=150, format="png")


def find_lr(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    closures: Sequence[Closure],
    *,
    lowest: float = 1e-6,
    highest: float = 10.0,
    steps: int = 100,
    plot: str | os.PathLike[str] | None = None,
) -> LearningRates:
    """A learning rate for this model and optimizer, from one short run with rates that grow (Smith 2017).

    Steps are taken with rates from `lowest` to `highest`, each by the same factor above the last, until the loss blows
    up; the suggestion is the rate at which the smoothed loss falls fastest over log lr. Then the weights, buffers,
    modes, gradients, the optimizer with its learning rates, and all random generators are what they were.

    Args:
        model: whose buffers the closures move.
        optimizer: one of this package, or any whose `step` takes the closures; the test starts from its present state.
        closures: of different mini-batches; the first `steps` / 4 of them are used in turn.
        lowest: the first rate.
        highest: the last rate.
        steps: at most so many steps.
        plot: where to write the picture (a PNG file; needs matplotlib); None: no picture.

    Raises:
        ValueError: for arguments out of range, or if the loss never falls.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 1)
        >>> x, before = torch.randn(64, 2), model.weight.clone()
        >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=64.0)
        >>> found = poco.find_lr(model, opt, [lambda: (model(x) - x.sum(1, keepdim=True)).square().mean()])
        >>> bool(1e-6 < found.lr < 10.0), torch.equal(model.weight, before), opt.param_groups[0]["lr"]
        (True, True, 0.1)
    """
    arguments.module(model)
    arguments.instance("optimizer", optimizer, torch.optim.Optimizer, "give the optimizer that will train the model")
    closures = functions_of(closures)
    for name, rate in (("lowest", lowest), ("highest", highest)):
        arguments.number(name, rate, lambda v: 0.0 < v < math.inf, "give a positive rate")
    if not lowest < highest:
        raise ValueError(f"lowest={lowest!r}, highest={highest!r}: give two positive rates, the lower one first.")
    arguments.whole("steps", steps, 10)
    arguments.instance("plot", plot or "", (str, os.PathLike), "give the path of a PNG file, or None")
    closures = closures[: max(1, steps // 4)]
    rates: list[float] = []
    losses: list[float] = []
    level: list[float] = []  # the losses without what makes mini-batches differ: their first loss, at tiny rates
    present = [float(group["lr"]) for group in optimizer.param_groups]
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError("optimizer: it maximizes, but find_lr looks for descent; negate the loss instead.")
    if max(present) <= 0.0:
        raise ValueError(f"optimizer: its learning rates are {present}; make it with a positive one.")
    with put_back(model, optimizer):
        for number in range(steps):
            rate = lowest * (highest / lowest) ** (number / (steps - 1))
            for group, own in zip(optimizer.param_groups, present, strict=True):
                _set_rate(group, rate * own / max(present))
            try:
                loss = _number(optimizer.step(closures[number % len(closures)]))
            except FloatingPointError:  # a NonFiniteError among them
                break
            except ValueError:  # of a family: lr is too large for its step
                if number < len(closures):
                    raise
                break
            if not math.isfinite(loss):
                break
            rates.append(rate)
            losses.append(loss)
            level.append(loss - losses[number % len(closures)])
            if np.median(level[-5:]) > max(-DIVERGED * min(level), abs(losses[0])):
                break
    mean = sum(losses[: len(closures)]) / max(1, min(len(losses), len(closures)))
    smoothed = [mean + value for value in _smoothed(level)]
    found = LearningRates(_steepest(rates, smoothed), rates, losses, smoothed)
    if plot is not None:
        found.plot(plot)
    return found


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Averages with a Gaussian kernel, which unlike a moving average of the past does not lag behind."""
    steps = np.arange(len(losses))
    kernel = np.exp(-0.5 * ((steps[:, None] - steps[None, :]) / WIDTH) ** 2)
    return [] if not losses else list(map(float, kernel @ np.asarray(losses) / kernel.sum(axis=1)))


def _steepest(rates: Sequence[float], smoothed: Sequence[float]) -> float:
    """The rate of the steepest descent over log lr, before the lowest loss."""
    lowest = int(np.argmin(smoothed)) + 1 if smoothed else 0
    if lowest < 3:
        raise ValueError(
            "closures: the loss never falls as lr grows; give a smaller `lowest`, more `steps`, closures of larger "
            "mini-batches, or look at `ess` (poco.suggest_ess)."
        )
    slopes = np.gradient(np.asarray(smoothed[:lowest]), np.log(rates[:lowest]))
    return float(rates[int(np.argmin(slopes))])


def _number(loss: Any) -> float:
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def engine_of(optimizer: torch.optim.Optimizer | None) -> PosteriorCorrected | None:
    """What corrects in an optimizer, if anything of this package does."""
    corrects = optimizer._engine if isinstance(optimizer, AlphaSVRG) else optimizer
    return corrects if isinstance(corrects, PosteriorCorrected) else None


@contextmanager
def put_back(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Run a block after which weights, buffers, modes, gradients, the optimizer and the generators are as before."""
    groups = [] if optimizer is None else optimizer.param_groups
    params = list({id(p): p for p in [*model.parameters(), *(q for g in groups for q in g["params"])]}.values())
    weights = [p.detach().clone() for p in params]
    grads = [None if p.grad is None else p.grad.detach().clone() for p in params]
    modes = {module: module.training for module in model.modules()}
    state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    rates = [copy.deepcopy(group["lr"]) for group in groups]
    buffers = ModuleState([model])
    try:
        with replay_random(capture_random(params)), _beside_state_kept(optimizer):
            try:
                yield
            finally:
                if optimizer is not None:
                    optimizer.load_state_dict(state)  # type: ignore[arg-type]
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate
    finally:
        buffers.restore()
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for p, weight, grad in zip(params, weights, grads, strict=True):
                p.copy_(weight)
                p.grad = grad


@contextmanager
def _beside_state_kept(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Afterwards one of this package has what it remembers beside its state: α, products, flips, what was warned of."""
    engine = engine_of(optimizer)
    if engine is None:
        yield
        return
    alphas, stale = engine._alphas, engine._stale
    engine._stale = Staleness(None)
    kept = [(own, copy.copy(vars(own))) for own in (engine._products, engine._flips, engine._width)]
    try:
        yield
    finally:
        engine._alphas, engine._stale = alphas, stale
        for own, before in kept:
            vars(own).clear()
            vars(own).update(before)


def suggest_ess(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    *,
    tolerance: float = 0.1,
    absolute: float = 0.01,
    hess_init: float | None = None,
    weight_decay: float | None = None,
    samples: int = 4,
    most: float = 1e12,
    seed: int = 0,
) -> float:
    """The smallest effective sample size whose first draws leave the model nearly as good as it is.

    At the start q has the deviation σ = 1/√(ess (hess_init + weight_decay)) around the weights. Among the powers of √10
    from 1 to `most`, the smallest ess is found (by bisection) at which the mean loss over `samples` draws, the same
    noise for each ess, exceeds the loss at the weights by no more than `tolerance` of it plus `absolute`. A pretrained
    model usually needs far more than its number of examples; one to be trained from the start may use fewer than what
    is found here.

    Args:
        model: whose trainable parameters are perturbed. It is evaluated in its present mode, and then all is as it was.
        closure: gives the mean loss of a batch, as for `optimizer.step`; or several closures, to average over.
        tolerance: of the loss at the weights.
        absolute: added to it, for losses near zero.
        hess_init, weight_decay: those that the optimizer will have; None: IVON's own.
        samples: draws for every ess.
        most: the largest ess.
        seed: of the noise.

    Raises:
        ValueError: for arguments out of range, a model without trainable parameters, a loss that is not finite, or if
            even `most` is too small.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.randn(64, 2)
        >>> ess = poco.suggest_ess(model, lambda: model(x).square().mean())
        >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=ess)
    """
    arguments.module(model)
    closures = functions_of(closure, "closure")
    for name, value in (("tolerance", tolerance), ("absolute", absolute)):
        remedy = "give a number that is not negative, one of the two above 0"
        arguments.number(name, value, lambda v: 0.0 <= v < math.inf, remedy)
        if tolerance == absolute == 0.0:
            raise ValueError(f"{name}={value!r}: {remedy}.")
    arguments.whole("samples", samples, 1)
    arguments.whole("seed", seed)
    arguments.number("most", most, lambda v: 1.0 <= v < math.inf, "give the largest ess, 1 or larger")
    precision = _default("hess_init", hess_init) + _default("weight_decay", weight_decay)
    if not 0.0 < precision < math.inf:
        raise ValueError(f"hess_init={hess_init!r}, weight_decay={weight_decay!r}: their sum must be positive.")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("model: it has no trainable parameters; give the model that will be trained.")
    with put_back(model, None):
        point = [p.detach().clone() for p in params]
        buffers, random = ModuleState([model]), capture_random(params)

        def loss_at(sigma: float, number: int) -> float:
            generators: dict[torch.device, torch.Generator] = {}
            with torch.no_grad():
                for p, middle in zip(params, point, strict=True):
                    generator = generators.setdefault(p.device, torch.Generator(p.device).manual_seed(seed + number))
                    noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=torch.float32)
                    p.copy_(middle + sigma * noise if sigma else middle)
            losses = []
            for each in closures:
                with replay_random(random), fresh_caches(), suppress(NonFiniteError):
                    losses.append(_number(each()))
                buffers.restore()
            return sum(losses) / len(losses) if losses else math.nan

        reference = loss_at(0.0, 0)
        if not math.isfinite(reference):
            raise ValueError(f"closure: at the model's weights its loss is {reference}; give one that is finite there.")
        limit = reference + tolerance * abs(reference) + absolute
        grid = [10.0 ** (0.5 * number) for number in range(math.floor(2.0 * math.log10(most)) + 1)]
        first, after, mean = 0, len(grid), math.nan  # where the smallest one that fits lies
        while first < after:
            middle = (first + after) // 2
            sigma = 1.0 / math.sqrt(grid[middle] * precision)
            mean = sum(loss_at(sigma, number) for number in range(samples)) / samples
            first, after = (first, middle) if mean <= limit else (middle + 1, after)
    if first == len(grid):
        raise ValueError(
            f"most={most:g}: even there the mean loss at draws is {mean:.4g}, and at the weights {reference:.4g}; give "
            "a larger `most`, `tolerance`, or `hess_init`."
        )
    return grid[first]


def _default(name: str, value: float | None) -> float:
    """IVON's, where none is given."""
    usual = inspect.signature(IVONPoCo.__init__).parameters[name].default
    remedy = f"give a finite number, 0 or larger, or None for {usual}"
    return arguments.number(name, usual if value is None else value, lambda v: 0.0 <= v < math.inf, remedy)
