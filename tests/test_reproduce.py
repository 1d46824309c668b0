"""`expfam-poco reproduce`: every figure runs, resumes and is counted; claims are judged by their rule."""

import json
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import load_script
from typer.testing import CliRunner

from expfam_poco.cli import app
from expfam_poco.reproduce import job, table
from expfam_poco.reproduce.data import InMemory, Source, digits
from expfam_poco.reproduce.figure import Claim, Curve, Figure, Panel, Scale
from expfam_poco.reproduce.figures import FIGURES
from expfam_poco.reproduce.figures.convex import recipe
from expfam_poco.reproduce.figures.text import BASE, corrected
from expfam_poco.reproduce.networks import NETWORKS
from expfam_poco.reproduce.plot import draw
from expfam_poco.reproduce.problems import Convex, Text
from expfam_poco.reproduce.recipe import Recipe
from expfam_poco.reproduce.runs import Job, Work, cost
from expfam_poco.reproduce.training import Training
from expfam_poco.reproduce.tune import _beyond, best, rates_of

ROOT = Path(__file__).resolve().parents[1]
SMALL_AND_PAPER = [(name, scale) for name in FIGURES for scale in ("small", "paper")]
HERE = Source()
LONG = (
    "fig3",
    "fig4",
    "fig6",
    "fig7",
    "table1",
)  # the fast tests have a figure of each kind: text, convex, pictures, a table


