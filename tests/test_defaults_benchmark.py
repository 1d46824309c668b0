"""`benchmarks/defaults.py` runs in its short setting, and RESULTS.md shows what its JSON holds."""

import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

from expfam_poco.optim.choices import CHOICES

HERE = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(HERE / "defaults.py")


def test_the_page_shows_the_numbers(script: ModuleType, tmp_path: Path) -> None:
    content = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    page = tmp_path / "RESULTS.md"
    page.write_text(script.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    script.report(content, page)
    assert page.read_text(encoding="utf-8") == script.PAGE.read_text(encoding="utf-8")
    assert {name: {m: set(s) for m, (s, _) in methods.items()} for name, methods in script.PLAN.items()} == {
        name: {m: set(s) for m, s in methods.items()} for name, methods in content["search"].items()
    }


def test_what_the_changelog_claims_of_the_stored_numbers(script: ModuleType) -> None:
    content = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    pairs = [
        [statistics.median(run["loss"] for run in row[label]) for label in ("defaults", "former")]
        for row in content["rates"]
    ]
    assert sum(new <= old for new, old in pairs) >= len(pairs) - 1
    binary = {
        (row["method"], row["label"]): statistics.median(run["accuracy"] for run in row["runs"])
        for row in content["compare"]
        if row["task"] == "binary"
    }
    for method in ("BayesBiNN", "BayesBiNN-PoCo"):
        assert binary[method, "defaults"] >= binary[method, "tuned"] - 0.01
        assert binary[method, "defaults"] >= binary[method, "former"] + 0.04


def test_the_short_setting_trains_every_method(script: ModuleType, tmp_path: Path) -> None:
    runs = script.Runs(tmp_path, share=0.05)
    for task, methods in (("digits", ("AdamW", "IVON", "IVON-PoCoMo")), ("binary", (script.STE, "BayesBiNN-PoCo"))):
        for method in methods:
            found = runs(task, method, 0.1, 0, {})
            assert 0.0 < found["test"]["loss"] < 5.0 and found["evaluations"] >= 30
            assert found["steps"] < found["evaluations"] if "PoCo" in method else found["steps"] == found["evaluations"]
    again = script.Runs(tmp_path, share=0.05)
    assert again("digits", "IVON", 0.1, 0, {}) == runs("digits", "IVON", 0.1, 0, {})
    assert all(method.replace("-", "") in CHOICES for method in ("IVON-PoCoMo", "BayesBiNN-PoCo"))
