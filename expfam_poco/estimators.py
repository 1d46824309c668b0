r"""Estimators of natural gradients: where the loss is evaluated, what is measured, and what is made of it.

An estimator declares what it `needs` beside the loss ("loss": nothing; "gradient"; "hvp": Hessian-vector products;
"hessian": the Hessian block of each tensor, dense or its diagonal; "variations": the loss at variations of each draw)
and whether its natural gradient is `unbiased`. The optimizer shell measures and fills `Draws`; the family maps `Draws`
to a `Site`.

For Gaussians an estimator is an estimator of the curvature E_q[∇²ℓ]:

| name        | curvature                                   | cost of one evaluation        | unbiased |
|-------------|---------------------------------------------|-------------------------------|----------|
| `reparam`   | ∇ℓ(θ) (S(θ−m))ᵀ, Stein's identity ("price") | a gradient                    | yes      |
| `gradsq`    | κ ∇ℓ ∇ℓᵀ of the mini-batch                  | a gradient                    | no       |
| `hutchinson`| z ⊙ ∇²ℓ z, z = ±1                           | a gradient and products       | yes      |
| `exact`     | ∇²ℓ                                         | a gradient and d products     | yes      |
| `score`     | (any family) losses alone, leave-one-out    | losses, at least two draws    | yes      |

Sources: *SVRG and Beyond via Posterior Correction* App. B; Shen et al. 2024 (IVON); Hutchinson 1989; Kool et
al. 2019 (leave-one-out).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .family import ExponentialFamily


class Draws(NamedTuple):
    """K measured evaluations for one tensor of shape P.

    `noise` and `theta` are K × P, `loss` is K, `grad` is K × P or None, `curvature` is K × P (diagonal) or
    K × d × d (dense) or None, and `variations` K × M losses at each draw's M variations, or None.

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
    curvature: Tensor | None = None
    variations: Tensor | None = None

    def require_grad(self) -> Tensor:
        """The measured gradients; an error where the estimator measured none."""
        if self.grad is None:
            raise ValueError("draws.grad is None, but this natural gradient needs gradients; measure them.")
        return self.grad


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
    anchor_weight: ClassVar[float] = 1.0

    def check(self, family: ExponentialFamily) -> None:
        """Raise a ValueError where this estimator and the family do not go together."""

    def check_size(self, size: int) -> None:
        """Raise a ValueError where a tensor of so many weights is too much for this estimator."""

    def points(self, family: ExponentialFamily, state: Any, noise: Tensor) -> Tensor:
        """Where the loss is evaluated (K × P): samples of q, unless the estimator relaxes them."""
        return family.sample(state, noise)

    def curvature_of_gradient(self, grad: Tensor, ess: float, dense: bool) -> Tensor | None:
        """A curvature (like P, or d × d) made of the gradient alone, or None."""
        return None

    def factor_of_gradient(self, grad: Tensor, ess: float) -> Tensor | None:
        """A vector c (like P) made of the gradient alone, with c cᵀ the curvature, or None."""
        return None

    def curvature_of_product(self, probe: Tensor, product: Tensor, dense: bool) -> Tensor:
        """A curvature made of z and ∇²ℓ z; only asked of estimators that need "hvp"."""
        raise TypeError(f"{type(self).__name__} declares needs={self.needs!r} but makes nothing of products.")

    def variations(self, family: ExponentialFamily, theta: Tensor) -> Iterator[Tensor]:
        """Other weights (like P) whose losses are measured beside a draw's; only where it `needs` "variations"."""
        raise TypeError(f"{type(self).__name__} declares needs={self.needs!r} but names no variations.")

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Any:
        """The natural gradient as a `Site` at `state`."""
        return family.natural_gradient(state, draws)


@dataclass(frozen=True)
class Reparameterised(Estimator):
    """The family's own pathwise natural gradient; for Gaussians Stein's identity H = ∇ℓ (S(θ−m))ᵀ ("price").

    `anchor_weight` is 0.01, as in PC App. C: one draw of this H is so noisy that full weight can diverge.

    Example:
        >>> import expfam_poco as poco
        >>> poco.estimators.Reparameterised().anchor_weight
        0.01
    """

    needs_noise: ClassVar[bool] = True
    anchor_weight: ClassVar[float] = 0.01

    def check(self, family: ExponentialFamily) -> None:
        """Families whose statistics cannot be reparameterised name other estimators."""
        if family.default_estimator != "reparam" and "reparam" not in family.estimators:
            known = ", ".join(sorted(available(family)))
            raise ValueError(
                f"curvature='reparam' does not fit {type(family).__name__}, whose samples are not "
                f"differentiable; choose one of: {known}."
            )


@dataclass(frozen=True)
class SquaredGradient(Estimator):
    """κ ∇ℓ² of the mini-batch as curvature (`ivon-opt`'s "gradsq"): biased, cheap, never negative.

    It depends on the batch size: mega-batch chunks must be as large as the mini-batch, or h stays uncorrected.

    Example:
        >>> import torch, expfam_poco as poco
        >>> poco.estimators.SquaredGradient().curvature_of_gradient(torch.tensor([2.0]), 10.0, False)
        tensor([40.])
    """

    unbiased: ClassVar[bool] = False
    anchor_weight: ClassVar[float] = 0.01

    def check(self, family: ExponentialFamily) -> None:
        """Only families with a curvature have a use for it."""
        _require_curvature("gradsq", family, (*ENTRIES, "factor"))

    def curvature_of_gradient(self, grad: Tensor, ess: float, dense: bool) -> Tensor:
        """κ ∇ℓ² or κ ∇ℓ ∇ℓᵀ."""
        return ess * (torch.outer(grad, grad) if dense else grad * grad)

    def factor_of_gradient(self, grad: Tensor, ess: float) -> Tensor:
        """√κ ∇ℓ."""
        return grad * ess**0.5


