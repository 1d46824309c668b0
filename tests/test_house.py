"""The house: packages stand on floors, import only downwards, and nothing imports in a circle.

What an import brings in is the module it names: the package above, whose `__init__` Python runs first, is not meant.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from imports import ROOT, Import, circles, imports_of, installed, is_family

FLOORS: dict[int, str] = {
    1: "arguments errors family",
    2: "closures correction rule families",
    3: "engine checks",
    4: "optim",
    5: "tools compare reproduce",
    # And what the package's `__init__` shows.
    6: "integrations cli __init__ blr noise estimators gradient_model derive distribution",
    7: "benchmarks examples",
}
FLOOR = {unit: floor for floor, units in FLOORS.items() for unit in units.split()}
STRANGERS = {("correction", "rule"), ("rule", "correction")}  # of one floor, and neither may know the other

FOLDERS = ("expfam_poco", "families", "benchmarks", "examples")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MODULES = {".".join(installed(path)).removesuffix(".__init__"): path for path in FILES}


class Arrow(NamedTuple):
    """An import of one module of the house by another."""

    file: Path
    found: Import
    module: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}, line {self.found.line}: {self.found.module}"


def unit_of(path: Path) -> str:
    """What has a floor: a package of `expfam_poco`, a module directly in it, or a folder beside it."""
    parts = installed(path)
    return parts[1] if parts[0] == "expfam_poco" else parts[0]


def arrows(paths: list[Path] = FILES, sources: dict[Path, str] | None = None) -> Iterator[Arrow]:
    """All imports of the house's own modules; a name taken from a module is that module, unless it is one itself."""
    for path in paths:
        for found in imports_of(path, (sources or {}).get(path)):
            for module in (found.module, found.module.rpartition(".")[0]):
                if module in MODULES:
                    if MODULES[module] != path:
                        yield Arrow(path, found, module)
                    break


ARROWS = list(arrows())


def wrong_ways(found: list[Arrow]) -> list[str]:
    """The imports that lead upwards, or between units of one floor that must not know each other."""
    return [
        f"{arrow} ({one} on floor {FLOOR[one]} imports {other} on floor {FLOOR[other]})"
        for arrow in found
        for one, other in [(unit_of(arrow.file), unit_of(MODULES[arrow.module]))]
        if FLOOR[one] < FLOOR[other] or (one, other) in STRANGERS
    ]


def test_everything_has_a_floor() -> None:
    units = {unit_of(path) for path in FILES}
    assert units == set(FLOOR), "place new packages in FLOORS, and take away those that are gone"


def test_imports_lead_downwards() -> None:
    wrong = wrong_ways(ARROWS)
    assert not wrong, "\n".join(wrong)


def test_engine_and_package_import_no_family() -> None:
    """Nothing in `expfam_poco` but the families themselves names a built-in one: all are plug-ins."""
    wrong = [
        f"{path.relative_to(ROOT)}, line {found.line}: {found.module}"
        for path in FILES
        if path.is_relative_to(ROOT / "expfam_poco")
        for found in imports_of(path)
        if is_family(found.module)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_in_a_circle() -> None:
    """Imports inside functions count; those for type checkers alone do not, and are listed where a circle would be."""
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    names = {path: module for module, path in MODULES.items()}
    for arrow in ARROWS:
        if not arrow.found.for_types:
            graph[names[arrow.file]].add(arrow.module)
    wrong = []
    for circle in circles(graph):
        within = [a for a in ARROWS if names[a.file] in circle and a.module in circle and not a.found.for_types]
        wrong.append("a circle of " + ", ".join(circle) + ":\n  " + "\n  ".join(map(str, within)))
    for_types = [str(arrow) for arrow in ARROWS if arrow.found.for_types]
    print("only for type checkers:", *for_types, sep="\n  ")
    assert not wrong, "\n".join(wrong)


def test_no_packages_import_each_other() -> None:
    graph: dict[str, set[str]] = {unit: set() for unit in FLOOR}
    for arrow in ARROWS:
        one, other = unit_of(arrow.file), unit_of(MODULES[arrow.module])
        if one != other and not arrow.found.for_types:
            graph[one].add(other)
    found = circles(graph)
    among = [
        str(a) for a in ARROWS for c in found
        if unit_of(a.file) in c and unit_of(MODULES[a.module]) in c and unit_of(a.file) != unit_of(MODULES[a.module])
    ]  # fmt: skip
    assert not found, f"{found}:\n" + "\n".join(among)


def test_no_module_is_longer_than_500_lines() -> None:
    paths = [*FILES, *(ROOT / "tests").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    too_long = {name: lines for name, lines in lengths.items() if lines > 500}
    assert not too_long, f"split these: {too_long}"


def test_every_package_says_what_it_is() -> None:
    packages = [path for path in FILES if path.name == "__init__.py"]
    silent = [
        str(path.relative_to(ROOT))
        for path in packages
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert packages and not silent, f"write a docstring in {silent}"


# ---- the checks themselves ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "source", "words"),
    [
        ("engine/step.py", "from expfam_poco.optim.optimizer import PosteriorCorrected", "floor 3 imports optim on"),
        ("rule/blr.py", "from expfam_poco.correction.snapshot import correct", "rule on floor 2 imports correction"),
        ("correction/alpha.py", "from expfam_poco.rule import blr", "correction on floor 2 imports rule"),
        ("family/base.py", "import expfam_poco.engine.block", "line 1: expfam_poco.engine.block (family on floor 1"),
        ("tools/saving.py", "import expfam_poco as poco", "tools on floor 5 imports __init__ on floor 6"),
        ("engine/step.py", "def late():\n    from ..optim import vsgd", "line 2: expfam_poco.optim.vsgd"),
        ("family/registry.py", "importlib.import_module('expfam_poco.rule.blr')", "imports rule on floor 2"),
        ("optim/vsgd.py", "from expfam_poco import blr", "imports blr on floor 6"),
    ],
)
def test_an_import_that_leads_upwards_is_told_with_its_file(file: str, source: str, words: str) -> None:
    path = ROOT / "expfam_poco" / file
    (wrong,) = wrong_ways(list(arrows([path], {path: source})))
    assert wrong.startswith(f"expfam_poco/{file}, line ") and words in wrong


def test_imports_for_types_are_told_apart() -> None:
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .block import Block\nfrom .step import Step\n"
    )
    path = ROOT / "expfam_poco" / "engine" / "trial.py"
    assert {(a.module.rpartition(".")[2], a.found.for_types) for a in arrows([path], {path: source})} == {
        ("block", True),
        ("step", False),
    }


def test_circles_are_found() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": []}) == [["a", "b", "c"]]
    assert circles({"a": ["b", "c"], "b": ["c"], "c": []}) == []
