"""The jobs that have no answer yet, and which device has which of them (pure)."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from engine.asking.pending import Call, Finished
from engine.job import Completion, Job
from engine.workers.handing_out.sharing_out import Room, SharingOut
from engine.workers.handing_out.suspects import STRIKES, Suspects

Asked = dict[int, list[tuple[int, Job]]]
"""(number, job) pairs, by the number of their call."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    call: Call
    call_number: int
    index: int
    job: Job


class Ledger:
    """Keeps every job, under a number of its own, until it is answered; jobs of a process that died are sent again.

    Several devices each get a part of the jobs (see `SharingOut`); a single device gets all of them in order.
    """

    def __init__(
        self, num_places: int = 1, *, share_prefix: bool = True, in_step: bool = False, strikes: int = STRIKES
    ) -> None:
        """`num_places`: number of devices; 0 if devices join and leave. `in_step`: their processes end together.

        `strikes`: process deaths that a job takes part in before it is suspected of causing them.
        """
        self._alive = set(range(num_places))
        self._is_shared = num_places != 1
        self._in_step = in_step
        self._asked: dict[int, _Waiting] = {}
        self._shares = SharingOut(num_places, share_prefix=share_prefix)
        self._entered: set[int] = set()
        """Jobs that a device has begun to compute."""
        self._suspects = Suspects(strikes)
        self._apart: int | None = None
        """The device that is computing the suspects of a trial and nothing else."""
        self._numbers, self._call_numbers = itertools.count(), itertools.count()

    @property
    def is_empty(self) -> bool:
        """Whether every job is answered."""
        return not self._asked

    def add(self, call: Call, jobs: Mapping[int, Job]) -> None:
        """Add the jobs of a call, by their positions in the call."""
        call_number = next(self._call_numbers)
        new: dict[int, Job] = {}
        for index, job in jobs.items():
            number = next(self._numbers)
            self._asked[number] = _Waiting(call, call_number, index, job)
            new[number] = job
        self._shares.add(new)

    def drop(self, call: Call) -> int | None:
        """Forget a call's unanswered jobs; returns the call's number in messages if there were any."""
        if not call.left:  # true of every call that ended normally: saves a search through all jobs
            return None
        gone = {number: asked.call_number for number, asked in self._asked.items() if asked.call is call}
        self._forget(gone)
        return next(iter(gone.values()), None)

    def to_send(self, rooms: Mapping[int, Room]) -> dict[int, Asked]:
        """Return the jobs that each of these devices is to compute now; they count as held by it."""
        given = self._trial(rooms)
        if self._suspects.trial is None:
            self._apart = None
        elif self._in_step or not self._is_shared:
            rooms = {}
        rooms = {place: room for place, room in rooms.items() if place != self._apart}
        if self._is_shared:
            given |= self._shares.hand_out(rooms)
        else:
            for place in rooms:
                given[place] = self._shares.unsent
                self._shares.hand_over(place, given[place])
        return {place: self._by_call(numbers) for place, numbers in given.items() if numbers}

    def entered(self, numbers: Iterable[int]) -> list[tuple[Call, list[int]]]:
        """Note that a process has begun to compute jobs; returns them by call and position."""
        known = [number for number in numbers if self._shares.is_held(number)]  # else its process has ended
        self._entered.update(known)
        self._shares.entered(known)
        begun: dict[int, tuple[Call, list[int]]] = {}
        for number in known:
            asked = self._asked[number]
            begun.setdefault(asked.call_number, (asked.call, []))[1].append(asked.index)
        return list(begun.values())

    def answered(self, done: Iterable[tuple[int, Completion]]) -> list[tuple[Call, Finished]]:
        """Record answers; returns them by call and position, without the answers to calls that were dropped."""
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

    def died(self, places: Collection[int], *, is_job_at_fault: bool) -> list[int]:
        """Record that the processes of devices have ended; the first ended by itself, and a job may have caused it.

        Returns the numbers of jobs that are to fail.
        """
        had = [number for place in places for number in self._shares.held(place)]
        failed = []
        if is_job_at_fault and had:
            begun = [number for number in had if number in self._entered]
            failed = self._suspects.died(begun or had, next(iter(places)))
        self._entered.difference_update(had)
        self._shares.remove(had)
        for place in places:
            self._shares.give_up(place)
        if self._apart in places:  # else the trial continues
            self._apart = None
        suspects = self._suspects.jobs
        self._shares.add({number: self._asked[number].job for number in had if number not in suspects})
        return failed

    def join(self, place: int) -> None:
        """Add a device; its number must be new."""
        self._alive.add(place)
        self._shares.join(place)

    def give_up(self, place: int) -> None:
        """Remove a device whose process has ended and is not replaced."""
        self._alive.discard(place)
        self._shares.leave(place)

    def is_on_trial(self, place: int) -> bool:
        """Whether a device computes, or may compute, suspects: then its death says nothing about the device."""
        return self._suspects.trial is not None and (place == self._apart or not self._is_shared)

    def clear(self) -> list[Call]:
        """Forget all jobs; returns the calls that had unanswered ones."""
        calls = {id(asked.call): asked.call for asked in self._asked.values()}
        self._forget(list(self._asked))
        return list(calls.values())

    def _trial(self, rooms: Mapping[int, Room]) -> dict[int, list[int]]:
        """Return the suspects to compute now, on a device that holds no other jobs."""
        trial = self._suspects.trial
        if trial is None:
            return {}
        busy = [place for place in self._alive if self._shares.held(place)]
        if self._apart is None or self._apart not in busy:
            others = self._alive - {trial.died_at} or self._alive  # on another device, to see which is at fault
            able = others & rooms.keys() if self._is_shared and not self._in_step else rooms.keys()
            self._apart = min(able, key=lambda place: (self._shares.tokens(place), place), default=None)
        if self._apart is None or (busy if self._in_step else self._apart in busy):
            return {}
        numbers = sorted(trial.jobs)
        self._shares.hand_over(self._apart, numbers)
        return {self._apart: numbers}

    def _by_call(self, numbers: Iterable[int]) -> Asked:
        by_call: Asked = {}
        for number in numbers:
            asked = self._asked[number]
            by_call.setdefault(asked.call_number, []).append((number, asked.job))
        return by_call

    def _forget(self, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        for number in numbers:
            del self._asked[number]
            self._entered.discard(number)
        self._shares.remove(numbers)
        self._suspects.ended(numbers)
