r"""Estimators of natural gradients: where the loss is evaluated, what is measured, and what is made of it.

An estimator declares what it `needs` beside the loss ("loss": nothing; "gradient"; "hvp": Hessian-vector products;
"hessian": the Hessian block of each tensor, dense or its diagonal; "variations": the loss at variations of each draw)
and whether its natural gradient is `unbiased`. The engine measures and fills `Draws`; the family maps `Draws`
to a `Site`.

For Gaussians an estimator is an estimator of the curvature E_q[∇²ℓ]:

| name        | curvature                                   | cost of one evaluation        | unbiased |
|-------------|---------------------------------------------|-------------------------------|----------|
| `reparam`   | ∇ℓ(θ) (S(θ−m))ᵀ, Stein's identity ("price") | a gradient                    | yes      |
| `gradsq`    | κ ∇ℓ ∇ℓᵀ of the mini-batch                  | a gradient                    | no       |
| `hutchinson`| z ⊙ ∇²ℓ z, z = ±1                           | a gradient and products       | yes      |
| `exact`     | ∇²ℓ                                         | a gradient and d products     | yes      |
| `score`     | (any family) losses alone, leave-one-out    | losses, at least two draws    | yes      |

`regression`, `exact_regression` and `score_regression` divide by a Fisher matrix of the same draws
(`family.regression`).

Sources: *SVRG and Beyond via Posterior Correction* App. B; Shen et al. 2024 (IVON); Hutchinson 1989; Kool et
al. 2019 (leave-one-out).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Size, Tensor

from expfam_poco.arguments import shown
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import ENTRIES, Draws, Estimator, require_draws
from expfam_poco.family.regression import number_of_statistics


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
        >>> poco.estimators.SquaredGradient().pair(torch.tensor([2.0]), 10.0)
        (tensor([20.]), tensor([2.]))
    """

    unbiased: ClassVar[bool] = False
    anchor_weight: ClassVar[float] = 0.01

    def check(self, family: ExponentialFamily) -> None:
        """Only families with a curvature have a use for it."""
        _require_curvature("gradsq", family)

    def pair(self, grad: Tensor, ess: float) -> tuple[Tensor, Tensor]:
        """κ ∇ℓ ∇ℓᵀ."""
        return ess * grad, grad


