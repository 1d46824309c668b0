"""The papers' recipes as far as one step, on random tensors of the true shapes.

Too large for the tests, and therefore narrow: all networks, at their true depth but Transformers; all vocabularies.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expfam_poco.errors import InputError
from expfam_poco.reproduce import loaders
from expfam_poco.reproduce.data import Source
from expfam_poco.reproduce.figures import FIGURES
from expfam_poco.reproduce.job import one_step
from expfam_poco.reproduce.problems import Images, Text
from expfam_poco.reproduce.recipe import Recipe
from expfam_poco.reproduce.training import Training

RANDOM = Source(random=True)
NARROW: dict[str, dict[str, Any]] = {
    "resnet50": {"width": 4},
    "vgg": {"channels": (8, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0)},
    "conv-mixer": {"width": 8},
    "resnext": {"width": 2},
}


def narrow(recipe: Recipe) -> Recipe:
    """Two examples a batch, a narrow network, and no compiler."""
    problem: Any = recipe.problem
    if isinstance(problem, Text):
        problem = replace(problem, windows=1, changes={**problem.changes, "width": 24, "heads": 2, "layers": 2})
    elif isinstance(problem, Images) and problem.network in NARROW:
        problem = replace(problem, changes=NARROW[problem.network])
    eager = {"backend": "eager"} if recipe.method.startswith("ivon") else {}
    options = {**recipe.options, **eager}
    return replace(recipe, problem=problem, batch=2, accumulate=min(recipe.accumulate, 2), every=10, options=options)


def distinct() -> list[Any]:
    """One curve for each problem of each figure: the one with a correction, where there is one."""
    found: dict[str, Any] = {}
    for name, figure in FIGURES.items():
        for curve in one_step(figure.paper).curves:
            key = f"{name}: {curve.recipe.problem}"
            if key not in found or (curve.recipe.corrected and not found[key].recipe.corrected):
                found[key] = curve
    return [
        pytest.param(curve, id=key[:60], marks=pytest.mark.slow if key.startswith("fig5") else ())  # as fig4's, wider
        for key, curve in found.items()
        if "Convex" not in key
    ]


@pytest.mark.parametrize("curve", distinct())
def test_one_step_on_the_true_shapes(curve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "VOCABULARY", 500)
    monkeypatch.setattr(loaders.Gpt2Tokens, "vocabulary", 500)
    training = Training(narrow(curve.recipe), 0, "report", RANDOM, tmp_path)
    before = training.problem.model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    assert training.run() == ""
    after = training.problem.model.state_dict()
    assert training.step == 1 and any((value != after[name]).any() for name, value in before.items())
    mega = curve.recipe.mega or training.problem.size / 2  # mini-batches of two
    assert training.evaluations == (1 if not curve.recipe.corrected else 2 + mega)


def test_shapes_are_those_of_the_data_sets() -> None:
    assert loaders.pictures("cifar10", RANDOM).train.get(loaders.torch.arange(2), None)[0].shape == (2, 3, 32, 32)
    assert loaders.pictures("imagenet", RANDOM).train.get(loaders.torch.arange(2), None)[0].shape == (2, 3, 224, 224)
    assert loaders.tokens("openwebtext", 1024, RANDOM).tokenizer.vocabulary == 50_257


def test_what_is_missing_is_said_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--data FOLDER where openwebtext is"):
        loaders.tokens("openwebtext", 1024, Source())
    monkeypatch.setitem(loaders.importlib.import_module("sys").modules, "torchvision", None)
    with pytest.raises(InputError, match=r"cifar10 needs the package torchvision, .*pip install torchvision"):
        loaders.pictures("cifar10", Source(tmp_path))
    with pytest.raises(InputError, match="data='mnist': choose from cifar10"):
        loaders.pictures("mnist", Source(tmp_path))
    monkeypatch.setitem(loaders.importlib.import_module("sys").modules, "datasets", None)
    with pytest.raises(InputError, match="openwebtext needs the package datasets"):
        loaders.tokens("openwebtext", 1024, Source(tmp_path))
    train, held_out = (tmp_path / f"openwebtext-{part}.int32" for part in ("train", "held-out"))
    for path in (train, held_out):
        loaders._write(iter([[1, 2, 50_256], [3]]), path)
    corpus = loaders.tokens("openwebtext", 2, Source(tmp_path))
    assert corpus.train.tolist() == [1, 2, 50_256, 3] and corpus.batch(2, 1, seed=0, stream=0, index=0).shape == (1, 3)
