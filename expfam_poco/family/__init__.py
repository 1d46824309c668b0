"""What q is: the abstract exponential family, its noise, its statistics, what follows from them, and the registry.

Imports nothing of the library but `errors`.
"""

from expfam_poco.family.base import ExponentialFamily, Theta
from expfam_poco.family.curved import CurvedFamily
from expfam_poco.family.draws import Draws, Estimator

__all__ = ["CurvedFamily", "Draws", "Estimator", "ExponentialFamily", "Theta"]
