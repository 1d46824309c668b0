r"""Variational SGD's model of the gradient (VSGD-G Eq. 2–37) as pure functions: two Bayesian learning rules.

The unknown true gradient g moves from step to step, and a mini-batch shows it with noise ĝ; both for every weight:

    g ~ N(u, 1/w_g),    ĝ ~ N(g, 1/w_ĝ),    w_g ~ Γ(γ, γ),    w_ĝ ~ Γ(γ, K_g γ),    u the last mean of g

*Precisions.* The loss of one Gaussian is linear in the statistics T(w) = (log w, w) of the Gamma family,

    −log N(x | y, 1/w) = −½ log w + ½ w (x − y)²:    a site whose natural gradient is (−½, ½ E[(x − y)²]),

so with λ = (a, −b), λ₀ the prior and N = 1, `blr.natural_step` λ ← (1−ρ) λ + ρ (λ₀ − site) *is* Eq. 17–21 (with the sum
of two sites Eq. 36–37). The base measure of `Gamma` is 1/w, so that the first number is a itself and not a − 1, which
would lose γ = 1e-8. As ρ₁ = 1, a = γ + ½ from the first step on (Eq. 17; γ + 1 with two sites).

*Gradient.* q(g) is the product of the two Gaussians at E[w] = ∂A/∂λ₂ = a/b: their natural parameters add (Eq. 15–16,
34–35). Written so, Eq. 19's σ_ĝ and μ_ĝ can only be a slip for σ_g and μ_g, as in Eq. 69.

A compiled kernel runs these same functions; there is no other implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.family import fields
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.registry import get_family
from expfam_poco.rule import blr

# Either a Python number or a tensor without dimensions: the latter is no constant of a compiled kernel.
Number = Any


@dataclass(frozen=True)
class Families:
    """The Gamma family of the precisions and the Gaussian one of the gradient."""

    gamma: ExponentialFamily
    gaussian: ExponentialFamily

    @classmethod
    def named(cls) -> Families:
        """Those registered as "gamma" and "diagonal_gaussian".

        Example:
            >>> from expfam_poco.gradient_model import Families
            >>> Families.named().gaussian
            DiagonalGaussian()
        """
        return cls(get_family("gamma")(), get_family("diagonal_gaussian")())

    def gamma_nat(self, shape: Number, rate: Any) -> Any:
        """λ = (a, −b) of Γ(a, b)."""
        return self.gamma.Statistics(shape, -rate)


class Belief(NamedTuple):
    """What VSGD knows: the mean μ of g, and λ of q(w_g) and of q(w_ĝ)."""

    mean: Tensor
    system: Any
    noise: Any


class ConstantBelief(NamedTuple):
    """What Constant VSGD knows: the mean μ of g, and λ of q(ω)."""

    mean: Tensor
    noise: Any


def init(families: Families, like: Tensor, system: Any, noise: Any) -> Belief:
    """The belief before the first gradient: u = 0, and the priors (λ = λ₀ of w_g and of w_ĝ), shaped as `like`."""
    return Belief(torch.zeros_like(like), _spread(families, system, like), _spread(families, noise, like))


def init_constant(families: Families, like: Tensor, noise: Any) -> ConstantBelief:
    """`init` of Constant VSGD."""
    return ConstantBelief(torch.zeros_like(like), _spread(families, noise, like))


def expected_precision(nat: Any) -> Any:
    """E[w] = ∂A/∂λ₂ = a/b of a Gamma with λ = (a, −b)."""
    shape, minus_rate = nat
    return shape / -minus_rate


def precision_site(nat: Any, square: Tensor, count: float = 1.0) -> Any:
    """The natural gradient (−½ n, ½ E[…]) of −Σ log N(x | y, 1/w) over n Gaussians, from Σ E[(x − y)²]."""
    return type(nat)(-0.5 * count, 0.5 * square)


def true_gradient(families: Families, expected: Tensor, drift: Any, observed: Tensor, noise: Any) -> Any:
    """q(g) ∝ N(g | u, 1/E[w_g]) N(g | ĝ, 1/E[w_ĝ]) as a State (mean, precision): Eq. 15–16, Eq. 34–35.

    Args:
        families: the two.
        expected: u.
        drift: E[w_g].
        observed: ĝ.
        noise: E[w_ĝ].
    """
    family = families.gaussian
    sites = [family.to_nat(family.State(at, precision)) for at, precision in ((expected, drift), (observed, noise))]
    return family.from_nat(fields.add(*sites))


def update(
    families: Families, belief: Belief, observed: Tensor, priors: tuple[Any, Any], rates: tuple[Number, Number]
) -> tuple[Belief, Any]:
    """One step of Algorithm 1 but for the weights (Eq. 15–21): the new belief, and q(g) as a State.

    Args:
        families: the two.
        belief: before.
        observed: ĝ.
        priors: λ₀ of w_g and of w_ĝ.
        rates: ρ₁ and ρ₂.

    Example:
        >>> import torch
        >>> from expfam_poco.gradient_model import Families, init, update
        >>> families = Families.named()
        >>> priors = families.gamma_nat(1.0, torch.tensor(1.0)), families.gamma_nat(1.0, torch.tensor(3.0))
        >>> belief = init(families, torch.zeros(1), *priors)
        >>> belief, gradient = update(families, belief, torch.tensor([4.0]), priors, (1.0, 1.0))
        >>> gradient.mean, belief.system.log            # u + (ĝ − u)/(1 + 3), and a = γ + ½
        (tensor([1.]), 1.5)
    """
    drift, noise = expected_precision(belief.system), expected_precision(belief.noise)
    gradient = true_gradient(families, belief.mean, drift, observed, noise)
    variance = 1.0 / gradient.precision
    squares = [variance + (gradient.mean - other) ** 2 for other in (belief.mean, observed)]
    system, seen = (
        blr.natural_step(nat, prior, precision_site(nat, square), rate=rate, ess=1.0)
        for nat, prior, square, rate in zip(belief[1:], priors, squares, rates, strict=True)
    )
    return Belief(gradient.mean, system, seen), gradient


def update_constant(
    families: Families, belief: ConstantBelief, observed: Tensor, prior: Any, rate: Number, ratio: Number
) -> tuple[ConstantBelief, Any]:
    """One step of Algorithm 2 but for the weights (Eq. 34–37): the new belief, and q(g) as a State.

    One precision ω, and two sites: −log N(ĝ | g, 1/ω) − log N(g | u, 1/(K_g ω)).

    Args:
        families: the two.
        belief: before.
        observed: ĝ.
        prior: λ₀ of ω.
        rate: ρ.
        ratio: K_g.
    """
    noise = expected_precision(belief.noise)
    gradient = true_gradient(families, belief.mean, ratio * noise, observed, noise)
    variance = 1.0 / gradient.precision
    square = variance + (gradient.mean - observed) ** 2 + ratio * (variance + (gradient.mean - belief.mean) ** 2)
    site = precision_site(belief.noise, square, count=2.0)
    return ConstantBelief(gradient.mean, blr.natural_step(belief.noise, prior, site, rate=rate, ess=1.0)), gradient


def direction(gradient: Any, eps: Number) -> Tensor:
    """E[g] / (√E[g²] + ε) = μ / (√(μ² + σ²) + ε): Eq. 24 and 38, which have no ε."""
    mean, precision = gradient
    return torch.as_tensor(mean / ((mean * mean + 1.0 / precision).sqrt() + eps))


def moved(theta: Tensor, step: Tensor, lr: Number, weight_decay: Number) -> Tensor:
    """θ ← (1 − η δ) θ − η step: the decay is decoupled, as in AdamW and in the published code."""
    return theta * (1.0 - lr * weight_decay) - lr * step


def step(families: Families, values: Sequence[Tensor], grad: Tensor, numbers: Sequence[Number]) -> tuple[Tensor, ...]:
    """One whole step of Algorithm 1 in the numbers that an optimizer keeps: θ, μ, and the rates b_g and b_ĝ after it.

    Args:
        families: the two.
        values: θ, μ, b_g, b_ĝ before; all but θ have the dtype of what is computed.
        grad: ĝ.
        numbers: η, δ, ε, the shape a before the step, the prior's shape and rates γ and K_g γ, ρ₁ and ρ₂.
    """
    theta, mu, b_g, b_ghat = values
    lr, decay, eps, shape, prior_shape, prior_g, prior_ghat, rho1, rho2 = numbers
    nat = families.gamma_nat
    priors = nat(prior_shape, prior_g), nat(prior_shape, prior_ghat)
    belief = Belief(mu, nat(shape, b_g), nat(shape, b_ghat))
    belief, gradient = update(families, belief, grad.to(mu.dtype), priors, (rho1, rho2))
    new = moved(theta.to(mu.dtype), direction(gradient, eps), lr, decay)
    return new, belief.mean, -belief.system.theta, -belief.noise.theta


def step_constant(
    families: Families, values: Sequence[Tensor], grad: Tensor, numbers: Sequence[Number]
) -> tuple[Tensor, ...]:
    """`step` of Algorithm 2: θ, μ and the rate b; `numbers` are η, δ, ε, a, the prior's shape and rate, ρ and K_g."""
    theta, mu, b_ghat = values
    lr, decay, eps, shape, prior_shape, prior_rate, rho, ratio = numbers
    nat = families.gamma_nat
    belief = ConstantBelief(mu, nat(shape, b_ghat))
    belief, gradient = update_constant(families, belief, grad.to(mu.dtype), nat(prior_shape, prior_rate), rho, ratio)
    new = moved(theta.to(mu.dtype), direction(gradient, eps), lr, decay)
    return new, belief.mean, -belief.noise.theta


def _spread(families: Families, prior: Any, like: Tensor) -> Any:
    shape, minus_rate = prior
    return families.gamma_nat(shape, torch.zeros_like(like) - minus_rate)
