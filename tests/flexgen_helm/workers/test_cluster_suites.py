"""Protects: a suite on a Ray cluster leaves what it leaves on this machine alone; interrupted, it leaves no worker."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from ray_processes import workers_of
from ray_suites import RaySuite, make_subjects
from sweeping import differences

from flexgen_helm.sweeps.record import read_record

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenarios(helm_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mmlu") / "scenarios"
    make_subjects(folder, num_subjects=6, num_questions=25)
    return folder


@pytest.fixture(scope="module")
def alone(scenarios: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RaySuite:
    """The suite on this machine."""
    suite = RaySuite(tmp_path_factory.mktemp("alone") / "here", scenarios, tiny_llama)
    suite.run()
    return suite


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_scores_are_equal_for_any_number_of_workers(
    workers: int, alone: RaySuite, scenarios: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    suite = RaySuite(tmp_path / "ray", scenarios, tiny_llama, "--ray", "local", "--workers", str(workers))
    suite.run()
    assert differences(suite.suite, alone.suite) == []
    assert suite.keys() == alone.keys()
    record = read_record(suite.suite)
    assert record is not None
    assert 1 <= len(record.models[0].plan) <= workers, "each worker has a plan of its own"
    assert sum(device.sweeps for device in record.models[0].devices) == record.models[0].sweeps


def test_an_interrupted_suite_leaves_no_worker_and_goes_on(
    alone: RaySuite, scenarios: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    suite = RaySuite(tmp_path / "ray", scenarios, tiny_llama, "--ray", "local", "--workers", "2")
    command = suite.begin()
    until = time.monotonic() + 300
    while not suite.keys():
        assert command.poll() is None, suite.said()
        assert time.monotonic() < until, suite.said()
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    code = command.wait(timeout=120)
    assert code in (0, 1, 130), suite.said()
    assert "Traceback" not in suite.said()
    assert workers_of(suite.mark) == []
    suite.run()
    assert differences(suite.suite, alone.suite) == []
    assert suite.keys() == alone.keys()
