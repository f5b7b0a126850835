"""Protects: several devices behind one engine answer as one does, share the work, and survive each other's end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from warm_processes import WarmProcesses

from engine import Engine, EngineError, Job, Policy
from engine.errors import ConfigError, UnsupportedError
from engine.workers import process
from engine.workers.remote_engine import RemoteEngine

sys.path.insert(0, str(Path(__file__).parent))  # where workers of these tests find `faulty_worker`, too
from faulty_worker import FAILS_ON_SECOND, KILLS, RUNS_OUT, SLOW

pytestmark = pytest.mark.usefixtures("warm_processes")

TWO = Policy(device=("cpu:0", "cpu:1"))
"""On any machine: two cores are the least that tests run on."""


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.planning import hardware
    from engine.workers import seats

    monkeypatch.setattr(hardware, "usable_cores", lambda: 2)
    monkeypatch.setattr(seats, "usable_cores", lambda: 2)


def jobs(count: int, first: int = 9, seed: int = 0) -> list[Job]:
    """Prompts of eight groups that begin with the same twenty tokens."""
    dice = random.Random(seed)
    shared = [[first, *(dice.randrange(5, 400) for _ in range(20))] for _ in range(8)]
    return [
        Job(
            prompt=[*shared[number % 8], *(dice.randrange(5, 400) for _ in range(1 + number % 5))],
            max_new_tokens=1 + number % 4,
            prompt_logprobs=number % 7 == 0,
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def model(build: Callable[[str], Path]) -> str:
    return str(build("llama"))


@pytest.fixture(scope="module")
def two(model: str, warm: WarmProcesses) -> Iterator[RemoteEngine]:
    with pytest.MonkeyPatch.context() as patch:
        from engine.workers import seats

        patch.setattr(seats, "usable_cores", lambda: 2)
        patch.setattr(process, "PROGRAM", "faulty_worker")
        with warm.in_use():
            engine = RemoteEngine(model, TWO)
        with engine:
            yield engine


@pytest.fixture(scope="module")
def here(model: str) -> Iterator[Engine]:
    with Engine.from_pretrained(model, Policy(device="cpu")) as engine:
        yield engine


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.text, one.finish_reason, one.error) == (
            other.tokens,
            other.text,
            other.finish_reason,
            other.error,
        )
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert (one.prompt_logprobs or [])[1:] == pytest.approx((other.prompt_logprobs or [])[1:], abs=1e-5)


def pids(engine: RemoteEngine) -> list[int]:
    return [place.process.pid for place in engine._place._crew.places if place.process is not None]


def test_answers_are_those_of_one_device_and_both_compute(two: RemoteEngine, here: Engine) -> None:
    asked = jobs(96)
    timings: list[Any] = []
    two.observer = timings.append
    found = two.run(asked)
    two.observer = None
    assert_same(found, here.run(asked))
    rows = {name: sum(each.prefill_rows for each in timings if each.device == name) for name in ("cpu:0", "cpu:1")}
    assert abs(rows["cpu:0"] - rows["cpu:1"]) <= 0.2 * sum(rows.values())  # eight groups, four each
    assert two.weights_digest() == here.weights_digest()
    assert two._place._ledger.is_empty


def test_it_is_asked_as_any_engine_is(two: RemoteEngine, here: Engine) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    assert two.generate(prompts, max_new_tokens=4).tolist() == here.generate(prompts, max_new_tokens=4).tolist()
    assert two.tokenizer.encode("a") == here.tokenizer.encode("a")

    async def first() -> list[int]:
        return [index async for index, _ in two.astream(jobs(5))]

    assert sorted(asyncio.run(first())) == list(range(5))
    assert dict(two.stream(jobs(5))).keys() == set(range(5))
    with pytest.raises(UnsupportedError, match="no parts"):
        two.parts  # noqa: B018 - reading it is what fails


def test_one_of_two_dies_and_nothing_is_lost(two: RemoteEngine, here: Engine) -> None:
    asked = [Job(prompt=[SLOW, number, 7], max_new_tokens=4) for number in range(40)]
    before, num_sweeps = len(two.deaths), two.num_sweeps
    killed = pids(two)[1]
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.extend(two.run(asked)))
    thread.start()
    while two.num_sweeps == num_sweeps:
        time.sleep(0.01)
    os.kill(killed, signal.SIGKILL)
    thread.join()
    assert_same(done, here.run(asked))
    assert [death.partition(":")[2][:2] for death in two.deaths[before:]] == ["1:"]
    assert killed not in pids(two)
    assert not two.given_up


@pytest.mark.slow  # twenty deaths; a few are in the ordinary tests
@pytest.mark.parametrize("gather", [False, True])
def test_processes_killed_at_random_moments_lose_nothing(model: str, here: Engine, gather: bool) -> None:
    asked, dice = jobs(400, seed=1), random.Random(0)
    expected = here.run(asked)
    with RemoteEngine(model, replace(TWO, gather_weights=gather)) as engine:
        for number in range(20):
            done: list[Any] = []
            before = pids(engine)
            thread = threading.Thread(target=lambda to=done: to.extend(engine.run(asked)))
            thread.start()
            time.sleep(dice.uniform(0, 0.5))
            if found := pids(engine):
                os.kill(dice.choice(found), signal.SIGKILL)
            thread.join()
            assert_same(done, expected)
            engine.run(asked[:1])  # starts what is dead, so that there is somebody to kill
            assert len(engine.deaths) + len(engine.given_up) <= number + 1
            assert not gather or not set(pids(engine)) & set(before) or len(engine.deaths) == 0
        assert len(engine.deaths) + len(engine.given_up) > 10


def test_too_little_memory_on_one_is_no_death(two: RemoteEngine, here: Engine) -> None:
    asked = jobs(40, first=RUNS_OUT)
    before = len(two.deaths)
    assert_same(two.run(asked), here.run(asked))
    assert len(two.deaths) == before


def test_a_job_that_ends_its_process_fails_alone_wherever_it_runs(two: RemoteEngine) -> None:
    asked = jobs(24)
    asked[5] = Job(prompt=[KILLS, 5], max_new_tokens=2)
    found = two.run(asked)
    assert [each.error is None for each in found] == [number != 5 for number in range(24)]
    assert not two.given_up


def test_a_device_that_fails_is_given_up_and_the_other_takes_over(
    model: str, here: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "PROGRAM", "faulty_worker")
    asked = jobs(24, first=FAILS_ON_SECOND)
    with RemoteEngine(model, TWO) as engine:
        assert_same(engine.run(asked), here.run(asked))
        while not engine.given_up:  # what it still had may be answered by the other before it has died three times
            assert_same(engine.run(asked), here.run(asked))
        assert list(engine.given_up) == ["cpu:1"]
        assert "an illegal memory access" in engine.given_up["cpu:1"]
        assert engine.devices == ("cpu:0",)
        assert_same(engine.run(asked), here.run(asked))


def test_a_device_whose_process_cannot_start_is_given_up(
    model: str, here: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its part of the weights is in place: the other opens the model anew, as the only one."""
    monkeypatch.setattr(process, "PROGRAM", "faulty_worker")
    monkeypatch.setenv("FLEXGEN_TEST_CANNOT_OPEN", "cpu:1")
    with RemoteEngine(model, TWO) as engine:
        assert list(engine.given_up) == ["cpu:1"]
        assert_same(engine.run(jobs(8)), here.run(jobs(8)))
        assert engine.weights_digest() == here.weights_digest()


def test_without_any_device_left_the_engine_ends(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PROGRAM", "faulty_worker")
    monkeypatch.setenv("FLEXGEN_TEST_CANNOT_OPEN", "cpu:")
    with pytest.raises(EngineError, match=r"ended 3 times in a row before all weights were in place"):
        RemoteEngine(model, TWO)


def test_one_process_refuses_several_devices(model: str) -> None:
    from engine.checkpoint.description import describe
    from engine.weights.encoded.filling import fill_from

    with pytest.raises(ConfigError, match=r"\[cpu:0, cpu:1\]: one process computes on one device"):
        Engine.open(describe(model), TWO, fill_from(describe(model), TWO))
