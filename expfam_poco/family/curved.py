r"""Curved families: those whose natural parameters fill only a part of an ambient exponential family's.

A Gaussian N(m, S⁻¹) with S = A ⊗ B, or with S = diag(d) + V Vᵀ, is an exponential family whose natural parameters
(S m, −S/2) lie on a surface. The step of the Bayesian learning rule leads off it; the natural step *in* the family is
the projection of the ambient one onto the surface's tangent space, orthogonal in the Fisher metric of the ambient
family (Amari 1998): the tangent direction that changes the posterior as the full step does, as nearly as it can.

So a site of a curved family, taken at a state, is a tangent vector there. Averages of sites taken at one state are
plain averages; between states a site is first *carried*: projected, as the function that it is, onto the other tangent
space.

The dense truth is available by expansion (`expand`, `expand_site`, `project`), for small shapes: the laws hold the
family's efficient methods against it. Nothing dense is made in training.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from expfam_poco.family.base import ExponentialFamily


class CurvedFamily(ExponentialFamily):
    """A family whose `Nat` and `Mean` are those of an ambient family, restricted to the states that `expand` gives.

    A subclass writes `ambient`, `expand`, `expand_site`, `project`, `carry`, and efficient versions of all that
    training uses: `sample`, `natural_gradient`, `kl_gradient`, `reanchor`, `retract`, `point`, `recentre`, `log_prob`,
    `entropy` and `kl`, since the defaults go through the dense natural parameters. Weights are flattened for the
    ambient family.

    Example:
        >>> import torch, expfam_poco as poco
        >>> family = poco.resolve_family("kronecker_gaussian")
        >>> state = family.centred_at(torch.zeros(2, 3), 4.0)
        >>> family.expand(state).precision.shape
        torch.Size([6, 6])
    """

    curved: ClassVar[bool] = True

    @property
    @abstractmethod
    def ambient(self) -> ExponentialFamily:
        """The family of the flattened weights in which this one lies."""

    @abstractmethod
    def expand(self, state: Any) -> Any:
        """The ambient `State` of a member: dense."""

    @abstractmethod
    def expand_site(self, site: Any, state: Any) -> Any:
        """A tangent vector at `state` as an ambient `Site`: dense."""

    @abstractmethod
    def project(self, site: Any, state: Any) -> Any:
        """The orthogonal projection of an ambient `Site` at `state` onto the tangent space there."""

    def flatten(self, theta: Tensor) -> Tensor:
        """θ with the axes of one weight in one."""
        return theta.flatten(theta.ndim - self.event_dim) if self.event_dim else theta.unsqueeze(-1)

    def statistics(self, theta: Tensor) -> Any:
        """The ambient family's T, of the flattened weights."""
        return self.ambient.statistics(self.flatten(theta))

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """The ambient family's."""
        return self.ambient.log_base_measure(self.flatten(theta))

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """The ambient family's."""
        return self.ambient.expected_log_base_measure(self.expand(state))

    def log_partition(self, nat: Any) -> Tensor:
        """The ambient family's."""
        return self.ambient.log_partition(nat)

    def to_mean(self, nat: Any) -> Any:
        """The ambient family's: off the surface, too."""
        return self.ambient.to_mean(nat)

    def to_natural(self, mean: Any) -> Any:
        """The ambient family's."""
        return self.ambient.to_natural(mean)

    def to_nat(self, state: Any) -> Any:
        """The ambient natural parameters of a member: dense."""
        return self.ambient.to_nat(self.expand(state))

    def from_nat(self, nat: Any) -> Any:
        """Refused: most ambient natural parameters belong to no member."""
        raise TypeError(
            f"nat: {type(self).__name__} is curved, so most natural parameters belong to no member of it; use "
            f"{type(self.ambient).__name__} for these."
        )

    def site_to_nat(self, site: Any, state: Any) -> Any:
        """A tangent vector at `state` in ambient natural coordinates: dense."""
        return self.ambient.site_to_nat(self.expand_site(site, state), self.expand(state))

    def site_from_nat(self, site: Any, state: Any) -> Any:
        """The projection of a natural gradient in ambient natural coordinates."""
        return self.project(self.ambient.site_from_nat(site, self.expand(state)), state)

    def fisher_solve(self, nat: Any, vector: Any) -> Any:
        """The ambient family's."""
        return self.ambient.fisher_solve(nat, vector)
