"""`check_family`: a family that breaks a law is told which; that every family keeps them is in test_conformance."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from broken_families import BROKEN, NoiseOfLambda, NotMinimal, ReanchorNothing, SignOfKL
from user_families import Exponential, GaussianByHand, LogNormal

import expfam_poco as poco
from expfam_poco.checks import suite
from expfam_poco.families import Bernoulli, DiagonalGaussian, FullGaussian, IsotropicGaussian

pytestmark = [pytest.mark.xdist_group("reports"), pytest.mark.usefixtures("noise_is_made_once")]
FLOAT64 = (torch.float64,)


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> None:
    """One broken family keeps what it sampled last."""
    NoiseOfLambda.last[0] = 0.0


# ---- families that keep the laws --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [IsotropicGaussian(1e4), IsotropicGaussian(0.01), Bernoulli("mean")], ids=["sharp", "flat", "mean"]
)
def test_hyperparameters_do_not_matter(family: poco.ExponentialFamily) -> None:
    assert poco.check_family(family, dtypes=FLOAT64).passed


@pytest.mark.parametrize(
    ("family", "seed"),
    [
        pytest.param(FullGaussian, 1, marks=pytest.mark.slow),
        (Bernoulli, 2),
        pytest.param(LogNormal, 3, marks=pytest.mark.slow),
    ],
)
def test_other_seeds_change_the_points_and_not_the_verdict(family: type[poco.ExponentialFamily], seed: int) -> None:
    report = poco.check_family(family, seed=seed, dtypes=FLOAT64)
    assert report.passed
    assert str(report) != str(poco.check_family(family, seed=0, dtypes=FLOAT64))


def test_the_same_seed_gives_the_same_report_and_leaves_global_settings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "LAWS", suite.LAWS[:7])
    before, threads = torch.get_rng_state(), []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    first = poco.check_family("bernoulli", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert threads == [1, torch.get_num_threads()]
    torch.rand(7)
    assert str(poco.check_family("bernoulli", seed=3)) == str(first)


SHAPES = [(), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(1,), (5,)]), (2, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_of_the_tensor_can_be_chosen(shape: tuple[int, ...]) -> None:
    assert poco.check_family(GaussianByHand, shape=shape, dtypes=FLOAT64).passed


def test_one_precision_alone_can_be_tested(dtype: torch.dtype) -> None:
    assert poco.check_family(DiagonalGaussian, dtypes=(dtype,)).passed


# ---- families that break one ------------------------------------------------------------------------------


def _cases() -> Iterator[Any]:
    """Every broken family; after the first of a law they are slow."""
    seen = Counter[str]()
    for broken, law in BROKEN:
        seen[law] += 1
        yield pytest.param(broken, law, id=broken.__name__, marks=[pytest.mark.slow] if seen[law] > 1 else [])


@pytest.mark.parametrize("before", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["alone", "as the first"])
@pytest.mark.parametrize(("broken", "law"), list(_cases()))
def test_a_broken_law_is_named(
    broken: type[poco.ExponentialFamily], law: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The law is the first that fails: those after it need not run, and those before it are kept (which is slow)."""
    last = [known.name for known in suite.LAWS].index(law)
    laws = suite.LAWS[: last + 1]
    monkeypatch.setattr(
        suite, "LAWS", laws if before else tuple(each for each in laws if each.essential or each.name == law)
    )
    dtypes = (torch.float32, torch.float64) if law == "dtypes" else FLOAT64
    with pytest.raises(poco.LawError) as caught:
        poco.check_family(broken, dtypes=dtypes)
    print(caught.value.report)
    sentence = str(caught.value)
    assert sentence.startswith(f"{broken.__name__}") and f"breaks the law {law!r}: " in sentence
    assert caught.value.report.failures[0].name == law


def test_the_sentence_tells_law_error_tolerance_hint_and_what_else_fails() -> None:
    with pytest.raises(poco.LawError) as caught:
        poco.check_family(SignOfKL, dtypes=FLOAT64)
    sentence = str(caught.value)
    result = caught.value.report.failures[0]
    assert result.error > 1e-3 > result.tolerance
    assert sentence == (
        f"SignOfKL() breaks the law 'kl_gradient': {result.detail}: error {result.error:.3g} where "
        f"{result.tolerance:.3g} is allowed; check the sign and the coordinates of kl_gradient "
        "(then also fail: own_site, chart, conjugate)."
    )
    assert isinstance(caught.value, AssertionError) and "\n" not in sentence


def test_an_unexpected_exception_fails_the_law_that_met_it_and_is_quoted() -> None:
    class Raises(DiagonalGaussian):
        def entropy(self, state):
            raise KeyError("no entropy\ntoday")

    report = poco.check_family(Raises, dtypes=FLOAT64, raise_on_failure=False)
    assert not report.passed
    failed = {law.name: law.detail for law in report.failures}
    assert failed["entropy"] == "raised KeyError: 'no entropy\\ntoday'"
    assert set(failed) == {"entropy", "spans", "as_trained", "dtypes"}  # the latter three look at every method


