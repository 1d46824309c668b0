"""Independent computations that the engine is held against: numpy, plain loops, closed forms.

No reference uses expfam_poco; the last section makes what the engine is given. Losses come twice: with gradients
and Hessians written out (for the references) and as a torch function (`torch_loss`), which the engine's side
differentiates automatically.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

import expfam_poco as poco
from expfam_poco.estimators import Draws
from expfam_poco.family import fields


def has_reference(family: poco.ExponentialFamily) -> bool:
    """Whether the exact expectations here are known: two levels, or a Gaussian over the real line (Gauss–Hermite)."""
    gaussian = "mean" in family.State._fields and family.support is torch.distributions.constraints.real
    whole = family.joint or family.event_dim == 0
    return len(family.levels or ()) == 2 or (gaussian and whole and not family.curved)


FAMILIES = [name for name in poco.families_available() if has_reference(poco.resolve_family(name))]
WITH_CURVATURE = [name for name in FAMILIES if poco.resolve_family(name).curvature != "none"]

# ---- problems -----------------------------------------------------------------------------------------------


def sigmoid(z: float | ndarray) -> Any:
    """1/(1 + e^{−z})."""
    return 1.0 / (1.0 + np.exp(-z))


@dataclass(frozen=True)
class BinaryLogistic:
    """ℓ_i(θ) = log(1 + e^z) − y z, z = x_iᵀθ, y in {0, 1}; and optionally + ½ (θ−c)ᵀ R (θ−c)/n (ℓ_0 merged)."""

    x: ndarray
    y: ndarray
    ridge: ndarray | None = None
    centre: ndarray | None = None

    @property
    def size(self) -> int:
        return self.x.shape[1]

    def loss(self, i: int, theta: ndarray) -> float:
        z = self.x[i] @ theta
        value = np.logaddexp(0.0, z) - self.y[i] * z
        if self.ridge is not None:
            value += 0.5 * (theta - self.centre) @ self.ridge @ (theta - self.centre) / len(self.x)
        return value

    def grad(self, i: int, theta: ndarray) -> ndarray:
        value = (sigmoid(self.x[i] @ theta) - self.y[i]) * self.x[i]
        if self.ridge is not None:
            value = value + self.ridge @ (theta - self.centre) / len(self.x)
        return value

    def hess(self, i: int, theta: ndarray) -> ndarray:
        p = sigmoid(self.x[i] @ theta)
        value = p * (1.0 - p) * np.outer(self.x[i], self.x[i])
        if self.ridge is not None:
            value = value + self.ridge / len(self.x)
        return value

    def torch_loss(self, theta: torch.Tensor, i: int) -> torch.Tensor:
        x, y = torch.as_tensor(self.x[i]).to(theta), torch.as_tensor(float(self.y[i])).to(theta)
        value = F.binary_cross_entropy_with_logits(theta @ x, y)
        if self.ridge is not None:
            off = theta - torch.as_tensor(self.centre).to(theta)
            value = value + 0.5 * off @ torch.as_tensor(self.ridge).to(theta) @ off / len(self.x)
        return value


@dataclass(frozen=True)
class Softmax:
    """ℓ_i(θ) = log Σ_c e^{z_c} − z_y, z = W x_i, θ = W flattened row by row (classes × features)."""

    x: ndarray
    y: ndarray
    classes: int

    @property
    def size(self) -> int:
        return self.classes * self.x.shape[1]

    def probabilities(self, i: int, theta: ndarray) -> ndarray:
        z = theta.reshape(self.classes, -1) @ self.x[i]
        e = np.exp(z - z.max())
        return e / e.sum()

    def loss(self, i: int, theta: ndarray) -> float:
        return -math.log(self.probabilities(i, theta)[self.y[i]])

    def grad(self, i: int, theta: ndarray) -> ndarray:
        p = self.probabilities(i, theta)
        p[self.y[i]] -= 1.0
        return np.outer(p, self.x[i]).ravel()

    def hess(self, i: int, theta: ndarray) -> ndarray:
        p = self.probabilities(i, theta)
        return np.kron(np.diag(p) - np.outer(p, p), np.outer(self.x[i], self.x[i]))

    def torch_loss(self, theta: torch.Tensor, i: int) -> torch.Tensor:
        z = theta.reshape(self.classes, -1) @ torch.as_tensor(self.x[i]).to(theta)
        return F.cross_entropy(z, torch.tensor(int(self.y[i])))


@dataclass(frozen=True)
class LeastSquares:
    """ℓ_i(θ) = ½ b (y_i − x_iᵀθ)², b the noise precision."""

    x: ndarray
    y: ndarray
    noise_precision: float = 1.0

    @property
    def size(self) -> int:
        return self.x.shape[1]

    def loss(self, i: int, theta: ndarray) -> float:
        return 0.5 * self.noise_precision * (self.y[i] - self.x[i] @ theta) ** 2

    def grad(self, i: int, theta: ndarray) -> ndarray:
        return self.noise_precision * (self.x[i] @ theta - self.y[i]) * self.x[i]

    def hess(self, i: int, theta: ndarray) -> ndarray:
        return self.noise_precision * np.outer(self.x[i], self.x[i])

    def torch_loss(self, theta: torch.Tensor, i: int) -> torch.Tensor:
        x, y = torch.as_tensor(self.x[i]).to(theta), float(self.y[i])
        return 0.5 * self.noise_precision * (y - theta @ x) ** 2


def binary_problem(n: int = 12, d: int = 3, seed: int = 0, **ridge: Any) -> BinaryLogistic:
    """A small logistic regression with an intercept and noisy labels."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=(n, d - 1)), np.ones((n, 1))], 1)
    y = (x @ rng.normal(size=d) + rng.logistic(size=n) > 0.0).astype(float)
    return BinaryLogistic(x, y, **ridge)


