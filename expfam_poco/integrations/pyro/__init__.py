"""Pyro models by natural gradients: `NaturalVI` in place of `SVI`, and its guide."""

from expfam_poco.integrations.pyro.guide import NaturalGuide
from expfam_poco.integrations.pyro.natural import NaturalVI

__all__ = ["NaturalGuide", "NaturalVI"]
