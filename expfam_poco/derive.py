"""What a log-partition alone gives: public names of `expfam_poco.family.derived`, for families of one's own."""

from expfam_poco.family.derived import (
    fisher,
    fisher_solve,
    fisher_vector_product,
    gradient_of_log_partition,
    invert_mean,
    leave_one_out,
    pathwise_natural_gradient,
    retracted,
    score_natural_gradient,
)

__all__ = [
    "fisher",
    "fisher_solve",
    "fisher_vector_product",
    "gradient_of_log_partition",
    "invert_mean",
    "leave_one_out",
    "pathwise_natural_gradient",
    "retracted",
    "score_natural_gradient",
]
