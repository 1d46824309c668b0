"""Many runs over worker processes, in any order; messages come back as they happen.

Workers are spawned, use one thread each, and ignore Ctrl-C: the main process hears it and ends them. They end by
themselves when the main process has gone, however it went.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing as mp
import multiprocessing.connection
import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

from expfam_poco.compare.methods import METHODS, Settings
from expfam_poco.compare.runner import Budget, Curve, train
from expfam_poco.compare.tasks import Task
from expfam_poco.errors import InputError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
POLL_SECONDS = 0.2


class Run(NamedTuple):
    """One piece of work: a method's name, its settings and a seed."""

    method: str
    settings: Settings
    seed: int


Watch = Callable[[int, float, "Curve | None"], None]
"""Called with the number of a run, the passes it has spent, and its curve once it has ended."""


class WorkerError(RuntimeError):
    """A worker process failed or was killed."""


def run_all(task: Task, runs: Sequence[Run], budget: Budget, workers: int, watch: Watch) -> list[Curve]:
    """All runs, in the order given; with one worker in this process, else over `workers` spawned ones."""
    workers = min(workers, len(runs))
    ended: dict[int, Curve] = {}
    source = _here(task, runs, budget, watch) if workers < 2 else _spawned(task, runs, budget, workers)
    with contextlib.closing(source):
        for number, passes, curve in source:
            watch(number, passes, curve)
            if curve is not None:
                ended[number] = curve
    return [ended[number] for number in range(len(runs))]


Message = tuple[int, float, "Curve | None"]


def _here(task: Task, runs: Sequence[Run], budget: Budget, watch: Watch) -> Generator[Message, None, None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, run in enumerate(runs):
            curve = _train(task, run, budget, partial(_report, watch, number))
            yield number, curve.passes[-1], curve
    finally:
        torch.set_num_threads(threads)


def _spawned(task: Task, runs: Sequence[Run], budget: Budget, workers: int) -> Generator[Message, None, None]:
    context = mp.get_context("spawn")
    # The task goes through a queue: as an argument it would fill a pipe that a child reads only after its imports.
    tasks: Any = context.Queue()
    jobs: Any = context.Queue()
    messages: Any = context.Queue()
    for channel in (tasks, jobs, messages):
        channel.cancel_join_thread()  # or an exit by Ctrl-C would wait for workers that no longer read
    for number, run in enumerate(runs):
        jobs.put((number, run))
    for _ in range(workers):
        tasks.put((task, budget))
        jobs.put(None)
    processes: list[SpawnProcess] = []
    try:
        with _one_thread_each(), _deaf_to_interrupts():
            for _ in range(workers):
                process = context.Process(target=_work, args=(tasks, jobs, messages), daemon=True)
                process.start()
                processes.append(process)
        left = len(runs)
        while left:
            message = _next_message(messages, processes)
            if isinstance(message[2], str):
                raise WorkerError(f"{runs[message[0]].method}, seed {runs[message[0]].seed}: {message[2]}")
            left -= message[2] is not None
            yield message
        for process in processes:
            process.join()
    finally:
        with _deaf_to_interrupts():
            for process in processes:
                process.terminate()
                process.join()
            for channel in (tasks, jobs, messages):
                channel.close()


def _next_message(messages: Any, processes: Sequence[SpawnProcess]) -> Any:
    """The next message; an error when a worker was killed or none is left to send one."""
    gone = False
    while True:
        with contextlib.suppress(queue.Empty):
            return messages.get(timeout=POLL_SECONDS)
        codes = [process.exitcode for process in processes]
        if gone:
            raise WorkerError(
                f"a worker process ended early (exit codes {codes}), perhaps for want of memory; "
                "try again with --workers 1."
            )
        gone = any(codes) or all(code is not None for code in codes)  # what it sent last may still arrive


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C from their first moment on; this one only for that moment."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Children inherit these variables; numeric libraries read them when they are loaded."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _end_with_parent() -> None:
    """Watch the main process, which may be killed before it can end its workers."""
    parent = mp.parent_process()

    def watch() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)  # at once, wherever the work stands

    threading.Thread(target=watch, daemon=True).start()


def _work(tasks: Any, jobs: Any, messages: Any) -> None:
    """A worker's life: take the task, then runs until there is None."""
    _end_with_parent()
    import torch

    torch.set_num_threads(1)
    task, budget = tasks.get()
    while (job := jobs.get()) is not None:
        number, run = job
        try:
            curve = _train(task, run, budget, partial(_send, messages, number))
        except Exception as error:
            messages.put((number, math.nan, f"{type(error).__name__}: {error}"))
            return
        messages.put((number, curve.passes[-1], curve))


def _report(watch: Watch, number: int, passes: float) -> None:
    watch(number, passes, None)


def _send(messages: Any, number: int, passes: float) -> None:
    messages.put((number, passes, None))


def _train(task: Task, run: Run, budget: Budget, progress: Callable[[float], None]) -> Curve:
    return train(task, METHODS[run.method], run.settings, run.seed, budget, progress)


def worker_count(asked: int | None) -> int:
    """The number of workers: as asked, or two where there are two processors.

    Raises:
        InputError: if asked for less than one.
    """
    if asked is None:
        return min(2, os.cpu_count() or 1)
    if asked < 1:
        raise InputError(f"--workers {asked}: there must be at least one; leave it out for the default.")
    return asked
