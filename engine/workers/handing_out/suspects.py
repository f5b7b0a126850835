"""Finds the job that ends its process, so that it fails alone (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

STRIKES = 2
"""Deaths of processes that a job took part in, wherever, until it is suspected."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Jobs that are computed without anybody else."""

    jobs: tuple[int, ...]
    died_at: int
    """The device whose process they ended at last: another one shows whether it was the device's own fault."""


class Suspects:
    """Jobs that were computed when their process died, and which of them may be computed now.

    All may, until some have seen several deaths. Those are then computed apart from all others: halves of them, halves
    of the half that dies, at last one alone. One that ends its process alone, too, is to fail.
    """

    def __init__(self, strikes: int = STRIKES) -> None:
        """`strikes`: deaths that a job took part in until it is suspected."""
        self._strikes = strikes
        self._deaths: Counter[int] = Counter()
        self._trials: list[Trial] = []
        """To be held one after the other."""

    @property
    def trial(self) -> Trial | None:
        """The jobs that may only be computed by themselves, now; None: there are none."""
        return self._trials[0] if self._trials else None

    @property
    def group(self) -> frozenset[int] | None:
        """Those of the trial of now; None: all jobs may be computed."""
        return frozenset(self._trials[0].jobs) if self._trials else None

    @property
    def jobs(self) -> set[int]:
        """Of all trials that are to come."""
        return {number for trial in self._trials for number in trial.jobs}

    def died(self, at_work: Collection[int], place: int = 0) -> list[int]:
        """Take in that a device's process died while it computed these; returns the jobs that are to fail."""
        if self._trials and at_work and set(at_work) <= set(self._trials[0].jobs):
            jobs = self._trials[0].jobs
            if len(jobs) == 1:
                self.ended(jobs)
                return list(jobs)
            self._trials[:1] = _halves(jobs, place)
            return []
        self._deaths.update(at_work)
        suspected = sorted(number for number in at_work if self._deaths[number] >= self._strikes)
        self._trials += _halves(tuple(suspected), place)
        return []

    def ended(self, numbers: Iterable[int]) -> None:
        """Take in that jobs were answered, have failed or were dropped."""
        gone = set(numbers)
        for number in gone:
            del self._deaths[number]
        if self._trials:
            left = (replace(each, jobs=tuple(n for n in each.jobs if n not in gone)) for each in self._trials)
            self._trials = [trial for trial in left if trial.jobs]


def _halves(jobs: tuple[int, ...], place: int) -> list[Trial]:
    middle = (len(jobs) + 1) // 2
    return [Trial(jobs=half, died_at=place) for half in (jobs[:middle], jobs[middle:]) if half]
