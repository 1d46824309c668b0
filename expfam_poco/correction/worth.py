r"""What a correction is worth, as laws: the noise power at frequency zero that it leaves, times what it evaluates.

**The law.** Let d_t = g_t + ξ_t be the directions that a frozen stretch of training is given, with noise ξ_t of mean
zero. Steps that are annealed or averaged over a window of W steps move by the sum of the ξ_t, whose variance is
W S(0) for windows longer than the noise's memory, with the noise power at frequency ω

    S(ω) = lim (1/W) E ‖Σ_t ξ_t e^{−iωt}‖².

With v the variance of one mini-batch's gradient, S(0) is v for a plain gradient, v/b for a batch b times as large, and
v for any momentum, whose weights add up to one. What costs e evaluations a step can therefore be compared with the
plain method by e S(0)/v, the noise of one evaluation: 1 for the three of them.

**Every estimator** here is linear in gradients of mini-batches, which are independent, so that S(ω) follows from how
one mini-batch's gradients at two points go together (`Pairs`). With r(a) the correlation of its gradients at the
present point and a steps before, r̄ its mean over an inner loop, and equal variances at all points:

    snapshot, K batches every M steps     S(0)/v = 1 − 2α r̄ + α² + α² φ M/K      e = (K + 2M)/M = 2 + K/M
        the M corrected steps have independent ξ_B(λ) − α ξ_B(λ_out), and share the error of ḡ_out, of variance
        φ v/K, which M steps add up to α² M² φ v/K; φ = 1 − K/N_b for K of N_b batches drawn without
        replacement (0 for all data, where the mean has no error; 1 for fresh data).
        Least at α = r̄/(1 + φ M/K). With r̄ = φ = 1 the product e S(0)/v is [(1−α)² + α² M/K](K + 2M)/M, at its best,
        α = K/(K+M), (K + 2M)/(K + M): 3/2 at K = M, and above 1 for any K. With φ = 0 and r̄ = 1 S(0) is 0 at α = 1,
        which is what SVRG lives on.
    cached, the mega-batch's own K batches again, M = K      S(0)/v = 1      e = 2
        the stored gradients and their mean cancel over the loop at any α: Σ_t [ξ_t(λ_t) − α(ξ_t(λ_out) − ξ̄)]
        = Σ_t ξ_t(λ_t). Nothing new is learnt from a batch that is evaluated twice.
    recursive (STORM)     S(0)/v = (1 − 2α r(1) + α²)/(1 − α)² = 1 + 2α(1 − r(1))/(1 − α)² ≥ 1      e = 2
        d_t = α d_{t−1} + g_t(λ_t) − α g_t(λ_{t−1}): every batch counts 1/(1 − α) times in the sum.
    transported     S(0)/v = ṽ/v      e = 1
        with ṽ the variance at the point beyond λ where it evaluates. What it gains is no noise but lag: momentum's
        mean direction keeps of the gradient the share G = Σ_τ (1−β)β^τ ⟨ḡ_{t−τ}, ḡ_t⟩/‖ḡ_t‖², and, the gradient
        being affine along the way, G + γ(1 − G) of it with transport γ.

**Worth.** S(0) decides where noise does. Before that a step's own length does: of gradients with signal ‖ḡ‖² and
noise s·v (s = S(0)/v), the best step's progress is ‖ḡ‖⁴/(‖ḡ‖² + s v) up to a constant (McCandlish et al. 2018, §2.2,
with s for 1/B), so that a loss takes steps in proportion to 1 + c s, with c = v/‖ḡ‖² the noise-to-signal ratio, and

    worth = plain's evaluations / its evaluations = (1 + c) / (e (1 + c s)),

which is 1/(e s), the law, for c → ∞, and 1/e where there is no noise. Per step it is (1 + c)/(1 + c s).

**Clipped steps.** Where the entries of a step are clipped (`clip_radius`), a weight moves by η ξ sign(a), a being
momentum's average: it learns a sign, and noise that leaves the sign alone costs nothing. Independent gradients have
an average of variance κ v, κ = (1−β)/(1+β), and E sign(a) = erf(ḡ/√(2 κ v)): without loss until v is about 1/κ times
ḡ², 19 times at β = 0.9, while steps that are not clipped feel noise from c = 1 on. What noise is left adds up as
before: where it prevails the signs' correlations over time are (2/π) arcsin of those of a, so that the sum of W signs
has a variance of W S(0)/(κ v), within a factor of π/2, and e S(0)/v compares settings again. With q the share of
weights that are clipped

    steps ∝ (1 − q)(1 + c s) + q / erf²(1/√(2 κ c s)),

which is exact at β = 0 for independent gradients, and else an interpolation between 1, where noise is small, and the
law, which it meets within π/2 where noise prevails. benchmarks/RESULTS.md has predictions beside measurements.

Sources: ours (the law, its derivation, the use of S(0) in the second formula, and clipped steps); McCandlish, Kaplan
and Amodei 2018, *An Empirical Model of Large-Batch Training* (progress against noise); Bernstein et al. 2018, *signSGD*
(signs of noisy gradients); Arnold et al. 2019 (transport).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NOTHING: Mapping[float, float] = {}  # never written to


class Pairs(NamedTuple):
    """How one mini-batch's gradients at two points go together: means of inner products of their noises.

    Attributes:
        plain: E⟨ξ(λ_a), ξ(λ_a)⟩, the mean over the ages a = 0 … M−1 of an inner loop.
        cross: E⟨ξ(λ_a), ξ(λ_0)⟩, the mean over the same ages.
        outer: E⟨ξ(λ_0), ξ(λ_0)⟩, at the snapshot.
        now, before: the variances at the last two points.
        step: E⟨ξ(λ_t), ξ(λ_{t−1})⟩.
        signal: ‖ḡ‖², the mean over the stretch.
        moved: by γ, the variance at the transported point.
        clipped: q, the share of weights whose steps are clipped.
        averaged: κ, the variance of momentum's average of independent gradients over theirs, for those.

    Example:
        >>> from expfam_poco.correction.worth import Pairs, SnapshotLaw, worth_of
        >>> alike = Pairs.alike(signal=0.0)
        >>> law = SnapshotLaw(every=10, size=10, alpha=0.5)
        >>> law.power(alike, 0.0), law.evaluations, round(worth_of(law, alike), 3)
        (0.5, 3.0, 0.667)
    """

    plain: float
    cross: float
    outer: float
    now: float
    before: float
    step: float
    signal: float
    moved: Mapping[float, float] = NOTHING
    clipped: float = 0.0
    averaged: float = 1.0

    @classmethod
    def alike(cls, signal: float) -> Pairs:
        """Noise of variance 1 that is the same everywhere: the law's own case."""
        return cls(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, signal)

    @property
    def noise(self) -> float:
        """c = v/‖ḡ‖², infinite where no signal is seen."""
        return self.plain / self.signal if self.signal > 0.0 else math.inf


