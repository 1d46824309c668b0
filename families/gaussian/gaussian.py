r"""Gaussian families N(m, S⁻¹), kept as (mean, precision).

With λ = (S m, −S/2) the natural gradient of E_q[ℓ] is (E[∇ℓ] − E[∇²ℓ] m, ½ E[∇²ℓ]) (PC Eq. 20, m the mean of
q). In the chart (m, S) a site is (gradient g, curvature H) *at a point*: g − H m and ½ H in natural
coordinates. Moving it, (g, H) at m ↦ (g + H (m' − m), H) at m'. Along the direction D = (D_g, D_H) of a step
the precision moves first and the mean after it, with the new precision:

    plain:         S ← S + η_S D_H                                  (exact; may leave the domain)
    second order:  S ← S + η_S D_H + ½ η_S² D_H S⁻¹ D_H             (Lin et al. 2020; positive for any D_H)
    mean:          m ← m − η_m clip(S⁻¹ D_g, ξ)

where D_g = S₀ (m − m₀) + N ĝ and D_H = S₀ − S + N ĥ. IVON is `DiagonalGaussian` with rates (η, 1−β₂) and
momentum on the gradient, VON is `FullGaussian` with the same code, SVRG is `IsotropicGaussian`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family import fields, regression
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.derived import leave_one_out
from expfam_poco.family.draws import Draws, mean_of

from .factors import cholesky, positive_definite

LOG_2PI = math.log(2.0 * math.pi)


class GaussianStatistics(NamedTuple):
    """T(θ) = (θ, θ²) or (θ, θθᵀ), and the natural or expectation parameters that belong to it."""

    theta: Tensor
    theta_theta: Tensor


class GaussianState(NamedTuple):
    """The chart of a Gaussian: mean m and precision S (like m, d × d, or one number)."""

    mean: Tensor
    precision: Tensor


class GaussianSite(NamedTuple):
    """A natural gradient in the chart: gradient g = E_q[∇ℓ] and curvature H = E_q[∇²ℓ], at the mean of q."""

    gradient: Tensor
    curvature: Tensor


def beyond(state: Any, previous: Any, factor: float | Tensor) -> GaussianState:
    """m + k (m − m_previous), exactly m at k = 0 as long as both are finite; the precision is kept."""
    return GaussianState(state.mean + factor * (state.mean - previous.mean), state.precision)


class _CurvedGaussian(ExponentialFamily):
    """What diagonal and full Gaussians share, written with the six operations on precisions below."""

    Statistics = GaussianStatistics
    State = GaussianState
    Site = GaussianSite
    momentum_block = ("gradient",)

    @abstractmethod
    def _apply(self, precision: Tensor, vector: Tensor) -> Tensor:
        """S v."""

    @abstractmethod
    def _solve(self, precision: Tensor, vector: Tensor) -> Tensor:
        """S⁻¹ v."""

    @abstractmethod
    def _whiten(self, precision: Tensor, noise: Tensor) -> Tensor:
        """L ε with S = L Lᵀ, so that S(θ−m) = L ε at the sample θ = m + L⁻ᵀ ε."""

    @abstractmethod
    def _colour(self, precision: Tensor, noise: Tensor) -> Tensor:
        """L⁻ᵀ ε."""

    @abstractmethod
    def _outer(self, first: Tensor, second: Tensor) -> Tensor:
        """The symmetric part of first secondᵀ (its diagonal, for a diagonal family)."""

    @abstractmethod
    def _sandwich(self, curvature: Tensor, precision: Tensor) -> Tensor:
        """H S⁻¹ H."""

    @abstractmethod
    def _regressed(self, precision: Tensor, grad: Tensor, noise: Tensor) -> Tensor:
        """H of the regression of centred gradients on centred noises, K × P each."""

    @abstractmethod
    def _congruent(self, precision: Tensor, matrix: Tensor) -> Tensor:
        """L B Lᵀ."""

    @abstractmethod
    def _log_det(self, precision: Tensor) -> Tensor:
        """log |S| of one weight."""

    @abstractmethod
    def _covariance(self, precision: Tensor) -> Tensor:
        """S⁻¹ of a valid precision (or covariance)."""

    def statistics(self, theta: Tensor) -> GaussianStatistics:
        """(θ, θθᵀ), or (θ, θ²) entry by entry."""
        return GaussianStatistics(theta, self._outer(theta, theta))

    def log_partition(self, nat: Any) -> Tensor:
        """½ mᵀ S m − ½ log |S| + ½ d log 2π, with S m = nat.theta and S = −2 nat.theta_theta."""
        precision = -2.0 * nat.theta_theta
        quadratic = nat.theta * self._solve(precision, nat.theta)
        dims = self.event_dim
        quadratic = quadratic.sum(-1) if dims else quadratic
        size = nat.theta.shape[-1] if dims else 1
        return 0.5 * (quadratic - self._log_det(precision) + size * LOG_2PI)

    def to_mean(self, nat: Any) -> GaussianStatistics:
        """(m, S⁻¹ + m mᵀ)."""
        state = self.from_nat(nat)
        return GaussianStatistics(state.mean, self._covariance(state.precision) + self._outer(state.mean, state.mean))

    def to_natural(self, mean: Any) -> GaussianStatistics:
        """Closed form: S⁻¹ = E[θθᵀ] − m mᵀ."""
        precision = self._covariance(mean.theta_theta - self._outer(mean.theta, mean.theta))
        result = self.to_nat(GaussianState(mean.theta, precision))
        if not bool(torch.isfinite(result.theta).all()) or not bool(self.in_domain(self.from_nat(result))):
            raise ValueError(
                f"mean: no natural parameter of {type(self).__name__} has this expectation; "
                "E[θθᵀ] − E[θ]E[θ]ᵀ must be positive."
            )
        return result

    def to_nat(self, state: Any) -> GaussianStatistics:
        """(S m, −S/2)."""
        return GaussianStatistics(self._apply(state.precision, state.mean), -0.5 * state.precision)

    def from_nat(self, nat: Any) -> GaussianState:
        """m = S⁻¹ nat.theta, S = −2 nat.theta_theta."""
        precision = -2.0 * nat.theta_theta
        return GaussianState(self._solve(precision, nat.theta), precision)

    def site_to_nat(self, site: Any, state: Any) -> GaussianStatistics:
        """(g − H m, ½ H)."""
        return GaussianStatistics(site.gradient - self._apply(site.curvature, state.mean), 0.5 * site.curvature)

    def site_from_nat(self, site: Any, state: Any) -> GaussianSite:
        """H = 2 site[1], g = site[0] + H m."""
        curvature = 2.0 * site[1]
        return GaussianSite(site[0] + self._apply(curvature, state.mean), curvature)

    def reanchor(self, site: Any, state_from: Any, state_to: Any) -> GaussianSite:
        """(g + H (m_to − m_from), H)."""
        shift = self._apply(site.curvature, state_to.mean - state_from.mean)
        return GaussianSite(site.gradient + shift, site.curvature)

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """θ = m + L⁻ᵀ ε, S = L Lᵀ."""
        theta: Tensor = state.mean + self._colour(state.precision, noise)
        return theta

    def natural_gradient(self, state: Any, draws: Draws) -> GaussianSite:
        """The averages of ∇ℓ and of the measured curvature, or of ∇ℓ (S(θ−m))ᵀ where none was measured."""
        grad, curvature = draws.require_grad(), draws.hessian
        if curvature is None:
            curvature = self._outer(*(draws.pairs or (grad, self._whiten(state.precision, draws.noise))))
        return GaussianSite(mean_of(grad), mean_of(curvature))

    def score_natural_gradient(self, state: Any, draws: Draws) -> GaussianSite:
        """The averages of a w and a w wᵀ, w = S(θ−m), a = ℓ minus the other draws' mean: the Fisher's inverse in
        closed form, in the chart.
        """
        white = self._whiten(state.precision, draws.noise)
        advantage = leave_one_out(draws.loss).to(white.dtype)
        weighted = advantage.reshape(-1, *(1,) * (white.ndim - 1)) * white
        return GaussianSite(weighted.mean(0), self._outer(weighted, white).mean(0))

    def regressed_natural_gradient(self, state: Any, draws: Draws) -> GaussianSite:
        """H from the regression of ∇ℓ on ε = Lᵀ(θ−m), unless it was measured, and g = mean ∇ℓ − H mean(θ−m).

        ∇ℓ(θ) ≈ g + H (θ−m), exactly so for quadratic losses: H Lᵀ⁻¹ = Cov(∇ℓ, ε) Cov(ε, ε)⁻¹. From two measured
        Hessians on, g = mean(∇ℓ_k − H_k' (θ_k−m)) with the mean H_k' of the *others*, which is unbiased.
        """
        grad, noise = draws.require_grad(), draws.noise
        if draws.hessian is None:
            curvature = self._regressed(state.precision, grad - grad.mean(0), noise - noise.mean(0))
            shift = self._apply(curvature, self._colour(state.precision, noise.mean(0)))
            return GaussianSite(grad.mean(0) - shift, curvature)
        count, curvature = len(draws.hessian), draws.hessian.mean(0)
        others = (count * curvature - draws.hessian) / (count - 1) if count > 1 else draws.hessian
        shift = self._apply(others, self._colour(state.precision, noise)).mean(0)
        return GaussianSite(grad.mean(0) - shift, curvature)

    def regressed_score_natural_gradient(self, state: Any, draws: Draws) -> GaussianSite:
        """ℓ regressed on ε and εεᵀ, ε = Lᵀ(θ−m): with slopes a and B, g = L a and H = 2 L B Lᵀ."""
        values = GaussianStatistics(draws.noise, self._outer(draws.noise, draws.noise))
        first, second = regression.fitted(self, values, draws.loss)
        return GaussianSite(self._whiten(state.precision, first), 2.0 * self._congruent(state.precision, second))

    def log_ratio(self, state: Any, prior: Any, theta: Tensor) -> Tensor:
        """½ (θ−m₀)ᵀ S₀ (θ−m₀) − ½ (θ−m)ᵀ S (θ−m)."""
        halves = [0.5 * (theta - q.mean) * self._apply(q.precision, theta - q.mean) for q in (prior, state)]
        value = halves[0] - halves[1]
        return value.sum(-1) if self.event_dim else value

    def log_ratio_gradient(self, state: Any, prior: Any, theta: Tensor) -> Tensor:
        """S₀ (θ−m₀) − S (θ−m)."""
        pull = self._apply(prior.precision, theta - prior.mean)
        return pull - self._apply(state.precision, theta - state.mean)

    def kl_gradient(self, state: Any, prior: Any) -> GaussianSite:
        """(S₀ (m − m₀), S₀ − S)."""
        gradient = self._apply(prior.precision, state.mean - prior.mean)
        return GaussianSite(gradient, prior.precision - state.precision)

    def retract(
        self,
        state: Any,
        direction: Any,
        rates: Any,
        *,
        variant: str = "second_order",
        clip_radius: float = math.inf,
    ) -> GaussianState:
        """Precision first, then the mean with the new precision: see the module's head."""
        rate_mean, rate_precision = rates
        precision = state.precision + rate_precision * direction.curvature
        if variant == "second_order":
            bend = self._sandwich(direction.curvature, state.precision)
            precision = precision + (0.5 * rate_precision**2) * bend
        slope = self._solve(precision, direction.gradient)
        if clip_radius < math.inf:
            slope = slope.clamp(-clip_radius, clip_radius)
        return GaussianState(state.mean - rate_mean * slope, precision)

    def extrapolate(self, state: Any, previous: Any, factor: float | Tensor) -> GaussianState:
        """m + k (m − m_previous), the precision kept."""
        return beyond(state, previous, factor)

    def log_prob(self, state: Any, theta: Tensor) -> Tensor:
        """−½ (θ−m)ᵀ S (θ−m) + ½ log |S| − ½ d log 2π; like `entropy` and `kl` in the chart, where nothing cancels."""
        off = theta - state.mean
        distance = off * self._apply(state.precision, off)
        distance = distance.sum(-1) if self.event_dim else distance
        return 0.5 * (self._log_det(state.precision) - self._size(state) * LOG_2PI - distance)

    def entropy(self, state: Any) -> Tensor:
        """½ d (1 + log 2π) − ½ log |S|."""
        return 0.5 * (self._size(state) * (1.0 + LOG_2PI) - self._log_det(state.precision))

    def kl(self, state: Any, prior: Any) -> Tensor:
        """½ (tr(S₀ S⁻¹) + (m−m₀)ᵀ S₀ (m−m₀) − d + log |S| − log |S₀|)."""
        off = state.mean - prior.mean
        distance = off * self._apply(prior.precision, off)
        ratio = prior.precision * self._covariance(state.precision)
        if self.event_dim:
            distance, ratio = distance.sum(-1), ratio.flatten(-2).sum(-1)
        log_ratio = self._log_det(state.precision) - self._log_det(prior.precision)
        return 0.5 * (ratio + distance - self._size(state) + log_ratio)

    def _size(self, state: Any) -> int:
        """d, the number of entries of one weight."""
        return state.mean.shape[-1] if self.event_dim else 1

    def point(self, state: Any) -> Tensor:
        """The mean."""
        mean: Tensor = state.mean
        return mean

    def recentre(self, state: Any, theta: Tensor) -> GaussianState:
        """A new mean, the precision kept."""
        return GaussianState(theta, state.precision)


@dataclass(frozen=True)
class DiagonalGaussian(_CurvedGaussian):
    """N(m, diag(s)⁻¹): every entry of a tensor is a weight with its own mean and precision (IVON's family).

    Example:
        >>> import torch
        >>> from expfam_poco.families import DiagonalGaussian
        >>> q = DiagonalGaussian()
        >>> state = q.centred_at(torch.zeros(2), 4.0)
        >>> q.distribution(state).stddev
        tensor([0.5000, 0.5000])
    """

    domain: ClassVar[Any] = {"precision": constraints.positive}
    curvature: ClassVar[str] = "diagonal"

    def _apply(self, precision: Tensor, vector: Tensor) -> Tensor:
        return precision * vector

    def _solve(self, precision: Tensor, vector: Tensor) -> Tensor:
        return vector / precision

    def _whiten(self, precision: Tensor, noise: Tensor) -> Tensor:
        return precision.sqrt() * noise

    def _colour(self, precision: Tensor, noise: Tensor) -> Tensor:
        return noise * precision.rsqrt()

    def _outer(self, first: Tensor, second: Tensor) -> Tensor:
        return first * second

    def _sandwich(self, curvature: Tensor, precision: Tensor) -> Tensor:
        return curvature * (curvature / precision)  # the square alone overflows float32 for ess = 10¹²

    def _regressed(self, precision: Tensor, grad: Tensor, noise: Tensor) -> Tensor:
        square = noise.square().sum(0)
        slope = (grad * noise).sum(0) / torch.where(square > 0.0, square, 1.0)
        return precision.sqrt() * slope

    def _congruent(self, precision: Tensor, matrix: Tensor) -> Tensor:
        return precision * matrix

    def _log_det(self, precision: Tensor) -> Tensor:
        return precision.log()

    def _covariance(self, precision: Tensor) -> Tensor:
        return 1.0 / precision

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> GaussianState:
        """Mean θ, precision everywhere `precision` (1 if None)."""
        fill = torch.as_tensor(1.0 if precision is None else precision, dtype=theta.dtype, device=theta.device)
        return GaussianState(theta.clone(), fill.expand_as(theta).clone())

    def distribution(self, state: Any) -> Any:
        """A `pyro.distributions.Normal`, one event of the tensor's shape."""
        import pyro.distributions as dist

        normal = dist.Normal(state.mean, state.precision.rsqrt())
        return normal.to_event(state.mean.ndim)


@dataclass(frozen=True)
class FullGaussian(_CurvedGaussian):
    """N(m, S⁻¹) with a dense precision over all parameters of a group at once (VON's family).

    Samples and solves use the Cholesky factor of S, which is computed once for every S (`factors`). The
    "second_order" retraction keeps S positive definite for every direction: S + D + ½ D S⁻¹ D
    = ½ S + ½ (S + D) S⁻¹ (S + D). "plain" may leave the domain, which `in_domain` reports and the optimizer refuses.

    Example:
        >>> import torch
        >>> from expfam_poco.families import FullGaussian
        >>> q = FullGaussian()
        >>> q.entropy(q.centred_at(torch.zeros(2, dtype=torch.float64), 1.0)).item()
        2.8378770664093453
    """

    event_dim: ClassVar[int] = 1
    statistic_dims: ClassVar[tuple[int, ...]] = (1, 2)
    joint: ClassVar[bool] = True
    domain: ClassVar[Any] = {"precision": positive_definite}
    curvature: ClassVar[str] = "dense"

    def _apply(self, precision: Tensor, vector: Tensor) -> Tensor:
        return (precision @ vector.unsqueeze(-1)).squeeze(-1)

    def _solve(self, precision: Tensor, vector: Tensor) -> Tensor:
        return torch.cholesky_solve(vector.unsqueeze(-1), cholesky(precision)).squeeze(-1)

    def _whiten(self, precision: Tensor, noise: Tensor) -> Tensor:
        return self._apply(cholesky(precision), noise)

    def _colour(self, precision: Tensor, noise: Tensor) -> Tensor:
        upper = cholesky(precision).mT
        return torch.linalg.solve_triangular(upper, noise.unsqueeze(-1), upper=True).squeeze(-1)

    def _outer(self, first: Tensor, second: Tensor) -> Tensor:
        product = first.unsqueeze(-1) * second.unsqueeze(-2)
        return 0.5 * (product + product.mT)

    def _sandwich(self, curvature: Tensor, precision: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(cholesky(precision), curvature, upper=False)
        product = half.mT @ half  # symmetric, but not bit for bit
        return 0.5 * (product + product.mT)

    def least_draws(self, shape: torch.Size) -> int:
        """d + 1: one for the centre, d for the columns of H."""
        return shape[-1] + 1

    def _regressed(self, precision: Tensor, grad: Tensor, noise: Tensor) -> Tensor:
        slopes = torch.linalg.lstsq(noise.movedim(0, -2), grad.movedim(0, -2)).solution.mT  # ∇ℓ ≈ slopes ε
        curvature = slopes @ cholesky(precision).mT
        return 0.5 * (curvature + curvature.mT)

    def _congruent(self, precision: Tensor, matrix: Tensor) -> Tensor:
        root = cholesky(precision)
        return root @ matrix @ root.mT

    def _log_det(self, precision: Tensor) -> Tensor:
        return 2.0 * cholesky(precision).diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _covariance(self, precision: Tensor) -> Tensor:
        return torch.cholesky_inverse(cholesky(precision))

    def retract(
        self,
        state: Any,
        direction: Any,
        rates: Any,
        *,
        variant: str = "second_order",
        clip_radius: float = math.inf,
    ) -> GaussianState:
        """As the diagonal family; the precision is made exactly symmetric against rounding."""
        symmetric = 0.5 * (direction.curvature + direction.curvature.mT)
        direction = GaussianSite(direction.gradient, symmetric)
        return super().retract(state, direction, rates, variant=variant, clip_radius=clip_radius)

    def in_domain(self, state: Any) -> Tensor:
        """Everything is finite, and S symmetric with a Cholesky factor."""
        precision = state.precision
        symmetric = (precision == precision.mT).all()
        if not bool(symmetric):
            symmetric = constraints.symmetric.check(precision).all()
        return symmetric & fields.all_finite((state.mean, cholesky(precision)))

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> GaussianState:
        """Mean θ, precision `precision` times the identity (1 if None), or the given matrix."""
        fill = torch.as_tensor(1.0 if precision is None else precision, dtype=theta.dtype, device=theta.device)
        identity = torch.eye(theta.shape[-1], dtype=theta.dtype, device=theta.device)
        matrix = fill if fill.ndim >= 2 else fill * identity
        return GaussianState(theta.clone(), matrix.expand(*theta.shape, theta.shape[-1]).clone())

    def fisher_solve(self, nat: Any, vector: Any) -> GaussianStatistics:
        """F⁻¹ v = (dλ/dμ) v in closed form; the k × k matrix is singular, for θθᵀ holds every product twice."""
        state = self.from_nat(nat)
        covariance = vector.theta_theta - 2.0 * self._outer(vector.theta, state.mean)
        slope = 0.5 * state.precision @ covariance @ state.precision
        return GaussianStatistics(
            self._apply(state.precision, vector.theta) - 2.0 * self._apply(slope, state.mean), slope
        )

    def distribution(self, state: Any) -> Any:
        """A `pyro.distributions.MultivariateNormal` with this precision matrix."""
        import pyro.distributions as dist

        return dist.MultivariateNormal(state.mean, precision_matrix=state.precision)

    def marginal(self, state: Any, start: int, stop: int) -> Any:
        """N(m, S⁻¹) of some entries: the block of S⁻¹."""
        import pyro.distributions as dist

        covariance = self._covariance(state.precision)[start:stop, start:stop]
        return dist.MultivariateNormal(state.mean[start:stop], covariance)