@dataclass(frozen=True)
class Hutchinson(Estimator):
    """Curvature from Hessian-vector products with random signs z: z ⊙ ∇²ℓ z, or its symmetric dense form.

    Args:
        probes: products averaged in one evaluation.

    Example:
        >>> import torch, expfam_poco as poco
        >>> z, Hz = torch.tensor([1.0, -1.0]), torch.tensor([3.0, -2.0])
        >>> poco.estimators.Hutchinson().curvature_of_product(z, Hz, dense=False)
        tensor([3., 2.])
    """

    needs: ClassVar[str] = "hvp"
    probes: int = 1

    def __post_init__(self) -> None:
        """Refuse a number of probes below one."""
        if self.probes < 1:
            raise ValueError(f"probes={self.probes}: at least one product is needed; give a positive integer.")

    def check(self, family: ExponentialFamily) -> None:
        """Only families with a curvature have a use for it."""
        _require_curvature("hutchinson", family)

    def curvature_of_product(self, probe: Tensor, product: Tensor, dense: bool) -> Tensor:
        """z ⊙ Hz, or ½(Hz zᵀ + z (Hz)ᵀ)."""
        if not dense:
            return probe * product
        outer = torch.outer(product, probe)
        return 0.5 * (outer + outer.T)


@dataclass(frozen=True)
class Exact(Estimator):
    """The exact Hessian at the samples, diagonal or dense as the family keeps it: d products, small models.

    Example:
        >>> import expfam_poco as poco
        >>> poco.estimators.Exact().unbiased
        True
    """

    needs: ClassVar[str] = "hessian"

    def check(self, family: ExponentialFamily) -> None:
        """Only families with a curvature have a use for it."""
        _require_curvature("exact", family)


@dataclass(frozen=True)
class ScoreFunction(Estimator):
    """REINFORCE with a leave-one-out baseline: unbiased for every family, needs losses only and two draws.

    Its variance grows with the number of weights, since one loss must explain them all: for small models.

    Example:
        >>> import expfam_poco as poco
        >>> poco.estimators.ScoreFunction().needs
        'loss'
    """

    needs: ClassVar[str] = "loss"
    needs_noise: ClassVar[bool] = True
    independent_draws: ClassVar[bool] = True

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Any:
        """F⁻¹ times the average of advantage × (T(θ) − μ)."""
        if draws.loss.shape[0] < 2:
            raise ValueError(
                f"mc_samples={draws.loss.shape[0]}: the score-function estimator compares draws with each "
                "other; set mc_samples to 2 or more."
            )
        return family.score_natural_gradient(state, draws)


# Curvatures that are kept entry by entry of a Hessian.
ENTRIES = ("diagonal", "dense")
# What estimators need that take no gradients.
LOSSES_ALONE = ("loss", "variations")

GENERAL: dict[str, Callable[[], Estimator]] = {
    "reparam": Reparameterised,
    "gradsq": SquaredGradient,
    "hutchinson": Hutchinson,
    "exact": Exact,
    "score": ScoreFunction,
}


def available(family: ExponentialFamily) -> dict[str, Estimator]:
    """The estimators that fit a family, by name: its own first, then the general ones.

    Example:
        >>> import expfam_poco as poco
        >>> sorted(poco.estimators.available(poco.resolve_family("isotropic_gaussian")))
        ['reparam', 'score']
    """
    fitting = dict(family.estimators)
    for name, make in GENERAL.items():
        smooth = family.default_estimator == "reparam"
        wanted = {"score": True, "reparam": smooth, "gradsq": family.curvature != "none"}
        if wanted.get(name, family.curvature in ENTRIES) and name not in fitting:
            fitting[name] = make()
    return fitting


def resolve_estimator(choice: str | Estimator | None, family: ExponentialFamily) -> Estimator:
    """An estimator from a name, an object, or None (the family's default), checked against the family.

    Raises:
        ValueError: for an unknown name, or one that does not fit the family; the sentence lists those that do.
    """
    if isinstance(choice, Estimator):
        choice.check(family)
        return choice
    name = choice or family.default_estimator
    fitting = available(family)
    if name not in fitting:
        known = ", ".join(sorted(fitting))
        raise ValueError(f"curvature={name!r} is not an estimator for {type(family).__name__}; choose one of: {known}.")
    fitting[name].check(family)
    return fitting[name]


def curvature_of_gradient(estimator: Estimator, family: ExponentialFamily, grad: Tensor, ess: float) -> Tensor | None:
    """The curvature that the family keeps, where the estimator makes it of the gradient alone, else None."""
    if family.curvature in ENTRIES:
        return estimator.curvature_of_gradient(grad, ess, family.curvature == "dense")
    return estimator.factor_of_gradient(grad, ess) if family.curvature == "factor" else None


def _require_curvature(name: str, family: ExponentialFamily, kinds: tuple[str, ...] = ENTRIES) -> None:
    if family.curvature not in kinds:
        known = ", ".join(sorted(available(family)))
        raise ValueError(
            f"curvature={name!r} measures a curvature, which {type(family).__name__} does not keep; "
            f"choose one of: {known}."
        )
