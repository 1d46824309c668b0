r"""Gaussians with a dense precision for every row of a tensor: N(m_i, S_i⁻¹) for the i-th row.

It is the full Gaussian of `gaussian`, one for each row along the last axis, so the same formulas hold; rows are
independent of each other, and so a tensor of many rows is one batch of small matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .gaussian import FullGaussian


@dataclass(frozen=True)
class BlockDiagonalGaussian(FullGaussian):
    """N(m, S⁻¹) with S block-diagonal: a d × d block for every row of d weights (the inputs of one unit of a layer).

    Weights unconstrained; rows of up to a few hundred. A bias is one row.

    Example:
        >>> import torch
        >>> from expfam_poco.families import BlockDiagonalGaussian
        >>> q = BlockDiagonalGaussian()
        >>> q.centred_at(torch.zeros(5, 3)).precision.shape
        torch.Size([5, 3, 3])
    """

    joint: ClassVar[bool] = False
    curvature: ClassVar[str] = "pairs"

    def distribution(self, state: Any) -> Any:
        """A batch of `pyro.distributions.MultivariateNormal`, one event."""
        rows = super().distribution(state)
        return rows.to_event(state.mean.ndim - 1)
