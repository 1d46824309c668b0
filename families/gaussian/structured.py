r"""What Gaussians with a structured precision share: curved families in the ambient `FullGaussian`.

A site at a state is (g, X): gradient E_q[∇ℓ] at the mean, and a tangent vector X of the precision in the family's own
fields. The curvature of an estimator is a mean of products, and only the projection of such means is ever needed:

    Stein's identity ("reparam")   E[∇ℓ (S(θ−m))ᵀ]                      pairs (∇ℓ, w),   w = S(θ−m)
    losses alone ("score")         E[a w wᵀ],  a = ℓ − other draws'      pairs (a w, w)
    squared gradients ("gradsq")   κ ∇ℓ ∇ℓᵀ                              pairs (κ ∇ℓ, ∇ℓ)
    products ("hutchinson")        E[∇²ℓ z zᵀ]                           pairs (∇²ℓ z, z)
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from expfam_poco.family.curved import CurvedFamily
from expfam_poco.family.derived import leave_one_out
from expfam_poco.family.draws import Draws

from .gaussian import LOG_2PI, FullGaussian, GaussianSite, GaussianState, GaussianStatistics


class StructuredGaussian(CurvedFamily):
    """N(m, S⁻¹) with S on a surface; the first field of `State` is the mean, of `Site` the gradient."""

    Nat: ClassVar[type[Any]] = GaussianStatistics
    Mean: ClassVar[type[Any]] = GaussianStatistics
    Statistics: ClassVar[type[Any]] = GaussianStatistics
    statistic_dims: ClassVar[tuple[int, ...]] = (1, 2)
    curvature: ClassVar[str] = "pairs"

    @property
    def ambient(self) -> FullGaussian:
        """The Gaussian with a dense precision."""
        return FullGaussian()

    @abstractmethod
    def expand_precision(self, state: Any) -> Tensor:
        """S: dense, symmetric."""

    @abstractmethod
    def expand_curvature(self, site: Any, state: Any) -> Tensor:
        """X: dense, symmetric."""

    @abstractmethod
    def project_curvature(self, curvature: Tensor, state: Any) -> tuple[Tensor, ...]:
        """The tangent vector nearest to a dense symmetric matrix, as the fields of a site after the gradient."""

    @abstractmethod
    def project_products(self, first: Tensor, second: Tensor, state: Any) -> tuple[Tensor, ...]:
        """The tangent vector nearest to the mean over K pairs of ½(a bᵀ + b aᵀ), for a and b of K × P."""

    @abstractmethod
    def apply_curvature(self, site: Any, state: Any, vector: Tensor) -> Tensor:
        """X v."""

    @abstractmethod
    def whiten(self, state: Any, noise: Tensor) -> Tensor:
        """S(θ−m) at the sample θ made of this noise."""

    # ---- between the surface and the ambient family --------------------------------------------------------

    def expand(self, state: Any) -> GaussianState:
        """(m, S), dense."""
        return GaussianState(self.flatten(state.mean), self.expand_precision(state))

    def expand_site(self, site: Any, state: Any) -> GaussianSite:
        """(g, X), dense."""
        return GaussianSite(self.flatten(site.gradient), self.expand_curvature(site, state))

    def project(self, site: Any, state: Any) -> Any:
        """(g, the tangent vector nearest to H)."""
        symmetric = 0.5 * (site.curvature + site.curvature.mT)
        return self.Site(site.gradient.reshape(state.mean.shape), *self.project_curvature(symmetric, state))

    # ---- the Bayesian learning rule ------------------------------------------------------------------------

    def natural_gradient(self, state: Any, draws: Draws) -> Any:
        """The averages of ∇ℓ and of the projected curvature, measured or by Stein's identity."""
        grad = draws.require_grad()
        pairs = draws.pairs or (grad, self.whiten(state, draws.noise))
        return self.Site(grad.mean(0), *self.project_products(*pairs, state))

    def score_natural_gradient(self, state: Any, draws: Draws) -> Any:
        """The averages of a w and of the projected a w wᵀ, with w = S(θ−m)."""
        white = self.whiten(state, draws.noise)
        advantage = leave_one_out(draws.loss).to(white.dtype)
        weighted = advantage.reshape(-1, *(1,) * (white.ndim - 1)) * white
        return self.Site(weighted.mean(0), *self.project_products(weighted, white, state))

    def reanchor(self, site: Any, state_from: Any, state_to: Any) -> Any:
        """(g + X (m_to − m_from), X carried)."""
        shift = self.apply_curvature(site, state_from, state_to.mean - state_from.mean)
        return self.carry(site._replace(gradient=site.gradient + shift), state_from, state_to)

    def extrapolate(self, state: Any, previous: Any, factor: float | Tensor) -> Any:
        """m + k (m − m_previous), the precision kept."""
        return state._replace(mean=state.mean + factor * (state.mean - previous.mean))

    def point(self, state: Any) -> Tensor:
        """The mean."""
        mean: Tensor = state.mean
        return mean

    def mode(self, state: Any) -> Tensor:
        """The mean."""
        return self.point(state)

    def recentre(self, state: Any, theta: Tensor) -> Any:
        """A new mean, the precision kept."""
        return state._replace(mean=theta)

    # ---- densities -------------------------------------------------------------------------------------------

    @abstractmethod
    def log_det(self, state: Any) -> Tensor:
        """log |S|."""

    @abstractmethod
    def quadratic(self, state: Any, vector: Tensor) -> Tensor:
        """vᵀ S v."""

    @abstractmethod
    def trace_ratio(self, prior: Any, state: Any) -> Tensor:
        """tr(S₀ S⁻¹)."""

    def _size(self, state: Any) -> int:
        """d, the number of entries of one weight."""
        return int(self.flatten(state.mean).shape[-1])

    def log_ratio(self, state: Any, prior: Any, theta: Tensor) -> Tensor:
        """½ (θ−m₀)ᵀ S₀ (θ−m₀) − ½ (θ−m)ᵀ S (θ−m)."""
        return 0.5 * (self.quadratic(prior, theta - prior.mean) - self.quadratic(state, theta - state.mean))

    def log_prob(self, state: Any, theta: Tensor) -> Tensor:
        """−½ (θ−m)ᵀ S (θ−m) + ½ log |S| − ½ d log 2π."""
        distance = self.quadratic(state, theta - state.mean)
        return 0.5 * (self.log_det(state) - self._size(state) * LOG_2PI - distance)

    def entropy(self, state: Any) -> Tensor:
        """½ d (1 + log 2π) − ½ log |S|."""
        return 0.5 * (self._size(state) * (1.0 + LOG_2PI) - self.log_det(state))

    def kl(self, state: Any, prior: Any) -> Tensor:
        """½ (tr(S₀ S⁻¹) + (m−m₀)ᵀ S₀ (m−m₀) − d + log |S| − log |S₀|)."""
        distance = self.quadratic(prior, state.mean - prior.mean)
        log_ratio = self.log_det(state) - self.log_det(prior)
        return 0.5 * (self.trace_ratio(prior, state) + distance - self._size(state) + log_ratio)
