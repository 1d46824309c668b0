"""The package as others get it: built, installed away from the checkout, with versions that CI tried."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.xdist_group("packaging")  # the wheel and its environment are made once
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FAMILIES = {
    name: target.partition(":")[2]
    for name, target in PYPROJECT["project"]["entry-points"]["expfam_poco.families"].items()
}
PROBE = """
import json
from importlib.metadata import entry_points

import expfam_poco
import expfam_poco.families

print(json.dumps({
    "engine": expfam_poco.__file__,
    "families": expfam_poco.families.__file__,
    "entry_points": {p.name: p.load().__name__ for p in entry_points(group="expfam_poco.families")},
    "available": list(expfam_poco.families_available()),
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command that sees neither the checkout nor this environment's variables for Python."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, built from a copy of the sources; without network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("expfam_poco", "families"):
        copytree(ROOT / name, source / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source, cwd=dist)
    assert len(list(dist.glob("*.tar.gz"))) == 1
    (built,) = dist.glob("*.whl")
    return built


def environment_with(folder: Path, *packages: Path) -> Path:
    """A new virtual environment that holds these packages and only borrows the dependencies from this one.

    The borrowed folders stand in a .pth file: they come after the environment's own, and Python does not read
    the .pth files inside them, so that an editable install of the checkout stays invisible.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (own,) = folder.glob("lib/python*/site-packages")
    borrowed = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    (own / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    options = ["--no-deps", "--no-index", "--ignore-installed", "--no-build-isolation"]
    run(*pip, "install", *options, *packages, cwd=folder.parent)
    return folder


@pytest.fixture(scope="module")
def clean_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone."""
    return environment_with(tmp_path_factory.mktemp("clean") / "environment", wheel)


def test_wheel_holds_engine_families_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"expfam_poco/py.typed", "expfam_poco/families/py.typed"}
    for folder, installed in (("expfam_poco", "expfam_poco"), ("families", "expfam_poco/families")):
        for path in (ROOT / folder).rglob("*.py"):
            expected.add(f"{installed}/{path.relative_to(ROOT / folder).as_posix()}")
    expected.add("expfam_poco/tools/packed_kernel.cpp")  # built where it is used
    expected.add("expfam_poco/reproduce/rates.json")
    assert {"expfam_poco/__init__.py", "expfam_poco/families/__init__.py"} <= expected
    contents = {name for name in names if ".dist-info/" not in name}
    assert contents == expected
    assert any(name.endswith("/LICENSE") for name in names)


def test_wheel_works_away_from_the_checkout(clean_environment: Path) -> None:
    python = clean_environment / "bin" / "python"
    report = json.loads(run(python, "-I", "-W", "error", "-c", PROBE, cwd=clean_environment))
    (own,) = clean_environment.glob("lib/python*/site-packages")
    assert Path(report["engine"]) == own / "expfam_poco" / "__init__.py"
    assert Path(report["families"]) == own / "expfam_poco" / "families" / "__init__.py"
    assert report["entry_points"] == FAMILIES
    assert set(report["available"]) == set(FAMILIES)


def test_command_of_the_wheel_works_away_from_the_checkout(clean_environment: Path) -> None:
    listing = run(clean_environment / "bin" / "expfam-poco", "families", cwd=clean_environment)
    assert all(name in listing for name in FAMILIES), listing


def test_plug_in_package_is_known_by_its_name_once_installed(wheel: Path, tmp_path: Path) -> None:
    plugin = copytree(ROOT / "examples" / "plugin_family", tmp_path / "plugin", ignore=ignore_patterns("__pycache__"))
    folder = environment_with(tmp_path / "environment", wheel, plugin)
    command = folder / "bin" / "expfam-poco"
    listing = run(command, "families", cwd=tmp_path)
    assert "rayleigh-scale" in listing and all(name in listing for name in FAMILIES), listing
    assert "rayleigh-scale keeps all" in run(command, "check", "--no-compiled", "rayleigh-scale", cwd=tmp_path)
    python = folder / "bin" / "python"
    # All laws are run above: here what remains, a script that trains with family="rayleigh-scale" among it.
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "density or trains", plugin / "tests"]
    assert "2 passed" in run(python, "-W", "error", *tests, cwd=tmp_path)


def test_this_environment_has_both_packages() -> None:
    import expfam_poco
    import expfam_poco.families

    assert Path(expfam_poco.__file__).name == Path(expfam_poco.families.__file__).name == "__init__.py"
    assert version("expfam_poco") == PYPROJECT["project"]["version"]


def test_every_package_on_disk_is_listed() -> None:
    found = set()
    for folder, installed in (("expfam_poco", "expfam_poco"), ("families", "expfam_poco.families")):
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((installed, *path.parent.relative_to(ROOT / folder).parts)))
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line)
            assert match, f"not an exact public version: {line!r}"
            pins[canonicalize_name(match[1])] = match[2]
    assert pins["torch"] == "2.13.0"
    project = PYPROJECT["project"]
    for text in chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = Requirement(text)
        if requirement.name != project["name"]:
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is not None and requirement.specifier.contains(pin), f"{text}: pinned to {pin}"


def test_changelog_has_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{PYPROJECT['project']['version']}]" in changelog


def test_ci_runs_the_test_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    fenced = "\n".join(re.findall(r"^```bash\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE))
    commands = [line for line in fenced.splitlines() if "pytest" in line]
    assert len(commands) == 1, f"the README states the test command on one line, once: {commands}"
    script = ROOT / ".ci" / "run"
    lines = [line.strip() for line in script.read_text(encoding="utf-8").splitlines()]
    assert lines.count(commands[0]) == 1
    assert os.access(script, os.X_OK)
