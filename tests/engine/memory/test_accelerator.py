"""Protects: the paths of devices with streams and page-locked memory, taken here by a device module on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import parity
import pytest
import torch
from fake_streams import Streams, play
from parity import JOBS, POLICIES
from transformers import PreTrainedModel

from engine import Engine, Job
from engine.executor import Executor
from engine.memory import accelerator
from engine.planning.admission import Admission
from engine.schedule.scheduler import Scheduler
from engine.schedule.segment import Segment


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return play(monkeypatch)


@pytest.mark.parametrize(
    ("policy", "pin"),
    [
        *((policy, True) for policy in ("device", "20-80", "host", "disk", "thirds")),
        *(("20-80", False), ("disk", False)),
        *(pytest.param(policy, False, marks=pytest.mark.slow) for policy in ("device", "host", "thirds")),
    ],
)
def test_streams_and_locked_pages_change_no_result(
    policy: str,
    pin: bool,
    streams: Streams,
    build: Callable[[str], Path],
    reference: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    """Weights, keys and values cross on streams of their own; page-locked memory is given back."""
    settings = {**POLICIES[policy], "device": "cpu", "offload-dir": str(tmp_path), "pin-weight": pin}
    settings["gpu-memory"] = "1GB"
    with Engine.from_pretrained(str(build("opt")), policy=settings) as engine:
        done = engine.run(JOBS)
        offloads = policy != "device"
        assert streams.called["Stream"] == 4  # the one that computes, weights, keys and values each way
        # What is on disk waits for nothing but its reads.
        assert (streams.called["wait_stream"] > 0) == (offloads and policy != "disk")
        assert (streams.called["wait_event"] > 0) == offloads
        # Reads from disk end in page-locked memory in any case.
        assert bool(streams.locked) == (policy in ("disk", "thirds") or (pin and policy != "device"))
    assert streams.locked == {}
    assert streams.limits == [0.5, 1.0]
    assert parity.differences(parity.expect(reference("opt")), done)[0] == []


def test_what_is_on_disk_goes_through_memory_of_torch_where_ours_cannot_be_locked(
    streams: Streams,
    build: Callable[[str], Path],
    reference: Callable[[str], PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accelerator, "can_lock_pages", lambda device: False)
    asked: list[int] = []

    def page_locked(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        asked.append(shape[0])
        return torch.empty(*shape, dtype=dtype)

    monkeypatch.setattr(accelerator, "page_locked", page_locked)
    settings = {**POLICIES["disk"], "device": "cpu", "offload-dir": str(tmp_path), "gpu-memory": "1GB"}
    with Engine.from_pretrained(str(build("opt")), policy=settings) as engine:
        done = engine.run(JOBS)
        assert asked[0] > engine.plan.read_ahead_bytes > 0
    assert streams.locked == {}
    assert parity.differences(parity.expect(reference("opt")), done)[0] == []


@pytest.mark.parametrize("policy", ["host", "disk", "thirds"])
def test_prompts_that_are_computed_between_fetches_change_no_result(
    policy: str,
    streams: Streams,
    build: Callable[[str], Path],
    reference: Callable[[str], PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few prompts at a time come in while others decode, and ride in several micro-batches with their steps."""
    mixed: list[int] = []
    next_sweep = Scheduler.next_sweep

    def note(scheduler: Scheduler) -> list[list[Segment]]:
        batches = next_sweep(scheduler)
        mixed.append(sum(batch[0].is_decode and not batch[-1].is_decode for batch in batches))
        return batches

    monkeypatch.setattr(Scheduler, "next_sweep", note)
    settings = {**POLICIES[policy], "device": "cpu", "offload-dir": str(tmp_path), "gpu-memory": "1GB"}
    with Engine.from_pretrained(str(build("opt")), policy=settings) as engine:
        scheduler = engine.parts.lanes[0].scheduler
        pace = Admission(rows_beside_weights=0, rows_beside_cached_row=0.15)
        scheduler.limits = replace(scheduler.limits, admission=pace, rows_between_fetches=24)
        engine.parts.lanes[0].executor.limits = scheduler.limits
        done = engine.run(JOBS)
    assert max(mixed) >= 2
    assert sum(count > 0 for count in mixed) >= 3
    assert parity.differences(parity.expect(reference("opt")), done)[0] == []


