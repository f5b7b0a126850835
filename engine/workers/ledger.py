"""Jobs that have no answer yet, and which of them a process has (pure)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.job import Completion, Job
from engine.pending import Call, Finished
from engine.workers.suspects import Suspects


@dataclass(frozen=True)
class _Asked:
    call: Call
    call_number: int
    index: int
    job: Job


class Ledger:
    """Keeps every job until it is answered, by a number of its own; what a process dies with is sent again."""

    def __init__(self) -> None:
        self._asked: dict[int, _Asked] = {}
        self._unsent: dict[int, None] = {}
        """Those of `asked` that no process has, in their order."""
        self._entered: set[int] = set()
        """Those that have been begun to compute."""
        self._suspects = Suspects()
        self._numbers, self._call_numbers = itertools.count(), itertools.count()

    @property
    def is_empty(self) -> bool:
        """Whether everything is answered."""
        return not self._asked

    def add(self, call: Call, jobs: Mapping[int, Job]) -> None:
        """Take in a call's jobs, by their positions there."""
        call_number = next(self._call_numbers)
        for index, job in jobs.items():
            number = next(self._numbers)
            self._asked[number] = _Asked(call, call_number, index, job)
            self._unsent[number] = None

    def drop(self, call: Call) -> int | None:
        """Forget what of a call is not answered; the number that a process knows it by, if anything was left."""
        gone = {number: asked.call_number for number, asked in self._asked.items() if asked.call is call}
        self._forget(gone)
        return next(iter(gone.values()), None)

    def to_send(self) -> dict[int, list[tuple[int, Job]]]:
        """What the process may compute now, by the number of its call; it has these from now on."""
        group = self._suspects.group
        if group is None:
            chosen, self._unsent = list(self._unsent), {}
        elif group <= self._unsent.keys():  # nobody else is with it: all that was sent has been answered, or has died
            chosen = sorted(group)
            for number in chosen:
                del self._unsent[number]
        else:
            chosen = []
        by_call: dict[int, list[tuple[int, Job]]] = {}
        for number in chosen:
            asked = self._asked[number]
            by_call.setdefault(asked.call_number, []).append((number, asked.job))
        return by_call

    def entered(self, numbers: Iterable[int]) -> None:
        """Take in that the process has begun to compute jobs."""
        self._entered.update(number for number in numbers if number in self._asked)

    def answered(self, done: Iterable[tuple[int, Completion]]) -> list[tuple[Call, Finished]]:
        """Take in answers; returns them by call and position, without those that nobody waits for any more."""
        finished: dict[int, tuple[Call, Finished]] = {}
        gone = []
        for number, completion in done:
            asked = self._asked.get(number)
            if asked is None:
                continue
            gone.append(number)
            asked.call.left.pop(asked.index)
            finished.setdefault(id(asked.call), (asked.call, []))[1].append((asked.index, completion))
        self._forget(gone)
        return list(finished.values())

    def died(self, *, is_job_at_fault: bool) -> list[int]:
        """Take in that the process has ended, and may have been ended by a job; returns the jobs that are to fail."""
        failed = []
        if is_job_at_fault:
            failed = self._suspects.died(self._entered or self._asked.keys() - self._unsent.keys())
        self._entered.clear()
        self._unsent = dict.fromkeys(sorted(self._asked))
        return failed

    def clear(self) -> list[Call]:
        """Forget everything; returns the calls that had something left."""
        calls = {id(asked.call): asked.call for asked in self._asked.values()}
        self._forget(list(self._asked))
        return list(calls.values())

    def _forget(self, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        for number in numbers:
            del self._asked[number]
            self._unsent.pop(number, None)
            self._entered.discard(number)
        self._suspects.ended(numbers)
