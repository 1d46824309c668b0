"""The Bernoulli distribution over {−1, +1} for Pyro. Apart, because only distributions need Pyro's import."""

from __future__ import annotations

import torch
from torch import Tensor

from .level_categorical import LevelCategorical


class SignBernoulli(LevelCategorical):
    """A Pyro distribution over {−1, +1} with natural parameter λ: P(θ = ±1) = σ(±2λ).

    Example:
        >>> import torch
        >>> from ..sign_bernoulli import SignBernoulli
        >>> SignBernoulli(torch.zeros(())).log_prob(torch.ones(())).exp()
        tensor(0.5000)
    """

    def __init__(self, natural: Tensor, validate_args: bool | None = None) -> None:
        """The two levels with log-odds ∓λ."""
        natural = torch.as_tensor(natural)
        super().__init__(torch.stack((-natural, natural), -1), (-1.0, 1.0), validate_args)
