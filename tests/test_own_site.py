"""The posterior's own site as control variate, in the optimizer: no noise at the optimum of a model in the family."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from user_families import GaussianByHand

import expfam_poco as poco

N, D = 40.0, 4
X = torch.randn(40, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0, 0.5, 0.3], dtype=torch.float64) + 0.3 * torch.sin(torch.arange(40.0))
INSIDE = (
    "diagonal_gaussian", "isotropic_gaussian", "gamma", "beta", "dirichlet", "von_mises", "log_normal", "bernoulli",
    "kronecker_gaussian", "low_rank_gaussian", "by_hand",
)  # fmt: skip


def regression(**choices: Any) -> tuple[Any, Any, Any]:
    """An optimizer of the full Gaussian on linear regression, its closure, and the exact posterior."""
    weights = torch.nn.Parameter(torch.zeros(D, dtype=torch.float64))
    given = {
        "family": "full_gaussian",
        "lr": 1.0,
        "ess": N,
        "weight_decay": 0.02,
        "hess_init": 1.0,
        "seed": 1,
        **choices,
    }
    opt = poco.PosteriorCorrected([weights], **given)
    precision = 0.02 * N * torch.eye(D, dtype=torch.float64) + X.mT @ X
    return opt, lambda: 0.5 * (X @ weights - Y).square().mean(), (torch.linalg.solve(precision, X.mT @ Y), precision)


def error(opt: Any, exact: tuple[Tensor, Tensor]) -> float:
    """The largest error of mean and precision."""
    (found,) = opt.posterior_states().values()
    return max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize(("noise", "steps"), [("shared", 2), ("antithetic", 1)])
def test_linear_regression_is_exact_as_soon_as_the_precision_is(noise: str, steps: int) -> None:
    # The first step finds S, the next one draws from N(m, S⁻¹) and sees no noise; pairs ±ε need no S.
    choices = {"curvature": "exact", "retraction": "plain", "noise": noise}
    opt, closure, exact = regression(own_site=True, **choices)
    for _ in range(steps):
        opt.step(closure)
    assert error(opt, exact) <= 1e-10
    plain, closure, exact = regression(**choices)
    for _ in range(20):
        plain.step(closure)
    assert noise == "antithetic" or error(plain, exact) > 0.01  # a draw from the posterior, for ever


@pytest.mark.parametrize(("curvature", "draws"), [("reparam", 4), ("score", 24)])
def test_noisy_estimators_converge_linearly_where_the_model_is_in_the_family(curvature: str, draws: int) -> None:
    opt, closure, exact = regression(curvature=curvature, lr=0.1, mc_samples=draws, own_site=True)
    for _ in range(350):
        opt.step(closure)
    assert error(opt, exact) <= 1e-9


def settled(name: str, **choices: Any) -> tuple[Any, Any, Any]:
    """A posterior λ that is the optimum, for ℓ = log p₀/q_λ / N is inside its family: optimizer, closure, λ."""
    family = GaussianByHand() if name == "by_hand" else poco.resolve_family(name)
    shift = torch.tensor([[0.05, -0.05, 0.0], [-0.02, 0.0, 0.02]], dtype=torch.float64)
    shift = shift.flatten() if family.joint else shift
    middle = family.reference_like(torch.zeros_like(shift))
    weights = torch.nn.Parameter(middle + shift)
    width = None if name in ("isotropic_gaussian", "bernoulli") else 7.0 / N
    strength = None if width is None else 7.0
    prior, state = family.centred_at(middle, 1.5), family.centred_at(weights.detach().clone(), strength)
    given = {"prior": prior, "hess_init": width, "seed": 3, **choices}
    opt = poco.PosteriorCorrected([("w", weights)], family, 0.3, N, **given)

    def closure() -> Tensor:
        return -family.log_ratio(state, prior, weights).sum() / N

    return opt, closure, state


@pytest.mark.parametrize("how", [{}, {"momentum": 0.9, "noise": "antithetic", "mc_samples": 2}, {"alpha": 1.0}])
@pytest.mark.parametrize("name", INSIDE)
def test_at_the_optimum_of_a_model_in_the_family_nothing_moves(name: str, how: dict[str, Any]) -> None:
    # Momentum averages what is 0, a correction what is the same at both posteriors.
    moved = {}
    for own in (True, False):
        opt, closure, state = settled(name, own_site=own, **how)
        for step in range(6):
            if "alpha" in how and step == 2:
                opt.refresh([closure])
            opt.step(closure)
        (found,) = opt.posterior_states().values()
        family = opt.param_groups[0]["family"]  # a curved one's factors are not unique
        pair = [family.expand(q) for q in (found, state)] if family.curved else [found, state]
        moved[own] = max(float((a - b).abs().max()) for a, b in zip(*pair, strict=True))
    assert moved[True] <= 1e-10
    assert name in ("bernoulli", "isotropic_gaussian") or moved[False] > 1e-4


def test_with_a_reference_mini_batches_and_noise_are_still_compared_away() -> None:
    # At λ = λ_out the corrected gradient is the mega-batch's: all mini-batches give the same step.
    found = []
    for start in (0, 24):
        opt, _, _ = regression(own_site=True, curvature="exact", lr=0.3)
        closures = [partial(batch_loss, opt, slice(i, i + 8)) for i in range(0, 40, 8)]
        opt.refresh(closures)
        opt.step(closures[start // 8])
        found.append(next(iter(opt.posterior_states().values())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def batch_loss(opt: Any, rows: slice) -> Tensor:
    (weights,) = opt.param_groups[0]["params"]
    return 0.5 * (X[rows] @ weights - Y[rows]).square().mean()


def test_blocks_of_a_model_and_its_checkpoint(tmp_path: Any) -> None:
    # Two tensors, which would be laid side by side, and a group without; saved and continued bit for bit.
    def made() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "own_site": False}]
        opt = poco.PosteriorCorrected(groups, "diagonal_gaussian", 0.02, 10.0, hess_init=1.0, own_site=True, seed=0)
        x = torch.linspace(-1.0, 1.0, 30).reshape(10, 3)
        return opt, lambda: (model(x) - x.sum(1, keepdim=True)).square().mean()

    opt, closure = made()
    for _ in range(3):
        opt.step(closure)
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    again, closure_again = made()
    for (p, _), (q, _) in zip(
        opt.state.items(), [(q, 0) for g in again.param_groups for q in g["params"]], strict=True
    ):
        q.data.copy_(p)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [group["own_site"] for group in again.param_groups] == [True, False]
    assert [opt.step(closure).item() for _ in range(3)] == [again.step(closure_again).item() for _ in range(3)]


def test_von_has_it_and_what_it_does_not_fit_is_refused() -> None:
    weights = torch.nn.Parameter(torch.ones(2))
    assert poco.VON([weights], lr=0.1, ess=1.0).param_groups[0]["own_site"] is True
    assert poco.IVON([weights], lr=0.1, ess=1.0).param_groups[0]["own_site"] is False
    with pytest.raises(ValueError, match="own_site=True: SingleFlip measures variations"):
        poco.PosteriorCorrected([weights], "bernoulli", 0.1, 1.0, curvature="flip", own_site=True)


def test_a_precision_that_beta2_keeps_where_it_was_is_told_once() -> None:
    def run(**choices: Any) -> list[str]:
        weight = torch.nn.Parameter(torch.zeros(1))
        opt = poco.IVON([weight], lr=0.1, ess=4.0, weight_decay=1.0, seed=0, **choices)
        opt.step(lambda: weight.square().sum())
        state = opt.state_dict()
        state["poco"]["clock"]["step"] = 998  # as after so many steps
        opt.load_state_dict(state)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                opt.step(lambda: weight.square().sum())
        return [str(warning.message) for warning in caught]

    (told,) = run()
    assert "beta2=0.99999 " in told and "1.0% of its way" in told and "beta2=1 - 10/steps" in told
    assert run(beta2=0.9999) == [] and run(beta2=1.0) == []  # 9.5 %, and a width that is meant to stay
