"""Angles as a Pyro distribution. Apart, because only distributions need Pyro's import."""

from __future__ import annotations

from torch import Tensor

from expfam_poco.family.distribution import FamilyDistribution


class VonMisesDistribution(FamilyDistribution):
    """Angles; mean and variance are the circular ones, as in torch's von Mises distribution.

    Example:
        >>> import torch
        >>> from expfam_poco.families import VonMises
        >>> family = VonMises()
        >>> family.distribution(family.centred_at(torch.tensor([3.0]), 10.0)).mean
        tensor([3.])
    """

    @property
    def mean(self) -> Tensor:
        """The mean direction."""
        return self._expanded(self.family.point(self.state))
