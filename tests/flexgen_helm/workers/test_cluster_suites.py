"""Protects: a suite on a Ray cluster leaves what it leaves on this machine alone, whoever is killed on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from ray_processes import MARK, workers_of
from scenario_files import table
from sweeping import differences

from flexgen_helm.sweeps.record import read_record

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
KILL_EVERY_S = 60.0
NUM_SUBJECTS, NUM_QUESTIONS = 57, 25


@pytest.fixture(scope="module")
def data(helm_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """57 subjects of made questions, in the files of MMLU's download."""
    scenarios = tmp_path_factory.mktemp("mmlu") / "scenarios"
    dice = random.Random(0)
    for subject in range(NUM_SUBJECTS):
        for split, count in (("dev", 5), ("val", 4), ("test", NUM_QUESTIONS)):
            rows = []
            for _ in range(count):
                a, b = dice.randint(2, 99), dice.randint(2, 99)
                options = [a + b, a + b + 1, a + b - 2, a + b + 10]
                dice.shuffle(options)
                rows.append([f"What is {a} plus {b}?", *options, "ABCD"[options.index(a + b)]])
            table(scenarios / f"mmlu/data/{split}/subject{subject}_{split}.csv", rows)
    return scenarios


class Sweep:
    """A sweep in a folder of its own."""

    def __init__(self, folder: Path, data: Path, model: Path, entries: list[str], *more: str) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        (folder / "benchmark_output").mkdir(parents=True)
        (folder / "benchmark_output/scenarios").symlink_to(data)
        flags = ["--suite", "s", "-m", str(NUM_QUESTIONS), "--gpu-batch-size", "8", "--num-gpu-batches", "1", *more]
        program = [sys.executable, "-m", "flexgen_helm", "sweep"]
        self._command = [*program, "-r", *entries, "--model", str(model), *flags]

    @property
    def suite(self) -> Path:
        return self.folder / "benchmark_output/runs/s"

    def begin(self) -> subprocess.Popen[bytes]:
        """Start it, or let it go on; what it says is in the file "out"."""
        with (self.folder / "out").open("ab") as out:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: self.mark}
            return subprocess.Popen(self._command, cwd=self.folder, env=environment, stdout=out, stderr=out)

    def run(self) -> None:
        """Let it come to its end."""
        assert self.begin().wait(timeout=1800) == 0, self.said()

    def said(self) -> str:
        return (self.folder / "out").read_text(errors="replace")[-4000:]

    def keys(self) -> list[str]:
        """The requests that HELM's cache has answers to."""
        with sqlite3.connect(self.folder / "prod_env/cache/flexgen.sqlite") as connection:
            return sorted(key for (key,) in connection.execute("SELECT key FROM unnamed"))


@pytest.fixture(scope="module")
def alone(data: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The suite on this machine."""
    sweep = Sweep(tmp_path_factory.mktemp("alone"), data, tiny_llama, entries())
    sweep.run()
    return sweep


def entries(count: int = NUM_SUBJECTS) -> list[str]:
    return [f"mmlu:subject=subject{number}" for number in range(count)]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_scores_are_equal_for_any_number_of_workers(
    workers: int, alone: Sweep, data: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path / "ray", data, tiny_llama, entries(), "--ray", "local", "--workers", str(workers))
    sweep.run()
    assert differences(sweep.suite, alone.suite) == []
    assert sweep.keys() == alone.keys()
    record = read_record(sweep.suite)
    assert record is not None
    assert len(record.models[0].plan) == workers, "each worker has a plan of its own"
    assert sum(device.sweeps for device in record.models[0].devices) == record.models[0].sweeps


def test_killed_workers_and_a_killed_driver_lose_nothing(
    alone: Sweep, data: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path / "ray", data, tiny_llama, entries(), "--ray", "local", "--workers", "4")
    dice, kills, drivers = random.Random(7), 0, 1
    driver = sweep.begin()
    whole_s = 0.0
    while driver.poll() is None:
        time.sleep(1.0)
        workers = workers_of(sweep.mark)
        whole_s += len(workers) == 4  # time with all workers there
        if whole_s >= (kills + 1) * KILL_EVERY_S and len(workers) == 4:
            os.kill(dice.choice(workers), signal.SIGKILL)
            kills += 1
        elif drivers == 1 and whole_s >= 1.5 * KILL_EVERY_S:
            driver.kill()
            driver.wait()
            drivers = 2
            driver = sweep.begin()
    assert driver.returncode == 0, sweep.said()
    (tmp_path / "kills").write_text(json.dumps({"workers": kills, "drivers": drivers}))
    assert differences(sweep.suite, alone.suite) == []
    assert sweep.keys() == alone.keys(), "no request is lost, or twice in the cache"
    assert workers_of(sweep.mark) == []
