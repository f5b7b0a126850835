"""A worker in a cluster, as the driver sees it: an actor of Ray."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from engine.errors import EngineError, one_line
from engine.hosts.messages import HostTells, Leaving, Opening
from engine.workers.messages import Fault
from engine.workers.packing import PackedJobs
from flexgen_helm.workers.cluster.slots import Slot

HEARING = "hear"
"""Ray's group of the method that waits for something to be told, so that the others need not wait for it."""
HEAR_S = 5.0
"""That it waits before it says that the host is alive."""


class RayHost:
    """Implements `Host` over an actor that has said who it is."""

    def __init__(self, ray: Any, actor: Any, name: str, slot: Slot, node: str) -> None:
        """`node`: Ray's id of the machine."""
        self.name, self.node = name, node
        self.is_leaving = False
        self.slot = slot
        self._ray, self._actor = ray, actor
        self._tell: Callable[[HostTells], None] = lambda told: None
        self._ended: Callable[[str], None] = lambda how: None
        self.is_over = False
        """Whether nothing that it tells is heard any more."""

    def open(self, opening: Opening, tell: Callable[[HostTells], None], ended: Callable[[str], None]) -> None:
        """As `Host.open`."""
        self._tell, self._ended = tell, ended
        self._do(lambda: self._actor.open.remote(opening))

    def ask(self, call: int, jobs: PackedJobs) -> None:
        """As `Host.ask`."""
        self._do(lambda: self._actor.ask.remote(call, jobs))

    def drop(self, call: int) -> None:
        """As `Host.drop`."""
        self._do(lambda: self._actor.drop.remote(call))

    def leave(self) -> None:
        """As `Host.leave`."""
        self.is_leaving = True
        self._do(lambda: self._actor.leave.remote())

    def kill(self) -> None:
        """As `Host.kill`."""
        self.is_over = True
        with suppress(Exception):  # that it cannot be told may only mean that it is gone
            self._ray.kill(self._actor)

    def be_drained(self) -> None:
        """Say for it that its machine is about to go."""
        self.is_leaving = True
        self._tell(Leaving(why="its machine is being drained"))

    def hear(self) -> Any:
        """Ray's reference to what it tells next."""
        return self._actor.hear.options(concurrency_group=HEARING).remote(HEAR_S)

    def take(self, heard: Any) -> None:
        """Tell the driver what a reference of `hear` holds, which is there."""
        try:
            messages = self._ray.get(heard)
        except Exception as error:
            self.end(how_ended(error))
            return
        for message in messages:
            if self.is_over:
                return
            if message is None:
                self.end("it has closed")
            else:
                self._tell(message)

    def end(self, how: str) -> None:
        """Take in that the actor has ended."""
        if not self.is_over:
            self.is_over = True
            self._ended(how)

    def _do(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # `hear` says what has become of an actor; this is of the way to it
            self._tell(Fault(error=EngineError(f"Ray does not pass on what it is told: {one_line(error)}")))


def how_ended(error: Exception) -> str:
    """Why an actor has ended, of Ray's many lines the one that says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if "is dead because" in line), lines[-1] if lines else type(error).__name__)
    said = said.partition("is dead because")[2].strip() or said
    return one_line(Exception(said.partition(" Some common causes")[0]))
