"""Protects: drafted tokens change nothing but the number of sweeps, wherever keys and values lie."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import models
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import Completion, Engine, Job, Sampling
from engine.schedule.drafts import DRAFT_SIZES, Drafter
from engine.schedule.sequence import Sequence

POLICIES: dict[str, dict[str, Any]] = {
    "device": {},
    "host": {"percent": [0, 100, 0, 100, 0, 100]},
    "thirds": {"percent": [34, 33, 34, 33, 34, 33], "gpu-batch-size": 3},
    "attention on the host": {"percent": [50, 50, 50, 50, 50, 50], "cpu-cache-compute": True},
}
FAMILIES = ["llama", "mistral", "gemma2", "gpt-oss", "gptj"]
PREFIX = [*range(40, 70)]
NUM_NEW = 40


def draft_by_hand(tokens: list[int], room: int) -> tuple[int, ...]:
    """What the docstrings say, read off the list."""
    for size in (3, 2):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                followed = tokens[end : end + 7]
                return tuple(followed[: max((n for n in DRAFT_SIZES if n <= min(room, len(followed))), default=0)])
    return ()


TOKENS = st.integers(0, 3) | st.sampled_from([1, 256, 257, 65_536, 16_777_216])
"""Few, so that they recur; among them those whose bytes look alike side by side."""


@given(st.lists(st.integers(0, 3), max_size=40) | st.lists(TOKENS, max_size=40), st.integers(0, 40), st.integers(0, 9))
def test_a_draft_is_what_followed_the_last_occurrence(tokens: list[int], cut: int, room: int) -> None:
    drafter = Drafter(tokens[:cut])
    drafter.extend(tokens[cut:])
    assert len(drafter) == len(tokens)
    assert drafter.draft(room) == draft_by_hand(tokens, room)


def test_drafting_takes_less_than_a_millisecond_and_little_memory() -> None:
    rng = random.Random(3)
    tokens = [rng.randrange(32_000) for _ in range(4_000)]

    def seconds() -> float:
        begun = time.perf_counter()
        assert Drafter(tokens).draft(9) == ()
        return time.perf_counter() - begun

    assert min(seconds() for _ in range(9)) < 1e-3
    tracemalloc.start()
    try:
        drafter = Drafter(tokens)
        num_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(drafter) == 4_000
    assert num_bytes < 32_000


def jobs() -> list[Job]:
    """Greedy ones of several lengths, that share and do not; among them those that must not draft."""
    rng = random.Random(4)
    greedy = [
        Job(prompt=prompt, max_new_tokens=count, prompt_logprobs=count % 2 == 0)
        for prompt in ([*PREFIX, 7], [*PREFIX, 9, 11], [*PREFIX, *PREFIX[:9]], rng.choices(range(3, 500), k=20))
        for count in (NUM_NEW, NUM_NEW - 3, 2, 1)
    ]
    stopped = [replace(greedy[0], stop=[[400]]), replace(greedy[4], stop=["1", "re"])]
    others = [Sampling(temperature=1.0, seed=3), Sampling(presence_penalty=1.0)]
    return [*greedy, *stopped, *(replace(greedy[0], sampling=sampling) for sampling in others)]


def drafting(engine: Engine, rows: int = 500) -> Engine:
    """Let sweeps of up to this many rows draft, as they do where transfers set the pace."""
    engine.parts.lanes[0].scheduler.limits = replace(engine.parts.lanes[0].scheduler.limits, free_rows=rows)
    return engine


def sweeps_by_hand(job: Job, generated: list[int]) -> int:
    """Sweeps that a greedy job takes which is drafted for in each of its steps."""
    tokens, sweeps = [*job.prompt, *generated[:1]], 1
    while (num_done := len(tokens) - len(job.prompt)) < len(generated):
        draft = draft_by_hand(tokens, job.max_new_tokens - num_done - 1)
        coming = generated[num_done:]
        num_right = next((n for n, (a, b) in enumerate(zip(draft, coming, strict=False)) if a != b), len(draft))
        tokens += coming[: num_right + 1]
        sweeps += 1
    return sweeps


@pytest.fixture(scope="module")
def expected(build: Callable[[str], Path]) -> Callable[[str], tuple[list[Completion], int]]:
    @cache
    def of(family: str) -> tuple[list[Completion], int]:
        with Engine.from_pretrained(str(build(family)), policy={"device": "cpu"}) as engine:
            return engine.run(jobs()), engine.num_sweeps

    return of


CASES = [*(("llama", policy) for policy in POLICIES), *((family, "host") for family in FAMILIES[1:])]


@pytest.mark.parametrize(("family", "policy"), CASES)
def test_drafts_save_sweeps_and_change_nothing(
    family: str,
    policy: str,
    build: Callable[[str], Path],
    expected: Callable[[str], tuple[list[Completion], int]],
    tmp_path: Path,
) -> None:
    settings = {"device": "cpu", "offload-dir": str(tmp_path), **POLICIES[policy]}
    plain, num_sweeps = expected(family)
    with drafting(Engine.from_pretrained(str(build(family)), policy=settings)) as engine:
        # The greedy jobs alone first: the others take a sweep a token whatever is drafted beside them.
        greedy = [i for i, job in enumerate(jobs()) if job.sampling == Sampling()]
        alone = engine.run([jobs()[i] for i in greedy])
        drafted_sweeps = engine.num_sweeps
        found = engine.run(jobs())
        assert all(block == 0 for block in engine.parts.lanes[0].executor._cache.room.num_blocks.values())
    assert num_sweeps == NUM_NEW
    whole = [i for i in greedy if plain[i].finish_reason == "length"]
    by_hand = [sweeps_by_hand(jobs()[i], list(plain[i].tokens)) for i in whole]
    assert sum(by_hand) < sum(len(plain[i].tokens) for i in whole)
    if policy == "thirds":  # whose micro-batches are too small for all at once
        assert drafted_sweeps < 2 * num_sweeps
    else:
        assert drafted_sweeps == max(by_hand)
    for done, answer in [*zip(found, plain, strict=True), *zip(alone, (plain[i] for i in greedy), strict=True)]:
        assert done.error is None
        assert (done.tokens, done.text, done.finish_reason) == (answer.tokens, answer.text, answer.finish_reason)
        assert done.logprobs == pytest.approx(answer.logprobs, abs=1e-5)
        assert (done.prompt_logprobs or ())[1:] == pytest.approx((answer.prompt_logprobs or ())[1:], abs=1e-5)


def test_drafts_ride_only_as_far_as_rows_are_free(build: Callable[[str], Path]) -> None:
    from watch import Watch

    many = [Job(prompt=[*PREFIX, 7 + i], max_new_tokens=NUM_NEW) for i in range(6)]
    with drafting(Engine.from_pretrained(str(build("llama")), policy={"device": "cpu"}), rows=20) as engine:
        watch = Watch(engine)
        engine.run(many)
        assert max(watch.tokens[1:]) <= 20
        assert max(watch.tokens[1:]) > len(many)
        drafting(engine, rows=0)
        watch.tokens.clear()
        engine.run(many)
        assert max(watch.tokens[1:]) == len(many)
    model = models.load_reference(build("llama"))
    with drafting(Engine.from_pretrained(str(build("llama")), policy={"device": "cpu"})) as engine:
        for job, done in zip(many, engine.run(many), strict=True):
            assert list(done.tokens) == models.reference_greedy(model, list(job.prompt), NUM_NEW)


def test_a_sequence_that_is_alone_drafts_nothing() -> None:
    """It is to show its own result: what a wrong guess yields would count for it."""
    sequence = Sequence.of(Job(prompt=[5, 6, 7, 8] * 4, max_new_tokens=9))
    assert sequence.draft()
    sequence.restart_alone()
    assert sequence.draft() == ()
