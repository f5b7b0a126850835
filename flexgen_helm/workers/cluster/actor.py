"""The Ray actor on each host: it serves an engine and returns the messages for the driver."""

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
"""Messages in order; None is the last one."""


class HostActor:
    """A worker. Ray calls `hear` in one thread, and the other methods, one after the other, in another thread."""

    def __init__(self, open_engine: Callable[[Opening], Running]) -> None:
        """`open_engine` opens the model of an `Opening` on the devices that the cluster assigns to this process."""
        self._inbox: queue.SimpleQueue[HostTells | None] = queue.SimpleQueue()
        self._serving = Serving(open_engine, self._inbox.put)

    def __repr__(self) -> str:
        """The name in Ray's dashboard and logs."""
        return f"flexgen-helm worker on {platform.node()} ({os.environ.get('CUDA_VISIBLE_DEVICES') or 'cpu'})"

    def hello(self) -> tuple[str, str, dict[str, str]]:
        """Return the host's name, Ray's id of the node, and the installed versions."""
        import ray

        return platform.node(), ray.get_runtime_context().get_node_id(), versions()

    def open(self, opening: Opening) -> None:
        """Begin to open a model."""
        self._serving.open(opening)

    def ask(self, call: int, jobs: PackedJobs) -> None:
        """Run jobs of a call."""
        self._serving.ask(call, jobs)

    def drop(self, call: int) -> None:
        """Cancel everything unfinished of a call."""
        self._serving.drop(call)

    def leave(self) -> None:
        """End after the current sweep."""
        self._serving.leave()
        self._inbox.put(None)

    def hear(self, wait_s: float) -> Heard:
        """Return all messages that wait for the driver; after `wait_s` seconds without one, return `Alive`."""
        try:
            heard: Heard = [self._inbox.get(timeout=wait_s)]
        except queue.Empty:
            return [Alive()]
        while not self._inbox.empty():
            heard.append(self._inbox.get())
        return heard
