"""Any family as a Pyro distribution. Imported only when a distribution is asked for, because Pyro is large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import kl_divergence, register_kl

from expfam_poco.family import fields
from expfam_poco.family.draws import LOSSES_ALONE
from expfam_poco.family.noise import NoiseKey

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

    def __reduce__(self) -> Any:
        return _rebuilt, (self.family, tuple(self.state), self.batch_shape)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether a draw is a differentiable function of the state."""
        return reparameterised(self.family, self.state)

    @property
    def support(self) -> constraints.Constraint:
        """The family's support, one event."""
        support = self.family.support
        return constraints.independent(support, self._like.ndim - support.event_dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FamilyDistribution:
        """Independent copies: one q for every entry of the batch."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._batch_shape = torch.Size(batch_shape)
        return made

    def _expanded(self, value: Tensor, event: bool = True) -> Tensor:
        """A number of q, or with `event` a tensor like θ, for every copy."""
        return value.expand(self.batch_shape + self.event_shape) if event else value.expand(self.batch_shape)

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
        shape, like = torch.Size(sample_shape) + self.batch_shape, self._like
        if shape.numel() == 0:
            return like.new_empty((*shape, *like.shape))
        key = NoiseKey(seed=int(torch.randint(2**62, ())))  # noise as in training, whose tails end at u = 2⁻³³
        noise = self.family.noise(like.shape, shape.numel(), key, dtype=like.dtype, device=like.device)
        return self.family.sample(self.state, noise).reshape((*shape, *like.shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """The sum of the weights' log densities.

        Raises:
            ValueError: off the support, unless distributions are told not to validate.
        """
        if self._validate_args:
            self._validate_sample(value)
        each = self.family.log_prob(self.state, value)
        axes = self._like.ndim - self.family.event_dim
        summed = each.flatten(-axes).sum(-1) if axes else each
        return summed.expand(torch.broadcast_shapes(summed.shape, self.batch_shape))

    @property
    def mean(self) -> Tensor:
        """E_q[θ], where θ is a statistic of the family."""
        if self.family.curved:
            return self._expanded(self.family.point(self.state))
        return self._expanded(self.family.expectation(self.state))

    @property
    def mode(self) -> Tensor:
        """Where the density is largest."""
        return self._expanded(self.family.mode(self.state))

    @property
    def variance(self) -> Tensor:
        """Var_q(θ) of every entry."""
        return self._expanded(self.family.variance(self.state))

    def to(self, *arguments: Any, **named: Any) -> FamilyDistribution:
        """The same distribution with its numbers elsewhere, or in another precision: as `Tensor.to`."""
        moved = fields.map_leaves(lambda value: value.to(*arguments, **named), self.state)
        return _rebuilt(self.family, moved, self.batch_shape)

    def entropy(self) -> Tensor:
        """The sum of the weights' entropies."""
        return self._expanded(self.family.entropy(self.state).sum(), event=False)


class Reshaped(dist.TorchDistribution):
    """A distribution of flat vectors, as one of tensors of another shape.

    Example:
        >>> import torch
        >>> from expfam_poco.family.distribution import Reshaped
        >>> flat = torch.distributions.MultivariateNormal(torch.zeros(6), torch.eye(6))
        >>> Reshaped(flat, torch.Size((2, 3))).sample().shape
        torch.Size([2, 3])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, flat: Any, shape: torch.Size) -> None:
        """Keep the distribution of vectors."""
        self.flat = flat
        super().__init__(flat.batch_shape, shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """As of the vectors."""
        return bool(self.flat.has_rsample)

    @property
    def support(self) -> constraints.Constraint:
        """The entries' support, one event."""
        entries = self.flat.support
        return constraints.independent(getattr(entries, "base_constraint", entries), len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Reshaped:
        """Independent copies."""
        return Reshaped(self.flat.expand(batch_shape), self.event_shape)

    def _tensors(self, vectors: Tensor) -> Tensor:
        return vectors.reshape(vectors.shape[:-1] + self.event_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Differentiable draws."""
        return self._tensors(self.flat.rsample(torch.Size(sample_shape)))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws."""
        return self._tensors(self.flat.sample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Of the vectors."""
        batch = value.shape[: value.ndim - len(self.event_shape)]
        density: Tensor = self.flat.log_prob(value.reshape(*batch, -1))
        return density

    @property
    def mean(self) -> Tensor:
        """E[θ]."""
        return self._tensors(self.flat.mean)

    @property
    def mode(self) -> Tensor:
        """Where the density is largest."""
        return self._tensors(self.flat.mode)

    @property
    def variance(self) -> Tensor:
        """Var(θ) of every entry."""
        return self._tensors(self.flat.variance)

    def entropy(self) -> Tensor:
        """Of the vectors."""
        value: Tensor = self.flat.entropy()
        return value


@register_kl(Reshaped, Reshaped)
def _kl_reshaped(first: Reshaped, second: Reshaped) -> Tensor:
    return kl_divergence(first.flat, second.flat)


@register_kl(FamilyDistribution, FamilyDistribution)
def _kl(first: FamilyDistribution, second: FamilyDistribution) -> Tensor:
    """The sum of the weights' divergences, of two members of one family."""
    if first.family != second.family:
        raise NotImplementedError(
            f"kl_divergence: {first.family!r} and {second.family!r} have no closed form; average log_prob over samples."
        )
    value = first.family.kl(first.state, second.state).sum()
    return value.expand(torch.broadcast_shapes(first.batch_shape, second.batch_shape))


def _rebuilt(family: ExponentialFamily, values: Sequence[Tensor], batch_shape: torch.Size) -> FamilyDistribution:
    made: FamilyDistribution = family.distribution(family.State(*values)).expand(batch_shape)
    return made


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
