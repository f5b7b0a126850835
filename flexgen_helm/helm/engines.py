"""The engines of this program: one per model directory and policy, loaded when first needed, closed at exit."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from helm.common.hierarchical_logger import hexception, hlog, htrack_block

from engine.checkpoint.description import ModelDescription, describe, with_window
from engine.checkpoint.identity.result import Identity, check_beside_weights, identity_beside_weights, result_settings
from engine.checkpoint.identity.weight_digest import weights_digest
from engine.checkpoint.opened_weights import OpenedWeights
from engine.errors import EngineError, named
from engine.job import Job
from engine.policy import Policy
from engine.schedule.timing import SweepTiming
from flexgen_helm.helm.batcher import Batcher, Done
from flexgen_helm.planning.auto_policy import choose
from flexgen_helm.planning.estimate import Estimate
from flexgen_helm.workers.engine_guard import EngineGuard
from flexgen_helm.workers.engine_processes import engine_processes
from flexgen_helm.workers.running_engine import RunningEngine

_Opened = tuple[OpenedWeights, Identity]

Observer = Callable[["RunningEngine", SweepTiming], None]
"""Called in the engine's thread after each sweep, with the engine; must be quick."""


Load = Callable[[str, Policy, int | None], RunningEngine]
"""Opens an engine for a model directory and a policy, with a window that overrides the model's own."""


