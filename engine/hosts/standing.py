"""The driver's record of a host."""

from __future__ import annotations

from engine.hosts.host import Host
from engine.hosts.messages import HostOpened
from engine.workers.handing_out.sharing_out import Room
from engine.workers.packing import PackedCompletions

SWEEPS_AHEAD = 2
"""Sweeps for which a host is given work in advance, so that the next one can start, and its prefixes are known."""


class Standing:
    """A host and its state. Not thread-safe: the driver holds its lock during each use."""

    def __init__(self, number: int, host: Host, now: float) -> None:
        """`number`: one that no other host of the driver has had."""
        self.number = number
        self.host = host
        self.opened: HostOpened | None = None
        self.last_heard = now
        self.has_swept = False
        self.is_leaving = False
        """Whether it gets no more jobs."""
        self.last_words = ""
        """The error or reason that the host reported before it ended."""
        self.digest: str | None = None
        """The digest of its weights; valid once it `has_vouched` for them."""
        self.has_vouched = False
        self.is_trusted = False
        """Whether its weights are known to be the driver's."""
        self.unused: list[PackedCompletions] = []
        """Completions that it sent before its weights were known."""

    @property
    def may_be_asked(self) -> bool:
        """Whether it has opened the model and is not leaving."""
        return self.opened is not None and not self.is_leaving

    @property
    def room(self) -> Room:
        """How much of the work sent to it may wait for its next sweeps; valid only when the model is open."""
        assert self.opened is not None
        sweep = self.opened.sweep
        return Room(rows=SWEEPS_AHEAD * sweep.rows, jobs=SWEEPS_AHEAD * sweep.jobs)
