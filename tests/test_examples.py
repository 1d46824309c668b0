"""The examples run as a user runs them, in a short setting."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import run_script

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Their packages are large: one worker imports them.
loops_of_others = pytest.mark.xdist_group("loops of others")


def run(name: str, *options: str) -> str:
    """Output of an example."""
    done = run_script(EXAMPLES / name, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_digits_network_trains_all_three_methods() -> None:
    table = run("digits_network.py", "--evaluations", "300", "--seeds", "1")
    rows = re.findall(r"^(\S+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+([\d.]+)$", table, re.M)
    assert [row[0] for row in rows] == ["AdamW", "IVON", "IVON-PoCoMo"]
    for _, steps, evaluations, accuracy, nll in rows:
        assert int(steps) <= 300 <= int(evaluations) <= 312
        assert float(accuracy) > 0.6
        assert float(nll) < 1.5


@pytest.mark.slow
def test_exponentiated_svrg_gets_closer_with_correction() -> None:
    found = re.findall(r"distance to least squares (\S+)", run("exponentiated_svrg.py", "--steps", "400"))
    plain, corrected = map(float, found)
    assert corrected < plain


def test_angles_of_turned_digits_are_found() -> None:
    before, after = re.findall(r"median error \w+ +([\d.]+)", run("angles.py", "--images", "16"))
    assert float(after) < 5.0 < 45.0 < float(before)


def test_quantised_networks_learn() -> None:
    table = run("quantised_network.py", "--quick", "--validation")
    rows = re.findall(r"^(\S.*?) {2,}(\S.*?) {2,}(\d+) +(\d+) +([\d.]+) +[\d.]+ +[\d.]+$", table, re.M)
    found = {(weights, method): (int(steps), float(mean)) for weights, method, steps, _, mean in rows}
    assert len(found) == 9
    assert {gradients for *_, gradients, _ in rows} == {"60"}
    for (_, method), (steps, accuracy) in found.items():
        assert steps == (34 if method == "BLR, corrected" else 60)
        assert accuracy > 0.8  # chance is 0.1


@pytest.mark.slow
def test_calibration_draws_are_likelier_than_their_point_and_doubt_noisy_images(tmp_path: Path) -> None:
    output = run("calibration.py", "--seeds", "1", "--plot", str(tmp_path / "reliability.png"))
    number = r" +│ +([\d.]+)"
    scores, doubts = (
        {
            name: list(map(float, numbers))
            for name, *numbers in re.findall(rf"│ ([AI][^│]*?){n * number} +│$", output, re.M)
        }
        for n in (5, 4)
    )
    assert len(scores) == 5 and len(doubts) == 2, output
    # All 1000 steps: after 500 the network does not fit the wrong labels yet, and there is nothing to correct.
    for name in ("IVON", "IVON-PoCoMo"):
        point, draws = scores[f"{name}, its point"], scores[f"{name}, 32 draws"]
        assert draws[0] > 0.65, "accuracy; 0.85 of the labels are right"
        assert draws[1] < point[1], "NLL"
        entropy, entropy_noisy, information, information_noisy = doubts[name]
        assert entropy < entropy_noisy and information < information_noisy
    assert (tmp_path / "reliability.png").stat().st_size > 5000


def test_positive_weights_keep_their_constraints() -> None:
    output = run("positive_weights.py", "--steps", "40", "--seeds", "1")
    rows = re.findall(r"^(gamma|beta|dirichlet) +(no|yes) +(-?[\d.]+) +(no|yes)$", output, re.M)
    assert [row[:2] for row in rows] == [(n, c) for n in ("gamma", "beta", "dirichlet") for c in ("no", "yes")]
    assert all(kept == "yes" for *_, kept in rows)
    # At their starts the losses are above −5, 0.69 and 0.3.
    limits = {"gamma": -6.5, "beta": 0.5, "dirichlet": 0.25}
    assert all(float(loss) < limits[name] for name, _, loss, _ in rows), output
    shares = [float(share) for share in output.split("shares:")[1].split()]
    assert abs(sum(shares) - 1.0) < 5e-3 and min(shares) >= 0.0


@loops_of_others
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_a_pretrained_transformer_is_fine_tuned(full: bool) -> None:
    # 30 steps of one layer; chance is 0.25 on 64 examples or more, standard error 0.054.
    method = "AdamW + alpha-SVRG" if full else "IVON-PoCoMo"
    options = ["--steps", "30", "--layers", "1", "--methods", method, *([] if full else ["--lora"])]
    (row,) = re.findall(
        r"^(?:IVON|AdamW).*?\s(\d+)\s+([\d.]+)\s+([\d.]+)$", run("finetune_transformer.py", *options), re.M
    )
    weights, before, after = map(float, row)
    assert (weights > 1e7) == full
    assert before < 0.45 < after


@loops_of_others
@pytest.mark.parametrize("name", ["accelerate_loop.py", "lightning_module.py"])
def test_loops_of_others_reach_what_adamw_does(name: str) -> None:
    # Chance is 0.1; two passes bring both well above one half of 599 test digits.
    ((corrected, plain),) = re.findall(r"IVON-PoCoMo reached ([\d.]+), AdamW ([\d.]+)", run(name, "--epochs", "2"))
    assert float(corrected) > 0.6
    assert float(plain) > 0.6


def test_every_example_has_a_test() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    missing = [path.name for path in EXAMPLES.glob("*.py") if re.search(rf"\b{path.stem}\b", source) is None]
    assert not missing


def test_pyro_models_are_drawn(tmp_path: Path) -> None:
    output = run("pyro_models.py", "--steps", "25", "--output", str(tmp_path / "pyro.png"))
    ours, svi = map(float, re.findall(r"(?:NaturalVI|SVI) ([\d.]+)", output))
    assert ours < 65.0 < svi and "0.1015, exact 0.1015" in output
    assert (tmp_path / "pyro.png").stat().st_size > 10_000


def test_the_distributed_example_trains() -> None:
    """On one process here; several are in test_processes.py."""
    assert re.search(
        r"1 process\(es\): [2-5]\.\d+ nats", run("train_distributed.py", "--steps=12", "--batch=4", "--every=5")
    )


def test_every_example_explains_itself() -> None:
    """`--help` of all in one process of their own, which imports what they need once, warnings as errors."""
    explain = """
import contextlib, io, runpy, sys
for path in sys.argv[1:]:
    sys.argv, said = [path, "--help"], io.StringIO()
    sys.path.insert(0, path.rpartition("/")[0])
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    print(path.rpartition("/")[2], "usage:" in said.getvalue())
"""
    paths = sorted(path.as_posix() for path in EXAMPLES.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", explain, *paths], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{path.rpartition('/')[2]} True" for path in paths]


def test_federated_clients_learn_digits_that_they_have_hardly_seen() -> None:
    table = run("federated_digits.py", "--rounds", "2", "--steps", "40", "--clients", "3", "--seeds", "1")
    rows = dict(re.findall(r"^(\S.*?) {2,}([\d.]+) ± ", table, re.M))
    assert list(rows) == ["SGD", "SGD, 2 × rounds", "Adam", "merged, point", "merged, draws"]
    assert float(rows["merged, draws"]) > 0.2  # chance is 0.1


def test_a_stored_posterior_as_prior_keeps_what_was_learnt() -> None:
    table = run("transfer_digits.py", "--steps", "60", "--seeds", "1")
    old = dict(re.findall(r"^(\w+) +60 .* ([\d.]+) ± [\d.]+$", table, re.M))
    assert list(old) == ["weights", "q_out", "prior"] and float(old["prior"]) > float(old["weights"])
