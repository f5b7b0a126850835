"""Jobs in random company: subsets, orders and sizes of micro-batches, compared bit for bit with each job alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import models

from engine import Completion, Engine, Job, Sampling


def make_jobs(count: int, window: int) -> list[Job]:
    """Scored, greedy and sampled jobs, some of which share prefixes that end inside a block of attention."""
    rng = random.Random(5)
    words = [rng.randrange(3, models.VOCABULARY) for _ in range(2 * window)]
    prefixes = [[], words[:18], words[:35], words[50 : 50 + window // 2], words[50 : 50 + window // 3]]
    jobs = []
    for seed in range(count):
        new = rng.choice((0, 1, 2, 5, 9))
        own = [rng.randrange(3, models.VOCABULARY) for _ in range(rng.randint(1, 12))]
        jobs.append(
            Job(
                prompt=rng.choice(prefixes) + own,
                max_new_tokens=new,
                prompt_logprobs=new == 0 or rng.random() < 0.5,
                sampling=Sampling(temperature=rng.choice((0.0, 1.0)), top_p=rng.choice((1.0, 0.8)), seed=seed),
            )
        )
    return jobs


def bits(completion: Completion) -> tuple[Any, ...]:
    """All that is told of a job; floats are compared as they are."""
    assert completion.error is None, completion.error
    return completion.tokens, completion.logprobs, completion.prompt_logprobs, completion.prompt_greedy


def num_changed(path: Path, jobs: list[Job], policy: dict[str, Any], num_companies: int) -> int:
    """How many answers of random companies differ from those of the jobs alone."""
    rng = random.Random(1)
    sizes: tuple[dict[str, int], ...] = ({}, {"gpu-batch-size": 1}, {"gpu-batch-size": 3, "num-gpu-batches": 2})
    with ExitStack() as opened:
        engines = [opened.enter_context(Engine.from_pretrained(str(path), policy={**policy, **size})) for size in sizes]
        alone = [bits(engines[0].run([job])[0]) for job in jobs]
        return sum(
            bits(done) != alone[index]
            for order in _companies(rng, len(jobs), num_companies)
            for index, done in zip(order, rng.choice(engines).run([jobs[at] for at in order]), strict=True)
        )


def _companies(rng: random.Random, count: int, num_companies: int) -> Iterator[list[int]]:
    for _ in range(num_companies):
        order = rng.sample(range(count), count)
        yield order[: rng.randint(2, count)]
