r"""The one abstract class of the library: an exponential family.

A family is a set of densities  q_λ(θ) = h(θ) exp(⟨λ, T(θ)⟩ − A(λ)).  It is a frozen dataclass that holds its
hyperparameters, and it sees one tensor at a time: a parameter, whose every entry (or trailing
`event_dim` axes) is one weight with its own λ, or, for a `joint` family, the flat vector of a whole group.

Four kinds of values are traded, all NamedTuples of tensors:

* `Nat`: natural parameters λ, and `Mean`: expectation parameters μ = E_q[T] = ∇A(λ). Both have the fields of T.
* `State`: λ in the family's *chart*, the coordinates in which it is kept. Natural by default; Gaussians use
  (mean, precision), because natural coordinates lose everything in float32 when the precision is 10¹⁰.
* `Site`: a natural gradient ∇̃L = ∇_μ E_q[ℓ] in the same chart. As a function, ℓ̂(θ) = ⟨∇̃L, T(θ)⟩ (PC Eq. 6).

To define a family, name the statistics and write `statistics`, `log_partition`, `sample` and `centred_at`; the
rest has defaults derived from these. `expfam_poco.check_family` holds a family to its laws.

Source: *SVRG and Beyond via Posterior Correction* (PC below); Khan & Rue, *The Bayesian Learning Rule*, 2023.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family import derived, fields, hyperparameters, regression, supports
from expfam_poco.family.domains import check_declared, checkable, declared
from expfam_poco.family.draws import Draws, Estimator
from expfam_poco.family.noise import NoiseKey, noise, reflect


class Theta(NamedTuple):
    """The field of a family whose only statistic is θ itself."""

    theta: Tensor


@dataclass(frozen=True)
class ExponentialFamily(ABC):
    """An exponential family, its chart, and the maps that the Bayesian learning rule needs.

    Class attributes, all with defaults:

    * `Statistics`: the NamedTuple of T; `Nat`, `Mean`, `State`, `Site` are the same type unless given.
    * `event_dim`: number of trailing axes that make one weight (0: every entry is one).
    * `statistic_dims`: number of trailing axes of one weight in each field of T (default: `event_dim`).
    * `joint`: the family sees the flat vector of all parameters of its group.
    * `fixed_point`: every member has the same point, and weights elsewhere are refused.
    * `levels`: the values of a weight where they are finitely many, else None;
    * `support`: the constraint on θ; `domain`: constraints on fields of `State`. A missing field is real, but may be
      bounded together with others: the derived step asks A. `constraints.real` says that it is free.
    * `per_weight`: where a weight has several entries, hyperparameters that are tensors with values for each weight.
    * `noise_kind`: "normal", "logistic" or "uniform", the standardised noise that `sample` transforms.
    * `noise_dims`: further axes of the noise of one entry of θ, for samples that need several numbers each.
    * `delta_method`: natural gradients at the noise's median are those of the delta method; else the family learns its
      width from the noise, and noise="zero" is refused.
    * `momentum_block`: the fields of `Site` that momentum averages (default: all).
    * `curvature`: what an estimator must measure beside the gradient: "none", "diagonal", "dense" (of a joint
      family), or "pairs" (no entries of a Hessian, which is never made).
    * `curved`: the natural parameters are part of an ambient family's (`curved.CurvedFamily`).
    * `default_estimator`, `estimators`: the estimator by default, and the family's own, by name.

    Example:
        >>> from typing import NamedTuple
        >>> import torch, expfam_poco as poco
        >>> class Exponential(poco.ExponentialFamily):
        ...     support = torch.distributions.constraints.positive
        ...     domain = {"theta": torch.distributions.constraints.less_than(0.0)}
        ...     noise_kind = "uniform"
        ...     def statistics(self, theta): return self.Mean(theta)
        ...     def log_partition(self, nat): return -torch.log(-nat.theta)
        ...     def sample(self, state, noise): return torch.log(noise) / state.theta
        ...     def centred_at(self, theta, precision=None): return self.State(-1.0 / theta)
        >>> family = Exponential()
        >>> family.to_mean(family.centred_at(torch.tensor([2.0, 0.5]))).theta
        tensor([2.0000, 0.5000])
    """

    Statistics: ClassVar[type[Any]] = Theta
    Nat: ClassVar[type[Any]] = Theta
    Mean: ClassVar[type[Any]] = Theta
    State: ClassVar[type[Any]] = Theta
    Site: ClassVar[type[Any]] = Theta
    event_dim: ClassVar[int] = 0
    statistic_dims: ClassVar[tuple[int, ...]] = ()
    joint: ClassVar[bool] = False
    curved: ClassVar[bool] = False
    support: ClassVar[constraints.Constraint] = constraints.real
    domain: ClassVar[Mapping[str, constraints.Constraint]] = {}
    levels: ClassVar[tuple[float, ...] | None] = None
    fixed_point: ClassVar[bool] = False
    per_weight: ClassVar[tuple[str, ...]] = ()
    noise_kind: ClassVar[str] = "normal"
    noise_dims: ClassVar[tuple[int, ...]] = ()
    delta_method: ClassVar[bool] = False
    momentum_block: ClassVar[tuple[str, ...]] = ()
    curvature: ClassVar[str] = "none"
    default_estimator: ClassVar[str] = "reparam"
    estimators: ClassVar[Mapping[str, Estimator]] = {}
    _natural_chart: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a family that names only `Statistics` inherit the other three value types from it."""
        super().__init_subclass__(**kwargs)
        own = cls.__dict__
        hyperparameters.declare(cls)
        check_declared(own, cls.__name__)
        if isinstance(own.get("domain"), Mapping):
            cls.domain = checkable(own["domain"])
        if "Statistics" in own:
            for name in ("Nat", "Mean", "State", "Site"):
                if name not in own:
                    setattr(cls, name, own["Statistics"])
        cls.domain = declared(cls)
        if "momentum_block" not in own and "Site" in cls.__dict__:
            cls.momentum_block = cls.Site._fields
        if not cls.momentum_block:
            cls.momentum_block = cls.Site._fields
        ways = (cls.to_nat is ExponentialFamily.to_nat, cls.from_nat is ExponentialFamily.from_nat)
        cls._natural_chart = all(ways)
        if "statistic_dims" not in own and len(cls.statistic_dims) != len(cls.Nat._fields):
            cls.statistic_dims = (cls.event_dim,) * len(cls.Nat._fields)

    # ---- what defines the family -------------------------------------------------------------------------

    @abstractmethod
    def statistics(self, theta: Tensor) -> Any:
        """T(θ) as `Mean`, for θ of any batch shape."""

    @abstractmethod
    def log_partition(self, nat: Any) -> Tensor:
        """A(λ) = log ∫ h(θ) exp⟨λ, T(θ)⟩ dθ, one value per weight. Differentiable twice."""

    @abstractmethod
    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """θ ~ q from standardised noise (K × P × noise_dims → K × P): deterministic, a member of the support.

        Where it is differentiable in the state, the default `natural_gradient` differentiates through it.
        """

    @abstractmethod
    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Any:
        """The `State` of the member centred at θ; `precision` is the strength (None: the family's own)."""

    def for_shape(self, shape: torch.Size) -> ExponentialFamily:
        """The family of a parameter of this shape: itself, unless what one weight is depends on the shape."""
        return self

    def parts_of(self, names: Sequence[str] | None) -> list[tuple[ExponentialFamily, dict[str, Any], list[int]]] | None:
        """What an optimizer splits a group of these parameters into: families, hyperparameters, and which they have.

        None: nothing, all parameters have this family.
        """
        return None

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """log h(θ), one value per weight; 0 unless overridden."""
        return theta.new_zeros(self._batch(theta))

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """E_q[log h(θ)]: 0 where h = 1, else by quadrature (weights of one number) or from some ten thousand draws."""
        constant = type(self).log_base_measure is ExponentialFamily.log_base_measure
        return supports.expected_log_base_measure(self, state, constant=constant)

    # ---- coordinates --------------------------------------------------------------------------------------

    def to_mean(self, nat: Any) -> Any:
        """μ = ∇A(λ), by automatic differentiation unless overridden."""
        return derived.gradient_of_log_partition(self, nat)

    def to_natural(self, mean: Any) -> Any:
        """λ with ∇A(λ) = μ, by a damped Newton method on the convex dual unless overridden.

        Raises:
            ValueError: if `mean` lies outside the mean domain, so that no λ has it.
        """
        return derived.invert_mean(self, mean)

    def to_nat(self, state: Any) -> Any:
        """Chart → natural coordinates."""
        return state

    def from_nat(self, nat: Any) -> Any:
        """Natural → chart coordinates."""
        return nat

    def site_to_nat(self, site: Any, state: Any) -> Any:
        """A natural gradient taken at `state`: chart → natural coordinates."""
        return site

    def site_from_nat(self, site: Any, state: Any) -> Any:
        """A natural gradient taken at `state`: natural → chart coordinates."""
        return site

    def reanchor(self, site: Any, state_from: Any, state_to: Any) -> Any:
        """The same site expressed at another state: identity where the chart is natural."""
        return site

    def carry(self, site: Any, state_from: Any, state_to: Any) -> Any:
        """`reanchor` without the part that depends on where the site is anchored: identity unless the family is curved.

        A curved family's sites are tangent vectors, which have to be brought into the other state's tangent space
        before they can be added to sites there.
        """
        return site

    # ---- noise and samples -------------------------------------------------------------------------------

    def noise(
        self,
        shape: torch.Size | tuple[int, ...],
        draws: int,
        key: NoiseKey,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standardised noise, `draws` × `shape` × `noise_dims`: a function of the key alone, never of λ."""
        return noise(self.noise_kind, (*shape, *self.noise_dims), draws, key, dtype=dtype, device=device)

    def reflect(self, noise: Tensor) -> Tensor:
        """The antithetic partner of a noise: equally distributed, on the other side of the median."""
        return reflect(self.noise_kind, noise)

    def neutral_noise(self, like: Tensor) -> Tensor:
        """The noise of the delta method for weights `like`: the median of the standardised noise."""
        return like.new_full((*like.shape, *self.noise_dims), 0.5 if self.noise_kind == "uniform" else 0.0)

    def point(self, state: Any) -> Tensor:
        """What the model holds between steps: E_q[θ]."""
        mean = self.to_mean(self.to_nat(state))
        if not hasattr(mean, "theta"):
            raise TypeError(
                f"{type(self).__name__} has no statistic named theta, so its point estimate is unknown: "
                "define point(state)."
            )
        return torch.as_tensor(mean.theta)

    def recentre(self, state: Any, theta: Tensor) -> Any:
        """`state` moved to a new centre, as when the model's weights were loaded from elsewhere."""
        return self.centred_at(theta)

    def reference_like(self, like: Tensor) -> Tensor:
        """A θ in the middle of the support with the shape of `like`: 0, 1 for positive weights, …

        Raises:
            NotImplementedError: for a support of which nothing is known.
        """
        return supports.middle_of(self.support, like, type(self).__name__)

    def middle(self, statistics: Any) -> Tensor:
        """A θ in the middle of the support for every weight of a `Nat` or `Mean`.

        Where a weight has several entries, its size is that of a statistic with as many axes, or the support's own.
        """
        return self.reference_like(supports.like_theta(self, statistics))

    def distribution(self, state: Any) -> Any:
        """q as a Pyro distribution; the default takes density and samples from the family itself."""
        from expfam_poco.family.distribution import FamilyDistribution  # Pyro takes long to import

        return FamilyDistribution(self, state)

    def marginal(self, state: Any, start: int, stop: int) -> Any:
        """Of a joint family: the Pyro distribution of the entries `start` … `stop` − 1 of θ, one event.

        Raises:
            NotImplementedError: unless the family says it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no marginals: define marginal(state, start, stop), or sample the joint q."
        )

    # ---- the Bayesian learning rule ----------------------------------------------------------------------

    def natural_gradient(self, state: Any, draws: Draws) -> Any:
        """∇_μ E_q[ℓ] from measured gradients, averaged over the draws.

        Default: the pathwise derivative ∇_λ E_q[ℓ(θ(λ, ε))], then a solve with the Fisher matrix ∇²A(λ),
        one k × k block per weight (k statistics).
        """
        return derived.pathwise_natural_gradient(self, state, draws)

    def score_natural_gradient(self, state: Any, draws: Draws) -> Any:
        """∇_μ E_q[ℓ] from two or more losses alone: F⁻¹ (1/K) Σ_k (ℓ_k − mean_{j≠k} ℓ_j)(T(θ_k) − μ)."""
        return derived.score_natural_gradient(self, state, draws)

    def regressed_natural_gradient(self, state: Any, draws: Draws) -> Any:
        """The same with F estimated from the draws' own statistics: exact for ℓ = ⟨c, T⟩, else biased by O(1/K)."""
        return regression.pathwise(self, state, draws)

    def regressed_score_natural_gradient(self, state: Any, draws: Draws) -> Any:
        """The same from losses alone: Cov(T, T)⁻¹ Cov(T, ℓ) over the draws."""
        return regression.score(self, state, draws)

    def least_draws(self, shape: torch.Size) -> int:
        """How many draws `regressed_natural_gradient` needs for a tensor of this shape: as many slopes as unknowns."""
        return -(-regression.number_of_statistics(self, shape) // regression.degrees_of_freedom(self, shape))

    def kl_gradient(self, state: Any, prior: Any) -> Any:
        """∇_μ KL(q ‖ p₀) = λ − λ₀ for a prior in the family, as a site at `state`."""
        difference = fields.subtract(self.to_nat(state), self.to_nat(prior))
        return self.site_from_nat(self.Site(*difference), state)

    def retract(
        self,
        state: Any,
        direction: Any,
        rates: Any,
        *,
        variant: str = "second_order",
        clip_radius: float = math.inf,
    ) -> Any:
        """λ − rate · direction, kept in the domain by the variant "second_order", the exact rule if "plain".

        A field x bounded on one side keeps its slack s = |x − bound| > 0 through s ← s + d + d²/(2s), a field without
        a bound moves linearly; for intervals, matrices, charts and domains that couple fields see `derived.retracted`.
        `clip_radius` limits every entry of the direction.
        """
        nat = self.to_nat(state)
        steps = []
        for slope, rate in zip(self.site_to_nat(direction, state), rates, strict=True):
            if clip_radius < math.inf:
                slope = slope.clamp(-clip_radius, clip_radius)
            steps.append(-rate * slope)
        if variant == "plain":
            return self.from_nat(self.Nat(*(value + step for value, step in zip(nat, steps, strict=True))))
        return derived.retracted(self, state, self.Nat(*steps))

    def extrapolate(self, state: Any, previous: Any, factor: float | Tensor) -> Any:
        """λ + k (λ − λ_previous) on the momentum block, k times the last step beyond `state`; other blocks are kept.

        Default: the retraction along ∇̃KL(λ ‖ λ_previous) = λ − λ_previous with rate −k, so that it stays in the domain.
        At k = 0 it is `state` bit for bit.
        """
        direction = self.kl_gradient(state, previous)
        moved = self.retract(state, fields.scale(direction, -1.0), self.per_block(factor, 0.0))
        if not isinstance(factor, Tensor):
            return state if factor == 0.0 else moved
        still = (factor == 0.0).to(state[0].device)  # coordinates that are not the chart's come back rounded
        return fields.map_fields(lambda new, old: torch.where(still, old, new), moved, state)

    def in_domain(self, state: Any) -> Tensor:
        """A boolean tensor without dimensions: every field is finite and satisfies its constraint."""
        inside = fields.all_finite(state)
        for name, constraint in self.domain.items():
            inside = inside & constraint.check(getattr(state, name)).all()
        return inside

    def per_block(self, first: float | Tensor, second: float | Tensor) -> Any:
        """A `Site` of numbers: `first` for the fields of `momentum_block`, `second` for the others."""
        return self.Site(*[first if name in self.momentum_block else second for name in self.Site._fields])

    # ---- what every family gets for free -----------------------------------------------------------------

    def log_prob(self, state: Any, theta: Tensor) -> Tensor:
        """log q(θ) = log h(θ) + ⟨λ, T(θ)⟩ − A(λ), one value per weight."""
        nat = self.to_nat(state)
        linear = self.inner(nat, self.statistics(theta))
        return self.log_base_measure(theta) + linear - self.log_partition(nat)

    def entropy(self, state: Any) -> Tensor:
        """−E_q[log q] = A(λ) − ⟨λ, μ⟩ − E_q[log h], one value per weight."""
        nat = self.to_nat(state)
        linear = self.inner(nat, self.to_mean(nat))
        return self.log_partition(nat) - linear - self.expected_log_base_measure(state)

    def kl(self, state: Any, prior: Any) -> Tensor:
        """KL(q ‖ p₀) = A(λ₀) − A(λ) + ⟨λ − λ₀, μ⟩, one value per weight."""
        nat, nat_prior = self.to_nat(state), self.to_nat(prior)
        linear = self.inner(fields.subtract(nat, nat_prior), self.to_mean(nat))
        return self.log_partition(nat_prior) - self.log_partition(nat) + linear

    def log_ratio(self, state: Any, prior: Any, theta: Tensor) -> Tensor:
        """log q(θ)/p₀(θ) up to a constant, one value per weight: ⟨λ − λ₀, T(θ)⟩, for the base measure cancels."""
        return self.inner(fields.subtract(self.to_nat(state), self.to_nat(prior)), self.statistics(theta))

    def log_ratio_gradient(self, state: Any, prior: Any, theta: Tensor) -> Tensor:
        """∇_θ log q(θ)/p₀(θ), shaped like θ; by automatic differentiation unless overridden."""
        return derived.log_ratio_gradient(self, state, prior, theta)

    def score(self, state: Any, theta: Tensor) -> Any:
        """∇_λ log q(θ) = T(θ) − μ."""
        return fields.subtract(self.statistics(theta), self.to_mean(self.to_nat(state)))

    def expectation(self, state: Any) -> Tensor:
        """E_q[θ]: where θ is a statistic, its μ.

        Raises:
            NotImplementedError: where it is none, and the family says nothing else.
        """
        mean = self.to_mean(self.to_nat(state))
        if not hasattr(mean, "theta"):
            raise NotImplementedError(f"{type(self).__name__} has no statistic named theta; average samples.")
        return torch.as_tensor(mean.theta)

    def variance(self, state: Any) -> Tensor:
        """Var_q(θ) of every entry: where θ is a statistic, ∂²A/∂λ² for its natural parameter.

        Raises:
            NotImplementedError: where it is none, and the family says nothing else.
        """
        return derived.variance(self, state)

    def mode(self, state: Any) -> Tensor:
        """Where the density q(θ) is largest.

        Raises:
            NotImplementedError: unless the family says it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no mode: define mode(state).")

    def fisher_vector_product(self, nat: Any, vector: Any) -> Any:
        """∇²A(λ) v, by differentiating ⟨∇A(λ), v⟩."""
        return derived.fisher_vector_product(self, nat, vector)

    def fisher_solve(self, nat: Any, vector: Any) -> Any:
        """F(λ)⁻¹ v: a gradient in λ becomes a natural gradient. One k × k solve per weight unless overridden."""
        return derived.fisher_solve(self, nat, vector)

    def inner(self, nat: Any, mean: Any) -> Tensor:
        """⟨λ, μ⟩, summed over fields and over the axes of one weight."""
        total: Tensor | None = None
        for value, statistic, dims in zip(nat, mean, self.statistic_dims, strict=True):
            product = value * statistic
            part = product.flatten(-dims).sum(-1) if dims else product
            total = part if total is None else total + part
        assert total is not None
        return total

    def _batch(self, theta: Tensor) -> torch.Size:
        return theta.shape[: theta.ndim - self.event_dim]
