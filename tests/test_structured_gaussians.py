"""Kronecker-factored, low-rank and block-diagonal Gaussians against dense computations, and training networks."""

from typing import Any

import pytest
import torch
from torch import Tensor

import expfam_poco as poco
from expfam_poco import blr, correction
from expfam_poco.families import (
    BlockDiagonalGaussian,
    DiagonalGaussian,
    FullGaussian,
    GaussianState,
    KroneckerGaussian,
    LowRankGaussian,
)
from expfam_poco.families.gaussian.kronecker import KroneckerState
from expfam_poco.families.gaussian.low_rank import LowRankState

pytestmark = pytest.mark.usefixtures("float64")

CURVED = [(KroneckerGaussian(), (3, 4)), (KroneckerGaussian(axes=3), (3, 2, 2)), (LowRankGaussian(rank=2), (10,))]
NAMES = ["matrix", "convolution", "low rank"]


def positive(size: int, generator: torch.Generator) -> Tensor:
    factor = torch.randn(size, size, generator=generator)
    matrix = factor @ factor.T + 0.5 * torch.eye(size)
    return 0.5 * (matrix + matrix.T)


def member(family: Any, shape: tuple[int, ...], seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator)
    if isinstance(family, KroneckerGaussian):
        return KroneckerState(mean, *(positive(n, generator) for n in (shape[0], mean[0].numel())))
    factor = torch.randn(shape[0], family.rank, generator=generator)
    return LowRankState(mean, torch.rand(shape, generator=generator) + 0.5, factor)


def tangents(family: Any, state: Any) -> list[Tensor]:
    """Derivatives of the dense precision along every coordinate of the state but the mean: a spanning set."""
    found = []
    for number, field in enumerate(state[1:], start=1):

        def precision(value: Tensor, number: int = number) -> Tensor:
            value = 0.5 * (value + value.mT) if isinstance(family, KroneckerGaussian) else value
            return family.expand_precision(type(state)(*state[:number], value, *state[number + 1 :]))

        jacobian = torch.autograd.functional.jacobian(precision, field)
        found.extend(jacobian.flatten(2).movedim(-1, 0))
    return found


# ---- projections by dense least squares --------------------------------------------------------------------


@pytest.mark.parametrize(("family", "shape"), CURVED, ids=NAMES)
def test_projections_are_least_squares_in_the_fisher_metric(family: Any, shape: tuple[int, ...]) -> None:
    state = member(family, shape, 0)
    root = torch.linalg.cholesky(torch.linalg.inv(family.expand_precision(state)))
    spanning = torch.stack([(root.mT @ x @ root).reshape(-1) for x in tangents(family, state)], 1)
    curvature = torch.randn(root.shape)
    curvature = curvature + curvature.mT
    target = (root.mT @ curvature @ root).reshape(-1)
    best = spanning @ torch.linalg.lstsq(spanning, target, driver="gelsd").solution
    site = family.project(FullGaussian.Site(torch.zeros(root.shape[0]), curvature), state)
    found = root.mT @ family.expand_curvature(site, state) @ root
    torch.testing.assert_close(found.reshape(-1), best, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("family", "shape"), CURVED, ids=NAMES)
def test_products_and_carried_sites_are_projected_like_dense_ones(family: Any, shape: tuple[int, ...]) -> None:
    state, other = member(family, shape, 0), member(family, shape, 1)
    first, second = torch.randn(2, 5, *shape)
    left, right = family.flatten(first), family.flatten(second)
    dense = torch.einsum("ki,kj->ij", left, right) / 5
    ambient = FullGaussian.Site(torch.zeros(left.shape[-1]), dense)
    products = family.project_products(first, second, state)
    torch.testing.assert_close(products, tuple(family.project(ambient, state)[1:]), rtol=1e-8, atol=1e-8)
    site = family.Site(torch.randn(shape), *products)
    carried = family.carry(site, state, other)
    through = family.project(family.expand_site(site, state), other)
    torch.testing.assert_close(tuple(carried), tuple(through), rtol=1e-7, atol=1e-7)
    vector = torch.randn(shape)
    applied = family.expand_curvature(site, state) @ family.flatten(vector)
    torch.testing.assert_close(family.flatten(family.apply_curvature(site, state, vector)), applied)


