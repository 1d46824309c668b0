"""The built-in families. Each is a plug-in of the engine, registered by an entry point of this package."""

from .bernoulli import Bernoulli
from .binary_estimators import Arm, Relaxed, SingleFlip, StraightThrough
from .gamma import Gamma
from .gaussian import DiagonalGaussian, FullGaussian, GaussianSite, GaussianState, IsotropicGaussian

__all__ = [
    "Arm",
    "Bernoulli",
    "DiagonalGaussian",
    "FullGaussian",
    "Gamma",
    "GaussianSite",
    "GaussianState",
    "IsotropicGaussian",
    "Relaxed",
    "SingleFlip",
    "StraightThrough",
]
