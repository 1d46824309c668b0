r"""Posterior correction as pure functions: what q_out is made of, and how it corrects a natural gradient.

    ĝ = ∇̃L_B(λ_in) − α [ ∇̃L_B(λ_out) − ḡ_out ]                    (PC Eq. 13, with α Eq. 18)

∇̃L_B(λ_in) is a site at λ_in, the bracket is one at λ_out: `reanchor` moves it. In natural coordinates that is
the identity; in the Gaussian chart it adds α H̄ (m_in − m_out), H̄ = h_out − ĥ_out, the term that makes the
correction exact to second order. It comes back apart, as `anchor`, because momentum must not average it
(Alg. 4 line 14) and because noisy curvatures need it down-weighted (PC App. C).

ḡ_out is a moving average over mega-batches (Eq. 17, 26): ρ multiplies the old value, ρ = 0 keeps the freshest.
With ρ > 0 the old average was taken at another q_out and is re-anchored first, with the anchor term's weight, since the
same noisy curvature moves it; `reanchor_average=False` is the average of Algorithm 4 as printed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from expfam_poco.arguments import is_real, shown
from expfam_poco.correction.alpha import AdaptiveAlpha, MegaBatchAlpha, Pace
from expfam_poco.correction.base import Averaging, Corrected, Correction
from expfam_poco.correction.worth import Law, SnapshotLaw
from expfam_poco.family import fields

if TYPE_CHECKING:
    from expfam_poco.family.base import ExponentialFamily

Alpha = (
    float | tuple[float, float] | Callable[[int], float | tuple[float, float]] | str | AdaptiveAlpha | MegaBatchAlpha
)


class Outer(NamedTuple):
    """q_out: the posterior λ_out in its chart, and the mean natural gradient ḡ_out there, as a Site."""

    posterior: Any
    site: Any


class VarianceTerms(NamedTuple):
    """Sums over the entries of one field: a = in − ḡ_out, d = out − ḡ_out; ⟨a,a⟩, ⟨a,d⟩, ⟨d,d⟩."""

    plain: Tensor
    cross: Tensor
    outer: Tensor


def natural_correct(inner: Any, outer: Any, outer_mean: Any, alpha: float) -> Any:
    """ĝ = in − α (out − mean) on natural coordinates (Eq. 13; with α Eq. 18)."""
    return fields.map_fields(lambda a, b, c: a - alpha * (b - c), inner, outer, outer_mean)


def correct(
    family: ExponentialFamily,
    site_in: Any,
    site_out: Any,
    posterior: Any,
    outer: Outer,
    *,
    alpha: Any,
    anchor_weight: float = 1.0,
) -> Corrected:
    """The corrected natural gradient in the family's chart.

    Args:
        family: the exponential family.
        site_in: ∇̃L_B at `posterior`, the inner q.
        site_out: ∇̃L_B at `outer.posterior`, same mini-batch, same noise.
        posterior: λ_in.
        outer: λ_out and ḡ_out.
        alpha: α, one number or a Site of numbers (one for each field).
        anchor_weight: weight of the anchor term; 1 is exact, 0 leaves it out.

    Example:
        >>> import torch, expfam_poco as poco
        >>> family = poco.resolve_family("bernoulli")
        >>> site = lambda value: family.Site(torch.tensor([value]))
        >>> q = family.centred_at(torch.zeros(1))
        >>> outer = poco.correction.Outer(q, site(0.25))
        >>> poco.correction.correct(family, site(1.0), site(1.0), q, outer, alpha=1.0).site.theta
        tensor([0.2500])
    """
    if not isinstance(alpha, tuple):
        alpha = family.per_block(alpha, alpha)
    there = fields.weigh(fields.subtract(site_out, outer.site), alpha)
    excess = family.carry(there, outer.posterior, posterior)
    corrected = fields.subtract(site_in, excess)
    if anchor_weight == 0.0:
        return Corrected(corrected, None)
    moved = family.reanchor(there, outer.posterior, posterior)
    if moved is there:
        return Corrected(corrected, None)
    return Corrected(corrected, fields.scale(fields.subtract(excess, moved), anchor_weight))


def average_sites(sites: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    """The weighted mean of sites taken at one state: chunks weigh as many as they have examples."""
    weights = [1.0] * len(sites) if weights is None else list(weights)
    total = float(sum(weights))
    mean = fields.scale(sites[0], weights[0] / total)
    for value, weight in zip(sites[1:], weights[1:], strict=True):
        mean = fields.add(mean, fields.scale(value, weight / total))
    return mean


def update_outer(
    family: ExponentialFamily,
    outer: Outer | None,
    posterior: Any,
    site: Any,
    *,
    rho: Any,
    reanchor_average: bool = True,
    anchor_weight: float = 1.0,
) -> Outer:
    """ḡ_out ← ρ ḡ_out + (1−ρ) site, now at `posterior` (Eq. 17, 26); the first site starts the average.

    Args:
        family: the exponential family.
        outer: the previous q_out, or None.
        posterior: λ_in, which becomes λ_out.
        site: the mega-batch's mean natural gradient at `posterior`.
        rho: ρ, one number or a Site of numbers; multiplies the old value.
        reanchor_average: move the old average to the new λ_out first; False is Algorithm 4 as printed.
        anchor_weight: of what the move changes: 1 is exact, less is for curvatures whose noise would come in with it.
    """
    if outer is None:
        return Outer(posterior, site)
    if not isinstance(rho, tuple):
        rho = family.per_block(rho, rho)
    if all(value == 0.0 for value in rho):
        return Outer(posterior, site)
    old = family.carry(outer.site, outer.posterior, posterior)
    if reanchor_average and anchor_weight > 0.0:
        moved = family.reanchor(outer.site, outer.posterior, posterior)
        if moved is not outer.site:
            old = fields.add(old, fields.scale(fields.subtract(moved, old), anchor_weight))
    return Outer(posterior, fields.mix(old, site, rho))


@dataclass(frozen=True)
class Snapshot(Correction):
    r"""PC Eq. 13, 17, 18: the reference is the posterior of the last refresh, λ_out, and ḡ_out its mega-batch's mean.

        ĝ = ∇̃L_B(λ) − α [ ∇̃L_B(λ_out) − ḡ_out ]

    With all data in a refresh this is SVRG on natural gradients, with some of it mega-batch correction.

    Example:
        >>> import expfam_poco as poco
        >>> poco.correction.Snapshot().evaluations
        2
    """

    Memory: ClassVar[type[Any]] = Outer
    evaluations: ClassVar[int] = 2
    refresh_evaluations: ClassVar[int] = 1
    exact_at_reference: ClassVar[bool] = True

    def reference(self, memory: Outer) -> Any:
        """λ_out."""
        return memory.posterior

    def mean(self, memory: Outer) -> Any:
        """ḡ_out."""
        return memory.site

    def correct(
        self,
        family: ExponentialFamily,
        site: Any,
        site_ref: Any,
        state: Any,
        memory: Any,
        *,
        alpha: Any,
        anchor_weight: float,
    ) -> Corrected:
        """Eq. 18 in the family's chart."""
        return correct(family, site, site_ref, state, memory, alpha=alpha, anchor_weight=anchor_weight)

    def after_refresh(self, family: ExponentialFamily, memory: Any, posterior: Any, site: Any, how: Averaging) -> Outer:
        """Eq. 17, 26."""
        return update_outer(
            family,
            memory,
            posterior,
            site,
            rho=how.rho,
            reanchor_average=how.reanchor,
            anchor_weight=how.anchor_weight,
        )

    def law(self, alpha: float, beta: float, pace: Pace, batches: float) -> Law | None:
        """Of a mega-batch whose chunks are mini-batches.

        None before the first, and after a refresh from one chunk, which is no mini-batch.
        """
        if pace.chunks < 2:
            return None
        return SnapshotLaw(pace.steps, pace.chunks, alpha, SnapshotLaw.error_share(pace.chunks, batches))


