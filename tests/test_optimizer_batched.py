"""All draws in one batched pass give the numbers of ordinary closures."""

import pytest
import torch
from torch import nn

import expfam_poco as poco


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(24, 3, dtype=torch.float64, generator=generator) for _ in range(2))  # type: ignore[return-value]


def trained(batched: bool, family: str, **choices: object) -> list[torch.Tensor]:
    """Posterior and losses after a few steps with refreshes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs, targets = data()
    opt = poco.PosteriorCorrected(model.parameters(), family, lr=0.02, ess=24.0, weight_decay=0.1, seed=3, **choices)  # type: ignore[arg-type]

    def closure(start: int) -> object:
        x, y = inputs[start : start + 6], targets[start : start + 6]
        if batched:
            return poco.BatchedDraws(model, nn.functional.mse_loss, x, y)
        return lambda: nn.functional.mse_loss(model(x), y)

    losses = []
    for step in range(8):
        if step % 3 == 1:
            losses.append(opt.refresh([closure(0), closure(6)]))  # type: ignore[list-item]
        losses.append(opt.step(closure(6 * (step % 4))))  # type: ignore[arg-type]
    return [*losses, *(value for state in opt.posterior_states().values() for value in state)]


@pytest.mark.parametrize("family", ["diagonal_gaussian", "isotropic_gaussian", "bernoulli", "full_gaussian"])
@pytest.mark.parametrize(
    "choices",
    [{}, {"mc_samples": 3}, {"mc_samples": 2, "noise": "antithetic"}, {"noise": "independent"}, {"noise": "fixed"}],
    ids=str,
)
def test_batched_draws_equal_draws_one_by_one(family: str, choices: dict[str, object]) -> None:
    curvature = {"curvature": "reparam"} if "gaussian" in family else {}
    one_by_one = trained(False, family, momentum=0.9, **curvature, **choices)
    at_once = trained(True, family, momentum=0.9, **curvature, **choices)
    for a, b in zip(one_by_one, at_once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_losses_alone_can_be_batched_too() -> None:
    choices = {"curvature": "score", "mc_samples": 4}
    for a, b in zip(trained(False, "bernoulli", **choices), trained(True, "bernoulli", **choices), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_dropout_is_the_same_for_all_draws() -> None:
    """Both sides of a pair see one mask: at λ_in = λ_out the corrected step is the mega-batch's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    inputs, targets = data()
    opt = poco.SVRG(model.parameters(), lr=0.1)
    batch = poco.BatchedDraws(model, nn.functional.mse_loss, inputs, targets)
    opt.refresh([batch])
    before = [p.detach().clone() for p in model.parameters()]
    means = [opt.state[p]["memory"].site.theta for p in model.parameters()]
    opt.step(batch)
    for p, old, mean in zip(model.parameters(), before, means, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * mean, rtol=1e-12, atol=1e-14)


def test_what_batched_draws_cannot_measure_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    inputs, targets = data()
    batch = poco.BatchedDraws(model, nn.functional.mse_loss, inputs, targets)
    with pytest.raises(ValueError, match="normalisation"):
        poco.IVON(model.parameters(), lr=0.1, ess=24.0).step(batch)
    plain = nn.Linear(3, 3).double()
    opt = poco.IVONPoCo(plain.parameters(), lr=0.1, ess=24.0, curvature="exact")
    with pytest.raises(ValueError, match="gradients alone"):
        opt.step(poco.BatchedDraws(plain, nn.functional.mse_loss, inputs, targets))
    with pytest.raises(ValueError, match="targets: 3 of them for 24 inputs"):
        poco.BatchedDraws(plain, nn.functional.mse_loss, inputs, targets[:3])
