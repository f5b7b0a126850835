"""The comparison with plain transformers: jobs of every kind, what it makes of them, and where completions differ."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.job import Completion, Job
from flexgen_helm.checking.plain import reference_greedy, reference_logprobs
from flexgen_helm.checking.shrinking import VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4
"""The tolerance for log-probabilities in float32: splitting a prompt reorders sums."""
REACH = 500 * TOLERANCE
"""The least effect of context on log-probabilities with which agreement says anything about attention."""
OUTER, INNER = 24, 20
"""The lengths of a shared prefix, and of a further one that some of its users share."""


def make_jobs() -> list[Job]:
    """Prompts with shared and nested prefixes, of one token, of unequal lengths; scoring, one token, many tokens."""
    rng = random.Random(1)

    def words(count: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(count)]

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
LONGEST = max(len(job.prompt) + job.max_new_tokens for job in JOBS)
"""Tokens of the longest sequence."""


@dataclass(frozen=True)
class Expected:
    """What plain transformers makes of a job."""

    tokens: list[int]
    logprobs: list[float]
    """The log-probabilities of the prompt except its first token, then of the generated tokens."""
    finish_reason: str


def expect(model: PreTrainedModel) -> list[Expected]:
    """What `model`, in plain transformers, makes of `JOBS`."""
    answers = []
    for job in JOBS:
        prompt, count = list(job.prompt), job.max_new_tokens
        tokens = reference_greedy(model, prompt, count) if count else []
        logprobs = reference_logprobs(model, prompt + tokens)
        answers.append(Expected(tokens, logprobs, "length" if len(tokens) == count else "endoftext"))
    return answers


def contradictions(model: PreTrainedModel, expected: list[Expected]) -> int:
    """Answers whose tokens, by `model.generate` with its cache, are not the greedy ones of `model`'s plain forward."""
    import torch

    found = 0
    for job, answer in zip(JOBS, expected, strict=True):
        tokens = [*job.prompt, *answer.tokens]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, len(job.prompt) - 1 : -1]
        found += logits.argmax(-1).tolist() != answer.tokens
    return found


def differences(expected: list[Expected], done: list[Completion]) -> tuple[list[str], float]:
    """The differences between completions of `JOBS`, in words, and the largest one of a log-probability."""
    found, largest = [], 0.0
    for index, (job, answer, completion) in enumerate(zip(JOBS, expected, done, strict=True)):
        size = len(job.prompt)
        if completion.error is not None:
            found.append(f"job {index} ({size} tokens): {completion.error}")
            continue
        ended = (list(completion.tokens), completion.finish_reason)
        if ended != (answer.tokens, answer.finish_reason):
            found.append(f"job {index} ({size} tokens): {ended} instead of {(answer.tokens, answer.finish_reason)}")
            continue
        scored = completion.prompt_logprobs
        if (scored is not None) != job.prompt_logprobs or (scored is not None and scored[0] is not None):
            found.append(f"job {index} ({size} tokens): prompt log-probabilities {scored}")
            continue
        values = [*(each for each in (scored or [])[1:] if each is not None), *completion.logprobs]
        oracle = answer.logprobs if job.prompt_logprobs else answer.logprobs[size - 1 :]
        if len(values) != len(oracle):
            found.append(f"job {index} ({size} tokens): {len(values)} log-probabilities instead of {len(oracle)}")
            continue
        apart = max((abs(a - b) for a, b in zip(values, oracle, strict=True)), default=0.0)
        largest = max(largest, apart)
        if not apart <= TOLERANCE:  # as NaN is not
            found.append(f"job {index} ({size} tokens): log-probabilities differ by up to {apart:.2g}")
    return found, largest


def reach(model: PreTrainedModel) -> float:
    """The largest change of log-probabilities after the second token when a prompt's first token changes."""
    moved = 0.0
    for job in JOBS[:2]:
        first, *rest = job.prompt
        before, after = (reference_logprobs(model, [token, *rest]) for token in (first, first % 400 + 50))
        moved = max(moved, *(abs(a - b) for a, b in zip(before[1:], after[1:], strict=True)))
    return moved
