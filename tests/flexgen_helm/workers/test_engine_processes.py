"""Protects: what may be used is asked of the processes that the next engine gets, and kept beside a running engine."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from engine.checkpoint.description import ModelDescription
from engine.errors import CapacityError, CheckpointError, UnsupportedError
from engine.memory.tiers import Memory
from engine.planning.devices import Device
from engine.planning.sharing import ALONE, Sharing
from engine.policy import Policy
from engine.workers import process, remote_engine, seats
from engine.workers.messages import Seen
from flexgen_helm.workers.engine_processes import EngineProcesses

GB = 10**9


class FakeProcess:
    """On a machine with two cards, of which so much is free."""

    free: int | CapacityError = 100 * GB

    def __init__(self) -> None:
        self.is_killed = False
        self.may_answer = threading.Event()

    def look(self, policy: Policy) -> Seen:
        devices = tuple(Device(name=f"cuda:{number}", model="H200", num_bytes=140 * GB) for number in range(2))
        free = self.free
        memory = free if isinstance(free, CapacityError) else Memory(device=free, host=9 * GB, disk=0)
        return Seen(devices=devices, free=None, memory=memory)

    def memory(self, policy: Policy) -> Memory:
        memory = self.look(policy).memory
        if isinstance(memory, CapacityError):
            raise memory
        return memory

    def check(self, description: ModelDescription, policy: Policy) -> None:
        if not self.may_answer.wait(20):
            raise TimeoutError("whoever asked waited for the answer before it let it come")
        if description.model_type == "bad":
            raise UnsupportedError("it cannot be run")

    def kill(self) -> None:
        self.is_killed = True
        self.may_answer.set()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    """The processes that have been started."""
    found: list[FakeProcess] = []

    def start() -> FakeProcess:
        found.append(FakeProcess())
        return found[-1]

    monkeypatch.setattr(process, "WorkerProcess", start)
    monkeypatch.setattr(seats, "WorkerProcess", start)
    monkeypatch.setattr(FakeProcess, "free", 100 * GB)
    return found


def test_the_engine_gets_the_processes_that_were_asked(
    started: list[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        remote_engine, "RemoteEngine", lambda path, policy, *, window, waiting: given.append(list(waiting))
    )
    processes = EngineProcesses()
    processes.prepare()
    found = processes.resources(Policy())
    assert (found.memory.device, found.sharing) == (100 * GB, Sharing(count=2, gather=True))
    assert len(started) == 2
    processes.load("model", Policy())
    assert given == [started]

    monkeypatch.setattr(FakeProcess, "free", 5 * GB)  # the rest is the engine's now
    assert processes.last_resources(Policy(gpu_batch_size=7)) == found
    processes.prepare()  # for the first engine only
    assert len(started) == 2
    assert processes.resources(Policy()).memory.device == 5 * GB
    processes.close()
    assert [each.is_killed for each in started] == [False, False, True, True]


def test_of_one_device(started: list[FakeProcess]) -> None:
    processes = EngineProcesses()
    found = processes.last_resources(Policy(device="cuda:1"))
    assert (found.memory.device, found.sharing) == (100 * GB, ALONE)
    assert len(started) == 1


def test_what_cannot_be_found_leaves_no_process(started: list[FakeProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeProcess, "free", CapacityError("there is nothing"))
    for policy in (Policy(), Policy(device="cuda:0")):
        with pytest.raises(CapacityError, match="there is nothing"):
            EngineProcesses().resources(policy)
    assert len(started) == 3
    assert all(each.is_killed for each in started)


def described(model_type: str) -> ModelDescription:
    return ModelDescription(
        path="/nowhere", model_type=model_type, window=9, dtype="float32", weight_bytes=1, num_layers=1
    )


def test_a_model_is_checked_by_the_process_that_waits_while_this_one_goes_on(started: list[FakeProcess]) -> None:
    processes = EngineProcesses()
    processes.prepare()
    good = processes.check(described("good"), Policy())
    started[0].may_answer.set()
    bad = processes.check(described("bad"), Policy())  # begins when the first has ended
    good()
    with pytest.raises(UnsupportedError, match="it cannot be run"):
        bad()
    assert processes.resources(Policy(device="cuda:0")).memory.device == 100 * GB
    assert len(started) == 1


def test_a_process_that_is_at_a_check_is_ended_with_the_program(started: list[FakeProcess]) -> None:
    processes = EngineProcesses()
    processes.prepare()
    processes.check(described("good"), Policy())
    processes.close()
    assert started[0].is_killed


def test_without_a_process_a_model_is_checked_here(started: list[FakeProcess]) -> None:
    with pytest.raises(CheckpointError, match="/nowhere"):
        EngineProcesses().check(described("good"), Policy(device="cpu"))()
    assert started == []
