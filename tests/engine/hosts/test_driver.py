"""Protects: of hosts that come and go each job gets one answer, and no host that is unlike the driver is heard."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_hosts import DIGEST, EXPECTED, IDENTITY, SWEEP, MadeHost, MadeSupply, answer, driver_of

from engine.asking.pending import Call, Finished, Result
from engine.errors import CheckpointError, EngineError
from engine.hosts.messages import HostSwept
from engine.job import Completion, Job
from engine.schedule.timing import SweepTiming


class Asked:
    """A call, and what became of it."""

    def __init__(self, count: int, first: int = 100) -> None:
        self.jobs = {at: Job(prompt=[7] * 20 + [at % 3, first + at], max_new_tokens=1) for at in range(count)}
        self.results: Finished = []
        self.faults: list[BaseException] = []
        self.call = Call(dict(self.jobs), self._put)

    def _put(self, result: Result) -> None:
        if isinstance(result, BaseException):
            self.faults.append(result)
        else:
            self.results += result

    @property
    def is_right(self) -> bool:
        """Whether each job was answered once, as a host answers it (which tokens travel as ints)."""
        wanted = [(at, replace(answer(job), tokens=tuple(job.prompt))) for at, job in self.jobs.items()]
        return sorted(self.results, key=lambda pair: pair[0]) == wanted


def ready(name: str, **how: object) -> MadeHost:
    return MadeHost(name, **how)  # type: ignore[arg-type]


def open_all(supply: MadeSupply) -> None:
    for host in supply.living:
        host.begin()
        host.vouch()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 2**32), st.floats(0, 0.5))
def test_each_job_is_answered_once_however_hosts_come_and_go(
    count: int, num_hosts: int, seed: int, how_often: float
) -> None:
    rng, made, asked = random.Random(seed), iter(range(10_000)), Asked(count)
    supply = MadeSupply(lambda name: ready(f"h{next(made)}"))
    driver = driver_of(supply)
    driver.trust(DIGEST)
    driver.submit(asked.call)
    supply.bring(*(ready(f"h{next(made)}") for _ in range(num_hosts)))
    deaths, powers = 0, 4  # fewer than make a job a suspect
    while len(asked.results) < count:
        host = rng.choice(supply.living)
        if not hasattr(host, "begun"):
            host.begun = True  # type: ignore[attr-defined]
            host.begin()
            host.vouch()
        elif rng.random() < how_often and deaths < 20:
            deaths += 1
            powers -= (is_power := powers > 0 and rng.random() < 0.5)
            (partial(host.die, "power") if is_power else host.notice)()
        else:
            host.sweep()
    assert asked.is_right
    assert len(supply.losses) == deaths


def test_at_most_a_sweep_is_computed_again_when_a_host_dies() -> None:
    supply, asked = MadeSupply(), Asked(40)
    driver = driver_of(supply)
    driver.trust(DIGEST)
    driver.submit(asked.call)
    first, second = ready("a"), ready("b")
    supply.bring(first, second)
    open_all(supply)
    first.sweep()
    second.sweep()
    lost = len(first.has[:SWEEP])
    first.die("power")  # with what it would sweep next
    supply.run(random.Random(0))
    assert asked.is_right
    assert len(first.computed) + len(second.computed) <= 40 + lost
    assert driver.deaths == ["a: power"]


def test_a_job_that_ends_its_worker_each_time_fails_alone() -> None:
    made, asked = iter(range(1000)), Asked(20)
    supply = MadeSupply(lambda name: None)
    driver = driver_of(supply)
    driver.trust(DIGEST)
    driver.submit(asked.call)
    while len(asked.results) < 20:
        if not supply.living:
            supply.bring(ready(f"h{next(made)}", deadly=105), ready(f"h{next(made)}", deadly=105))
            open_all(supply)
        for host in supply.living:
            host.sweep()
    failed = [at for at, completion in asked.results if completion.error is not None]
    assert failed == [5]
    assert "ended its worker each time" in str(dict(asked.results)[5].error)


def test_what_a_host_tells_before_its_weights_are_known_is_used_only_then() -> None:
    supply, asked = MadeSupply(), Asked(3)
    driver = driver_of(supply)
    driver.submit(asked.call)
    supply.bring(host := ready("a"))
    host.begin()
    host.sweep()
    assert asked.results == []
    host.vouch()
    assert asked.results == [], "the driver does not know its own weights yet"
    driver.trust(DIGEST)
    assert asked.is_right


def test_hosts_that_are_unlike_the_driver_are_refused_by_name_and_not_heard() -> None:
    supply, asked = MadeSupply(), Asked(8)
    driver = driver_of(supply)
    driver.trust(DIGEST)
    driver.submit(asked.call)
    hosts = [
        ready("old", versions={"flexgen-helm": "1", "python": "3.9"}),
        ready("files", identity={**IDENTITY, "files": "e" * 64}),
        ready("half", identity={**IDENTITY, "dtype": "bfloat16"}),
        ready("weights", digest="c" * 64),
    ]
    supply.bring(*hosts)
    for host in hosts:
        host.begin()
        host.sweep()
        host.vouch()
    assert asked.results == []
    assert all(host.is_gone for host in hosts)
    assert [(name, loss.kind) for name, loss in supply.losses] == [(host.name, "refused") for host in hosts]
    assert "flexgen-helm 1 (the driver has 0)" in driver.given_up["old"]
    assert "python 3.9 (the driver has none)" in driver.given_up["old"]
    assert "tokenizer" in driver.given_up["files"]
    assert "dtype (float32 at the driver, bfloat16 there)" in driver.given_up["half"]
    assert "sha256 dddddddddddd at the driver, cccccccccccc there" in driver.given_up["weights"]
    supply.bring(ready("good"))
    open_all(supply)
    supply.run(random.Random(0))
    assert asked.is_right


def test_a_fault_on_purpose_refuses_its_host_only() -> None:
    supply, asked = MadeSupply(), Asked(8)
    driver = driver_of(supply)
    driver.trust(DIGEST)
    driver.submit(asked.call)
    supply.bring(bad := ready("a"), ready("b"))
    bad.fault(CheckpointError("no such directory /model"))
    assert driver.given_up == {"a": "no such directory /model"}
    supply.living[0].begin()
    supply.living[0].vouch()
    supply.run(random.Random(0))
    assert asked.is_right
    supply.fail(CheckpointError("no worker has the model"))
    with pytest.raises(CheckpointError, match="no worker has the model"):
        driver.submit(Asked(1).call)


def test_a_silent_host_is_let_go_of_and_one_that_says_little_is_not() -> None:
    now = [0.0]
    supply, asked = MadeSupply(), Asked(12)
    driver = driver_of(supply, silence_s=60.0, clock=lambda: now[0])
    driver.trust(DIGEST)
    driver.submit(asked.call)
    supply.bring(silent := ready("a"), other := ready("b"))
    open_all(supply)
    for moment in (20.0, 40.0, 59.0):
        now[0] = moment
        other.alive()
        driver.look()
    assert not silent.is_gone
    now[0] = 61.0
    driver.look()
    assert silent.is_gone
    assert driver.deaths == ["a: nothing was heard of it for 60 s"]
    silent.is_gone = False
    silent.sweep()  # it was only slow: what it tells now is nobody's
    supply.run(random.Random(0))
    assert asked.is_right


def test_hosts_are_not_lost_because_the_driver_slept() -> None:
    now = [0.0]
    supply = MadeSupply()
    driver = driver_of(supply, silence_s=60.0, clock=lambda: now[0])
    supply.bring(host := ready("a"))
    now[0] = 10_000.0
    driver.look()
    assert not host.is_gone


def test_closing_delivers_the_sweep_at_hand_and_tells_those_who_wait() -> None:
    supply, asked = MadeSupply(), Asked(20)
    driver = driver_of(supply)
    driver.trust(DIGEST)
    driver.submit(asked.call)
    supply.bring(ready("a"))
    open_all(supply)
    driver.close()
    assert len(asked.results) == SWEEP
    assert [str(fault) for fault in asked.faults] == ["the engine was closed while this job was waiting"]
    assert supply.is_closed
    assert supply.losses == []
    with pytest.raises(EngineError, match="closed"):
        driver.submit(Asked(1).call)


def test_a_host_that_falls_silent_while_the_driver_closes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.hosts.driver._LOOK_S", 0.01)
    supply = MadeSupply()
    driver = driver_of(supply, silence_s=0.2, clock=time.monotonic)
    supply.bring(silent := ready("a"))
    open_all(supply)
    monkeypatch.setattr(silent, "leave", lambda: None)
    closing = threading.Thread(target=driver.close, daemon=True)
    closing.start()
    closing.join(60.0)
    assert not closing.is_alive()
    assert silent.is_gone


def test_a_driver_that_has_failed_closes_without_waiting_for_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    supply = MadeSupply()
    driver = driver_of(supply)
    supply.bring(host := ready("a"))
    open_all(supply)
    monkeypatch.setattr(host, "leave", lambda: None)  # it is out of reach
    supply.fail(EngineError("the connection to the cluster is lost"))
    closing = threading.Thread(target=driver.close, daemon=True)
    closing.start()
    closing.join(60.0)
    assert not closing.is_alive()
    assert host.is_gone
    assert supply.is_closed


def test_a_sweep_that_is_told_late_is_not_counted() -> None:
    swept: list[SweepTiming] = []
    supply = MadeSupply()
    driver = driver_of(supply, observe=swept.append)
    supply.bring(lost := ready("a"), kept := ready("b"))
    open_all(supply)
    zeros = dict.fromkeys(("begun", "host_s", "sweep_s", "load_s", "link_s"), 0.0)
    counts = dict.fromkeys(("prefill_rows", "decode_rows", "num_sequences", "new_tokens"), 1)
    told = HostSwept(timing=SweepTiming(**zeros, **counts, device="cpu"), ago_s=0.0)  # type: ignore[arg-type]
    lost.die("power")
    lost.tell(told)
    kept.tell(told)
    assert [timing.device for timing in swept] == ["b/cpu"]
    assert len(driver.deaths) == 1


def test_a_call_that_is_dropped_is_answered_no_more() -> None:
    supply, gone, kept = MadeSupply(), Asked(8), Asked(8, first=500)
    driver = driver_of(supply)
    driver.trust(DIGEST)
    driver.submit(gone.call)
    driver.submit(kept.call)
    supply.bring(ready("a"))
    open_all(supply)
    driver.abandon(gone.call)
    supply.run(random.Random(0))
    assert gone.results == []
    assert kept.is_right


def test_expected_names_nothing_where_nothing_differs() -> None:
    told: list[object] = []
    supply = MadeSupply()
    driver = driver_of(supply)
    supply.bring(host := ready("a"))
    host.begin()
    told.append(driver.wait_until_open())
    assert EXPECTED.why_refused(driver.hosts[0][1]) is None
    assert isinstance(answer(Job(prompt=[1])), Completion)
