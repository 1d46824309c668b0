"""Checkpoint files: what comes back, that a failed save harms no file, and that a failed load changes nothing."""

import copy
import errno
import os
import resource
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import OPTIMIZERS, Task, equal, flat, network, run, same, weights
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.tools import saving


class Run:
    """A model with dropout and buffers, its optimizer and scheduler, trained a little."""

    def __init__(self, name: str = "IVONPoCoMo", steps: int = 0, *, hidden: int = 4, **choices: Any) -> None:
        base = network(dropout=0.3)
        layers = [nn.Linear(3, hidden), nn.BatchNorm1d(hidden), base[1], base[2], nn.Linear(hidden, 1)]
        self.model = nn.Sequential(*layers).double()
        self.optimizer = OPTIMIZERS[name](self.model.parameters(), **choices)
        self.scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.steps = 0
        self.train(steps)

    @property
    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def train(self, steps: int) -> list[Tensor]:
        """Losses and final weights."""
        losses = []
        for _ in range(steps):
            losses += run(self.optimizer, Task(self.model), 1, start=self.steps)
            self.scheduler.step()
            self.steps += 1
        return [*losses, *weights(self.model), *(b.clone() for b in self.model.buffers())]

    def everything(self) -> Any:
        """A copy of all that a load can change."""
        states = {name: target.state_dict() for name, target in self.objects.items()}
        return copy.deepcopy({**states, "random": torch.get_rng_state()})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.pt"


def tracks(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ---- coming back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [0, 9], ids=["fresh", "used"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_continues_bit_for_bit(name: str, used: int, file: Path) -> None:
    first = Run(name, 6)
    poco.save(file, **first.objects, epoch=3)
    expected = first.train(6)
    torch.manual_seed(77)
    second = Run(name, used)
    assert poco.load(file, **second.objects) == {"epoch": 3}
    if hasattr(second.optimizer, "posterior_states"):
        point = second.optimizer.param_groups[0]["family"].point
        points = flat(point(state) for state in second.optimizer.posterior_states().values())
        assert torch.equal(points, flat(second.model.parameters()))
    second.steps = 6
    assert equal(second.train(6), expected)


def test_plain_values_come_back_and_objects_not_asked_for_are_left_alone(file: Path) -> None:
    values = {
        "none": None, "flag": True, "number": 3, "loss": 0.1, "name": "α", "raw": b"\x00", "pair": (1, [2.0, {"a": 3}]),
        "tensor": torch.arange(6.0).reshape(2, 3), "names": {"x", "y"}, "dtype": torch.bfloat16,
    }  # fmt: skip
    first, second = Run(steps=3), Run()
    poco.save(str(file), **first.objects, **values)
    before = second.everything()
    found = poco.load(file, model=second.model)
    assert same(found, values) and found.keys() == values.keys()
    assert equal(weights(second.model), weights(first.model))
    assert same(before["scheduler"], second.scheduler.state_dict())
    assert set(torch.load(file, weights_only=True)["states"]) == {"model", "optimizer", "scheduler"}


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [2, 2, 4]),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.2, total_steps=40),
        lambda opt: torch.optim.lr_scheduler.SequentialLR(
            opt, [torch.optim.lr_scheduler.LinearLR(opt), torch.optim.lr_scheduler.StepLR(opt, 2)], [3]
        ),
    ],
    ids=["MultiStepLR", "OneCycleLR", "SequentialLR"],
)
def test_other_schedulers(make: Callable[[Any], Any], file: Path) -> None:
    runs = [Run(), Run()]
    for each in runs:
        each.optimizer = OPTIMIZERS["IVONPoCo"](each.model.parameters())
        each.scheduler = make(each.optimizer)
    runs[0].train(5)
    poco.save(file, **runs[0].objects)
    expected = runs[0].train(5)
    poco.load(file, **runs[1].objects)
    runs[1].steps = 5
    assert equal(runs[1].train(5), expected)


