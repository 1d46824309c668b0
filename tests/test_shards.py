"""Parameters that are spread over processes (`fully_shard`, DTensor) are trained as in one process, or refused."""

import pathlib
import pickle
import subprocess
import sys
from typing import Any

import pytest
import shard_cases as cases
import torch
from torch import Tensor

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.xdist_group("processes")


def run(size: int, folder: pathlib.Path) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "shard_cases.py"), str(size), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: pathlib.Path) -> list[dict[str, Any]]:
    return run(2, folder)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(4, tmp_path_factory.mktemp("four"))


def alone(name: str, dtype: torch.dtype = torch.float64) -> tuple[list[float], Tensor, dict[str, float]]:
    """What one process does with all rows."""
    model = cases.make_model(dtype)
    optimizer = cases.OPTIMIZERS[name](model)
    losses = cases.train(optimizer, model, [slice(0, cases.cases.ROWS)], dtype)
    return losses, cases.weights_of(model), optimizer.diagnostics()


@pytest.mark.parametrize(
    ("name", "size"), [*((name, "two") for name in cases.OPTIMIZERS), *((name, "four") for name in cases.FOUR)]
)
def test_processes_take_the_steps_of_one(name: str, size: str, request: pytest.FixtureRequest) -> None:
    losses, weights, numbers = alone(name)
    for own_losses, own_weights, own_numbers in (own[f"trained {name}"] for own in request.getfixturevalue(size)):
        torch.testing.assert_close(own_weights, weights, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=1e-6, atol=1e-6)
        assert own_numbers.keys() == numbers.keys()
        for key in numbers.keys() - {"compile_seconds"}:
            assert own_numbers[key] == pytest.approx(numbers[key], rel=1e-9), key
