"""Parameters that are spread over processes (`fully_shard`, DTensor) are trained as in one process, or refused."""

import pathlib
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import restarted
import shard_cases as cases
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import expfam_poco as poco
from expfam_poco.closures import shards

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.xdist_group("processes")


def run(size: int, folder: pathlib.Path, *only: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "shard_cases.py"), str(size), str(folder), *only]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [pickle.loads((folder / f"{size} {rank}").read_bytes()) for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("spread")


@pytest.fixture(scope="module")
def four(folder: pathlib.Path) -> list[dict[str, Any]]:
    return run(4, folder)


@pytest.fixture(scope="module")
def two(folder: pathlib.Path, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """After the four, whose checkpoints they resume from, where there are such tests: two cores are slow with four."""
    if any(item.path == request.path and item.get_closest_marker("slow") for item in request.session.items):
        request.getfixturevalue("four")
    return run(2, folder)


def alone(name: str, dtype: torch.dtype = torch.float64) -> tuple[list[float], Tensor, dict[str, float]]:
    """What one process does with all rows."""
    model = cases.make_model(dtype)
    optimizer = {**cases.OPTIMIZERS, **cases.COMPILED}[name](model)
    steps = cases.LONGER.get(name, cases.STEPS)
    losses = cases.train(optimizer, model, [slice(0, cases.cases.ROWS)], dtype, steps)
    return losses, cases.weights_of(model), optimizer.diagnostics()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, "two") for name in cases.OPTIMIZERS),
        *(pytest.param(name, "four", marks=pytest.mark.slow) for name in cases.FOUR),
    ],
)
def test_processes_take_the_steps_of_one(name: str, size: str, request: pytest.FixtureRequest) -> None:
    losses, weights, numbers = alone(name)
    for own_losses, own_weights, own_numbers in (own[f"trained {name}"] for own in request.getfixturevalue(size)):
        torch.testing.assert_close(own_weights, weights, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=1e-6, atol=1e-6)
        assert own_numbers.keys() == numbers.keys()
        for key in numbers.keys() - {"compile_seconds"}:
            assert own_numbers[key] == pytest.approx(numbers[key], rel=1e-9), key


