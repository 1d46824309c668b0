"""The examples run as a user runs them, in a short setting."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *options: str) -> str:
    """Output of an example, warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_digits_network_trains_all_three_methods() -> None:
    table = run("digits_network.py", "--evaluations", "300", "--seeds", "1")
    rows = re.findall(r"^(\S+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+([\d.]+)$", table, re.M)
    assert [row[0] for row in rows] == ["AdamW", "IVON", "IVON-PoCoMo"]
    for _, steps, evaluations, accuracy, nll in rows:
        assert int(steps) <= 300 <= int(evaluations) <= 312
        assert float(accuracy) > 0.6
        assert float(nll) < 1.5


def test_exponentiated_svrg_gets_closer_with_correction() -> None:
    found = re.findall(r"distance to least squares (\S+)", run("exponentiated_svrg.py", "--steps", "600"))
    plain, corrected = map(float, found)
    assert corrected < plain


def test_every_example_has_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    missing = [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in source]
    assert not missing


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_explains_itself(name: str) -> None:
    assert "usage:" in run(name, "--help")