# ---- saving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "place"),
    [(np.float64(0.5), "loss is a numpy"), ({"a": [np.arange(2)]}, r"loss\['a'\]\[0\]"), (lambda: 0, "function"),
     (nn.Linear, "loss is a builtins.type"), (Path("x"), "pathlib"), ({Path("x"): 1}, "a key")],
)  # fmt: skip
def test_values_that_are_not_plain_are_refused(value: Any, place: str, file: Path) -> None:
    with pytest.raises(TypeError, match=f"loss: .*{place}"):
        poco.save(file, loss=value)
    assert tracks(file.parent) == []


def test_names_of_arguments_are_refused(file: Path) -> None:
    for name in ("path", "map_location"):
        with pytest.raises(TypeError, match=f"{name}=…: `load` has an argument"):
            poco.save(file, **{name: 1})
    with pytest.raises(TypeError, match="model=int"):
        poco.load(file, model=3)


def test_a_failed_save_leaves_the_old_file_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poco.save(file, step=1)
    old = file.read_bytes()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, name, interrupted)
            poco.save(file, step=2)
        assert file.read_bytes() == old and tracks(file.parent) == ["run.pt"]

    # A disk that is full in the middle of the file.
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match=r"cannot be written .*: make room or give another path"):
            poco.save(file, big=torch.ones(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == old and tracks(file.parent) == ["run.pt"]
    assert poco.load(file) == {"step": 1}


def test_stale_temporary_files_of_this_name_are_removed(file: Path) -> None:
    stale, foreign = ".run.pt.0123456789abcdef.tmp", ".run.pt.b.0123456789abcdef.tmp"
    for name in (stale, foreign):
        (file.parent / name).touch()
    poco.save(file, step=1)
    assert tracks(file.parent) == [foreign, "run.pt"]


def test_links_folders_and_rights(file: Path) -> None:
    link = file.with_name("latest.pt")
    link.symlink_to(file)
    poco.save(link, step=1)
    assert link.is_symlink() and poco.load(file) == {"step": 1}
    file.with_name("plain").touch()
    assert file.stat().st_mode == file.with_name("plain").stat().st_mode
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        poco.save(file.parent / "nowhere" / "run.pt", step=1)


@pytest.mark.parametrize("writer", ["save", "save_binary"])
def test_files_keep_their_mode_and_respect_the_umask(writer: str, file: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = poco.BayesBiNN(poco.binarize_groups(model), square_momentum=None, lr=0.1, ess=1.0)

    def write(path: Path) -> None:
        poco.save(path, step=1) if writer == "save" else poco.save_binary(path, model, optimizer)

    before = os.umask(0o027)
    try:
        write(file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
        for mode in (0o600, 0o666):
            file.chmod(mode)
            write(file)
            assert stat.S_IMODE(file.stat().st_mode) == mode
    finally:
        os.umask(before)
    fifo = file.with_name("fifo")
    os.mkfifo(fifo)
    for path, kind in ((fifo, "FIFO"), (file.parent, "folder"), (Path("/dev/null"), "device")):
        with pytest.raises(OSError, match=f"this is a {kind}, which is not replaced; give the path of a file"):
            write(path)
    assert stat.S_ISFIFO(fifo.stat().st_mode) and stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert tracks(file.parent) == ["fifo", "run.pt"]


def test_a_folder_that_cannot_be_flushed_is_borne(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", files_alone)
    poco.save(file, step=3)
    assert poco.load(file) == {"step": 3}


# ---- refusing ----------------------------------------------------------------------------------------------


def refused(path: Path, target: Run, message: str, **objects: Any) -> None:
    """One sentence, and nothing has changed; then the run goes on as if nothing had been tried."""
    before = target.everything()
    with pytest.raises(poco.CheckpointError, match=message) as caught:
        poco.load(path, **(objects or target.objects))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert same(before, target.everything())


def test_a_missing_file(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such checkpoint; save one first"):
        poco.load(file)


def test_whatever_does_not_fit_changes_nothing(file: Path) -> None:
    source = Run(steps=6)
    torch.manual_seed(4)
    twin = Run(steps=8)
    torch.manual_seed(4)
    target = Run(steps=8)
    poco.save(file, **source.objects, step=6)
    torch.manual_seed(5)
    refused(file, target, "'scaler' is missing", **target.objects, scaler=torch.amp.GradScaler("cpu"))
    refused(file, target, "'step' is a plain value", **target.objects, step=target.scheduler)
    poco.save(file, **{**source.objects, "model": Run(hidden=5).model})
    refused(file, target, "Sequential refuses the state of 'model'")  # after some of its tensors were copied
    poco.save(file, **{**source.objects, "optimizer": Run("SVRG", 2).optimizer})
    refused(file, target, r"IVONPoCoMo refuses the state of 'optimizer' \(state_dict")
    poco.save(file, **{**source.objects, "scheduler": torch.optim.lr_scheduler.StepLR(Run().optimizer, 3)})
    refused(file, target, "'scheduler' is not one of a CosineAnnealingLR")
    poco.save(file, **source.objects)
    content = torch.load(file, weights_only=True)
    sealed({**content, "random": {"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": []}}, file)
    refused(file, target, "random generators do not fit")
    torch.manual_seed(6)
    expected = twin.train(4)
    torch.manual_seed(6)
    assert equal(target.train(4), expected)


def test_two_optimizers_are_put_back_together(file: Path) -> None:
    """The first has taken its state when the second refuses."""
    source, target = Run(steps=6), Run(steps=3)
    other = OPTIMIZERS["AlphaSVRG-AdamW"](network().parameters())
    poco.save(file, **source.objects, second=OPTIMIZERS["AlphaSVRG-SGD"](nn.Linear(2, 2).parameters()))
    refused(file, target, "AlphaSVRG refuses the state of 'second'", **target.objects, second=other)


def sealed(content: Any, path: Path) -> None:
    """A file with a right checksum, whatever is in it."""
    torch.save(content, path)
    with open(path, "r+b") as file:
        seal = saving._seal(file, path.stat().st_size)
        file.write(seal)


def test_other_files_are_refused(file: Path) -> None:
    target = Run(steps=2)
    torch.save({"model": target.model.state_dict()}, file)
    refused(file, target, "damaged, or not a file of poco.save")
    for raw in (b"", b"text", b"PK\x03\x04" + bytes(100)):
        file.write_bytes(raw)
        refused(file, target, "damaged, or not a file of poco.save")
    for content in ({"model": target.model.state_dict()}, [1], {"expfam_poco.save": 99}):
        sealed(content, file)
        refused(file, target, "format .* where 1 is needed")
    sealed(target.model, file)  # would run code
    refused(file, target, "damaged, or not a file of poco.save .*UnpicklingError: Weights only load failed")


def test_truncated_files_are_refused(file: Path) -> None:
    target = Run(steps=3)
    poco.save(file, **target.objects)
    whole = file.read_bytes()
    for length in range(0, len(whole), len(whole) // 50):
        file.write_bytes(whole[:length])
        refused(file, target, "damaged")


def test_a_flipped_bit_is_refused(file: Path) -> None:
    poco.save(file, weights=torch.arange(40.0), name="x")
    whole, random = file.read_bytes(), torch.get_rng_state()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert not torch.equal(before, random)
    for place in (*range(0, len(whole), 13), *range(len(whole) - 100, len(whole))):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(poco.CheckpointError, match="checksum"):
            poco.load(file)
    assert torch.equal(torch.get_rng_state(), before)
    file.write_bytes(whole)
    assert poco.load(file)["name"] == "x" and torch.equal(torch.get_rng_state(), random)


@pytest.mark.cuda
def test_a_run_moves_between_devices(file: Path) -> None:
    first, second = Run(steps=3), Run()
    second.model.cuda()
    second.optimizer = OPTIMIZERS["IVONPoCoMo"](second.model.parameters())
    second.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(second.optimizer, 20)
    poco.save(file, **first.objects)
    poco.load(file, map_location="cuda", **second.objects)
    assert equal([w.cpu() for w in weights(second.model)], weights(first.model))
    mask = torch.nn.functional.dropout(torch.ones(100, device="cuda"))
    torch.cuda.manual_seed(3)
    poco.save(file, **second.objects)
    mask = torch.nn.functional.dropout(torch.ones(100, device="cuda"))
    poco.load(file, **second.objects)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(100, device="cuda")), mask)
    poco.load(file, map_location="cpu", **first.objects)
    assert equal([w.cpu() for w in weights(second.model)], weights(first.model))
