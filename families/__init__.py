"""The built-in families. Each is a plug-in of the engine, registered by an entry point of this package."""

from .bernoulli import Bernoulli, Relaxed, StraightThrough
from .gaussian import DiagonalGaussian, FullGaussian, GaussianSite, GaussianState, IsotropicGaussian

__all__ = [
    "Bernoulli",
    "DiagonalGaussian",
    "FullGaussian",
    "GaussianSite",
    "GaussianState",
    "IsotropicGaussian",
    "Relaxed",
    "StraightThrough",
]
