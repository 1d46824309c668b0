"""Training that is killed again and again: the script that `test_kill` runs in a process of its own.

    python kill_training.py FOLDER OPTIMIZER KILLS STEPS

imports torch, and trains a few steps elsewhere to have imported everything that a step needs. Then it forks a child for
every life of the run. A child resumes from the last checkpoint, if there is
one, and goes on to the last step, saving every other step. It reports every step through a pipe; after a random number
of them and a random moment more the parent kills it with SIGKILL. After KILLS kills a child may finish. An undisturbed
run follows. What happened is printed as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import expfam_poco as poco

SAVE_EVERY = 2
REFRESH_EVERY = 5


def make(optimizer: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))
    if optimizer == "IVONPoCoMo":
        opt: Any = poco.IVONPoCoMo(
            model.named_parameters(), lr=0.1, ess=200.0, beta2=0.99, rho1=0.6, rho2=0.1, alpha=0.7
        )
    else:
        opt = poco.AlphaSVRG(torch.optim.AdamW(model.parameters(), lr=1e-2), alpha=0.5)
    return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 100)


def train(folder: Path, optimizer: str, steps: int, report: int | None) -> None:
    """Train from the last checkpoint on; the batches are drawn from the global generator, as the dropout masks are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 5, generator=generator)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(200, 1, generator=generator)
    model, opt, scheduler = make(optimizer)
    checkpoint, log = folder / "run.pt", os.open(folder / "losses", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    start = 0
    if checkpoint.exists():
        start = poco.load(checkpoint, model=model, optimizer=opt, scheduler=scheduler)["step"]

    def closure() -> Any:
        index = torch.randint(200, (16,))
        return lambda: nn.functional.mse_loss(model(x[index]), y[index])

    for step in range(start + 1, steps + 1):
        if step % REFRESH_EVERY == 0:
            opt.refresh([closure() for _ in range(3)])
        loss = opt.step(closure()).item()
        scheduler.step()
        os.write(log, f"{step} {loss.hex()}\n".encode())
        if report is not None:
            os.write(report, b".")
        if step % SAVE_EVERY == 0 or step == steps:
            poco.save(checkpoint, model=model, optimizer=opt, scheduler=scheduler, step=step)


def fork(folder: Path, optimizer: str, steps: int) -> tuple[int, int]:
    """A child that trains, and the end of the pipe on which it reports its steps."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(ours)
            train(folder, optimizer, steps, theirs)
            status = 0
        finally:
            os._exit(status)
    os.close(theirs)
    return child, ours


def last_step(log: Path) -> int:
    """Of the last whole line."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return int(lines[-1].split()[0]) if lines else 0


def saved_step(checkpoint: Path) -> int:
    return int(poco.load(checkpoint)["step"]) if checkpoint.exists() else 0


def disturbed(folder: Path, optimizer: str, kills: int, steps: int, one_step: float) -> dict[str, int]:
    """Kill `kills` children; count those that were running, lost steps, or were in the middle of a save."""
    chance = random.Random(0)
    found = {"killed": 0, "lost_steps": 0, "within_save": 0}
    for _ in range(kills):
        child, reports = fork(folder, optimizer, steps)
        for _ in range(chance.randint(0, 10)):
            if not os.read(reports, 1):
                break
        time.sleep(chance.uniform(0.0, 2.0 * one_step))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reports)
        found["killed"] += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        found["lost_steps"] += last_step(folder / "losses") > saved_step(folder / "run.pt")
        found["within_save"] += bool(list(folder.glob(".run.pt.*.tmp")))
    found["steps_before_last_life"] = saved_step(folder / "run.pt")
    finish(folder, optimizer, steps)
    found["temporary_files"] = len(list(folder.glob(".*")))
    return found


def finish(folder: Path, optimizer: str, steps: int) -> None:
    child, reports = fork(folder, optimizer, steps)
    while os.read(reports, 4096):
        pass
    _, status = os.waitpid(child, 0)
    os.close(reports)
    if status:
        raise SystemExit(f"the child ended with status {status}")


def seconds_of_a_step(folder: Path, optimizer: str) -> float:
    """Saves included, after the first steps, which import what they need."""
    train(folder, optimizer, 6, None)
    start = time.monotonic()
    train(folder, optimizer, 26, None)
    return (time.monotonic() - start) / 20


if __name__ == "__main__":
    place, name, number, length = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    for part in ("elsewhere", "killed", "undisturbed"):
        (place / part).mkdir()
    happened = disturbed(place / "killed", name, number, length, seconds_of_a_step(place / "elsewhere", name))
    finish(place / "undisturbed", name, length)
    print(json.dumps(happened))