def softmax_problem(n: int = 10, d: int = 2, classes: int = 3, seed: int = 0) -> Softmax:
    """A small softmax regression."""
    rng = np.random.default_rng(seed)
    return Softmax(rng.normal(size=(n, d)), rng.integers(classes, size=n), classes)


# ---- expectations -------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """Standardised points ε (K × d) and weights: E[f] = Σ_k w_k f(m + L⁻ᵀ ε_k), S = L Lᵀ."""

    points: ndarray
    weights: ndarray


def delta_rule(d: int) -> Rule:
    """The delta method: ε = 0."""
    return Rule(np.zeros((1, d)), np.ones(1))


def monte_carlo_rule(d: int, draws: int, seed: int) -> Rule:
    """Fixed samples."""
    return Rule(np.random.default_rng(seed).normal(size=(draws, d)), np.full(draws, 1.0 / draws))


def gauss_hermite_rule(d: int, order: int) -> Rule:
    """The tensor product of Gauss–Hermite rules for N(0, I)."""
    node, weight = np.polynomial.hermite_e.hermegauss(order)
    weight = weight / math.sqrt(2.0 * math.pi)
    points = np.array(list(itertools.product(node, repeat=d)))
    weights = np.array([math.prod(row) for row in itertools.product(weight, repeat=d)])
    return Rule(points, weights)


def expected(problem: Any, i: int, m: ndarray, precision: ndarray, rule: Rule) -> tuple[ndarray, ndarray]:
    """(E_q[∇ℓ_i], E_q[∇²ℓ_i]) under q = N(m, S⁻¹), point by point."""
    factor = np.linalg.cholesky(precision)
    gradient, hessian = np.zeros(len(m)), np.zeros((len(m), len(m)))
    for point, weight in zip(rule.points, rule.weights, strict=True):
        theta = m + np.linalg.solve(factor.T, point)
        gradient = gradient + weight * problem.grad(i, theta)
        hessian = hessian + weight * problem.hess(i, theta)
    return gradient, hessian


# ---- the paper's algorithms, written out --------------------------------------------------------------------


