"""Guards against small steps that cost more Python than they must: calls counted, and the benchmark's ratios."""

import cProfile
import json
import os
import pstats
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
STEPS = 44  # a multiple of the variance meter's period


# About 1.4 times what a step on two tensors took.
@pytest.mark.parametrize(("name", "most"), [("SVRG", 1150), ("IVON", 950), ("AlphaSVRG", 1200), ("VONPoCo", 2200)])
def test_a_step_makes_few_python_calls(name: str, most: int) -> None:
    torch.manual_seed(0)
    step = load_script(ROOT / "benchmarks" / "small_steps.py").alone()[name]
    for _ in range(STEPS):
        step()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(STEPS):
        step()
    profile.disable()
    assert pstats.Stats(profile).total_calls <= most * STEPS  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.xdist_group("speed")
def test_small_steps_keep_their_ratios(tmp_path: Path) -> None:
    """Within 4 times what we allow ourselves, as other tests run beside this one."""
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "small", "--light", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for name, row in json.loads((tmp_path / "speed-small.json").read_text())["small"].items():
        assert row["ratio"] <= 4.0 * row["at most"], name
