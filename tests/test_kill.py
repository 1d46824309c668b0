"""kill -9 at random moments, again and again: the run goes on from its last checkpoint as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optimizer_cases import same

import expfam_poco as poco

SCRIPT = Path(__file__).with_name("kill_training.py")


def losses(log: Path) -> dict[int, str]:
    """The loss of every step, in hex; a step that was repeated after a kill must have had the same one."""
    found: dict[int, str] = {}
    for line in log.read_text().splitlines():
        step, value = line.split()
        assert found.setdefault(int(step), value) == value, f"step {step} had another loss when it was repeated"
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork and SIGKILL")
@pytest.mark.parametrize(
    ("optimizer", "kills", "steps"),
    [("IVONPoCoMo", 30, 300), pytest.param("AlphaSVRG", 15, 200, marks=pytest.mark.slow)],
)
def test_a_run_killed_at_random_equals_an_undisturbed_one(
    optimizer: str, kills: int, steps: int, tmp_path: Path
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # CUDA does not survive a fork
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), optimizer, str(kills), str(steps)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    happened = json.loads(done.stdout)
    assert happened["killed"] == kills, f"some children had finished before they were killed: {happened}"
    assert happened["lost_steps"] >= kills // 5, f"kills did not hit between checkpoints: {happened}"
    assert happened["within_save"] >= 1, f"no kill hit a save: {happened}"
    assert 0 < happened["steps_before_last_life"] < steps and happened["temporary_files"] == 0, happened

    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    expected = losses(undisturbed / "losses")
    assert list(expected) == list(range(1, steps + 1)) and losses(killed / "losses") == expected
    ends = [torch.load(folder / "run.pt", weights_only=True) for folder in (killed, undisturbed)]
    assert (
        set(ends[0]["states"]) == {"model", "optimizer", "scheduler"} and poco.load(killed / "run.pt")["step"] == steps
    )
    assert same(ends[0], ends[1])