class Plan(NamedTuple):
    """The order of a run: T steps, the example of each, and how many steps lie between two outer passes."""

    picks: list[int]
    period: int


def plan(n: int, steps: int, period: int, seed: int = 1) -> Plan:
    """Random examples, one a step."""
    return Plan([int(i) for i in np.random.default_rng(seed).integers(n, size=steps)], period)


def svrg(
    problem: Any, theta: ndarray, run: Plan, rate: float, *, alpha: float = 1.0, decay: float = 0.0
) -> list[ndarray]:
    """Algorithm 1 line by line; with `alpha` α-SVRG (Yin et al. 2025), with `decay` the L2 term δθ."""
    theta_in, path = theta.copy(), []
    n = len(problem.x)
    for t, i in enumerate(run.picks):
        if t % run.period == 0:
            g_out = np.zeros_like(theta)
            for j in range(n):
                g_out = g_out + problem.grad(j, theta_in)
            theta_out = theta_in.copy()
        g_in = problem.grad(i, theta_in) - alpha * problem.grad(i, theta_out) + alpha * g_out / n
        theta_in = theta_in - rate * (g_in + decay * theta_in)
        path.append(theta_in)
    return path


class Prior(NamedTuple):
    """N(m_0, S_0⁻¹); S_0 = 0 where ℓ_0 is merged into the losses."""

    mean: ndarray
    precision: ndarray


def von_natural(
    problem: Any,
    m: ndarray,
    precision: ndarray,
    prior: Prior,
    run: Plan,
    rate: float,
    rules: Sequence[Rule],
    *,
    alpha: float = 1.0,
    diagonal: bool = False,
) -> list[tuple[ndarray, ndarray]]:
    """Eq. 12/18 on λ = (S m, −S/2) with the natural gradients of Eq. 20; λ̂_out = −Σ_j ∇̃L_j(λ_out)."""
    n, keep = len(problem.x), (lambda h: np.diag(np.diag(h))) if diagonal else (lambda h: h)

    def natural_gradient(i: int, lam: tuple[ndarray, ndarray], rule: Rule) -> tuple[ndarray, ndarray]:
        s = -2.0 * lam[1]
        mean = np.linalg.solve(s, lam[0])
        g, h = expected(problem, i, mean, s, rule)
        h = keep(h)
        return g - h @ mean, 0.5 * h

    lam = (precision @ m, -0.5 * precision)
    lam_0 = (prior.precision @ prior.mean, -0.5 * prior.precision)
    path = []
    for t, i in enumerate(run.picks):
        rule = rules[t % len(rules)]
        if t % run.period == 0:
            lam_out, outer_rule = lam, rule
            lam_hat = [np.zeros_like(part) for part in lam]
            for j in range(n):
                for part, slope in zip(lam_hat, natural_gradient(j, lam_out, outer_rule), strict=True):
                    part -= slope
        inner = natural_gradient(i, lam, rule)
        outer = natural_gradient(i, lam_out, rule)
        lam = tuple(
            (1.0 - rate) * lam[k]
            + rate * lam_0[k]
            + rate * alpha * lam_hat[k]
            - rate * n * (inner[k] - alpha * outer[k])
            for k in range(2)
        )
        path.append((np.linalg.solve(-2.0 * lam[1], lam[0]), -2.0 * lam[1]))
    return path


