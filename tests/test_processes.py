"""Several processes train the model that one process would, or say on every process why they do not."""

import pathlib
import pickle
import subprocess
import sys
from typing import Any

import process_cases as cases
import pytest
import torch
from torch import Tensor

import expfam_poco as poco

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.xdist_group("processes")


def run(size: int, folder: pathlib.Path) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "process_cases.py"), str(size), str(folder)]
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


def alone(name: str, size: int, dtype: torch.dtype = torch.float64) -> tuple[list[float], Tensor]:
    """What one process does with all rows, in mega-batches of as many chunks."""
    model = cases.make_model(dtype)
    parts = [cases.rows_of(rank, size) for rank in range(size)]
    return cases.train(cases.OPTIMIZERS[name](model), model, parts, dtype), cases.weights_of(model)


@pytest.mark.parametrize(
    ("name", "size"), [*((name, "two") for name in cases.OPTIMIZERS), *((name, "four") for name in cases.FOUR)]
)
def test_processes_take_the_steps_of_one(name: str, size: str, request: pytest.FixtureRequest) -> None:
    found = [own[f"trained {name}"] for own in request.getfixturevalue(size)]
    losses, weights = alone(name, len(found))
    for own_losses, own_weights in found:
        assert torch.equal(own_weights, found[0][1])
        torch.testing.assert_close(own_weights, weights, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=1e-6, atol=1e-6)


def test_processes_take_the_steps_of_one_in_float32(two: list[dict[str, Any]]) -> None:
    _, weights = alone("IVONPoCoMo", 2, torch.float32)
    torch.testing.assert_close(two[0]["trained float32"][1], weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", ["backward", "accelerated", "by_lightning"])
def test_other_loops_take_the_steps_of_one(how: str, two: list[dict[str, Any]]) -> None:
    model, (x, y) = cases.make_model(), cases.make_data()
    optimizer = cases.OPTIMIZERS["IVON"](model)
    for i in range(cases.STEPS):
        optimizer.step(lambda i=i: torch.nn.functional.mse_loss(model(x[i]), y[i]))
    for own in two:
        weights = own[how][1] if how == "backward" else own[how]
        torch.testing.assert_close(weights, cases.weights_of(model), rtol=1e-12, atol=1e-12)


def test_hugging_face_s_trainer_trains_one_model(two: list[dict[str, Any]]) -> None:
    (weights, refreshes, drawn), (others, _, _) = (own["by_trainer"] for own in two)
    assert torch.equal(weights, others) and refreshes == 2 and drawn == [8, 8]


def test_draws_of_each_process_are_averaged(two: list[dict[str, Any]]) -> None:
    """The same rows everywhere: two processes with a draw each are one with two draws."""
    (losses, weights, seed), (other_losses, other_weights, other_seed) = (own["own_noise"] for own in two)
    assert torch.equal(weights, other_weights) and losses == other_losses and seed == other_seed
    model, (x, y) = cases.make_model(), cases.make_data()
    optimizer = poco.IVONPoCoMo(model.named_parameters(), lr=0.1, ess=64.0, alpha=0.7, seed=seed)

    def closure(i: int) -> Any:
        return lambda: torch.nn.functional.mse_loss(model(x[i]), y[i])

    for i in range(cases.STEPS):
        if i in cases.REFRESHES:  # one process after the other
            optimizer.refresh([closure(j) for _ in range(2) for j in cases.REFRESHES[i]])
        optimizer.step([closure(i), closure(i)], fresh_noise=True)
    torch.testing.assert_close(weights, cases.weights_of(model), rtol=1e-12, atol=1e-12)


def test_a_seed_that_was_not_given_is_the_first_process_s(two: list[dict[str, Any]]) -> None:
    (seed, weights), (other, others) = (own["seeds_differ_by_default"] for own in two)
    assert seed == other and torch.equal(weights, others)


def test_parts_count_by_their_examples_and_one_may_be_missing(two: list[dict[str, Any]]) -> None:
    model, (x, y) = cases.make_model(), cases.make_data()
    optimizer = cases.OPTIMIZERS["IVON"](model)
    for i in range(2):
        optimizer.step(lambda i=i: torch.nn.functional.mse_loss(model(x[i]), y[i]))
    for own in two:
        torch.testing.assert_close(own["weighted_and_absent"], cases.weights_of(model), rtol=1e-12, atol=1e-12)


def test_a_parameter_that_one_process_uses_is_stepped_on_all(two: list[dict[str, Any]]) -> None:
    (first, second, kept), other = (own["unused"] for own in two)
    assert kept and other[2] and torch.equal(first, other[0]) and torch.equal(second, other[1])


def test_an_empty_list_of_closures_is_refused_where_one_is_alone() -> None:
    optimizer = cases.OPTIMIZERS["IVON"](cases.make_model())
    with pytest.raises(
        ValueError, match="give a list of functions, at least one; an empty list is for one of several processes"
    ):
        optimizer.step([])


SAYS = {
    "model": "disagree about the model",
    "dtype": "disagree about the model",
    "family": "disagree about families and hyperparameters",
    "seed": "disagree about the seed",
    "refresh": "disagree about what comes next, a step or a refresh",
    "closure": "it failed on 1 of 2 processes, not on this one",
    "closure of a refresh": "it failed on 1 of 2 processes, not on this one",
    "nan": "its loss is nan",
}


@pytest.mark.parametrize("what", cases.REFUSED)
def test_processes_at_odds_say_so_everywhere_and_change_nothing(what: str, two: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(two):
        message, same = own[f"refused {what}"]
        own_error = what.startswith("closure") and rank == 1
        assert same and ("a broken batch" if own_error else SAYS[what]) in message, message


def test_processes_that_nothing_tells_of_each_other_are_warned_of_once(two: list[dict[str, Any]]) -> None:
    for own in two:
        (message,) = own["unannounced"]
        assert "2 of them" in message and "process_group=torch.distributed.group.WORLD" in message


def test_running_statistics_are_as_under_ddp(two: list[dict[str, Any]]) -> None:
    (weights, count), (others, _) = (own["batchnorm"] for own in two)
    assert torch.equal(weights, others) and count == 4  # one for each step, none for refreshes, one call afterwards


def test_a_checkpoint_of_one_process_resumes_all(two: list[dict[str, Any]]) -> None:
    for own in two:
        straight, interrupted = own["copied_and_resumed"]
        assert torch.equal(straight, interrupted)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_a_distributed_checkpoint_of_two_processes_resumes_two_and_one(
    name: str, two: list[dict[str, Any]], folder: pathlib.Path
) -> None:
    """In the middle of an inner loop, flattened or not, saved in the background or not."""
    for own in two:
        straight, resumed, flat = own["distributed_checkpoints"][name]
        assert torch.equal(straight, resumed)
    parts, steps = [cases.rows_of(rank, 2) for rank in range(2)], range(3, cases.STEPS)
    weights, _, _ = cases.train_from(folder / f"saved {name}", name, cases.make_model(), parts, flat, steps)
    torch.testing.assert_close(weights, straight, rtol=1e-12, atol=1e-12)


def test_a_process_that_stops_is_named_to_the_others(two: list[dict[str, Any]]) -> None:
    assert two[1]["stopped"] == ["nothing"]
    assert "another one did not answer" in two[0]["stopped"][1] and "takes fewer steps" in two[0]["stopped"][1]
