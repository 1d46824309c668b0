"""Constraints that torch lacks, or checks by branches on data, which compiled kernels cannot have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints


class Named:
    """A constraint that is shown by its name; torch leaves out the first letter."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class PositiveDefinite(Named, type(constraints.positive_definite)):  # type: ignore[misc]
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


class Sphere(Named, constraints.Constraint):
    """Unit vectors along the last axis.

    Example:
        >>> import torch
        >>> from expfam_poco.family.domains import Sphere
        >>> Sphere().check(torch.tensor([[0.6, 0.8], [1.0, 1.0]]))
        tensor([ True, False])
    """

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Up to rounding."""
        slack = 10.0 * torch.finfo(value.dtype).eps * value.shape[-1] ** 0.5
        return (value.square().sum(-1).sqrt() - 1.0).abs() <= slack


class Directed(Named, constraints.Constraint):
    """Vectors λ whose direction is that of the posterior: any; steps turn them, but do not turn them round.

    Example:
        >>> import torch
        >>> from expfam_poco.family.domains import Directed
        >>> Directed().check(torch.zeros(2, 3))
        tensor([True, True])
    """

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Always, if they are numbers."""
        return (value == value).all(-1)


def is_sphere(support: Any) -> bool:
    """Whether it is this constraint or Pyro's `constraints.sphere`."""
    return isinstance(support, Sphere) or type(support).__name__ == "_Sphere"


def check_declared(own: Mapping[str, Any], name: str) -> None:
    """Refuse a support or domain that is no constraint, where a class declares it.

    Raises:
        TypeError: names the class and what to give.
    """
    bounds = {"support": own["support"]} if "support" in own else {}
    if isinstance(own.get("domain"), Mapping):
        bounds |= {f"domain[{key!r}]": value for key, value in own["domain"].items()}
    for where, value in bounds.items():
        if not isinstance(value, constraints.Constraint | property):
            raise TypeError(
                f"{name}.{where} is {value!r}; give a constraint of torch.distributions, such as constraints.positive."
            )


def declared(cls: type[Any]) -> dict[str, constraints.Constraint]:
    """The domain that follows from the support: on a sphere with T(θ) = θ, λ is directed."""
    if is_sphere(cls.support) and "theta" in cls.State._fields and "theta" not in cls.domain:
        return {**cls.domain, "theta": Directed()}
    return dict(cls.domain)


def checkable(domain: Mapping[str, constraints.Constraint]) -> dict[str, constraints.Constraint]:
    """The same constraints, without branches."""
    branching = type(constraints.positive_definite)
    return {name: PositiveDefinite() if type(bound) is branching else bound for name, bound in domain.items()}
