"""`benchmarks/RESULTS.md` shows what `benchmarks/results/*.json` hold, and they hold the targets."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

from expfam_poco.compare.tasks import load_task

HERE = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(HERE / "logistic.py")


def stored(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def test_every_experiment_has_its_table(script: ModuleType) -> None:
    text = (HERE / "RESULTS.md").read_text(encoding="utf-8")
    stems = {
        path.stem
        for path in (HERE / "results").glob("*.json")
        if not path.stem.startswith(
            ("speed-", "binary-", "defaults", "packed", "worth", "convex", "own-", "transport-")
        )
    }
    assert stems == set(script.EXPERIMENTS)
    for name in script.EXPERIMENTS:
        assert f"<!-- table {name} -->\n\n{script.table(stored(name))}\n<!-- end -->" in text, name


def test_stored_results_come_from_the_present_defaults(script: ModuleType) -> None:
    for name in ("breast-cancer", "digits", "wine"):
        task = load_task(name)
        for row in stored(name)["rows"]:
            settings = script.METHODS[row["name"]].settings(task)
            assert {key: row["hyperparameters"][key] for key in settings} == settings, (name, row["name"])


def test_stored_results_reach_the_targets() -> None:
    breast, digits = ({row["name"]: row for row in stored(name)["rows"]} for name in ("breast-cancer", "digits"))
    assert breast["SVRG"]["median_gap"] <= 2e-6
    assert breast["IVON-PoCo"]["median_gap"] <= 5e-6
    assert breast["IVON-PoCo-exact"]["median_gap"] <= 1e-6
    assert breast["VON-PoCo"]["gap_at"]["12"] <= 1e-5 and breast["VON-PoCo"]["median_gap"] <= 1e-12
    assert breast["VON"]["median_gap"] >= 1e-4
    assert digits["SVRG"]["median_gap"] <= 1e-4
    assert digits["IVON-PoCo-exact"]["median_gap"] <= 5e-5


def test_the_diagonal_optimum_lies_above_the_minimum_and_falls_as_ess_squared(script: ModuleType) -> None:
    task = load_task("breast-cancer")
    gaps = [script.optimum_gap(task, multiple) for multiple in (1, 100, 1000)]
    assert gaps[0] == pytest.approx(1.7e-3, rel=0.03)
    assert gaps[1] / gaps[2] == pytest.approx(100.0, rel=0.05)
    assert gaps[1] == pytest.approx(stored("ess")["optimum_gap"]["100N"], rel=1e-6)
