"""A short frozen stretch of somebody's training, and how gradients of one mini-batch at its points go together."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expfam_poco.closures.caches import fresh_caches
from expfam_poco.closures.effects import capture_random, replay_random
from expfam_poco.closures.evaluate import evaluate
from expfam_poco.correction.worth import Pairs, kept
from expfam_poco.optim.alpha_svrg import AlphaSVRG
from expfam_poco.optim.optimizer import PosteriorCorrected

Closure = Callable[[], Any]
ROUNDINGS = 2.0  # of a mean, that a step may be shorter by
SEEN = 2**17  # weights whose gradients are kept; of larger models a random sample of so many


@dataclass
class Gradients:
    """Inner products of n mini-batches' gradients at several points, each batch with one noise at all of them.

    Attributes:
        ages: of the points on the way, in steps; the last one is the present.
        between: by two points, the n × n matrix of inner products; a transported point's name is ("ahead", γ).
        clipped: the share of weights whose steps are clipped.
        averaged: (1−β)/(1+β) of their momentum.
    """

    ages: list[int]
    between: Mapping[tuple[Any, Any], np.ndarray]
    clipped: float = 0.0
    averaged: float = 1.0
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = len(next(iter(self.between.values())))

    def noise(self, one: Any, other: Any, chosen: np.ndarray) -> float:
        """E⟨ξ_B, ξ'_B⟩: the trace of the covariance over mini-batches, unbiased."""
        both = self._of(one, other, chosen)
        size = len(both)
        return float((np.trace(both) - both.sum() / size) / (size - 1))

    def signal(self, one: Any, other: Any, chosen: np.ndarray) -> float:
        """⟨ḡ, ḡ'⟩ from different mini-batches, unbiased."""
        both = self._of(one, other, chosen)
        size = len(both)
        return float((both.sum() - np.trace(both)) / (size * (size - 1)))

    def _of(self, one: Any, other: Any, chosen: np.ndarray) -> np.ndarray:
        both = self.between[one, other] if (one, other) in self.between else self.between[other, one].T
        return both[np.ix_(chosen, chosen)]

    def pairs(self, without: int | None = None) -> Pairs:
        """All that the laws ask for; `without` one mini-batch, for the jackknife."""
        chosen = np.array([i for i in range(self.count) if i != without])
        loop, last, ages = [a for a in self.ages if a < self.ages[-1]], self.ages[-1], np.arange(self.ages[-1])

        def along(values: Sequence[float]) -> float:
            return float(np.interp(ages, loop, values).mean())

        before = loop[-1]
        return Pairs(
            plain=along([self.noise(a, a, chosen) for a in loop]),
            cross=along([self.noise(a, 0, chosen) for a in loop]),
            outer=self.noise(0, 0, chosen),
            now=self.noise(last, last, chosen),
            before=self.noise(before, before, chosen),
            step=self.noise(last, before, chosen),
            signal=max(float(np.mean([self.signal(a, a, chosen) for a in self.ages])), 0.0),
            moved={name[1]: self.noise(name, name, chosen) for name, _ in self.between if name not in self.ages},
            clipped=self.clipped,
            averaged=self.averaged,
        )

    def kept(self, beta: float, gamma: float = 0.0) -> float:
        """The share of the gradient that momentum's mean direction keeps (`correction.worth.kept`)."""
        chosen, last = np.arange(self.count), self.ages[-1]
        whole = self.signal(last, last, chosen)
        if whole <= 0.0:
            return float("nan")
        return kept(beta, {last - a: self.signal(a, last, chosen) / whole for a in reversed(self.ages)}, gamma)

    @functools.cached_property
    def parts(self) -> list[Pairs]:
        """`pairs` without each of the mini-batches."""
        return [self.pairs(i) for i in range(self.count)]

    def error(self, function: Callable[[Pairs], float]) -> float:
        """The standard error of a number made of `pairs`, by the jackknife; infinite where one of its parts is."""
        values = np.array([function(part) for part in self.parts])
        if not np.isfinite(values).all():
            return math.inf
        return float(np.sqrt(((values - values.mean()) ** 2).sum() * (self.count - 1) / self.count))

    def block_sums(self, window: int) -> tuple[float, float]:
        """S(0)/v of plain gradients as the loader gives them, from sums over windows, and its jackknife error.

        Windows that do not overlap have sums of variance `window` · v where mini-batches are independent.
        """
        blocks = self.count // window
        both = self.between[0, 0][: blocks * window, : blocks * window]
        sums = both.reshape(blocks, window, blocks, window).sum((1, 3))
        alone = self.noise(0, 0, np.arange(self.count))

        def power(without: int | None) -> float:
            chosen = [i for i in range(blocks) if i != without]
            part = sums[np.ix_(chosen, chosen)]
            return float((np.trace(part) - part.sum() / len(part)) / (len(part) - 1) / window / alone)

        parts = np.array([power(i) for i in range(blocks)])
        return power(None), float(np.sqrt(((parts - parts.mean()) ** 2).sum() * (blocks - 1) / blocks))


