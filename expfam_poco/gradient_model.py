"""VSGD's model of the gradient: the public names of `expfam_poco.rule.gradient_model`."""

from expfam_poco.rule.gradient_model import (
    Belief,
    ConstantBelief,
    Families,
    Number,
    direction,
    expected_precision,
    init,
    init_constant,
    moved,
    precision_site,
    true_gradient,
    update,
    update_constant,
)

__all__ = [
    "Belief",
    "ConstantBelief",
    "Families",
    "Number",
    "direction",
    "expected_precision",
    "init",
    "init_constant",
    "moved",
    "precision_site",
    "true_gradient",
    "update",
    "update_constant",
]
