"""The language model example and its benchmark, in short settings that really train on the real text."""

import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import load_script

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.xdist_group("language model")  # the corpus is read once
SHORT = {"preset": "nano", "batch": 4, "context": 32, "burn_in": 2, "every": 2, "mega": 2, "validation": 8, "warmup": 2}


@pytest.fixture(scope="module", autouse=True)
def examples_importable() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "examples"))
    yield
    sys.path[:] = before


@pytest.fixture(scope="module")
def lm() -> ModuleType:
    return importlib.import_module("language_model")


@pytest.fixture(scope="module")
def gpt() -> ModuleType:
    return importlib.import_module("gpt")


@pytest.fixture(scope="module")
def texts() -> ModuleType:
    return importlib.import_module("corpus")


@pytest.fixture(scope="module")
def stdlib(texts: ModuleType) -> Any:
    return texts.load("stdlib", 128)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script(ROOT / "benchmarks" / "language_model.py")


def training(lm: ModuleType, corpus: Any, **changes: Any) -> Any:
    return lm.Training(lm.Settings(**{**SHORT, **changes}), corpus)


def finish(run: Any, until: int | None = None) -> Any:
    for _ in run.run(until):
        pass
    return run


# ---- the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "vocabulary", "least", "most"),
    [
        ("nano", 256, 0.1e6, 0.15e6),
        ("tiny", 256, 0.4e6, 0.45e6),
        ("small", 256, 1e6, 3e6),
        ("small", 4096, 1e6, 3e6),
        ("33m", 40_000, 32.5e6, 33.5e6),
        ("125m", 50_257, 124e6, 125e6),
    ],
)
def test_presets_have_the_weights_of_their_names(
    gpt: ModuleType, name: str, vocabulary: int, least: float, most: float
) -> None:
    config = gpt.preset(name, vocabulary=vocabulary, context=1024)
    found = gpt.parameters_of(config)
    block = 12 * config.width**2 + 2 * config.width
    learned = 1024 * config.width if config.positions == "learned" else 0
    assert found == config.layers * block + vocabulary * config.width + learned + config.width
    assert least < found < most


def test_rotary_scores_depend_on_the_distance_alone(gpt: ModuleType) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 16), torch.randn(1, 16)
    angle = gpt.angles(64, 16)

    def score(m: int, n: int) -> float:
        return float((gpt.rotate(query, angle[m]) * gpt.rotate(key, angle[n])).sum())

    assert score(7, 2) == pytest.approx(score(55, 50), rel=1e-4)
    assert abs(score(7, 2) - score(7, 3)) > 1e-2
    assert float(gpt.rotate(query, angle[9]).norm()) == pytest.approx(float(query.norm()), rel=1e-6)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_token_sees_its_order_and_not_its_future(gpt: ModuleType, positions: str) -> None:
    torch.manual_seed(0)
    model = gpt.GPT(gpt.Config(layers=2, heads=2, width=32, context=16, positions=positions))
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    plain, other = model(tokens), model(changed)
    assert torch.equal(plain[:, :10], other[:, :10])
    assert not torch.allclose(plain[:, 10:], other[:, 10:])
    swapped = tokens[:, [1, 0, *range(2, 16)]]  # attention without positions would not notice
    assert not torch.allclose(model(swapped)[:, -1], plain[:, -1], atol=1e-7)


