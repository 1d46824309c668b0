"""`benchmarks/own_families.py` runs in its short setting, and RESULTS.md shows what its JSON holds."""

import json
import math
from pathlib import Path

import pytest
from scripts import load_script

HERE = Path(__file__).resolve().parents[1] / "benchmarks"


def test_the_short_setting_runs_and_the_page_shows_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script(HERE / "own_families.py")
    script.main(["run", "--quick", "--output", str(tmp_path / "own.json")])
    found = json.loads((tmp_path / "own.json").read_text(encoding="utf-8"))
    assert set(found["tasks"]) == {"weibull", "wishart"} and "weibull" in capsys.readouterr().out
    assert all(math.isfinite(value) for name in found["tasks"] for value in script.best(found, name).values())
    page = tmp_path / "RESULTS.md"
    page.write_text(script.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    script.report(json.loads(script.RESULTS.read_text(encoding="utf-8")), page)
    assert page.read_text(encoding="utf-8") == script.PAGE.read_text(encoding="utf-8")
