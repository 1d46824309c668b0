"""A posterior as a Pyro distribution: the public name of `expfam_poco.family.distribution`."""

from expfam_poco.family.distribution import FamilyDistribution

__all__ = ["FamilyDistribution"]
