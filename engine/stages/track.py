"""Changes to a lane's sequences that wait until its current sweep has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from engine.schedule.scheduler import Scheduler
from engine.schedule.segment import Segment
from engine.schedule.sequence import Sequence as Running


@dataclass(kw_only=True)
class Scheduled:
    """A sweep that has been scheduled."""

    batches: list[list[Segment]]
    begun: float
    """When its scheduling began, by `time.perf_counter`."""
    host_s: float
    """Seconds that its scheduling took."""
    num_sequences: int


class Track:
    """A lane's sweep in progress, and the changes that wait for its end: the lane changes only between sweeps."""

    def __init__(self, number: int, scheduler: Scheduler) -> None:
        self.number = number
        self.scheduler = scheduler
        self.sweep: Scheduled | None = None
        """The sweep in progress."""
        self._arriving: list[Sequence[Running]] = []
        self._leaving: list[Running] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return self.scheduler.is_idle and not self._arriving

    def add(self, sequences: Sequence[Running]) -> None:
        """Add sequences that were submitted together, before the lane's next sweep."""
        if sequences:
            self._arriving.append(sequences)

    def drop(self, sequence: Running) -> None:
        """Remove a sequence from the lane, before its next sweep."""
        self._leaving.append(sequence)

    def take_over(self, leave: Callable[[Running], bool]) -> None:
        """Apply the waiting changes; called between two sweeps.

        leave: marks a sequence as no longer in progress; returns False if it had ended already.
        """
        for sequences in self._arriving:
            self.scheduler.add(sequences)
        left: Iterable[Running] = [sequence for sequence in self._leaving if leave(sequence)]
        if left:
            self.scheduler.drop(left)
        self._arriving, self._leaving = [], []
