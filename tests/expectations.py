"""Exact expectations, finite differences in μ, and losses: what the tests of natural gradients share."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from reference import (
    FAMILIES,
    BinaryLogistic,
    binary_problem,
    directions,
    site_of,
    slope_at_zero,
    support,
    tensor,
)
from torch import Tensor

import expfam_poco as poco
from expfam_poco.family import fields

POSITIVE_DEFINITE = [[1.3, 0.4], [0.4, 0.7]]


def quadratic(theta: Tensor) -> Tensor:
    return 0.5 * theta @ tensor(POSITIVE_DEFINITE) @ theta - theta @ tensor([0.5, -1.1])


def quartic(theta: Tensor) -> Tensor:
    return 0.25 * ((theta - tensor([0.3, -0.4])) ** 4).sum() + 0.1 * theta.prod() ** 2 + theta.sum() ** 3 / 6.0


def logistic(theta: Tensor) -> Tensor:
    problem = binary_problem(n=5, d=2, seed=3)
    return torch.stack([problem.torch_loss(theta, i) for i in range(5)]).sum()


def is_discrete(name: str) -> bool:
    """Whether the family's distribution can list its support."""
    family = poco.resolve_family(name)
    distribution = family.distribution(family.centred_at(torch.zeros(1)))
    return bool(getattr(distribution, "base_dist", distribution).has_enumerate_support)


DISCRETE = [name for name in FAMILIES if is_discrete(name)]


LOSSES = {"quadratic": quadratic, "quartic": quartic, "logistic": logistic}


def a_state(family: Any, seed: int = 0) -> Any:
    """A member over two weights, correlated where the family can."""
    rng = np.random.default_rng(seed)
    state = family.centred_at(tensor(rng.normal(size=2)), 2.0)
    if family.curvature == "dense":
        state = state._replace(precision=state.precision + tensor([[0.7, 0.6], [0.6, 0.0]]))
    elif family.curvature == "diagonal":
        state = state._replace(precision=state.precision * tensor([1.0, 1.7]))
    return state


def expectation(family: Any, nat: Any, loss: Callable[[Tensor], Tensor]) -> float:
    points = support(family.distribution(family.from_nat(nat)))
    return float(points.weights @ torch.func.vmap(loss)(points.theta))


def slopes_in_mean(family: Any, state: Any, value_at: Callable[[Any], float]) -> list[float]:
    """The derivatives of a function of λ along the unit perturbations of every field of μ."""
    mean = family.to_mean(family.to_nat(state))
    slopes = []
    for k, (value, dims) in enumerate(zip(mean, family.statistic_dims, strict=True)):
        for unit in directions(tuple(value.shape), dims == 2):

            def along(h: float, k: int = k, unit: np.ndarray = unit) -> float:
                moved = family.Mean(*(part + h * tensor(unit) if j == k else part for j, part in enumerate(mean)))
                return value_at(family.to_natural(moved))

            slopes.append(slope_at_zero(along))
    return slopes


def differences(family: Any, state: Any, loss: Callable[[Tensor], Tensor]) -> list[float]:
    """dE_q[ℓ]/dμ along the unit perturbations of every field of μ."""
    return slopes_in_mean(family, state, lambda nat: expectation(family, nat, loss))


def along_directions(family: Any, gradient: Any) -> list[float]:
    """⟨g, unit⟩ for the same perturbations."""
    return [
        float((value * tensor(unit)).sum())
        for value, dims in zip(gradient, family.statistic_dims, strict=True)
        for unit in directions(tuple(value.shape), dims == 2)
    ]


def from_directions(family: Any, slopes: list[float]) -> list[Tensor]:
    """The gradient that `along_directions` turns into `slopes`."""
    rest = list(slopes)
    fields_of_gradient = []
    for dims in family.statistic_dims:
        shape = (2, 2) if dims == 2 else (2,)
        total = torch.zeros(shape, dtype=torch.float64)
        for unit in directions(shape, dims == 2):
            total = total + rest.pop(0) * tensor(unit) / float((unit**2).sum())
        fields_of_gradient.append(total)
    return fields_of_gradient


def expected_site(family: Any, estimator: Any, state: Any, loss: Callable[[Tensor], Tensor], order: int) -> Any:
    """E[estimate], exactly: over the support, over all signs of probes, over all pairs of independent draws."""
    points = support(family.distribution(state), order)
    if estimator.independent_draws:
        losses, count = torch.func.vmap(loss)(points.theta), len(points.theta)
        first, second = (index.flatten() for index in torch.meshgrid(*[torch.arange(count)] * 2, indexing="ij"))
        pair = torch.stack([first, second], 1)

        def estimate(noise: Tensor, theta: Tensor, loss_values: Tensor) -> Any:
            draws = poco.Draws(noise, theta, loss_values)
            return tuple(estimator.natural_gradient(family, state, draws))

        each = torch.func.vmap(estimate)(points.noise[pair], points.theta[pair], losses[pair])
        weights = points.weights[first] * points.weights[second]
        return family.Site(*(torch.tensordot(weights, value, 1) for value in each))
    if estimator.needs == "hvp":
        sites = []
        for signs in itertools.product([-1.0, 1.0], repeat=2):
            probes = tensor(signs).expand(len(points.noise), 2)
            sites.append(site_of(family, estimator, state, points.noise, loss, points.weights, probes=probes))
        return fields.scale(fields.add(fields.add(sites[0], sites[1]), fields.add(sites[2], sites[3])), 0.25)
    return site_of(family, estimator, state, points.noise, loss, points.weights)


def problem_at(theta: Tensor) -> tuple[BinaryLogistic, np.ndarray, np.ndarray]:
    """A logistic regression, its summed gradient and Hessian in closed form."""
    problem = binary_problem(n=6, d=3, seed=8)
    point = theta.numpy()
    gradient = sum(problem.grad(i, point) for i in range(6))
    hessian = sum(problem.hess(i, point) for i in range(6))
    return problem, gradient, hessian


def total_loss(problem: BinaryLogistic) -> Callable[[Tensor], Tensor]:
    return lambda theta: torch.stack([problem.torch_loss(theta, i) for i in range(6)]).sum()


def as_kept(family: Any, hessian: np.ndarray) -> np.ndarray:
    return hessian if family.curvature == "dense" else np.diag(hessian).copy()


def correlated(family: Any) -> Any:
    """A member over three weights."""
    theta = tensor([0.4, -0.6, 0.2])
    state = family.centred_at(theta, 4.0)
    if family.curvature == "dense":
        root = tensor([[1.0, 0.3, 0.0], [0.3, 1.0, -0.5], [0.0, -0.5, 1.0]])
        return state._replace(precision=state.precision + root)
    return state._replace(precision=state.precision * tensor([1.0, 0.6, 2.0]))


def within_five_standard_errors(draws: Tensor, wanted: Any) -> None:
    """The mean over the first axis, entry by entry, and not because the standard error is huge."""
    mean, error = draws.mean(0), draws.std(0) / math.sqrt(len(draws))
    wanted = tensor(wanted)
    assert bool(((mean - wanted).abs() <= 5.0 * error + 1e-12).all()), ((mean - wanted) / error).tolist()
    assert float(error.max()) < 0.05 * float(wanted.abs().max())
