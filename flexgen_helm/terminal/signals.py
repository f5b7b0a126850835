"""Ctrl-C, SIGTERM and SIGUSR1 end what runs as exceptions, and are not lost where an exception has nowhere to go."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_AGAIN_S = 0.05
"""The seconds until a signal is sent again whose exception was dropped in a destructor."""
_TWICE_S = 5.0
"""Within which a second SIGTERM is the same request: `timeout` sends it to the group and to the process."""


NOT_FINISHED = 75
"""Exit code of a command whose time is up: EX_TEMPFAIL of sysexits.h, try again later."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: of a supervisor, a scheduler, a machine that shuts down."""


class TimeUp(KeyboardInterrupt):
    """SIGUSR1 has come: of a `Deadline`, or of a scheduler that warns of the end of a walltime."""


class Signals:
    """What has come since a command began."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The last signal, until its exception is known to have been dropped."""
        self._when_s = 0.0
        self._process = os.getpid()

    @property
    def exit_code(self) -> int:
        """The exit code of a command that a signal has ended."""
        return {signal.SIGTERM: 143, signal.SIGUSR1: NOT_FINISHED}.get(
            signal.Signals(self.received or signal.SIGINT), 130
        )

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise the signal's exception."""
        if os.getpid() != self._process:  # a fork of this process: it has nothing to put in order
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        is_repeated = self.received == number and time.monotonic() - self._when_s < _TWICE_S
        self.received, self._when_s = number, time.monotonic()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if not is_repeated:
            raise Terminated if number == signal.SIGTERM else TimeUp

    def note_dropped(self, told: Any) -> bool:
        """Send a signal again whose exception was dropped, as Python does in destructors; whether it was one."""
        number, self.received = self.received, None
        if number is None or not isinstance(told.exc_value, KeyboardInterrupt) or os.getpid() != self._process:
            self.received = number
            return False
        again = threading.Timer(_AGAIN_S, os.kill, (self._process, number))
        again.daemon = True
        again.start()
        return True


@contextmanager
def heeding_signals() -> Iterator[Signals]:
    """Raise `KeyboardInterrupt`, `Terminated` or `TimeUp` inside.

    Not for a signal that other code handles, or that is to be ignored.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    ours: dict[signal.Signals, Any] = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGUSR1: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    heeded = [number for number, usual in ours.items() if signal.getsignal(number) is usual]
    show: Callable[[Any], object] = sys.unraisablehook

    def unraisable(told: Any) -> None:
        if not signals.note_dropped(told):
            show(told)

    sys.unraisablehook = unraisable
    for number in heeded:
        signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for number in heeded:
            signal.signal(number, ours[number])
        sys.unraisablehook = show
