"""Stretches of a step that must run to their end: signals wait until they are over."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` wraps, four times as quick
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

# Those for which programs set handlers that raise: Ctrl-C, schedulers that end a job, alarms.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
_SIGNALS = [int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name)]


class Uninterrupted(AbstractContextManager[None]):
    """Inside, handlers of signals written in Python wait; afterwards they run, in the order in which signals came.

    Python runs them in the main thread alone, so that in any other there is nothing to do.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._came: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        try:
            for number in _SIGNALS:
                handler = _signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    _signal.signal(number, self._wait)
        except BaseException:  # one came before all of them waited
            self._put_back()
            raise

    def _wait(self, number: int, frame: FrameType | None) -> None:
        self._came.append((number, frame))

    def _put_back(self) -> None:
        try:
            for number, handler in self._handlers.items():
                _signal.signal(number, handler)
        except BaseException:  # of a handler that was back already
            for number, handler in self._handlers.items():
                _signal.signal(number, handler)
            raise

    def __exit__(self, *error: object) -> None:
        self._put_back()
        for number, frame in self._came:
            self._handlers[number](number, frame)
