"""Many independent runs, each with a file of its own: what is there is not run again, and several run side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expfam_poco.tools.files import written_aside
from expfam_poco.tools.jobs import run_jobs

Job = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments."""


@dataclass(frozen=True)
class Stored:
    """Calls of a module's function whose results, which must be JSON, stand in files."""

    function: Callable[..., Any]
    folder: Path

    def describe(self, job: Job) -> str:
        """The name of its file."""
        return self.path(job).stem

    def path(self, job: Job) -> Path:
        """Where a job's result stands: its arguments are its name."""
        positional, named = job
        parts = [str(part) for part in positional]
        parts += [f"{name}={value}" for name, value in sorted(named.items()) if value not in (False, None, {})]
        return self.folder / (re.sub(r"[^\w.=,+-]+", "_", "--".join(parts)) + ".json")

    def do(self, job: Job, progress: Callable[[float], None]) -> Any:
        """What is in the file, or the call."""
        path = self.path(job)
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        found = self.function(*job[0], **job[1])
        with written_aside(path) as file:
            file.write(json.dumps(found).encode())
        return found


def results(function: Callable[..., Any], jobs: Sequence[Job], folder: Path, workers: int) -> list[tuple[Job, Any]]:
    """Jobs with their results, in the order of the jobs.

    Args:
        function: of a module.
        jobs: of it.
        folder: of the files.
        workers: processes of one thread each; 1: this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return list(zip(jobs, run_jobs(Stored(function, folder), jobs, workers), strict=True))