@pytest.mark.parametrize(("family", "shape"), CURVED, ids=NAMES)
def test_samples_and_their_whitened_noise(family: Any, shape: tuple[int, ...]) -> None:
    """θ is linear in ε: its covariance is J Jᵀ = S⁻¹, and S (θ−m) what `whiten` says."""
    state = member(family, shape, 0)
    size = int(torch.Size(shape).numel())
    noise = torch.eye(size).reshape(size, *shape)
    offset = family.flatten(family.sample(state, noise) - state.mean)
    precision = family.expand_precision(state)
    torch.testing.assert_close(offset.T @ offset, torch.linalg.inv(precision))
    torch.testing.assert_close(family.flatten(family.whiten(state, noise)), offset @ precision)


@pytest.mark.parametrize(("family", "shape"), CURVED, ids=NAMES)
def test_a_corrected_step_is_the_projection_of_the_ambient_one(family: Any, shape: tuple[int, ...]) -> None:
    """From one inner state, with another outer one: the step's tangent against the full direction's projection."""
    state, away, prior = (member(family, shape, seed) for seed in (0, 1, 2))
    ambient, dense = FullGaussian(), family.expand(state)
    g_in, g_out, g_mean = (
        ambient.Site(torch.randn(dense.mean.shape), positive(len(dense.mean), torch.Generator().manual_seed(seed)))
        for seed in (3, 4, 5)
    )
    g_mean = family.expand_site(family.project(g_mean, away), away)  # an average of sites of the family
    g_out = family.expand_site(family.project(g_out, away), away)
    outer = correction.Outer(away, family.project(g_mean, away))
    found = correction.correct(
        family, family.project(g_in, state), family.project(g_out, away), state, outer, alpha=0.7
    )
    rate, ess = 1e-9, 10.0
    step = blr.update(
        family, blr.BLRState(state, ()), prior, found.site, rates=family.per_block(rate, rate), ess=ess,
        anchor=found.anchor,
    ).posterior  # fmt: skip
    full = correction.correct(ambient, g_in, g_out, dense, correction.Outer(family.expand(away), g_mean), alpha=0.7)
    site = ambient.Site(*(a + b for a, b in zip(full.site, full.anchor, strict=True)))
    pull = ambient.kl_gradient(dense, family.expand(prior))
    direction = ambient.Site(*(a + ess * b for a, b in zip(pull, site, strict=True)))
    tangent = family.expand_site(family.project(direction, state), state)
    moved = family.expand(step)
    torch.testing.assert_close((moved.precision - dense.precision) / rate, tangent.curvature, rtol=1e-3, atol=1e-3)
    slope = torch.linalg.solve(dense.precision, direction.gradient)
    torch.testing.assert_close((dense.mean - moved.mean) / rate, slope, rtol=1e-3, atol=1e-3)


# ---- quadratic losses whose posterior is a member -------------------------------------------------------------


@pytest.mark.parametrize(("family", "shape"), [CURVED[0], CURVED[2]], ids=["matrix", "low rank"])
def test_the_rule_finds_a_posterior_that_is_a_member(family: Any, shape: tuple[int, ...]) -> None:
    """ℓ = ½ (θ−m*)ᵀ S* (θ−m*) under a flat prior, its exact Hessian projected: the fixed point is N(m*, (N S*)⁻¹)."""
    truth, ess = member(family, shape, 3), 20.0
    precision = family.expand_precision(truth)
    state = family.centred_at(torch.zeros(shape), 1.0)
    prior = family.centred_at(torch.zeros(shape), 0.0)
    for _ in range(400):
        gradient = precision @ family.flatten(state.mean - truth.mean)
        site = family.project(FullGaussian.Site(gradient, precision), state)
        moved = blr.BLRState(state, ())
        state = blr.update(family, moved, prior, site, rates=family.per_block(0.2, 0.2), ess=ess).posterior
    torch.testing.assert_close(family.expand_precision(state), ess * precision, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.mean, truth.mean, rtol=1e-5, atol=1e-5)


def test_a_block_diagonal_gaussian_is_a_full_one_for_every_row() -> None:
    rows = [GaussianState(torch.randn(3), positive(3, torch.Generator().manual_seed(seed))) for seed in range(4)]
    state = GaussianState(*(torch.stack(values) for values in zip(*rows, strict=True)))
    family, noise = BlockDiagonalGaussian(), torch.randn(5, 4, 3)
    theta = family.sample(state, noise)
    draws = poco.Draws(noise, theta, torch.zeros(5), torch.randn(5, 4, 3))
    site = family.natural_gradient(state, draws)
    for row, single in enumerate(rows):
        torch.testing.assert_close(theta[:, row], FullGaussian().sample(single, noise[:, row]))
        own = FullGaussian().natural_gradient(single, poco.Draws(*(
            value if value is None or value.ndim == 1 else value[:, row] for value in draws
        )))  # fmt: skip
        torch.testing.assert_close((site.gradient[row], site.curvature[row]), tuple(own))


