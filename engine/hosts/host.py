"""The driver's interface to a host that runs an engine, and to a source of hosts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from engine.errors import EngineError
from engine.hosts.messages import HostTells, Opening
from engine.workers.packing import PackedJobs


class Host(Protocol):
    """An engine on another machine, controlled by messages. No method waits for the host, and none raises."""

    name: str
    """A name that no other host has at the same time; the replacement of a lost host may have the same."""

    def open(self, opening: Opening, tell: Callable[[HostTells], None], ended: Callable[[str], None]) -> None:
        """Begin to open the model; called first, and once.

        From then on `tell` gets every message in order, and at last `ended`, once, how the host ended, in any thread. A
        host sends a message (`Alive` if nothing else) every few seconds, else it counts as lost.
        """

    def ask(self, call: int, jobs: PackedJobs) -> None:
        """Run jobs of the call that has this number."""

    def drop(self, call: int) -> None:
        """Cancel everything unfinished of a call."""

    def leave(self) -> None:
        """End after the current sweep, whose completions are still sent."""

    def kill(self) -> None:
        """End at once, unless it has ended; its further messages are dropped."""


LossKind = Literal["died", "refused", "left"]
"""died: by itself, or silent for too long; refused: it cannot give the driver's answers; left: with notice."""

_TOLD = {"died": "is lost", "refused": "is refused", "left": "has left"}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How a host was lost."""

    kind: LossKind
    why: str
    has_swept: bool
    """Whether the host had completed a sweep."""

    def told(self, *, is_replaced: bool) -> str:
        """The words that a log message has after the host's name."""
        follows = "another one is started in its place" if is_replaced else "the others go on"
        return f"{_TOLD[self.kind]} ({self.why}); what it had not answered is asked again; {follows}"


class Supply(Protocol):
    """A source of hosts."""

    def begin(self, join: Callable[[Host], None], fail: Callable[[EngineError], None]) -> None:
        """Begin to bring hosts; returns at once.

        `join` adds a host; it may be called at any time, from any thread, also within `lost`. `fail` is called when
        there are no hosts and none will come.
        """

    def lost(self, host: Host, loss: Loss) -> bool:
        """Handle the loss of a host; returns whether another one replaces it."""

    def close(self) -> None:
        """Bring no more hosts and release all resources; all hosts have ended."""
