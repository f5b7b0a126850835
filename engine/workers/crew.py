"""The processes of an engine's devices: started together, given up one by one, and what all of them share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from engine.errors import EngineError, named
from engine.workers.messages import Close, Open, Tells, Told
from engine.workers.place import Place
from engine.workers.process import WorkerProcess

Take = Callable[[Place, WorkerProcess, Tells], None]
Ended = Callable[[Place, WorkerProcess, str], None]


class Crew:
    """Places that are in use, the shared memory of their weights, and where they meet.

    Whoever uses it holds a lock of its own while it does.
    """

    def __init__(self, openings: Sequence[Open], take: Take, ended: Ended, fail: Callable[[EngineError], None]) -> None:
        """`openings`: what is opened on each device; `take` and `ended` hear what processes tell, and of their end.

        `fail` hears why `ended` could not do what follows from that.
        """
        member = openings[0].member
        self.is_staged = member is not None and member.stages
        """Whether each has a stage of the model: the first is asked, and its number is that of all."""
        self.places = [Place(0 if self.is_staged else number, opening) for number, opening in enumerate(openings)]
        """Those in use."""
        self.is_several = len(openings) > 1
        """Whether there was more than one device at first."""
        self._take, self._died, self._fail = take, ended, fail
        self._weights: int | None = None
        self._meeting: Path | None = None

    @property
    def is_bound(self) -> bool:
        """Whether no process can go on without the others, since each has a part of the weights."""
        member = self.places[0].opening.member
        return member is not None and member.is_bound

    @property
    def is_alone(self) -> bool:
        """Whether there is one place, or all stand for one device."""
        return self.is_staged or len(self.places) == 1

    @property
    def asked(self) -> list[Place]:
        """Those that jobs are given to."""
        return self.places[:1] if self.is_staged else self.places

    @property
    def num_asked(self) -> int:
        """How many these are."""
        return len(self.asked)

    @property
    def is_open(self) -> bool:
        """Whether the engine is open everywhere."""
        return all(place.opened is not None for place in self.places)

    @property
    def is_waiting(self) -> bool:
        """Whether processes are to end, so that all can be started together."""
        return any(place.is_recalled for place in self.places)

    def start(self, processes: Iterable[WorkerProcess | None] = ()) -> None:
        """Start a process at every place, or take `processes`; what they share is made anew."""
        if self.is_several:
            self._make_shared()
        waiting = list(processes) or [None] * len(self.places)
        for place, process in zip(self.places, waiting, strict=True):
            place.start(self._take, self._ended, process)

    def start_at(self, place: Place) -> None:
        """Start a process in place of one that has ended."""
        place.start(self._take, self._ended)

    def start_the_dead(self) -> None:
        """Start a process wherever there is none."""
        for place in [] if self.is_waiting else self.places:
            if place.process is None:
                self.start_at(place)

    def recall(self, culprit: Place) -> None:
        """End all processes, which cannot go on without that of `culprit`; when the last one has ended, start anew."""
        for place in self.places:
            if place is not culprit and place.process is not None:
                place.is_recalled, place.opened = True, None
                place.process.kill()
        if not self.is_waiting:
            self.start()

    def take_recalled(self, place: Place) -> None:
        """Take in that a recalled process has ended."""
        place.is_recalled, place.num_starts = False, max(0, place.num_starts - 1)  # it has not failed by itself
        if not self.is_waiting:
            self.start()

    def give_up(self, place: Place) -> None:
        """Use a place no longer, which has no process; others may go on only if it was `is_complete`."""
        self.places.remove(place)

    def tell(self, message: Told) -> None:
        """Say something to all processes."""
        for place in self.places:
            place.send(message)

    def kill(self) -> None:
        """End all processes at once."""
        for place in self.places:
            process, place.process = place.process, None
            if process is not None:
                process.kill()
        self._forget_shared()

    def part(self, comparing: Place | None) -> list[WorkerProcess]:
        """Let all processes end after the sweep at hand; those that compare layers, or are being opened, at once.

        Nothing is heard of them at their places any more. Returns them, to be waited for.
        """
        closing = []
        is_torn = self.is_bound and not self.is_open  # none would come to the end of a sweep
        for place in self.places:
            process, place.process = place.process, None
            if process is not None:
                closing.append(process)
                if is_torn or place is comparing or place.opened is None:
                    process.kill()  # nothing of what it does is kept
                process.send(Close())
        self._forget_shared()
        return closing

    def _ended(self, place: Place, process: WorkerProcess, how: str) -> None:
        try:
            self._died(place, process, how)
        except Exception as error:  # there is too little memory for another process, say; who waits is told
            told = f"the engine's process ended ({how}), and the engine cannot go on: {named(error)}"
            self._fail(EngineError(told))

    def _make_shared(self) -> None:
        self._forget_shared()
        if self.is_bound and len(self.places) > 1:
            self._meeting = Path(tempfile.mkdtemp(prefix="flexgen-helm-")) / "meeting"
        elif hasattr(os, "memfd_create"):  # where there are several devices, there is Linux
            self._weights = os.memfd_create("flexgen-helm-weights")
        meeting = None if self._meeting is None else str(self._meeting)
        for index, place in enumerate(self.places):
            place.become(index, len(self.places), self._weights, meeting)

    def _forget_shared(self) -> None:
        if self._meeting is not None:
            self._meeting.unlink(missing_ok=True)
            self._meeting.parent.rmdir()
        if self._weights is not None:
            os.close(self._weights)
        self._meeting = self._weights = None
