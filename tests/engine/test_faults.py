"""Protects: a fault of one job, of a growing cache or of device memory stays where it is, and the engine serves on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Completion, Engine, Job
from engine.cache.key_value import KVCache
from engine.cache.shape import KVShape
from engine.errors import CapacityError
from engine.memory import accelerator
from engine.memory.arena import Arena
from engine.policy import Share

JOBS = [Job(prompt=[*range(7, 27), 30 + n], max_new_tokens=6, prompt_logprobs=n % 2 == 0) for n in range(8)]
JOBS += [Job(prompt=[100 + n] * (70 if n else 3), max_new_tokens=5) for n in range(3)]


@pytest.fixture(scope="module")
def path(build: Callable[[str], Path]) -> Path:
    return build("llama")


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(str(path), policy={"device": "cpu"}) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(path: Path) -> list[Completion]:
    with Engine.from_pretrained(str(path), policy={"device": "cpu"}) as engine:
        return engine.run(JOBS)


def same(done: list[Completion], expected: list[Completion]) -> bool:
    return [(one.tokens, one.error) for one in done] == [(one.tokens, one.error) for one in expected]


def short_of_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch, most_rows: int) -> list[int]:
    """Let the model run out of memory, at its second layer, with micro-batches of more rows; notes those that ran."""
    layer, ran = engine.parts.model.layer, []

    def run(index: int, hidden: torch.Tensor, call: Any) -> torch.Tensor:
        if index == 1 and len(hidden) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        ran.append(len(hidden))
        return layer(index, hidden, call)

    monkeypatch.setattr(engine.parts.model, "layer", run)
    return ran


def test_a_sweep_that_finds_too_little_memory_is_repeated_in_smaller_parts(
    engine: Engine, expected: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = short_of_memory(engine, monkeypatch, most_rows=100)
    assert same(engine.run(JOBS), expected)
    assert ran
    assert max(ran[3:]) <= 100
    before = engine.num_sweeps
    assert same(engine.run(JOBS), expected)  # the smaller size stays: nothing is tried in vain again
    assert engine.num_sweeps - before == max(job.max_new_tokens for job in JOBS)


def test_sampled_tokens_are_the_same_after_a_repeated_sweep(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine import Sampling

    jobs = [
        Job(prompt=job.prompt, max_new_tokens=6, sampling=Sampling(temperature=1.0, seed=n))
        for n, job in enumerate(JOBS)
    ]
    with Engine.from_pretrained(str(path), policy={"device": "cpu"}) as engine:
        expected = engine.run(jobs)
    with Engine.from_pretrained(str(path), policy={"device": "cpu"}) as engine:
        short_of_memory(engine, monkeypatch, most_rows=100)
        assert same(engine.run(jobs), expected)


def test_a_prompt_that_no_memory_is_enough_for_fails_alone(
    engine: Engine, expected: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(engine, monkeypatch, most_rows=69)
    done = engine.run(JOBS)
    assert [isinstance(one.error, CapacityError) for one in done] == [len(job.prompt) == 70 for job in JOBS]
    assert "the device ran out of memory" in str(done[-1].error)
    assert "70 tokens" in str(done[-1].error)
    assert same([one for one in done if one.error is None], expected[:9])
    monkeypatch.undo()
    assert same(engine.run(JOBS[:8]), expected[:8])


@pytest.mark.parametrize("percent", [[20, 80, 0, 100, 0, 100], [100, 0, 50, 50, 100, 0]])
def test_a_cache_that_cannot_grow_is_no_room_for_those_who_need_it(
    percent: list[int], path: Path, expected: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.from_pretrained(str(path), policy={"device": "cpu", "percent": percent}) as engine:
        engine.wait_until_loaded()
        empty = engine.parts.arena.empty

        def refuse(num_bytes: int, tier: Any) -> torch.Tensor:
            raise CapacityError("cannot page-lock 0.1 GB of host memory (CUDA error 2)")

        monkeypatch.setattr(engine.parts.arena, "empty", refuse)
        failed = engine.run([Job(prompt=[5, 6, 7], max_new_tokens=4)])[0]
        assert isinstance(failed.error, CapacityError)
        assert "the KV cache cannot grow to" in str(failed.error)
        assert "page-lock" in str(failed.error)
        monkeypatch.setattr(engine.parts.arena, "empty", empty)
        assert same(engine.run(JOBS), expected)


def test_a_share_takes_room_on_another_tier_before_it_fails(tmp_path: Path) -> None:
    arena = Arena(torch.device("cpu"), offload_dir=str(tmp_path))
    budgets: Any = {"device": 320, "host": 32_000, "disk": 0}
    cache = KVCache([KVShape(1, 2, 1, 2)] * 2, torch.float32, arena, budgets, Share(gpu=50, cpu=50))
    found = [cache.room.allocate(rows) for rows in (3, 3, 209, 3)]
    assert [block and block.tier for block in found] == ["device", "host", "host", "device"]
    arena.close()


def test_the_memory_limit_of_one_engine_outlives_another(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[float] = []

    class Module:
        @staticmethod
        def get_device_properties(device: torch.device) -> Any:
            return type("Properties", (), {"total_memory": 100})

        @staticmethod
        def set_per_process_memory_fraction(fraction: float, device: torch.device) -> None:
            set_to.append(fraction)

    monkeypatch.setattr(accelerator, "_module", lambda device: Module)
    device = torch.device("cuda", 7)
    ends = [accelerator.limit_memory(device, limit) for limit in (40, 60)]
    ends[1]()
    ends[1]()
    ends[0]()
    assert set_to == [0.4, 0.4, 0.4, 1.0]
