"""Guards against slow and hungry steps: ratios within one run, with wide margins, never times.

One thread, because compiled kernels wait for threads that other tests have taken the core from.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.xdist_group("speed")  # measured once


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The benchmark's tables of cycles and memory, small."""
    out = tmp_path_factory.mktemp("speed")
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "cycle", "memory", "--light", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    return {part: json.loads((out / f"speed-{part}.json").read_text())[part] for part in ("cycle", "memory")}


# What quiet runs gave on one thread: 8, 30, 4; 15, 55, 4.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "compiled", "eager"), [("IVON", 25.0, 100.0), ("IVONPoCoMo", 45.0, 170.0)])
def test_a_step_costs_few_of_adamw(measured: dict[str, Any], name: str, compiled: float, eager: float) -> None:
    (seconds,) = measured["cycle"]["seconds"].values()
    foreach = seconds["AdamW foreach"]
    assert seconds[f"{name} compiled"] <= compiled * foreach
    assert seconds[f"{name} eager"] <= eager * foreach
    assert 1.5 * seconds[f"{name} compiled"] <= seconds[f"{name} eager"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "mixed", "compiled"])
def test_state_and_transient_memory(measured: dict[str, Any], backend: str) -> None:
    """12 and 28 bytes a weight; beside them a step needs a few spans, whatever the model's size (here 2 M weights)."""
    found = measured["memory"]["bytes"]
    assert found[f"IVON {backend}"]["state"] == pytest.approx(12.0, abs=0.1)
    assert found[f"IVONPoCoMo {backend}"]["state"] == pytest.approx(28.0, abs=0.1)
    most = 24 * 4 * 2**18 / measured["memory"]["weights"]  # 24 spans of float32
    assert found[f"IVON {backend}"]["transient"] <= most
    assert found[f"IVONPoCoMo {backend}"]["transient"] <= most


def test_importing_costs_little_beside_torch(tmp_path: Path) -> None:
    """Together at most 1.3 times torch alone: the best of three each, in one process after the other.

    With bytecode at hand, as pip leaves it: an environment that writes none would time Python's compiler.
    """
    probe = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import expfam_poco; "
        "print(b - a, time.perf_counter() - b)"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    command = [sys.executable, "-c", probe]
    runs = [subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment) for _ in range(4)]
    times = [list(map(float, run.stdout.split())) for run in runs[1:]]  # the first wrote the bytecode
    torch_alone, added = map(min, zip(*times, strict=True))
    assert added <= 0.3 * torch_alone


def test_results_show_what_was_measured() -> None:
    """Every stored part has its table in RESULTS.md."""
    module = load_script(ROOT / "benchmarks" / "speed.py")
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    for part in ("cycle", "memory", "growth", "batched", "full"):
        content = json.loads((ROOT / "benchmarks" / "results" / f"speed-{part}.json").read_text(encoding="utf-8"))
        assert f"<!-- table speed-{part} -->\n\n{module.markdown(part, content)}\n<!-- end -->" in text, part
