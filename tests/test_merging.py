"""Sites multiply: merged posteriors are those of all data, and what is no posterior is refused by name."""

from typing import Any

import pytest
import torch

import expfam_poco as poco
from expfam_poco.checks import suite
from expfam_poco.checks.specimens import Specimen
from expfam_poco.family import fields

FLAT = [
    name for name in poco.families_available() if name != "product" and not poco.resolve_family(name).curved
]  # fmt: skip
CURVED = [name for name in poco.families_available() if name != "product" and poco.resolve_family(name).curved]


def specimen_of(name: str) -> Specimen:
    family = poco.resolve_family(name)
    return Specimen(family, suite.default_shape(family), torch.float64, torch.device("cpu"), 0).with_members()


@pytest.mark.parametrize("name", FLAT)
def test_the_merged_density_is_the_prior_times_all_sites(name: str) -> None:
    """log q(θ) − log p₀(θ) − Σ (log q_k(θ) − log p₀(θ)) is one number for all θ; order and grouping do not matter."""
    specimen = specimen_of(name)
    family, (prior, *members) = specimen.family, specimen.states
    posteriors = []
    for state in members[:2]:  # no site is wider than the prior, so that every sum is in the domain
        nats = family.to_nat(prior), family.to_nat(state)
        inside = family.from_nat(fields.map_fields(lambda a, b: 0.6 * a + 0.4 * b, *nats))
        posteriors.append({"w": inside})
    merged = poco.merge(posteriors, prior, family)["w"]
    thetas = specimen.support_points(6)
    if family.levels is not None:
        thetas = family.sample(prior, family.noise(specimen.shape, 6, specimen.key(5), dtype=torch.float64))
    ratio = family.log_prob(merged, thetas) - family.log_prob(prior, thetas)
    for own in posteriors:
        ratio = ratio - (family.log_prob(own["w"], thetas) - family.log_prob(prior, thetas))
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-8, atol=1e-8)
    again = poco.merge(posteriors[::-1], prior, family)["w"]
    alone = poco.merge(posteriors[:1], prior, family)["w"]
    torch.testing.assert_close(tuple(again), tuple(merged), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(tuple(alone), tuple(posteriors[0]["w"]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CURVED)
def test_curved_families_merge_in_their_ambient_one(name: str) -> None:
    specimen = specimen_of(name)
    family, (prior, state, *_) = specimen.family, specimen.states
    with pytest.raises(ValueError, match=r"'w' has a .*merge family.expand\(state\) in family.ambient"):
        poco.merge([{"w": state}], prior, family)
    dense, other = (family.ambient.to_nat(family.expand(own)) for own in (prior, state))
    inside = family.ambient.from_nat(fields.map_fields(lambda a, b: 0.6 * a + 0.4 * b, dense, other))
    found = poco.merge([{"w": inside}] * 2, family.expand(prior), family.ambient)["w"]
    expected = 0.2 * family.expand(prior).precision + 0.8 * family.expand(state).precision
    torch.testing.assert_close(found.precision, expected)


def test_two_halves_of_a_regression_make_the_posterior_of_the_whole() -> None:
    """Exact where the loss is conjugate: VON's fixed point on each half, merged, is the one on all data."""
    torch.manual_seed(0)
    x, noise = torch.randn(40, 3, dtype=torch.float64), 0.1 * torch.randn(40, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + noise
    gaussian = poco.resolve_family("full_gaussian")
    prior = gaussian.centred_at(torch.zeros(3, dtype=torch.float64), 2.0)

    def trained(rows: slice) -> Any:
        w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        n = len(x[rows])
        optimizer = poco.VON([("w", w)], lr=0.5, ess=n, prior=prior, hess_init=1.0, noise="zero", curvature="exact")
        for _ in range(80):
            optimizer.step(lambda: 0.5 * (x[rows] @ w - y[rows]).square().mean())
        return optimizer.posterior_states()

    whole = trained(slice(None))
    merged = poco.merge([trained(slice(0, 15)), trained(slice(15, 40))], prior, gaussian)
    (name,) = whole
    torch.testing.assert_close(tuple(merged[name]), tuple(whole[name]), rtol=1e-9, atol=1e-9)


def test_an_optimizer_goes_on_from_a_merged_posterior() -> None:
    model = torch.nn.Linear(3, 1).double()

    def closure() -> torch.Tensor:
        return model(torch.ones(4, 3, dtype=torch.float64)).square().mean()

    optimizer = poco.IVONPoCo(model.named_parameters(), lr=0.1, ess=16.0, hess_init=1.0, seed=1)
    for _ in range(3):
        optimizer.step(closure)
    prior = poco.resolve_family("diagonal_gaussian").centred_at(torch.zeros((), dtype=torch.float64), 4.0)
    merged = poco.merge([optimizer.posterior_states()] * 2, prior, "diagonal_gaussian")
    optimizer.set_posterior(merged)
    for name, p in model.named_parameters():
        assert torch.equal(p, merged[name].mean)
        assert all(map(torch.equal, optimizer.posterior_states()[name], merged[name]))
    optimizer.set_outer(merged)
    optimizer.step(closure)
    other = torch.nn.Linear(3, 1).double()
    fresh = poco.IVONPoCo(other.named_parameters(), lr=0.1, ess=16.0, prior=merged, seed=1)
    fresh.set_posterior(merged)
    assert all(torch.equal(p, merged[name].mean) for name, p in other.named_parameters())
    found = fresh.objective([lambda: 0.0 * other(torch.ones(1, 3).double()).sum()])
    assert abs(found.kl) < 1e-9


def gaussian(mean: float, precision: float, size: int = 2) -> Any:
    return poco.resolve_family("diagonal_gaussian").centred_at(torch.full((size,), float(mean)), float(precision))


MERGED = "diagonal_gaussian"
REFUSED: dict[str, tuple[Any, str]] = {
    "none": (lambda: poco.merge([], gaussian(0, 1), MERGED), "posteriors: give a list"),
    "no states": (lambda: poco.merge([3], gaussian(0, 1), MERGED), "posteriors"),  # type: ignore[list-item]
    "names": (lambda: poco.merge([{"a": gaussian(0, 2)}, {"b": gaussian(0, 2)}], gaussian(0, 1), MERGED),
              "posteriors\\[1\\]: its parameters are \\['b'\\]"),
    "family": (lambda: poco.merge([{"a": gaussian(0, 2)}], gaussian(0, 1), "gamma"), "'a' has a GaussianState where"),
    "shape": (lambda: poco.merge([{"a": gaussian(0, 2)}, {"a": gaussian(0, 2, 3)}], gaussian(0, 1), MERGED),
              "'a' has another shape"),
    "prior's shape": (lambda: poco.merge([{"a": gaussian(0, 2)}], gaussian(0, 1, 3), MERGED), "for 'a'"),
    "no prior": (lambda: poco.merge([{"a": gaussian(0, 2)}], {}, MERGED), "prior: 'a' has a NoneType"),
    "wide": (lambda: poco.merge([{"a": gaussian(0, 0.4)}] * 2, gaussian(0, 1), MERGED),
             "the sum of 2 sites lies outside the domain of DiagonalGaussian for 'a'"),
    "precision": (lambda: poco.merge([{"a": gaussian(0, 1)}], gaussian(0, 3), "isotropic_gaussian"),
                  "no member of IsotropicGaussian"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_posterior_is_refused(what: str) -> None:
    action, message = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=message):
        action()