def von_mean_precision(
    problem: Any,
    m: ndarray,
    precision: ndarray,
    prior: Prior,
    run: Plan,
    rate: float,
    rules: Sequence[Rule],
    *,
    alpha: float = 1.0,
    diagonal: bool = False,
    mean_first: bool = False,
) -> list[tuple[ndarray, ndarray]]:
    """Eq. 24 (15, 16) line by line, with α as in Eq. 18 and a prior; `mean_first` is the wrong order."""
    n, keep = len(problem.x), (lambda h: np.diag(np.diag(h))) if diagonal else (lambda h: h)
    m_in, s_in, path = m.copy(), precision.copy(), []
    for t, i in enumerate(run.picks):
        rule = rules[t % len(rules)]
        if t % run.period == 0:
            g_out, h_out = np.zeros_like(m), np.zeros_like(precision)
            for j in range(n):
                g, h = expected(problem, j, m_in, s_in, rule)
                g_out, h_out = g_out + g, h_out + keep(h)
            m_out, s_out = m_in.copy(), s_in.copy()
        g_i, h_i = expected(problem, i, m_in, s_in, rule)
        g_i_out, h_i_out = expected(problem, i, m_out, s_out, rule)
        g_in = g_i - alpha * g_i_out + alpha * g_out / n
        h_rest = alpha * (h_out / n - keep(h_i_out))
        h_in = keep(h_i) + h_rest
        s_new = (1.0 - rate) * s_in + rate * (prior.precision + n * h_in)
        slope = prior.precision @ (m_in - prior.mean) + n * (g_in + h_rest @ (m_in - m_out))
        m_in = m_in - rate * np.linalg.solve(s_in if mean_first else s_new, slope)
        s_in = s_new
        path.append((m_in, s_in))
    return path


# ---- derivatives by differences -----------------------------------------------------------------------------


def slope_at_zero(function: Callable[[float], float], step: float = 1e-3) -> float:
    """The derivative of a function of one variable at 0: central differences of fourth order."""
    near = function(step) - function(-step)
    far = function(2.0 * step) - function(-2.0 * step)
    return float((8.0 * near - far) / (12.0 * step))


def directions(shape: Sequence[int], symmetric: bool) -> Iterator[ndarray]:
    """Unit perturbations of every entry; of symmetric matrices, the symmetric ones."""
    for index in np.ndindex(*shape):
        if symmetric and index[-2] > index[-1]:
            continue
        unit = np.zeros(shape)
        unit[index] = 1.0
        if symmetric and index[-2] != index[-1]:
            unit[(*index[:-2], index[-1], index[-2])] = 1.0
        yield unit


# ---- the variational objective of a Gaussian ----------------------------------------------------------------


def gaussian_kl(m: ndarray, precision: ndarray, prior: Prior) -> float:
    """KL(N(m, S⁻¹) ‖ N(m_0, S_0⁻¹)) in closed form."""
    covariance = np.linalg.inv(precision)
    off = m - prior.mean
    log_ratio = np.linalg.slogdet(precision)[1] - np.linalg.slogdet(prior.precision)[1]
    return 0.5 * float(np.trace(prior.precision @ covariance) + off @ prior.precision @ off - len(m) + log_ratio)


def expected_logistic_loss(problem: BinaryLogistic, m: ndarray, precision: ndarray, order: int = 60) -> float:
    """Σ_i E_q[ℓ_i] by one-dimensional Gauss–Hermite rules on z_i = x_iᵀθ ~ N(x_iᵀm, x_iᵀS⁻¹x_i)."""
    node, weight = np.polynomial.hermite_e.hermegauss(order)
    weight = weight / weight.sum()
    total = 0.0
    for x, y in zip(problem.x, problem.y, strict=True):
        z = x @ m + math.sqrt(x @ np.linalg.solve(precision, x)) * node
        total += float(weight @ (np.logaddexp(0.0, z) - y * z))
    return total


# ---- the support of a posterior -----------------------------------------------------------------------------


class Support(NamedTuple):
    """Points θ (K × d) of a posterior over d weights with their probabilities, and a noise that leads to each."""

    theta: torch.Tensor
    weights: torch.Tensor
    noise: torch.Tensor


