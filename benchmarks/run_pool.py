"""Many independent runs, each with a file of its own: what is there is not run again, and several run side by side."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Job = tuple[tuple[Any, ...], dict[str, Any]]


def file_of(folder: Path, job: Job) -> Path:
    """Where a job's result stands: its arguments are its name."""
    positional, named = job
    parts = [str(part) for part in positional]
    parts += [f"{name}={value}" for name, value in sorted(named.items()) if value not in (False, None, {})]
    return folder / (re.sub(r"[^\w.=,+-]+", "_", "--".join(parts)) + ".json")


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _stored(function: Callable[..., Any], job: Job, path: Path) -> Any:
    found = function(*job[0], **job[1])
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(path)
    return found


def results(function: Callable[..., Any], jobs: Sequence[Job], folder: Path, workers: int) -> Iterator[tuple[Job, Any]]:
    """Jobs with their results as they come, those already stored first.

    Args:
        function: of a module; its result must be JSON.
        jobs: positional and named arguments.
        folder: of the files.
        workers: processes of one thread each; 1: this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for job in jobs:
        path = file_of(folder, job)
        if path.exists():
            yield job, json.loads(path.read_text(encoding="utf-8"))
        else:
            missing.append((job, path))
    if workers <= 1:
        _one_thread()
        for job, path in missing:
            yield job, _stored(function, job, path)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        waiting = {pool.submit(_stored, function, job, path): job for job, path in missing}
        for future in as_completed(waiting):
            try:
                yield waiting[future], future.result()
            except Exception as error:  # the others go on; the next call tries it again
                print(f"{waiting[future]}: {error!r}", file=sys.stderr, flush=True)
