"""Protects: an engine in another process answers as one in this process, and a process that dies is replaced."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from engine import Engine, EngineError, Job, Policy, Sampling
from engine.checkpoint.description import describe
from engine.errors import CheckpointError, JobError
from engine.workers import place, process
from engine.workers.kept_alive import KeptAlive
from engine.workers.remote_engine import RemoteEngine

sys.path.insert(0, str(Path(__file__).parent))  # where workers of these tests find `faulty_worker`, too
from faulty_worker import KILLS, MUTE, RAISES, RUNS_OUT, SLOW, WORDLESS

ON_CPU = Policy(device="cpu")


def jobs(count: int, seed: int = 0, new: int = 4) -> list[Job]:
    dice = random.Random(seed)
    shared = [dice.randrange(5, 400) for _ in range(12)]
    return [
        Job(
            prompt=[*(shared if number % 3 else []), *(dice.randrange(5, 400) for _ in range(1 + number % 5))],
            max_new_tokens=new if number % 4 else 1,
            sampling=Sampling(temperature=float(number % 2), seed=number),
            stop=["a"] if number % 5 == 0 else [],
            prompt_logprobs=number % 7 == 0,
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def model(build: Callable[[str], Path]) -> str:
    return str(build("llama"))


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PROGRAM", "faulty_worker")


@pytest.fixture(scope="module")
def remote(model: str) -> Iterator[RemoteEngine]:
    """Faulty where asked for; of a program that forces `fork`, which threads and devices do not survive."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "PROGRAM", "faulty_worker")
        with RemoteEngine(model, ON_CPU) as engine:
            yield engine
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture(scope="module")
def here(model: str) -> Iterator[Engine]:
    with Engine.from_pretrained(model, ON_CPU) as engine:
        yield engine


def pid_of(engine: RemoteEngine) -> int:
    found = engine._place._crew.places[0].process
    assert found is not None
    return found.pid


def is_gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether a process ends within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_answers_are_those_of_an_engine_in_this_process(remote: RemoteEngine, here: Engine) -> None:
    asked = jobs(40)
    timings = []
    remote.observer = timings.append
    found = remote.run(asked)
    remote.observer = None
    assert found == here.run(asked)
    assert sum(timing.decode_rows for timing in timings) > 0
    assert timings[-1].begun <= time.perf_counter()
    assert remote.plan.limits == here.plan.limits
    assert remote.weights_digest() == here.weights_digest() != None  # noqa: E711 - neither is


def test_bad_jobs_fail_alone(remote: RemoteEngine) -> None:
    good = Job(prompt=[5], max_new_tokens=1)
    bad = [Job(prompt=[]), Job(prompt=[10**9]), Job(prompt="text"), Job(prompt=[5] * 400), Job(prompt=[5.5])]
    found = remote.run([*bad, good])  # type: ignore[list-item]
    assert [isinstance(each.error, JobError) for each in found] == [True] * 5 + [False]


def test_a_dropped_call_leaves_room_for_others(remote: RemoteEngine) -> None:
    pending = remote.sweeps([Job(prompt=[SLOW, 8], max_new_tokens=100)])
    begun = time.monotonic()
    pending.close()
    assert remote.run([Job(prompt=[6], max_new_tokens=2)])[0].error is None
    assert time.monotonic() - begun < 15  # and not the 20 seconds of the one that was dropped
    assert remote._place._ledger.is_empty


@pytest.mark.usefixtures("warm_processes")
def test_a_killed_process_is_replaced(remote: RemoteEngine, here: Engine, caplog: pytest.LogCaptureFixture) -> None:
    asked = [Job(prompt=[SLOW, number], max_new_tokens=6) for number in range(20)]
    before, num_sweeps = len(remote.deaths), remote.num_sweeps
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.extend(remote.run(asked)))
    with caplog.at_level(logging.WARNING):
        thread.start()
        while remote.num_sweeps == num_sweeps:
            time.sleep(0.01)
        os.kill(pid_of(remote), signal.SIGKILL)
        thread.join()
    assert done == here.run(asked)
    assert len(remote.deaths) == before + 1
    assert "killed by signal 9" in caplog.text


