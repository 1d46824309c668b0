"""The site of the documentation: it builds without a warning and without network, and leaves nothing public out."""

import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import expfam_poco as poco

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
NAMES = [name for name in poco.__all__ if name != "__version__"]
DESCRIBED = [name for name in NAMES if not isinstance(getattr(poco, name), types.ModuleType)]


def test_site_builds_strictly(tmp_path: Path) -> None:
    """Every link, anchor and cross-reference leads somewhere, and what is built loads nothing from elsewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=\"?https?://", text), page.name


def test_reference_has_every_public_name_once() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    assert sorted(re.findall(r"^::: expfam_poco\.(\w+)$", pages, re.MULTILINE)) == sorted(NAMES)


@pytest.mark.parametrize("name", DESCRIBED)
def test_reference_teaches(name: str) -> None:
    """What is public has an example that runs (test_docs runs it), and says what its own arguments are."""
    thing: Any = getattr(poco, name)
    told = inspect.getdoc(thing) or ""
    if not (isinstance(thing, type) and issubclass(thing, Exception)):
        assert ">>>" in told, "no example"
    own = isinstance(thing, types.FunctionType) and list(inspect.signature(thing).parameters)
    if own:
        assert "Args:" in told, "no arguments"
        if re.search(r"as all (?:further )?arguments", told):
            return  # those of the function that it names
        described = set(re.findall(r"\*{0,2}(\w+)", " ".join(re.findall(r"^ {4}([\w*, ]+):", told, re.MULTILINE))))
        assert set(own) <= described, set(own) - described
