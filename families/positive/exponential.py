r"""The exponential family of positive weights with rate r:  q(θ) = r e^{−rθ}, T(θ) = θ, λ = −r, A(λ) = −log r.

μ = 1/r, the Fisher information is 1/r², and a draw is θ = −log(1 − u)/r, so that ∂θ/∂λ = θ/r and ∇̃L = r E[θ ∇ℓ(θ)].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family.base import ExponentialFamily, Theta
from expfam_poco.family.draws import Draws

from .gamma_functions import exp_excess


@dataclass(frozen=True)
class Exponential(ExponentialFamily):
    """Positive weights with an exponential posterior, as wide as their mean: sparse, and without any hyperparameter.

    The model holds the mean 1/r. As a prior, precision p is the rate p: weight_decay is then an L1 penalty, and
    precision 0 the flat prior. A posterior cannot be narrower than its mean; where it should be, use `Gamma`.

    Example:
        >>> import torch
        >>> from expfam_poco.families import Exponential
        >>> q = Exponential()
        >>> q.point(q.centred_at(torch.tensor([0.5, 2.0])))
        tensor([0.5000, 2.0000])
    """

    support: ClassVar[constraints.Constraint] = constraints.positive
    domain: ClassVar[Any] = {"theta": constraints.less_than(0.0)}
    noise_kind: ClassVar[str] = "uniform"

    def statistics(self, theta: Tensor) -> Theta:
        """T(θ) = θ."""
        return Theta(theta)

    def log_partition(self, nat: Any) -> Tensor:
        """−log r."""
        return -torch.log(-nat.theta)

    def to_mean(self, nat: Any) -> Theta:
        """1/r."""
        return Theta(-1.0 / nat.theta)

    def to_natural(self, mean: Any) -> Theta:
        """r = 1/μ.

        Raises:
            ValueError: for a mean that is not positive.
        """
        if not bool((mean.theta > 0.0).all()):
            raise ValueError("mean: the expectation of positive weights must be positive.")
        return Theta(-1.0 / mean.theta)

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """−log(1 − u)/r, at least the smallest positive normal number."""
        return (torch.log1p(-noise) / state.theta).clamp_min(torch.finfo(noise.dtype).tiny)

    def natural_gradient(self, state: Any, draws: Draws) -> Theta:
        """The mean of r θ ∇ℓ(θ)."""
        return Theta(-state.theta * (draws.theta * draws.require_grad()).mean(0))

    def fisher_solve(self, nat: Any, vector: Any) -> Theta:
        """r² v."""
        return Theta(nat.theta * nat.theta * vector.theta)

    def entropy(self, state: Any) -> Tensor:
        """1 − log r."""
        return 1.0 - torch.log(-state.theta)

    def kl(self, state: Any, prior: Any) -> Tensor:
        """x − 1 − log x with x = r₀/r."""
        return exp_excess((prior.theta / state.theta).log())

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Theta:
        """The rate `precision`/θ; of mean θ if None."""
        return Theta(-torch.ones_like(theta) * (1.0 if precision is None else precision) / theta)

    def recentre(self, state: Any, theta: Tensor) -> Theta:
        """The mean θ."""
        return Theta(-1.0 / theta)

    def distribution(self, state: Any) -> Any:
        """A Pyro Exponential, one event of the tensor's shape."""
        import pyro.distributions as dist

        return dist.Exponential(-state.theta).to_event(state.theta.ndim)
