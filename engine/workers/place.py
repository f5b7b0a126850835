"""The place of one device in an engine: its current worker process, and the record of those before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.workers.handing_out.sharing_out import Room
from engine.workers.messages import Open, Opened, Tells, Told
from engine.workers.process import WorkerProcess

_MOST_DEATHS = 3
"""Processes that may die in a row before all weights are in place or, with other devices, before a sweep has ended."""
_SWEEPS_AHEAD = 2
"""Sweeps for which a device is given work in advance, so that the next one can start, and its prefixes are known."""


class Place:
    """The worker process of a device and its state. Not thread-safe: the caller holds a lock of its own."""

    def __init__(self, number: int, opening: Open) -> None:
        """`number`: the device's position in the engine; `opening`: the message that opens the model."""
        self.number = number
        self.opening = opening
        self.process: WorkerProcess | None = None
        self.opened: Opened | None = None
        """What the current process has reported about its engine; None until the model is open."""
        self.is_complete = False
        """Whether a process has loaded all weights and sent everything that only this place is asked for."""
        self.num_starts = 0
        """Processes started since all weights were last in place."""
        self.num_deaths = 0
        """Deaths in a row with weights in place and no sweep in between."""
        self._num_processes = 0
        self.last_words = ""
        """The error that the process reported before it ended."""
        self.is_recalled = False
        """Whether the process is being ended because another process ended."""

    @property
    def device(self) -> str:
        """The device's name."""
        return str(self.opening.policy.device)

    @property
    def may_be_asked(self) -> bool:
        """Whether the model is open and a death of the process could be attributed.

        The first process may compute while weights are still loading; a later one gets no jobs before they are in
        place.
        """
        return self.opened is not None and (self.num_starts == 0 or self._num_processes == 1)

    @property
    def room(self) -> Room:
        """How much of the work sent to it may wait for its next sweeps; valid only when the model is open."""
        assert self.opened is not None
        limits = self.opened.plan.limits
        return Room(rows=_SWEEPS_AHEAD * limits.rows_per_sweep, jobs=_SWEEPS_AHEAD * limits.seats)

    def start(
        self,
        tell: Callable[[Place, WorkerProcess, Tells], None],
        ended: Callable[[Place, WorkerProcess, str], None],
        process: WorkerProcess | None = None,
    ) -> None:
        """Start a process, or use an idle one, and let it open the model; its messages are passed to `tell`."""
        self.num_starts += 1
        self._num_processes += 1
        self.opened, self.is_recalled = None, False
        process = self.process = process or WorkerProcess()
        process.listen(lambda told: tell(self, process, told), lambda how: ended(self, process, how))
        process.send(self.opening)

    def is_hopeless(self, *, is_alone: bool) -> bool:
        """Whether its processes have died too often; for an only place, just those without weights in place count."""
        return self.num_starts >= _MOST_DEATHS or (not is_alone and self.num_deaths >= _MOST_DEATHS)

    def condemn(self) -> None:
        """Give the device up as soon as its process has ended, because a new process would fail as well."""
        self.num_deaths = _MOST_DEATHS

    def become(self, index: int, count: int, weights: int | None, meeting: str | None) -> None:
        """Make the place member `index` of `count`, from its next process on."""
        member = self.opening.member
        assert member is not None
        if count == 1:
            self.opening = replace(self.opening, member=None)
        else:
            member = replace(member, index=index, count=count, weights=weights, meeting=meeting)
            self.opening = replace(self.opening, member=member)
        self.is_complete = False

    @property
    def is_first(self) -> bool:
        """Whether its process answers the questions that all processes would answer alike."""
        return self.opening.member is None or self.opening.member.index == 0

    def send(self, message: Told) -> None:
        """Send a message to the process, if there is one."""
        if self.process is not None:
            self.process.send(message)