def support(distribution: Any, order: int = 40) -> Support:
    """All members of a discrete distribution with their probabilities, or a Gauss–Hermite rule of a Gaussian.

    The distribution (of one vector) is asked for its mean and (co)variance or its log_prob only.
    """
    base = getattr(distribution, "base_dist", distribution)
    mean = distribution.mean
    d = mean.shape[-1]
    if base.has_enumerate_support:
        values = base.enumerate_support(expand=False).flatten()
        theta = torch.stack([torch.stack(row) for row in itertools.product(values, repeat=d)])
        theta = theta.to(mean.dtype)
        middle, spread = (values.max() + values.min()) / 2.0, (values.max() - values.min()) / 2.0
        return Support(theta, distribution.log_prob(theta).exp(), 18.0 * (theta - middle) / spread)
    rule = gauss_hermite_rule(d, order)
    points, weights = torch.from_numpy(rule.points), torch.from_numpy(rule.weights)
    if hasattr(distribution, "precision_matrix"):
        factor = torch.linalg.cholesky(distribution.precision_matrix)
        theta = mean + torch.linalg.solve(factor.mT, points.mT).mT
    else:
        theta = mean + points * distribution.variance.sqrt()
    return Support(theta, weights, points)


# ---- what the engine is given -------------------------------------------------------------------------------


def tensor(value: Any) -> torch.Tensor:
    """A float64 tensor."""
    return torch.as_tensor(value, dtype=torch.float64)


def weighted_draws(
    family: Any,
    estimator: Any,
    state: Any,
    noise: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
    weights: torch.Tensor | None = None,
    *,
    ess: float = 1.0,
    probes: torch.Tensor | None = None,
) -> Draws:
    """The measurements that `estimator` asks for, by automatic differentiation of `loss` at its own points.

    `Draws` are averaged with equal weights; a quadrature's w_k go in as factors K w_k.
    """
    theta = estimator.points(family, state, noise)
    values = torch.func.vmap(loss)(theta)
    grad = torch.func.vmap(torch.func.grad(loss))(theta)
    dense, curvature, pairs = family.curvature == "dense", None, None
    if family.curvature != "none" and estimator.needs == "hessian":
        curvature = torch.func.vmap(torch.func.jacrev(torch.func.grad(loss)))(theta)
        curvature = curvature if dense else curvature.diagonal(dim1=-2, dim2=-1)
    elif family.curvature != "none" and estimator.needs == "hvp":
        hessian = torch.func.vmap(torch.func.jacrev(torch.func.grad(loss)))(theta)
        product = (hessian @ probes.unsqueeze(-1)).squeeze(-1)
        pairs = product, probes
    elif family.curvature != "none":
        pairs = estimator.pair(grad, ess)

    def weigh(value: torch.Tensor | None) -> torch.Tensor | None:
        if weights is None or value is None:
            return value
        return value * (len(weights) * weights).reshape(-1, *(1,) * (value.ndim - 1))

    pairs = None if pairs is None else (weigh(pairs[0]), pairs[1])
    return Draws(noise, theta, values, weigh(grad), weigh(curvature), pairs)


def site_of(
    family: Any,
    estimator: Any,
    state: Any,
    noise: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
    weights: torch.Tensor | None = None,
    **options: Any,
) -> Any:
    """The engine's natural gradient from `weighted_draws`."""
    draws = weighted_draws(family, estimator, state, noise, loss, weights, **options)
    return estimator.natural_gradient(family, state, draws)


def loss_of(problem: Any, i: int) -> Callable[[Tensor], Tensor]:
    return lambda theta: problem.torch_loss(theta, i)


def worst(found: Any, wanted: Any) -> float:
    """The largest difference of any entries."""
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(found, wanted, strict=True))


def site_mean(sites: list[Any]) -> Any:
    total = sites[0]
    for site in sites[1:]:
        total = fields.add(total, site)
    return fields.scale(total, 1.0 / len(sites))


def start(family: Any, m: ndarray, precision: ndarray) -> Any:
    """The chart's state of N(m, S⁻¹): a dense family takes S, a diagonal one its diagonal."""
    value = precision if family.curvature == "dense" else precision.diagonal().copy()
    return family.State(tensor(m), tensor(value))


def dense(family: Any, state: Any) -> tuple[ndarray, ndarray]:
    """(m, S) as numpy arrays, S as a matrix."""
    value = state.precision.numpy()
    return state.mean.numpy(), value if family.curvature == "dense" else np.diag(value)