class Law(ABC):
    """What an estimate of the gradient costs, and the noise that it leaves.

    Example:
        >>> from expfam_poco.correction.worth import BatchLaw, Pairs
        >>> BatchLaw(3).power(Pairs.alike(signal=1.0), 0.0) * BatchLaw(3).evaluations
        1.0
    """

    @property
    @abstractmethod
    def label(self) -> str:
        """What a table calls it."""

    @property
    def evaluations(self) -> float:
        """e, of a plain mini-batch's gradient, a step."""
        return 1.0

    @abstractmethod
    def power(self, pairs: Pairs, frequency: float) -> float:
        """S(ω)/v at ω = `frequency`, in radians a step."""

    def is_known(self, pairs: Pairs) -> bool:
        """Whether these pairs tell its power."""
        return True


@dataclass(frozen=True)
class BatchLaw(Law):
    """A batch `times` as large as the plain one; 1 is the plain method."""

    times: int = 1

    @property
    def label(self) -> str:
        """Plain, or how much larger."""
        return "plain" if self.times == 1 else f"{self.times}x batch"

    @property
    def evaluations(self) -> float:
        """b."""
        return float(self.times)

    def power(self, pairs: Pairs, frequency: float) -> float:
        """1/b at all frequencies."""
        return 1.0 / self.times