# ---- networks -------------------------------------------------------------------------------------------------


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(12, 2))


def train(optimizer: Any, model: torch.nn.Module, steps: int, start: int = 0) -> list[float]:
    x = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0, 0, 0] + x[:, 0, 1, 1] > 0).long()

    def closure(rows: Tensor) -> Any:
        return lambda: torch.nn.functional.cross_entropy(model(x[rows]), y[rows])

    losses = []
    for number in range(start, start + steps):
        if number % 5 == 0:
            optimizer.refresh([closure(rows) for rows in torch.arange(64).split(16)])
        rows = torch.randint(64, (16,), generator=torch.Generator().manual_seed(number))
        losses.append(float(optimizer.step(closure(rows))))
    return losses


@pytest.mark.parametrize("curvature", ["reparam", "gradsq"])
@pytest.mark.parametrize(
    "family", [KroneckerGaussian(), LowRankGaussian(rank=2), BlockDiagonalGaussian()], ids=lambda f: type(f).__name__
)
def test_networks_train_with_corrections_and_resume_bit_for_bit(family: Any, curvature: str) -> None:
    def made() -> tuple[torch.nn.Module, Any]:
        model = network()
        optimizer = poco.PosteriorCorrected(
            model.named_parameters(), family, lr=0.1, ess=256.0, weight_decay=1e-2, hess_init=0.5, momentum=0.9,
            precision_lr=1e-3 if curvature == "reparam" else 1e-5, curvature=curvature, alpha=0.7, rho=0.3, seed=0,
        )  # fmt: skip
        return model, optimizer

    model, optimizer = made()
    losses = train(optimizer, model, 60)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert 0.0 < optimizer.diagnostics()["variance_ratio.gradient"] < 1.0
    drawn = {name: q.sample() for name, q in optimizer.posterior().items()}
    if not family.joint:
        assert {name: tuple(value.shape) for name, value in drawn.items()} == {
            name: tuple(p.shape) for name, p in model.named_parameters()
        }
    again, twin = made()
    train(twin, again, 32)
    saved = twin.state_dict()
    other, resumed = made()
    other.load_state_dict(again.state_dict())
    resumed.load_state_dict(saved)
    train(resumed, other, 28, start=32)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_vectors_and_giants_get_a_diagonal_gaussian() -> None:
    family = KroneckerGaussian(largest=10)
    assert family.for_shape(torch.Size([5])) == family.for_shape(torch.Size([11, 2])) == DiagonalGaussian()
    assert family.for_shape(torch.Size([2, 3, 4])) == DiagonalGaussian()  # 12 columns
    assert family.for_shape(torch.Size([2, 3, 3])) == KroneckerGaussian(axes=3, largest=10)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: KroneckerGaussian(axes=1), "axes=1: give an integer, 2 or larger"),
        (lambda: KroneckerGaussian(largest=0), "largest=0: give an integer, 1 or larger"),
        (lambda: LowRankGaussian(rank=0), "rank=0: give a positive integer"),
        (
            lambda: poco.VON([torch.nn.Parameter(torch.zeros(()))], lr=0.1, ess=1.0, curvature="none"),
            "curvature='none'",
        ),
        (lambda: KroneckerGaussian().from_nat(None), "KroneckerGaussian is curved"),
    ],
)
def test_wrong_arguments_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        make()


def test_a_hessian_entry_by_entry_is_not_for_factored_families() -> None:
    with pytest.raises(ValueError, match="curvature='exact' is not an estimator for KroneckerGaussian"):
        poco.PosteriorCorrected(network().parameters(), KroneckerGaussian(), lr=0.1, ess=1.0, curvature="exact")


def test_a_number_has_no_rows() -> None:
    parameter = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match=r"has 1 axes, but group0.param0 has shape \(\)"):
        poco.PosteriorCorrected([parameter], BlockDiagonalGaussian(), lr=0.1, ess=1.0)
