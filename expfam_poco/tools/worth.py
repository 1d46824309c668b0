"""What corrections, momentum and larger batches would be worth on one's own training, measured before paying."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from expfam_poco import arguments
from expfam_poco.correction.alpha import AdaptiveAlpha, Pace
from expfam_poco.correction.snapshot import alpha_at
from expfam_poco.correction.transported import Transported, momentum_of
from expfam_poco.correction.worth import (
    BatchLaw,
    CachedLaw,
    Law,
    MomentumLaw,
    Pairs,
    RecursiveLaw,
    SnapshotLaw,
    per_step,
    worth_of,
)
from expfam_poco.optim.optimizer import PosteriorCorrected
from expfam_poco.tools.files import written_aside
from expfam_poco.tools.pictures import empty_figure
from expfam_poco.tools.stretch import Counted, Gradients, Stretch, batches_of
from expfam_poco.tools.tuning import engine_of, put_back

NAMES = ("snapshot", "cached", "recursive", "transported")
MOST = 200
LEAST = 6  # mini-batches that a variance is measured from
RECURSIVE = 0.9  # α of STORM, which then averages as momentum of 0.9 does


@dataclass(frozen=True)
class Row:
    """One setting of a table.

    Attributes:
        law: the setting, and its noise.
        label: what it is called.
        evaluations: gradients of a plain mini-batch, a step.
        power: S(0) of its noise over the plain method's.
        worth, error: the plain method's evaluations to the same loss over its own, and a standard error.
        limit: the same where only noise matters, 1/(S(0) · evaluations) if nothing is clipped.
        steps: the plain method's steps to the same loss over its own.
        kept: the share of the present gradient in momentum's mean direction (its lag is 1 less it); None without one.

    Example:
        >>> from expfam_poco.correction.worth import BatchLaw, Pairs
        >>> from expfam_poco.tools.worth import Row
        >>> round(Row.alone(BatchLaw(3), Pairs.alike(signal=0.5)).worth, 3)
        0.6
    """

    law: Law
    label: str
    evaluations: float
    power: float
    worth: float
    error: float
    limit: float
    steps: float
    kept: float | None = None

    @classmethod
    def alone(cls, law: Law, pairs: Pairs, error: float = 0.0, kept: float | None = None) -> Row:
        """The row of a law, from what pairs of gradients have shown."""
        limit = worth_of(law, pairs._replace(signal=0.0))
        measured = worth_of(law, pairs), error, limit, per_step(law, pairs), kept
        return cls(law, law.label, law.evaluations, law.power(pairs, 0.0), *measured)

    @property
    def is_bound(self) -> bool:
        """Whether the worth leaves out what less lag gains, as a transport's does."""
        return isinstance(self.law, MomentumLaw) and self.law.gamma > 0.0


