"""Helper processes for parts of a command's work, each with one task at a time."""

from __future__ import annotations

import logging
import multiprocessing
import queue
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from engine.errors import EngineError
from engine.memory.cores import usable_cores
from engine.planning.hardware import free_host_memory
from flexgen_helm.workers.helper_program import Told, work

_FEWEST_CORES = 3
"""With fewer cores, a helper would only take time from the engine and from the command itself."""
_BYTES_EACH = 1 << 30
"""The free memory needed for each process: what it imports is shared, what a large scenario reads is not."""
_MOST_DEATHS = 2
"""The number of processes that may die at the same task, which then fails."""

Then = Callable[[Any], None]
"""Takes what a task returns, or the exception that it raised; called in any thread: it must be fast and not fail."""


@dataclass(eq=False)
class _Task:
    method: str
    args: tuple[Any, ...]
    then: Then
    deaths: list[str] = field(default_factory=list)


def num_helpers(num_tasks: int) -> int:
    """The number of processes worth starting for so many tasks: none where one process does as well."""
    cores = usable_cores()
    if cores < _FEWEST_CORES or num_tasks < 2:
        return 0
    return max(0, min(cores - 1, num_tasks, free_host_memory() // _BYTES_EACH))


def prepare_helpers(module: str) -> None:
    """Start the server from which helpers are forked, which imports `module` in the meantime.

    Nothing is started if there are too few cores for helpers.
    """
    if usable_cores() >= _FEWEST_CORES:
        _preload(module)


class HelperProcesses:
    """A number of processes, each with an object of its own whose methods are called there, one at a time.

    Tasks are not queued here: start at most `num_free`. A task whose process dies is repeated in another process; if
    that dies too, the task fails with an `EngineError`. A context manager, at whose end the processes end. They also
    end with this process, however it ends.
    """

    def __init__(self, number: int, module: str, make: Callable[[], Any]) -> None:
        """`make` creates the object in each process; it and all arguments are pickled. `module` imports what they need.

        If `make` raises, every task raises the same.
        """
        _preload(module)
        self._make = make
        self._inbox: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_busy = 0
        self._is_closed = False
        self._processes: dict[int, _Process] = {}
        """The processes by slot."""
        self._slots = [
            threading.Thread(target=self._serve, args=(slot,), name=f"flexgen-helper-{slot}", daemon=True)
            for slot in range(number)
        ]

    def __enter__(self) -> HelperProcesses:
        for slot in self._slots:
            slot.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._is_closed = True
            for process in self._processes.values():
                process.kill()  # the result of a task in progress is not needed
        for _ in self._slots:
            self._inbox.put(None)
        for slot in self._slots:
            slot.join()

    @property
    def num_free(self) -> int:
        """The number of tasks that can be started now."""
        with self._lock:
            return len(self._slots) - self._num_busy

    @property
    def pids(self) -> list[int]:
        """The ids of the current processes."""
        with self._lock:
            return [process.pid for process in self._processes.values() if process.pid is not None]

    def start(self, method: str, *args: Any, then: Then) -> None:
        """Call a method of the object in a process that is free."""
        with self._lock:
            self._num_busy += 1
        self._inbox.put(_Task(method, args, then))

    def _serve(self, slot: int) -> None:
        """Give one process its tasks, and replace it when it dies."""
        line: Connection | None = None
        while (task := self._inbox.get()) is not None:
            outcome: Any = None
            while True:
                try:
                    line = line or self._start(slot)
                    line.send((task.method, task.args))
                    told: Told = line.recv()
                except (EOFError, OSError):
                    if line is not None:
                        line.close()
                        line = None
                    if self._is_closed:
                        return
                    task.deaths.append(self._end_of(slot))
                    if len(task.deaths) < _MOST_DEATHS:
                        continue
                    outcome = EngineError(
                        f"the process that did this ended {len(task.deaths)} times ({task.deaths[-1]}); there may be "
                        "too little memory for it"
                    )
                except Exception as error:  # arguments that cannot be pickled
                    outcome = error
                else:
                    outcome = told.outcome
                    for name, level, text in told.logged:
                        logging.getLogger(name).log(level, "%s", text)
                break
            with self._lock:
                self._num_busy -= 1
            task.then(outcome)
        if line is not None:
            line.close()

    def _start(self, slot: int) -> Connection:
        ours, theirs = multiprocessing.Pipe()
        levels = {name: logging.getLogger(name).getEffectiveLevel() for name in ("helm", "flexgen_helm", "engine")}
        process = _Process(target=work, args=(theirs, self._make, levels), name=f"flexgen-helper-{slot}")
        with _without_main_module():
            process.start()  # waits until the fork server has imported everything
        with self._lock:
            self._processes[slot] = process
            if self._is_closed:
                process.kill()
        theirs.close()
        return ours

    def _end_of(self, slot: int) -> str:
        """How the process of a slot has ended."""
        process = self._processes.get(slot)
        if process is None:
            return "it could not be started"
        process.kill()  # in case it has only closed its pipe
        process.join()
        code = process.exitcode or 0
        return f"exit code {code}" if code >= 0 else f"killed by signal {-code}"


class Here:
    """The same interface without processes: a task is executed by `start`, in the calling thread."""

    num_free = 1

    def __init__(self, found: Any) -> None:
        """`found` is the object whose methods are called."""
        self._found = found

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: there is no process to end."""

    def start(self, method: str, *args: Any, then: Then) -> None:
        """Call a method of the object."""
        try:
            outcome = getattr(self._found, method)(*args)
        except Exception as error:
            outcome = error
        then(outcome)


# The server from which helpers are forked


class _Process(ForkServerProcess):
    """A fork of the fork server, which has no threads, locks or devices of this process."""


_starting = threading.Lock()


def _preload(module: str) -> None:
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    with _without_main_module():
        forkserver.ensure_running()


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Keep new processes from importing the program's main module again.

    A main module without a `__name__` guard would start its work again.
    """
    with _starting:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
