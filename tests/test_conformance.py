"""Every family, tested as users test theirs: one class of `FamilyLaws` each, and what broken families are told."""

import sys
from typing import Any

import pytest
from broken_families import (
    AlwaysPlain,
    CentredOutside,
    NegativeSamples,
    SiteWithoutHalf,
    UndeclaredDomain,
    WrongKL,
    WrongMean,
)
from user_families import USER_FAMILIES, Exponential, LogNormal

import expfam_poco as poco
from expfam_poco.checks import FamilyLaws

pytestmark = pytest.mark.usefixtures("noise_is_made_once")

# Where a family is not meant for all strengths from 1e-6 to 1e6, or for all centres.
BOUNDS: dict[str, dict[str, Any]] = {
    "LogNormal": {"strengths": (1e-2, 1e6)},  # θ = exp(m + ε/√s) has no float32 for smaller s
    "Categorical": {"strengths": (1e-6, 1e2), "edge": 3.0},  # θ are logits here, and μ's rounding is multiplied by them
    # The retraction squares steps relative to the precision, whose entries are coupled: float32 ends there.
    "kronecker_gaussian": {"strengths": (1e-3, 1e6)},
    "normal_gamma": {"strengths": (30.0, 1e6), "examples": 6},  # λ has no digits of b beside k m² where m moves far
    "wishart": {"shape": (2, 2, 2), "strengths": (0.3, 1e3), "edge": 2.0, "examples": 6},  # in float32, as all matrices
    **{name: {"examples": 6} for name in ("laplace", "negative_binomial", "poisson", "von_mises_fisher", "weibull")},
}


def laws_of(name: str, family: Any) -> type[FamilyLaws]:
    made = type(f"Test_{name}", (FamilyLaws,), {"family": family, **BOUNDS.get(name, {})})
    return pytest.mark.xdist_group(f"laws of {name}")(made)  # the tests of a class share draws


for each in poco.families_available():
    globals()[f"Test_{each}"] = laws_of(each, each)
for each in USER_FAMILIES:  # as users write them; but for one they say again what a built-in one does
    kept = laws_of(each.__name__, each)
    globals()[f"Test_{each.__name__}"] = kept if each.__name__ == "GaussianByHand" else pytest.mark.slow(kept)


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (WrongMean, "gradient_of_log_partition"),
        (NegativeSamples, "samples"),
        (WrongKL, "kl"),
        (AlwaysPlain, "retraction"),
        (CentredOutside, "centred_at"),
    ],
)
def test_a_broken_law_fails_its_own_test(broken: type[poco.ExponentialFamily], law: str) -> None:
    with pytest.raises(poco.LawError) as caught:
        laws_of("broken", broken)().test_law(law)
    assert str(caught.value).startswith(f"{broken.__name__}() breaks the law {law!r}:\n  law        ")
    rows = [line.split()[0] for line in str(caught.value).splitlines()[1:]]
    assert rows == ["law", "found", "error", "tolerance", "remedy"]


@pytest.mark.parametrize(
    ("broken", "law", "smallest"),
    [
        (WrongMean, "gradient_of_log_partition", "centred_at(0 0 0 0 0 1.1752, precision=1)"),
        (NegativeSamples, "in_support", "centred_at(1 1 1 1 1 1, precision=1)"),
        (SiteWithoutHalf, "round_trips", "centred_at(0 0 0 0 0 0, precision=1)"),
        (UndeclaredDomain, "retraction", "centred_at(1 1 1 1 1 1, precision=1)"),
        (AlwaysPlain, "retraction", "centred_at(0 0 0, precision=1)"),
        (LogNormal, "in_support", "centred_at(1 1 1 1 1 1, precision=0.001)"),
    ],
)
def test_the_smallest_member_found_is_told(broken: type[poco.ExponentialFamily], law: str, smallest: str) -> None:
    with pytest.raises(poco.LawError) as caught:
        laws_of("broken", broken)().test_edges(law, "float32")
    rows = dict(line.split(maxsplit=1) for line in str(caught.value).splitlines()[1:])
    assert list(rows) == ["law", "found", "error", "tolerance", "member", "remedy"]
    assert rows["member"] == f"{smallest} in float32"


def test_without_hypothesis_counted_members_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    laws_of("whole", Exponential)().test_edges("retraction", "float64")
    with pytest.raises(poco.LawError, match=r"breaks the law 'retraction' near the edges(.|\n)*member +centred_at"):
        laws_of("broken", UndeclaredDomain)().test_edges("retraction", "float64")


def test_a_class_without_a_family_is_told_to_name_one() -> None:
    with pytest.raises(TypeError, match="FamilyLaws names no family; write `family = MyFamily"):
        FamilyLaws().test_law("kl")


def test_what_a_family_raises_is_the_finding() -> None:
    class Raises(Exponential):
        def centred_at(self, theta, precision=None):
            raise RuntimeError("where?")

    tests = laws_of("raises", Raises)()
    for run in (lambda: tests.test_law("kl"), lambda: tests.test_edges("kl", "float32")):
        with pytest.raises(poco.LawError, match=r"found      raised RuntimeError: where\?"):
            run()
