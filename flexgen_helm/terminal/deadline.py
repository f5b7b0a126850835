"""A deadline of a command: read from its command line, and announced to it in time by a signal."""

from __future__ import annotations

import argparse
import re
import signal
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from types import TracebackType

_LOOK_S = 1.0
"""How often the wall clock is read: it may be set, and goes on while a machine sleeps."""
_ENDING_S = 5.0
"""The seconds to store the last answers and to release memory."""
_LONGER = 1.25
"""The factor by which the last sweep may take longer than all before it."""
_TIME_OF_DAY = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?")


def moment(text: str) -> datetime:
    """The moment that `text` names: a time of day, tomorrow's where today's is past, or an ISO date-time.

    Local time where there is no zone. Raises `argparse.ArgumentTypeError` for anything else, and for what is past.
    """
    now = datetime.now().astimezone()
    form = "write a time such as 23:30, or a date and a time such as 2026-12-24T06:00"
    match = _TIME_OF_DAY.fullmatch(text)
    try:
        if match is not None:
            hour, minute, second = (int(part or 0) for part in match.groups())
            found = now.replace(tzinfo=None, hour=hour, minute=minute, second=second, microsecond=0)
            if found.astimezone() <= now:
                found += timedelta(days=1)
            return found.astimezone()
        if len(text) <= len("2026-12-24"):
            raise ValueError
        found = datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; {form}") from None
    if found <= now:
        raise argparse.ArgumentTypeError(f"{text!r} is past: it is {now:%Y-%m-%dT%H:%M:%S%z}; {form}")
    return found


class Deadline:
    """Sends the main thread SIGUSR1 so early that the current sweep ends before a moment; a context manager.

    Sweeps are expected to take at most 1.25 times the longest so far; before the first has ended, its time is not
    known. Without a moment nothing is sent.
    """

    def __init__(self, at: datetime | None, longest_pass_s: Callable[[], float]) -> None:
        """`longest_pass_s` returns the seconds of the longest sweep so far, from any thread."""
        self._at = at
        self._longest_pass_s = longest_pass_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="flexgen-deadline", daemon=True)

    def __enter__(self) -> Deadline:
        if self._at is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._at is not None:
            self._thread.join()

    def left_s(self) -> float:
        """Seconds until the command must begin to end."""
        assert self._at is not None
        left = (self._at - datetime.now().astimezone()).total_seconds()
        return left - _ENDING_S - _LONGER * self._longest_pass_s()

    def _watch(self) -> None:
        while (left := self.left_s()) > 0:
            if self._over.wait(min(left, _LOOK_S)):
                return
        if not self._over.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
