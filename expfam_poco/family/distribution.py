"""Any family as a Pyro distribution. Imported only when a distribution is asked for, because Pyro is large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl

from expfam_poco.family.draws import LOSSES_ALONE
from expfam_poco.family.noise import quantile

if TYPE_CHECKING:
    from expfam_poco.family.base import ExponentialFamily


class FamilyDistribution(dist.TorchDistribution):
    """q with the family's own density and samples; the batch and event axes of the tensor are one event.

    Samples are drawn with torch's global generator, and are reparameterised where the family's `sample` is: not where
    weights are levels or integers, and not where its estimator compares losses.

    Example:
        >>> import torch, expfam_poco as poco
        >>> from expfam_poco.family.distribution import FamilyDistribution
        >>> family = poco.resolve_family("diagonal_gaussian")
        >>> q = FamilyDistribution(family, family.centred_at(torch.zeros(3)))
        >>> q.event_shape, q.rsample().shape
        (torch.Size([3]), torch.Size([3]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, family: ExponentialFamily, state: Any) -> None:
        """Keep the family and the state."""
        self.family = family
        self.state = state
        self._like = family.point(state) if family.curved else family.middle(family.to_nat(state))
        super().__init__(torch.Size(), self._like.shape)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether a draw is a differentiable function of the state."""
        return reparameterised(self.family, self.state)

    @property
    def support(self) -> constraints.Constraint:
        """The family's support, one event."""
        support = self.family.support
        return constraints.independent(support, self._like.ndim - support.event_dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Expanding is left to Pyro's wrapper."""
        from pyro.distributions.torch_distribution import ExpandedDistribution

        return ExpandedDistribution(self, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """θ by transforming noise drawn from torch's global generator, differentiable in the state.

        Raises:
            NotImplementedError: where a draw has no derivative; `sample` draws without.
        """
        if not self.has_rsample:
            raise NotImplementedError(
                f"{type(self.family).__name__}: a draw has no derivative in the state; use sample() and the score "
                "log_prob (Pyro's SVI does so where has_rsample is False)."
            )
        return self._draw(sample_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """θ by transforming noise drawn from torch's global generator."""
        with torch.no_grad():
            return self._draw(sample_shape)

    def _draw(self, sample_shape: Any) -> Tensor:
        shape = (torch.Size(sample_shape).numel(), *self._like.shape, *self.family.noise_dims)
        tiny = torch.finfo(self._like.dtype).tiny
        uniform = torch.rand(shape, dtype=self._like.dtype, device=self._like.device).clamp_min(tiny)
        theta = self.family.sample(self.state, quantile(self.family.noise_kind, uniform))
        return theta.reshape((*torch.Size(sample_shape), *self._like.shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """The sum of the weights' log densities.

        Raises:
            ValueError: off the support, unless distributions are told not to validate.
        """
        if self._validate_args:
            self._validate_sample(value)
        each = self.family.log_prob(self.state, value)
        axes = self._like.ndim - self.family.event_dim
        return each.flatten(-axes).sum(-1) if axes else each

    @property
    def mean(self) -> Tensor:
        """E_q[θ], where θ is a statistic of the family."""
        if self.family.curved:
            return self.family.point(self.state)
        mean = self.family.to_mean(self.family.to_nat(self.state))
        if not hasattr(mean, "theta"):
            raise NotImplementedError(f"{type(self.family).__name__} has no statistic named theta; average samples.")
        return torch.as_tensor(mean.theta)

    @property
    def variance(self) -> Tensor:
        """Var_q(θ) of every entry."""
        return self.family.variance(self.state)

    def entropy(self) -> Tensor:
        """The sum of the weights' entropies."""
        return self.family.entropy(self.state).sum()


@register_kl(FamilyDistribution, FamilyDistribution)
def _kl(first: FamilyDistribution, second: FamilyDistribution) -> Tensor:
    """The sum of the weights' divergences, of two members of one family."""
    if first.family != second.family:
        raise NotImplementedError(
            f"kl_divergence: {first.family!r} and {second.family!r} have no closed form; average log_prob over samples."
        )
    return first.family.kl(first.state, second.state).sum()


def reparameterised(family: ExponentialFamily, state: Any) -> bool:
    """Whether the family's draws have derivatives that say how E_q[ℓ] moves with the state.

    Levels and integers have none, even where a formula (rounding, comparing) has zeros to offer; nor has a family
    whose default estimator measures losses alone, or whose `sample` cuts the graph.
    """
    if family.levels is not None or family.support.is_discrete:
        return False
    if (
        family.default_estimator == "score"
        or getattr(family.estimators.get(family.default_estimator), "needs", "") in LOSSES_ALONE
    ):
        return False
    with torch.enable_grad():
        moving = type(state)(*(value.detach().requires_grad_() for value in state))
        like = family.point(moving)
        draw = family.sample(moving, family.neutral_noise(like.detach()).unsqueeze(0))
        return bool(draw.requires_grad)