def test_a_new_model_knows_nothing_but_its_own_token(gpt: ModuleType) -> None:
    """Logits are N(0, 0.02² width); that of the present token is up to 0.02 width, as embeddings in and out are one."""
    torch.manual_seed(0)
    loss = gpt.GPT(gpt.preset("tiny")).loss(torch.randint(256, (32, 129)))
    others = math.exp(0.02**2 * 128 / 2)
    most = math.log(255 * others + math.exp(0.02 * 128)) - 0.02 * 128 / 256
    error = 0.02 * 128**0.5 / 4096**0.5  # of the mean logit of 4096 random targets
    assert math.log(256 * others) - 4 * error < loss.item() < most + 4 * error


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"positions": "sine"}, "positions='sine'"), ({"heads": 3}, "heads=3"), ({"heads": 128}, "heads=128")],
)
def test_impossible_shapes_are_refused(gpt: ModuleType, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        gpt.preset("tiny", **changes)


# ---- the text --------------------------------------------------------------------------------------------


def test_held_out_files_are_not_trained_on(texts: ModuleType) -> None:
    train, held_out = texts.stdlib_files()
    assert not set(train) & set(held_out)
    assert 18 <= len(train) / len(held_out) <= 20
    assert not any(part in {"test", "site-packages", "pydoc_data"} for path in train for part in path.parts[-3:-1])
    names = {path.name for path in [*train, *held_out]}
    assert {"argparse.py", "dataclasses.py"} <= names
    text, other = texts.texts("stdlib")
    assert len(text) > 5e6 and len(other) > 1e5


def test_prose_is_not_in_the_sources(texts: ModuleType) -> None:
    prose, rest = texts.texts("topics")
    sources, _ = texts.texts("stdlib")
    assert len(prose) > 1e5 and len(rest) > 1e4
    middle = prose[len(prose) // 2 :][:400]
    assert middle in prose and middle not in sources


def test_batches_depend_on_seed_stream_and_index_alone(texts: ModuleType, stdlib: Any) -> None:
    arguments = {"seed": 0, "stream": texts.TRAINING, "index": 3}
    first = stdlib.batch(32, 4, **arguments)
    assert torch.equal(first, stdlib.batch(32, 4, **arguments))
    for name, value in (("seed", 1), ("stream", texts.MEGA_BATCH), ("index", 4)):
        assert not torch.equal(first, stdlib.batch(32, 4, **{**arguments, name: value}))
    row = bytes(first[0].tolist())
    assert len(row) == 33 and row in bytes(stdlib.train.tolist())


def test_all_methods_see_the_same_batches(lm: ModuleType, stdlib: Any) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    for method in lm.METHODS:
        run = training(lm, stdlib, method=method, steps=4)
        seen[method] = [run.batches(0, step, 1)[0] for step in range(4)]
    for batches in seen.values():
        assert all(map(torch.equal, batches, seen["adamw"]))


def test_text_files_and_byte_pairs(texts: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Zürich, naïve: for x in range(10):\n" * 200, encoding="utf-8")
    corpus = texts.load(str(path), 16)
    assert len(corpus.train) + len(corpus.held_out) == path.stat().st_size
    pytest.importorskip("tokenizers")
    pairs = texts.load(str(path), 4, "bpe", 300)
    assert pairs.tokenizer.vocabulary <= 300 and int(pairs.train.max()) < 300
    assert len(pairs.train) < len(corpus.train) / 2
    whole = texts.restored(pairs.tokenizer.saved())
    sentence = "naïve: ∇ is new\n"
    tokens = whole.encode(sentence.encode())
    assert torch.equal(tokens, pairs.tokenizer.encode(sentence.encode()))
    assert whole.decode(tokens.tolist()) == sentence


def test_wrong_texts_are_refused(texts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 100)
    for call, sentence in (
        (lambda: texts.load("nowhere.txt", 8), "nowhere.txt"),
        (lambda: texts.load(str(path), 8), "5 tokens, and a window needs 9"),
        (lambda: texts.load("topics", 8, "words"), "tokenizer='words'"),
        (lambda: texts.load("topics", 8, "bpe", 100), "vocabulary=100"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        texts.load("topics", 8, "bpe")


# ---- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adamw", "alpha-svrg", "ivon", "ivon-poco", "ivon-pocomo"])
def test_every_method_learns_and_counts(lm: ModuleType, stdlib: Any, method: str) -> None:
    run = finish(training(lm, stdlib, method=method, steps=40, burn_in=20, every=10, mega=3, validate_every=20))
    losses = [point["loss"] for point in run.curve]
    assert [point["step"] for point in run.curve] == [0, 20, 40]
    # The frequencies of bytes alone, without any context, are worth this much.
    counts = torch.bincount(stdlib.train.long(), minlength=256).double()
    shares = counts[counts > 0] / counts.sum()
    alone = -float((shares * shares.log()).sum())
    assert losses[-1] < losses[1] < losses[0]
    assert losses[-1] < (math.log(256) + alone) / 2
    evaluations = 20 + 20 * 2 + 2 * 3 if method in lm.CORRECTED else 40
    assert run.curve[-1]["evaluations"] == evaluations
    assert run.curve[-1]["tokens"] == 40 * 4 * 32


@pytest.mark.parametrize("method", ["adamw", "alpha-svrg", "ivon-pocomo"])
def test_resumed_runs_continue_bit_for_bit(lm: ModuleType, stdlib: Any, method: str, tmp_path: Path) -> None:
    choices = {"method": method, "steps": 8, "validate_every": 3, "dropout": 0.1}
    whole = finish(training(lm, stdlib, **choices))
    half = finish(training(lm, stdlib, **choices), until=5)
    half.save(tmp_path / "run.pt")
    torch.manual_seed(99)
    resumed = training(lm, stdlib, **choices)
    resumed.load(tmp_path / "run.pt")
    finish(resumed)
    for first, second in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second)
    assert [point["loss"] for point in whole.curve] == [point["loss"] for point in resumed.curve]
    assert (resumed.step, resumed.evaluated) == (whole.step, whole.evaluated)


def test_continual_pretraining_takes_weights_and_posterior(lm: ModuleType, texts: ModuleType, tmp_path: Path) -> None:
    first = finish(training(lm, texts.load("stdlib", 32), method="ivon-pocomo", steps=6))
    first.save(tmp_path / "run.pt")
    prose = texts.load("topics", 32)
    second = training(lm, prose, method="ivon-poco", steps=8, lr=0.01, ess=3e8, burn_in=4)
    second.start_from(tmp_path / "run.pt")
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    before, after = first.optimizer.posterior_states(), second.optimizer.posterior_states()
    for name, state in before.items():
        assert torch.equal(state.precision, after[name].precision)
    (group,) = second.optimizer.param_groups
    assert group["ess"] == 3e8 and group["initial_lr"] == 0.01
    finish(second, until=4)
    assert second.evaluated == 4 * 4 * 32 and second.optimizer.diagnostics()["alpha"] == 0.0
    finish(second)
    assert second.evaluated == (4 + 2 * 2 + 4 * 2) * 4 * 32
    other = training(lm, prose, method="adamw", steps=2)
    other.start_from(tmp_path / "run.pt")
    assert torch.equal(other.model.embedding.weight, first.model.embedding.weight)


def test_bf16_trains_and_keeps_float32_weights(lm: ModuleType, stdlib: Any) -> None:
    run = finish(training(lm, stdlib, method="ivon-pocomo", dtype="bf16", steps=10, validate_every=10))
    assert run.curve[-1]["loss"] < run.curve[0]["loss"]
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_samples_of_text_from_mean_and_posterior(lm: ModuleType, stdlib: Any) -> None:
    run = finish(training(lm, stdlib, method="ivon", steps=2, ess=1e4))
    found = run.samples("def ", 20, draws=2, seed=1)
    assert len(found) == 3 and len(set(found)) == 3 and all(text.startswith("def ") for text in found)
    assert found == run.samples("def ", 20, draws=2, seed=1)
    assert len(training(lm, stdlib, method="adamw").samples("def ", 2, draws=2)) == 1


def test_the_command_trains_and_resumes(
    lm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    options += ["--text=topics", f"--output={tmp_path / 'run'}", "--sample=5", "--validate-every=2"]
    monkeypatch.setattr(sys, "argv", ["language_model.py", *options, "--steps=4"])
    lm.main()
    assert "step 4: validation loss" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["language_model.py", *options, "--steps=6", "--resume"])
    lm.main()
    printed = capsys.readouterr().out
    assert "step 6: validation loss" in printed and "posterior draw 1" in printed
    content = json.loads((tmp_path / "run" / "curve.json").read_text(encoding="utf-8"))
    assert [point["step"] for point in content["curve"]] == [0, 2, 4, 6]
    assert (tmp_path / "run" / "curve.csv").read_text().count("\n") == 5
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", ["language_model.py", f"--start={tmp_path / 'none.pt'}"])
    with pytest.raises(SystemExit, match=r"none\.pt"):
        lm.main()


@pytest.mark.parametrize("changes", [{"method": "sgd"}, {"dtype": "fp8"}, {"preset": "huge"}, {"steps": 0}])
def test_wrong_settings_are_refused(lm: ModuleType, changes: dict[str, Any]) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        lm.Settings(**changes)


# ---- the comparison --------------------------------------------------------------------------------------


def test_controls_cost_what_the_correction_costs(lm: ModuleType, benchmark: ModuleType) -> None:
    """Counted on the settings of the comparison, without training."""
    common = benchmark.COMMON
    inner = common.steps - common.burn_in
    corrected = common.burn_in + 2 * inner + math.ceil(inner / common.every) * common.mega
    for name, configuration in benchmark.CONFIGURATIONS.items():
        settings = configuration.settings(common, configuration.rates[0], 0)
        if settings.method not in lm.CORRECTED and name not in ("AdamW", "IVON"):
            factor = 1 if settings.later_batch is None else settings.later_batch / settings.batch
            assert settings.burn_in + (settings.steps - settings.burn_in) * factor == corrected, name
        assert len(configuration.rates) >= 4 and list(configuration.rates) == sorted(configuration.rates)


def test_the_comparison_runs_and_reports(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands in this process, on a few configurations and tiny runs; nothing is repeated."""
    names = ("IVON", "IVON, 3× batch", "IVON-PoCo")
    few = {name: benchmark.replace(benchmark.CONFIGURATIONS[name], rates=(0.1, 0.2)) for name in names}
    monkeypatch.setattr(benchmark, "CONFIGURATIONS", few)
    monkeypatch.setattr(benchmark, "PAIRS", (("IVON-PoCo", "IVON, 3× batch", "evaluations"),))
    monkeypatch.setattr(benchmark, "SEEDS", (0,))
    monkeypatch.setattr(benchmark, "WIDENED", 1)
    monkeypatch.setattr(benchmark, "MEASURED", 3)
    monkeypatch.setattr(benchmark, "AFTER", 2)
    monkeypatch.setattr(benchmark, "NOISES", ("shared", "antithetic"))
    common = benchmark.replace(benchmark.COMMON, **{**SHORT, "steps": 6, "validate_every": 2})
    tuned = benchmark.tune(common, tmp_path / "runs", 1)
    rates = {row["name"]: row["lr"] for row in tuned["rows"]}
    assert all(row["losses"][f"{row['lr']:g}"] == min(row["losses"].values()) for row in tuned["rows"])
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    for row in tuned["rows"]:  # the best rate has a worse neighbour on both sides, or the grid was widened to its limit
        tried = sorted(map(float, row["losses"]))
        assert tried[0] < row["lr"] < tried[-1] or len(tried) == 2 + benchmark.WIDENED
    assert len(stamps) == sum(len(row["losses"]) for row in tuned["rows"])
    assert benchmark.tune(common, tmp_path / "runs", 1) == tuned
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    results = tmp_path / "results"
    benchmark.store("tune", tuned, results)
    benchmark.store("compare", benchmark.compare(common, rates, tmp_path / "runs", 1), results)
    benchmark.store("variance", benchmark.variance(common, rates, tmp_path / "runs", 1), results)
    for row in benchmark.stored("variance", results)["rows"]:
        # At θ_in = θ_out with one noise for both, a corrected estimate is (1 − α) of the plain one and a constant.
        assert row["ratios"][0][0] == pytest.approx((1 - common.alpha) ** 2, rel=1e-2), row
    page, picture = tmp_path / "RESULTS.md", tmp_path / "picture.png"
    page.write_text("# Results\n")
    benchmark.report(results, page, picture)
    text = page.read_text()
    for name, (experiment, table, _) in benchmark.TABLES.items():
        content = table(benchmark.stored(experiment, results))
        assert f"<!-- table {name} -->\n\n{content}\n<!-- end -->" in text
    assert "IVON-PoCo | IVON, 3× batch | evaluations |" in text and picture.stat().st_size > 1000
    benchmark.report(results, page, picture)
    assert page.read_text() == text


def test_results_are_those_of_the_stored_runs(benchmark: ModuleType) -> None:
    if not benchmark.RESULTS.is_dir():
        pytest.skip("the comparison has not been run yet")
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    for name, (experiment, table, _) in benchmark.TABLES.items():
        content = benchmark.stored(experiment, benchmark.RESULTS)
        assert f"<!-- table {name} -->\n\n{table(content)}\n<!-- end -->" in text, name
    tuned = {row["name"]: row["lr"] for row in benchmark.stored("tune", benchmark.RESULTS)["rows"]}
    compared = benchmark.stored("compare", benchmark.RESULTS)
    assert {row["name"]: row["lr"] for row in compared["rows"]} == tuned
    assert set(tuned) == set(benchmark.CONFIGURATIONS)
    assert all(len(row["curves"]) == len(benchmark.SEEDS) for row in compared["rows"])
