"""What α may be beside a number: schedules over inner steps, and the adaptive choice from measured variances."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from expfam_poco.arguments import number, whole

Value = float | tuple[float, float]


class Pace(NamedTuple):
    """How often q_out is refreshed, and from how much.

    Attributes:
        chunks: of the last refresh; 0 before the first one, and where a stored posterior is q_out.
        steps: from the refresh before to the last one, or since the last one where these are more already.
    """

    chunks: int
    steps: int

    @classmethod
    def of(cls, clock: Mapping[str, int], step: int) -> Pace:
        """The pace at inner step `step`, from an optimizer's counters."""
        return cls(clock["mega"], max(clock["every"], step - clock["refreshed"]))


def refreshed(clock: Mapping[str, int], chunks: int) -> dict[str, int]:
    """An optimizer's counters after a refresh from so many chunks; 0 for a stored posterior."""
    since = clock["step"] - clock["refreshed"] if clock["refresh"] else 0
    return {
        "memory": clock["memory"] + 1, "refresh": clock["refresh"] + 1, "refreshed": clock["step"],
        "chunk": clock["chunk"] + chunks, "mega": chunks, "every": since,
    }  # fmt: skip


@dataclass(frozen=True)
class BurnIn:
    """α(t) = 0 for the first `steps` inner steps, afterwards `alpha`: a number, or a schedule that starts then.

    Example:
        >>> import expfam_poco as poco
        >>> schedule = poco.BurnIn(steps=100, alpha=0.7)
        >>> schedule(100), schedule(101)
        (0.0, 0.7)
        >>> poco.BurnIn(steps=100, alpha=poco.LinearAlpha(0.0, 1.0, steps=10))(105)
        0.5
    """

    steps: int
    alpha: float | Callable[[int], Value] = 1.0

    def __post_init__(self) -> None:
        _check_steps(self.steps, least=0)
        if not callable(self.alpha):
            _check_alpha("alpha", self.alpha)

    def __call__(self, step: int) -> Value:
        """α at inner step `step`, counted from 1."""
        if step <= self.steps:
            return 0.0
        return self.alpha(step - self.steps) if callable(self.alpha) else self.alpha


@dataclass(frozen=True)
class _Ramp:
    """From `first` to `last` over `steps` inner steps."""

    first: float
    last: float
    steps: int

    def __post_init__(self) -> None:
        _check_alpha("first", self.first, pairs=False)
        _check_alpha("last", self.last, pairs=False)
        _check_steps(self.steps, least=1)

    def _progress(self, step: int) -> float:
        """The part of the way, 0 to 1."""
        return min(step / self.steps, 1.0)


@dataclass(frozen=True)
class LinearAlpha(_Ramp):
    """α from `first` to `last` along a straight line over `steps` inner steps, `last` afterwards.

        α(t) = first + (last − first) min(t / steps, 1)

    Example:
        >>> import expfam_poco as poco
        >>> poco.LinearAlpha(0.8, 0.0, steps=100)(50)
        0.4
    """

    def __call__(self, step: int) -> float:
        """α at inner step `step`, counted from 1."""
        return self.first + (self.last - self.first) * self._progress(step)


@dataclass(frozen=True)
class CosineAlpha(_Ramp):
    """α from `first` to `last` along half a cosine over `steps` inner steps, `last` afterwards.

        α(t) = last + (first − last) (1 + cos(π min(t / steps, 1))) / 2

    Example:
        >>> import expfam_poco as poco
        >>> round(poco.CosineAlpha(0.8, 0.0, steps=100)(50), 6)
        0.4
    """

    def __call__(self, step: int) -> float:
        """α at inner step `step`, counted from 1."""
        return self.last + (self.first - self.last) * (1.0 + math.cos(math.pi * self._progress(step))) / 2.0


@dataclass(frozen=True)
class AdaptiveAlpha:
    """For every tensor the α of least variance, as measured: α* = Cov(in, out) / Var(out), clipped to [0, 1].

    Both are moving averages over the corrected steps (`keep` of the old value), taken about ḡ_out and summed over the
    entries of the tensor; gradient and curvature have an α each. Where the variance would fall by less than
    `least_gain` Var(out), or rise, α is 0. While it is 0 everywhere, steps are plain and cost one evaluation, but every
    `probe_every` steps the pair is measured, so that the correction can come back. `alpha="adaptive"` is
    `AdaptiveAlpha()`. A large drift of the mean since the refresh, beside the spread of mini-batches, makes the
    measurement noisy. The error of ḡ_out by its draws is counted where a refresh measures it, from
    `refresh(…, draws=2)` on: the M steps that share it move together, so that α* = Cov(in, out)/(Var(out) +
    M Var(ḡ_out)), and where the noise of draws is most of the variance the correction stays off.

    Args:
        keep: of the old value in a moving average.
        least_gain: see above.
        probe_every: steps between two probes; prime, so that they fall to all ages of q_out.
        mega_batch: the number M of mini-batches that a mega-batch is as large as, whose mean has a variance itself:
            α* = Cov(in, out) / (Var(out) (1 + 1/M)). None: the mean is exact, over all data.

    Source: the optimal coefficient of a control variate, as in α-SVRG (Yin et al. 2025), estimated online.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.randn(8, 2)
        >>> opt = poco.IVONPoCo(model.parameters(), lr=0.1, ess=100.0, alpha="adaptive")
        >>> closure = lambda: (model(x) - 1.0).square().mean()
        >>> _ = opt.refresh([closure])
        >>> _ = [opt.step(closure) for _ in range(5)]
        >>> 0.0 <= opt.diagnostics()["alpha"] <= 1.0
        True
    """

    keep: float = 0.9
    least_gain: float = 0.01
    probe_every: int = 11
    mega_batch: float | None = None

    def __post_init__(self) -> None:
        for name in ("keep", "least_gain"):
            number(name, getattr(self, name), lambda value: 0.0 <= value < 1.0, "it must be a number in [0, 1)")
        _check_steps(self.probe_every, least=1, name="probe_every")
        if self.mega_batch is not None:
            remedy = "give a positive number of mini-batches, or None"
            number("mega_batch", self.mega_batch, lambda value: value > 0.0, remedy)

    @property
    def share(self) -> float:
        """Var(ḡ_out)/Var(out)."""
        return 0.0 if self.mega_batch is None else 1.0 / self.mega_batch


