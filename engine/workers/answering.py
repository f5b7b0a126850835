"""What whoever asks from elsewhere is answered, as each sweep ends: the calls that an engine is at work on."""

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
    """What is needed of an engine."""

    def sweeps_of_checked(self, jobs: Iterable[Job], entered: Callable[[list[int]], None]) -> Pending:
        """As `engine.Engine` has it."""


class Answering:
    """Hands jobs to an engine and tells what becomes of them, in threads of its own."""

    def __init__(
        self, tell: Callable[[Done], None], tell_first: Callable[[Entered], None], fail: Callable[[BaseException], None]
    ) -> None:
        """`tell_first` returns when the message has left; `fail` hears what ends a call early."""
        self._tell, self._tell_first, self._fail = tell, tell_first, fail
        self._calls: dict[int, list[Pending]] = {}
        """What has not ended of each call."""
        self._dropping = threading.Lock()
        self._passing: list[threading.Thread] = []
        """Those that pass on what calls are answered."""
        self._is_ending = False

    def ask(self, engine: Asked, call: int, packed: PackedJobs) -> None:
        """Have the engine run jobs of a call."""
        jobs = packed.unpack()
        numbers = [number for number, _ in jobs]

        def entered(indices: list[int]) -> None:
            self._tell_first(Entered(numbers=np.array([numbers[index] for index in indices])))

        try:
            pending = engine.sweeps_of_checked((job for _, job in jobs), entered)
        except BaseException as error:  # of which the engine has ended meanwhile
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
        """Drop what of a call has not ended."""
        with self._dropping:
            dropped = self._calls.pop(call, [])
        for pending in dropped:
            pending.close()

    def end(self) -> None:
        """Take in that the engine is about to be closed: calls that it ends then have not failed."""
        self._is_ending = True

    def wait(self) -> None:
        """Return when everything that was answered has been told."""
        for thread in self._passing:
            thread.join()

    def _pass_on(self, call: int, pending: Pending, numbers: list[int]) -> None:
        try:
            for finished in pending:
                done = PackedCompletions.of([(numbers[index], completion) for index, completion in finished])
                self._tell(Done(completions=done))
        except BaseException as error:
            if not self._is_ending:  # else it says that it was closed
                self._fail(error)
        finally:
            with self._dropping:
                self._calls[call] = [each for each in self._calls.get(call, ()) if each is not pending]
                if not self._calls[call]:
                    del self._calls[call]
