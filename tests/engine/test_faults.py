"""Protects: a failing job, cache growth or device allocation affects nothing else, and the engine goes on serving."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Completion, Engine, Job
from engine.cache.key_value import KVCache
from engine.cache.shape import KVShape
from engine.errors import CapacityError, EngineError
from engine.memory import accelerator
from engine.memory.arena import Arena
from engine.model.padded import PaddedBatch
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


ON_CARD = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def short_of_memory(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    most_rows: int = 10**9,
    most_positions: int = 10**9,
    error: Exception = ON_CARD,
) -> list[int]:
    """Let the model run out of memory, at its second layer, with micro-batches of more rows; notes those that ran.

    most_positions: also with a prompt, or what is before it, that is longer than this, in however small parts.
    """
    layer, ran = engine.parts.model.layer, []

    def run(index: int, hidden: torch.Tensor, call: Any) -> torch.Tensor:
        new = [each for each in engine.parts.model.sweeping.batch.segments if not each.is_decode]
        reach = max((each.span.start + each.num_rows for each in new), default=0)
        if index == 1 and (len(hidden) > most_rows or reach > most_positions):
            raise error
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
    short_of_memory(engine, monkeypatch, most_positions=69)
    done = engine.run(JOBS)
    assert [isinstance(one.error, CapacityError) for one in done] == [len(job.prompt) == 70 for job in JOBS]
    assert "the device ran out of memory" in str(done[-1].error)
    assert "70 tokens" in str(done[-1].error)
    assert same([one for one in done if one.error is None], expected[:9])
    assert (
        engine.parts.lanes[0].scheduler.limits == engine.plan.limits
    )  # what it could not be helped with is no one else's loss
    monkeypatch.undo()
    assert same(engine.run(JOBS[:8]), expected[:8])


OF_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)
OF_WINDOWS = RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")


@pytest.mark.parametrize("error", [OF_CPU, OF_WINDOWS, MemoryError()], ids=["cpu", "windows", "python"])
def test_memory_of_the_host_that_runs_short_is_the_same_fault(
    error: Exception, engine: Engine, expected: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(engine, monkeypatch, most_rows=100, error=error)
    assert same(engine.run(JOBS), expected)
    monkeypatch.undo()
    short_of_memory(engine, monkeypatch, most_positions=69, error=error)
    done = engine.run(JOBS)
    assert [isinstance(one.error, CapacityError) for one in done] == [len(job.prompt) == 70 for job in JOBS]
    assert "the device ran out of memory" in str(done[-1].error)
    assert "enforce fail" not in str(done[-1].error)


def test_torch_tells_of_host_memory_as_it_is_looked_for() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert accelerator.is_out_of_memory(caught.value)
    assert not accelerator.is_out_of_memory(RuntimeError("shapes do not match"))


SHARED = [7 + 3 * n for n in range(110)]
SHARERS = [Job(prompt=[*SHARED, 20 + n, 21 + n], max_new_tokens=n % 3, prompt_logprobs=n % 3 == 0) for n in range(12)]
SHARERS += [Job(prompt=[*range(30, 40)], max_new_tokens=4)]


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("most_rows", [100, 70])
def test_a_shared_prefix_that_memory_is_too_short_for_is_computed_in_pieces(
    most_rows: int, family: str, build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.from_pretrained(str(build(family)), policy={"device": "cpu"}) as engine:
        expected = engine.run(SHARERS)
        ran = short_of_memory(engine, monkeypatch, most_rows=most_rows)
        done = engine.run(SHARERS)
        before = engine.num_sweeps
        ran.clear()
        again = engine.run(SHARERS)
    assert max(ran) <= most_rows
    assert engine.num_sweeps - before == 4  # nothing is tried in vain again
    for found in (done, again):
        assert same(found, expected)
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            assert (one.prompt_greedy, one.finish_reason) == (other.prompt_greedy, other.finish_reason)
            if other.prompt_logprobs is not None:
                assert one.prompt_logprobs is not None
                assert one.prompt_logprobs[1:] == pytest.approx(other.prompt_logprobs[1:], abs=1e-5)


def test_those_who_share_a_prefix_that_fits_nowhere_fail_at_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = short_of_memory(engine, monkeypatch, most_positions=80)
    sweeps, tried = engine.parts.lanes[0].executor.sweep, list[int]()

    def sweep(batches: Any) -> Any:
        tried.append(len(batches))
        return sweeps(batches)

    monkeypatch.setattr(engine.parts.lanes[0].executor, "sweep", sweep)
    done = engine.run(SHARERS)
    assert [one.error is None for one in done] == [False] * 12 + [True]
    assert {str(one.error) for one in done[:-1]} == {str(done[0].error)}
    assert "shorten the 110 tokens that 12 prompts begin with" in str(done[0].error)
    assert ran
    assert len(tried) < 12


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_decode_steps_with_long_contexts_are_cut_before_one_of_them_fails(
    family: str, build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows, so nothing to save there: what runs short is what attention gathers of the cache."""
    jobs = [Job(prompt=[*range(40 + 30 * n, 70 + 30 * n)], max_new_tokens=6) for n in range(10)]
    policy = {"device": "cpu", "gpu-batch-size": 10}
    with Engine.from_pretrained(str(build(family)), policy=policy) as engine:
        expected = engine.run(jobs)
    own, assemble = KVCache.own, PaddedBatch.assemble

    def check(is_decode: bool, num_rows: int) -> None:
        if is_decode and num_rows > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def gather(cache: KVCache, layer: int, group: Any, *new: torch.Tensor) -> Any:
        check(True, len(group.segments) * group.length)
        return own(cache, layer, group, *new)

    def pad(batch: PaddedBatch, *given: Any) -> Any:
        check(batch.segments[0].is_decode, len(batch.segments) * batch.num_keys)
        return assemble(batch, *given)

    monkeypatch.setattr(KVCache, "own", gather)
    monkeypatch.setattr(PaddedBatch, "assemble", pad)
    with Engine.from_pretrained(str(build(family)), policy=policy) as engine:
        assert same(engine.run(jobs), expected)


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


def test_closing_pending_jobs_wakes_those_who_wait_for_them(engine: Engine) -> None:
    swept, going_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        swept.set()
        assert going_on.wait(20)

    engine.observer = hold
    pending = engine.sweeps([Job(prompt=[5, 6, 7], max_new_tokens=100)])
    told: list[list[object]] = []
    waiting = [threading.Thread(target=lambda: told.append(list(pending)), daemon=True) for _ in range(2)]
    for thread in waiting:
        thread.start()
    assert swept.wait(20)
    pending.close()
    engine.observer = None
    going_on.set()
    for thread in waiting:
        thread.join(20)
    assert told == [[], []]
    assert engine.run([Job(prompt=[5, 6, 7], max_new_tokens=2)])[0].error is None


def test_an_observer_that_closes_the_engine_is_a_fault_and_memory_is_given_back_later(path: Path) -> None:
    engine = Engine.from_pretrained(str(path), policy={"device": "cpu"})
    engine.observer = lambda _: engine.close()
    with pytest.raises(EngineError, match="the observer closes the engine"):
        engine.run(JOBS)
    assert engine.placed_bytes()["device"] > 0
    engine.close()
    assert set(engine.placed_bytes().values()) == {0}


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