def outer_from_posterior(family: ExponentialFamily, posterior: Any, prior: Any, ess: float) -> Outer:
    """q_out from a stored posterior alone (knowledge transfer, PC §3.1).

    At a fixed point of the rule ∇̃KL(q ‖ p₀) + N ḡ = 0, so ḡ_out = −∇̃KL(q_out ‖ p₀)/N.
    """
    return Outer(posterior, fields.scale(family.kl_gradient(posterior, prior), -1.0 / ess))


def carried(family: ExponentialFamily, site_out: Any, outer: Outer, posterior: Any) -> tuple[Any, Outer]:
    """∇̃L_B(λ_out) and q_out with both sites in the coordinates of `posterior`, which a curved family's depend on."""
    moved, mean = (family.carry(site, outer.posterior, posterior) for site in (site_out, outer.site))
    return moved, Outer(outer.posterior, mean)


def variance_terms(site_in: Any, site_out: Any, outer: Outer) -> Any:
    """For every field, what the variance meter sums up; see `VarianceTerms`."""

    def terms(value_in: Tensor, value_out: Tensor, mean: Tensor) -> VarianceTerms:
        a, d = value_in - mean, value_out - mean
        return VarianceTerms((a * a).sum(), (a * d).sum(), (d * d).sum())

    return fields.map_fields(terms, site_in, site_out, outer.site)


