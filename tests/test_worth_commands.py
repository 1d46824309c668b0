"""`expfam-poco worth`, and `benchmarks/worth.py` in a short setting; RESULTS.md shows what its JSON holds."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script
from typer.testing import CliRunner

from expfam_poco.cli import app

script = load_script(Path(__file__).resolve().parents[1] / "benchmarks" / "worth.py")


@pytest.mark.parametrize("name", ["worth", "worth-text"])
def test_the_stored_numbers_are_the_table(name: str) -> None:
    content = json.loads((script.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert set(content["rows"]) == set(script.METHODS)
    table = f"<!-- table {name} -->\n\n{script.markdown(content)}\n<!-- end -->"
    assert table in script.PAGE.read_text(encoding="utf-8")


TEXT = pytest.param(script.Text("nano", context=16, rows=2, samples=12), marks=pytest.mark.slow)


@pytest.mark.parametrize("problem", [script.Digits(), TEXT])
def test_the_benchmark_runs(problem: Any) -> None:
    methods = {name: script.METHODS[name] for name in ("plain", "cached, alpha 1")}
    found = script.run(problem, 30, script.RATES[1:2], range(2), 1, methods)
    assert all(math.isfinite(row["measured"]) and math.isfinite(row["predicted"]) for row in found["rows"].values())
    assert found["rows"]["plain"]["predicted"] == pytest.approx(1.0)
    assert found["rows"]["plain"]["measured"] == pytest.approx(1.0)


def test_the_command_measures(tmp_path: Path) -> None:
    picture = tmp_path / "noise.png"
    result = CliRunner().invoke(app, ["worth", "--method", "IVON", "--passes", "0.2", "--picture", str(picture)])
    assert result.exit_code == 0 and picture.read_bytes()[:4] == b"\x89PNG"
    assert "noise/signal" in result.stdout and "On this run a mega-batch of 10 every 10 steps" in result.stdout


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--method", "SVRG"], "--method SVRG"),
        (["--task", "iris"], "--task 'iris'"),
        (["--every", "0"], "--every 0"),
        (["--every", "500"], "most=200"),
        (["--passes", "-1"], "--passes -1"),
        (["--batch", "600"], "--batch 600"),
    ],
)
def test_wrong_input_is_one_sentence(words: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["worth", "--passes", "0", *words])
    assert result.exit_code == 2 and sentence in result.stderr and len(result.stderr.strip().splitlines()) == 1
