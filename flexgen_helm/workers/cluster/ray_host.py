"""The driver's end of a worker in a Ray cluster."""

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
"""Ray's concurrency group of the method that waits for messages, so that the other methods need not wait for it."""
HEAR_S = 5.0
"""Seconds that it waits for a message before it returns `Alive`."""


class RayHost:
    """Implements `Host` over a Ray actor whose `hello` has been received."""

    def __init__(self, ray: Any, actor: Any, name: str, slot: Slot, node: str) -> None:
        """`node`: Ray's id of the machine."""
        self.name, self.node = name, node
        self.is_leaving = False
        self.slot = slot
        self._ray, self._actor = ray, actor
        self._tell: Callable[[HostTells], None] = lambda told: None
        self._ended: Callable[[str], None] = lambda how: None
        self.is_over = False
        """Whether its further messages are dropped."""

    def open(self, opening: Opening, tell: Callable[[HostTells], None], ended: Callable[[str], None]) -> None:
        """See `Host.open`."""
        self._tell, self._ended = tell, ended
        self._do(lambda: self._actor.open.remote(opening))

    def ask(self, call: int, jobs: PackedJobs) -> None:
        """See `Host.ask`."""
        self._do(lambda: self._actor.ask.remote(call, jobs))

    def drop(self, call: int) -> None:
        """See `Host.drop`."""
        self._do(lambda: self._actor.drop.remote(call))

    def leave(self) -> None:
        """See `Host.leave`."""
        self.is_leaving = True
        self._do(lambda: self._actor.leave.remote())

    def kill(self) -> None:
        """See `Host.kill`."""
        self.is_over = True
        with suppress(Exception):  # an actor that cannot be killed has usually ended already
            self._ray.kill(self._actor)

    def be_drained(self) -> None:
        """Report on the host's behalf that its machine is about to be taken away."""
        self.is_leaving = True
        self._tell(Leaving(why="its machine is being drained"))

    def hear(self) -> Any:
        """Request the actor's next messages; returns Ray's reference to them."""
        return self._actor.hear.options(concurrency_group=HEARING).remote(HEAR_S)

    def take(self, heard: Any) -> None:
        """Pass the messages of a completed reference of `hear` to the driver."""
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
        """Record that the actor has ended."""
        if not self.is_over:
            self.is_over = True
            self._ended(how)

    def _do(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # `hear` reports the end of an actor; this is a failure to reach it
            self._tell(Fault(error=EngineError(f"Ray does not pass on what it is told: {one_line(error)}")))


def how_ended(error: Exception) -> str:
    """Return why an actor has ended: the relevant line of Ray's long message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if "is dead because" in line), lines[-1] if lines else type(error).__name__)
    said = said.partition("is dead because")[2].strip() or said
    return one_line(Exception(said.partition(" Some common causes")[0]))
