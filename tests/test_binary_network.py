"""The binary network example runs as a user runs it, in a short setting."""

import json
from pathlib import Path

import pytest
import torch
from scripts import Done, run_script

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
METHODS = ["float", "ste", "bayesbinn", "bayesbinn-poco"]


def run(*options: str) -> Done:
    return run_script(EXAMPLES / "binary_network.py", *options)


def test_all_methods_learn_digits_at_equal_evaluations_and_the_packed_network_is_as_good(tmp_path: Path) -> None:
    done = run("--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    rows = results["summary"]
    assert list(rows) == METHODS
    assert len({row["evaluations"] for row in rows.values()}) == 1
    for row in rows.values():
        assert row["accuracy"] > 0.85  # chance is 0.1 on 599 images
    for method in METHODS[2:]:
        shipped = results["runs"][method][0]["shipped"]
        assert shipped["accuracy"] == results["runs"][method][0]["curve"][-1]["accuracy"]
        assert shipped["float_bytes"] > 8 * shipped["bytes"]
    assert results["moons"] > 0.75
    for name in ("curves", "confusion", "uncertainty", "moons"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_the_cnn_trains_on_the_validation_split(tmp_path: Path) -> None:
    options = ("--model", "cnn", "--methods", "bayesbinn-poco", "--validation", "--estimator", "relaxed")
    done = run("--quick", *options, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["summary"]["bayesbinn-poco"]
    assert row["accuracy"] > 0.4


def test_wrong_numbers_and_missing_data_are_one_sentence(tmp_path: Path) -> None:
    assert "--epochs 0: give 1 or more" in run("--epochs", "0").stderr
    done = run("--data", "mnist", "--root", str(tmp_path), "--output", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("--data mnist")
    assert "Traceback" not in done.stderr


def test_straight_through_passes_the_gradient_where_the_latent_weight_is_not_beyond_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from binary_models import ClippedIdentity

    latent = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True)
    sign = ClippedIdentity.apply(latent)
    (sign * torch.arange(1.0, 6.0)).sum().backward()
    assert sign.tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0]
    assert latent.grad is not None
    assert latent.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
