"""Protects: every family, under every placement and padding, gives what plain `transformers` gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import models
import pytest
from transformers import PreTrainedModel
from watch import Watch

from engine import Engine, Job

POLICIES: dict[str, dict[str, Any]] = {
    "device": {"percent": [100, 0, 100, 0, 100, 0]},
    "20-80": {"percent": [20, 80, 0, 100, 0, 100]},
    "host": {"percent": [0, 100, 0, 100, 0, 100]},
    "disk": {"percent": [0, 0, 0, 0, 0, 0]},
    "thirds": {"percent": [34, 33, 34, 33, 34, 33]},
    "small": {"percent": [50, 50, 50, 50, 50, 50], "gpu-batch-size": 2, "num-gpu-batches": 2},
}
PADDINGS = {"packed": None, "bucket": "bucket", "fixed": 80}
OUTER, INNER = 24, 20
"""Lengths of a shared prefix, and of one that some of its users share besides."""


@dataclass(frozen=True)
class Expected:
    """What plain transformers makes of a job."""

    tokens: list[int]
    logprobs: list[float]
    """Of the prompt but its first token, then of the tokens."""
    finish_reason: str


def make_jobs() -> list[Job]:
    """Prompts with shared and nested prefixes, of one token, of unequal lengths; scoring, one token, many tokens."""
    rng = random.Random(1)

    def words(count: int) -> list[int]:
        return [rng.randrange(3, models.VOCABULARY) for _ in range(count)]

    outer, inner, wide = words(OUTER), words(INNER), words(30)
    users = [outer + words(count) for count in (5, 9, 1, 9)]
    nested = [outer + inner + words(count) for count in (3, 7, 1, 6)]
    lone = [words(1), words(1), words(30), words(17), wide, [*wide[:-1], 3]]
    jobs = [
        Job(prompt=prompt, max_new_tokens=8, prompt_logprobs=index % 2 == 0)
        for index, prompt in enumerate([*users[1:], *nested[:-1], *lone])
    ]
    jobs += [Job(prompt=prompt, max_new_tokens=0, prompt_logprobs=True) for prompt in (nested[-1], words(12), words(1))]
    jobs += [Job(prompt=prompt, max_new_tokens=1) for prompt in (users[0], words(11))]
    return jobs


JOBS = make_jobs()
WIDE = 29
"""Tokens that two of the lone prompts share."""
SAVED = 7 * OUTER + 3 * INNER + WIDE
"""Prompt tokens that need no computing: all users but the first of each prefix."""


@pytest.fixture(scope="module")
def expected(reference: Callable[[str], PreTrainedModel]) -> Callable[[str], list[Expected]]:
    @cache
    def of(family: str) -> list[Expected]:
        model, answers = reference(family), []
        for job in JOBS:
            prompt, count = list(job.prompt), job.max_new_tokens
            tokens = models.reference_greedy(model, prompt, count) if count else []
            logprobs = models.reference_logprobs(model, prompt + tokens)
            answers.append(Expected(tokens, logprobs, "length" if len(tokens) == count else "endoftext"))
        return answers

    return of


CASES = [*product(models.FAMILIES, POLICIES, PADDINGS)]
CASES += [*product(models.OWN_ATTENTION, POLICIES, ["packed"])]
CASES += [*product(models.OWN_ATTENTION, ["thirds"], ["bucket", "fixed"])]


@pytest.mark.parametrize(("family", "policy", "padding"), CASES)
def test_equals_transformers(
    family: str,
    policy: str,
    padding: str,
    build: Callable[[str], Path],
    expected: Callable[[str], list[Expected]],
    tmp_path: Path,
) -> None:
    settings = {**POLICIES[policy], "pad-to-seq-len": PADDINGS[padding], "device": "cpu", "offload-dir": str(tmp_path)}
    with Engine.from_pretrained(str(build(family)), policy=settings) as engine:
        watch = Watch(engine)
        done = engine.run(JOBS)
    for job, answer, completion in zip(JOBS, expected(family), done, strict=True):
        assert completion.error is None
        assert list(completion.tokens) == answer.tokens
        assert completion.finish_reason == answer.finish_reason
        own = answer.logprobs[len(job.prompt) - 1 :]
        assert list(completion.logprobs) == pytest.approx(own, abs=1e-4, rel=0)
        if job.prompt_logprobs:
            assert completion.prompt_logprobs is not None
            assert completion.prompt_logprobs[0] is None
            scored = answer.logprobs[: len(job.prompt) - 1]
            assert list(completion.prompt_logprobs[1:]) == pytest.approx(scored, abs=1e-4, rel=0)
        else:
            assert completion.prompt_logprobs is None
    if policy != "small":  # that one takes several sweeps to take in all jobs
        assert watch.tokens[0] == sum(len(job.prompt) for job in JOBS) - (0 if padding == "fixed" else SAVED)
        if family in models.FAMILIES:
            assert watch.rows[0] == first_sweep_rows(padding)


def first_sweep_rows(padding: str) -> int:
    """Rows of a sweep that takes in all jobs: this many only if prefixes are shared, or prompts padded, as expected."""
    if padding == "fixed":  # no prefix sharing then
        return len(JOBS) * 80
    if padding == "bucket":  # every sequence's own tokens fill one bucket of 64
        return len(JOBS) * 64 + OUTER + INNER + WIDE
    return sum(len(job.prompt) for job in JOBS) - SAVED


def test_jobs_are_what_the_test_means() -> None:
    longest = max(len(job.prompt) for job in JOBS)
    assert OUTER + INNER < longest <= 80 < models.WINDOW
    assert sum(1 for job in JOBS if len(job.prompt) == 1) == 3
    assert {job.max_new_tokens for job in JOBS} == {0, 1, 8}


def assert_scores(engine: Engine, model: PreTrainedModel, prompts: list[list[int]]) -> None:
    jobs = [Job(prompt=prompt, max_new_tokens=1, prompt_logprobs=True) for prompt in prompts]
    for prompt, completion in zip(prompts, engine.run(jobs), strict=True):
        assert completion.error is None
        found = [*(completion.prompt_logprobs or ()), *completion.logprobs][1:]
        expected = models.reference_logprobs(model, [*prompt, *completion.tokens])
        assert found == pytest.approx(expected, abs=1e-4, rel=0)


@pytest.mark.parametrize("padding", [None, "bucket", 200])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_a_prompt_may_fill_the_window_under_any_pad(
    family: str, padding: Any, build: Callable[[str], Path], reference: Callable[[str], PreTrainedModel]
) -> None:
    prompts = [[5 + i for i in range(size)] for size in (models.WINDOW, models.WINDOW - 1, 65)]
    with Engine.from_pretrained(str(build(family)), policy={"device": "cpu", "pad-to-seq-len": padding}) as engine:
        assert_scores(engine, reference(family), prompts)


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_any_number_of_layers_takes_turns_in_the_slots(num_layers: int, tied: bool, tmp_path: Path) -> None:
    directory = models.save_model(tmp_path / "model", "llama", num_hidden_layers=num_layers, tie_word_embeddings=tied)
    model = models.load_reference(directory)
    prompts = [[*range(7, 7 + size)] for size in (30, 31, 3)]
    for percent in (POLICIES["host"]["percent"], POLICIES["thirds"]["percent"], [95, 5, 100, 0, 100, 0]):
        policy = {"device": "cpu", "percent": percent, "offload-dir": str(tmp_path / "offload")}
        with Engine.from_pretrained(str(directory), policy=policy) as engine:
            for _ in range(2):
                assert_scores(engine, model, prompts)