@dataclass(frozen=True)
class MomentumLaw(Law):
    """An average with weights (1−β)β^τ over the past, evaluated `gamma` of its lag ahead (0: not at all)."""

    beta: float
    gamma: float = 0.0

    @property
    def label(self) -> str:
        """With its β, and γ."""
        ahead = f"transport {self.gamma:g}, " if self.gamma else ""
        return f"{ahead}momentum {self.beta:g}"

    def power(self, pairs: Pairs, frequency: float) -> float:
        """(ṽ/v) |(1−β)/(1 − β e^{−iω})|²."""
        passed = (1.0 - self.beta) ** 2 / _recursion(self.beta, frequency)
        return passed * (pairs.moved[self.gamma] / pairs.now if self.gamma else 1.0)

    def is_known(self, pairs: Pairs) -> bool:
        """If ṽ has been measured."""
        return not self.gamma or self.gamma in pairs.moved


@dataclass(frozen=True)
class SnapshotLaw(Law):
    """`Snapshot` by a mega-batch of `size` batches every `every` steps; `fresh` is φ, its error's share."""

    every: int
    size: int
    alpha: float
    fresh: float = 1.0

    @classmethod
    def best(cls, every: int, size: int, pairs: Pairs, fresh: float = 1.0) -> SnapshotLaw:
        """With the α of least S(0), r̄/(1 + φ M/K), in [0, 1]."""
        alpha = pairs.cross / (pairs.outer * (1.0 + fresh * every / size)) if pairs.outer > 0.0 else 0.0
        return cls(every, size, min(max(alpha, 0.0), 1.0), fresh)

    @staticmethod
    def error_share(size: int, batches: float) -> float:
        """φ = 1 − K/N_b."""
        return 1.0 - min(size / batches, 1.0)

    @property
    def label(self) -> str:
        """With K, M and α."""
        return f"snapshot K={self.size} M={self.every} alpha={self.alpha:.2f}"

    @property
    def evaluations(self) -> float:
        """(K + 2M)/M."""
        return 2.0 + self.size / self.every

    def power(self, pairs: Pairs, frequency: float) -> float:
        """[v − 2α u + α² v_out + α² (φ v_out/K) |Σ_{t<M} e^{−iωt}|²/M]/v."""
        alone = pairs.plain - 2.0 * self.alpha * pairs.cross + self.alpha**2 * pairs.outer
        together = self.alpha**2 * self.fresh * pairs.outer / self.size * _together(self.every, frequency)
        return (alone + together) / pairs.plain


@dataclass(frozen=True)
class CachedLaw(Law):
    """Stored gradients of a mega-batch of `size` batches, which the inner loop goes through again."""

    size: int
    alpha: float = 1.0

    @property
    def label(self) -> str:
        """With K, which is M as well."""
        return f"cached K=M={self.size} alpha={self.alpha:.2f}"

    @property
    def evaluations(self) -> float:
        """One for the store, one for the step."""
        return 2.0

    def power(self, pairs: Pairs, frequency: float) -> float:
        """[v − (2α u − α² v_out)(1 − |Σ_{t<K} e^{−iωt}|²/K²)]/v: all of v at ω = 0, at any α.

        Exact there, and for a correlation that is the same at all ages; else u's mean stands for its course.
        """
        removed = 2.0 * self.alpha * pairs.cross - self.alpha**2 * pairs.outer
        return 1.0 - removed * (1.0 - _together(self.size, frequency) / self.size) / pairs.plain