class Served:
    """One model under one policy: described without its weights, which load when the first job needs them.

    It is thread-safe. After a failure, later calls fail at once with the same error.
    """

    def __init__(
        self, registry: EngineRegistry, description: ModelDescription, policy: Policy, window: int | None, name: str
    ) -> None:
        self._name = name
        self.description = with_window(description, window)
        self._window = window
        self.policy = policy
        self.batcher = Batcher(self.stream)
        self._registry = registry
        self._lock = threading.Lock()
        self._identifying = threading.Lock()
        """Held while the identity is computed, which may take as long as reading the weight files."""
        self._identity: Identity | None = None
        self._engine: RunningEngine | None = None
        self._estimate: Estimate | None = None
        """The estimate of the jobs that the engine was loaded for, until they have been run."""
        self._failure: EngineError | None = None
        self._num_users = 0
        self._opened: _Opened | None = None

    @property
    def identity(self) -> Identity:
        """Everything of the model and policy that can change a result (`result_identity`).

        It includes every byte of the weight files: unless their digest is stored from an earlier start, this waits
        until the engine has read them, or reads them itself if no engine does.
        """
        with self._identifying:
            identity = self._identity
            if identity is None:
                source, rest = opened = self._open()
                digest = self._digest_of_engine()
                if digest is None:
                    digest = weights_digest(Path(self.description.path), source)
                    source.check()  # the files may have been modified after an engine had read them
                identity = {"weights": digest, **rest}
                with self._lock:
                    if self._opened is opened:  # otherwise it was forgotten meanwhile
                        self._identity = identity
            return identity

    @property
    def known_identity(self) -> Identity | None:
        """`identity` if it has been computed already; does not wait. A process without an engine is given it."""
        return self._identity

    @known_identity.setter
    def known_identity(self, identity: Identity) -> None:
        self._identity = identity

    def _digest_of_engine(self) -> str | None:
        """Return the engine's digest; None if no engine reads the weight files, or it was closed before the end."""
        engine = self._engine
        try:
            return None if engine is None else engine.weights_digest()
        except EngineError:
            if self._engine is engine:
                raise
            return None  # answers of the last sweep before an early end are still to be stored

    @property
    def settings(self) -> Identity:
        """The part of `identity` that is no digest and is known at once."""
        return result_settings(self.description, self.policy)

    def check_weights(self) -> None:
        """Raise `EngineError` if weights were overwritten since they were opened: answers belong to no identity."""
        if self._opened is not None:
            self._opened[0].check()

    def _open(self) -> _Opened:
        """Open the weight files, and compute the rest of the identity before anything is read for the engine."""
        with self._lock:
            if self._opened is None:
                path = self.description.path
                beside = identity_beside_weights(path, self.policy)
                self._opened = OpenedWeights(Path(path)), beside  # last: nothing would close them if that raised
            return self._opened

    def stream(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """Run jobs, loading the engine if need be; raises `EngineError` for a fault of the engine only."""
        for finished in self.sweeps(jobs):
            yield from finished

    def sweeps(self, jobs: Sequence[Job], observe: Observer | None = None) -> Iterator[list[Done]]:
        """`stream`, but all that a sweep finishes at once; `observe` sees the sweeps while this call runs."""
        with self.running(jobs) as engine:
            started, seconds = time.perf_counter(), 0.0
            estimate, self._estimate = self._estimate, None
            if observe is not None:
                engine.observer = partial(observe, engine)
            try:
                for finished in engine.sweeps(jobs):
                    seconds = time.perf_counter() - started
                    yield [Done(index=index, completion=completion, seconds=seconds) for index, completion in finished]
                if estimate is not None:
                    least = estimate.seconds
                    hlog(f"{len(jobs)} requests took {seconds:.1f} s; at least {least:.1f} s ({least / seconds:.0%})")
            except EngineError:
                raise
            except Exception as error:
                raise _as_engine_error(f"the engine failed on {self.description.path}", error) from error
            finally:
                if observe is not None:
                    engine.observer = None

    @contextmanager
    def running(self, jobs: Sequence[Job], share: float = 1.0) -> Iterator[RunningEngine]:
        """Yield the engine, loaded if necessary for work of which `jobs` are a `share`; it does not count as idle."""
        with self._registry.loading:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            engine = self._engine
            if engine is None:
                self._registry.close_idle()
                engine = self._engine = self._load(jobs, share)
            with self._lock:
                self._num_users += 1
        try:
            yield engine  # `close` may have closed it meanwhile; then it raises
        finally:
            with self._lock:
                self._num_users -= 1

    def _load(self, jobs: Sequence[Job], share: float) -> RunningEngine:
        """Load the engine, with placement for work of which `jobs` are a `share` if the policy is `auto`."""
        path = self.description.path
        try:
            with htrack_block(f"Loading {path}"):
                chosen = choose(path, self.description.dtype, self.policy, jobs, engine_processes.resources, share)
                if chosen.note:
                    hlog(chosen.note)
                self._estimate = chosen.estimate if share == 1.0 else None
                source, rest = self._open()
                if engine_processes.cluster is None:
                    engine: RunningEngine = self._registry.load(path, chosen.policy, self._window)
                else:
                    engine = engine_processes.spread(self._name, self.policy, self._window, jobs, share)
                try:  # the engine may have read other files than those of the identity
                    source.check_names()
                    check_beside_weights(rest, path, self.policy)
                except BaseException:
                    engine.close()
                    raise
                return engine
        except EngineError as error:
            self._failure = error
        except Exception as error:
            self._failure = _as_engine_error(f"{self.description.path} cannot be loaded", error)
        raise self._failure

    def close(self) -> None:
        """Close the engine if one is loaded; a later job loads it again."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def forget(self) -> None:
        """Close the engine and the weight files; the files are opened again when the identity is needed."""
        self.close()
        with self._lock:
            if self._opened is not None:
                self._opened[0].close()
            self._opened = self._identity = None  # not waiting for the thread that computes the identity

    @property
    def is_idle(self) -> bool:
        """Whether no jobs run on it now."""
        with self._lock:
            return self._num_users == 0


class EngineRegistry:
    """Returns the same `Served` for a model and policy to all callers.

    Before it loads an engine, it closes those that are idle, because each uses all the memory that it found free.
    """

    def __init__(self, load: Load = engine_processes.load) -> None:
        self.load = load
        self.loading = threading.Lock()
        """Held while an engine loads; a second one would measure memory that the first is about to take."""
        self._lock = threading.Lock()
        self.guard = EngineGuard()
        self._served: dict[tuple[str, Policy, int | None], Served] = {}
        self._described: dict[str, ModelDescription | EngineError] = {}

    def served(self, model: str, policy: Policy, window: int | None = None) -> Served:
        """The `Served` of a hub id or directory; raises `EngineError` for an unusable model.

        window: the maximum number of positions of a sequence, in place of the model's own.
        """
        with self._lock:
            if model not in self._described:
                try:
                    self._described[model] = describe(model)
                except EngineError as error:
                    self._described[model] = error
            description = self._described[model]
            if isinstance(description, EngineError):
                raise description.with_traceback(None)
            key = (os.path.realpath(description.path), policy, window)
            if key not in self._served:
                self._served[key] = Served(self, description, policy, window, model)
            return self._served[key]

    def close_idle(self) -> None:
        """Close the engines that run no jobs; the caller holds `loading`."""
        for served in self._everyone():
            if served.is_idle:
                served.close()

    def close(self) -> None:
        """Close all engines and forget what is known of the models."""
        for served in self._everyone():
            served.forget()
        with self._lock:
            self._served.clear()
            self._described.clear()

    def _everyone(self) -> list[Served]:
        with self._lock:
            return list(self._served.values())


def _as_engine_error(what: str, error: Exception) -> EngineError:
    hexception(error)
    return EngineError(f"{what}: {named(error)}")


engines = EngineRegistry()
"""The registry of this process: HELM builds clients concurrently and without a lock, so they meet here."""

atexit.register(engines.close)
