"""Protects: a model in stages of two processes answers as one process does, and survives the end of one of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from warm_processes import WarmProcesses

from engine import Engine, Job, Policy, Sampling
from engine.errors import ConfigError, InstallationError, UnsupportedError
from engine.workers import process
from engine.workers.remote_engine import RemoteEngine

sys.path.insert(0, str(Path(__file__).parent))  # where workers of these tests find `faulty_worker`, too
from faulty_worker import RUNS_OUT, SLOW

pytestmark = pytest.mark.usefixtures("warm_processes")

TWO = Policy(device=("cpu:0", "cpu:1"), stages=2)


@pytest.fixture(scope="module")
def model(build: Callable[[str], Path]) -> str:
    return str(build("mamba2"))


@pytest.fixture(scope="module")
def staged(model: str, warm: WarmProcesses) -> Iterator[RemoteEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "PROGRAM", "faulty_worker")
        with warm.in_use():
            engine = RemoteEngine(model, TWO)
        with engine:
            yield engine


@pytest.fixture(scope="module")
def here(model: str) -> Iterator[Engine]:
    with Engine.from_pretrained(model, Policy(device="cpu")) as engine:
        yield engine


def jobs(count: int) -> list[Job]:
    return [
        Job(
            prompt=[9, 8, 7, 6, 5, 40, 41, *range(50 + number % 5, 58), number],
            max_new_tokens=number % 5,
            prompt_logprobs=number % 3 == 0 or number % 5 == 0,
            sampling=Sampling(temperature=1.0 if number % 4 == 1 else 0.0, seed=number),
        )
        for number in range(count)
    ]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.finish_reason, one.error) == (other.tokens, other.finish_reason, None)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert (one.prompt_logprobs or [])[1:] == pytest.approx((other.prompt_logprobs or [])[1:], abs=1e-5)


def test_answers_are_those_of_one_process_and_each_has_its_own_layers(staged: RemoteEngine, here: Engine) -> None:
    assert_same(staged.run(jobs(40)), here.run(jobs(40)))
    leading, other = (place.opened for place in staged._place._crew.places)
    assert leading is not None
    assert other is not None
    throughout = {"embedding", "outer"}
    assert {*leading.placed} & {*other.placed} == throughout
    assert {*leading.placed} | {*other.placed} == throughout | {"layer.0", "layer.1", "layer.2", "head"}
    assert "layer.0" in other.placed
    assert "head" in leading.placed
    assert staged.weights_digest() == here.weights_digest()
    assert staged.plan == other.plan  # rows that one gives out are there with the other


def test_jobs_that_nobody_waits_for_are_dropped(staged: RemoteEngine, here: Engine) -> None:
    stream = staged.stream(jobs(64))
    next(iter(stream))
    stream.close()
    assert_same(staged.run(jobs(6)), here.run(jobs(6)))


def test_a_sweep_that_there_is_no_memory_for_ends_no_process(staged: RemoteEngine, here: Engine) -> None:
    asked = [*jobs(6), *(Job(prompt=[RUNS_OUT, each, 7], max_new_tokens=3) for each in range(6))]
    num_deaths = len(staged.deaths)
    assert_same(staged.run(asked), here.run(asked))
    assert len(staged.deaths) == num_deaths


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stage_dies_and_nothing_is_lost(staged: RemoteEngine, here: Engine, number: int) -> None:
    asked = [Job(prompt=[SLOW, each, 7], max_new_tokens=4) for each in range(24)]
    crew, num_sweeps, num_deaths = staged._place._crew, staged.num_sweeps, len(staged.deaths)
    before = [place.process.pid for place in crew.places if place.process is not None]
    swept = threading.Event()
    staged.observer = lambda timing: swept.set()
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.extend(staged.run(asked)))
    thread.start()
    assert swept.wait(120)
    os.kill(before[number], signal.SIGKILL)
    thread.join()
    staged.observer = None
    assert staged.num_sweeps > num_sweeps
    assert_same(done, here.run(asked))
    assert len(staged.deaths) == num_deaths + 1
    after = [place.process.pid for place in crew.places if place.process is not None]
    assert not {*after} & {*before}  # none goes on without the other
    assert not staged.given_up


def test_what_needs_all_layers_in_one_process_is_refused(staged: RemoteEngine) -> None:
    with pytest.raises(UnsupportedError, match="all weights in one process"):
        staged.compare_with_stock(jobs(1), staged.run(jobs(1)))


def test_one_process_refuses_stages(model: str) -> None:
    from engine.checkpoint.description import describe
    from engine.weights.encoded.filling import fill_from

    policy = Policy(device="cpu", stages=2)
    with pytest.raises(ConfigError, match="one process has one stage of a model"):
        Engine.open(describe(model), policy, fill_from(describe(model), policy))


def test_a_model_whose_layers_hand_on_more_than_hidden_states_is_refused(build: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match="hand on more than hidden states to later ones"):
        RemoteEngine(str(build("gemma4")), TWO)


def test_too_few_devices_are_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InstallationError, match="stages 2: each has a device of its own, and there is"):
        RemoteEngine(model, Policy(stages=2))