@dataclass(frozen=True)
class RecursiveLaw(Law):
    """`Recursive`: d_t = α d_{t−1} + g_t(λ_t) − α g_t(λ_{t−1}), without refreshes (STORM)."""

    alpha: float = 0.9

    def __post_init__(self) -> None:
        """Refuse an α with which it never forgets."""
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(f"alpha={self.alpha!r}: a recursion forgets, and has an S(0), with α in [0, 1).")

    @property
    def label(self) -> str:
        """With α."""
        return f"recursive alpha={self.alpha:.2f}"

    @property
    def evaluations(self) -> float:
        """At λ_t and λ_{t−1}."""
        return 2.0

    def power(self, pairs: Pairs, frequency: float) -> float:
        """[v_t − 2α E⟨ξ_t, ξ_{t−1}⟩ + α² v_{t−1}]/(v_t |1 − α e^{−iω}|²)."""
        new = pairs.now - 2.0 * self.alpha * pairs.step + self.alpha**2 * pairs.before
        return new / (pairs.now * _recursion(self.alpha, frequency))


def worth_of(law: Law, pairs: Pairs) -> float:
    """The plain method's evaluations to the same loss over this one's, (1 + c)/(e (1 + c s)); see above."""
    return per_step(law, pairs) / law.evaluations


def per_step(law: Law, pairs: Pairs) -> float:
    """The plain method's steps to the same loss over this one's, (1 + c)/(1 + c s) where nothing is clipped."""
    mine, plain = (_steps(each, pairs) for each in (law, BatchLaw()))
    return plain / mine if mine > 0.0 else math.inf


def _steps(law: Law, pairs: Pairs) -> float:
    """(1 − q)(1 + c s) + q/erf²(1/√(2 κ c s)) up to a constant; of infinite c what it grows by with c."""
    noise, clipped, left = pairs.noise, pairs.clipped, max(law.power(pairs, 0.0), 0.0)
    signs = pairs.averaged * left  # κ s
    if math.isinf(noise):
        return (1.0 - clipped) * left + clipped * math.pi / 2.0 * signs
    straight = 1.0 + noise * left
    if clipped == 0.0 or noise * signs <= 0.0:
        return (1.0 - clipped) * straight + clipped
    if noise * signs > 1e6:  # erf(x) = 2 x/√π
        return (1.0 - clipped) * straight + clipped * math.pi / 2.0 * noise * signs
    return (1.0 - clipped) * straight + clipped / math.erf(1.0 / math.sqrt(2.0 * noise * signs)) ** 2


def kept(beta: float, alike: Mapping[int, float], gamma: float = 0.0) -> float:
    """The share of the gradient that momentum's mean direction keeps, G + γ(1 − G).

    Args:
        beta: β.
        alike: ⟨ḡ_{t−τ}, ḡ_t⟩/‖ḡ_t‖² by the lag τ, from 0 on; linear between lags, constant beyond the last.
        gamma: γ.

    Example:
        >>> from expfam_poco.correction.worth import kept
        >>> round(kept(0.9, {0: 1.0, 10: 0.0}, gamma=0.0), 3), kept(0.9, {0: 1.0, 10: 0.0}, gamma=1.0)
        (0.414, 1.0)
    """
    lags = np.arange(math.ceil(math.log(1e-6) / math.log(beta)) if beta > 0.0 else 1)
    shares = (1.0 - beta) * beta**lags
    own = float(shares @ np.interp(lags, list(alike), list(alike.values())) / shares.sum())
    return own + gamma * (1.0 - own)


def _recursion(factor: float, frequency: float) -> float:
    """|1 − f e^{−iω}|²."""
    return 1.0 - 2.0 * factor * math.cos(frequency) + factor**2


def _together(steps: int, frequency: float) -> float:
    """|Σ_{t<M} e^{−iωt}|²/M: how a noise that M steps share adds up; M at ω = 0."""
    half = math.sin(frequency / 2.0)
    return float(steps) if abs(half) < 1e-9 else (math.sin(steps * frequency / 2.0) / half) ** 2 / steps
