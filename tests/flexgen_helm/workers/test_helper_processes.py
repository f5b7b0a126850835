"""Protects: tasks in other processes are done whatever becomes of those, and nothing outlives the one that asked."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from errands import Errands, cannot

from engine.errors import EngineError
from flexgen_helm.workers import helper_processes
from flexgen_helm.workers.helper_processes import HelperProcesses, Here, num_helpers

ROOT = Path(__file__).resolve().parents[3]


def done(helpers: HelperProcesses | Here, *tasks: tuple[Any, ...]) -> list[Any]:
    """What tasks come to, in their order; all are started at once."""
    found: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    for number, (method, *args) in enumerate(tasks):
        helpers.start(method, *args, then=lambda outcome, number=number: found.put((number, outcome)))  # type: ignore[misc]
    return [outcome for _, outcome in sorted((found.get() for _ in tasks), key=lambda pair: pair[0])]


def test_tasks_are_done_in_other_processes_as_they_would_be_here(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="helm")
    tasks = [("says", "a", "b"), ("fails", "value"), ("fails", "odd"), ("says", "c")]
    here = done(Here(Errands()), *tasks)
    logged = [record.getMessage() for record in caplog.records]
    caplog.clear()
    with HelperProcesses(2, "json", Errands) as helpers:
        there = done(helpers, *tasks)
        assert done(helpers, ("pid",), ("pid",))[0] in helpers.pids
        assert os.getpid() not in helpers.pids
        assert done(helpers, ("ignores",)) == [[True] * 3]
        assert helpers.num_free == 2
    assert there[0] == here[0] == "a b"
    assert there[3] == here[3] == "c"
    assert (type(there[1]), str(there[1])) == (type(here[1]), str(here[1]))
    assert str(there[2]) == f"Odd: {here[2]}"  # of a class that cannot be read again
    assert "in fails" in there[1].__notes__[0]
    assert sorted(record.getMessage() for record in caplog.records) == sorted(logged) == ["said a", "said c"]


def test_what_cannot_be_made_there_fails_every_task() -> None:
    with HelperProcesses(1, "json", cannot) as helpers:
        found = done(helpers, ("pid",), ("pid",))
    assert [str(error) for error in found] == ["it cannot be made"] * 2


def test_a_task_whose_process_dies_is_done_again_and_one_that_kills_each_fails_alone(tmp_path: Path) -> None:
    with HelperProcesses(2, "json", Errands) as helpers:
        tasks = [("dies", 1, tmp_path / "once"), ("dies", 9, tmp_path / "always"), ("says", "a"), ("says", "b")]
        once, always, *others = done(helpers, *tasks)
    assert (once, others) == ("done", ["a", "b"])
    assert isinstance(always, EngineError)
    assert "ended 2 times (killed by signal 9)" in str(always)
    assert len((tmp_path / "always").read_text()) == 2


UNGUARDED = """
import os, sys, time
print("begins", flush=True)
from errands import Errands
from flexgen_helm.workers.helper_processes import HelperProcesses
with HelperProcesses(2, "json", Errands) as helpers:
    for _ in range(2):
        helpers.start("says", "x", then=lambda outcome: None)
    while len(helpers.pids) < 2 or helpers.num_free < 2:
        time.sleep(0.01)
    print(*helpers.pids, flush=True)
    time.sleep(600)
"""


def test_they_end_with_their_parent_and_begin_nothing_of_its_program(tmp_path: Path) -> None:
    """After SIGKILL; and a script without a guard is not run again in each of them."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parents[1])])
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "begins\n"
        pids = [int(pid) for pid in program.stdout.readline().split()]
        assert len(pids) == 2
        program.send_signal(signal.SIGKILL)
        program.wait()
        assert program.stdout.read() == ""  # which ends when all who could write there have
    end = time.monotonic() + 60
    while any(map(is_there, pids)):
        assert time.monotonic() < end, "a process has outlived its parent"
        time.sleep(0.05)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("cores", "tasks", "free_gb", "number"),
    [(2, 50, 64, 0), (16, 1, 64, 0), (16, 57, 64, 15), (16, 4, 64, 4), (16, 57, 3, 3)],
)
def test_there_are_as_many_as_are_worth_it(
    cores: int, tasks: int, free_gb: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper_processes, "usable_cores", lambda: cores)
    monkeypatch.setattr(helper_processes, "free_host_memory", lambda: free_gb << 30)
    assert num_helpers(tasks) == number
