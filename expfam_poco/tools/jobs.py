"""Many jobs over worker processes, in any order; messages come back as they happen.

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
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from expfam_poco.errors import InputError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
POLL_SECONDS = 0.2


class WorkerError(RuntimeError):
    """A worker process failed or was killed."""


Message = tuple[int, float, Any]
"""The number of a job, how much of it is done, and its result once it has ended (a `Failure` if it failed)."""


class Failure(str):
    """Why a job failed."""


class Jobs(Protocol):
    """Work of one kind: what every worker needs, sent once, and what is done for each job."""

    def describe(self, job: Any) -> str:
        """A job for the reader of an error."""
        ...

    def do(self, job: Any, progress: Callable[[float], None]) -> Any:
        """Do it; the result, which must not be None."""
        ...


@dataclass(frozen=True)
class Calls:
    """Calls of one function of a module; a job is a tuple of its arguments."""

    function: Callable[..., Any]

    def describe(self, job: tuple[Any, ...]) -> str:
        """The function and the arguments."""
        return f"{self.function.__name__}{job!r}"

    def do(self, job: tuple[Any, ...], progress: Callable[[float], None]) -> Any:
        """The call."""
        return self.function(*job)


def unwatched(number: int, amount: float, result: Any) -> None:
    """No progress."""


def run_jobs(
    work: Jobs, jobs: Sequence[Any], workers: int, watch: Callable[[int, float, Any], None] = unwatched
) -> list[Any]:
    """All jobs, results in the order given; with one worker in this process, else over `workers` spawned ones.

    Args:
        work: what is done for a job; `Calls` of a function, or more.
        jobs: what can be pickled.
        workers: processes.
        watch: is told a job's number, how much of it is done, and at its end the result.

    Raises:
        WorkerError: a spawned worker failed or was killed.
    """
    workers = min(workers, len(jobs))
    ended: dict[int, Any] = {}
    source = _here(work, jobs, watch) if workers < 2 else _spawned(work, jobs, workers)
    with contextlib.closing(source):
        for number, amount, result in source:
            watch(number, amount, result)
            if result is not None:
                ended[number] = result
    return [ended[number] for number in range(len(jobs))]


def _here(work: Jobs, jobs: Sequence[Any], watch: Callable[..., None]) -> Generator[Message, None, None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, job in enumerate(jobs):
            yield number, math.nan, _done(work, job, partial(_report, watch, number))
    finally:
        torch.set_num_threads(threads)


def _spawned(work: Jobs, jobs: Sequence[Any], workers: int) -> Generator[Message, None, None]:
    context = mp.get_context("spawn")
    # The work goes through a queue: as an argument it would fill a pipe that a child reads only after its imports.
    works: Any = context.Queue()
    todo: Any = context.Queue()
    messages: Any = context.Queue()
    for channel in (works, todo, messages):
        channel.cancel_join_thread()  # or an exit by Ctrl-C would wait for workers that no longer read
    for number, job in enumerate(jobs):
        todo.put((number, job))
    for _ in range(workers):
        works.put(work)
        todo.put(None)
    processes: list[SpawnProcess] = []
    try:
        with _one_thread_each(), _deaf_to_interrupts():
            for _ in range(workers):
                process = context.Process(target=_work, args=(works, todo, messages), daemon=True)
                process.start()
                processes.append(process)
        left = len(jobs)
        while left:
            message = _next_message(messages, processes)
            if isinstance(message[2], Failure):
                raise WorkerError(f"{work.describe(jobs[message[0]])}: {message[2]}")
            left -= message[2] is not None
            yield message
        for process in processes:
            process.join()
    finally:
        with _deaf_to_interrupts():
            for process in processes:
                process.terminate()
                process.join()
            for channel in (works, todo, messages):
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


def _work(works: Any, todo: Any, messages: Any) -> None:
    """A worker's life: take the work, then jobs until there is None."""
    _end_with_parent()
    import torch

    torch.set_num_threads(1)
    work = works.get()
    while (next_one := todo.get()) is not None:
        number, job = next_one
        try:
            result = _done(work, job, partial(_send, messages, number))
        except Exception as error:
            messages.put((number, math.nan, Failure(f"{type(error).__name__}: {error}")))
            return
        messages.put((number, math.nan, result))


def _done(work: Jobs, job: Any, progress: Callable[[float], None]) -> Any:
    result = work.do(job, progress)
    if result is None:
        raise TypeError(f"{work.describe(job)}: it gave None; a job has a result")
    return result


def _report(watch: Callable[..., None], number: int, amount: float) -> None:
    watch(number, amount, None)


def _send(messages: Any, number: int, amount: float) -> None:
    messages.put((number, amount, None))


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
