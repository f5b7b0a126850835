"""Runs the calls of a client in another process on this process's engine, and reports each sweep's completions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from engine.asking.pending import Pending
from engine.job import Job
from engine.workers.messages import Done, Entered
from engine.workers.packing import PackedCompletions, PackedJobs


class Asked(Protocol):
    """The part of an engine's interface that `Answering` uses."""

    def sweeps_of_checked(self, jobs: Iterable[Job], entered: Callable[[list[int]], None]) -> Pending:
        """Submit checked jobs, like `engine.Engine.sweeps_of_checked`."""


class Answering:
    """Submits jobs to an engine and reports their completions to the client, with one thread for each call."""

    def __init__(
        self, tell: Callable[[Done], None], tell_first: Callable[[Entered], None], fail: Callable[[BaseException], None]
    ) -> None:
        """`tell_first` returns once its message is sent; `fail` is called with an exception that ends a call."""
        self._tell, self._tell_first, self._fail = tell, tell_first, fail
        self._calls: dict[int, list[Pending]] = {}
        """The unfinished requests of each call, by call number."""
        self._dropping = threading.Lock()
        self._passing: list[threading.Thread] = []
        """The threads that report the completions of calls."""
        self._is_ending = False

    def ask(self, engine: Asked, call: int, packed: PackedJobs) -> None:
        """Submit jobs of a call to the engine."""
        jobs = packed.unpack()
        numbers = [number for number, _ in jobs]

        def entered(indices: list[int]) -> None:
            self._tell_first(Entered(numbers=np.array([numbers[index] for index in indices])))

        try:
            pending = engine.sweeps_of_checked((job for _, job in jobs), entered)
        except BaseException as error:  # such as: the engine has been closed in the meantime
            self._fail(error)
            return
        with self._dropping:
            self._calls.setdefault(call, []).append(pending)
        passing = threading.Thread(
            target=self._pass_on, args=(call, pending, numbers), name="flexgen-call", daemon=True
        )
        passing.start()
        self._passing = [thread for thread in (*self._passing, passing) if thread.is_alive()]

    def drop(self, call: int) -> None:
        """Cancel everything unfinished of a call."""
        with self._dropping:
            dropped = self._calls.pop(call, [])
        for pending in dropped:
            pending.close()

    def end(self) -> None:
        """Note that the engine is about to be closed: calls that closing ends are not reported as failures."""
        self._is_ending = True

    def wait(self) -> None:
        """Return when every completion has been reported."""
        for thread in self._passing:
            thread.join()

    def _pass_on(self, call: int, pending: Pending, numbers: list[int]) -> None:
        try:
            for finished in pending:
                done = PackedCompletions.of([(numbers[index], completion) for index, completion in finished])
                self._tell(Done(completions=done))
        except BaseException as error:
            if not self._is_ending:  # otherwise the error only says that the engine was closed
                self._fail(error)
        finally:
            with self._dropping:
                self._calls[call] = [each for each in self._calls.get(call, ()) if each is not pending]
                if not self._calls[call]:
                    del self._calls[call]