def invoke(*words: str) -> Any:
    result = CliRunner().invoke(app, ["reproduce", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# ---- every figure ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in FIGURES]
)
def test_every_figure_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expfam_poco.reproduce.plot.DPI", 20)
    result = invoke(name, "--quick", "--workers", "1", "--output", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    folder, figure = tmp_path / f"{name}-small-quick", FIGURES[name]
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert list(content["runs"]) == [curve.label for curve in figure.small.curves]
    assert all(run["points"]["step"][-1] >= 1 for runs in content["runs"].values() for run in runs)
    assert len(content["verdicts"]) == len(figure.claims) and "not run" not in content["verdicts"]
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    lines = (folder / "results.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("curve,seed,lr,step,evaluations") and len(lines) > len(figure.small.curves)


@pytest.mark.parametrize(("name", "scale_name"), SMALL_AND_PAPER)
def test_declarations_are_sound(name: str, scale_name: str) -> None:
    """Labels are unique and known; what is compared at equal steps has equal steps, at equal evaluations equal cost."""
    figure = FIGURES[name]
    scale = figure.scale(scale_name)
    labels = [curve.label for curve in scale.curves]
    assert len(set(labels)) == len(labels)
    for panel in scale.panels:
        for shown in panel.curves.values() if isinstance(panel.curves, dict) else [panel.curves]:
            assert set(shown) <= set(labels)
    assert set(scale.cells) <= set(labels)
    for curve in scale.curves:
        assert bool(curve.rates) + bool(curve.rate_of) <= 1
        assert not curve.rate_of or scale.curve(curve.rate_of)
        if scale_name == "small":
            assert curve.rates or curve.rate_of, curve.label
    for claim in figure.claims:
        for pair in claim.steps + claim.better:
            if set(pair) <= set(labels):
                one, other = (scale.curve(label).recipe for label in pair)
                if one.evaluations is None:
                    assert one.steps == other.steps
                else:
                    assert one.evaluations == other.evaluations
        for pair in claim.evaluations:
            if set(pair) <= set(labels):
                one, other = (scale.curve(label).recipe for label in pair)
                assert cost(one) == pytest.approx(cost(other), rel=0.02)
    assert scale_name == "paper" or all(
        set(pair) <= set(labels) for claim in figure.claims for pair in claim.steps + claim.evaluations + claim.better
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["fig2"], "there is no figure 'fig2'; choose from fig1, fig3, fig4, fig5, fig6, fig7, table1, vsgd-table1"),
        (["fig3", "--scale", "large"], "--scale 'large' is not known; choose small or paper"),
        (["fig3", "--seeds", "0"], "--seeds 0: give at least one"),
        (["fig3", "--workers", "0"], "--workers 0"),
        (["fig3", "--data", "nowhere"], "--data nowhere: there is no such folder"),
    ],
)
def test_wrong_input_is_one_sentence(words: list[str], sentence: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2 and sentence in " ".join(result.stderr.split())


# ---- runs: counted, resumed, tuned -------------------------------------------------------------------------


def convex(**changes: Any) -> Recipe:
    return replace(recipe("wine", "IVON-PoCo"), evaluations=120.0, validate_every=10, **changes)


TINY = Figure(
    "tiny",
    "Two methods on wine",
    (Claim("correction helps", "nowhere", "gap", (("corrected", "plain"),)),),
    Scale(
        "two methods",
        (
            Curve("corrected", convex(), (0.5, 1.0)),
            Curve("plain", replace(recipe("wine", "SGD"), evaluations=120.0, validate_every=10), (0.1, 0.2)),
        ),
        (Panel("both", ("corrected", "plain"), "passes", "gap", log=True),),
    ),
    Scale("none", ()),
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Figure:
    monkeypatch.setitem(job.FIGURES, "tiny", TINY)
    return TINY


def test_a_second_call_repeats_nothing_and_mends_what_is_broken(
    tiny: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("tiny", "--workers", "1", "--seeds", "2", "--output", str(tmp_path))
    first = invoke(*words)
    folder = tmp_path / "tiny-small"
    results, runs = (folder / "results.json").read_bytes(), sorted((folder / "report").iterdir())
    assert first.exit_code == 0 and len(runs) == 4
    calls: list[int] = []
    run = Training.run

    def counted(self: Training, *arguments: Any) -> str:
        calls.append(self.seed)
        return run(self, *arguments)

    monkeypatch.setattr(Training, "run", counted)
    assert invoke(*words).exit_code == 0 and calls == []
    runs[1].write_bytes(runs[1].read_bytes()[:100])
    runs[2].write_text(runs[2].read_text(encoding="utf-8").replace('"delta"', '"gamma"').replace("0.15", "0.25"))
    assert invoke(*words).exit_code == 0 and len(calls) == 2
    again = json.loads((folder / "results.json").read_bytes())

    def timeless(content: dict[str, Any]) -> dict[str, Any]:
        for several in content["runs"].values():
            for one in several:
                del one["points"]["seconds"]
        return content

    assert timeless(again) == timeless(json.loads(results))


def test_tuning_searches_each_rate_on_seeds_of_its_own(tiny: Figure, tmp_path: Path) -> None:
    done = invoke("tiny", "--tune", "--quick", "--workers", "1", "--output", str(tmp_path))
    folder = tmp_path / "tiny-small-quick"
    found = json.loads((folder / "rates.json").read_text(encoding="utf-8"))
    assert done.exit_code == 0 and {len(tried) for tried in found["tried"].values()} == {2}
    for label, tried in found["tried"].items():
        assert found["rates"][label] == float(min(tried, key=tried.__getitem__))
    assert {path.name.rpartition("seed")[2] for path in (folder / "tune").iterdir()} == {"1000000.json", "1000001.json"}
    for label, tried in found["tried"].items():
        for rate, mean in tried.items():
            runs = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "tune").glob(f"*-lr{rate}-*")]
            gaps = [run["points"]["gap"][-1] for run in runs if run["label"] == label]
            assert len(gaps) == 2 and mean == pytest.approx(sum(gaps) / 2)
    assert rates_of("tiny", tiny.small, "small", folder) == found["rates"]


def test_grids_are_widened_at_their_edges() -> None:
    curve = TINY.small.curve("plain")
    assert best({"0.1": 2.0, "0.2": 1.0}) == 0.2
    assert _beyond(curve, {"0.1": 2.0, "0.2": 1.0}) == [0.4]
    assert _beyond(curve, {"0.1": 1.0, "0.2": 2.0}) == [0.05]
    assert _beyond(curve, {"0.1": 2.0, "0.2": 1.0, "0.4": math.inf}) == []


def test_jobs_can_be_sent_to_workers(tmp_path: Path) -> None:
    jobs = [Job.of(curve, curve.recipe.lr, 0) for figure in FIGURES.values() for curve in figure.small.curves]
    work = Work(tmp_path, HERE)
    assert pickle.loads(pickle.dumps((work, jobs))) == (work, jobs)
    paths = {job.path(tmp_path) for job in jobs[:9]}
    assert len(paths) == 9 and all(re.fullmatch(r"[\w.-]+", path.name) for path in paths)


def test_runs_of_a_figure_have_files_of_their_own(tmp_path: Path) -> None:
    for figure in FIGURES.values():
        for scale in (figure.small, figure.paper):
            paths = [Job.of(curve, curve.recipe.lr, 0).path(tmp_path) for curve in scale.curves]
            assert len(set(paths)) == len(paths), figure.name


def test_every_gradient_is_counted(tmp_path: Path) -> None:
    """Burn-in 1 a step, then 2 and each mega-batch: of mini-batches, or of all data."""
    made = replace(convex(), evaluations=None, steps=9, burn_in=3, every=2, mega=4)
    training = Training(made, 0, "report", HERE, tmp_path)
    assert training.run() == "" and training.evaluations == 3 + 6 * 2 + 3 * 4
    training = Training(replace(made, mega=0), 0, "report", HERE, tmp_path)
    assert training.run() == "" and training.evaluations == pytest.approx(3 + 6 * 2 + 3 * 178 / 5)
    training = Training(replace(made, method="sgd", options={}, later_batch=3), 0, "report", HERE, tmp_path)
    assert training.run() == "" and training.evaluations == 3 + 6 * 3
    limited = Training(replace(made, steps=100, evaluations=20.0), 0, "report", HERE, tmp_path)
    assert limited.run() == "" and 14 <= limited.evaluations <= 20


def test_accumulated_micro_batches_are_the_batch(tmp_path: Path) -> None:
    for method, options in (
        ("sgd", {}),
        ("ivon-poco", {**convex().options, "noise": "fixed"}),
        ("sgd+alpha-svrg", {"alpha": 0.5}),
    ):
        ends = []
        for parts in (1, 3):
            made = replace(
                convex(), method=method, options=options, steps=6, burn_in=2, every=2, mega=2, batch=6, lr=0.1
            )
            training = Training(replace(made, accumulate=parts), 0, "report", HERE, tmp_path)
            assert training.run() == ""
            ends.append((training.points[-1]["gap"], training.evaluations))
        assert ends[0] == pytest.approx(ends[1], rel=1e-9)


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    training = Training(replace(convex(), method="sgd", options={}, lr=1e6), 0, "report", HERE, tmp_path)
    assert "diverged" in training.run()


def test_a_run_begins_with_another_and_its_posterior(tmp_path: Path) -> None:
    text = Text("topics", context=16, windows=4, changes={"layers": 1, "width": 16, "heads": 2})
    first = replace(BASE, problem=text, steps=3, burn_in=3, validate_every=3)
    then = replace(corrected(first, "ivon-poco"), lr=0.05, start=first)
    training = Training(then, 5, "tune", HERE, tmp_path)
    before = Training(first, 5, "tune", HERE, tmp_path)
    before.run()
    assert len(list(tmp_path.glob("start-*.pt"))) == len(list(tmp_path.iterdir())) == 1
    training._record()
    assert training.points[0]["loss"] == before.points[-1]["loss"]
    assert training.optimizer.param_groups[0]["lr"] == 0.05 and training.optimizer.param_groups[0]["alpha"] == 0.7
    mine, other = (run.optimizer.posterior() for run in (training, before))
    assert all(torch.equal(mine[name].base_dist.scale, other[name].base_dist.scale) for name in mine)


def test_schedules() -> None:
    made = replace(BASE, steps=110, warmup=10, final=0.25)
    assert made.factor(0) == 0.1 and made.factor(10) == 1.0
    assert made.factor(60) == pytest.approx(0.625) and made.factor(110) == pytest.approx(0.25)
    assert replace(made, warmup=0, halve_every=10).factor(25) == 0.25


# ---- data and networks -------------------------------------------------------------------------------------


def test_digits_are_parted_once() -> None:
    whole, some = digits("digits"), digits("digits 5-9 noisy")
    assert len(whole.train) + len(whole.tune) + len(whole.report) == 1797 and whole.classes == 10
    assert some.classes == 5 and len(some.train) + len(some.tune) + len(some.report) == 1797 - 901


def test_pictures_are_shifted_by_up_to_a_pixel() -> None:
    x = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(50, 1, 1, 1)
    made, _ = InMemory(x, torch.zeros(50), padding=1).get(torch.arange(50), np.random.default_rng(0))
    wide = torch.nn.functional.pad(x[0, 0], [1] * 4)
    shifted = [wide[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    assert all(any(torch.equal(picture[0], one) for one in shifted) for picture in made)
    assert len({tuple(picture.flatten().tolist()) for picture in made}) == 9 and made.is_contiguous()


@pytest.mark.parametrize(
    ("name", "classes", "weights"),
    [
        ("resnet50", 1000, 25_557_032),  # torchvision's
        ("resnet", 10, 272_474),  # ResNet-20 with projections
        ("vgg", 100, 14_770_212),  # 14.8 M in VSGD-G's Table 2
        ("conv-mixer", 100, 617_316),  # 0.6 M there
        ("resnext", 100, 11.1e6),  # 11.1 M there
    ],
)
def test_networks_are_as_large_as_the_papers(name: str, classes: int, weights: float) -> None:
    with torch.device("meta"):
        model = NETWORKS[name](3, classes)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(weights, rel=0.005 if weights > 11e6 else 0)


# ---- verdicts ----------------------------------------------------------------------------------------------


def results(**finals: list[float | None]) -> table.Results:
    """Finished runs of TINY with these final losses."""

    def run(value: float | None, seed: int) -> dict[str, Any]:
        points = {"step": [0, 9], "evaluations": [0, 9], "passes": [0, 1], "seconds": [0.0, 1.0], "loss": [3.0, value]}
        return {"settings": {"seed": seed}, "reason": "" if value is not None else "diverged", "points": points}

    runs = {label: [run(value, seed) for seed, value in enumerate(values)] for label, values in finals.items()}
    curves = tuple(Curve(label, replace(BASE, problem=Convex("wine"))) for label in finals)
    panel = Panel("all", tuple(finals), "step", "loss")
    return table.Results(TINY, "small", Scale("made up", curves, (panel,)), [0, 1, 2], dict.fromkeys(finals, 0.1), runs)


CLAIM = Claim("better", "here", "loss", (("a", "b"),), (("a", "c"),), (("d", "b"),))


@pytest.mark.parametrize(
    ("a", "c", "d", "words"),
    [
        ([1.0, 1.1, 1.2], [1.5, 1.5, 1.5], [3.0] * 3, "holds"),
        ([1.0, 1.1, 1.2], [1.5, 1.5, 1.0], [3.0] * 3, "holds per step only"),
        ([1.0, 2.5, 1.2], [1.5, 1.5, 1.5], [1.0] * 3, "holds with the better estimator"),
        ([1.0, None, 1.2], [1.5, 1.5, 1.5], [3.0] * 3, "does not hold here"),
    ],
)
def test_verdicts_follow_their_rule(a: list[Any], c: list[Any], d: list[Any], words: str, tmp_path: Path) -> None:
    found = results(a=a, b=[2.0, 2.0, 2.0], c=c, d=d)
    assert table.verdict(found, CLAIM) == words
    assert table.verdict(found, replace(CLAIM, measure="accuracy")) == "not run"
    assert len(table.curve_rows(found)) == 5
    draw(found, tmp_path / "picture.png")


def test_differences_are_paired_by_seed() -> None:
    found = results(a=[1.0, 1.2, 1.1], b=[1.5, 1.5, None])
    assert table.compared(found, ("a", "b"), "loss") == [0.5, pytest.approx(0.3), math.inf]
    assert table.gain_text([0.5, 0.3, 0.4], "loss") == "+0.400 [+0.300, +0.500]"
    assert table.gain_text([1.0, -1.0, 2.0], "gap") == "× 10 [0.1, 100]"


def test_the_page_shows_what_is_stored() -> None:
    script = load_script(ROOT / "benchmarks" / "reproduction.py")
    page = script.PAGE.read_text(encoding="utf-8")
    for name, content in script.tables(script.stored()).items():
        assert f"<!-- table {name} -->\n\n{content}\n\n<!-- end -->" in page, name
