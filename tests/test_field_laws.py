"""Laws that see the whole distribution, and the training run: a wrong family is told so, a right one passes."""

import math
from typing import Any

import pytest
import torch
from torch.distributions import constraints
from user_families import Poisson, UnitGaussian

import expfam_poco as poco
from expfam_poco.checks import suite
from expfam_poco.checks.references import Cholesky, Stereographic

FLOAT64 = (torch.float64,)


def laws(family: Any, monkeypatch: pytest.MonkeyPatch, *names: str, **options: Any) -> suite.Report:
    """A report of these laws alone."""
    monkeypatch.setattr(suite, "LAWS", tuple(law for law in suite.LAWS if law.name in ("centred_at", *names)))
    return poco.check_family(family, raise_on_failure=False, **{"dtypes": FLOAT64, **options})


# ---- families --------------------------------------------------------------------------------------------------


class Uniform(UnitGaussian):
    """Draws of the right mean and variance, uniform."""

    def sample(self, state, noise):
        return state.theta + math.sqrt(12.0) * (noise - 0.5)


class Rows(UnitGaussian):
    """N(λ, I) for rows."""

    event_dim = 1
    statistic_dims = (1,)

    def log_base_measure(self, theta):
        return super().log_base_measure(theta).sum(-1)

    def expected_log_base_measure(self, state):
        return super().expected_log_base_measure(state).sum(-1)

    def log_partition(self, nat):
        return super().log_partition(nat).sum(-1)


class Shell(Rows):
    """Rows of the right mean and covariance, all on a sphere."""

    noise_kind = "normal"

    def sample(self, state, noise):
        length = noise.square().sum(-1, keepdim=True).sqrt()
        return state.theta + noise / length * math.sqrt(noise.shape[-1]) * (1.0 + 1e-3 * noise[..., :1].sin())


class Doubled(Poisson):
    """Even counts only, where the mean is large, of about the right mean."""

    def sample(self, state, noise):
        return 2.0 * torch.round(0.5 * super().sample(state, noise))


# ---- goodness of fit, normalisation ------------------------------------------------------------------------


@pytest.mark.parametrize("family", [Uniform, Shell, Doubled])
def test_a_wrong_sampler_of_the_right_moments_is_found(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    report = laws(family, monkeypatch, "goodness_of_fit")
    assert [law.name for law in report.failures] == ["goodness_of_fit"]


@pytest.mark.parametrize("family", [UnitGaussian, Rows, Poisson])
def test_a_right_sampler_passes(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, law) = laws(family, monkeypatch, "goodness_of_fit").laws
    assert law.status == "ok", law


def test_what_cannot_be_tested_is_not_verified_and_never_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(type(constraints.real_vector)):  # type: ignore[misc]
        """A support that nobody knows coordinates of."""

    class Strange(Rows):
        support = Odd(constraints.real, 1)

        def reference_like(self, like):
            return torch.zeros_like(like)

    monkeypatch.setattr(
        "expfam_poco.checks.references.coordinates", lambda *_: (_ for _ in ()).throw(NotImplementedError)
    )
    report = laws(Strange, monkeypatch, "goodness_of_fit", "log_prob")
    assert [law.name for law in report.unverified] == ["goodness_of_fit", "log_prob"] and report.passed
    assert "2 of 3 are not verified" in str(report) and "keeps every law" not in str(report)


@pytest.mark.parametrize("kind", ["cholesky", "sphere"])
def test_coordinates_have_the_right_volume(kind: str) -> None:
    """Against the determinant of the map to independent entries, and the area of the sphere."""
    generator = torch.Generator().manual_seed(0)
    if kind == "cholesky":
        x = torch.randn(6, generator=generator, dtype=torch.float64)
        row, column = torch.tril_indices(3, 3)
        jacobian = torch.func.jacrev(lambda v: Cholesky()(v)[row, column])(x)
        found = Cholesky().log_abs_det_jacobian(x, Cholesky()(x))
        torch.testing.assert_close(found, torch.linalg.slogdet(jacobian)[1])
        torch.testing.assert_close(Cholesky().inv(Cholesky()(x)), x)
        return
    theta = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    transform = Stereographic(theta)
    x = torch.randn(2, generator=generator, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda v: transform(v))(x)
    found = transform.log_abs_det_jacobian(x, transform(x))
    torch.testing.assert_close(found, 0.5 * torch.linalg.slogdet(jacobian.mT @ jacobian)[1])
    torch.testing.assert_close(transform.inv(transform(x)), x)


def test_a_constant_point_is_refused_for_it_would_erase_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class Erasing(UnitGaussian):
        def point(self, state):
            return torch.zeros_like(state.theta)

    (law,) = laws(Erasing, monkeypatch, "point").failures
    assert "in place of the model's weights" in law.detail


# ---- as the optimizer runs ------------------------------------------------------------------------------------


def test_a_law_that_sees_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(UnitGaussian):
        def natural_gradient(self, state, draws):
            site = super().natural_gradient(state, draws)
            return site if torch.is_grad_enabled() else self.Site(site.theta * math.nan)

    (law,) = laws(Blind, monkeypatch, "as_trained").failures
    assert law.name == "as_trained" and "not finite under no_grad" in law.detail
