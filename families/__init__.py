"""The built-in families. Each is a plug-in of the engine, registered by an entry point of this package."""

from .bernoulli import Bernoulli
from .beta import Beta
from .binary_estimators import Arm, Relaxed, SingleFlip, StraightThrough
from .block_diagonal import BlockDiagonalGaussian
from .dirichlet import Dirichlet
from .exponential import Exponential
from .gamma import Gamma
from .gaussian import DiagonalGaussian, FullGaussian, GaussianSite, GaussianState, IsotropicGaussian
from .kronecker import KroneckerGaussian, KroneckerSite, KroneckerState
from .low_rank import LowRankGaussian, LowRankSite, LowRankState

__all__ = [
    "Arm",
    "Bernoulli",
    "BlockDiagonalGaussian",
    "Beta",
    "DiagonalGaussian",
    "Dirichlet",
    "Exponential",
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
    "Relaxed",
    "SingleFlip",
    "StraightThrough",
]
