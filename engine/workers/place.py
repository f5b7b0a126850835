"""A device's place among those that run an engine: its process, which may be another one after each death."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.workers.handing_out.sharing_out import Room
from engine.workers.messages import Open, Opened, Tells, Told
from engine.workers.process import WorkerProcess

_MOST_DEATHS = 3
"""Processes in a row that may die before all weights are in place or, where others go on, before a sweep has ended."""
_SWEEPS_AHEAD = 2
"""That a device is given work for: the one after the next is there when the next begins, and so are its prefixes."""


class Place:
    """The process of a device, and what is known of it. Whoever uses it holds a lock of its own."""

    def __init__(self, number: int, opening: Open) -> None:
        """`number`: among the devices of an engine; `opening`: what its process is told to open."""
        self.number = number
        self.opening = opening
        self.process: WorkerProcess | None = None
        self.opened: Opened | None = None
        """What the process of now has told of its engine, as soon as that is open."""
        self.is_complete = False
        """Whether a process has brought all weights, and told all that only it is asked for."""
        self.num_starts = 0
        """Processes since weights were last in place."""
        self.num_deaths = 0
        """In a row, with weights in place and without a sweep between them."""
        self._num_processes = 0
        self.last_words = ""
        """What the process said of its end."""
        self.is_recalled = False
        """Whether its process is to end because of another's end."""

    @property
    def device(self) -> str:
        """The device's name."""
        return str(self.opening.policy.device)

    @property
    def may_be_asked(self) -> bool:
        """Whether its engine is open, and it is known who would be at fault if its process ended.

        The first process may compute while weights still arrive; a later one is given nothing before they are in place.
        """
        return self.opened is not None and (self.num_starts == 0 or self._num_processes == 1)

    @property
    def room(self) -> Room:
        """How much of what it has been given may wait for its next sweeps; only when it is open."""
        assert self.opened is not None
        limits = self.opened.plan.limits
        return Room(rows=_SWEEPS_AHEAD * limits.rows_per_sweep, jobs=_SWEEPS_AHEAD * limits.seats)

    def start(
        self,
        tell: Callable[[Place, WorkerProcess, Tells], None],
        ended: Callable[[Place, WorkerProcess, str], None],
        process: WorkerProcess | None = None,
    ) -> None:
        """Start a process, or take one that waits, and let it open the model; what it tells is passed on."""
        self.num_starts += 1
        self._num_processes += 1
        self.opened, self.is_recalled = None, False
        process = self.process = process or WorkerProcess()
        process.listen(lambda told: tell(self, process, told), lambda how: ended(self, process, how))
        process.send(self.opening)

    def is_hopeless(self, *, is_alone: bool) -> bool:
        """Whether its process has ended too often; where it is the only place, all that counts is that weights came."""
        return self.num_starts >= _MOST_DEATHS or (not is_alone and self.num_deaths >= _MOST_DEATHS)

    def condemn(self) -> None:
        """Be hopeless as soon as its process has ended: no other one would do better."""
        self.num_deaths = _MOST_DEATHS

    def become(self, index: int, count: int, weights: int | None, meeting: str | None) -> None:
        """Be the engine's member `index` of `count` from the next start on."""
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
        """Whether its process is the one that is asked what all of them would say."""
        return self.opening.member is None or self.opening.member.index == 0

    def send(self, message: Told) -> None:
        """Say something to the process, if there is one."""
        if self.process is not None:
            self.process.send(message)
