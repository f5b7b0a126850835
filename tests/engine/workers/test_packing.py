"""Protects: what crosses between processes is what was sent, whatever it is."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import JobError
from engine.job import Completion, Job, Sampling
from engine.logit_rules import LogitRules
from engine.thinking import Channels, Tags, Thinking
from engine.workers.packing import PackedCompletions, PackedJobs

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=6) | st.lists(st.integers(0, 3), max_size=20)
FLOATS = st.floats(allow_nan=False)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0, 4),
    top_k=st.none() | st.integers(1, 9),
    seed=st.none() | st.integers(0, 2**70),
    rules=st.none() | st.builds(LogitRules, repetition_penalty=st.floats(1, 2), prompt=TOKENS.map(tuple)),
)
STYLES = st.just(Channels()) | st.builds(Tags, begin=st.text(max_size=4), end=st.just("</think>"))
JOBS = st.builds(
    Job,
    prompt=TOKENS.filter(len),
    max_new_tokens=st.integers(0, 10**12),
    sampling=SAMPLINGS,
    stop=st.lists(st.text(min_size=1, max_size=4) | TOKENS.filter(len), max_size=2),
    prompt_logprobs=st.booleans(),
    likeliest=st.booleans(),
    thinking=st.none() | st.builds(Thinking, style=STYLES, budget=st.none() | st.just(7), closing=TOKENS.map(tuple)),
)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    if draw(st.integers(0, 4)) == 0:
        return Completion(error=JobError(draw(st.text(max_size=9))))
    tokens = draw(TOKENS)
    scored = draw(st.none() | st.lists(FLOATS, max_size=5))
    likeliest = draw(st.none() | st.just(tuple((token, -0.1 * token) for token in tokens)))
    return Completion(
        text=draw(st.text()),
        tokens=tuple(tokens),
        logprobs=tuple(draw(st.lists(FLOATS, min_size=len(tokens), max_size=len(tokens)))),
        prompt_logprobs=None if scored is None else (None, *scored),
        prompt_greedy=None if scored is None else (None, *(x < 0 for x in scored)),
        likeliest=likeliest,
        prompt_likeliest=None if likeliest is None or scored is None else (None, *((3, x) for x in scored)),
        finish_reason=draw(st.sampled_from(["stop", "length", "endoftext"])),
        end_token=draw(st.none() | st.integers(0, 99)),
    )


def passed(packed: PackedJobs | PackedCompletions) -> list[tuple[int, object]]:
    return list(pickle.loads(pickle.dumps(packed)).unpack())


@given(st.lists(JOBS, max_size=5))
def test_jobs(jobs: list[Job]) -> None:
    numbered = [(7 * number, job) for number, job in enumerate(jobs)]
    found = passed(PackedJobs.of(numbered))
    expected = [
        (
            number,
            replace(
                job,
                prompt=tuple(job.prompt),
                stop=tuple(stop if isinstance(stop, str) else tuple(stop) for stop in job.stop),
            ),
        )
        for number, job in numbered
    ]
    assert found == expected


def test_jobs_of_arrays() -> None:
    """Token ids of numpy are whole numbers like any other."""
    job = Job(prompt=np.array([3, 4]), max_new_tokens=np.int64(2), stop=[np.array([5])])  # type: ignore[arg-type]
    assert passed(PackedJobs.of([(0, job)])) == [(0, Job(prompt=(3, 4), max_new_tokens=2, stop=((5,),)))]


@given(st.lists(completions(), max_size=5))
def test_completions(done: list[Completion]) -> None:
    found = passed(PackedCompletions.of(list(enumerate(done))))
    assert [number for number, _ in found] == list(range(len(done)))
    for (_, mine), its in zip(found, done, strict=True):
        assert isinstance(mine, Completion)
        assert replace(mine, error=None) == replace(its, error=None)
        assert repr(mine.error) == repr(its.error)


def test_numbers_are_exact() -> None:
    odd = (-math.inf, -0.1, -5e-324)
    done = Completion(tokens=(1, 2, 3), logprobs=odd, prompt_logprobs=(None, *odd), prompt_greedy=(None,) + (True,) * 3)
    ((_, found),) = passed(PackedCompletions.of([(0, done)]))
    assert found == done
