r"""The posterior as its own control variate, "sticking the landing" for natural gradients.

A site η̂ whose natural gradient is known corrects an estimate under the same noise ε, whatever the loss:

    ĝ = est[ℓ; ε] − ( est[⟨η̂, T⟩; ε] − η̂ ),        E[est[⟨η̂, T⟩; ε]] = η̂

The posterior has one: ⟨η̂, T(θ)⟩ = log p₀(θ)/q(θ) / N, N η̂ = λ₀ − λ, known at every draw without an evaluation. Since
estimators are linear in the loss, ĝ = est[r; ε] + η̂ with the residual r = ℓ − ⟨η̂, T⟩, and a step goes along

    ∇̃KL(q ‖ p₀) + N ĝ = N est[r; ε],        N r(θ) = N ℓ(θ) − log p₀(θ) + log q(θ)

At the optimum of a model inside the family N r is a constant (the evidence), so that no variance remains there,
whatever the draws. In the Gaussian chart the gradient of N r is N ∇ℓ(θ) + S₀ (θ − m₀) − S (θ − m).

A curvature that was measured (Hessians, products, squared gradients) stays as it is: only the gradient is corrected.
Regression has est[⟨η̂, T⟩] = η̂ already, so that for it nothing changes.
A biased estimator's mean becomes E est[r] + η̂, its own on the residual. What is left of the variance is that of
mini-batches, and of what the family cannot say.

Source: Roeder, Wu and Duvenaud 2017, *Sticking the landing* (for pathwise gradients in the variational parameters).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expfam_poco.family import fields

if TYPE_CHECKING:
    from expfam_poco.family.base import ExponentialFamily
    from expfam_poco.family.draws import Draws, Estimator


def own_site(family: ExponentialFamily, state: Any, prior: Any, ess: float) -> Any:
    """η̂ = (λ₀ − λ)/N, as a Site at λ.

    Example:
        >>> import torch, expfam_poco as poco
        >>> family = poco.resolve_family("bernoulli")
        >>> own_site(family, family.State(torch.tensor([2.0])), family.State(torch.tensor([0.0])), 4.0).theta
        tensor([-0.5000])
    """
    return fields.scale(family.kl_gradient(state, prior), -1.0 / ess)


def residual(family: ExponentialFamily, state: Any, prior: Any, ess: float, draws: Draws) -> Draws:
    """Draws of r = ℓ − ⟨η̂, T⟩ from draws of ℓ: gradients, or losses where there are no gradients."""
    if draws.grad is not None:
        own = family.log_ratio_gradient(state, prior, draws.theta)
        return draws._replace(grad=draws.grad + own / ess)
    own = family.log_ratio(state, prior, draws.theta)
    return draws._replace(loss=draws.loss + own.flatten(1).sum(1) / ess if own.ndim > 1 else draws.loss + own / ess)


def natural_gradient(
    estimator: Estimator, family: ExponentialFamily, state: Any, prior: Any, ess: float, draws: Draws
) -> Any:
    """est[r; ε] + η̂ as a Site at `state`.

    Args:
        estimator: of the natural gradient.
        family: the exponential family.
        state: λ, at which the draws were made.
        prior: λ₀.
        ess: N.
        draws: measured evaluations of ℓ.
    """
    if estimator.compares:
        return estimator.natural_gradient(family, state, draws)
    site = estimator.natural_gradient(family, state, residual(family, state, prior, ess, draws))
    own = own_site(family, state, prior, ess)
    if draws.hessian is not None or draws.pairs is not None:
        own = fields.weigh(own, family.per_block(1.0, 0.0))
    return fields.add(site, own)


def check(estimator: Estimator) -> None:
    """Refuse an estimator of variations, at which the own site is not subtracted.

    Raises:
        ValueError: names the estimator.
    """
    if estimator.needs == "variations":
        name = type(estimator).__name__
        raise ValueError(f"own_site=True: {name} measures variations of draws, not draws alone; give own_site=False.")