class Counted:
    """Closures of mini-batches that count how often they are called."""

    def __init__(self, closure_of: Callable[[Any], Closure]) -> None:
        self._make, self.calls = closure_of, 0

    def of(self, batch: Any) -> Closure:
        """The closure of one mini-batch."""
        inner = self._make(batch)
        if not callable(inner):
            raise TypeError("closure_of: give a function from a mini-batch to a closure, such as a lambda in a lambda.")

        def closure() -> Any:
            self.calls += 1
            return inner()

        return closure


class Stretch:
    """The optimizer's own steps, and gradients at their points.

    Args:
        optimizer: any; what is not of this package steps with the gradients that it finds.
        seed: of the noises of the mini-batches.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
        self.optimizer, self.seed = optimizer, seed
        self.params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not self.params:
            raise ValueError("optimizer: no parameter of it requires a gradient, so there is nothing to measure.")
        self._places = _places([p.numel() for p in self.params])
        self._scale = self._seen([_metric(optimizer, p).sqrt() for p in self.params])
        self.seen: dict[Any, Tensor] = {}
        self._clipped: list[tuple[float, float]] = []

    def step(self, closure: Closure) -> None:
        """One step of the user's training."""
        if isinstance(self.optimizer, PosteriorCorrected):
            before = _means(self.optimizer)
            self.optimizer.step(closure)
            self._clipped.append(_clipped(self.optimizer, before, _means(self.optimizer)))
            return
        if isinstance(self.optimizer, AlphaSVRG):
            self.optimizer.step(closure)
            return
        for p, grad in zip(self.params, evaluate(closure, self.params).grads, strict=True):
            p.grad = grad
        self.optimizer.step()

    def measure(self, name: Any, closures: Sequence[Closure]) -> None:
        """Keep the gradients of the mini-batches here, at draws whose noise goes by the mini-batch's number."""
        self.seen[name] = torch.stack([self._gradient(closure, i) for i, closure in enumerate(closures)])

    @contextmanager
    def ahead(self, before: Mapping[Any, Any], far: float) -> Iterator[None]:
        """Inside, the optimizer stands λ + far (λ − before), as `Transported` would evaluate."""
        own = self.optimizer
        if isinstance(own, PosteriorCorrected):
            now = own.posterior_states()
            moved = {b.name: b.family.extrapolate(now[b.name], before[b.name], far) for b in own._active()}
            own.set_posterior(moved)
            yield
            own.set_posterior(now)
            return
        with torch.no_grad():
            for p in self.params:
                p.add_(p - before[p], alpha=far)
            yield
            for p in self.params:  # θ' = θ + far (θ − θ₀), solved for θ
                p.add_(before[p], alpha=far).div_(1.0 + far)

    def here(self) -> Mapping[Any, Any]:
        """Where the optimizer stands."""
        if isinstance(self.optimizer, PosteriorCorrected):
            return self.optimizer.posterior_states()
        return {p: p.detach().clone() for p in self.params}

    def gradients(self) -> Gradients:
        """What all measured gradients have in common."""
        ages = sorted(name for name in self.seen if isinstance(name, int))
        wanted = [(one, other) for one in ages for other in ages if one >= other]
        wanted += [(name, name) for name in self.seen if name not in ages]
        between = {(a, b): _products(self.seen[a], self.seen[b]) for a, b in wanted}
        clipped, averaged = np.mean(self._clipped, axis=0) if self._clipped else (0.0, 0.0)
        return Gradients(ages, between, float(clipped), float(averaged / clipped) if clipped > 0.0 else 1.0)

    def _gradient(self, closure: Closure, number: int) -> Tensor:
        with self._drawn(self.seed + number), replay_random(capture_random(self.params)), fresh_caches():
            torch.manual_seed(self.seed + number)  # dropout masks and the like: the same at all points
            grads = evaluate(closure, self.params).grads
        for p in self.params:
            p.grad = None
        return self._seen(
            [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, grads, strict=True)]
        ).mul_(self._scale)

    def _drawn(self, seed: int) -> AbstractContextManager[None]:
        own = self.optimizer
        if not isinstance(own, PosteriorCorrected):
            return nullcontext()
        return own.sampled(None if own.noise == "zero" else seed, at_point=own.noise == "zero")

    def _seen(self, values: Sequence[Tensor]) -> Tensor:
        """The kept entries of a vector of all weights, on the CPU."""
        parts = [v.detach().reshape(-1)[at.to(v.device)] for v, at in zip(values, self._places, strict=True)]
        return torch.cat([part.to("cpu", torch.promote_types(part.dtype, torch.float32)) for part in parts])


