r"""The recursive correction: the reference is the previous posterior, its site the estimate that was used there.

    d_t = ∇̃L_B(λ_t) − α [ ∇̃L_B(λ_{t−1}) − d_{t−1} ],        d_1 = ∇̃L_B(λ_1)

On natural gradients this is SARAH for α = 1 (with a `refresh` now and then, after which d is a mega-batch's mean) and
STORM for α = 1 − a, which needs no refresh. The bracket is a site at λ_{t−1}; brought to λ_t it is `carried` and
`reanchored` as `Snapshot`'s is. With e_t = d_t − ∇̃L(λ_t) and ξ for what a mini-batch differs from the mean,

    e_t = α e_{t−1} + [ ξ_B(λ_t) − α ξ_B(λ_{t−1}) ]        in natural coordinates.

The bracket has mean zero, and is as small as the step for α = 1 and as (1−α) times the noise beside that: SARAH's
error is a random walk of small steps that refreshes end, STORM's forgets.

What is unbiased: in the step after a refresh on all data e = 0, so that the mean of d over mini-batches is ∇̃L(λ). Later
E[d_t | past] = ∇̃L(λ_t) + α e_{t−1}: given the past it is biased, by an error whose mean over all the past's
mini-batches is zero. All this with the exact anchor term (`anchor_weight=1`); with less of it e_t also gathers what
is left out at every step, and with α near 1 and noise that is not shared, the noise of every step.

Sources: Nguyen et al. 2017, *SARAH*; Cutkosky & Orabona 2019, *Momentum-based variance reduction in non-convex SGD*
(STORM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from expfam_poco.correction.base import Averaging, Corrected
from expfam_poco.correction.snapshot import Outer, Snapshot
from expfam_poco.correction.worth import Law, RecursiveLaw
from expfam_poco.family import fields

if TYPE_CHECKING:
    from expfam_poco.correction.alpha import Pace
    from expfam_poco.family.base import ExponentialFamily


@dataclass(frozen=True)
class Recursive(Snapshot):
    """SARAH and STORM on natural gradients: `Snapshot` whose q_out follows every step.

    Example:
        >>> import torch, expfam_poco as poco
        >>> family, recursive = poco.resolve_family("bernoulli"), poco.correction.Recursive()
        >>> q = family.centred_at(torch.ones(1))
        >>> found = poco.correction.Corrected(family.Site(torch.ones(1)), None)
        >>> recursive.mean(recursive.after_step(family, recursive.begin(family, q), q, q, found)).theta
        tensor([1.])
    """

    def begin(self, family: ExponentialFamily, state: Any) -> Outer:
        """λ with a site of zeros, which no step compares with."""
        return Outer(state, fields.map_fields(torch.zeros_like, family.kl_gradient(state, state)))

    def after_refresh(self, family: ExponentialFamily, memory: Any, posterior: Any, site: Any, how: Averaging) -> Outer:
        """A new start: d is the mega-batch's mean (no average of several: the recursion has its own)."""
        return Outer(posterior, site)

    def after_step(self, family: ExponentialFamily, memory: Any, before: Any, after: Any, found: Corrected) -> Outer:
        """λ_t and d_t, the site with its anchor term."""
        return Outer(before, found.total())

    def law(self, alpha: float, beta: float, pace: Pace, batches: float) -> Law | None:
        """STORM's; none at α = 1, where it never forgets, or with refreshes, which end it."""
        return RecursiveLaw(alpha) if alpha < 1.0 and not pace.chunks else None
