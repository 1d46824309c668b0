"""What a natural gradient is corrected with: corrections as objects, schedules of α, the variance meter.

Imports `family` alone.
"""

from expfam_poco.correction import memory
from expfam_poco.correction.base import Averaging, Corrected, Correction
from expfam_poco.correction.recursive import Recursive
from expfam_poco.correction.registry import CORRECTIONS, resolve_correction
from expfam_poco.correction.snapshot import (
    Alpha,
    Outer,
    Snapshot,
    VarianceTerms,
    alpha_at,
    average_sites,
    carried,
    correct,
    natural_correct,
    optimal_alpha,
    outer_from_posterior,
    stack_states,
    update_outer,
    variance_ratio,
    variance_terms,
)
from expfam_poco.correction.stored import Stored
from expfam_poco.correction.transported import Previous, Transported, transported

__all__ = [
    "CORRECTIONS",
    "Alpha",
    "Averaging",
    "Corrected",
    "Correction",
    "Outer",
    "Previous",
    "Recursive",
    "Snapshot",
    "Stored",
    "Transported",
    "VarianceTerms",
    "alpha_at",
    "average_sites",
    "carried",
    "correct",
    "memory",
    "natural_correct",
    "optimal_alpha",
    "outer_from_posterior",
    "resolve_correction",
    "stack_states",
    "transported",
    "update_outer",
    "variance_ratio",
    "variance_terms",
]
