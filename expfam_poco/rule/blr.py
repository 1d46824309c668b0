r"""The Bayesian learning rule as pure functions on tensors, usable without any optimizer class.

In natural coordinates (`natural_step`, PC Eq. 6 and 13) with prior λ₀ in the family and N = `ess`:

    λ ← λ − η (λ − λ₀ + N ĝ) = (1−η) λ + η λ₀ − η N ĝ

In a family's chart (`init`, `update`) the same step is the family's `retract` along ∇̃KL(q ‖ p₀) + N ĝ, with a
rate for each block, momentum on the family's `momentum_block` and the anchor term of a corrected gradient
added after it, as Algorithm 4 does. With equal rates, no momentum and the plain retraction both are equal.

As functions of θ (`site`, `bayes_log_density`, Eq. 6 right, 9, 10, 11, 18), the step is Bayes' rule with prior
q^{1−η} and the sites as log-likelihoods.

PC Eq. 13 and Alg. 2 merge the regulariser into the losses and then lack the base measure's term; the form here
takes ∇̃KL, in which it cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.family import fields

if TYPE_CHECKING:
    from expfam_poco.family.base import ExponentialFamily


TINY = torch.finfo(torch.float32).tiny  # a rate of 0 and no gradient: no step


class BLRState(NamedTuple):
    """What a step carries on: the posterior in its chart, the averages of momentum, then those of squares (or ())."""

    posterior: Any
    momentum: tuple[Tensor, ...]


def natural_step(nat: Any, prior: Any, natural_gradient: Any, *, rate: float, ess: float) -> Any:
    """λ ← (1−η) λ + η λ₀ − η N ĝ (PC Eq. 6, 13) in natural coordinates, for a prior in the family.

    Args:
        nat: λ.
        prior: λ₀.
        natural_gradient: ĝ = ∇_μ E_q[mean loss], plain or corrected, in natural coordinates.
        rate: η.
        ess: N, the number of examples that the mean loss stands for.

    Example:
        >>> import torch, expfam_poco as poco
        >>> nat = poco.family.Theta(torch.tensor(1.0))
        >>> poco.blr.natural_step(nat, nat, poco.family.Theta(torch.tensor(0.5)), rate=0.1, ess=10.0).theta
        tensor(0.5000)
    """
    return fields.map_fields(
        lambda lam, lam0, g: (1.0 - rate) * lam + rate * lam0 - rate * ess * g, nat, prior, natural_gradient
    )


def site(family: ExponentialFamily, natural_gradient: Any, theta: Tensor) -> Tensor:
    """The site ℓ̂(θ) = ⟨∇̃L, T(θ)⟩ (PC Eq. 6, 9), for a natural gradient in natural coordinates."""
    return family.inner(natural_gradient, family.statistics(theta))


def bayes_log_density(
    family: ExponentialFamily,
    nat: Any,
    prior: Any,
    sites: Sequence[tuple[float, Any]],
    theta: Tensor,
    *,
    rate: float,
) -> Tensor:
    """log of q^{1−η} p₀^η Π exp(−η w ℓ̂)(θ) up to a constant: the Bayes form of a step (Eq. 6, 10, 11, 18).

    Args:
        family: the exponential family.
        nat: λ of q.
        prior: λ₀ of p₀.
        sites: pairs (w, ∇̃L): the corrected step of Eq. 18 is (N, ∇̃L_i(λ_in)), (−αN, ∇̃L_i(λ_out)) and
            (α, Σ_j ∇̃L_j(λ_out)), the last being q̂_out^{ηα}: λ̂_out = −Σ_j ∇̃L_j(λ_out) (Eq. 9 with its sign).
        theta: where.
        rate: η.
    """
    statistics = family.statistics(theta)
    value = (1.0 - rate) * family.inner(nat, statistics) + rate * family.inner(prior, statistics)
    for weight, natural_gradient in sites:
        value = value - rate * weight * site(family, natural_gradient, theta)
    return value + family.log_base_measure(theta)


def init(
    family: ExponentialFamily,
    theta: Tensor,
    precision: float | Tensor | None = None,
    *,
    momentum: float = 0.0,
    squares: bool = False,
) -> BLRState:
    """The state to start from: q centred at `theta`, averages at zero. Pure: runs under `torch.func.vmap`."""
    posterior = family.centred_at(theta, precision)
    return BLRState(posterior, init_momentum(family, posterior, momentum, squares))


def init_momentum(
    family: ExponentialFamily, posterior: Any, momentum: float, squares: bool = False
) -> tuple[Tensor, ...]:
    """One zero tensor for each momentum field, none when momentum is off; twice as many where squares are averaged."""
    if momentum == 0.0 and not squares:
        return ()
    zero = family.kl_gradient(posterior, posterior)
    names = [*family.momentum_block] * (2 if squares else 1)
    return tuple(torch.zeros_like(getattr(zero, name)) for name in names)


def average_names(family: ExponentialFamily, squares: bool) -> tuple[str, ...]:
    """Names of the averages that a step carries on."""
    names = family.momentum_block
    return (*names, *(f"{name}_square" for name in names)) if squares else names


def update(
    family: ExponentialFamily,
    blr_state: BLRState,
    prior: Any,
    site: Any,
    *,
    rates: Any,
    ess: float | Tensor,
    anchor: Any = None,
    momentum: float | Tensor = 0.0,
    debias: bool = True,
    step: int = 1,
    unbias: float | Tensor | None = None,
    clip_radius: float = math.inf,
    retraction: str = "second_order",
    prior_in_momentum: bool = False,
    squares: float | Tensor | None = None,
    unsquare: float | Tensor = 1.0,
) -> BLRState:
    """One step of the Bayesian learning rule in the family's chart.

        ḡ ← β ḡ + (1−β) ĝ   on the momentum block,      D = ∇̃KL(q ‖ p₀) + N (ḡ/(1−βᵗ) + anchor)
        q ← retract(q, D, rates)

    With `squares` = β₂ every weight has a rate of its own, as in Adam (`own_rates`):

        v ← β₂ v + (1−β₂) ĝ²,      D ← D / (N √(v/(1−β₂ᵗ)) + rate)

    Args:
        family: the exponential family.
        blr_state: posterior and momentum.
        prior: p₀ as a State (fields may broadcast).
        site: the natural gradient of the mean loss at the posterior, plain or corrected, as a Site.
        rates: a Site of numbers, one step size for each field.
        ess: N.
        anchor: the anchor term of a corrected gradient (`correction.correct`), added after the momentum.
        momentum: β, 0 for none.
        debias: divide the average by 1−βᵗ.
        step: t ≥ 1, the momentum's age: counted over the whole training, never restarted in an inner loop (only
            when momentum was off, which forgets the average).
        unbias: 1−βᵗ itself, in place of `debias` and `step`.
        clip_radius: ξ, the largest entry of the step before its rate.
        retraction: "second_order" or "plain"; ask `family.in_domain` after a plain one.
        prior_in_momentum: average ∇̃KL/N + ĝ in place of ĝ, as BayesBiNN does. With `squares` the pull stays outside:
            a weight whose rate is 1 would swing around its prior.
        squares: β₂ of the average of squared natural gradients; None: the rates are as they are.
        unsquare: 1 − β₂ᵗ.

    Example:
        >>> import torch, expfam_poco as poco
        >>> family = poco.resolve_family("bernoulli")
        >>> state = poco.blr.init(family, torch.zeros(2))
        >>> prior = family.centred_at(torch.zeros(2))
        >>> gradient = family.Site(torch.tensor([1.0, -1.0]))
        >>> poco.blr.update(family, state, prior, gradient, rates=(0.1,), ess=10.0).posterior.theta
        tensor([-1.,  1.])
    """
    memory: tuple[Tensor, ...] = ()
    seconds: tuple[Tensor, ...] = ()
    measured, count = site, len(family.momentum_block)
    kl = family.kl_gradient(blr_state.posterior, prior)
    if prior_in_momentum and squares is None:
        site = fields.map_fields(lambda pull, g: g + pull / ess, kl, site)
        kl = fields.scale(kl, 0.0)
    if isinstance(momentum, Tensor) or momentum > 0.0 or squares is not None:
        begun = blr_state.momentum or tuple(torch.zeros_like(getattr(site, name)) for name in family.momentum_block)
        pairs = zip(family.momentum_block, begun[:count], strict=True)
        memory = tuple([momentum * old + (1.0 - momentum) * getattr(site, name) for name, old in pairs])
        if unbias is None:
            unbias = unbias_of(float(momentum), step, debias)
        averages = {name: value / unbias for name, value in zip(family.momentum_block, memory, strict=True)}
        site = site._replace(**averages)
    if anchor is not None:
        site = fields.add(site, anchor)
    direction = type(kl)(*[pull + ess * g for pull, g in zip(kl, site, strict=True)])
    if squares is not None:
        known = blr_state.momentum[count:] or tuple(torch.zeros_like(m) for m in memory)
        pairs = zip(family.momentum_block, known, strict=True)
        seconds = tuple([squares * v + (1.0 - squares) * getattr(measured, name) ** 2 for name, v in pairs])
        scales = dict(zip(family.momentum_block, seconds, strict=True))
        direction = own_rates(family, direction, scales, rates, ess=ess, unsquare=unsquare)
    posterior = family.retract(blr_state.posterior, direction, rates, variant=retraction, clip_radius=clip_radius)
    return BLRState(posterior, (*memory, *seconds))


def own_rates(
    family: ExponentialFamily,
    direction: Any,
    squares: Mapping[str, Tensor],
    rates: Any,
    *,
    ess: float | Tensor,
    unsquare: float | Tensor = 1.0,
) -> Any:
    r"""The direction D of a step, divided so that weight i has the rate ηᵢ in place of the field's r.

        v̂ᵢ = vᵢ/(1−β₂ᵗ),     ρᵢ = r/(N √v̂ᵢ),     ηᵢ = ρᵢ/(1+ρᵢ) = r/(N √v̂ᵢ + r),     λ ← λ − ηᵢ Dᵢ

    The step is a proximal one in which weight i may go as far as ρᵢ allows,

        argmin_λ′ ⟨N ĝ, μ′⟩ + KL(q_λ′ ‖ p₀) + Σᵢ KL(q_λ′ᵢ ‖ q_λᵢ)/ρᵢ     (N ĝᵢ + λ′ᵢ − λ₀ᵢ + (λ′ᵢ − λᵢ)/ρᵢ = 0),

    which for one ρ is the Bayesian learning rule with η = ρ/(1+ρ) (Khan and Rue 2023, §2). 0 < ηᵢ ≤ 1 whatever is
    measured: a weight without any gradient goes to its prior. Since D is multiplied by positive numbers, the fixed
    points are those of the rule without them. Far from the prior a step is Adam's (Kingma and Ba 2015) on λ,

        λ ← λ − r ḡ/√v̂     (N √v̂ ≫ r),

    so that a factor on the loss changes nothing but the weight of the prior; nor does N. There the natural gradient
    of every weight is measured by its own size, as the units of layers of different depth demand. A weight of several
    numbers has one rate, by the mean of their squares.

    Args:
        family: the exponential family.
        direction: D, as a Site.
        squares: vᵢ for the fields that have such rates.
        rates: r of every field.
        ess: N.
        unsquare: 1 − β₂ᵗ.

    Example:
        >>> import torch, expfam_poco as poco
        >>> family = poco.resolve_family("bernoulli")
        >>> gradient = torch.tensor([1e-3, 10.0])
        >>> direction = family.Site(1e6 * gradient)
        >>> 0.1 * poco.blr.own_rates(family, direction, {"theta": gradient**2}, (0.1,), ess=1e6).theta
        tensor([0.1000, 0.1000])
    """
    found = []
    for name, value, rate, dims in zip(direction._fields, direction, rates, family.statistic_dims, strict=True):
        if name in squares:
            axes = tuple(range(-dims, 0))
            square = squares[name].mean(axes, keepdim=True) if axes else squares[name]
            scale = ess * (square / unsquare).sqrt() + rate
            value = value / torch.where(scale < TINY, 1.0, scale)
        found.append(value)
    return type(direction)(*found)


def unbias_of(momentum: float, step: Any, debias: bool) -> Any:
    """1 − βᵗ, or 1 without debiasing."""
    return 1.0 - momentum**step if debias else 1.0


def square_of(values: Sequence[Tensor]) -> Tensor:
    """‖values together‖² in float64."""
    norms = torch.stack([torch.linalg.vector_norm(value).to(torch.float64) for value in values])
    return (norms * norms).sum()


def norm_clip_factor(squares: Sequence[Tensor], max_norm: float) -> Tensor:
    """min(1, max_norm / ‖all gradients together‖), the factor of clipping by global norm, from their squares."""
    own = squares[0].device
    total = torch.stack([square.to(own, non_blocking=True) for square in squares]).sum()
    return (max_norm / (total.sqrt() + 1e-300)).clamp(max=1.0)
