"""The Bayesian learning rule as pure functions: the public names of `expfam_poco.rule.blr`."""

from expfam_poco.rule.blr import (
    BLRState,
    bayes_log_density,
    init,
    init_momentum,
    natural_step,
    norm_clip_factor,
    own_rates,
    site,
    square_of,
    unbias_of,
    update,
)

__all__ = [
    "BLRState",
    "bayes_log_density",
    "init",
    "init_momentum",
    "natural_step",
    "norm_clip_factor",
    "own_rates",
    "site",
    "square_of",
    "unbias_of",
    "update",
]
