"""The built-in families. Each is a plug-in of the engine, registered by an entry point of this package."""

from .bernoulli import Bernoulli
from .beta import Beta
from .binary_estimators import Arm, Relaxed, SingleFlip, StraightThrough
from .block_diagonal import BlockDiagonalGaussian
from .categorical import Categorical
from .categorical_estimators import RelaxedLevels, StraightThroughLevels
from .dirichlet import Dirichlet
from .exponential import Exponential
from .gamma import Gamma
from .gaussian import DiagonalGaussian, FullGaussian, GaussianSite, GaussianState, IsotropicGaussian
from .inverse_gaussian import InverseGaussian
from .kronecker import KroneckerGaussian, KroneckerSite, KroneckerState
from .log_normal import LogNormal
from .low_rank import LowRankGaussian, LowRankSite, LowRankState
from .product import ProductFamily
from .von_mises import VonMises

__all__ = [
    "Arm",
    "Bernoulli",
    "BlockDiagonalGaussian",
    "Categorical",
    "Beta",
    "DiagonalGaussian",
    "Dirichlet",
    "Exponential",
    "FullGaussian",
    "Gamma",
    "GaussianSite",
    "GaussianState",
    "InverseGaussian",
    "IsotropicGaussian",
    "KroneckerGaussian",
    "KroneckerSite",
    "KroneckerState",
    "LowRankGaussian",
    "LowRankSite",
    "LowRankState",
    "ProductFamily",
    "LogNormal",
    "Relaxed",
    "RelaxedLevels",
    "SingleFlip",
    "StraightThrough",
    "StraightThroughLevels",
    "VonMises",
]