@dataclass(frozen=True)
class Hutchinson(Estimator):
    """Curvature from Hessian-vector products with random signs z: the pairs (∇²ℓ z, z).

    Args:
        probes: products averaged in one evaluation.

    Example:
        >>> import expfam_poco as poco
        >>> poco.estimators.Hutchinson(probes=2).needs
        'hvp'
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
        _require_curvature("exact", family, ENTRIES)


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


@dataclass(frozen=True)
class Regression(Estimator):
    """F⁻¹ ∇_λ E_q[ℓ] with F from the same draws: exact for losses in the span of T, else biased by O(1/K).

    With k statistics of e entries it takes k/e draws at least: two of a Gamma, a Beta, a Dirichlet or a diagonal
    Gaussian, d + 1 of a full Gaussian over d weights. A few more make a far smaller error on other losses.

    Example:
        >>> import torch, expfam_poco as poco
        >>> rate = torch.nn.Parameter(torch.tensor([4.0], dtype=torch.float64))
        >>> prior = poco.resolve_family("gamma").State(torch.tensor([2.0]), torch.tensor([-0.5]))
        >>> opt = poco.PosteriorCorrected([rate], "gamma", lr=1.0, ess=1.0, prior=prior, curvature="regression",
        ...     mc_samples=2, retraction="plain", seed=0)
        >>> _ = opt.step(lambda: (10 * rate - 30 * rate.log()).sum())       # 30 events in 10 units of time
        >>> (q,) = opt.posterior_states().values()
        >>> [round(value.item(), 6) for value in q]                         # shape 2 + 30, minus rate 0.5 + 10
        [32.0, -10.5]
    """

    unbiased: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    anchor_weight: ClassVar[float] = 0.01

    def check(self, family: ExponentialFamily) -> None:
        """Families with a pathwise derivative whose statistics are all their own."""
        if family.default_estimator != "reparam" or family.curved:
            known = ", ".join(sorted(available(family)))
            raise ValueError(
                f"curvature='regression' does not fit {type(family).__name__}, which is "
                f"{'curved' if family.curved else 'not differentiable in its samples'}; choose one of: {known}."
            )

    def least_draws(self, family: ExponentialFamily, shape: Size) -> int:
        """As many slopes as statistics."""
        return family.least_draws(shape)

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Any:
        """F̂⁻¹ (1/K) Σ_k (∂θ_k/∂λ)ᵀ ∇ℓ(θ_k)."""
        require_draws(self, family, draws.theta.shape[1:], len(draws.theta))
        return family.regressed_natural_gradient(state, draws)


@dataclass(frozen=True)
class ExactRegression(Regression):
    """`Regression` of a Gaussian whose curvature is the measured Hessian: a single draw is exact for quadratic losses.

        g = mean(∇ℓ(θ_k) − H_k' (θ_k − m)),   H = mean ∇²ℓ(θ_k),   H_k' the mean of the other draws' Hessians

    From two draws it is unbiased. From a single one, whose own Hessian is all there is, it has a bias of
    E[∇²ℓ (θ − m)], half a standard deviation on a small logistic regression: for losses that are nearly quadratic.

    Example:
        >>> import expfam_poco as poco
        >>> poco.estimators.ExactRegression().needs
        'hessian'
    """

    needs: ClassVar[str] = "hessian"
    anchor_weight: ClassVar[float] = 1.0

    def check(self, family: ExponentialFamily) -> None:
        """Only for families with a curvature that is kept entry by entry."""
        _require_curvature("exact_regression", family, ENTRIES)

    def least_draws(self, family: ExponentialFamily, shape: Size) -> int:
        """One."""
        return 1


@dataclass(frozen=True)
class ScoreRegression(Estimator):
    """The regression of the losses on every weight's statistics: for any family, from losses alone.

    With k statistics it takes k + 1 draws at least. It is exact for ⟨c, T⟩ of a single weight; the losses of others are
    noise, as to `score`. Directions in which discrete draws do not differ get nothing, so that it is biased towards 0.

    Example:
        >>> import expfam_poco as poco
        >>> poco.estimators.ScoreRegression().needs
        'loss'
    """

    needs: ClassVar[str] = "loss"
    unbiased: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    def check(self, family: ExponentialFamily) -> None:
        """Families whose statistics are all their own."""
        if family.curved:
            known = ", ".join(sorted(available(family)))
            raise ValueError(
                f"curvature='score_regression' does not fit {type(family).__name__}, which is curved; choose one of: "
                f"{known}."
            )

    def least_draws(self, family: ExponentialFamily, shape: Size) -> int:
        """One more than statistics, for the constant."""
        return number_of_statistics(family, shape) + 1

    def natural_gradient(self, family: ExponentialFamily, state: Any, draws: Draws) -> Any:
        """Cov(T, T)⁻¹ Cov(T, ℓ)."""
        require_draws(self, family, draws.theta.shape[1:], len(draws.theta))
        return family.regressed_score_natural_gradient(state, draws)


GENERAL: dict[str, Callable[[], Estimator]] = {
    "reparam": Reparameterised,
    "gradsq": SquaredGradient,
    "hutchinson": Hutchinson,
    "exact": Exact,
    "score": ScoreFunction,
    "regression": Regression,
    "exact_regression": ExactRegression,
    "score_regression": ScoreRegression,
}


def available(family: ExponentialFamily) -> dict[str, Estimator]:
    """The estimators that fit a family, by name: its own first, then the general ones.

    Example:
        >>> import expfam_poco as poco
        >>> sorted(poco.estimators.available(poco.resolve_family("isotropic_gaussian")))
        ['regression', 'reparam', 'score', 'score_regression']
    """
    fitting = dict(family.estimators)
    for name, make in GENERAL.items():
        smooth = family.default_estimator == "reparam"
        entries, uncurved = family.curvature in ENTRIES, not family.curved
        wanted = {"score": True, "reparam": smooth, "exact": entries, "exact_regression": entries}
        wanted |= {"regression": smooth and uncurved, "score_regression": uncurved}
        if wanted.get(name, family.curvature != "none") and name not in fitting:
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
    if choice is not None and not isinstance(choice, str):
        raise TypeError(f"curvature={shown(choice)} is neither an estimator's name nor an Estimator, nor None.")
    name = family.default_estimator if choice is None else choice
    fitting = available(family)
    if name not in fitting:
        known = ", ".join(sorted(fitting))
        raise ValueError(f"curvature={name!r} is not an estimator for {type(family).__name__}; choose one of: {known}.")
    fitting[name].check(family)
    return fitting[name]


def _require_curvature(name: str, family: ExponentialFamily, kinds: tuple[str, ...] = (*ENTRIES, "pairs")) -> None:
    if family.curvature not in kinds:
        known = ", ".join(sorted(available(family)))
        raise ValueError(
            f"curvature={name!r} measures a curvature, which {type(family).__name__} does not keep; "
            f"choose one of: {known}."
        )
