"""Finds the job that ends its process, so that it fails alone (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

_STRIKES = 2
"""Deaths of processes that a job took part in, until it is suspected."""


class Suspects:
    """Jobs that were computed when their process died, and which of them may be computed now.

    All may, until some have seen two deaths. Those are then computed apart from all others: halves of them, halves of
    the half that dies, at last one alone. One that ends its process alone, too, is to fail.
    """

    def __init__(self) -> None:
        self._deaths: Counter[int] = Counter()
        self._groups: list[list[int]] = []
        """To be computed one group after the other, each without anybody else."""

    @property
    def group(self) -> frozenset[int] | None:
        """The jobs that may be computed now; None: all."""
        return frozenset(self._groups[0]) if self._groups else None

    def died(self, at_work: Collection[int]) -> list[int]:
        """Take in that a process died while it computed these; returns the jobs that are to fail."""
        if self._groups:
            group = self._groups[0]
            if len(group) == 1:
                self.ended(group)
                return group
            self._groups[:1] = _halves(group)
            return []
        self._deaths.update(at_work)
        self._groups = _halves(sorted(number for number in at_work if self._deaths[number] >= _STRIKES))
        return []

    def ended(self, numbers: Iterable[int]) -> None:
        """Take in that jobs were answered, have failed or were dropped."""
        gone = set(numbers)
        for number in gone:
            del self._deaths[number]
        if self._groups:
            groups = ([number for number in group if number not in gone] for group in self._groups)
            self._groups = [group for group in groups if group]


def _halves(numbers: list[int]) -> list[list[int]]:
    middle = (len(numbers) + 1) // 2
    return [half for half in (numbers[:middle], numbers[middle:]) if half]
