"""The laws of the family, one test for each, and a small use under the name that the package registers."""

import torch
from expfam_poco_rayleigh import Rayleigh

import expfam_poco as poco
from expfam_poco.checks import FamilyLaws


class TestRayleigh(FamilyLaws):
    family = Rayleigh()


def test_it_is_the_density_of_a_length_in_the_plane() -> None:
    theta, sigma = torch.linspace(0.1, 5.0, 50, dtype=torch.float64), 1.3
    state = Rayleigh().from_nat(Rayleigh.Nat(torch.tensor(-0.5 / sigma**2, dtype=torch.float64)))
    expected = torch.distributions.Weibull(sigma * 2**0.5, 2.0).log_prob(theta)  # the same density
    torch.testing.assert_close(Rayleigh().log_prob(state, theta), expected)


def test_the_installed_name_trains_positive_scales() -> None:
    """Needs the package installed: `pip install .` in its folder."""
    torch.manual_seed(0)
    truth = torch.tensor([2.0, 0.5])
    x = torch.randn(256, 2)
    y = x @ truth + 0.1 * torch.randn(256)
    scale = torch.nn.Parameter(torch.ones(2))
    optimizer = poco.PosteriorCorrected([("scale", scale)], "rayleigh-scale", lr=0.005, ess=32, mc_samples=8, seed=0)
    before = (x @ scale - y).square().mean().item()
    for _ in range(300):
        optimizer.step(lambda: 0.5 * (x @ scale - y).square().mean())
    assert bool((scale > 0).all())
    assert (x @ scale - y).square().mean().item() < 0.5 * before
