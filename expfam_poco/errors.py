"""Errors that several modules raise."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteError(FloatingPointError):
    """A loss or a gradient was NaN or infinite; the weights and the posterior are as they were, unless `stepped`.

    `stepped` is true after a step in place (of a large model) that was taken but for some weights whose new numbers
    would not have been finite.

    Example:
        >>> import torch, expfam_poco as poco
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> opt = poco.IVON([weight], lr=0.1, ess=8.0)
        >>> try:
        ...     opt.step(lambda: (weight / 0.0).sum())
        ... except poco.NonFiniteError:
        ...     print(weight.data)
        tensor([0., 0.])
    """

    loss: Tensor = torch.tensor(float("nan"))
    stepped: bool = False
