"""The program of a helper process: it executes tasks, and ignores signals to its process group."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from engine.errors import one_line


@dataclass(frozen=True, kw_only=True)
class Told:
    """The result of a task, and what was logged meanwhile."""

    outcome: Any
    """What it returned, or the exception that it raised."""
    logged: list[tuple[str, int, str]]
    """The logger, level and text of each record."""


def work(line: Connection, make: Callable[[], Any], levels: dict[str, int]) -> None:
    """Execute the tasks that arrive over `line`, in the main thread, because some of HELM's metrics use signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they reach the whole process group; the parent decides what to do
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), name="flexgen-parent", daemon=True).start()
    logged = _Logged()
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [logged], False
        logger.setLevel(level)
    found: Any = None
    while True:
        try:
            method, args = line.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            found = found or make()
            outcome = getattr(found, method)(*args)
        except BaseException as error:
            outcome = _carried(error)
        line.send(Told(outcome=outcome, logged=logged.take()))


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _carried(error: BaseException) -> BaseException:
    """An error in a form that another process can read, with the traceback as a note."""
    trace = "".join(traceback.format_exception(error))
    try:
        found = pickle.loads(pickle.dumps(error))
        same = type(found) is type(error) and str(found) == str(error)
    except Exception:
        same = False
    if not same:
        error = RuntimeError(f"{type(error).__name__}: {one_line(error)}")
    error = error.with_traceback(None)
    error.__cause__ = error.__context__ = None
    error.add_note(trace)
    return error


class _Logged(logging.Handler):
    """Collects log records, for the parent to log them."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> list[tuple[str, int, str]]:
        lines, self._lines = self._lines, []
        return lines


def outlive_signals() -> None:
    """Make helpers ignore the process group's signals; called in the server from which helpers are forked."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with contextlib.suppress(ValueError):  # another program imports this module in another thread
            signal.signal(number, signal.SIG_IGN)
