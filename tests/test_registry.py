"""Families by name: the decorator, entry points of installed packages, and the sentences where a name is wrong."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from user_families import Exponential

import expfam_poco as poco
from expfam_poco.families import Bernoulli, DiagonalGaussian
from expfam_poco.family import registry

BUILT_IN = ["bernoulli", "diagonal_gaussian", "full_gaussian", "isotropic_gaussian"]


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers or finds is forgotten after it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "_installed", {})


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution on the path, as pip would leave it, whose entry points name a family and two mistakes."""
    package = tmp_path / "site"
    metadata = package / "poco_third_party-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: poco-third-party\nVersion: 1.0\n", "utf-8")
    (metadata / "entry_points.txt").write_text(
        "[expfam_poco.families]\n"
        "third_party = poco_third_party:ThirdParty\n"
        "no_family = poco_third_party:NUMBER\n"
        "no_module = poco_absent:Family\n",
        "utf-8",
    )
    (package / "poco_third_party.py").write_text(
        "import expfam_poco as poco\n"
        "NUMBER = 3\n"
        "class ThirdParty(poco.ExponentialFamily):\n"
        "    def statistics(self, theta): return self.Mean(theta)\n"
        "    def log_partition(self, nat): return 0.5 * nat.theta**2\n"
        "    def sample(self, state, noise): return state.theta + noise\n"
        "    def centred_at(self, theta, precision=None): return self.State(theta)\n",
        "utf-8",
    )
    monkeypatch.syspath_prepend(package)
    importlib.invalidate_caches()
    yield
    monkeypatch.delitem(importlib.sys.modules, "poco_third_party", raising=False)


def test_the_built_in_families_are_known() -> None:
    assert set(BUILT_IN) <= set(poco.families_available())
    assert poco.families_available() == sorted(poco.families_available())
    assert poco.get_family("bernoulli") is Bernoulli


def test_the_decorator_registers_a_family_under_its_name() -> None:
    assert poco.register("my-exponential")(Exponential) is Exponential
    assert "my-exponential" in poco.families_available()
    assert poco.get_family("my-exponential") is Exponential
    assert poco.resolve_family("my-exponential") == Exponential()
    assert registry.name_of(Exponential()) == "my-exponential"


def test_a_class_defined_again_replaces_itself() -> None:
    """As in a notebook, where a cell is run twice."""

    def cell() -> type:
        @poco.register("again")
        class Again(Exponential):
            pass

        return Again

    assert cell() is not cell()
    third = cell()
    assert poco.get_family("again") is third


def test_a_name_that_another_class_has_is_refused() -> None:
    poco.register("mine")(Exponential)
    with pytest.raises(ValueError, match=r"'mine' is taken by user_families.Exponential; choose another name"):
        poco.register("mine")(DiagonalGaussian)
    with pytest.raises(ValueError, match=r"'bernoulli' is taken by expfam_poco.families.discrete.bernoulli.Bernoulli"):
        poco.register("bernoulli")(Exponential)
    assert poco.get_family("bernoulli") is Bernoulli and poco.get_family("mine") is Exponential


@pytest.mark.parametrize("name", ["", "My", "two words", "1st", "a.b", None])
def test_a_name_that_is_no_lower_case_identifier_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"use a lower-case identifier such as 'my_family'"):
        poco.register(name)


@pytest.mark.parametrize("value", [int, "Exponential", Exponential()])
def test_only_family_classes_are_registered(value: object) -> None:
    with pytest.raises(TypeError, match="not an ExponentialFamily class"):
        poco.register("wrong")(value)
    assert "wrong" not in poco.families_available()


def test_an_unknown_name_lists_the_known_ones() -> None:
    poco.register("a_new_one")(Exponential)
    with pytest.raises(ValueError) as caught:
        poco.get_family("gaussian")
    known = ", ".join(poco.families_available())
    assert str(caught.value) == f"family='gaussian' is not registered; known families: {known}."
    assert "a_new_one" in known and "full_gaussian" in known


def test_resolve_takes_names_classes_and_instances() -> None:
    family = Bernoulli("mean")
    assert poco.resolve_family(family) is family
    assert poco.resolve_family(Bernoulli) == Bernoulli() == poco.resolve_family("bernoulli")
    for wrong in (3, int, None):
        with pytest.raises(TypeError, match=f"family={wrong!r} is neither a registered name nor an ExponentialFamily"):
            poco.resolve_family(wrong)


def test_name_of_a_family_without_a_name_is_its_path() -> None:
    assert registry.name_of(DiagonalGaussian()) == "diagonal_gaussian"
    assert registry.name_of(Exponential()) == "user_families:Exponential"


@pytest.mark.usefixtures("installed")
def test_entry_points_of_installed_packages_are_families() -> None:
    assert {"third_party", *BUILT_IN} <= set(poco.families_available())
    cls = poco.get_family("third_party")
    assert cls.__module__ == "poco_third_party" and issubclass(cls, poco.ExponentialFamily)
    assert registry.name_of(cls()) == "third_party"
    with pytest.raises(ValueError, match=r"'third_party' is taken by poco_third_party.ThirdParty"):
        poco.register("third_party")(Exponential)


@pytest.mark.usefixtures("installed")
def test_an_entry_point_that_is_no_family_says_so() -> None:
    with pytest.raises(TypeError, match="entry point 'no_family' gives 3, which is not an ExponentialFamily"):
        poco.get_family("no_family")


@pytest.mark.usefixtures("installed")
def test_a_broken_entry_point_of_one_package_does_not_disturb_the_others() -> None:
    """Naming a family of one's own must not import every package that offers some."""
    assert poco.get_family("bernoulli") is Bernoulli
    assert registry.name_of(Exponential()) == "user_families:Exponential"
    with pytest.raises(ValueError, match=r"family='no_module': .*poco_absent.*cannot be imported"):
        poco.get_family("no_module")
