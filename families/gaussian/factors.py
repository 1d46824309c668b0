"""Cholesky factors that are computed once: a matrix that is kept is factorised at its first use only.

A step of a full Gaussian needs the factor of its precision for the sample, for Stein's identity, for the second-order
term, for the mean's step and for the check of the domain. A rank-one update of the old factor would cost less than a
new one only if the precision changed by a rank-one term; with a prior, or with an exact Hessian, the change has full
rank.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

_KNOWN: dict[int, tuple[Any, int, Tensor]] = {}  # by id: a weak link to the matrix, its version, the factor


def cholesky(matrix: Tensor) -> Tensor:
    """L with S = L Lᵀ, batch × d × d; NaN where S is not positive definite, so that the caller sees it in its result.

    The result is kept: change neither it nor, unnoticed by torch (through `.data` or NumPy), the matrix in place.

    Example:
        >>> import torch
        >>> from expfam_poco.families.gaussian.factors import cholesky
        >>> cholesky(torch.tensor([[4.0]]))
        tensor([[2.]])
    """
    if torch.compiler.is_compiling() or matrix.requires_grad or matrix.is_inference():
        return _factorise(matrix)
    key, version = id(matrix), matrix._version
    known = _KNOWN.get(key)
    if known is not None and known[0]() is matrix and known[1] == version:
        return known[2]
    factor = _factorise(matrix)
    _KNOWN[key] = weakref.ref(matrix, lambda who: _forget(key, who)), version, factor
    return factor


def _forget(key: int, who: Any) -> None:
    """A matrix is no more; another one may have got its id since."""
    if key in _KNOWN and _KNOWN[key][0] is who:
        del _KNOWN[key]


class _PositiveDefinite(type(constraints.positive_definite)):  # type: ignore[misc]
    """Symmetric matrices with a Cholesky factor; torch's own constraint has branches, which kernels cannot have."""

    def check(self, value: Tensor) -> Tensor:
        """One boolean for every matrix."""
        symmetric = torch.isclose(value, value.mT, atol=1e-6).all(-1).all(-1)
        return symmetric & torch.isfinite(cholesky(value)).all(-1).all(-1)


positive_definite = _PositiveDefinite()


def _factorise(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)
