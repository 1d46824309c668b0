"""`benchmarks/packed.py` runs in its short setting, and RESULTS.md shows what its JSON holds."""

import json
from pathlib import Path

import pytest
from scripts import load_script

from expfam_poco.tools import packed_kernel

script = load_script(Path(__file__).resolve().parents[1] / "benchmarks" / "packed.py")


def test_the_stored_numbers_are_the_tables() -> None:
    content = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    assert set(content) == set(script.LAYERS)
    assert all(found["memory"] >= 20.0 for found in content.values())
    assert f"<!-- table packed -->\n\n{script.markdown(content)}\n\n<!-- end -->" in script.PAGE.read_text(
        encoding="utf-8"
    )


@pytest.mark.xdist_group("speed")
@pytest.mark.skipif(packed_kernel.library() is None, reason="no C++ compiler is installed")
def test_packed_layers_are_small_and_counting_is_fast() -> None:
    (found,) = script.run(True).values()
    assert found["memory"] >= 20.0
    assert found["times"]["1, 1"]["binary"] < 2.0 * found["times"]["1, 1"]["float32"]  # a sixth on a quiet machine
