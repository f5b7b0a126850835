"""Protects: if any allocation fails, sweeps become smaller or end in a one-line error, and no answer is lost."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import Completion, Engine, Job
from engine.errors import CapacityError, EngineError
from engine.memory.arena import Arena

ROUNDS, SEED = int(os.environ.get("FAULT_ROUNDS", "10")), int(os.environ.get("FAULT_SEED", "0"))
SHARED = [*range(7, 27)]
JOBS = [Job(prompt=[*SHARED, 30 + n], max_new_tokens=4, prompt_logprobs=n % 2 == 0) for n in range(6)]
JOBS += [Job(prompt=[100 + n] * (50 if n else 3), max_new_tokens=5) for n in range(3)]
PLACES = {
    "device": [100, 0, 100, 0, 100, 0],
    "host": [30, 70, 0, 100, 0, 100],
    "disk": [0, 50, 50, 0, 50, 0],
}
"""FlexGen's six percents of weights, cache and hidden states; the rest is on disk."""


class Short(TorchDispatchMode):
    """Counts torch's operations, and lets `number` of them from the `first` on find no memory."""

    def __init__(self, first: int = 1 << 60, number: int = 1) -> None:
        super().__init__()
        self.count, self._failing = 0, range(first, first + number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count in self._failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return func(*args, **(kwargs or {}))


@contextmanager
def short(engine: Engine, first: int = 1 << 60, number: int = 1) -> Iterator[Short]:
    """Inside, operations of the engine's sweeps find no memory."""
    executor, scheduler = engine.parts.executor, engine.parts.scheduler
    sweep, mode = type(executor).sweep, Short(first, number)

    def failing(batches: Any) -> Any:
        with mode:
            return sweep(executor, batches)

    executor.sweep = failing  # type: ignore[method-assign]
    try:
        yield mode
    finally:
        del executor.sweep
        scheduler.limits = executor.limits = engine.plan.limits  # what ran short has had its effect on later sweeps


def check(done: list[Completion], expected: list[Completion]) -> None:
    """Each is as it should be, or says in a line that there was too little memory."""
    for one, whole in zip(done, expected, strict=True):
        if one.error is None:
            assert one.tokens == whole.tokens
            torch.testing.assert_close(one.logprobs, whole.logprobs, rtol=1e-5, atol=1e-5)
        else:
            assert isinstance(one.error, CapacityError)
            assert "\n" not in str(one.error)


@pytest.mark.faults
@pytest.mark.parametrize("number", [1, 300])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral"])
def test_any_operation_of_a_sweep(
    family: str, place: str, number: int, build: Callable[[str], Path], tmp_path: Path
) -> None:
    policy = {"device": "cpu", "percent": PLACES[place], "offload-dir": str(tmp_path)}
    with Engine.from_pretrained(str(build(family)), policy=policy) as engine:
        with short(engine) as counted:
            expected = engine.run(JOBS)
        assert counted.count > 100
        sites = random.Random(f"{family} {place} {number} {SEED}").sample(range(1, counted.count), 4 * ROUNDS)
        unharmed = 0
        for site in sites:
            with short(engine, site, number):
                done = engine.run(JOBS)
            check(done, expected)
            unharmed += all(one.error is None for one in done)
        assert number > 1 or unharmed > 0.9 * len(sites), f"{unharmed} of {len(sites)}"
        done = engine.run(JOBS)
        assert [one.error for one in done] == [None] * len(JOBS)
        check(done, expected)


@pytest.mark.faults
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=["card", "host"])
@pytest.mark.parametrize("method", ["empty", "staging", "file"])
def test_any_piece_of_memory_that_an_engine_asks_for(
    method: str, error: Exception, place: str, build: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """Whichever it is, loading or jobs end in a line, or do without; memory and files are given back."""
    policy = {"device": "cpu", "percent": PLACES[place], "offload-dir": str(tmp_path), "compress-cache": 8}
    given, asked, arenas = getattr(Arena, method), 0, set[Arena]()

    def give(self: Arena, *args: Any) -> Any:
        nonlocal asked
        asked += 1
        arenas.add(self)
        if asked == failing:
            raise error
        return given(self, *args)

    monkeypatch.setattr(Arena, method, give)
    failing, total = 0, None
    while total is None or failing < total:
        asked = 0
        told = ""
        try:
            with Engine.from_pretrained(str(build("llama")), policy=policy) as engine:
                done = engine.run(JOBS)
        except EngineError as fault:
            told = str(fault)
        if total is None:
            total, expected = asked, done
        assert "\n" not in told
        if not told:
            check(done, expected)
        failing += 1
        assert all(not any(each.num_bytes.values()) for each in arenas)
        arenas.clear()
