"""`benchmarks/convex.py` runs in its short setting, and RESULTS.md shows what its JSON holds."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import load_script

HERE = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(HERE / "convex.py")


def test_the_table_is_that_of_the_stored_numbers(script: ModuleType) -> None:
    content = json.loads(script.RESULT.read_text(encoding="utf-8"))
    text = (HERE / "RESULTS.md").read_text(encoding="utf-8")
    assert f"<!-- table convex -->\n\n{script.table(content)}\n<!-- end -->" in text
    assert content["settings"] == script.plain_settings()
    assert {row["method"] for row in content["rows"]} == set(script.METHODS)


def test_loops_reach_what_steps_reach(script: ModuleType) -> None:
    task, setting = script.load("breast-cancer"), script.SETTINGS["VON-PoCo"]
    loops, steps = (script.reached(script.ours("VON-PoCo", how, setting), task, 0) for how in ("eager", "steps"))
    assert [loops[level][0] for level in script.LEVELS] == [steps[level][0] for level in script.LEVELS]
    assert loops[1e-12][0] < 20.0


def test_loops_have_reshuffled_epochs_whatever_their_number(script: ModuleType) -> None:
    task, setting = script.load("breast-cancer"), script.Setting(0.5, 100, 0.5)
    few, many = (script.inner_batches(task, setting, 3, count) for count in (2, 5))
    assert few.shape == (2, 3, 100) and torch.equal(many[:2], few)
    assert len(set(many[0].flatten().tolist())) == 300
