"""What an estimator is, and what it measures: where the loss is evaluated, and what a natural gradient is made of."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Size, Tensor

if TYPE_CHECKING:
    from expfam_poco.family.base import ExponentialFamily

# Curvatures that are kept entry by entry of a Hessian.
ENTRIES = ("diagonal", "dense")
# What estimators need that take no gradients.
LOSSES_ALONE = ("loss", "variations")


class Draws(NamedTuple):
    """K measured evaluations for one tensor of shape P.

    `noise` and `theta` are K × P, `loss` is K, `grad` is K × P or None, and `variations` K × M losses at each draw's M
    variations, or None. What was measured of the curvature: `hessian` is K × P (its diagonal) or K × d × d, or None;
    `pairs` are a and b, each any number × P, of which the curvature is the mean of ½(a bᵀ + b aᵀ), or None.

    Example:
        >>> import torch, expfam_poco as poco
        >>> family = poco.resolve_family("diagonal_gaussian")
        >>> state = family.centred_at(torch.zeros(2))
        >>> noise = torch.ones(1, 2)
        >>> draws = poco.Draws(noise, family.sample(state, noise), torch.ones(1), grad=torch.full((1, 2), 3.0))
        >>> family.natural_gradient(state, draws).gradient
        tensor([3., 3.])
    """

    noise: Tensor
    theta: Tensor
    loss: Tensor
    grad: Tensor | None = None
    hessian: Tensor | None = None
    pairs: tuple[Tensor, Tensor] | None = None
    variations: Tensor | None = None

    def require_grad(self) -> Tensor:
        """The measured gradients; an error where the estimator measured none."""
        if self.grad is None:
            raise ValueError("draws.grad is None, but this natural gradient needs gradients; measure them.")
        return self.grad


def mean_of(draws: Tensor) -> Tensor:
    """The mean over the first axis; a single draw is its own mean, and stays where it is."""
    return draws[0] if draws.shape[0] == 1 else draws.mean(0)


@dataclass(frozen=True)
class Estimator(ABC):
    """The base of all estimators; a plug-in overrides what differs.

    Example:
        >>> import expfam_poco as poco
        >>> poco.estimators.Exact().needs
        'hessian'
    """

    needs: ClassVar[str] = "gradient"
    unbiased: ClassVar[bool] = True
    needs_noise: ClassVar[bool] = False
    independent_draws: ClassVar[bool] = False
    antithetic: ClassVar[bool] = False
    compares: ClassVar[bool] = False  # its natural gradient is no mean over draws
    anchor_weight: ClassVar[float] = 1.0

    def check(self, family: ExponentialFamily) -> None:
        """Raise a ValueError where this estimator and the family do not go together."""

    def check_size(self, size: int) -> None:
        """Raise a ValueError where a tensor of so many weights is too much for this estimator."""

    def least_draws(self, family: ExponentialFamily, shape: Size) -> int:
        """How many draws it needs for a tensor of this shape."""
        return 2 if self.independent_draws else 1

    def points(self, family: ExponentialFamily, state: Any, noise: Tensor) -> Tensor:
        """Where the loss is evaluated (K × P): samples of q, unless the estimator relaxes them."""
        return family.sample(state, noise)

    def pair(self, grad: Tensor, ess: float) -> tuple[Tensor, Tensor] | None:
        """(a, b), like P, made of the gradient alone, with ½(a bᵀ + b aᵀ) the curvature; or None."""
        return None

    def variations(self, family: ExponentialFamily, theta: Tensor) -> Iterator[Tensor]:
        """Other weights (like P) whose losses are measured beside a draw's; only where it `needs` "variations"."""
        raise TypeError(f"{type(self).__name__} declares needs={self.needs!r} but names no variations.")

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Any:
        """The natural gradient as a `Site` at `state`."""
        return family.natural_gradient(state, draws)


def require_draws(estimator: Estimator, family: ExponentialFamily, shape: Size, draws: int) -> None:
    """Refuse fewer draws than an estimator needs.

    Raises:
        ValueError: names the number.
    """
    least = estimator.least_draws(family, shape)
    if draws < least:
        raise ValueError(
            f"mc_samples: {type(estimator).__name__} of {type(family).__name__} needs at least {least} draws in an "
            f"evaluation, and there are {draws}; set mc_samples to {least} or more (pairs of noise='antithetic' count "
            "twice)."
        )
