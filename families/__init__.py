"""The built-in families. Each is a plug-in of the engine, registered by an entry point of this package."""

from .bernoulli import Bernoulli
from .binary_estimators import Arm, Relaxed, SingleFlip, StraightThrough
from .block_diagonal import BlockDiagonalGaussian
from .gamma import Gamma
from .gaussian import DiagonalGaussian, FullGaussian, GaussianSite, GaussianState, IsotropicGaussian
from .kronecker import KroneckerGaussian, KroneckerSite, KroneckerState
from .low_rank import LowRankGaussian, LowRankSite, LowRankState
from .product import ProductFamily

__all__ = [
    "Arm",
    "Bernoulli",
    "BlockDiagonalGaussian",
    "DiagonalGaussian",
    "FullGaussian",
    "Gamma",
    "GaussianSite",
    "GaussianState",
    "IsotropicGaussian",
    "KroneckerGaussian",
    "KroneckerSite",
    "KroneckerState",
    "LowRankGaussian",
    "LowRankSite",
    "LowRankState",
    "ProductFamily",
    "Relaxed",
    "SingleFlip",
    "StraightThrough",
]
