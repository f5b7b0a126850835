"""Protects: a prompt that is longer than memory is kept for is computed in pieces, and over several sweeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import models
import pytest
from transformers import PreTrainedModel

from engine import Completion, Engine, Job
from engine.schedule.segment import Segment
from engine.schedule.timing import SweepTiming

PIECE, SWEEP = 16, 40


def numbers(first: int, count: int) -> list[int]:
    return [3 + (first + 7 * place * place) % 300 for place in range(count)]


LONG, BOOK = numbers(5, 100), numbers(8, 70)
JOBS = [
    Job(prompt=numbers(1, 9), max_new_tokens=12),  # goes on beside the pieces
    Job(prompt=LONG, max_new_tokens=6),
    Job(prompt=[*BOOK, 20, 21], max_new_tokens=3),
    Job(prompt=[*BOOK, 30], max_new_tokens=0, prompt_logprobs=True),
    Job(prompt=[*BOOK, 40], max_new_tokens=1),
    Job(prompt=numbers(2, 55), max_new_tokens=1),
]


@pytest.mark.parametrize("family", ["llama", "gpt-oss", "bloom", "qwen3-next"])
@pytest.mark.parametrize("percent", [[100, 0, 100, 0, 100, 0], [0, 0, 0, 50, 0, 50]], ids=["device", "tiers"])
def test_long_prompts_are_answered_as_in_transformers(
    family: str,
    percent: list[int],
    build: Callable[[str], Path],
    reference: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    plain, swept = reference(family), list[SweepTiming]()
    policy = {"device": "cpu", "percent": percent, "offload-dir": str(tmp_path)}
    with Engine.from_pretrained(str(build(family)), policy=policy) as engine:
        scheduler = engine.parts.lanes[0].scheduler
        scheduler.limits = replace(scheduler.limits, rows_per_piece=PIECE, rows_per_batch=PIECE, rows_per_sweep=SWEEP)
        engine.observer = swept.append
        done = engine.run(JOBS)
    assert max(each.prefill_rows + each.decode_rows for each in swept) <= SWEEP
    check(plain, JOBS, done)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_pieces_of_one_token_jobs_need_no_room_in_the_cache(
    family: str,
    build: Callable[[str], Path],
    reference: Callable[[str], PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else they would be computed whole, for which there is no memory."""
    jobs = [*JOBS[3:], Job(prompt=LONG, max_new_tokens=0, prompt_logprobs=True)]
    with Engine.from_pretrained(str(build(family)), policy={"device": "cpu"}) as engine:
        scheduler, longest = engine.parts.lanes[0].scheduler, list[int]()
        scheduler.limits = replace(scheduler.limits, rows_per_piece=PIECE, rows_per_batch=PIECE, rows_per_sweep=SWEEP)
        next_sweep = scheduler.next_sweep

        def noted() -> list[list[Segment]]:
            batches = next_sweep()
            longest.extend(segment.num_rows for batch in batches for segment in batch)
            return batches

        monkeypatch.setattr(scheduler, "next_sweep", noted)
        monkeypatch.setattr(scheduler._cache, "allocate", lambda num_rows: None)
        done = engine.run(jobs)
    assert max(longest) <= PIECE
    check(reference(family), jobs, done)


def check(plain: PreTrainedModel, jobs: list[Job], done: list[Completion]) -> None:
    for job, one in zip(jobs, done, strict=True):
        assert one.error is None
        expected = models.reference_greedy(plain, job.prompt, job.max_new_tokens) if job.max_new_tokens else []
        assert list(one.tokens) == expected
        logprobs = models.reference_logprobs(plain, [*job.prompt, *expected])
        own = len(job.prompt) - 1
        assert one.logprobs == pytest.approx(logprobs[own:], abs=1e-4)
        if one.prompt_logprobs is not None:
            assert one.prompt_logprobs[1:] == pytest.approx(logprobs[:own], abs=1e-4)