def test_host_memory_goes_only_when_the_device_is_done_with_it(
    streams: Streams, build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache and hidden states outgrow their memory between sweeps; copies of a sweep may still be under way by then."""
    settings = {**POLICIES["host"], "device": "cpu", "gpu-memory": "1GB", "gpu-batch-size": 1, "num-gpu-batches": 1}
    at_work, unlocked = False, 0
    sweep, unlock = Executor.sweep, accelerator.unlock_pages

    def busy(self: Executor, *arguments: Any) -> Any:
        nonlocal at_work
        answers = sweep(self, *arguments)
        at_work = True
        return answers

    def wait(device: torch.device) -> None:
        nonlocal at_work
        at_work = False

    def count(pointer: int) -> None:
        nonlocal unlocked
        assert not at_work
        unlocked += 1
        unlock(pointer)

    monkeypatch.setattr(Executor, "sweep", busy)
    monkeypatch.setattr(accelerator, "synchronize", wait)
    monkeypatch.setattr(accelerator, "unlock_pages", count)
    with Engine.from_pretrained(str(build("opt")), policy=settings) as engine:
        for length in (9, 90):
            assert engine.run([Job(prompt=[*range(9, 9 + length)], max_new_tokens=2)])[0].error is None
        assert unlocked == 1 + len(engine.parts.model.layers)  # of hidden states, and of the cache


def test_padded_families_take_the_same_paths(
    streams: Streams, build: Callable[[str], Path], reference: Callable[[str], PreTrainedModel]
) -> None:
    (family,) = [name for name in models.OWN_ATTENTION if name in models.CORE][:1]
    with Engine.from_pretrained(str(build(family)), policy={**POLICIES["host"], "device": "cpu"}) as engine:
        done = engine.run(JOBS)
    assert parity.differences(parity.expect(reference(family)), done)[0] == []


def test_encoded_weights_and_cache_take_the_same_paths(streams: Streams, build: Callable[[str], Path]) -> None:
    """A layer is expanded behind its arrival, and its slot is filled anew behind that; the result is the CPU's."""
    settings = {**POLICIES["thirds"], "device": "cpu", "compress-weight": 4, "compress-cache": 8}
    settings["percent"] = [20, 80, 34, 66, 100, 0]
    with Engine.from_pretrained(str(build("opt")), policy=settings) as engine:
        done = engine.run(JOBS)
    assert streams.called["wait_event"] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator, "_WITH_STREAMS", ())
        patch.setattr(accelerator, "can_lock_pages", lambda device: False)
        with Engine.from_pretrained(str(build("opt")), policy=settings) as engine:
            assert [each.tokens for each in engine.run(JOBS)] == [each.tokens for each in done]


def test_nothing_but_one_file_names_cuda() -> None:
    """No call of `torch.cuda` elsewhere, so that XPU, MPS and ROCm go the same way."""
    root = Path(__file__).parents[3]
    for file in [*root.glob("engine/**/*.py"), *root.glob("flexgen_helm/**/*.py")]:
        if file.name != "accelerator.py":
            assert "torch.cuda" not in file.read_text(), file


def test_the_cpu_is_no_accelerator() -> None:
    cpu = torch.device("cpu")
    assert accelerator.indexed(cpu) == cpu
    assert accelerator.new_stream(cpu) is None
    assert accelerator.memory(cpu) is None
    assert accelerator.peak_memory(cpu) == 0
    assert not accelerator.has_streams(cpu)
    assert not accelerator.can_lock_pages(cpu)
    assert not accelerator.has_flash_attention(cpu)
    accelerator.limit_memory(cpu, 1)
    accelerator.release_memory(cpu)
    accelerator.reset_peak(cpu)
    accelerator.synchronize(cpu)
