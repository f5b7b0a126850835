"""Runs a command with a fault at a given moment: `python faulty_command.py COMMAND ...`, with a `Fault` in $FAULT.

It is a program of its own in a process group of its own. When the fault occurs, it writes the file `arrived`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PHASES = {"load": 1.0, "sweep": 0.3, "cache": 0.02, "metrics": 0.3, "report": 0.2, "answers": 0.05}
"""After the beginning of a phase, the most seconds until the fault comes; `answers` are those of `complete`."""
_TIMES = {"sweep": 12, "cache": 4, "metrics": 4, "answers": 12}
"""How often a phase begins in the tests' commands, about; once if it is not here."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A signal at a moment."""

    phase: str
    whom: str
    """`command` (its process alone), `group`, `engine` or `helper`."""
    number: int
    """Of the signal."""
    time: int
    """The phase's, from 1."""
    after_s: float
    """Seconds since its beginning."""

    @staticmethod
    def drawn(phase: str, whom: str, number: int, seed: int) -> Fault:
        """The fault of a seed."""
        dice = random.Random(f"{phase} {whom} {number} {seed}")
        after_s = dice.uniform(0, PHASES[phase])
        return Fault(phase=phase, whom=whom, number=number, time=dice.randint(1, _TIMES.get(phase, 1)), after_s=after_s)

    def as_text(self) -> str:
        """For the environment."""
        return json.dumps(asdict(self))


class _Armed:
    """Counts how often the phase has begun, and sends the signal."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._left = fault.time
        self.helpers: Any = None
        """Of the suite, once there are some."""

    def begin(self) -> None:
        self._left -= 1
        if self._left == 0:
            threading.Thread(target=self._happen, daemon=True).start()

    def _happen(self) -> None:
        time.sleep(self._fault.after_s)
        whom = {"command": [os.getpid()], "group": [-os.getpgid(0)]}.get(self._fault.whom)
        if self._fault.whom == "engine":
            whom = [pid for pid in noted(Path("workers")) if is_running(pid)][-1:]
        elif self._fault.whom == "helper":
            whom = [pid for pid in (self.helpers.pids if self.helpers else []) if is_running(pid)][-1:]
        for pid in whom or []:
            Path("arrived").touch()
            os.kill(pid, self._fault.number) if pid > 0 else os.killpg(-pid, self._fault.number)


def noted(file: Path) -> list[int]:
    """Process ids, one a line."""
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _arm(fault: Fault) -> None:
    from flexgen_helm.commands import report
    from flexgen_helm.commands.completion.answers import Answers
    from flexgen_helm.helm.request_cache import RequestCache
    from flexgen_helm.sweeps.runner import SweepRunner
    from flexgen_helm.workers.engine_processes import EngineProcesses
    from flexgen_helm.workers.helper_processes import HelperProcesses, Here

    armed = _Armed(fault)

    def before(owner: Any, name: str, is_it: Callable[..., bool] = lambda *args: True) -> None:
        do = getattr(owner, name)

        def doing(*args: Any, **named: Any) -> Any:
            if is_it(*args):
                armed.begin()
            return do(*args, **named)

        setattr(owner, name, doing)

    def finishes(side: Any, method: str, *_: Any) -> bool:
        return method == "finish"

    enter = HelperProcesses.__enter__

    def entering(self: HelperProcesses) -> HelperProcesses:
        armed.helpers = self
        return enter(self)

    HelperProcesses.__enter__ = entering  # type: ignore[method-assign]
    if fault.phase == "load":
        before(EngineProcesses, "load")
    elif fault.phase == "sweep":
        before(SweepRunner, "answered")
    elif fault.phase == "cache":
        before(RequestCache, "_write")
    elif fault.phase == "metrics":
        before(HelperProcesses, "start", finishes)
        before(Here, "start", finishes)
    elif fault.phase == "report":
        before(report, "write_report")
    else:
        before(Answers, "add")
        before(Answers, "sort")


def limit_memory() -> None:
    """Enter the control group that $GROUP names, and take no more address space beyond today's than $MORE_BYTES."""
    if group := os.environ.get("GROUP"):
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    if more := os.environ.get("MORE_BYTES"):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + int(more), now + int(more)))


def main() -> int:
    """Run the command."""
    os.setpgid(0, 0)
    limit_memory()
    from engine.workers import process
    from flexgen_helm.run import main
    from flexgen_helm.workers import helper_processes

    process.PROGRAM = "faulty_worker"
    if "HELPERS" in os.environ:  # as with three cores
        helper_processes.usable_cores = lambda: 3
    else:
        helper_processes.usable_cores = lambda: 1
    if fault := os.environ.get("FAULT"):
        _arm(Fault(**json.loads(fault)))
    return main(sys.argv[1:])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    sys.exit(main())