REASONS = [
    (RAISES, "illegal memory access"),
    (KILLS, "by signal 9"),
    pytest.param(WORDLESS, "exit code 1", marks=pytest.mark.faults),
    pytest.param(MUTE, "exit code 1", marks=pytest.mark.faults),
]
"""How an engine's process ends, and what is told of it; the last two lack the memory to say what has happened."""


@pytest.mark.usefixtures("faulty", "warm_processes")
@pytest.mark.parametrize(("fault", "reason"), REASONS)
def test_a_job_that_ends_its_process_fails_alone(model: str, fault: int, reason: str) -> None:
    asked = [Job(prompt=[9, number], max_new_tokens=2) for number in range(8)]
    asked[5] = Job(prompt=[fault, 5], max_new_tokens=2)
    with RemoteEngine(model, Policy(device="cpu", gpu_batch_size=2, num_gpu_batches=1)) as engine:
        found = engine.run(asked)
        assert [each.error is None for each in found] == [number != 5 for number in range(8)]
        assert "ended the engine's process each time, at last alone" in str(found[5].error)
        assert reason in str(found[5].error)
        assert engine.run([Job(prompt=[6], max_new_tokens=1)])[0].error is None
        assert len(engine.deaths) <= 4  # two before it is suspected, at most one with its neighbour, one alone


