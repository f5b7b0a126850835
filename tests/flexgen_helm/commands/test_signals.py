"""Protects: Ctrl-C, SIGTERM and SIGUSR1 end a command wherever they come, once, with the right code and one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
SAID = {130: "interrupted;", 143: "terminated;", 75: "not finished, its time was up;"}

IN_A_DESTRUCTOR = """
import os, signal, sys, time
from flexgen_helm import run

class Garbage:
    def __del__(self):
        os.kill(os.getpid(), {number})
        for _ in range(1000):
            pass  # where the exception is raised, and dropped

def work(command, rest):
    Garbage()
    time.sleep({seconds})
    print("to the end")
    return 0

run._run_command = work
sys.exit(run.main(["sweep"]))
"""

IN_WHAT_RAISES_ITS_OWN = """
import os, sys
from flexgen_helm import run

def work(command, rest):
    try:
        os.kill(os.getpid(), {number})
        for _ in range(1000):
            pass
    except BaseException:
        raise SystemError("a result with an exception set") from None

run._run_command = work
sys.exit(run.main(["sweep"]))
"""

IN_WHAT_SWALLOWS_IT = """
import os, sys
from flexgen_helm import run

def work(command, rest):
    try:
        os.kill(os.getpid(), {number})
        for _ in range(1000):
            pass
    except BaseException:
        return 0

run._run_command = work
sys.exit(run.main(["sweep"]))
"""


def ended(program: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    usual = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have it ignored
    return subprocess.run(
        [sys.executable, "-c", usual + program], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("program", [IN_A_DESTRUCTOR, IN_WHAT_RAISES_ITS_OWN, IN_WHAT_SWALLOWS_IT])
def test_a_signal_is_not_lost(program: str, number: signal.Signals) -> None:
    done = ended(program.format(number=int(number), seconds=20))
    assert done.returncode == CODES[number], done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"flexgen-helm: error: {SAID[CODES[number]]}")
    assert "to the end" not in done.stdout


def test_other_faults_of_destructors_are_shown_as_ever() -> None:
    program = """
import sys
from flexgen_helm import run

class Garbage:
    def __del__(self):
        raise ValueError("shown")

run._run_command = lambda command, rest: [Garbage(), 0][1]
sys.exit(run.main(["sweep"]))
"""
    done = ended(program)
    assert done.returncode == 0
    assert "ValueError: shown" in done.stderr
