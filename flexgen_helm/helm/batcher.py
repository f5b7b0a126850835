"""Turns requests that arrive one by one, from many threads, into few calls of the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from engine.errors import EngineError
from engine.job import Completion, Job


@dataclass(frozen=True, kw_only=True)
class Done:
    """A completion that the engine has just yielded."""

    index: int
    """Position of its job in the call."""
    completion: Completion
    seconds: float
    """Seconds since the engine began the call, without loading weights."""


Stream = Callable[[Sequence[Job]], Iterator[Done]]
"""Runs jobs in one call of the engine."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The completions of one request."""

    completions: tuple[Completion, ...]
    """The completions in the order of the request's jobs."""
    num_requests: int
    """Requests that the engine worked on together when this one's call began."""
    seconds: float
    """The seconds from the beginning of that call to the last of the completions."""


@dataclass(eq=False)
class _Ticket:
    jobs: Sequence[Job]
    future: Future[Answer] = field(default_factory=Future)
    completions: dict[int, Completion] = field(default_factory=dict)


class Batcher:
    """Collects requests until no more are arriving, then passes them to the engine in one call.

    The caller that comes first waits for the others: while callers announced by `arriving` are on their way and until
    `quiet_s` seconds have passed without another request, but no longer than `longest_wait_s`. Meanwhile earlier calls
    may be running; the engine serves them together.
    """

    def __init__(self, stream: Stream, *, quiet_s: float = 0.005, longest_wait_s: float = 1.0) -> None:
        self._stream = stream
        self._quiet_s = quiet_s
        self._longest_wait_s = longest_wait_s
        self._changed = threading.Condition()
        self._waiting: list[_Ticket] = []
        self._latest = 0.0
        self._num_arriving = 0
        self._num_asking = 0

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Announce that this thread may `ask` before it leaves the context."""
        with self._changed:
            self._num_arriving += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_arriving -= 1
                self._changed.notify_all()

    def ask(self, jobs: Sequence[Job]) -> Answer:
        """Run the jobs of one request; raises what the engine raises."""
        ticket = _Ticket(jobs)
        with self._changed:
            self._num_asking += 1
            self._waiting.append(ticket)
            self._latest = time.monotonic()
            leads = len(self._waiting) == 1
            self._changed.notify_all()
        try:
            if leads:
                self._lead()
            return ticket.future.result()
        finally:
            with self._changed:
                self._num_asking -= 1
                self._changed.notify_all()

    def _lead(self) -> None:
        try:
            self._wait_for_quiet()
        finally:  # even after an interrupt: the callers that came later would never be answered
            with self._changed:
                batch, self._waiting = self._waiting, []
                num_requests = self._num_asking
            # A separate thread, which ends with the batch: the leader may leave as soon as its own answer is there.
            threading.Thread(target=self._serve, args=(batch, num_requests), name="flexgen-batch", daemon=True).start()

    def _wait_for_quiet(self) -> None:
        deadline = time.monotonic() + self._longest_wait_s
        with self._changed:
            while True:
                all_here = self._num_arriving <= self._num_asking
                until = min(deadline, self._latest + self._quiet_s) if all_here else deadline
                remaining = until - time.monotonic()
                if remaining <= 0:
                    return
                self._changed.wait(remaining)

    def _serve(self, batch: list[_Ticket], num_requests: int) -> None:
        owners = [(ticket, position) for ticket in batch for position in range(len(ticket.jobs))]
        failure: BaseException = EngineError("the engine ended without answering; this is a fault of flexgen-helm")
        try:
            for done in self._stream([job for ticket in batch for job in ticket.jobs]):
                ticket, position = owners[done.index]
                ticket.completions[position] = done.completion
                if len(ticket.completions) == len(ticket.jobs):
                    completions = tuple(ticket.completions[i] for i in range(len(ticket.jobs)))
                    answer = Answer(completions=completions, num_requests=num_requests, seconds=done.seconds)
                    ticket.future.set_result(answer)
        except BaseException as error:
            failure = error
        for ticket in batch:
            if not ticket.future.done():
                ticket.future.set_exception(failure)
