"""The tasks of `expfam-poco compare`: the minimum against independent solvers, the gap, the user's CSV."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from expfam_poco.compare.table import read_table
from expfam_poco.compare.tasks import BUILT_IN, Task, load_csv, load_task
from expfam_poco.errors import InputError

SHAPES = {"breast-cancer": (569, (31,)), "digits": (1797, (65, 10)), "wine": (178, (14, 3))}


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: load_task(name) for name in BUILT_IN}


def full_loss(task: Task, weight: torch.Tensor) -> torch.Tensor:
    return task.loss(weight, torch.arange(task.size)) + 0.5 * task.delta * weight.square().sum()


@pytest.mark.parametrize("name", BUILT_IN)
def test_features_are_standardised_with_an_intercept(tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]
    assert (task.size, task.shape) == SHAPES[name]
    assert task.features.dtype == np.float64
    assert (task.features[:, -1] == 1.0).all()
    if name == "digits":
        assert task.features.min() == 0.0 and task.features.max() == 1.0
    else:
        np.testing.assert_allclose(task.features[:, :-1].mean(axis=0), 0.0, atol=1e-12)
        np.testing.assert_allclose(task.features[:, :-1].std(axis=0), 1.0, rtol=1e-12)


@pytest.mark.parametrize("name", BUILT_IN)
def test_minimum_has_no_gradient_by_autograd(tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]
    weight = torch.from_numpy(task.minimum.weight).clone().requires_grad_()
    loss = full_loss(task, weight)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-15
    assert task.minimum.gradient < 1e-16
    assert math.isclose(loss.item(), task.minimum.loss, rel_tol=1e-14)


def test_minimum_agrees_with_lbfgs_of_scipy(tasks: dict[str, Task]) -> None:
    task = tasks["wine"]

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight = torch.from_numpy(flat).reshape(task.shape).requires_grad_()
        loss = full_loss(task, weight)
        loss.backward()
        assert weight.grad is not None
        return loss.item(), weight.grad.numpy().ravel()

    options = {"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-10}
    found = minimize(value, np.zeros(task.weights), jac=True, method="L-BFGS-B", options=options)
    assert abs(found.fun - task.minimum.loss) < 1e-13
    np.testing.assert_allclose(found.x, task.minimum.weight.ravel(), atol=1e-6)


def test_minimum_agrees_with_logistic_regression_of_scikit_learn(tasks: dict[str, Task]) -> None:
    from sklearn.linear_model import LogisticRegression

    task = tasks["breast-cancer"]
    solver = LogisticRegression(C=1.0 / (task.size * task.delta), fit_intercept=False, tol=1e-12, max_iter=1000)
    solver.fit(task.features, task.labels)
    np.testing.assert_allclose(solver.coef_[0], task.minimum.weight, atol=1e-6)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0, 100.0])
def test_gap_is_the_difference_of_losses(tasks: dict[str, Task], name: str, scale: float) -> None:
    task = tasks[name]
    weight = task.minimum.weight + scale * np.random.default_rng(1).standard_normal(task.shape)
    difference = full_loss(task, torch.from_numpy(weight)).item() - task.minimum.loss
    assert math.isclose(task.gap(weight), difference, rel_tol=1e-9, abs_tol=3e-16)


def test_gap_resolves_what_losses_cannot(tasks: dict[str, Task]) -> None:
    task = tasks["breast-cancer"]
    direction = np.random.default_rng(2).standard_normal(task.shape)
    far, near = (task.gap(task.minimum.weight + size * direction) for size in (1e-5, 1e-10))
    assert math.isclose(near, far * 1e-10, rel_tol=1e-3)
    assert near < 1e-17
    assert task.gap(task.minimum.weight) == 0.0
    assert task.gap(np.full(task.shape, math.nan)) == math.inf
    assert task.gap(np.full(task.shape, math.inf)) == math.inf


def test_loss_is_accurate_far_out() -> None:
    task = load_task("breast-cancer")
    weight = torch.full(task.shape, 3.0, dtype=torch.float64)
    logits = task.features @ weight.numpy()
    signs = 2.0 * task.labels - 1.0
    expected = np.logaddexp(0.0, -signs * logits).mean()
    assert abs(logits).max() > 40.0
    assert math.isclose(task.loss(weight, torch.arange(task.size)).item(), expected, rel_tol=1e-14)


def test_a_task_travels_with_its_minimum_but_without_tensors(tasks: dict[str, Task]) -> None:
    task = tasks["wine"]
    task.gap(np.zeros(task.shape))
    full_loss(task, torch.zeros(task.shape, dtype=torch.float64))
    content = task.__getstate__()
    assert "minimum" in content and not any(isinstance(value, torch.Tensor) for value in content.values())
    again = pickle.loads(pickle.dumps(task))
    assert again.gap(np.ones(task.shape)) == task.gap(np.ones(task.shape))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_any_labels(tmp_path: Path, delimiter: str) -> None:
    rows = ["height,label,width,always", "1.5,no,2,7", "2.5,yes,3e1,7", "", "-1,no,0,7"]
    path = write(tmp_path / "own.csv", "\ufeff" + "\r\n".join(rows).replace(",", delimiter) + "\r\n")
    table = read_table(path, "label")
    np.testing.assert_array_equal(table.features, [[1.5, 2.0], [2.5, 30.0], [-1.0, 0.0]])
    np.testing.assert_array_equal(table.labels, [0, 1, 0])
    assert table.classes == ("no", "yes")
    assert table.constant == ("always",)


def test_csv_classes_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv", 'x,"y"\n1,10\n2,9\n"3",2\n')
    assert read_table(path, "y").classes == ("2", "9", "10")


def test_csv_gives_the_same_minimum_as_the_built_in_task(tmp_path: Path, tasks: dict[str, Task]) -> None:
    from sklearn.datasets import load_wine

    data = load_wine()
    lines = [",".join([*(f"x{i}" for i in range(13)), "kind"])]
    lines += [",".join([*map(repr, row.tolist()), str(kind)]) for row, kind in zip(data.data, data.target, strict=True)]
    task = load_csv(write(tmp_path / "wine.csv", "\n".join(lines)), "kind", 1e-2)
    assert task.minimum.loss == pytest.approx(tasks["wine"].minimum.loss, rel=1e-14)


WRONG_FILES = {
    "empty": ("", "y", "no rows below a header"),
    "header only": ("x,y\n", "y", "no rows below a header"),
    "no such column": ("x,y\n1,a\n2,b\n", "z", "no such column; its columns are x, y"),
    "nan": ("x,y\n1,a\nnan,b\n", "y", "line 3, column 'x': 'nan' is not a finite number"),
    "infinite": ("x,y\n1,a\n-inf,b\n", "y", "line 3, column 'x': '-inf' is not a finite number"),
    "empty cell": ("x,y\n1,a\n,b\n", "y", "line 3, column 'x': the cell is empty"),
    "text": ("x,y\n1,a\nred,b\n", "y", "line 3, column 'x': 'red' is not a number"),
    "missing label": ("x,y\n1,a\n2,\n", "y", "line 3, column 'y': the label is missing"),
    "nan label": ("x,y\n1,a\n2,NaN\n", "y", "line 3, column 'y': the label is missing"),
    **{
        f"label {text}": (f"x,y\n1,a\n2,{text}\n", "y", f"the label is missing ({text!r}); fill it in")
        for text in ("NA", "n/a", "#N/A", "<NA>", "None", "NULL", "-nan", "?")
    },
    "one class": ("x,y\n1,a\n2,a\n", "y", "at least two classes"),
    "too many classes": ("x,y\n" + "".join(f"{i},{i}.5\n" for i in range(60)), "y", "60 different values"),
    "short row": ("x,y\n1,a\n2\n", "y", "line 3: 1 cells where the header has 2"),
    "column twice": ("x,x,y\n1,1,a\n2,2,b\n", "y", "'x' appears twice"),
    "column without name": ("x,,y\n1,1,a\n2,2,b\n", "y", "column 2 has no name"),
    "target only": ("y\na\nb\n", "y", "its only column"),
    "constant features": ("x,y\n1,a\n1,b\n", "y", "every feature column is constant"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_csv_is_one_sentence(tmp_path: Path, case: str) -> None:
    text, target, expected = WRONG_FILES[case]
    path = write(tmp_path / "own.csv", text)
    with pytest.raises(InputError) as caught:
        load_csv(path, target)
    sentence = str(caught.value)
    assert expected in sentence and sentence.endswith(".") and "\n" not in sentence


def test_many_columns_are_checked_in_linear_time(tmp_path: Path) -> None:
    names = [f"x{i}" for i in range(60_000)]
    header = ",".join([*names, "x7"])  # by counting each name anew, half a minute
    with pytest.raises(InputError, match="'x7' appears twice"):
        load_csv(write(tmp_path / "wide.csv", f"{header}\n1,2\n"), "y")


def test_unreadable_csv(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        load_csv(tmp_path / "none.csv", "y")
    with pytest.raises(InputError, match="this is a folder"):
        load_csv(tmp_path, "y")
    (tmp_path / "latin.csv").write_bytes("größe,y\n1,a\n2,b\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_csv(tmp_path / "latin.csv", "y")


@pytest.mark.parametrize("delta", [0.0, -1.0, math.nan, math.inf])
def test_delta_must_be_positive(delta: float) -> None:
    with pytest.raises(InputError, match="--delta"):
        load_task("wine", delta)


def test_unknown_task() -> None:
    with pytest.raises(InputError, match="choose one of breast-cancer, digits, wine"):
        load_task("iris")
