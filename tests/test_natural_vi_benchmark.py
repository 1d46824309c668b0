"""`benchmarks/natural_vi.py` runs in its short setting, and RESULTS.md shows what its JSON holds."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

HERE = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(HERE / "natural_vi.py")


def test_every_part_has_its_table(script: ModuleType) -> None:
    content = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    assert content and set(content) <= set(script.PARTS)
    text = script.PAGE.read_text(encoding="utf-8")
    for part, found in content.items():
        assert f"<!-- table natural-vi-{part} -->\n\n{script.markdown(part, found)}\n\n<!-- end -->" in text, part


def test_the_bars_are_met_by_the_numbers_that_are_shown(script: ModuleType) -> None:
    """Passes to 1e-3 nats a datum with a full Gaussian: at most 40, and a tenth of the best SVI's, if it gets there."""
    content = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    for found in (content[part] for part in ("logistic", "poisson") if part in content):
        mine = [run["0.001"][0] for run in found["rows"]["NaturalVI, full"]["runs"]]
        assert max(mine) <= 40
        for name, row in found["rows"].items():
            if "AutoMultivariateNormal" in name:
                assert all(run["0.001"] is None or run["0.001"][0] > 10 * max(mine) for run in row["runs"]), name


def test_the_short_setting_measures_every_method(script: ModuleType, tmp_path: Path) -> None:
    found = script.PARTS["poisson"](True)
    assert len(found["rows"]) == 2 + len(script.GUIDES) * len(script.OPTIMIZERS) + 1
    page = tmp_path / "RESULTS.md"
    page.write_text("<!-- table natural-vi-poisson -->\n<!-- end -->\n", encoding="utf-8")
    script.report({"poisson": found}, page)
    once = page.read_text(encoding="utf-8")
    assert "| SVI AutoLowRank, ClippedAdam, lr 0.01 |" in once
    script.report({"poisson": found}, page)
    assert page.read_text(encoding="utf-8") == once
