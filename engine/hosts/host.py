"""A host that runs an engine somewhere, as the driver sees it, and where such hosts come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from engine.errors import EngineError
from engine.hosts.messages import HostTells, Opening
from engine.workers.packing import PackedJobs


class Host(Protocol):
    """An engine on some machine, asked by messages. No method waits for the other end, and none fails."""

    name: str
    """A word of its own among all hosts; one that comes in place of a lost one may have the same."""

    def open(self, opening: Opening, tell: Callable[[HostTells], None], ended: Callable[[str], None]) -> None:
        """Begin to open the model; the first thing that is asked.

        From then on `tell` hears each message in its order, and `ended` at last, once, how it has ended, in whatever
        thread. There is a message (`Alive` if no other) every few seconds, else the host is taken for lost.
        """

    def ask(self, call: int, jobs: PackedJobs) -> None:
        """Run jobs of a call, which has this number."""

    def drop(self, call: int) -> None:
        """Drop what of a call has not ended."""

    def leave(self) -> None:
        """End after the sweep at hand, whose completions are told."""

    def kill(self) -> None:
        """End at once, unless it has ended; nothing that it tells is heard any more."""


LossKind = Literal["died", "refused", "left"]
"""By itself or by silence; because it cannot answer as the driver would; with notice."""

_TOLD = {"died": "is lost", "refused": "is refused", "left": "has left"}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How a host was lost."""

    kind: LossKind
    why: str
    has_swept: bool
    """Whether a sweep had ended there."""

    def told(self, *, is_replaced: bool) -> str:
        """What a log says of it behind the host's name."""
        follows = "another one is started in its place" if is_replaced else "the others go on"
        return f"{_TOLD[self.kind]} ({self.why}); what it had not answered is asked again; {follows}"


class Supply(Protocol):
    """Where hosts come from."""

    def begin(self, join: Callable[[Host], None], fail: Callable[[EngineError], None]) -> None:
        """Begin to bring hosts; returns at once.

        `join` takes one in at any time, from any thread, also within `lost`. `fail` says that none is there and that
        none will come.
        """

    def lost(self, host: Host, loss: Loss) -> bool:
        """Take in that a host is lost; whether another one comes in its place."""

    def close(self) -> None:
        """Bring no more, and give everything back; all hosts have ended."""
