"""The categorical distribution over levels for Pyro. Apart, because only distributions need Pyro's import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl


class LevelCategorical(dist.TorchDistribution):
    """A Pyro distribution over real levels, P(θ = l_k) ∝ exp(logits_k).

    Example:
        >>> import torch
        >>> from expfam_poco.families.discrete.level_categorical import LevelCategorical
        >>> LevelCategorical(torch.zeros(3), (-1.0, 0.0, 1.0)).log_prob(torch.ones(())).exp()
        tensor(0.3333)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": constraints.real_vector}
    has_enumerate_support = True

    def __init__(self, logits: Tensor, levels: Sequence[float], validate_args: bool | None = None) -> None:
        """Keep the logarithms of the probabilities."""
        self.logits = torch.as_tensor(logits).log_softmax(-1)
        self.levels = torch.tensor(tuple(levels), dtype=self.logits.dtype, device=self.logits.device)
        super().__init__(self.logits.shape[:-1], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The levels."""
        return _Levels(self.levels)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LevelCategorical:
        """The same distribution with a larger batch shape."""
        logits = self.logits.expand(*torch.Size(batch_shape), len(self.levels))
        return LevelCategorical(logits, self.levels.tolist(), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Levels from torch's global generator."""
        shape = self._extended_shape(torch.Size(sample_shape))
        u = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device).unsqueeze(-1)
        below = self.logits.exp().cumsum(-1)[..., :-1]
        return self.levels[(u > below).sum(-1)]

    def log_prob(self, value: Tensor) -> Tensor:
        """The logarithm of the level's probability; −∞ off the levels."""
        if self._validate_args:
            self._validate_sample(value)
        hit = value.unsqueeze(-1) == self.levels
        return torch.where(hit, self.logits, -torch.inf).amax(-1)

    @property
    def mean(self) -> Tensor:
        """Σ p_k l_k."""
        return self.logits.exp() @ self.levels

    @property
    def mode(self) -> Tensor:
        """The likeliest level."""
        return self.levels[self.logits.argmax(-1)]

    @property
    def variance(self) -> Tensor:
        """Σ p_k (l_k − mean)²."""
        return (self.logits.exp() * (self.levels - self.mean.unsqueeze(-1)).square()).sum(-1)

    def entropy(self) -> Tensor:
        """−Σ p_k log p_k."""
        return -(self.logits.exp() * self.logits).sum(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All levels along a new first axis."""
        values = self.levels.reshape(-1, *(1,) * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values


@register_kl(LevelCategorical, LevelCategorical)
def _kl(first: LevelCategorical, second: LevelCategorical) -> Tensor:
    """Σ p_k (log p_k − log q_k), over one set of levels."""
    if not torch.equal(first.levels, second.levels):
        raise NotImplementedError(f"kl_divergence: of the levels {first.levels.tolist()} and {second.levels.tolist()}.")
    return (first.logits.exp() * (first.logits - second.logits)).sum(-1)


class _Levels(constraints.Constraint):
    """A finite set of numbers."""

    is_discrete = True

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        """True where the value is a level."""
        return (value.unsqueeze(-1) == self.levels).any(-1)


class SignBernoulli(LevelCategorical):
    """A Pyro distribution over {−1, +1} with natural parameter λ: P(θ = ±1) = σ(±2λ).

    Example:
        >>> import torch
        >>> from expfam_poco.families.discrete.level_categorical import SignBernoulli
        >>> SignBernoulli(torch.zeros(())).log_prob(torch.ones(())).exp()
        tensor(0.5000)
    """

    def __init__(self, natural: Tensor, validate_args: bool | None = None) -> None:
        """The two levels with log-odds ∓λ."""
        natural = torch.as_tensor(natural)
        super().__init__(torch.stack((-natural, natural), -1), (-1.0, 1.0), validate_args)
