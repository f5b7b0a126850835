"""The engines of this program, in processes of their own, the first one of which may be started ahead of time."""

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
    """Starts engines; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[WorkerProcess] = []
        """Those for the next engine; the first is of its first device."""
        self.cluster: Cluster | None = None
        """The machines that engines are spread over, in place of this one's devices."""
        self._has_loaded = False
        self._found: dict[tuple[object, ...], Resources] = {}
        """By what of a policy they depend on, as they were found last."""

    def prepare(self) -> None:
        """Start a process for the first engine, if none was loaded yet: it imports what it needs, and waits."""
        from engine.workers.process import WorkerProcess

        with self._lock:
            if not self._waiting and not self._has_loaded:
                self._waiting = [WorkerProcess()]

    def check(self, description: ModelDescription, policy: Policy) -> Callable[[], None]:
        """Begin to check a model as `check_model` does, in the process that waits.

        What is returned waits for the end, and raises what was found; call it before anything else is asked here. Where
        no process waits, it checks the model in this one.
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
        """What a run under `policy` may use now: asked of the next engine's processes, not to touch a device here.

        Raises `EngineError` where its devices are not here, do not go together, or are busy.
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
        """As `resources`, but as they were found last, if ever: an engine that was loaded since has taken of them."""
        self._check_is_here()
        with self._lock:
            found = self._found.get(_asked(policy))
        return found or self.resources(policy)

    def _check_is_here(self) -> None:
        if self.cluster is not None:
            raise UnsupportedError("the model runs on workers: what they may use is found there")

    def load(self, path: str, policy: Policy, window: int | None = None) -> RemoteEngine:
        """Open a model in the processes that wait, or in new ones; returns as `Engine.from_pretrained` does."""
        from engine.workers.remote_engine import RemoteEngine

        with self._lock:
            waiting, self._waiting, self._has_loaded = self._waiting, [], True
        return RemoteEngine(path, policy, window=window, waiting=waiting)

    def spread(self, model: str, policy: Policy, window: int | None, jobs: Sequence[Job], share: float) -> HostsEngine:
        """Open a model on the machines of `cluster`, for work of which `jobs` are a `share`; nothing waits here then.

        `model` is a hub id or directory that they have, too.
        """
        assert self.cluster is not None
        self.close()
        return self.cluster.load(model, policy, window, jobs, share)

    def close(self) -> None:
        """End the processes that wait."""
        for each in self._waiting:
            each.kill()  # so that nobody waits for them with the lock
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.kill()


def _asked(policy: Policy) -> tuple[object, ...]:
    """What of a policy decides what may be used."""
    return policy.device, policy.gather_weights, policy.stages, policy.gpu_memory, policy.cpu_memory, policy.offload_dir


engine_processes = EngineProcesses()
"""Those of this process."""

atexit.register(engine_processes.close)