@pytest.mark.usefixtures("warm_processes")
def test_answers_that_cannot_be_taken_in_are_asked_for_again(
    remote: RemoteEngine, here: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked, deliver = [Job(prompt=[9, number], max_new_tokens=2) for number in range(3)], KeptAlive._deliver

    def first_without_memory(*_: Any) -> None:
        monkeypatch.setattr(KeptAlive, "_deliver", deliver)
        raise MemoryError

    monkeypatch.setattr(KeptAlive, "_deliver", first_without_memory)
    with caplog.at_level(logging.WARNING):
        assert remote.run(asked) == here.run(asked)
    assert "what it said could not be taken in: MemoryError" in caplog.text


@pytest.mark.usefixtures("faulty", "warm_processes")
def test_a_process_in_the_place_of_another_that_cannot_load_is_told(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RemoteEngine(model, ON_CPU) as engine:
        engine.run([Job(prompt=[6], max_new_tokens=1)])
        monkeypatch.setenv("FLEXGEN_TEST_CANNOT_LOAD", "yes")
        with pytest.raises(CheckpointError, match="the weights cannot be read"):
            engine.run([Job(prompt=[KILLS, 6], max_new_tokens=1)])


@pytest.mark.usefixtures("warm_processes")
def test_where_no_other_process_can_be_started_who_waits_is_told(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory() -> NoReturn:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with RemoteEngine(model, ON_CPU) as engine:
        monkeypatch.setattr(place, "WorkerProcess", no_memory)
        os.kill(pid_of(engine), signal.SIGSTOP)
        asking = threading.Timer(0.2, os.kill, (pid_of(engine), signal.SIGKILL))
        asking.start()
        with pytest.raises(EngineError, match=r"by signal 9 .*, and the engine cannot go on: OSError: .* memory"):
            engine.run([Job(prompt=[6], max_new_tokens=1)])
        asking.join()


def test_too_little_memory_ends_no_process(remote: RemoteEngine, here: Engine) -> None:
    asked = [Job(prompt=[RUNS_OUT, number], max_new_tokens=2) for number in range(8)]
    before = len(remote.deaths)
    assert remote.run(asked) == here.run(asked)
    assert len(remote.deaths) == before


@pytest.mark.usefixtures("warm_processes")
def test_what_opening_refuses_is_raised_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        RemoteEngine(str(tmp_path), ON_CPU)


@pytest.mark.usefixtures("warm_processes")
def test_a_process_that_waits_checks_models_before_it_opens_one(model: str, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_act": "none such"}))
    with pytest.raises(EngineError) as opened:
        Engine.from_pretrained(str(broken), ON_CPU)
    waiting = process.WorkerProcess()
    with pytest.raises(type(opened.value), match=re.escape(str(opened.value))):
        waiting.check(describe(str(broken)), ON_CPU)
    waiting.check(describe(model), ON_CPU)
    with RemoteEngine(model, ON_CPU, waiting=[waiting]) as engine:
        assert engine.run([Job(prompt=[6], max_new_tokens=1)])[0].error is None
    with pytest.raises(EngineError, match="the engine's process ended"):
        waiting.check(describe(model), ON_CPU)


@pytest.mark.usefixtures("warm_processes")
def test_a_process_that_cannot_start_is_not_started_for_ever(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PROGRAM", "antigravity_of_nobody")
    with pytest.raises(EngineError, match=r"ended 3 times in a row .*: exit code 1"):
        RemoteEngine(model, ON_CPU)


@pytest.mark.usefixtures("warm_processes")
def test_an_observer_that_fails_ends_the_engine_and_nobody_waits(model: str) -> None:
    def observe(timing: Any) -> None:
        raise ZeroDivisionError("of the observer")

    with RemoteEngine(model, ON_CPU) as engine:
        engine.observer = observe
        with pytest.raises(EngineError, match="observer of sweeps failed: ZeroDivisionError"):
            engine.run([Job(prompt=[5], max_new_tokens=1)])


@pytest.mark.usefixtures("faulty", "warm_processes")
def test_closing_delivers_the_sweep_at_hand(model: str) -> None:
    engine = RemoteEngine(model, ON_CPU)
    engine.weights_digest()  # a sweep that waits for weights does not end
    pending = engine.sweeps([Job(prompt=[SLOW, 8], max_new_tokens=1), Job(prompt=[SLOW, 9], max_new_tokens=90)])
    while not engine._place._ledger._entered:
        time.sleep(0.01)
    pid = pid_of(engine)
    engine.close()
    assert [index for index, _ in next(pending)] == [0]
    with pytest.raises(EngineError, match="was closed"):
        next(pending)
    with pytest.raises(EngineError, match="was closed"):
        engine.sweeps([Job(prompt=[5])])
    assert is_gone(pid, 0.1)
    engine.close()


WITHOUT_STANDARD = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
from engine import Job, Policy
from engine.workers.remote_engine import RemoteEngine
with RemoteEngine({model!r}, Policy(device="cpu")) as engine:
    (done,) = engine.run([Job(prompt=[6], max_new_tokens=2)])
with open({out!r}, "w") as file:
    file.write(str(done.tokens))
"""


def test_a_program_without_standard_streams_has_workers_all_the_same(model: str, here: Engine, tmp_path: Path) -> None:
    """As a daemon may be: the line to a process must not be what is a standard stream there."""
    program = WITHOUT_STANDARD.format(model=model, out=str(tmp_path / "out"))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)
    assert (tmp_path / "out").read_text() == str(here.run([Job(prompt=[6], max_new_tokens=2)])[0].tokens)


PARENT = """
import os, time
from engine import Policy
from engine.workers.process import WorkerProcess
from engine.workers.remote_engine import RemoteEngine
waiting = WorkerProcess()
engine = RemoteEngine({model!r}, Policy(device="cpu"))
heir = os.fork() or time.sleep(60)  # keeps the parent's ends of the lines open
print(waiting.pid, engine._place._crew.places[0].process.pid, heir, flush=True)
time.sleep(60)
"""


@pytest.mark.usefixtures("warm_processes")
def test_no_process_outlives_its_parent(model: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT.format(model=model)], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    ) as parent:
        assert parent.stdout is not None
        *workers, heir = map(int, parent.stdout.readline().split())
        parent.kill()
        parent.wait()
    try:
        assert [is_gone(pid) for pid in workers] == [True, True]
    finally:
        os.kill(heir, signal.SIGKILL)


def test_signals_of_the_group_are_the_parents_business(remote: RemoteEngine) -> None:
    before = len(remote.deaths)
    remote.run([Job(prompt=[6], max_new_tokens=1)])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid_of(remote), number)
    assert remote.run([Job(prompt=[6], max_new_tokens=1)])[0].error is None
    assert len(remote.deaths) == before
