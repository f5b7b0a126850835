"""What is to be done with a lane's sequences when its sweep has ended."""

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
    """When it was begun to be scheduled, by `time.perf_counter`."""
    host_s: float
    """That this took."""
    num_sequences: int


class Track:
    """What waits for a lane's next sweep, and the one that is under way: nothing else of the lane changes meanwhile."""

    def __init__(self, number: int, scheduler: Scheduler) -> None:
        self.number = number
        self.scheduler = scheduler
        self.sweep: Scheduled | None = None
        """The one that is under way."""
        self._arriving: list[Sequence[Running]] = []
        self._leaving: list[Running] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.scheduler.is_idle and not self._arriving

    def add(self, sequences: Sequence[Running]) -> None:
        """Let sequences in, which came together, as soon as that may be."""
        if sequences:
            self._arriving.append(sequences)

    def drop(self, sequence: Running) -> None:
        """Have the lane do without a sequence, as soon as that may be."""
        self._leaving.append(sequence)

    def take_over(self, leave: Callable[[Running], bool]) -> None:
        """Let in and drop what is to be, between two sweeps.

        leave: lets a sequence be no longer in work; False where it was not any more.
        """
        for sequences in self._arriving:
            self.scheduler.add(sequences)
        left: Iterable[Running] = [sequence for sequence in self._leaving if leave(sequence)]
        if left:
            self.scheduler.drop(left)
        self._arriving, self._leaving = [], []
