"""Jobs that have no answer yet, and which of them a device has (pure)."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from engine.asking.pending import Call, Finished
from engine.job import Completion, Job
from engine.workers.handing_out.sharing_out import Room, SharingOut
from engine.workers.handing_out.suspects import STRIKES, Suspects

Asked = dict[int, list[tuple[int, Job]]]
"""Jobs with their numbers, by the number of their call."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    call: Call
    call_number: int
    index: int
    job: Job


class Ledger:
    """Keeps every job until it is answered, by a number of its own; what a process dies with is asked again.

    Of several devices each gets a part of the jobs (see `SharingOut`); one gets all of them, as they come.
    """

    def __init__(
        self, num_places: int = 1, *, share_prefix: bool = True, in_step: bool = False, strikes: int = STRIKES
    ) -> None:
        """`num_places`: devices; 0 where they come and go. `in_step`: their processes live and die together.

        `strikes`: deaths that a job took part in until it is suspected of them.
        """
        self._alive = set(range(num_places))
        self._is_shared = num_places != 1
        self._in_step = in_step
        self._asked: dict[int, _Waiting] = {}
        self._shares = SharingOut(num_places, share_prefix=share_prefix)
        self._entered: set[int] = set()
        """Those that have been begun to compute."""
        self._suspects = Suspects(strikes)
        self._apart: int | None = None
        """The device that computes suspects by themselves."""
        self._numbers, self._call_numbers = itertools.count(), itertools.count()

    @property
    def is_empty(self) -> bool:
        """Whether everything is answered."""
        return not self._asked

    def add(self, call: Call, jobs: Mapping[int, Job]) -> None:
        """Take in a call's jobs, by their positions there."""
        call_number = next(self._call_numbers)
        new: dict[int, Job] = {}
        for index, job in jobs.items():
            number = next(self._numbers)
            self._asked[number] = _Waiting(call, call_number, index, job)
            new[number] = job
        self._shares.add(new)

    def drop(self, call: Call) -> int | None:
        """Forget what of a call is not answered; the number that processes know it by, if anything was left."""
        if not call.left:  # as of each that has ended: all that others wait for would be looked through
            return None
        gone = {number: asked.call_number for number, asked in self._asked.items() if asked.call is call}
        self._forget(gone)
        return next(iter(gone.values()), None)

    def to_send(self, rooms: Mapping[int, Room]) -> dict[int, Asked]:
        """What each of these devices may compute now; it has that from now on. Others have no process just now."""
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
        """Take in that a process has begun to compute jobs; returns them by call and position."""
        known = [number for number in numbers if self._shares.is_held(number)]  # else its process has ended meanwhile
        self._entered.update(known)
        self._shares.entered(known)
        begun: dict[int, tuple[Call, list[int]]] = {}
        for number in known:
            asked = self._asked[number]
            begun.setdefault(asked.call_number, (asked.call, []))[1].append(asked.index)
        return list(begun.values())

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

    def died(self, places: Collection[int], *, is_job_at_fault: bool) -> list[int]:
        """Take in that devices' processes have ended, the first one's by itself, and may have been ended by a job.

        Returns the jobs that are to fail.
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
        if self._apart in places:  # else a trial goes on there
            self._apart = None
        suspects = self._suspects.jobs
        self._shares.add({number: self._asked[number].job for number in had if number not in suspects})
        return failed

    def join(self, place: int) -> None:
        """Take in that there is another device; its number must be new."""
        self._alive.add(place)
        self._shares.join(place)

    def give_up(self, place: int) -> None:
        """Take in that a device, whose process has ended, gets no other one."""
        self._alive.discard(place)
        self._shares.leave(place)

    def is_on_trial(self, place: int) -> bool:
        """Whether what a device computes are suspects, or it may have been: its death tells nothing of the device."""
        return self._suspects.trial is not None and (place == self._apart or not self._is_shared)

    def clear(self) -> list[Call]:
        """Forget everything; returns the calls that had something left."""
        calls = {id(asked.call): asked.call for asked in self._asked.values()}
        self._forget(list(self._asked))
        return list(calls.values())

    def _trial(self, rooms: Mapping[int, Room]) -> dict[int, list[int]]:
        """The suspects that are to be computed now, by the device that has nothing else meanwhile."""
        trial = self._suspects.trial
        if trial is None:
            return {}
        busy = [place for place in self._alive if self._shares.held(place)]
        if self._apart is None or self._apart not in busy:
            others = self._alive - {trial.died_at} or self._alive  # another device, if only one of them is at fault
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
