"""`benchmarks/structured.py` runs in its short setting, and RESULTS.md shows what its JSON holds."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

HERE = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(HERE / "structured.py")


def test_every_part_has_its_table(script: ModuleType) -> None:
    content = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    assert set(content) == set(script.PARTS)
    text = script.PAGE.read_text(encoding="utf-8")
    for part, found in content.items():
        assert f"<!-- table structured-{part} -->\n\n{script.markdown(part, found)}\n\n<!-- end -->" in text, part


def test_the_short_setting_measures_every_method(script: ModuleType, tmp_path: Path) -> None:
    content = {part: script.PARTS[part](True) for part in ("cost", "digits")}
    assert set(content["digits"]) == set(script.DIGITS)
    for row in content["digits"].values():
        assert 0.0 < row["runs"][0]["loss"] < 3.0
    for row in content["cost"]["milliseconds"].values():
        assert row["AdamW"] > 0.0 and row["KroneckerGaussian"] > 0.0
    page = tmp_path / "RESULTS.md"
    page.write_text("".join(f"<!-- table structured-{part} -->\n<!-- end -->\n" for part in content), encoding="utf-8")
    script.report(content, page)
    once = page.read_text(encoding="utf-8")
    assert "| Kronecker-PoCo |" in once and "(m³ + n³)" in once
    script.report(content, page)
    assert page.read_text(encoding="utf-8") == once
