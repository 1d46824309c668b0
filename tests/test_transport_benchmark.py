"""`benchmarks/transport.py` in a short setting, its arithmetic, and that RESULTS.md shows what its JSON holds."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from scripts import load_script

script = load_script(Path(__file__).resolve().parents[1] / "benchmarks" / "transport.py")


def test_it_runs_and_repeats_nothing(tmp_path: Path) -> None:
    rows = [script.Row("IVON"), script.Row("IVON", 0.9, 0.1), script.Row("AdamW", 0.9, 0.1), script.Row("NAdamW")]
    pool = script.Pool(tmp_path, 1, 2, math.inf)
    content = script.compare("quick", script.QUICK, rows, pool, (0,))
    assert [len(row["finals"]) for row in content["rows"]] == [1] * 4
    assert all(math.isfinite(row["finals"][0]) and row["lr"] > 0.0 for row in content["rows"])
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert script.compare("quick", script.QUICK, rows, pool, (0,)) == content
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    assert script.table(content).count("\n") == 5
    assert "(the best transport)" in script.verdict(content)


def test_nothing_is_begun_when_time_is_over(tmp_path: Path) -> None:
    pool = script.Pool(tmp_path, 1, 1, -1.0)
    assert pool.losses([(script.Row("AdamW"), 1e-3, 0)], script.QUICK, "late") == {}
    assert not list(tmp_path.iterdir())


def test_worth_is_exact_at_both_budgets() -> None:
    assert script.worth(2.0, 2.0, 1.9) == 1.0
    assert script.worth(1.9, 2.0, 1.9) == pytest.approx(script.LONGER)


def test_the_interval_is_student_s() -> None:
    text = script.interval([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5)
    assert text.startswith("+3.0000 ± ")
    assert float(text.split("± ")[1]) == pytest.approx(2.776 * math.sqrt(0.5), rel=2e-3)


def test_gamma_of_nesterov_is_marked() -> None:
    assert script._nesterov(script.Row("IVON", 0.95, 0.05)) and not script._nesterov(script.Row("IVON", 0.95, 0.25))
    assert replace(script.Row("IVON"), budget=1.25).name == "IVON β₁ = 0.9, γ = 0, 1.25× evaluations"


@pytest.mark.parametrize("path", sorted(script.RESULTS.glob("transport-*.json")), ids=lambda path: path.stem)
def test_the_stored_numbers_are_the_table(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    page = script.PAGE.read_text(encoding="utf-8")
    assert f"{script.table(content)}\n\n{script.verdict(content)}\n<!-- end -->" in page
