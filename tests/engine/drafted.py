"""Engines with a draft model whose drafts do not depend on times, and jobs for them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import Completion, Engine, Job, Sampling
from engine.drafting.pace import Pace

PREFIX = [*range(40, 70)]
NUM_NEW = 24


def jobs() -> list[Job]:
    """Greedy and sampled ones, of several lengths, that share prefixes and do not."""
    rng = random.Random(5)
    greedy = [
        Job(prompt=prompt, max_new_tokens=count, prompt_logprobs=count % 2 == 1)
        for prompt in ([*PREFIX, 7], [*PREFIX, 9, 11], rng.choices(range(3, 500), k=20))
        for count in (NUM_NEW, 5, 2, 1)
    ]
    samplings = [
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.7, top_k=20, top_p=0.9, seed=4),
        Sampling(temperature=1.0, seed=5, presence_penalty=1.0, frequency_penalty=0.5),
        Sampling(presence_penalty=1.0),
    ]
    sampled = [replace(greedy[4], sampling=each, max_new_tokens=NUM_NEW) for each in samplings]
    return [*greedy, *sampled, replace(greedy[0], stop=[[400], "re"])]


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    for done, answer in zip(found, expected, strict=True):
        assert done.error is None
        assert (done.tokens, done.text, done.finish_reason) == (answer.tokens, answer.text, answer.finish_reason)
        assert done.logprobs == pytest.approx(answer.logprobs, abs=1e-5)
        assert (done.prompt_logprobs or ())[1:] == pytest.approx((answer.prompt_logprobs or ())[1:], abs=1e-5)


def assert_nothing_held(engine: Engine) -> None:
    """A draft's cache is empty again once a sweep has shown that its sequences have ended."""
    draft = engine.parts.draft
    assert draft is not None
    draft.drafts.add([], 0, engine.parts.lanes[0].scheduler.limits)
    assert set(draft.cache.room.num_blocks.values()) == {0}


class Always(Pace):
    """Drafts as many tokens in every sweep, so that tests do not depend on times."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.fixed = size

    def size(self, count: int, rows: int) -> int:
        return self.fixed

    def pays_to_begin(self, tokens: int, left: int, count: int, size: int) -> bool:
        return True


def drafting(model: Path, draft: Path, size: int, **policy: Any) -> Engine:
    """An engine that drafts `size` tokens for each sequence in every sweep, all weights in place."""
    engine = Engine.from_pretrained(str(model), policy={"device": "cpu", **policy, "draft-model": str(draft)})
    assert engine.parts.draft is not None
    engine.parts.draft.drafts.pace = Always(size)
    engine.wait_until_loaded()
    return engine