@dataclass(frozen=True)
class Worth:
    """What `worth` has found.

    Attributes:
        rows: of the settings, the plain method first.
        noise, noise_error: c = v/‖ḡ‖², the variance of a plain mini-batch's gradient over the mean's square.
        alike: the correlation of a mini-batch's noise at the snapshot and in the loop after it, r̄.
        block_sums, block_error: S(0)/v of plain gradients as the loader gives them; 1 if they are independent.
        alpha: the α of least S(0) for this `every` and `size`.
        every, size: M and K.
        fresh: φ, 1 for fresh data and 0 for a mega-batch of all.
        evaluations: gradients of mini-batches that this has cost.
        pairs: what the laws were asked with.

    Example:
        >>> import torch, expfam_poco as poco
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(8, 1), torch.randn(4096, 8)
        >>> loader = torch.utils.data.DataLoader(x, batch_size=4, shuffle=True)
        >>> optimizer = poco.IVON(model.parameters(), lr=0.1, ess=1e4)
        >>> closure_of = lambda x: lambda: (model(x) - x[:, :1] - torch.randn(len(x), 1)).square().mean()
        >>> found = poco.worth(model, optimizer, closure_of, loader)
        >>> found.evaluations < 200, 0.0 <= found.alpha <= 1.0, found["plain"].worth
        (True, True, 1.0)
    """

    rows: tuple[Row, ...]
    noise: float
    noise_error: float
    alike: float
    block_sums: float
    block_error: float
    alpha: float
    every: int
    size: int
    fresh: float
    evaluations: int
    pairs: Pairs

    def __getitem__(self, start: str) -> Row:
        """The first row whose label starts so.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.label.startswith(start):
                return row
        raise KeyError(f"{start!r}: the rows are {', '.join(row.label for row in self.rows)}.")

    def table(self) -> str:
        """All rows as text, the one of largest worth first, and under them what was measured."""
        names = ("setting", "evaluations", "S(0)", "worth", "if noise is all", "worth a step", "lag")
        lines = [names, *(_cells(row) for row in sorted(self.rows, key=lambda row: -round(row.worth, 6)))]
        widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
        text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
        many = f"of {self.size} mini-batches every {self.every} steps"
        clipped = f"; {self.pairs.clipped:.0%} of the weights are clipped" if self.pairs.clipped > 0.005 else ""
        return "\n".join(
            [
                *text,
                f"noise/signal {self.noise:.3g} ± {self.noise_error:.2g}; a mini-batch's noise in the loop goes "
                f"{self.alike:.2f} with its own at the snapshot{clipped}",
                f"best alpha of a mega-batch {many}: {self.alpha:.2f}; block sums of plain noise "
                f"{self.block_sums:.2f} ± {self.block_error:.2f}; {self.evaluations} evaluations",
                self.advice,
            ]
        )

    __str__ = table

    @property
    def advice(self) -> str:
        """One sentence, or two where the loader's order is to be looked at first."""
        said = self._of_mega_batches() or self._of_others()
        if self.block_sums - 2.0 * self.block_error > 1.3:
            said = f"Consecutive mini-batches are alike (block sums {self.block_sums:.1f}): shuffle the loader. {said}"
        return said

    def _of_mega_batches(self) -> str:
        rows = [row for row in self.rows if isinstance(row.law, SnapshotLaw)]
        if not rows:
            return ""
        best = max(rows, key=lambda row: row.worth)
        assert isinstance(best.law, SnapshotLaw)
        head = f"On this run a mega-batch of {self.size} every {self.every} steps is worth {best.worth:.2g} of its cost"
        if best.worth - 2.0 * best.error > 1.0:
            return f"{head}: use it, with alpha {best.law.alpha:.2f}."
        if best.worth > 1.0:
            return f"{head}, give or take {best.error:.2g}: it may pay; measure again with more samples, or later."
        others = [row for row in self.rows if isinstance(row.law, BatchLaw) and row.law.times > 1]
        remedies = [f"transport {row.law.gamma:g}" for row in self.rows if _pays(row)]  # type: ignore[attr-defined]
        remedies += [
            f"a {row.law.times} times larger batch (worth {row.worth:.2g})"  # type: ignore[attr-defined]
            for row in sorted(others, key=lambda row: -row.worth)[:1]
            if row.worth > best.worth
        ]
        use = f"use {', or '.join(remedies)}" if remedies else "leave it out"
        lack = f"use correction if steps, not evaluations, are what you lack (worth {best.steps:.2g} a step)"
        return f"{head}: {use}; {lack}."

    def _of_others(self) -> str:
        best = max(self.rows, key=lambda row: row.worth)
        return f"On this run nothing asked for is worth more an evaluation than {best.label} ({best.worth:.2g})."

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Write the picture of the noise's spectrum, per evaluation, and of the worths; needs matplotlib.

        Args:
            path: of a PNG file.
        """
        figure = empty_figure("worth's picture", 11.0, 4.4)
        left, right = figure.subplots(1, 2)
        periods = np.geomspace(2.0, 400.0, 400)
        shown = sorted(self.rows, key=lambda row: row.worth)
        for number, row in enumerate(reversed(shown)):
            colour, dashes = COLOURS[number % len(COLOURS)], ("-", "--", ":")[number // len(COLOURS) % 3]
            power = [row.evaluations * row.law.power(self.pairs, 2.0 * math.pi / period) for period in periods]
            left.plot(1.0 / periods, np.maximum(power, 1e-4), color=colour, linestyle=dashes, label=row.label)
            place = len(shown) - 1 - number
            right.errorbar(row.worth, place, xerr=row.error, fmt="o", color=colour)
            if row.is_bound:
                right.annotate("or more", (row.worth, place), (6, 5), textcoords="offset points", fontsize=8)
        left.set(xscale="log", yscale="log", xlabel="frequency, cycles a step (low ones stay)")
        left.set_ylabel("noise power × evaluations, plain = 1")
        left.legend(fontsize=8, frameon=False)
        right.axvline(1.0, color="#999999", linewidth=0.8)
        right.set_yticks(range(len(shown)), [row.label for row in shown])
        right.set(xlabel="predicted worth of an evaluation, plain = 1", xlim=(0.0, None))
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        with written_aside(path) as file:
            figure.savefig(file, dpi=150, format="png")


# Okabe & Ito's colours, told apart with colour blindness.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#7F7F7F")


def worth(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    closure_of: Callable[[Any], Callable[[], Any]],
    loader: Iterable[Any],
    *,
    corrections: Sequence[str | Law] = NAMES,
    batches: Sequence[int] = (1, 3),
    momenta: Sequence[float] | None = None,
    transports: Sequence[float] = (0.1,),
    alphas: Sequence[float] = (1.0,),
    every: int = 10,
    size: int = 10,
    samples: int = 16,
    window: int = 4,
    most: int = MOST,
    seed: int = 0,
) -> Worth:
    """What corrections, momentum and larger batches would be worth here, from a short stretch of this training.

    From the present weights `every` steps are taken, as the training would. On the way the gradients of `samples`
    further mini-batches are evaluated at some points, each with the same draws and dropout masks at all of them: how
    they go together says the noise power at frequency zero that every setting would leave, and what it is *worth*, the
    plain method's evaluations to the same loss over its own (`correction.worth` has the laws). Then the weights,
    buffers, modes, gradients, the optimizer and all random generators are what they were.

    It holds where it was measured: ask again when training is further, as noise/signal grows. Data of which the plain
    method sees several reshuffled passes are better to it than is said here, where an epoch is shorter than what steps
    are annealed or averaged over. A transport's worth is a lower bound: what less lag gains is not in it. Hooks of
    the optimizer's steps run on the way.

    Args:
        model: that is trained, whose buffers the closures move.
        optimizer: one of this package, or any torch optimizer that steps with the gradients it finds.
        closure_of: makes a mini-batch's closure, which returns its mean loss, as for `step`.
        loader: an iterable of mini-batches that can be gone through again; its length, if it has one, says how much of
            the data a mega-batch is.
        corrections: "snapshot", "cached", "recursive", "transported", or laws of one's own (`correction.worth.Law`).
        batches: multiples of the loader's batch size.
        momenta: β₁ to look at; None: the optimizer's own.
        transports: γ of `correction.Transported`.
        alphas: of the snapshot, beside the best one. The optimizer's own correction has a row, too, if its α is a
            number and it states a law; after this its `diagnostics()` have a predicted worth.
        every, size: steps from refresh to refresh, and mini-batches of a mega-batch, as `megabatches` has them.
        samples: mini-batches to measure with; fewer where `most` would not do.
        window: mini-batches in a block sum.
        most: evaluations of gradients, at most.
        seed: of the draws and dropout masks.

    Raises:
        ValueError: for arguments out of range, or too few evaluations for a variance.
        NonFiniteError: if a loss or gradient is not finite.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(64, 4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        >>> found = poco.worth(model, optimizer, lambda x: lambda: (model(x) - 1.0).square().mean(), x, every=5)
        >>> found["snapshot"].evaluations, found["cached"].evaluations
        (4.0, 2.0)
    """
    _check(model, optimizer, closure_of, loader, corrections, batches, momenta, transports, alphas)
    for name, value in (("every", every), ("size", size), ("window", window), ("most", most)):
        arguments.whole(name, value, 1)
    arguments.whole("samples", samples, LEAST)
    arguments.whole("seed", seed, 0)
    engine, there = engine_of(optimizer), _length(loader)
    own = momentum_of(optimizer.param_groups[0])
    if not own < 1.0:
        raise ValueError(f"optimizer: its momentum is {own!r} and never forgets; give one below 1.")
    betas = [own] if momenta is None else list(momenta)
    lagging, gammas = own or max(betas, default=0.0), list(transports) if "transported" in corrections else []
    gammas += [law.gamma for law in corrections if isinstance(law, MomentumLaw)]
    if engine is not None and isinstance(engine.correction, Transported):
        gammas.insert(0, engine.correction.gamma)
    ahead = [gamma for gamma in dict.fromkeys(gammas) if gamma > 0.0 and lagging > 0.0]
    ages = sorted({0, round(every / 3), round(2 * every / 3), every - 1, every})
    twice = 1 if engine is None else engine.correction.evaluations
    left = (most - twice * every - 1) // (len(ages) + len(ahead))
    if left < LEAST:
        raise ValueError(
            f"most={most}: {every} steps leave evaluations for {max(left, 0)} mini-batches at {len(ages) + len(ahead)} "
            f"points, and a variance needs {LEAST}; give a larger `most`, or a smaller `every`."
        )
    counted, samples = Counted(closure_of), min(samples, left)
    with put_back(model, optimizer):
        given = batches_of(loader, every + samples)
        steps, measured = ([counted.of(b) for b in part] for part in (given[:every], given[every:]))
        found = _measured(Stretch(optimizer, seed), steps, measured, ages, lagging, ahead)
    fresh = SnapshotLaw.error_share(size, there)
    pairs = found.pairs()
    if not min(pairs.plain, pairs.now) > 0.0:
        raise ValueError(
            "loader: the gradients of its mini-batches do not differ, so that nothing tells of noise; give "
            "mini-batches that differ, and a model that is not at rest."
        )
    transported = [MomentumLaw(lagging, gamma) for gamma in ahead]
    laws = _laws(pairs, corrections, batches, betas, transported, alphas, (every, size, fresh))
    laws += [law for law in _present(engine, own, Pace(size, every), there) if law not in laws]
    if engine is not None:
        engine._noise_seen = pairs, there  # for its diagnostics
    best = SnapshotLaw.best(every, size, pairs, fresh)
    return Worth(
        rows=tuple(_row(law, found, pairs) for law in laws),
        noise=pairs.noise,
        noise_error=found.error(lambda part: part.noise),
        alike=pairs.cross / math.sqrt(pairs.plain * pairs.outer) if pairs.plain * pairs.outer > 0.0 else math.nan,
        block_sums=(sums := found.block_sums(min(window, samples // 3)))[0],
        block_error=sums[1],
        alpha=best.alpha,
        every=every,
        size=size,
        fresh=fresh,
        evaluations=counted.calls,
        pairs=pairs,
    )


def _measured(
    stretch: Stretch, steps: Sequence[Any], batches: Sequence[Any], ages: Sequence[int], beta: float, ahead: Any
) -> Gradients:
    """Step along, stop at the ages to measure, and last look ahead as transports would."""
    before = stretch.here()
    for age in range(ages[-1] + 1):
        if age in ages:
            stretch.measure(age, batches)
        if age < ages[-1]:
            before = stretch.here() if age == ages[-1] - 1 else before
            stretch.step(steps[age])
    for gamma in ahead:
        with stretch.ahead(before, gamma * beta / (1.0 - beta)):
            stretch.measure(("ahead", gamma), batches)
    return stretch.gradients()


def _laws(
    pairs: Pairs,
    corrections: Sequence[str | Law],
    batches: Sequence[int],
    betas: Sequence[float],
    transported: Sequence[Law],
    alphas: Sequence[float],
    how: tuple[int, int, float],
) -> list[Law]:
    every, size, fresh = how
    laws: list[Law] = [BatchLaw(times) for times in dict.fromkeys((1, *batches))]
    laws += [*(MomentumLaw(beta) for beta in dict.fromkeys(betas) if beta > 0.0), *transported]
    if "snapshot" in corrections:
        best = SnapshotLaw.best(every, size, pairs, fresh)
        others = dict.fromkeys(alpha for alpha in alphas if alpha != best.alpha)
        laws += [best, *(SnapshotLaw(every, size, alpha, fresh) for alpha in others)]
    if "cached" in corrections:
        laws.append(CachedLaw(size))
    if "recursive" in corrections:
        laws.append(RecursiveLaw(RECURSIVE))
    return [*laws, *(law for law in corrections if isinstance(law, Law))]


def _row(law: Law, found: Gradients, pairs: Pairs) -> Row:
    error = found.error(lambda part: worth_of(law, part))
    share = found.kept(law.beta, law.gamma) if isinstance(law, MomentumLaw) else None
    return Row.alone(law, pairs, error, share)


def _present(engine: PosteriorCorrected | None, beta: float, pace: Pace, batches: float) -> list[Law]:
    """The law of the optimizer's own correction, where its α is a number above 0 and it states one.

    At this pace, or at its own where that is what it states one for: a recursion that is never refreshed.
    """
    alpha = None if engine is None else engine.param_groups[0]["alpha"]
    if engine is None or isinstance(alpha, str | AdaptiveAlpha):
        return []
    step = engine._clock["step"] + 1
    value = alpha_at(alpha, step, pace)[0]
    if engine.correction.compares and value == 0.0:
        return []
    found = (engine.correction.law(value, beta, p, batches) for p in (pace, Pace.of(engine._clock, step)))
    return [law for law in found if law is not None][:1]


def _length(loader: Any) -> float:
    """Mini-batches in it; infinite where it does not say."""
    try:
        return float(len(loader))
    except TypeError:
        return math.inf


def _pays(row: Row) -> bool:
    """A transport that leaves hardly more noise, where momentum has a lag to make up for."""
    return row.is_bound and row.worth > 0.95 and row.kept is not None and abs(1.0 - row.kept) > 0.05


def _cells(row: Row) -> tuple[str, ...]:
    bound = ">= " if row.is_bound else ""
    lag = "" if row.kept is None or math.isnan(row.kept) else f"{1.0 - row.kept:.2f}"
    return (
        row.label,
        f"{row.evaluations:.3g}",
        f"{row.power:.2f}",
        f"{bound}{row.worth:.2f} ± {row.error:.2f}",
        f"{row.limit:.2f}",
        f"{row.steps:.2f}",
        lag,
    )


def _check(
    model: Any,
    optimizer: Any,
    closure_of: Any,
    loader: Any,
    corrections: Any,
    batches: Any,
    momenta: Any,
    transports: Any,
    alphas: Any,
) -> None:
    arguments.module(model)
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader={arguments.shown(loader)}: give an iterable of mini-batches.")
    arguments.instance("optimizer", optimizer, torch.optim.Optimizer, "give the optimizer that trains the model")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer=LBFGS: it evaluates its closure many times a step, along a line of its own; give one that steps "
            "with the gradients it finds, such as torch.optim.SGD."
        )
    if not callable(closure_of):
        raise TypeError("closure_of: give a function from a mini-batch to a closure.")
    for name in arguments.listed("corrections", corrections, f"give a tuple of {', '.join(NAMES)}"):
        if not isinstance(name, Law):
            arguments.choice("corrections", name, NAMES, f"give some of {', '.join(NAMES)}")
    for times in arguments.listed("batches", batches, "give a tuple of multiples, such as (1, 3)"):
        arguments.whole("batches", times, 1)
    for name, values, inside, remedy in (
        ("momenta", momenta or (), lambda v: 0.0 <= v < 1.0, "give numbers in [0, 1)"),
        ("transports", transports, lambda v: 0.0 < v <= 1.0, "give numbers in (0, 1]"),
        ("alphas", alphas, lambda v: 0.0 <= v <= 1.0, "give numbers in [0, 1]"),
    ):
        for value in arguments.listed(name, values, remedy):
            arguments.number(name, value, inside, remedy)
