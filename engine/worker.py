"""The program of a worker process: runs an engine as another process asks it to, and reports what becomes of jobs."""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, carried, one_line
from engine.workers.answering import Answering
from engine.workers.messages import (
    Ask,
    Check,
    Checked,
    Close,
    Compare,
    Compared,
    Digested,
    Drop,
    Fault,
    Loaded,
    Look,
    Note,
    Open,
    Opened,
    Stage,
    Swept,
    Tells,
    Told,
)
from engine.workers.seats import seen_here

if TYPE_CHECKING:
    from engine.engine import Engine

_TURN_S = 0.0005
"""Seconds that a thread may keep the interpreter lock while others wait for it. The computing thread releases the lock
with every torch function, and would wait up to 5 ms, the default, each time another thread handles jobs.
"""
_TELLS = "flexgen-tell"
"""The name of the thread that sends messages."""
_LOOK_S = 0.5
"""Seconds between checks that the parent is alive: a pipe that other processes inherited does not close with it."""


def main(line: int) -> None:
    """Serve the process at the other end of the file descriptor `line` until it closes the connection or ends."""
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they reach the whole process group; the parent decides what to do
    threading.Thread(target=_end_with, args=(parent,), name="flexgen-parent", daemon=True).start()
    sys.setswitchinterval(_TURN_S)
    Serving(Connection(line)).run()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)


class Serving:
    """Connects an engine to the process at the other end of a pipe."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._inbox: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Tells | threading.Event | None] = queue.SimpleQueue()
        """Messages to send; an event is set when everything before it was sent, and None ends the sender."""
        self._answering = Answering(self._outbox.put, self._tell, self._fail)
        self._is_open = self._is_ending = False

    def run(self) -> None:
        """Open the requested model and serve it; returns when every message has been sent."""
        threading.excepthook = self._end_of_thread
        sender = threading.Thread(target=self._send, name=_TELLS, daemon=True)
        sender.start()
        threading.Thread(target=self._receive, name="flexgen-hear", daemon=True).start()
        try:
            self._serve()
        except BaseException as error:
            self._fail(error)
        self._answering.wait()
        self._outbox.put(None)
        sender.join()
        os._exit(0)  # all resources are released; skips the interpreter's slow finalization

    def _serve(self) -> None:
        from engine.engine import Engine  # takes seconds: done before the first message arrives
        from engine.kernels.threads import limit_threads

        gc.collect()
        gc.freeze()  # else the garbage collector would examine the imported modules again and again

        while isinstance(first := self._inbox.get(), Look | Check):
            if isinstance(first, Look):
                self._outbox.put(seen_here(first))
            else:
                self._outbox.put(_checked(first))
                with suppress(Exception):  # opening the model reports the error
                    seen_here(Look(policy=first.policy))  # initializing a device takes time: done while nobody waits
        if not isinstance(first, Open):
            return
        if first.member is not None:
            limit_threads(first.member.count)
        with (
            self._telling_notes(),
            Engine.from_pretrained(first.model, first.policy, window=first.window, member=first.member) as engine,
        ):
            self._is_open = True
            engine.observer = lambda timing: self._outbox.put(Swept(timing=timing))
            parts = engine.parts
            self._outbox.put(
                Opened(
                    path=str(parts.path),
                    dtype=str(parts.model.dtype).removeprefix("torch."),
                    plan=engine.plan,
                    window=engine.window,
                    vocab_size=parts.model.vocab_size,
                    pad_token=parts.pad_token,
                    placed=parts.weights.placed_bytes(),
                )
            )
            threading.Thread(target=self._follow_loading, args=(engine,), name="flexgen-loaded", daemon=True).start()
            if first.member is not None and first.member.stages and not first.member.leads:
                threading.Thread(target=self._follow, args=(engine,), name="flexgen-engine", daemon=True).start()
            while not isinstance(told := self._inbox.get(), Close):
                self._do(engine, told)
            self._is_ending = True
            self._answering.end()

    def _do(self, engine: Engine, told: Told) -> None:
        if isinstance(told, Ask):
            self._answering.ask(engine, told.call, told.jobs)
        elif isinstance(told, Drop):
            self._answering.drop(told.call)
        elif isinstance(told, Compare):
            threading.Thread(target=self._compare, args=(engine, told), name="flexgen-compare", daemon=True).start()

    def _tell(self, message: Tells) -> None:
        """Send a message, and wait until it was sent, because what follows may end this process at once."""
        left = threading.Event()
        self._outbox.put(message)
        self._outbox.put(left)
        left.wait()

    def _compare(self, engine: Engine, told: Compare) -> None:
        try:
            outcome: Any = engine.compare_with_stock(
                told.jobs, told.completions, lambda done, total: self._outbox.put(Stage(done=done, total=total))
            )
        except BaseException as error:
            outcome = carried(error)
        self._outbox.put(Compared(outcome=outcome))

    def _follow_loading(self, engine: Engine) -> None:
        """Report when the weights and the digest are there, or why not; calls that wait for answers fail likewise."""
        try:
            engine.wait_until_loaded()
        except EngineError as error:
            self._outbox.put(Digested(digest=None, error=error))
            if not self._is_ending:
                self._fail(error)  # one in the place of another is asked nothing before, and nobody would hear of it
            return
        self._outbox.put(Loaded())
        try:
            self._outbox.put(Digested(digest=engine.weights_digest()))
        except EngineError as error:
            self._outbox.put(Digested(digest=None, error=error))

    def _follow(self, engine: Engine) -> None:
        """Compute the sweeps of the leading stage until it ends."""
        try:
            engine.follow()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        try:
            self._outbox.put(Fault(error=carried(error)))
        except BaseException:  # there is no memory even for that: its end tells
            os._exit(1)

    def _end_of_thread(self, died: threading.ExceptHookArgs) -> None:
        """Tell what a thread has died of, for which others would wait for ever; without the one that tells, end."""
        if died.exc_value is None or died.thread is None or died.thread.name == _TELLS:
            os._exit(1)
        self._fail(died.exc_value)

    def _receive(self) -> None:
        try:
            while True:
                told = self._line.recv()
                if isinstance(told, Open) and told.member is not None and told.member.weights is not None:
                    told = replace(told, member=replace(told.member, weights=reduction.recv_handle(self._line)))
                if isinstance(told, Close) and not self._is_open:
                    os._exit(0)  # the model that is being opened is not needed any more
                self._inbox.put(told)
        except (EOFError, OSError):
            os._exit(1)  # nobody is left to receive answers

    def _send(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                if isinstance(message, threading.Event):
                    message.set()
                else:
                    self._line.send(message)
        except OSError:
            os._exit(1)

    @contextmanager
    def _telling_notes(self) -> Iterator[None]:
        """Send warnings and log records of the `engine` logger to the other process while the context is active."""

        def warn(message: Warning | str, *_: Any, **__: Any) -> None:
            self._outbox.put(Note(logger=None, level=logging.WARNING, text=one_line(Exception(str(message)))))

        warnings.showwarning = warn
        handler = _Telling(self._outbox)
        logger = logging.getLogger("engine")
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        yield


class _Telling(logging.Handler):
    def __init__(self, outbox: queue.SimpleQueue[Tells | threading.Event | None]) -> None:
        super().__init__()
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        self._outbox.put(Note(logger=record.name, level=record.levelno, text=record.getMessage()))


def _checked(check: Check) -> Checked:
    from engine.opening import check_model

    try:
        check_model(check.description, check.policy)
    except BaseException as error:
        return Checked(error=carried(error))
    return Checked(error=None)