@dataclass(frozen=True)
class MegaBatchAlpha:
    """α for mega-batches of K mini-batches, one every M steps: `alpha="mega_batch"` is `MegaBatchAlpha()`.

        α = K / (K + M)

    The M steps that share a ḡ_out of variance Var(out)/K move by its error together, which adds up to a variance of
    α² M²/K, and by their own mini-batches' apart, (1 − α)² M, as long as θ is near θ_out: α is where the sum is least.
    K is the number of chunks of the last refresh. M counts the steps between the last two refreshes, or those since
    the last one where they are more (so also before the second): the α of a q_out that nobody refreshes fades. α is 1
    where K is unknown: after a refresh from one chunk, and where q_out is a stored posterior.

    A refresh from *all* data has no such variance: give alpha=1.

    Args:
        mini_batches: K, where chunks are not as large as mini-batches; None: the number of chunks.

    Example:
        >>> import torch, expfam_poco as poco
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> opt = poco.IVONPoCo([weight], lr=0.1, ess=100.0, alpha="mega_batch")
        >>> closure = lambda: (weight - 1.0).square().mean()
        >>> for step in range(8):
        ...     if step in (0, 4):
        ...         _ = opt.refresh(12 * [closure])
        ...     _ = opt.step(closure)
        >>> opt.diagnostics()["alpha"]
        0.75
    """

    mini_batches: float | None = None

    def __post_init__(self) -> None:
        k = self.mini_batches
        if k is not None and (isinstance(k, bool) or not isinstance(k, int | float) or not 0.0 < k < math.inf):
            raise ValueError(f"mini_batches={k!r}: give a positive number of mini-batches, or None for the chunks.")

    def at(self, pace: Pace) -> float:
        """α at a pace of refreshes."""
        if not pace.chunks or (self.mini_batches is None and pace.chunks == 1):
            return 1.0
        count = pace.chunks if self.mini_batches is None else self.mini_batches
        return count / (count + pace.steps)


NAMES: Mapping[str, type[Any]] = {"adaptive": AdaptiveAlpha, "mega_batch": MegaBatchAlpha}
SCHEDULES: Mapping[str, type[Any]] = {
    kind.__name__: kind for kind in (BurnIn, LinearAlpha, CosineAlpha, AdaptiveAlpha, MegaBatchAlpha)
}


def resolve_alpha(alpha: Any) -> Any:
    """`AdaptiveAlpha()` for "adaptive", `MegaBatchAlpha()` for "mega_batch"; everything else as it is.

    Raises:
        ValueError: for other names.
    """
    if not isinstance(alpha, str):
        return alpha
    if alpha not in NAMES:
        raise ValueError(
            f"alpha={alpha!r}: give a number between 0 and 1, a pair of them, a schedule, 'adaptive' or 'mega_batch'."
        )
    return NAMES[alpha]()


def describe_alpha(alpha: Any) -> Any:
    """α in plain types, for a checkpoint; a function of the user's own is only said to be one."""
    if type(alpha) in SCHEDULES.values():
        settings = {f.name: describe_alpha(getattr(alpha, f.name)) for f in dataclasses.fields(alpha)}
        return {"schedule": type(alpha).__name__, "settings": settings}
    if callable(alpha):
        return {"schedule": None, "settings": {}}
    return list(alpha) if isinstance(alpha, tuple) else alpha


def alpha_from(plain: Any, own: Any) -> Any:
    """The inverse of `describe_alpha`; `own` stands where a function of the user's own was."""
    if isinstance(plain, Mapping):
        if plain["schedule"] is None:
            return own
        settings = {name: alpha_from(value, getattr(own, name, own)) for name, value in plain["settings"].items()}
        return SCHEDULES[plain["schedule"]](**settings)
    return tuple(plain) if isinstance(plain, list) else plain


class Staleness:
    """Warns, once, of a correction by a q_out that nobody has refreshed for long.

    Args:
        after: the number of steps that is too long; None: never.
    """

    def __init__(self, after: int | None) -> None:
        if after is not None:
            _check_steps(after, least=1, name="stale_after")
        self._after = after

    def check(self, correcting: bool, age: int) -> None:
        """`age`: steps since the last refresh, or since the first step."""
        if correcting and self._after is not None and age > self._after:
            self._after = None
            warnings.warn(
                f"alpha: no refresh() for {age - 1} steps, while α > 0; without one nothing is corrected, and an old "
                "q_out raises the variance. Call refresh(closures) now and then, give alpha=0, or set stale_after.",
                stacklevel=2,
            )


def _check_alpha(name: str, value: Any, *, pairs: bool = True) -> None:
    values = value if pairs and isinstance(value, tuple) and len(value) == 2 else (value,)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and 0.0 <= v <= 1.0 for v in values):
        kinds = " (or a pair of them, or another schedule but the adaptive one, which is 0 before the first refresh)"
        raise ValueError(f"{name}={value!r}: give a number between 0 and 1{kinds if pairs else ''}.")


def _check_steps(steps: Any, *, least: int, name: str = "steps") -> None:
    whole(name, steps, least)
