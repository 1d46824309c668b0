"""The built-in families. Each is a plug-in of the engine, registered by an entry point of this package."""

from .discrete.bernoulli import Bernoulli
from .discrete.binary_estimators import Arm, Relaxed, SingleFlip, StraightThrough
from .discrete.categorical import Categorical
from .discrete.categorical_estimators import RelaxedLevels, StraightThroughLevels
from .discrete.counts import NegativeBinomial, Poisson
from .gaussian.block_diagonal import BlockDiagonalGaussian
from .gaussian.gaussian import DiagonalGaussian, FullGaussian, GaussianSite, GaussianState
from .gaussian.isotropic import IsotropicGaussian
from .gaussian.kronecker import KroneckerGaussian, KroneckerSite, KroneckerState
from .gaussian.low_rank import LowRankGaussian, LowRankSite, LowRankState
from .laplace import Laplace
from .normal_gamma import NormalGamma
from .positive.beta import Beta
from .positive.dirichlet import Dirichlet
from .positive.exponential import Exponential
from .positive.gamma import Gamma
from .positive.inverse_gaussian import InverseGaussian
from .positive.log_normal import LogNormal
from .positive.weibull import Weibull
from .product import ProductFamily
from .von_mises import VonMises
from .von_mises_fisher import VonMisesFisher
from .wishart import Wishart

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
    "Laplace",
    "LogNormal",
    "NegativeBinomial",
    "NormalGamma",
    "Poisson",
    "Relaxed",
    "RelaxedLevels",
    "SingleFlip",
    "StraightThrough",
    "StraightThroughLevels",
    "VonMises",
    "VonMisesFisher",
    "Weibull",
    "Wishart",
]
