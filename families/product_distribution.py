"""A product of families for Pyro: the parts' own distributions, side by side. Apart, because Pyro is large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.distribution import FamilyDistribution


class ProductDistribution(FamilyDistribution):
    """Π_i q_i(θ_i), one event; sampled part by part.

    Example:
        >>> import torch
        >>> from expfam_poco.families import ProductFamily
        >>> family = ProductFamily({"*": "diagonal_gaussian"})
        >>> family.distribution(family.centred_at(torch.ones(3))).mean
        tensor([1., 1., 1.])
    """

    def __init__(self, family: ExponentialFamily, state: Any, parts: Sequence[Any]) -> None:
        """Keep the family, the state, and the parts' distributions."""
        super().__init__(family, state)
        self._parts = parts

    @property
    def support(self) -> constraints.Constraint:
        """The family's support, which is of the whole vector already."""
        return self.family.support

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether every part has."""
        return all(part.has_rsample for part in self._parts)

    def _draw(self, sample_shape: Any) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        drawn = [part.rsample(shape) if part.has_rsample else part.sample(shape) for part in self._parts]
        return torch.cat(drawn, -1)

    @property
    def mean(self) -> Tensor:
        """E_q[θ]."""
        return self._expanded(torch.cat([part.mean for part in self._parts], -1))

    @property
    def mode(self) -> Tensor:
        """Every part's."""
        return self._expanded(torch.cat([part.mode for part in self._parts], -1))

    @property
    def variance(self) -> Tensor:
        """Var_q(θ) of every entry."""
        return self._expanded(torch.cat([part.variance for part in self._parts], -1))
