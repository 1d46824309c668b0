"""Estimators of natural gradients: the public names of `expfam_poco.rule.estimators`."""

from expfam_poco.family.draws import ENTRIES, LOSSES_ALONE, Draws, Estimator
from expfam_poco.rule.estimators import (
    GENERAL,
    Exact,
    ExactRegression,
    Hutchinson,
    Regression,
    Reparameterised,
    ScoreFunction,
    ScoreRegression,
    SquaredGradient,
    available,
    resolve_estimator,
)

__all__ = [
    "ENTRIES",
    "GENERAL",
    "LOSSES_ALONE",
    "Draws",
    "Estimator",
    "Exact",
    "ExactRegression",
    "Hutchinson",
    "Regression",
    "Reparameterised",
    "ScoreFunction",
    "ScoreRegression",
    "SquaredGradient",
    "available",
    "resolve_estimator",
]
