r"""Transported natural gradients: evaluated where the momentum's average of them belongs to the present posterior.

Momentum averages natural gradients of the past, each taken where λ was then:

    a_t = (1 − w_t) a_{t−1} + w_t g_t,       w_t = (1 − β₁)/(1 − β₁ᵗ)

so that a_t lags behind λ_t. Let a_{t−1} = ∇̃L(λ_{t−1}) up to noise, and let ∇̃L be affine in the block that momentum
averages (a quadratic loss under a Gaussian, in the mean m). Evaluated at

    m̃_t = m_t + k (m_t − m_{t−1}),       k = γ (1/w_t − 1)

with γ = 1, the average is an estimate at λ_t, and by induction always is: the points' average is

    (1 − w_t) m_{t−1} + w_t [ m_t + (1/w_t − 1)(m_t − m_{t−1}) ] = m_t,

so a_t = ∇̃L(λ_t) + Σ_s (share of s in the average) · (noise of s): the noise of momentum without its lag. On other
losses k = 1/w_t − 1 ≈ β₁/(1 − β₁) steps reach far, and γ < 1 trades some lag for the curvature's change on the way.

γ = 0 is the plain rule. γ = 1 − β₁ is Nesterov's look-ahead: then k = β₁ − β₁ᵗ, which is β₁ once the average has
forgotten its start, and as m_t − m_{t−1} = −η' a_{t−1} with η' the preconditioned rate,

    m_{t+1} = m_t − η' [β₁ a_{t−1} + (1 − β₁) g(m̃_t)] = m̃_t − η' (1 − β₁) g(m̃_t),    m̃_t = m_t + β₁ (m_t − m_{t−1}).

What is unbiased: a single corrected gradient is an estimate at m̃_t, not at λ_t; their average is at λ_t as above.
It costs one evaluation a step, and the previous posterior in memory.

Sources: Arnold et al. 2019, *Reducing the variance in online optimization by transporting past gradients* (γ = 1 with
w_t = 1/t); Nesterov 1983.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from expfam_poco.arguments import shown
from expfam_poco.correction.base import Corrected, Correction
from expfam_poco.correction.worth import BatchLaw, Law, MomentumLaw

if TYPE_CHECKING:
    from expfam_poco.correction.alpha import Pace
    from expfam_poco.family.base import ExponentialFamily


class Previous(NamedTuple):
    """The posterior before the last step, λ_{t−1}."""

    posterior: Any


@dataclass(frozen=True)
class Transported(Correction):
    """Evaluate beyond λ, along the last step, by as much as momentum lags behind; without momentum the plain rule.

    Only the momentum block is extrapolated (`family.extrapolate`: a Gaussian's mean). The natural gradient is measured
    as one at λ̃, and so is its curvature, from θ minus the shifted mean.

    Args:
        gamma: γ in [0, 1], how much of the lag is made up for: 0 is the plain rule, 1 − β₁ Nesterov's look-ahead.

    Example:
        >>> import torch, expfam_poco as poco
        >>> family, transported = poco.resolve_family("isotropic_gaussian"), poco.correction.Transported(gamma=1.0)
        >>> before, now = (family.centred_at(torch.tensor([m])) for m in (0.0, 1.0))
        >>> memory = transported.after_step(family, transported.begin(family, before), before, now, None)
        >>> transported.where(family, now, memory, share=0.25).mean
        tensor([4.])
    """

    gamma: float = 0.1

    Memory: ClassVar[type[Any]] = Previous
    neutral: ClassVar[Mapping[str, Any]] = {"gamma": 0.0}
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a γ outside [0, 1]."""
        number = isinstance(self.gamma, int | float) and not isinstance(self.gamma, bool)
        if not number or not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma={self.gamma!r}: give a number in [0, 1], 0 for no transport and 1 for all of it.")

    def begin(self, family: ExponentialFamily, state: Any) -> Previous:
        """λ, as if it had not moved."""
        return Previous(state)

    def where(self, family: ExponentialFamily, state: Any, memory: Any, share: Any) -> Any:
        """λ̃ = λ_t + γ(1/w_t − 1)(λ_t − λ_{t−1}) on the momentum block."""
        if self.gamma == 0.0:
            return state
        return family.extrapolate(state, memory.posterior, self.gamma * (1.0 / share - 1.0))

    def after_step(self, family: ExponentialFamily, memory: Any, before: Any, after: Any, found: Corrected) -> Previous:
        """λ_t becomes the previous posterior."""
        return Previous(before)

    def law(self, alpha: float, beta: float, pace: Pace, batches: float) -> Law | None:
        """A momentum's, from gradients taken ahead; without momentum the plain rule's."""
        return MomentumLaw(beta, self.gamma) if beta > 0.0 else BatchLaw()


def transported(correction: Correction, transport: float, alpha: Any) -> Correction:
    """`Transported(transport)` in the place of a correction that corrects nothing; the correction itself for 0.

    Raises:
        ValueError: for a γ outside [0, 1], or beside a correction that does something.

    Example:
        >>> from expfam_poco.correction import Correction, transported
        >>> transported(Correction(), 0.1, alpha=1.0)
        Transported(gamma=0.1)
    """
    try:
        made = Transported(transport)
    except ValueError as error:
        raise ValueError(str(error).replace("gamma=", "transport=", 1)) from None
    if transport == 0.0:
        return correction
    without = alpha in (0.0, (0.0, 0.0)) if isinstance(alpha, int | float | tuple) else False
    idle = type(correction) is Correction or (correction.compares and without)
    if not idle:
        raise ValueError(
            f"transport={shown(transport)}: it stands in the place of another correction, and here "
            f"alpha={shown(alpha)} with {correction!r}; give alpha=0 (or correction='none'), or transport=0."
        )
    return made


def momentum_of(group: Mapping[str, Any]) -> float:
    """β₁ of anybody's group: the first of torch's `betas`, or its `momentum`; 0 where it has neither."""
    betas = group.get("betas")
    return float(betas[0] if betas else group.get("momentum", 0.0))


def check_transport(transport: float, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a look-ahead where no momentum has a lag to make up for."""
    if transport > 0.0 and not any(group["momentum"] > 0.0 for group in groups):
        raise ValueError(
            f"transport={transport!r}: without momentum nothing lags behind, and it would do nothing; give momentum "
            "(such as 0.9; beta1, where it is called so), or transport=0."
        )
