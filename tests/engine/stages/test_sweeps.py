"""Protects: stages compute each other's sweeps in one order, also where memory runs out or the engine is closed."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from staged import staged

from engine import Completion, Engine, Job
from engine.errors import EngineError


def make_jobs(count: int) -> list[Job]:
    shared = [9, 8, 7, 6, 5, 40, 41, 60, 12, 13, 14, 15]
    return [
        Job(prompt=[*shared[: 4 * (at % 4)], 100 + at, 3 + at % 50], max_new_tokens=at % 6, prompt_logprobs=at % 3 == 0)
        for at in range(1, count + 1)
    ]


JOBS = make_jobs(24)


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.finish_reason, one.error) == (other.tokens, other.finish_reason, None)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert (one.prompt_logprobs or [])[1:] == pytest.approx((other.prompt_logprobs or [])[1:], abs=1e-5)


def run_out(engine: Engine, calls: set[int]) -> list[int]:
    """Let layers of a stage run out of memory in these of its calls; those that did."""
    layer, numbers, failed = engine.parts.model.layer, itertools.count(1), []

    def faulty(*given: Any) -> torch.Tensor:
        if (number := next(numbers)) in calls:
            failed.append(number)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
        return layer(*given)

    engine.parts.model.layer = faulty  # type: ignore[method-assign]
    return failed


@pytest.fixture(scope="module")
def model(build: Callable[[str], Path]) -> Path:
    return build("lfm2")


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(str(model), {"device": "cpu"}) as engine:
        yield engine


def test_a_sweep_that_a_stage_has_no_memory_for_is_computed_again(model: Path, alone: Engine) -> None:
    with staged(model, 3, **{"gpu-batch-size": 8}) as stages:
        at = [{1}, {3, 4}, {2, 40}]  # of the last stage, the first one and the one between
        failed = [run_out(engine, calls) for engine, calls in zip(stages, at, strict=True)]
        assert_same(stages[0].run(JOBS), alone.run(JOBS))
    assert all(failed)


def test_what_is_under_way_when_the_engine_is_closed_is_answered(model: Path, alone: Engine) -> None:
    jobs, found = [replace(job, max_new_tokens=1) for job in JOBS], dict[int, Completion]()
    with staged(model, 3, **{"gpu-batch-size": 2, "num-gpu-batches": 1}) as stages:
        sweeps, closing = itertools.count(1), threading.Thread(target=stages[0].close)

        def close(_: object) -> None:
            if next(sweeps) == 5:  # of the second of three sweeps that are under way
                closing.start()
                time.sleep(0.1)

        stages[0].observer = close
        with suppress(EngineError):
            found.update(stages[0].stream(jobs))
        closing.join()
        assert next(sweeps) == 8  # the other two have ended
    assert len(found) == 14
    assert_same([*found.values()], alone.run([jobs[at] for at in found]))
