"""Constraints that compiled kernels can check: torch's own for positive definite matrices branches on data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import constraints


class PositiveDefinite(type(constraints.positive_definite)):  # type: ignore[misc]
    """As torch's, without branches.

    Example:
        >>> import torch
        >>> from expfam_poco.family.domains import PositiveDefinite
        >>> PositiveDefinite().check(torch.stack((torch.eye(2), -torch.eye(2))))
        tensor([ True, False])
    """

    def check(self, value: Tensor) -> Tensor:
        """One boolean for every matrix."""
        symmetric = torch.isclose(value, value.mT, atol=1e-6).all(-1).all(-1)
        return symmetric & (torch.linalg.cholesky_ex(value).info == 0)


def checkable(domain: Mapping[str, constraints.Constraint]) -> dict[str, constraints.Constraint]:
    """The same constraints, without branches."""
    branching = type(constraints.positive_definite)
    return {name: PositiveDefinite() if type(bound) is branching else bound for name, bound in domain.items()}
