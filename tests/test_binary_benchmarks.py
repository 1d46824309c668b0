"""`benchmarks/binary_defaults.py` and `binary_posterior.py` in their short settings, and the page of stored numbers."""

import json
from pathlib import Path

import pytest
from scripts import load_script, run_script

HERE = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("name", ["binary_defaults", "binary_posterior"])
def test_the_page_shows_the_stored_numbers(name: str, tmp_path: Path) -> None:
    script = load_script(HERE / f"{name}.py")
    page = tmp_path / "RESULTS.md"
    page.write_text(script.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    script.report(json.loads(script.RESULTS.read_text(encoding="utf-8")), page)
    assert page.read_text(encoding="utf-8") == script.PAGE.read_text(encoding="utf-8")


def test_the_short_setting_trains_every_method_with_its_evaluations(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = run_script(
        HERE / "binary_defaults.py", "--short", "--tasks", "digits-mlp", "digits-plain", "ternary", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found) == ["digits-mlp", "digits-plain", "ternary"]
    runs = {method: runs[0] for method, runs in found["digits-mlp"].items()}
    for method, run in runs.items():
        assert run["accuracy"] > 0.3, method  # chance is 0.1 on 599 images
        assert (run["steps"] == run["gradients"]) is not method.startswith("PoCo")
        assert run["steps"] == 50 or method == "PoCo, equal evaluations"
    assert 50 <= runs["PoCo, equal evaluations"]["gradients"] <= 61 < runs["PoCo, equal steps"]["gradients"]


def test_the_parts_of_the_posterior_s_benchmark_run(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = run_script(HERE / "binary_posterior.py", "--short", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found) == ["ensembles", "tasks", "committee"]
    for (run,) in found.values():
        for scores in run.values():
            assert all(0.0 <= value <= 1.0 for name, value in scores.items() if name != "nll"), scores
