"""Pyro's Gamma, Beta and Dirichlet with densities, entropies and divergences that keep their digits in float32.

Their formulas are differences of logarithms of Γ, whose terms grow like a log a: in float32 nothing is left of an
entropy at a shape of 10⁶, and a log density is off by nats. Here they are computed in float64. Apart, because only
distributions need Pyro's import.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor
from torch.distributions.kl import kl_divergence, register_kl


class _Wide:
    """A distribution of torch's whose functions of two numbers or more are computed in float64."""

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(value), rounded once."""
        own: Any = self
        if own._validate_args:
            own._validate_sample(value)
        return _widened(own).log_prob(value.double()).to(value.dtype)

    def entropy(self) -> Tensor:
        """−E_q[log q], rounded once."""
        mean: Tensor = self.mean  # type: ignore[attr-defined]
        return _widened(self).entropy().to(mean.dtype)


class Gamma(_Wide, dist.Gamma):
    """Γ(concentration, rate) as Pyro's.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.distributions import Gamma
        >>> q = Gamma(torch.tensor(1e6), torch.tensor(1e6))
        >>> round(float(q.log_prob(torch.tensor(1.0))), 4)  # ½ log(a/2π), to 1e-7
        5.9888
    """


class Beta(_Wide, dist.Beta):
    """Beta(concentration1, concentration0) as Pyro's.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.distributions import Beta
        >>> Beta(torch.tensor(1.0), torch.tensor(1.0)).entropy()
        tensor(0.)
    """


class Dirichlet(_Wide, dist.Dirichlet):
    """Dirichlet(concentration) as Pyro's.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.distributions import Dirichlet
        >>> Dirichlet(torch.ones(2)).entropy()
        tensor(0.)
    """


def _widened(own: Any) -> Any:
    """Torch's own distribution with the same parameters in float64."""
    kind: Any = next(base for base in type(own).__mro__ if base.__module__.startswith("torch.distributions"))
    parameters = {name: getattr(own, name).double() for name in kind.arg_constraints}
    return kind(**parameters, validate_args=False)


def _divergence(first: Any, second: Any) -> Tensor:
    return kl_divergence(_widened(first), _widened(second)).to(first.mean.dtype)


for _kind in (Gamma, Beta, Dirichlet):
    register_kl(_kind, _kind)(_divergence)
