"""Protects: a sweep that is killed at any moment continues where it stopped, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from killed_sweeps import ENTRIES, kept
from sweeping import differences

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("number", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_sweeps_lose_no_request(number: int, tiny_llama: Path, helm_data: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, Path(__file__).parents[1] / "killed_sweeps.py", helm_data, tiny_llama, tmp_path]
    done = subprocess.run(
        [*map(str, program), str(number), str(number)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["kills"]) == number
    for index, kill in enumerate(found["kills"]):
        assert kill["code"] == -9, kill
        lost = sum(kill["delivered"]) - kill["kept"]
        assert lost <= sum(sorted(kill["delivered"])[-1:]), kill  # at most the answers of one sweep
        assert kill["second_code"] == 0, (tmp_path / f"killed{index}" / "out").read_text()[-3000:]
        assert kill["second_delivered"] == found["total"] - kill["kept"], kill  # nothing that was kept is asked again
        assert kill["kept_in_the_end"] == found["total"]
        suites = (tmp_path / name / "benchmark_output/runs/s" for name in (f"killed{index}", "undisturbed"))
        assert differences(*suites) == [], kill


SLOW = """
import sys
from engine.workers import process
process.PROGRAM = "slow_worker"
from flexgen_helm.run import main
sys.exit(main(sys.argv[1:]))
"""


class SlowSweep:
    """A sweep in a folder of its own, whose workers take their time (see `slow_worker`)."""

    def __init__(self, folder: Path, data: Path, model: Path, *more: str) -> None:
        self.folder = folder
        (folder / "benchmark_output").mkdir(parents=True)
        (folder / "benchmark_output/scenarios").symlink_to(data / "scenarios")
        self._command = [sys.executable, "-c", SLOW, "sweep", "-r", *ENTRIES, "-m", "4", "--model", str(model),
                         "--suite", "s", "--gpu-batch-size", "4", "--num-gpu-batches", "1", *more]  # fmt: skip

    @contextmanager
    def begun(self) -> Iterator[subprocess.Popen[str]]:
        """Start it, or let it go on; it ends with the block, however that does."""
        path = os.pathsep.join([str(ROOT), str(Path(__file__).parents[1])])
        environment = {**os.environ, "PYTHONPATH": path}
        with subprocess.Popen(
            self._command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self) -> str:
        """Let it come to its end, and return what it prints."""
        with self.begun() as process:
            told, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        return told

    def wait_for_answers(self, process: subprocess.Popen[str]) -> None:
        """Return when the first ones have been delivered."""
        log, end = self.folder / "delivered", time.monotonic() + 120
        while not log.exists() or not log.read_text():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)

    @property
    def delivered(self) -> int:
        """Answers of the process that was started last."""
        return sum(map(int, (self.folder / "delivered").read_text().split()))

    @property
    def workers(self) -> list[int]:
        """The processes that there were."""
        return [int(pid) for pid in (self.folder / "workers").read_text().split()]

    @property
    def suite(self) -> Path:
        """What it writes."""
        return self.folder / "benchmark_output/runs/s"


@pytest.mark.usefixtures("warm_processes")
def test_a_terminated_sweep_ends_as_an_interrupted_one(tiny_llama: Path, helm_data: Path, tmp_path: Path) -> None:
    """SIGTERM, twice, as `timeout` sends it: the pass at hand ends, its answers are kept, and the command says so."""
    on_disk = ("--percent", "50", "0", "0", "0", "100", "0", "--offload-dir", "offload")
    sweep = SlowSweep(tmp_path / "here", helm_data, tiny_llama, *on_disk)
    with sweep.begun() as process:
        sweep.wait_for_answers(process)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert said.splitlines()[-1] == (
        "flexgen-helm: error: terminated; answers so far are kept, run the same command to continue"
    )
    assert "Traceback" not in said
    assert list((sweep.folder / "offload").iterdir()) == []
    answers = kept(sweep.folder)
    assert answers == sweep.delivered
    sweep.run()
    assert kept(sweep.folder) - answers == sweep.delivered > 0


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("devices", [["cpu"], ["cpu:0", "cpu:1"]], ids=["one", "two"])
def test_a_worker_that_is_killed_costs_no_answer(
    devices: list[str], tiny_llama: Path, helm_data: Path, tmp_path: Path
) -> None:
    """As the system does where memory runs out."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(json.dumps({"device": devices if len(devices) > 1 else devices[0]}))
    sweep = SlowSweep(tmp_path / "here", helm_data, tiny_llama, "--policy", str(policy))
    with sweep.begun() as process:
        sweep.wait_for_answers(process)
        assert len(sweep.workers) == len(devices)
        os.kill(sweep.workers[-1], signal.SIGKILL)
        told, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "suite s: 4 done, 0 failed" in told
    where = r"cpu:\d: " if len(devices) > 1 else ""
    assert re.search(rf"the engine's process ended once \({where}killed by signal 9", told)
    record = json.loads((sweep.suite / "flexgen_sweep.json").read_text())
    assert len(record["models"][0]["deaths"]) == 1
    # The others may have computed all of it by the time that the new process is there.
    assert {each["device"] for each in record["models"][0]["devices"]} <= set(devices)
    assert kept(sweep.folder) == record["models"][0]["computed"] > 0
    assert "ended and was replaced" in (sweep.suite / "report.html").read_text()


@pytest.mark.usefixtures("warm_processes")
def test_a_sweep_without_any_device_left_goes_on_where_it_was(
    tiny_llama: Path, helm_data: Path, tmp_path: Path
) -> None:
    """Both are lost on the way, and back when the same command is given again."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(json.dumps({"device": ["cpu:0", "cpu:1"]}))
    sweep, undisturbed = (
        SlowSweep(tmp_path / name, helm_data, tiny_llama, "--policy", str(policy)) for name in ("here", "undisturbed")
    )
    with sweep.begun() as process:
        sweep.wait_for_answers(process)
        (sweep.folder / "broken").touch()
        told, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    assert "the same command runs them again" in said.splitlines()[-1]
    assert re.search(r"device cpu:\d was given up \(killed by signal 9", told)
    assert "3 times in a row before all weights were in place" in told
    answers = kept(sweep.folder)
    assert answers > 0
    (sweep.folder / "broken").unlink()
    assert "suite s: 4 done, 0 failed" in sweep.run()
    undisturbed.run()
    assert kept(sweep.folder) == kept(undisturbed.folder) > answers
    assert differences(sweep.suite, undisturbed.suite) == []


FORKING = """
import os, signal, sys, time
from flexgen_helm import run

def fork(command, rest):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b".")
        while True:
            time.sleep(0.01)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

run._run_command = fork
before = {"default": signal.SIG_DFL, "ignored": signal.SIG_IGN}[sys.argv[1]]
signal.signal(signal.SIGTERM, before)
if before == signal.SIG_IGN:
    run._run_command = lambda command, rest: os.kill(os.getpid(), signal.SIGTERM) or 0
print(run.main(["sweep"]), signal.getsignal(signal.SIGTERM) == before)
"""


@pytest.mark.parametrize(("before", "code"), [("default", -signal.SIGTERM), ("ignored", 0)])
def test_sigterm_ends_forks_at_once_and_is_ignored_where_it_was(before: str, code: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", FORKING, before]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == (f"{int(code)} True\n", "")
