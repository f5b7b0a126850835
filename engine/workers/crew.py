"""The worker processes of an engine: started together, given up one by one, and the resources that they share."""

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
    """The places in use, the shared memory that holds their weights, and their rendezvous file.

    Not thread-safe: the caller holds a lock of its own during each call.
    """

    def __init__(self, openings: Sequence[Open], take: Take, ended: Ended, fail: Callable[[EngineError], None]) -> None:
        """`openings`: what is opened on each device; `take` and `ended` hear what processes tell, and of their end.

        `fail` hears why `ended` could not do what follows from that.
        """
        member = openings[0].member
        self.is_staged = member is not None and member.stages
        """Whether each process holds one stage of the model; only the first gets jobs, and all share its number."""
        self.places = [Place(0 if self.is_staged else number, opening) for number, opening in enumerate(openings)]
        """The places in use."""
        self.is_several = len(openings) > 1
        """Whether the engine began with more than one device."""
        self._take, self._died, self._fail = take, ended, fail
        self._weights: int | None = None
        self._meeting: Path | None = None

    @property
    def is_bound(self) -> bool:
        """Whether no process can continue without the others, because each holds a part of the weights."""
        member = self.places[0].opening.member
        return member is not None and member.is_bound

    @property
    def is_alone(self) -> bool:
        """Whether there is a single place, or all places together act as one device."""
        return self.is_staged or len(self.places) == 1

    @property
    def asked(self) -> list[Place]:
        """The places that jobs are sent to."""
        return self.places[:1] if self.is_staged else self.places

    @property
    def num_asked(self) -> int:
        """The number of places that jobs are sent to."""
        return len(self.asked)

    @property
    def is_open(self) -> bool:
        """Whether every process has opened the model."""
        return all(place.opened is not None for place in self.places)

    @property
    def is_waiting(self) -> bool:
        """Whether recalled processes have yet to end before all processes are started together."""
        return any(place.is_recalled for place in self.places)

    def start(self, processes: Iterable[WorkerProcess | None] = ()) -> None:
        """Start a process at every place, or use `processes`; shared memory and the rendezvous are created anew."""
        if self.is_several:
            self._make_shared()
        waiting = list(processes) or [None] * len(self.places)
        for place, process in zip(self.places, waiting, strict=True):
            place.start(self._take, self._ended, process)

    def start_at(self, place: Place) -> None:
        """Start a new process at a place whose process has ended."""
        place.start(self._take, self._ended)

    def start_the_dead(self) -> None:
        """Start a new process at every place that has none."""
        for place in [] if self.is_waiting else self.places:
            if place.process is None:
                self.start_at(place)

    def recall(self, culprit: Place) -> None:
        """End the processes other than that of `culprit`; start all again when the last one has ended."""
        for place in self.places:
            if place is not culprit and place.process is not None:
                place.is_recalled, place.opened = True, None
                place.process.kill()
        if not self.is_waiting:
            self.start()

    def take_recalled(self, place: Place) -> None:
        """Note that a recalled process has ended."""
        place.is_recalled, place.num_starts = False, max(0, place.num_starts - 1)  # it did not fail by itself
        if not self.is_waiting:
            self.start()

    def give_up(self, place: Place) -> None:
        """Remove a place whose process has ended; the others may continue only if the place was `is_complete`."""
        self.places.remove(place)

    def tell(self, message: Told) -> None:
        """Send a message to all processes."""
        for place in self.places:
            place.send(message)

    def kill(self) -> None:
        """Kill all processes."""
        for place in self.places:
            process, place.process = place.process, None
            if process is not None:
                process.kill()
        self._forget_shared()

    def part(self, comparing: Place | None) -> list[WorkerProcess]:
        """Ask all processes to end after the current sweep; kill those that compare or are opening a model.

        Their places handle no further messages. Returns the processes, for the caller to wait for.
        """
        closing = []
        is_torn = self.is_bound and not self.is_open  # no process would reach the end of a sweep
        for place in self.places:
            process, place.process = place.process, None
            if process is not None:
                closing.append(process)
                if is_torn or place is comparing or place.opened is None:
                    process.kill()  # its result is not needed
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
        elif hasattr(os, "memfd_create"):  # several devices are supported on Linux only
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
