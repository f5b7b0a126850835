"""The process that a cluster starts on a host: it serves an engine, and is asked for what that tells."""

from __future__ import annotations

import os
import platform
import queue
from collections.abc import Callable

from engine.hosts.messages import Alive, HostTells, Opening
from engine.hosts.serving import Running, Serving
from engine.workers.packing import PackedJobs
from flexgen_helm.workers.cluster.versions import versions

Heard = list[HostTells | None]
"""Messages in their order; None is the last thing that is told."""


class HostActor:
    """A worker. Ray calls `hear` in one thread and the other methods, one after the other, in another one."""

    def __init__(self, open_engine: Callable[[Opening], Running]) -> None:
        """`open_engine` opens what the driver wants opened, on the devices that the cluster gives this process."""
        self._inbox: queue.SimpleQueue[HostTells | None] = queue.SimpleQueue()
        self._serving = Serving(open_engine, self._inbox.put)

    def __repr__(self) -> str:
        """What Ray's dashboard and logs call it."""
        return f"flexgen-helm worker on {platform.node()} ({os.environ.get('CUDA_VISIBLE_DEVICES') or 'cpu'})"

    def hello(self) -> tuple[str, str, dict[str, str]]:
        """The host's name, Ray's id of it, and the versions that it runs."""
        import ray

        return platform.node(), ray.get_runtime_context().get_node_id(), versions()

    def open(self, opening: Opening) -> None:
        """Begin to open a model."""
        self._serving.open(opening)

    def ask(self, call: int, jobs: PackedJobs) -> None:
        """Run jobs."""
        self._serving.ask(call, jobs)

    def drop(self, call: int) -> None:
        """Drop what of a call has not ended."""
        self._serving.drop(call)

    def leave(self) -> None:
        """End after the sweep at hand."""
        self._serving.leave()
        self._inbox.put(None)

    def hear(self, wait_s: float) -> Heard:
        """All that there is to be told; waits up to `wait_s` for something, and then says that it is alive."""
        try:
            heard: Heard = [self._inbox.get(timeout=wait_s)]
        except queue.Empty:
            return [Alive()]
        while not self._inbox.empty():
            heard.append(self._inbox.get())
        return heard
