"""What estimators of discrete weights ask of a family; a family that is one of these may use them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from expfam_poco.family.base import ExponentialFamily


def signs(value: Tensor) -> Tensor:
    """1 where the value is 0 (−0, too) or more, else −1; in a sixth of the time of `torch.where` with two numbers."""
    return torch.copysign(torch.ones((), dtype=value.dtype, device=value.device), value + 0.0)


class SignWeights(ExponentialFamily):
    """Weights θ = sign(λ + ε) with the logistic noise ε = ½ logit u, and λ = artanh E[θ] in the state's `theta`."""


class LevelWeights(ExponentialFamily):
    """Weights from increasing levels, drawn by thresholds on 2ε = logit u."""

    @abstractmethod
    def table(self, like: Tensor) -> Tensor:
        """The levels as a tensor."""

    @abstractmethod
    def thresholds(self, nat: Any) -> Tensor:
        """t_k = logit P(θ ≤ l_k), for all levels but the highest."""
