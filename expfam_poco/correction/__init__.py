"""What a natural gradient is corrected with: corrections as objects, schedules of α, the variance meter.

Imports `family` alone.
"""

from expfam_poco.correction.snapshot import (
    Alpha,
    Corrected,
    Outer,
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

__all__ = [
    "Alpha",
    "Corrected",
    "Outer",
    "VarianceTerms",
    "alpha_at",
    "average_sites",
    "carried",
    "correct",
    "natural_correct",
    "optimal_alpha",
    "outer_from_posterior",
    "stack_states",
    "update_outer",
    "variance_ratio",
    "variance_terms",
]