def variance_ratio(plain: float, cross: float, outer: float, alpha: float) -> float:
    """‖a − α d‖² / ‖a‖²: the corrected estimate's squared deviation from ḡ_out over the plain one's.

    Both contain the squared drift of the mean since the refresh, which pulls this number towards 1: the ratio of
    the variances alone lies further from 1, on the same side.
    """
    return (plain - 2.0 * alpha * cross + alpha * alpha * outer) / plain if plain > 0.0 else float("nan")


def optimal_alpha(
    cross: float, outer: float, least_gain: float, share: float = 0.0, error: float = 0.0, steps: int = 1
) -> float:
    """α* = Cov(in, out) / (Var(out) + Var(ḡ_out)), clipped to [0, 1]; 0 where it gains too little.

    About ḡ_out, ⟨d,d⟩ estimates the denominator and ⟨a,d⟩ = Cov + Var(ḡ_out). The gain 2α Cov − α² ⟨d,d⟩ is held
    against `least_gain` ⟨d,d⟩, which has no drift of the mean in it, as ‖a‖² has. A measured error of ḡ_out is shared
    by M steps, which it moves together: their sum has the variance M Var(in − α out) + M² α² Var(ḡ_out), so that M
    times the error stands in the denominator.

    Args:
        cross: ⟨a,d⟩.
        outer: ⟨d,d⟩.
        least_gain: see above.
        share: Var(ḡ_out)/Var(out), 1/M for a mega-batch of M independent mini-batches, 0 for an exact mean.
        error: Var(ḡ_out) of the draws in a refresh, where it has been measured.
        steps: M, that share one ḡ_out.
    """
    if not outer > 0.0:
        return 0.0
    covariance = cross - outer * share / (1.0 + share) - error
    outer = outer + (steps - 1.0) * error
    alpha = min(max(covariance / outer, 0.0), 1.0)
    return alpha if 2.0 * alpha * covariance - alpha * alpha * outer >= least_gain * outer else 0.0


AT_FIRST = Pace(0, 1)  # before any refresh


def alpha_at(alpha: Any, step: int, pace: Pace = AT_FIRST) -> tuple[float, float]:
    """The pair (α of the gradient, α of the curvature) at inner step `step`, from a number, pair or schedule.

    `pace` is that of the refreshes, by which "mega_batch" goes.
    """
    try:
        value = alpha.at(pace) if isinstance(alpha, MegaBatchAlpha) else alpha(step) if callable(alpha) else alpha
    except Exception as error:
        raise ValueError(
            f"alpha={shown(alpha)}: at step {step} it fails ({type(error).__name__}: {error}); give a function from "
            "the step's number to a number between 0 and 1, or to a pair of them."
        ) from error
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all([is_real(number) and 0.0 <= number <= 1.0 for number in pair]):
        raise ValueError(
            f"alpha={shown(value)}: give a number between 0 and 1, a pair of them (gradient, curvature), a schedule, "
            "'adaptive' or 'mega_batch'."
        )
    return float(pair[0]), float(pair[1])


def stack_states(states: Sequence[Any]) -> Any:
    """States of several seeds as one with a leading axis, ready for `torch.func.vmap`."""
    return type(states[0])(*(torch.stack(values) for values in zip(*states, strict=True)))