def test_what_fails_first_is_reported_before_what_is_raised_after_it() -> None:
    report = poco.check_family(NotMinimal, dtypes=FLOAT64, raise_on_failure=False)
    assert "not minimal" in report.failures[0].detail


def test_a_family_without_members_ends_the_report_there() -> None:
    class NoCentre(Exponential):
        def centred_at(self, theta, precision=None):
            raise RuntimeError("where?")

    report = poco.check_family(NoCentre, raise_on_failure=False)
    assert [(law.name, law.passed) for law in report.laws] == [("declarations", True), ("centred_at", False)]
    assert report.laws[1].detail == "raised RuntimeError: where?"


def test_the_report_is_a_table_with_one_line_for_each_law() -> None:
    report = poco.check_family(ReanchorNothing(), dtypes=FLOAT64, raise_on_failure=False)
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(suite.LAWS) == 2 + len(report.laws)
    assert lines[0] == f"ReanchorNothing() breaks {len(report.failures)} of {len(suite.LAWS)} laws"
    by_name = {line.split()[0]: line for line in lines[2:]}
    for law in report.laws:
        assert by_name[law.name].split()[1] == ("ok" if law.passed else "FAILS")
        assert law.detail in by_name[law.name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.laws = ()
    assert str(poco.check_family("isotropic_gaussian", dtypes=FLOAT64)).startswith(
        "IsotropicGaussian(precision=1.0) keeps every law\n"
    )


def test_what_cannot_be_tested_is_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    last = [known.name for known in suite.LAWS].index("natural_gradient")
    monkeypatch.setattr(suite, "LAWS", suite.LAWS[: last + 1])
    report = poco.check_family("full_gaussian", dtypes=FLOAT64)
    (law,) = (law for law in report.laws if law.name == "natural_gradient")
    assert law.detail.endswith("gradsq is biased, and its expectation has no quadrature for this family")


@pytest.mark.parametrize("dtypes", [(), (torch.float16,), (torch.float32, torch.int64)])
def test_other_dtypes_are_refused(dtypes: tuple[torch.dtype, ...]) -> None:
    with pytest.raises(ValueError, match=r"dtypes=.*torch.float32 or torch.float64"):
        poco.check_family("bernoulli", dtypes=dtypes)


def test_what_is_not_a_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'gaussian' is not registered; known families: bernoulli"):
        poco.check_family("gaussian")
    with pytest.raises(TypeError, match="neither a registered name nor an ExponentialFamily"):
        poco.check_family(torch.nn.Linear)


def test_name_class_and_instance_give_the_same_report() -> None:
    reports = [poco.check_family(f, dtypes=FLOAT64) for f in ("bernoulli", Bernoulli, Bernoulli())]
    assert str(reports[0]) == str(reports[1]) == str(reports[2])


def test_another_device_is_compared_with_the_first() -> None:
    """Torch takes "cpu:0" for a device of its own, so this much runs without CUDA."""
    report = poco.check_family("bernoulli", devices=["cpu", "cpu:0"])
    assert report.laws[-1].name == "devices" and report.laws[-1].tolerance > 0.0
    assert "against float64" in report.laws[-1].detail


@pytest.mark.cuda
@pytest.mark.parametrize("name", poco.families_available())
def test_every_registered_family_keeps_every_law_on_cuda(name: str) -> None:
    assert poco.check_family(name, devices=["cpu", "cuda"]).passed


@pytest.mark.cuda
def test_a_tensor_made_on_the_cpu_breaks_the_law_of_devices() -> None:
    class OnTheCPU(Exponential):
        def point(self, state):
            return super().point(state).cpu()

    with pytest.raises(poco.LawError, match=r"point gives .* on cpu"):
        poco.check_family(OnTheCPU)


def test_the_natural_gradient_derived_for_a_gaussian_is_the_closed_one() -> None:
    """The pathwise derivative solved with the Fisher matrix, against Stein's identity, draw by draw."""
    torch.manual_seed(0)
    by_hand, closed = GaussianByHand(), DiagonalGaussian()
    theta, epsilon = torch.randn(3, 2, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)
    loss, grad = torch.randn(5, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)
    state = closed.centred_at(theta, 3.0)
    draws = poco.Draws(epsilon, closed.sample(state, epsilon), loss, grad)
    expected = closed.site_to_nat(closed.natural_gradient(state, draws), state)
    derived = by_hand.natural_gradient(by_hand.centred_at(theta, 3.0), draws)
    torch.testing.assert_close(tuple(derived), tuple(expected), rtol=1e-12, atol=1e-12)
