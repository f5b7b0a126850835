"""The engines of this program, each in a process of its own, the first one of which may be started ahead of time."""

from __future__ import annotations

import atexit
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.planning.hardware import Memory
    from engine.policy import Policy
    from engine.workers.process import WorkerProcess
    from engine.workers.remote_engine import RemoteEngine


class EngineProcesses:
    """Starts engines; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: WorkerProcess | None = None

    def prepare(self) -> None:
        """Start a process for the next engine, which imports what it needs while others do, and waits."""
        from engine.workers.process import WorkerProcess

        with self._lock:
            if self._waiting is None:
                self._waiting = WorkerProcess()

    def memory(self, policy: Policy) -> Memory:
        """What memory a run under `policy` may use: asked of the next engine's process, not to touch a device here."""
        self.prepare()
        with self._lock:
            waiting = self._waiting
            assert waiting is not None
            try:
                return waiting.memory(policy)
            except BaseException:
                self._waiting = None
                waiting.kill()
                raise

    def load(self, path: str, policy: Policy, window: int | None = None) -> RemoteEngine:
        """Open a model in the process that waits, or in a new one; returns as `Engine.from_pretrained` does."""
        from engine.workers.remote_engine import RemoteEngine

        with self._lock:
            waiting, self._waiting = self._waiting, None
        return RemoteEngine(path, policy, window=window, process=waiting)

    def close(self) -> None:
        """End the process that waits."""
        with self._lock:
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.kill()


engine_processes = EngineProcesses()
"""Those of this process."""

atexit.register(engine_processes.close)
