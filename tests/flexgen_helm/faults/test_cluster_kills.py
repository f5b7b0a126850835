"""Protects: a suite on a cluster whose workers and driver are killed again and again leaves what it leaves undisturbed.

FAULT_SUBJECTS and FAULT_QUESTIONS say how large the suite is, FAULT_KILLS how many workers are killed, one whenever
another part of the requests is answered. The driver is killed once, in the middle.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from ray_processes import workers_of
from ray_suites import RaySuite, make_subjects
from sweeping import differences

pytestmark = pytest.mark.faults

SUBJECTS = int(os.environ.get("FAULT_SUBJECTS", "6"))
QUESTIONS = int(os.environ.get("FAULT_QUESTIONS", "25"))
KILLS = int(os.environ.get("FAULT_KILLS", "2"))
SEED = int(os.environ.get("FAULT_SEED", "0"))
WAIT_S = 3600


def test_killed_workers_and_a_killed_driver_lose_nothing(helm_data: Path, tiny_llama: Path, tmp_path: Path) -> None:
    make_subjects(tmp_path / "scenarios", SUBJECTS, QUESTIONS)
    alone = RaySuite(tmp_path / "alone", tmp_path / "scenarios", tiny_llama)
    alone.run()
    wanted = alone.keys()
    suite = RaySuite(tmp_path / "ray", tmp_path / "scenarios", tiny_llama, "--ray", "local", "--workers", "4")
    marks = [len(wanted) * (number + 1) // (KILLS + 2) for number in range(KILLS + 1)]
    dice, until, driver_at = random.Random(SEED), time.monotonic() + WAIT_S, len(marks) // 2
    killed, drivers, driver = 0, 1, suite.begin()
    while driver.poll() is None:
        assert time.monotonic() < until, suite.said()
        time.sleep(0.05)
        if killed == len(marks) or len(suite.keys()) < marks[killed]:
            continue
        if killed == driver_at:
            driver.kill()
            driver.wait()
            driver, drivers, killed = suite.begin(), drivers + 1, killed + 1
        elif workers := workers_of(suite.mark):
            os.kill(dice.choice(workers), signal.SIGKILL)
            killed += 1
    assert driver.returncode == 0, suite.said()
    assert (killed, drivers) == (len(marks), 2)
    assert differences(suite.suite, alone.suite) == []
    assert suite.keys() == wanted, "no request is lost, or twice in the cache"
    assert workers_of(suite.mark) == [], "no worker outlives its driver"
