"""What `expfam-poco compare` reports and writes: tables, JSON, CSV, picture, tuning, remarks."""

import csv
import errno
import json
import math
import os
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from expfam_poco.compare import plot
from expfam_poco.compare.job import Options, _write, compare, writable_folder
from expfam_poco.compare.report import LEVELS, Report, Result, show_gap
from expfam_poco.compare.runner import Curve
from expfam_poco.compare.tasks import load_task
from expfam_poco.errors import InputError


def small(folder: Path, **changes: Any) -> tuple[Report, str, str]:
    """A comparison of a second or so: the report, standard output, standard error."""
    defaults: dict[str, Any] = {
        "task": "wine",
        "methods": ["SGD", "SVRG", "IVON-PoCo", "VON-PoCo"],
        "passes": 6.0,
        "seeds": 2,
        "output": folder,
        "workers": 1,
    }
    out, err = Console(file=StringIO(), width=80), Console(file=StringIO(), width=200)
    report = compare(Options(**(defaults | changes)), out, err)
    assert isinstance(out.file, StringIO) and isinstance(err.file, StringIO)
    return report, out.file.getvalue(), err.file.getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, str, str]:
    folder = tmp_path_factory.mktemp("compare") / "made" / "on the way"
    return folder, *small(folder)


def test_json_holds_settings_versions_and_all_curves(done: tuple[Path, Report, str, str]) -> None:
    folder, report, _, _ = done
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert content["settings"] == {
        "task": "wine",
        "examples": 178,
        "weights": 42,
        "classes": ["class_0", "class_1", "class_2"],
        "delta": 0.01,
        "batch": 5,
        "passes": 6.0,
        "ess": 17800.0,
        "seeds": [0, 1],
        "tuned": False,
    }
    assert {"python", "torch", "numpy", "expfam_poco"} <= set(content["versions"])
    assert content["minimum"]["loss"] == report.task.minimum.loss
    assert list(content["methods"]) == ["SGD", "SVRG", "IVON-PoCo", "VON-PoCo"]
    for result in report.results:
        written = content["methods"][result.method]
        assert written["hyperparameters"] == result.settings
        assert [curve["seed"] for curve in written["curves"]] == [0, 1]
        for curve, original in zip(written["curves"], result.curves, strict=True):
            assert curve["gaps"] == original.gaps
            assert len(curve["gaps"]) == len(curve["passes"]) == len(curve["steps"]) == len(curve["hessians"]) > 30
        assert written["summary"]["median_gap"] == np.median([curve.gaps[-1] for curve in result.curves])
        assert written["summary"]["gradient_passes"] == result.curves[0].passes[-1]
    assert content["methods"]["SVRG"]["summary"]["hessian_passes"] == 0.0
    assert content["methods"]["VON-PoCo"]["summary"]["hessian_passes"] > 5.0


def test_csv_has_a_line_for_every_record(done: tuple[Path, Report, str, str]) -> None:
    folder, report, _, _ = done
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(curve.gaps) for result in report.results for curve in result.curves)
    last = [row for row in rows if row["method"] == "SVRG" and row["seed"] == "1"][-1]
    curve = report.results[1].curves[1]
    assert float(last["gap"]) == pytest.approx(curve.gaps[-1], rel=1e-8)
    assert float(last["seconds"]) == pytest.approx(curve.times[-1], rel=1e-5)
    assert (int(last["steps"]), float(last["passes"])) == (curve.steps[-1], pytest.approx(curve.passes[-1], rel=1e-5))


