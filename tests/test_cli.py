"""The command line: exit codes, one sentence for wrong input, no traceback, a quick --help."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expfam_poco import cli, families_available
from expfam_poco.cli import app
from expfam_poco.family import registry

TOO_SMALL = "a,b,y\n1,2,no\n2,1,yes\n"
BROKEN = '''
"""Families for the command line's tests."""
import torch
from expfam_poco.family import ExponentialFamily
from torch.distributions import constraints

class Exponential(ExponentialFamily):
    support = constraints.positive
    domain = {"theta": constraints.less_than(0.0)}
    noise_kind = "uniform"
    def statistics(self, theta): return self.Mean(theta)
    def log_partition(self, nat): return -torch.log(-nat.theta)
    def sample(self, state, noise): return torch.log(noise) / state.theta
    def centred_at(self, theta, precision=None): return self.State(-1.0 / theta)

class WrongPartition(Exponential):
    def log_partition(self, nat): return -2.0 * torch.log(-nat.theta)

not_a_family = 3
'''


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command run in this process."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_help_and_version() -> None:
    code, out, _ = invoke("--help")
    assert code == 0 and all(command in out for command in ("compare", "families", "check"))
    code, out, _ = invoke("compare", "--help")
    assert code == 0 and all(option in out for option in ("--task", "--target", "--tune", "--ess", "--curvature"))
    assert invoke("--version") == (0, f"expfam-poco {version('expfam_poco')}\n", "")


def test_cli_itself_imports_nothing_heavy() -> None:
    probe = """
import sys, types
package = types.ModuleType("expfam_poco")
package.__path__ = [sys.argv[1]]
sys.modules["expfam_poco"] = package
import expfam_poco.cli
print([name for name in ("torch", "numpy", "sklearn", "matplotlib", "pyro") if name in sys.modules])
"""
    package = Path(__file__).resolve().parents[1] / "expfam_poco"
    done = subprocess.run([sys.executable, "-c", probe, str(package)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_methods_help_lists_all_methods() -> None:
    from expfam_poco.compare.methods import METHODS

    code, out, _ = invoke("compare", "--methods", "help")
    assert code == 0 and all(name in out for name in METHODS)


WRONG = {
    "unknown task": (["--task", "iris"], "--task 'iris' is not known; choose one of breast-cancer, digits, wine"),
    "missing file": (["--data", "none.csv", "--target", "y"], "--data none.csv: there is no such file"),
    "file without target": (["--data", "small.csv"], "--target COLUMN"),
    "target without file": (["--target", "y"], "--target 'y' belongs to --data FILE"),
    "missing column": (["--data", "small.csv", "--target", "z"], "its columns are a, b, y"),
    "empty cell": (["--data", "hole.csv", "--target", "y"], "line 3, column 'b': the cell is empty"),
    "one class": (["--data", "one.csv", "--target", "y"], "needs at least two classes"),
    "batch larger than data": (["--data", "small.csv", "--target", "y"], "--batch 5: small.csv has 2 examples"),
    "batch of none": (["--batch", "0"], "--batch 0"),
    "unknown method": (["--methods", "SGD,Adam"], "--methods 'Adam' is not known"),
    "method twice": (["--methods", "SGD,SGD"], "SGD twice"),
    "no methods": (["--methods", ""], "--methods '' is not known"),
    "no passes": (["--passes", "0"], "--passes 0"),
    "passes are no number": (["--passes", "nan"], "--passes nan"),
    "no seeds": (["--seeds", "0"], "--seeds 0"),
    "seeds kept for tuning": (["--first-seed", "1000000"], "--first-seed 1000000: seeds from 1000000 on"),
    "delta of zero": (["--delta", "0"], "--delta 0"),
    "negative ess": (["--ess", "-3"], "--ess '-3'"),
    "ess of another unit": (["--ess", "3M"], "--ess '3M'"),
    "negative rate": (["--lr", "SVRG=-1"], "SVRG: lr=-1 is out of range"),
    "rate of another method": (["--lr", "Adam=1"], "--lr Adam=1: that method is not compared"),
    "rate is no number": (["--lr", "fast"], "--lr fast: 'fast' is not a number"),
    "setting without value": (["--set", "chunks"], "--set chunks: write NAME=VALUE"),
    "unknown setting": (["--set", "SGD.beta2=0.9"], "there is no setting 'beta2'"),
    "setting is no whole number": (["--set", "chunks=2.5"], "'2.5' is not a whole number"),
    "hyperparameter out of range": (["--set", "IVON.beta2=1.5"], "IVON: beta2=1.5"),
    "unknown noise": (["--noise", "loud"], "noise='loud'"),
    "unknown curvature": (["--curvature", "round"], "curvature='round'"),
    "noise and curvature do not fit": (["--noise", "zero"], "noise='zero'"),
    "unwritable folder": (["--output", "small.csv/below"], "--output small.csv/below: cannot be written to"),
    "no workers": (["--workers", "0"], "--workers 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.csv").write_text(TOO_SMALL)
    (tmp_path / "hole.csv").write_text("a,b,y\n1,2,no\n2,,yes\n")
    (tmp_path / "one.csv").write_text("a,b,y\n1,2,no\n2,1,no\n")
    arguments, expected = WRONG[case]
    code, out, err = invoke("compare", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("expfam-poco: ") and expected in err
    assert err.count("\n") == 1 and err.endswith(".\n") and "Traceback" not in err
    assert not (tmp_path / "expfam-poco-results" / "results.json").exists()


def test_compare_end_to_end(tmp_path: Path) -> None:
    arguments = ["--task", "wine", "--methods", "SVRG,VON-PoCo", "--passes", "4", "--seeds", "1", "--workers", "1"]
    code, out, err = invoke("compare", *arguments, "--output", str(tmp_path / "out"))
    assert code == 0, err
    assert "Gap on wine after 4 passes" in out and "comparing: 2 runs of 4 passes" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.png", "results.csv", "results.json"]
    content = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert content["methods"]["VON-PoCo"]["summary"]["median_gap"] < 0.1


def alive_in_group(group: int) -> list[str]:
    """The processes of a group that have not ended; those that nobody has waited for are marked Z."""
    listed = subprocess.run(["ps", "-e", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    return [row[2] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


@pytest.mark.skipif(shutil.which("ps") is None, reason="lists processes by the command ps, which is missing")
@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_signal_stops_all_processes(name: str, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group, the other to the main process alone; SIGTERM: see the next test."""
    command = [sys.executable, "-m", "expfam_poco.cli", "compare", "--task", "wine", "--passes", "100000"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's "&" ignores it
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("comparing"):
                break
        time.sleep(1.0)
        number = getattr(signal, name)
        os.killpg(process.pid, number) if name == "SIGINT" else os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == (-number if name == "SIGKILL" else 128 + number)
        stopped = "Ctrl-C" if name == "SIGINT" else name
        assert name == "SIGKILL" or f"stopped by {stopped}; nothing was written." in err
        assert "Traceback" not in err + out
        assert not list(tmp_path.iterdir())
        deadline = time.monotonic() + 30.0
        while (left := alive_in_group(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
    finally:  # whatever is left would run for days
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_unwind_unless_they_are_ignored(name: str) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may ignore it
    with pytest.raises(cli._StoppedError), cli._signals_raise():
        os.kill(os.getpid(), number)
        time.sleep(5.0)
    assert signal.getsignal(number) is signal.SIG_DFL
    try:
        signal.signal(number, signal.SIG_IGN)
        with cli._signals_raise():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_families_lists_the_registered_ones() -> None:
    code, out, _ = invoke("families")
    assert code == 0
    for name in families_available():
        assert name in out
    assert "a whole group" in out and "each weight" in out


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder that holds families."""
    (tmp_path / "families_of_mine.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "families_of_mine", raising=False)
    return "families_of_mine"


def test_check_of_a_family_that_keeps_the_laws(module: str) -> None:
    code, out, err = invoke("check", "--no-compiled", f"{module}:Exponential")
    assert code == 0, out + err
    assert "retraction" in out and f"{module}:Exponential keeps all" in out


def test_check_of_a_family_that_breaks_one(module: str) -> None:
    code, out, err = invoke("check", "--no-compiled", f"{module}:WrongPartition")
    assert code == 1
    assert "gradient_of_log_partition" in err and "FAILS" in out and "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gaussian", "known families: bernoulli, "),
        ("nowhere:Family", "module 'nowhere' cannot be imported"),
        ("nowhere.py:Family", "there is no file nowhere.py"),
        ("families_of_mine:Missing", "has no 'Missing'"),
        ("families_of_mine:", "has no ''"),
        (":Family", "cannot be imported"),
        ("families_of_mine:not_a_family", "neither a registered name nor an ExponentialFamily"),
    ],
)
def test_check_of_what_is_no_family(module: str, name: str, expected: str) -> None:
    code, out, err = invoke("check", name)
    assert (code, out) == (2, "")
    assert expected in err and err.count("\n") == 1


# ---- new-family ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["half-normal", "mine"])
def test_new_family_writes_a_family_that_keeps_the_laws(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    code, out, err = invoke("new-family", name, "--folder", "made")
    assert (code, err) == (0, "")
    module, made = {"half-normal": ("half_normal", "HalfNormal"), "mine": ("mine", "Mine")}[name]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [f"{module}.py", f"test_{module}.py"]
    assert f"expfam-poco check made/{module}.py:{made}" in out
    ruff = [shutil.which("ruff", path=os.path.dirname(sys.executable)) or "ruff", "check", "--no-cache"]
    options = ["--config", str(Path(__file__).resolve().parents[1] / "pyproject.toml"), "made"]
    for command in (ruff, [ruff[0], "format", "--check", "--no-cache"]):
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    if name == "mine":
        return
    # The edges and one law in pytest, since `check` runs all laws below.
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        "-k",
        "edges and float32 or kl",
        "made",
    ]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and "9 passed" in done.stdout, done.stdout
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    code, out, err = invoke("check", "--no-compiled", f"made/{module}.py:{made}")
    del sys.modules[module]
    assert code == 0 and f"made/{module}.py:{made} keeps all" in out, out + err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["Rayleigh"], "name 'Rayleigh': use lower-case letters"),
        (["2d"], "name '2d': use lower-case letters"),
        (["a b"], "name 'a b': use lower-case letters"),
        (["lambda"], "name 'lambda': use lower-case letters"),
        (["test_mine"], "name 'test_mine': use lower-case letters"),
        (["../mine"], "name '../mine': use lower-case letters"),
        (["bernoulli"], "a family of this name is registered already"),
        (["statistics"], "statistics.py would hide the module 'statistics'"),
        (["torch"], "torch.py would hide the module 'torch'"),
        (["family-laws"], "the files it writes use this name for something else"),
        (["conftest"], "the files it writes use this name for something else"),
        *(([name], "Python itself has") for name in ("none", "true", "false", "exception", "value-error", "match")),
        (["dangling"], "dangling.py exists, and is not overwritten"),
        (["mine", "--folder", "nowhere"], "--folder nowhere: there is no such folder"),
        (["taken"], "taken.py exists, and is not overwritten"),
        (["tested"], "test_tested.py exists, and is not overwritten"),
    ],
)
def test_new_family_refuses_in_one_sentence(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("taken.py", "test_tested.py"):
        (tmp_path / name).write_text("# mine\n")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "elsewhere.py")
    code, out, err = invoke("new-family", *arguments)
    assert (code, out) == (2, "")
    assert expected in err and err.count("\n") == 1 and err.endswith(".\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling.py", "taken.py", "test_tested.py"]
    assert (tmp_path / "taken.py").read_text() == "# mine\n"
