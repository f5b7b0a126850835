"""Starts the engines of this program in worker processes; the first process may be started ahead of time."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from engine.errors import UnsupportedError

if TYPE_CHECKING:
    from engine.checkpoint.description import ModelDescription
    from engine.hosts.hosts_engine import HostsEngine
    from engine.job import Job
    from engine.planning.sharing import Resources
    from engine.policy import Policy
    from engine.workers.process import WorkerProcess
    from engine.workers.remote_engine import RemoteEngine
    from flexgen_helm.workers.running_engine import Cluster


class EngineProcesses:
    """Starts engines in worker processes; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[WorkerProcess] = []
        """Idle processes for the next engine; the first one is for its first device."""
        self.cluster: Cluster | None = None
        """The cluster that runs the model instead of this machine's devices, if one is used."""
        self._has_loaded = False
        self._found: dict[tuple[object, ...], Resources] = {}
        """The resources last found, by the parts of a policy that they depend on."""

    def prepare(self) -> None:
        """Start an idle process for the first engine, unless one was loaded already; it imports what it needs."""
        from engine.workers.process import WorkerProcess

        with self._lock:
            if not self._waiting and not self._has_loaded:
                self._waiting = [WorkerProcess()]

    def check(self, description: ModelDescription, policy: Policy) -> Callable[[], None]:
        """Begin to check a model like `check_model`, in the idle process.

        Call the returned function before any other method: it waits for the result and raises what was found. Without
        an idle process, that function checks the model in this process.
        """
        with self._lock:
            process = self._waiting[0] if self._waiting else None
        if process is None:
            from engine.opening import check_model

            return partial(check_model, description, policy)
        found: Future[None] = Future()

        def ask() -> None:
            with self._lock:
                try:
                    process.check(description, policy)
                    found.set_result(None)
                except BaseException as error:
                    found.set_exception(error)

        threading.Thread(target=ask, name="flexgen-check", daemon=True).start()
        return found.result

    def resources(self, policy: Policy) -> Resources:
        """Return what a run under `policy` may use now, as found by the next engine's processes, not by this one.

        Raises `EngineError` if devices are absent, do not go together, or are busy.
        """
        self._check_is_here()
        from engine.planning.sharing import Resources, Sharing
        from engine.workers.process import WorkerProcess
        from engine.workers.seats import seats_for

        with self._lock:
            waiting, self._waiting = self._waiting or [WorkerProcess()], []
            seats = seats_for(policy, waiting)
            processes = [each for each in seats.processes if each is not None]
            try:
                memory = seats.memory or processes[0].memory(seats.policies[0])
            except BaseException:
                processes[0].kill()
                raise
            self._waiting = processes
            sharing = Sharing(count=len(seats.policies), gather=seats.gather, stages=seats.stages)
            found = self._found[_asked(policy)] = Resources(memory=memory, sharing=sharing)
            return found

    def last_resources(self, policy: Policy) -> Resources:
        """Like `resources`, but return what was found last, if anything: engines loaded since then use part of it."""
        self._check_is_here()
        with self._lock:
            found = self._found.get(_asked(policy))
        return found or self.resources(policy)

    def _check_is_here(self) -> None:
        if self.cluster is not None:
            raise UnsupportedError("the model runs on workers, each of which determines its own resources")

    def load(self, path: str, policy: Policy, window: int | None = None) -> RemoteEngine:
        """Open a model in the idle processes, or in new ones; returns when `Engine.from_pretrained` would."""
        from engine.workers.remote_engine import RemoteEngine

        with self._lock:
            waiting, self._waiting, self._has_loaded = self._waiting, [], True
        return RemoteEngine(path, policy, window=window, waiting=waiting)

    def spread(self, model: str, policy: Policy, window: int | None, jobs: Sequence[Job], share: float) -> HostsEngine:
        """Open a model on the cluster's machines, for work of which `jobs` are a `share`; ends idle processes here.

        `model` is a hub id or directory that exists on those machines too.
        """
        assert self.cluster is not None
        self.close()
        return self.cluster.load(model, policy, window, jobs, share)

    def close(self) -> None:
        """End the idle processes."""
        for each in self._waiting:
            each.kill()  # so that no thread waits for them while it holds the lock
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.kill()


def _asked(policy: Policy) -> tuple[object, ...]:
    """The parts of a policy that decide what resources may be used."""
    return policy.device, policy.gather_weights, policy.stages, policy.gpu_memory, policy.cpu_memory, policy.offload_dir


engine_processes = EngineProcesses()
"""The engine processes of this program."""

atexit.register(engine_processes.close)
