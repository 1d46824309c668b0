"""What the engine derives from a log-partition function and a sample: inverses, Fisher blocks, steps, gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints
from user_families import Categorical, Exponential, GaussianByHand, LogNormal, Moments, Poisson

import expfam_poco as poco
from expfam_poco.families import Bernoulli, DiagonalGaussian, FullGaussian, IsotropicGaussian
from expfam_poco.family import derived

pytestmark = pytest.mark.usefixtures("float64")

CLOSED_FORMS = [Bernoulli, DiagonalGaussian, FullGaussian, IsotropicGaussian]


def nat_of(family: poco.ExponentialFamily, strength: float | None = 1.5, seed: int = 0) -> Any:
    """A member in natural coordinates."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3,) if family.joint or family.event_dim else (2, 3)
    centre = torch.randn(shape, generator=generator)
    if family.support not in (constraints.real, constraints.real_vector):
        centre = centre.exp()
    return family.to_nat(family.centred_at(centre, strength))


# ---- λ from μ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLOSED_FORMS)
def test_newton_finds_what_the_closed_forms_say(cls: type[poco.ExponentialFamily]) -> None:
    family = cls()
    nat = nat_of(family, None if cls is IsotropicGaussian else 1.5)
    mean = family.to_mean(nat)
    if cls is FullGaussian:
        with pytest.raises(ValueError):  # θθᵀ holds every product twice: the family has its closed form for this
            derived.invert_mean(family, mean)
        return
    found, closed = derived.invert_mean(family, mean), family.to_natural(mean)
    torch.testing.assert_close(tuple(found), tuple(closed), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", [Exponential(), LogNormal(), GaussianByHand(), Categorical()])
@pytest.mark.parametrize("seed", range(8))
def test_newton_inverts_the_mean_of_families_without_a_closed_form(family: Any, seed: int) -> None:
    nat = nat_of(family, 0.7, seed)
    found = family.to_natural(family.to_mean(nat))
    torch.testing.assert_close(tuple(found), tuple(nat), rtol=1e-9, atol=1e-9)


def test_newton_converges_where_the_dual_passes_through_zero() -> None:
    """⟨λ, μ⟩ − A(λ) = 0 at λ = −e: there, only the size of the terms tells what rounding is."""
    family = Exponential()
    nat = family.Nat(-math.e * (1.0 + torch.linspace(-1e-6, 1e-6, 101)))
    found = family.to_natural(family.to_mean(nat))
    torch.testing.assert_close(found.theta, nat.theta, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("mean", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_newton_reaches_far_from_its_start(mean: float) -> None:
    family = Exponential()
    found = family.to_natural(family.Mean(torch.tensor([mean, 1.0])))
    torch.testing.assert_close(found.theta, torch.tensor([-1.0 / mean, -1.0]), rtol=1e-6, atol=0.0)


def test_newton_in_float32() -> None:
    family = GaussianByHand()
    mean = Moments(torch.tensor([0.5, -2.0], dtype=torch.float32), torch.tensor([1.0, 4.5], dtype=torch.float32))
    found = family.to_natural(mean)
    assert found.theta.dtype == torch.float32
    torch.testing.assert_close(
        found.theta, torch.tensor([0.5 / 0.75, -2.0 / 0.5], dtype=torch.float32), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("family", "mean"),
    [
        (Exponential(), (torch.tensor([1.0, -1.0]),)),
        (GaussianByHand(), (torch.tensor([1.0]), torch.tensor([0.5]))),
        (Poisson(), (torch.tensor([-0.5]),)),
        (Categorical(), (torch.tensor([0.7, 0.7]),)),
    ],
    ids=["negative", "variance below zero", "count below zero", "probabilities above one"],
)
def test_a_mean_that_no_member_has_is_refused(family: Any, mean: tuple[Tensor, ...]) -> None:
    with pytest.raises(ValueError, match=r"mean: no natural parameter of .* give a mean inside the mean domain"):
        family.to_natural(family.Mean(*mean))


# ---- Fisher -----------------------------------------------------------------------------------------------


def test_fisher_blocks_of_bernoulli_are_sech_squared() -> None:
    nat = Bernoulli.Nat(torch.tensor([0.0, 1e-3, 0.7, -3.0, 10.0, -40.0]))
    expected = 1.0 / torch.cosh(nat.theta) ** 2
    torch.testing.assert_close(derived.fisher(Bernoulli(), nat)[..., 0, 0], expected)


def test_fisher_blocks_of_a_gaussian_are_the_covariances_of_theta_and_its_square() -> None:
    family, state = DiagonalGaussian(), DiagonalGaussian().centred_at(torch.tensor([0.5, -2.0]), 4.0)
    m, v = state.mean, 1.0 / state.precision
    rows = [torch.stack([v, 2 * m * v], -1), torch.stack([2 * m * v, 4 * m**2 * v + 2 * v**2], -1)]
    torch.testing.assert_close(derived.fisher(family, family.to_nat(state)), torch.stack(rows, -2))


def test_fisher_block_of_a_full_gaussian_is_isserlis_theorem() -> None:
    family = FullGaussian()
    factor = torch.randn(3, 3)
    precision = factor @ factor.T + torch.eye(3)
    nat = family.to_nat(family.centred_at(torch.randn(3), precision))
    mean = family.to_mean(nat)
    m, v = mean.theta, mean.theta_theta - torch.outer(mean.theta, mean.theta)
    block = derived.fisher(family, nat)
    assert block.shape == (12, 12)
    torch.testing.assert_close(block[:3, :3], v)
    # Cov[θ_a, θ_b θ_c] = m_b V_ac + m_c V_ab
    third = torch.einsum("b,ac->abc", m, v) + torch.einsum("c,ab->abc", m, v)
    torch.testing.assert_close(block[:3, 3:].reshape(3, 3, 3), third)
    # Cov[θ_a θ_b, θ_c θ_d] with central part V_ac V_bd + V_ad V_bc
    central = torch.einsum("ac,bd->abcd", v, v) + torch.einsum("ad,bc->abcd", v, v)
    mixed = sum(
        torch.einsum(pattern, m, m, v) for pattern in ("a,c,bd->abcd", "a,d,bc->abcd", "b,c,ad->abcd", "b,d,ac->abcd")
    )
    torch.testing.assert_close(block[3:, 3:].reshape(3, 3, 3, 3), central + mixed)


@pytest.mark.parametrize("family", [Exponential(), LogNormal(), GaussianByHand(), Poisson(), Categorical()])
def test_products_and_solves_with_the_fisher_matrix(family: Any) -> None:
    nat, vector = nat_of(family), nat_of(family, 0.7, seed=1)
    product = family.fisher_vector_product(nat, vector)
    flat = torch.cat([v.reshape(*v.shape[: v.ndim - family.event_dim], -1) for v in vector], -1)
    if family.event_dim == 0:
        flat = torch.stack(list(vector), -1)
    whole = (derived.fisher(family, nat) @ flat.unsqueeze(-1)).squeeze(-1)
    found = torch.stack(list(product), -1) if family.event_dim == 0 else torch.cat(list(product), -1)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(tuple(family.fisher_solve(nat, product)), tuple(vector))


@pytest.mark.parametrize("family", [Exponential(), GaussianByHand(), LogNormal()])
def test_scalar_parameters_are_weights_too(family: Any) -> None:
    state = family.centred_at(torch.tensor(0.8), 2.0)
    assert derived.fisher(family, state).shape == (len(state), len(state))
    noise = family.noise((), 4, poco.noise.NoiseKey(0), dtype=torch.float64)
    theta = family.sample(state, noise)
    site = family.natural_gradient(state, poco.Draws(noise, theta, theta, torch.ones(4)))
    assert all(value.shape == () for value in site)
    assert family.distribution(state).sample().shape == ()


def test_the_fisher_solve_of_the_full_gaussian_is_the_inverse_on_symmetric_matrices() -> None:
    family = FullGaussian()
    factor = torch.randn(4, 4)
    nat = family.to_nat(family.centred_at(torch.randn(4), factor @ factor.T + torch.eye(4)))
    curvature = torch.randn(4, 4)
    vector = family.Nat(torch.randn(4), curvature + curvature.T)
    solved = family.fisher_solve(nat, family.fisher_vector_product(nat, vector))
    torch.testing.assert_close(tuple(solved), tuple(vector))
    matrix = derived.fisher(family, nat)
    flat = torch.cat([vector.theta, vector.theta_theta.reshape(-1)])
    expected = torch.linalg.pinv(matrix, hermitian=True) @ flat
    found = family.fisher_solve(nat, vector)
    torch.testing.assert_close(torch.cat([found.theta, found.theta_theta.reshape(-1)]), expected)


# ---- steps that keep to their side ------------------------------------------------------------------------

SIDES = [
    (constraints.positive, torch.tensor([0.1, 1.0, 50.0]).double()),
    (constraints.greater_than(2.0), torch.tensor([2.1, 3.0, 50.0]).double()),
    (constraints.less_than(0.0), torch.tensor([-0.1, -1.0, -50.0]).double()),
]


@pytest.mark.parametrize(("bound", "value"), SIDES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_bounded_step_never_uses_up_half_of_its_slack(bound: Any, value: Tensor, size: float, sign: float) -> None:
    edge = bound.lower_bound if hasattr(bound, "lower_bound") else bound.upper_bound
    moved = derived.bounded_step(value, torch.full_like(value, sign * size), bound, plain=False)
    assert bound.check(moved).all()
    slack, before = (moved - edge).abs(), (value - edge).abs()
    assert (slack >= 0.5 * before * (1.0 - 1e-12)).all()


@pytest.mark.parametrize(("bound", "value"), SIDES)
def test_a_bounded_step_is_the_step_to_first_order(bound: Any, value: Tensor) -> None:
    step = torch.tensor(1e-2)
    gap = derived.bounded_step(value, step, bound, plain=False) - derived.bounded_step(value, step, bound, plain=True)
    edge = bound.lower_bound if hasattr(bound, "lower_bound") else bound.upper_bound
    torch.testing.assert_close(gap, 0.5 * step**2 / (value - edge), rtol=1e-6, atol=0.0)


def test_a_step_without_a_bound_is_plain() -> None:
    assert derived.bounded_step(torch.tensor(0.5), torch.tensor(0.25), constraints.real, plain=False) == 0.75


@pytest.mark.parametrize("step", [0.0, 1e-12, -0.25, 3.0, -1e30])
def test_a_step_in_an_interval_uses_half_of_the_slack_at_most(step: float) -> None:
    """d s/(s + 2|d|), s the slack ahead; at the bound itself there is none."""
    bound, value = constraints.interval(-1.0, 1.0), torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64)
    step = torch.full_like(value, step)
    moved = derived.bounded_step(value, step, bound, plain=False)
    slack = torch.where(step < 0.0, value + 1.0, 1.0 - value)
    assert bool(((moved - value).abs() <= 0.5 * slack + 1e-15).all()) and bool((bound.check(moved)).all())
    torch.testing.assert_close(moved[0], value[0] + (step * slack / (slack + 2.0 * step.abs()))[0])


# ---- pathwise and score-function gradients ------------------------------------------------------------------


def expectation_by_quadrature(family: Any, state: Any, loss: Any, nodes: int = 20_000) -> Tensor:
    """E_q[ℓ] of every weight by midpoints of the noise's quantiles."""
    u = (torch.arange(nodes) + 0.5) / nodes
    noise = poco.noise.quantile(family.noise_kind, u).unsqueeze(-1)
    return loss(family.sample(state, noise)).mean(0)


@pytest.mark.parametrize("cls", [Exponential, LogNormal, GaussianByHand])
@pytest.mark.parametrize("loss", [torch.sin, lambda t: t**2, torch.tanh], ids=["sin", "square", "tanh"])
def test_pathwise_natural_gradients_are_gradients_in_the_mean(cls: Any, loss: Any) -> None:
    """F⁻¹ ∇_λ E_q[ℓ], with both the expectation and its gradient by quadrature."""
    family = cls()
    state = family.centred_at(torch.tensor([0.7, 1.3]), 4.0)
    u = (torch.arange(20_000) + 0.5) / 20_000
    noise = poco.noise.quantile(family.noise_kind, u).unsqueeze(-1).expand(-1, 2)
    theta = family.sample(state, noise).requires_grad_(True)
    (grad,) = torch.autograd.grad(loss(theta).sum(), theta)
    draws = poco.Draws(noise, theta.detach(), torch.zeros(len(theta)), grad)
    site = derived.pathwise_natural_gradient(family, state, draws)
    slope = torch.func.grad(lambda nat: expectation_by_quadrature(family, nat, loss).sum())(state)
    torch.testing.assert_close(tuple(family.fisher_vector_product(state, site)), tuple(slope), rtol=1e-8, atol=1e-8)


def test_the_pathwise_natural_gradient_of_an_exponential_in_closed_form() -> None:
    """E[θ²] = 2μ², whose gradient in μ is 4μ: the estimate's mean by quadrature, up to the tail it leaves out."""
    family = Exponential()
    state = family.centred_at(torch.tensor([0.5, 2.0]))
    u = (torch.arange(200_000) + 0.5) / 200_000
    noise = u.unsqueeze(-1).expand(-1, 2)
    theta = family.sample(state, noise)
    site = family.natural_gradient(state, poco.Draws(noise, theta, torch.zeros(len(theta)), 2.0 * theta))
    torch.testing.assert_close(site.theta, torch.tensor([2.0, 8.0]), rtol=1e-3, atol=0.0)


def test_the_score_function_s_baseline_leaves_the_draw_out() -> None:
    """With K draws: F⁻¹ (1/K) Σ_k (ℓ_k − mean_{j≠k} ℓ_j)(T(θ_k) − μ), written as loops."""
    family = Poisson()
    state = family.centred_at(torch.tensor([1.0, 4.0]))
    theta = torch.tensor([[0.0, 3.0], [2.0, 5.0], [1.0, 9.0]])
    loss = torch.tensor([0.5, 2.0, -1.0])
    mean = torch.exp(state.theta)
    total = torch.zeros(2)
    for k in range(3):
        others = (loss.sum() - loss[k]) / 2.0
        total = total + (loss[k] - others) * (theta[k] - mean) / 3.0
    site = derived.score_natural_gradient(family, state, poco.Draws(theta, theta, loss))
    torch.testing.assert_close(site.theta, total / mean)  # F = e^λ = μ


def test_natural_gradients_need_what_they_need() -> None:
    family = Exponential()
    state, theta = family.centred_at(torch.ones(2)), torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"draws.grad is None, but this natural gradient needs gradients"):
        family.natural_gradient(state, poco.Draws(theta, theta, torch.zeros(1)))
    with pytest.raises(ValueError, match=r"mc_samples=1: the score-function estimator compares draws"):
        poco.estimators.ScoreFunction().natural_gradient(family, state, poco.Draws(theta, theta, torch.zeros(1)))
