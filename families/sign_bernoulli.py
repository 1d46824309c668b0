"""The Bernoulli distribution over {−1, +1} for Pyro. Apart, because only distributions need Pyro's import."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from .binary_estimators import log_sech_squared


class SignBernoulli(dist.TorchDistribution):
    """A Pyro distribution over {−1, +1} with natural parameter λ: P(θ = ±1) = σ(±2λ).

    Example:
        >>> import torch
        >>> from expfam_poco.families.sign_bernoulli import SignBernoulli
        >>> SignBernoulli(torch.zeros(())).log_prob(torch.ones(())).exp()
        tensor(0.5000)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"natural": constraints.real}
    has_enumerate_support = True

    def __init__(self, natural: Tensor, validate_args: bool | None = None) -> None:
        """Keep λ."""
        self.natural = torch.as_tensor(natural)
        super().__init__(self.natural.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The two values −1 and 1."""
        return _signs

    def expand(self, batch_shape: Any, _instance: Any = None) -> SignBernoulli:
        """The same distribution with a larger batch shape."""
        return SignBernoulli(self.natural.expand(batch_shape), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """±1 from torch's global generator."""
        shape = self._extended_shape(torch.Size(sample_shape))
        heads = torch.rand(shape, dtype=self.natural.dtype, device=self.natural.device)
        return torch.where(heads < torch.sigmoid(2.0 * self.natural), 1.0, -1.0).to(self.natural.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """log σ(2λθ)."""
        if self._validate_args:
            self._validate_sample(value)
        return F.logsigmoid(2.0 * self.natural * value)

    @property
    def mean(self) -> Tensor:
        """tanh λ."""
        return torch.tanh(self.natural)

    @property
    def variance(self) -> Tensor:
        """sech² λ."""
        return torch.exp(log_sech_squared(self.natural))

    def entropy(self) -> Tensor:
        """log 2cosh λ − λ tanh λ."""
        partition = self.natural.abs() + F.softplus(-2.0 * self.natural.abs())
        return partition - self.natural * self.mean

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Both values along a new first axis."""
        values = torch.tensor([-1.0, 1.0], dtype=self.natural.dtype, device=self.natural.device)
        values = values.reshape(-1, *(1,) * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values


class _Signs(constraints.Constraint):
    """The set {−1, 1}."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        """True where the value is −1 or 1."""
        return value.abs() == 1.0


_signs = _Signs()