def _means(optimizer: PosteriorCorrected) -> dict[str, Tensor]:
    """The means of Gaussian blocks whose steps may be clipped, by name."""
    blocks = [b for b in optimizer._active() if b.settings.clip_radius < math.inf and b.numel]
    states = optimizer.posterior_states() if blocks else {}
    return {b.name: states[b.name].mean for b in blocks if hasattr(states[b.name], "mean")}


def _clipped(
    optimizer: PosteriorCorrected, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[float, float]:
    """The share of all weights whose step was η ξ long but for rounding, and the sum of their (1−β)/(1+β)."""
    blocks = optimizer._active()
    whole, clipped, averaged = sum(block.numel for block in blocks), 0.0, 0.0
    for block in blocks:
        if block.name not in before:
            continue
        old, new, s = before[block.name], after[block.name], block.settings
        longest = s.lr * s.clip_radius
        rounding = ROUNDINGS * torch.finfo(new.dtype).eps * torch.maximum(old.abs(), new.abs())
        least = ((1.0 - 1e-4) * longest - rounding).clamp_min(0.5 * longest)
        share = float(((new - old).abs() >= least).sum()) / whole
        clipped, averaged = clipped + share, averaged + share * (1.0 - s.momentum) / (1.0 + s.momentum)
    return clipped, averaged


def batches_of(loader: Iterable[Any], count: int) -> list[Any]:
    """So many mini-batches in the loader's order, from as many passes as it takes; its generators stay the same."""
    found: list[Any] = []
    with _generators_kept(loader):
        while len(found) < count:
            part = list(itertools.islice(iter(loader), count - len(found)))
            if not part:
                raise ValueError(
                    "loader: it has no mini-batches; give an iterable of them that can be gone through again."
                )
            if len(part) == 1 and count > 1 and not found:
                raise ValueError("loader: it has one mini-batch, so that nothing tells of noise; give one of several.")
            found += part
    return found


@contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    owners = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    found = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}
    states = [generator.get_state() for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in zip(found.values(), states, strict=True):
            generator.set_state(state)


def _places(sizes: Sequence[int]) -> list[Tensor]:
    """For every parameter, which of its entries are kept: all, or a random sample over all parameters alike."""
    total = sum(sizes)
    if total <= SEEN:
        return [torch.arange(size) for size in sizes]
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(size, generator=generator) < SEEN / total).nonzero().squeeze(1) for size in sizes]


def _metric(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """The diagonal metric of the optimizer's own steps: 1/precision of q, 1/(√v + ε) of Adam's, or the identity."""
    state = optimizer.state.get(p, {})
    precision = getattr(state.get("posterior"), "precision", None)
    if isinstance(precision, Tensor) and precision.shape == p.shape:
        return 1.0 / precision.to(p)
    second = state.get("exp_avg_sq")
    if isinstance(second, Tensor) and second.shape == p.shape:
        return 1.0 / (second.sqrt() + 1e-8).to(p)
    return torch.ones_like(p)


def _products(one: Tensor, other: Tensor) -> np.ndarray:
    """All inner products of rows, summed in float64 a slice at a time."""
    total = np.zeros((len(one), len(other)))
    for a, b in zip(one.split(2**14, dim=1), other.split(2**14, dim=1), strict=True):
        total += (a.double() @ b.double().T).numpy()
    return total
