"""The host's end of the connection to the driver: opens an engine, runs the driver's jobs, and reports completions."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine.errors import EngineError, carried
from engine.hosts.messages import HostOpened, HostSwept, HostTells, Opening, Vouched
from engine.schedule.timing import SweepTiming
from engine.workers.answering import Answering, Asked
from engine.workers.messages import Done, Fault, Note
from engine.workers.packing import PackedJobs


class HostEngine(Asked, Protocol):
    """The part of the interface of `engine.workers.remote_engine.RemoteEngine` that `Serving` uses."""

    observer: Callable[[SweepTiming], None] | None

    def weights_digest(self) -> str | None:
        """The digest of the weight files, once all are read."""

    def close(self) -> None:
        """End after the current sweep, whose completions are delivered."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """An engine that is open on this host."""

    engine: HostEngine
    opened: HostOpened
    """What the driver is told about the engine."""
    check: Callable[[], None]
    """Raises `EngineError` if the weight files have been overwritten since the engine was opened."""


class Serving:
    """Opens the model of an `Opening` and serves it. No method but `leave` waits for the engine."""

    def __init__(self, open_engine: Callable[[Opening], Running], tell: Callable[[HostTells], None]) -> None:
        """`open_engine` may take long; `tell` sends a message; it is called from any thread and does not wait."""
        self._open_engine, self._tell = open_engine, tell
        self._running: Running | None = None
        self._answering = Answering(self._tell_done, tell, self._fail)

    def open(self, opening: Opening) -> None:
        """Open a model, in a new thread."""
        threading.Thread(target=self._open, args=(opening,), name="flexgen-open", daemon=True).start()

    def ask(self, call: int, jobs: PackedJobs) -> None:
        """Run jobs of a call; only after the model is open."""
        assert self._running is not None
        self._answering.ask(self._running.engine, call, jobs)

    def drop(self, call: int) -> None:
        """Cancel everything unfinished of a call."""
        self._answering.drop(call)

    def leave(self) -> None:
        """End after the current sweep; returns when all its completions have been sent."""
        self._answering.end()
        if self._running is not None:
            self._running.engine.close()
        self._answering.wait()

    def _open(self, opening: Opening) -> None:
        logger = logging.getLogger("engine")
        logger.setLevel(logging.INFO)
        logger.addHandler(_Telling(self._tell))
        try:
            running = self._running = self._open_engine(opening)
            running.engine.observer = self._observe
            self._tell(running.opened)
            digest = running.engine.weights_digest()
            running.check()
            self._tell(Vouched(digest=digest))
        except BaseException as error:
            self._fail(error)

    def _observe(self, timing: SweepTiming) -> None:
        self._tell(HostSwept(timing=timing, ago_s=time.perf_counter() - timing.begun))

    def _tell_done(self, done: Done) -> None:
        assert self._running is not None
        try:
            self._running.check()
        except EngineError as error:  # the answers may come from other weights
            self._fail(error)
        else:
            self._tell(done)

    def _fail(self, error: BaseException) -> None:
        self._tell(Fault(error=carried(error)))


class _Telling(logging.Handler):
    def __init__(self, tell: Callable[[HostTells], None]) -> None:
        super().__init__(logging.WARNING)
        self._told = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._told(Note(logger=record.name, level=record.levelno, text=record.getMessage()))