def test_picture_has_three_panels_with_all_methods(done: tuple[Path, Report, str, str]) -> None:
    from matplotlib.image import imread

    folder, _, _, _ = done
    picture = imread(folder / "curves.png")[:, :, :3]
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    for method in ("SVRG", "IVON-PoCo", "VON-PoCo"):
        colour = np.array([int(plot.STYLES[method][0][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        found = (np.abs(picture - colour).max(axis=2) < 0.02).nonzero()[1]
        assert found.min() < 0.35 * picture.shape[1] and 0.5 * picture.shape[1] < found.max(), method
    grey = (np.abs(picture - 0xE6 / 255).max(axis=2) < 0.004).mean()
    assert grey > 0.02, "bars at the outer passes"


def test_tables_fit_80_columns_and_name_what_counts(done: tuple[Path, Report, str, str]) -> None:
    _, report, out, err = done
    for line in out.splitlines():
        assert len(line) <= 80 or line.startswith(("SVRG ", "IVON-PoCo ", "VON-PoCo ", "Written to")), line
    for result in report.results:
        row = next(line for line in out.splitlines() if line.strip().startswith(result.method) and "…" in line)
        summary = result.summary()
        assert show_gap(summary["median_gap"]) in row and f" {summary['steps']} " in row
    for level in LEVELS:
        assert f"{level:.0e}" in out
    assert "ess = 17800 = 100 N" in " ".join(out.split())
    assert "1.7e-3 on breast-cancer" in " ".join(out.split())
    assert "curves.png, results.json, results.csv" in out
    assert "minimum 0.0951408" in err and "VON-PoCo, seed 1: gap" in err


def result_of(*gaps: list[float], reason: str = "") -> Result:
    curves = [
        Curve("SGD", seed, passes=[0.0, 1.0, 2.0][: len(g)], steps=[0, 5, 10][: len(g)], gaps=g, hessians=[0.0] * 3)
        for seed, g in enumerate(gaps)
    ]
    curves[-1].reason = reason
    return Result("SGD", {}, curves)


def test_passes_to_reach_a_level_are_those_of_the_median() -> None:
    result = result_of([1.0, 1e-3, 1e-5], [1.0, 1e-1, 1e-6], [1.0, 1e-4, 1e-9])
    assert [result.passes_to(level) for level in (1e-2, 1e-3, 1e-5, 1e-7)] == [1.0, 1.0, 2.0, None]
    summary = result.summary()
    assert (summary["median_gap"], summary["lowest_gap"], summary["highest_gap"]) == (1e-6, 1e-9, 1e-5)


def test_seconds_to_a_level_are_those_of_its_record() -> None:
    curves = [
        Curve("SGD", k, passes=[0.0, 1.0], steps=[0, 5], gaps=[1.0, 1e-3], hessians=[0.0, 0.0], times=[0.0, 2.0 + k])
        for k in range(3)
    ]
    result = Result("SGD", {}, curves)
    assert result.seconds_to(1e-2) == 3.0 and result.seconds_to(1e-4) is None
    assert result.summary()["seconds_to"]["1e-03"] == 3.0


def test_a_diverged_seed_counts_as_infinite() -> None:
    one_of_three = result_of([1.0, 0.1, 0.01], [1.0, 0.2, 0.03], [1.0, 1e9], reason="the gap is 1e+09").summary()
    assert (one_of_three["median_gap"], one_of_three["highest_gap"], one_of_three["diverged"]) == (0.03, None, 1)
    one_of_two = result_of([1.0, 0.1, 0.01], [1.0, 1e9], reason="the gap is 1e+09")
    assert one_of_two.summary()["median_gap"] is None
    assert one_of_two.passes_to(1e-1) is None


def test_show_gap() -> None:
    assert [show_gap(gap) for gap in (None, 0.0, 1e-17, 2.345e-7)] == ["diverged", "<1e-16", "<1e-16", "2.3e-07"]


def test_divergence_is_reported_and_drawn_around(tmp_path: Path) -> None:
    report, out, err = small(tmp_path, methods=["SGD", "SVRG"], lr=["SGD=1e6"], passes=3.0)
    assert report.results[0].diverged == 2 and report.results[1].diverged == 0
    assert "SGD: 2 of 2 seeds diverged" in " ".join(out.split()) and "SGD, seed 0: diverged" in err
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["methods"]["SGD"]["summary"]["median_gap"] is None
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_options_reach_the_methods(tmp_path: Path) -> None:
    report, out, _ = small(
        tmp_path,
        methods=["svrg", "IVON-PoCo", "IVON-PoCo-literal", "VON-PoCo"],
        passes=2.0,
        seeds=1,
        first_seed=7,
        batch=10,
        delta=0.1,
        ess="10N",
        noise="independent",
        curvature="exact",
        lr=["0.5", "VON-PoCo=0.2"],
        set=["inner=12", "SVRG.alpha=0.75", "chunks=3"],
    )
    settings = {result.method: result.settings for result in report.results}
    assert (report.seeds, report.batch, report.task.delta, report.ess) == ([7], 10, 0.1, 1780.0)
    assert settings["SVRG"]["alpha"] == 0.75 and settings["IVON-PoCo"]["alpha"] == 1.0
    assert settings["SVRG"]["lr"] == 0.5 and settings["VON-PoCo"]["lr"] == 0.2
    assert all(found["inner"] == 12 and found["chunks"] == 3 for found in settings.values())
    assert (settings["IVON-PoCo"]["noise"], settings["IVON-PoCo"]["curvature"]) == ("independent", "exact")
    assert settings["IVON-PoCo"]["anchor_weight"] == 1.0, "exact curvature brings its own tuned settings"
    assert settings["IVON-PoCo-literal"]["curvature"] == "reparam", "a printed algorithm stays as it is printed"
    assert "ess = 1780 = 10 N" in " ".join(out.split())


def test_tuning_is_reported(tmp_path: Path) -> None:
    report, _, err = small(tmp_path, methods=["SGD", "IVON"], passes=1.0, seeds=1, tune=True)
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["settings"]["tuned"] is True
    for result in report.results:
        tuning = content["methods"][result.method]["tuning"]
        assert len(tuning) == 8
        best = min(tuning, key=lambda point: math.inf if point["median_gap"] is None else point["median_gap"])
        assert result.settings["lr"] == best["lr"]
    assert "tuning: 32 runs" in err


def test_own_data(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((60, 3)) * [1.0, 100.0, 0.01]
    labels = np.where(features @ [1.0, 0.01, 100.0] + random.standard_normal(60) > 0, "yes", "no")
    lines = ["a,b,c,constant,answer"]
    lines += [f"{a!r},{b!r},{c!r},1,{label}" for (a, b, c), label in zip(features.tolist(), labels, strict=True)]
    (tmp_path / "own.csv").write_text("\n".join(lines), encoding="utf-8")
    report, out, _ = small(tmp_path / "out", data=tmp_path / "own.csv", target="answer", passes=20.0)
    assert report.task.classes == ("no", "yes") and report.task.shape == (4,)
    assert "column 'constant' holds one value only and was left out" in " ".join(out.split())
    gaps = {result.method: result.summary()["median_gap"] for result in report.results}
    assert gaps["VON-PoCo"] < 1e-8 and gaps["SVRG"] < 1e-4


def test_without_matplotlib_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    report, out, err = small(tmp_path, methods=["SGD"], passes=1.0)
    assert "matplotlib is not installed; run: python -m pip install 'expfam_poco[examples]'." in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json"]
    assert "curves.png" not in out
    with pytest.raises(InputError, match="matplotlib"):
        plot.draw(report, tmp_path / "curves.png")


def test_without_scikit_learn_a_built_in_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(InputError, match="needs scikit-learn, which is not installed"):
        load_task("wine")


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be written to"):
            writable_folder(folder)


@pytest.mark.parametrize("name", ["results.json", "results.csv", "curves.png"])
def test_a_full_disk_leaves_the_old_files(
    name: str, done: tuple[Path, Report, str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, report, _, _ = done
    (tmp_path / name).write_text("old")
    real = os.fsync

    def full(handle: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"--output.*No space left on device"):
        _write(report, tmp_path, Console(quiet=True))
    assert (tmp_path / name).read_text() == "old"
    assert not list(tmp_path.glob(".*"))
