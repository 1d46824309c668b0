r"""The Dirichlet family of weights on the simplex:  q(θ) = Γ(Σa) Π θ_i^{a_i − 1} / Γ(a_i), every row one weight.

With the base measure h(θ) = 1/Πθ_i (on the first d − 1 coordinates) T(θ) = log θ and λ = a > 0,
A(λ) = Σ log Γ(a_i) − log Γ(Σa), μ_i = ψ(a_i) − ψ(Σa).

A draw is θ = softmax(y) of the logarithms y_i = log a_i + z(a_i, u_i) of independent Gamma draws (`gamma_functions`),
which neither underflow nor overflow. With s = θ ⊙ (∇ℓ − ⟨θ, ∇ℓ⟩), whose entries sum to zero, the pathwise gradient is
g_i = s_i (1/a_i + ∂z/∂a_i), and F = diag ψ′(a) − ψ′(Σa) 11ᵀ is inverted by Sherman and Morrison:

    ∇̃_i = v_i + w_i Σv / (1/ψ′(Σa) − Σw),     w = 1/ψ′(a),  v = w ⊙ g

where for large shapes 1/ψ′(a) = a − e(a) with e(a) = (a ψ′(a) − 1)/ψ′(a) in (0, ½): the shapes drop out of the
denominator, Σ e(a_i) − e(Σa), and out of Σv.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.arguments import positive
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Draws

from .gamma_functions import (
    digamma,
    digamma_fall,
    exp_excess,
    following,
    from_zero,
    log_gamma,
    log_gamma_fall,
    shape_divergence,
    standard_draw,
    standard_entropy,
    trigamma_excess,
)


class LogWeights(NamedTuple):
    """T(θ) = log θ; as natural parameters: the shapes a.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.dirichlet import LogWeights
        >>> LogWeights(torch.tensor([1.0, 1.0])).log
        tensor([1., 1.])
    """

    log: Tensor


def shape_slack(shapes: Tensor) -> Tensor:
    """e(a) = a − 1/ψ′(a), between 0 and ½.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.dirichlet import shape_slack
        >>> shape_slack(torch.tensor([1e-3, 1e6], dtype=torch.float64))
        tensor([0.0010, 0.5000], dtype=torch.float64)
    """
    excess = trigamma_excess(shapes)
    return shapes * excess / (1.0 + excess)


def solved(shapes: Tensor, each: Tensor, total: Tensor) -> Tensor:
    """F⁻¹ g from v_i = g_i/ψ′(a_i) and their sum over the last axis.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.dirichlet import solved
        >>> shapes = torch.tensor([1.0, 1.0], dtype=torch.float64)
        >>> v = torch.tensor([1.0, -1.0], dtype=torch.float64)
        >>> solved(shapes, v, v.sum(-1))
        tensor([ 1., -1.], dtype=torch.float64)
    """
    slack = shape_slack(shapes)
    between = slack.sum(-1) - shape_slack(shapes.sum(-1))  # 1/ψ′(Σa) − Σ 1/ψ′(a_i)
    return each + (shapes - slack) * (total / between).unsqueeze(-1)


def pathwise(shapes: Tensor, noise: Tensor, pull: Tensor) -> Tensor:
    """The natural gradient from s = ∂ℓ/∂ log(Gamma draws) (K × …, summing to zero over the last axis); float64.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.dirichlet import pathwise
        >>> shapes, noise = torch.ones(2), torch.full((1, 2), 0.5)
        >>> pathwise(shapes, noise, torch.zeros(1, 2))
        tensor([0., 0.], dtype=torch.float64)
    """
    a = shapes.double()
    slope = standard_draw(a, noise, slope=True).slope
    assert slope is not None
    slack = shape_slack(a)
    change = slope * (a - slack) - slack / a  # v = s (1 + change), where Σs = 0
    bent = (pull * change).mean(0)
    return solved(a, pull.mean(0) + bent, bent.sum(-1))


def others_of(shapes: Tensor) -> Tensor:
    """Σ_{j≠i} a_j for every i of the last axis, by sums alone: Σa − a_i loses small shapes beside a large one.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.dirichlet import others_of
        >>> others_of(torch.tensor([1e20, 1.0, 2.0]))
        tensor([3.0000e+00, 1.0000e+20, 1.0000e+20])
    """
    none = torch.zeros_like(shapes[..., :1])
    before = torch.cat((none, shapes[..., :-1].cumsum(-1)), -1)
    after = torch.cat((shapes[..., 1:].flip(-1).cumsum(-1).flip(-1), none), -1)
    return before + after


def log_normaliser(shapes: Tensor) -> Tensor:
    """Σ log Γ(a_i) − log Γ(Σa): the largest shape's log Γ is taken together with that of the sum.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.dirichlet import log_normaliser
        >>> log_normaliser(torch.tensor([1.0, 1.0]))
        tensor(0.)
    """
    places = torch.arange(shapes.shape[-1], device=shapes.device)
    largest = places == shapes.detach().argmax(-1, keepdim=True)
    small = torch.where(largest, torch.ones_like(shapes), shapes)  # log Γ(1) = 0
    rest = torch.where(largest, torch.zeros_like(shapes), shapes).sum(-1)
    big = torch.where(largest, shapes, torch.zeros_like(shapes)).sum(-1)
    return log_gamma(small).sum(-1) + log_gamma_fall(big, rest)


def expected_logs(shapes: Tensor) -> Tensor:
    """E[log θ_i] = ψ(a_i) − ψ(Σa).

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.dirichlet import expected_logs
        >>> expected_logs(torch.tensor([1.0, 1.0]))
        tensor([-1.0000, -1.0000])
    """
    return digamma_fall(shapes, others_of(shapes))


def dirichlet_entropy(shapes: Tensor) -> Tensor:
    """Σ H(a_i) − H(Σa) − (d − 1) ψ(Σa) with the entropy H of a standard Gamma variable.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.dirichlet import dirichlet_entropy
        >>> bool(dirichlet_entropy(torch.ones(2)).abs() < 1e-6)  # uniform on (0, 1)
        True
    """
    total = shapes.sum(-1)
    rest = standard_entropy(total) + (shapes.shape[-1] - 1.0) * digamma(total)
    return standard_entropy(shapes).sum(-1) - rest


def dirichlet_divergence(shapes: Tensor, prior: Tensor) -> Tensor:
    """KL(q ‖ p₀): Σa₀ times the divergence between the means p = a/Σa, and what the shapes add.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.dirichlet import dirichlet_divergence
        >>> dirichlet_divergence(torch.ones(3), torch.ones(3))
        tensor(0.)
    """
    total, prior_total = shapes.sum(-1), prior.sum(-1)
    ratio = shapes.log() - prior.log() + (prior_total.log() - total.log()).unsqueeze(-1)
    each = prior * exp_excess(ratio) + shape_divergence(shapes, prior)
    return each.sum(-1) - shape_divergence(total, prior_total)


def shapes_of(logs: Tensor) -> Tensor:
    """The shapes a with ψ(a_i) − ψ(Σa) = E[log θ_i], by Newton's method in log a.

    Raises:
        ValueError: unless Σ exp E[log θ_i] < 1, where there are such shapes.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.dirichlet import shapes_of
        >>> shapes_of(torch.tensor([-1.0, -1.0])).round(decimals=4)  # uniform on (0, 1)
        tensor([1., 1.])
    """
    gap = -logs.logsumexp(-1, keepdim=True)
    if not bool((gap > 0.0).all()):
        raise ValueError(
            "mean: E[log θ] of weights on the simplex must have Σ exp E[log θ] < 1; give such expectations."
        )
    level = logs + digamma((logs.shape[-1] - 1.0) / (2.0 * gap))  # ψ(a), roughly
    a = torch.where(level < -2.22, -1.0 / (level - digamma(torch.ones_like(level))), level.exp() + 0.5)  # Minka
    for _ in range(60):
        error = logs - expected_logs(a)
        each = error * (a - shape_slack(a))
        step = solved(a, each, each.sum(-1)) / a
        a = a * step.clamp(-2.0, 2.0).exp()
        if bool((step.abs() < 1e-9).all()):  # the next would be below rounding
            break
    return a


@dataclass(frozen=True)
class Dirichlet(ExponentialFamily):
    """Weights on the simplex: the entries of every row of the parameter are positive and sum to one.

    The model holds the mean a/Σa. A prior of precision p is symmetric with Σa = p; precision 0 is the improper prior
    1/Πθ_i, which pulls nowhere. Draws that would underflow are the smallest positive normal number.

    Args:
        concentration: Σa of the first posterior, where the optimizer gives no precision.

    Raises:
        ValueError: for a concentration that is not positive and finite.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Dirichlet
        >>> q = Dirichlet()
        >>> q.point(q.centred_at(torch.tensor([0.2, 0.3, 0.5])))
        tensor([0.2000, 0.3000, 0.5000])
    """

    concentration: float = 100.0

    Statistics: ClassVar[type[Any]] = LogWeights
    event_dim: ClassVar[int] = 1
    support: ClassVar[constraints.Constraint] = constraints.simplex
    domain: ClassVar[Any] = {"log": constraints.positive}
    noise_kind: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        """Refuse a concentration out of range."""
        positive("concentration", self.concentration)

    def statistics(self, theta: Tensor) -> LogWeights:
        """Log θ."""
        return LogWeights(theta.log())

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """−Σ log θ_i."""
        return -theta.log().sum(-1)

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """−Σ E[log θ_i]."""
        return -self.to_mean(state).log.sum(-1)

    def log_partition(self, nat: Any) -> Tensor:
        """Σ log Γ(a_i) − log Γ(Σa)."""
        a = nat.log.double()
        return log_normaliser(a).to(nat.log.dtype)

    def to_mean(self, nat: Any) -> LogWeights:
        """ψ(a_i) − ψ(Σa)."""
        a = nat.log.double()
        return LogWeights(expected_logs(a).to(nat.log.dtype))

    def to_natural(self, mean: Any) -> LogWeights:
        """The shapes, by Newton's method.

        Raises:
            ValueError: for expectations that no weights on the simplex have.
        """
        return LogWeights(shapes_of(mean.log.double()).to(mean.log.dtype))

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """Softmax of log Gamma quantiles; differentiable in λ by the implicit function theorem."""
        a = state.log.detach().double()
        draw = standard_draw(a, noise, slope=state.log.requires_grad)
        whole = (draw.ratio + a.log()).softmax(-1)
        theta = whole.to(noise.dtype).clamp_min(torch.finfo(noise.dtype).tiny)
        if draw.slope is None:
            return theta
        along = (draw.slope + 1.0 / a).to(noise.dtype) * from_zero(state.log)
        return following(theta, along - (theta.detach() * along).sum(-1, keepdim=True))

    def point(self, state: Any) -> Tensor:
        """The mean a/Σa."""
        return torch.as_tensor(state.log / state.log.sum(-1, keepdim=True))

    def natural_gradient(self, state: Any, draws: Draws) -> LogWeights:
        """The pathwise gradient through F⁻¹, in closed form."""
        theta, grad = draws.theta.double(), draws.require_grad().double()
        pull = theta * (grad - (theta * grad).sum(-1, keepdim=True))
        return LogWeights(pathwise(state.log, draws.noise, pull).to(draws.theta.dtype))

    def fisher_solve(self, nat: Any, vector: Any) -> LogWeights:
        """F⁻¹ v in closed form."""
        a = nat.log.double()
        each = vector.log.double() * (a - shape_slack(a))
        return LogWeights(solved(a, each, each.sum(-1)).to(nat.log.dtype))

    def entropy(self, state: Any) -> Tensor:
        """In closed form without cancellation."""
        return dirichlet_entropy(state.log.double()).to(state.log.dtype)

    def kl(self, state: Any, prior: Any) -> Tensor:
        """In closed form without cancellation."""
        shapes, others = torch.broadcast_tensors(state.log.double(), prior.log.double())
        return dirichlet_divergence(shapes, others).to(state.log.dtype)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> LogWeights:
        """The member with mean θ and Σa = `precision` (the field `concentration` if None)."""
        return LogWeights(theta * (self.concentration if precision is None else precision))

    def recentre(self, state: Any, theta: Tensor) -> LogWeights:
        """The mean θ, the concentration kept."""
        return LogWeights(theta * state.log.sum(-1, keepdim=True))

    def distribution(self, state: Any) -> Any:
        """A Pyro Dirichlet, one event of the tensor's shape."""
        from . import distributions  # Pyro takes long to import

        return distributions.Dirichlet(state.log).to_event(state.log.ndim - 1)
