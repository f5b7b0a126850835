"""What the driver knows of a host."""

from __future__ import annotations

from engine.hosts.host import Host
from engine.hosts.messages import HostOpened
from engine.workers.handing_out.sharing_out import Room
from engine.workers.packing import PackedCompletions

SWEEPS_AHEAD = 2
"""That a host is given work for: the one after the next is there when the next begins, and so are its prefixes."""


class Standing:
    """A host among those of a driver, which holds its lock whenever it uses this."""

    def __init__(self, number: int, host: Host, now: float) -> None:
        """`number`: that no other host has had."""
        self.number = number
        self.host = host
        self.opened: HostOpened | None = None
        self.last_heard = now
        self.has_swept = False
        self.is_leaving = False
        """Whether it gets nothing more."""
        self.last_words = ""
        """What it said of its end."""
        self.digest: str | None = None
        """Of its weights, once it `has_vouched` for them."""
        self.has_vouched = False
        self.is_trusted = False
        """Whether its weights are known to be the driver's."""
        self.unused: list[PackedCompletions] = []
        """What it has told before that was known."""

    @property
    def may_be_asked(self) -> bool:
        """Whether it is open, and stays."""
        return self.opened is not None and not self.is_leaving

    @property
    def room(self) -> Room:
        """How much of what it has been given may wait for its next sweeps; only when it is open."""
        assert self.opened is not None
        sweep = self.opened.sweep
        return Room(rows=SWEEPS_AHEAD * sweep.rows, jobs=SWEEPS_AHEAD * sweep.jobs)