def test_processes_take_the_steps_of_one_in_float32(two: list[dict[str, Any]]) -> None:
    _, weights, _ = alone("IVONPoCoMo", torch.float32)
    torch.testing.assert_close(two[0]["trained float32"][1], weights, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_parts_of_which_there_are_copies_take_the_steps_of_one(four: list[dict[str, Any]]) -> None:
    """Two by two: sums over processes count every weight once."""
    _, weights, numbers = alone("IVONPoCoMo")
    for own in four:
        torch.testing.assert_close(own["trained in copies"][1], weights, rtol=1e-12, atol=1e-12)
        for key in numbers.keys() - {"compile_seconds"}:
            assert own["trained in copies"][2][key] == pytest.approx(numbers[key], rel=1e-9), key


@pytest.mark.slow
def test_compiled_kernels_find_the_noise_of_parts(tmp_path: pathlib.Path) -> None:
    for name in cases.COMPILED:
        _, weights, _ = alone(name)
        for own in run(2, tmp_path, name):
            torch.testing.assert_close(own[f"trained {name}"][1], weights, rtol=1e-12, atol=1e-12)
        (tmp_path / "meeting of 2").unlink(missing_ok=True)


def test_no_gathered_copy_outlives_its_weights(two: list[dict[str, Any]]) -> None:
    """What is evaluated without a backward pass leaves gathered weights behind, which the next draw must not meet."""
    found, elbo, weights = cases.predicted(0, 1)
    assert torch.equal(found[-1], found[-2])  # back at the posterior that was stored
    for own, own_elbo, own_weights in (own["predicted"] for own in two):
        torch.testing.assert_close(own, found, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(own_weights, weights, rtol=1e-12, atol=1e-12)
        assert own_elbo == pytest.approx(elbo, rel=1e-10)


@pytest.mark.parametrize("case", ["several", "rows_by_hand"])
def test_what_is_spread_and_what_is_whole_are_stepped_together(case: str, two: list[dict[str, Any]]) -> None:
    expected = getattr(cases, case)(0, 1)
    for own in two:
        torch.testing.assert_close(own[case], expected, rtol=1e-12, atol=1e-12)


SAYS = {
    "no batch": "disagree about the number of closures",
    "chunks": "disagree about the number of closures",
    "micro-batches": "all count alike",
    "weights": "all count alike",
    "seed": "disagree about the seed",
    "nan": "NonFiniteError",
    "nan of a refresh": "NonFiniteError",
    "far": "NonFiniteError",
    "own noise": "noise_per_rank=True: '0.weight' is spread over processes",
    "measure_variance": "parameters are spread over processes",
}


@pytest.mark.parametrize("what", SAYS)
def test_processes_at_odds_say_so_everywhere_and_change_nothing(what: str, two: list[dict[str, Any]]) -> None:
    for own in two:
        message, same = own["refused"][what]
        assert same and SAYS[what] in message, message


def test_all_processes_skip_the_step_that_one_cannot_take(two: list[dict[str, Any]]) -> None:
    (first, weights), (second, others) = (own["refused"]["skipped"] for own in two)
    assert first == second == 1 and torch.equal(weights, others)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", cases.SAVED)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_of_four_and_two_processes_resume_two_and_one(
    name: str, size: int, two: list[dict[str, Any]], folder: pathlib.Path
) -> None:
    """In the middle of an inner loop; as many processes as before go on bit for bit."""
    straight = two[0]["saved"][name]
    for own in two:
        torch.testing.assert_close(own["resumed"][name, size], straight, rtol=1e-12, atol=1e-12)
        assert size == 4 or torch.equal(own["resumed"][name, size], straight)
    path, every = folder / f"saved by {size} {name}", slice(0, cases.cases.ROWS)
    weights, _ = cases.train_from(path, name, cases.make_model(), every, range(3, cases.STEPS))
    torch.testing.assert_close(weights, straight, rtol=1e-12, atol=1e-12)


def test_a_process_that_leaves_its_closure_is_named_to_the_others(two: list[dict[str, Any]]) -> None:
    assert two[1]["left"] == "ValueError: a broken batch"
    assert "another one did not answer" in two[0]["left"]


# ---- what is refused needs one process ---------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
    shards.made.clear()  # other tests count calls, as where there never was a shard


REFUSED: dict[str, tuple[Callable[[torch.nn.Parameter], Any], str]] = {
    "joint": (lambda p: poco.VON([("w", p)], lr=0.1, ess=8.0), "is joint over all weights"),
    "matrix": (
        lambda p: poco.PosteriorCorrected([("w", p)], "kronecker_gaussian", 0.1, 8.0), "is of all of 'w'"
    ),
    "hessian": (
        lambda p: poco.IVON([("w", p)], lr=0.1, ess=8.0, curvature="hutchinson"), "needs second derivatives"
    ),
    "VSGD": (lambda p: poco.VSGD([p], 0.1), "which VSGD cannot step"),
    "graphs": (
        lambda p: poco.IVON([("w", p)], lr=0.1, ess=8.0).captured(lambda x: p.full_tensor().sum(), torch.ones(1)),
        "captured: its graphs know of no other processes",
    ),
    "anchor": (
        lambda p: poco.IVONPoCo([("w", p)], lr=0.1, ess=8.0, anchor="products").step(lambda: p.full_tensor().sum()),
        "anchor='products'",
    ),
    "batched": (
        lambda p: poco.IVON([("w", p)], lr=0.1, ess=8.0).step(
            poco.BatchedDraws(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, torch.ones(1, 1), torch.ones(1, 1))
        ),
        "is for one process",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_whole_parameters_is_refused_by_name(what: str, mesh: Any) -> None:
    attempt, message = REFUSED[what]
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=message):
        attempt(p)
    assert torch.equal(p.full_tensor(), torch.ones(4, 3))


def test_columns_are_refused(mesh: Any) -> None:
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match="only whole rows can be"):
        poco.IVON([("w", p)], lr=0.1, ess=8.0)


def test_states_that_leave_the_optimizer_are_dtensors(mesh: Any, tmp_path: pathlib.Path) -> None:
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    optimizer = poco.IVON([("w", p)], lr=0.1, ess=8.0)
    optimizer.step(lambda: p.full_tensor().square().sum())
    state = optimizer.posterior_states()["w"]
    assert all(value.placements == (Shard(0),) for value in state)
    record = optimizer.state_dict()["state"][0]
    assert record["posterior"]["mean"].shape == record["momentum"]["gradient"].shape == (4, 3)
    assert record["ages"].placements == (Shard(0),)
    with pytest.raises(TypeError, match="is a DTensor, of which this process has a part"):
        poco.save(tmp_path / "run", optimizer=optimizer)
    whole = type(state)(*(value.full_tensor() for value in state))
    other = poco.IVON([("w", p)], lr=0.1, ess=8.0, prior={"w": state})
    other.set_posterior({"w": whole})  # of all rows, which are cut
    assert torch.equal(other.posterior_states()["w"].mean.full_tensor(), whole.mean)


# ---- processes that die -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_torchrun_restarts_from_the_last_checkpoint(wrapper: str, tmp_path: pathlib.Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=4"]
    command = [*torchrun, str(HERE / "restarted.py"), str(tmp_path), wrapper, "1:7", "0:16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("killed *"))) == 2
    model = cases.make_model()
    restarted.train(model, slice(0, cases.cases.ROWS), 0)
    torch.testing.assert_close(torch.load(tmp_path / "weights"), cases.weights_of(model), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_the_benchmark_counts_what_is_sent() -> None:
    script = HERE.parent / "benchmarks" / "distributed.py"
    command = [sys.executable, str(script), "--steps=1", "--width=64", "--sizes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    sent = re.findall(r"^(\w+) .* (\S+) +[\d.]+ ms .* ([\d.]+) bytes", done.stdout, re.M)
    found = {(wrapper, method): float(size) for wrapper, method, size in sent}
    assert found["ddp", "IVON-PoCoMo"] < 8.1 and found["fsdp", "IVON-PoCoMo"] < 2 * found["fsdp", "AdamW"] + 0.1
