"""Finds the job that ends its process, so that it fails alone (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

STRIKES = 2
"""Process deaths that a job takes part in, on any device, before it is suspected of causing them."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Jobs that are computed apart from all others, to see whether one of them ends its process."""

    jobs: tuple[int, ...]
    died_at: int
    """The device whose process they ended last: running them on another shows whether the device was at fault."""


class Suspects:
    """The jobs that were being computed when their process died, and which jobs may be computed now.

    All jobs may be computed until some have taken part in `strikes` deaths. Those are then bisected apart from all
    others: in halves, then in halves of the half whose process dies, until one is computed alone. A job that ends its
    process alone is to fail.
    """

    def __init__(self, strikes: int = STRIKES) -> None:
        """Start without suspects. `strikes`: deaths that a job takes part in before it is suspected."""
        self._strikes = strikes
        self._deaths: Counter[int] = Counter()
        self._trials: list[Trial] = []
        """The trials to run, one after the other."""

    @property
    def trial(self) -> Trial | None:
        """The trial to run now, whose jobs must be computed apart from all others; None if there is no trial."""
        return self._trials[0] if self._trials else None

    @property
    def group(self) -> frozenset[int] | None:
        """The jobs of the trial to run now; None if all jobs may be computed."""
        return frozenset(self._trials[0].jobs) if self._trials else None

    @property
    def jobs(self) -> set[int]:
        """The jobs of all trials."""
        return {number for trial in self._trials for number in trial.jobs}

    def died(self, at_work: Collection[int], place: int = 0) -> list[int]:
        """Record that the process of device `place` died while computing `at_work`; returns the jobs to fail."""
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
        """Note that jobs were answered, have failed or were dropped."""
        gone = set(numbers)
        for number in gone:
            del self._deaths[number]
        if self._trials:
            left = (replace(each, jobs=tuple(n for n in each.jobs if n not in gone)) for each in self._trials)
            self._trials = [trial for trial in left if trial.jobs]


def _halves(jobs: tuple[int, ...], place: int) -> list[Trial]:
    middle = (len(jobs) + 1) // 2
    return [Trial(jobs=half, died_at=place) for half in (jobs[:middle], jobs[middle:]) if half]
