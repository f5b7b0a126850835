"""Packs jobs and completions into few arrays, to send them between processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.job import Completion, FinishReason, Job, Likeliest, Sampling
from engine.thinking import Thinking

Numbers = NDArray[np.int64]
Tokens = NDArray[np.int32]

_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length", "endoftext")
_NONE = -1


@dataclass(frozen=True, kw_only=True)
class PackedJobs:
    """Checked jobs, by number."""

    numbers: Numbers
    """The number of each job, by which both sides know it: `[jobs]`."""
    ids: Tokens
    """The tokens of all prompts, concatenated."""
    ends: Numbers
    """The end of each prompt in `ids`: `[jobs]`."""
    others: tuple[tuple[int, Sampling, tuple[str | tuple[int, ...], ...], bool, bool, Thinking | None], ...]
    """The other settings of jobs, without duplicates: new tokens, sampling, stops, whether the prompt is scored and
    the likeliest tokens are returned, and the thinking rule."""
    other: Numbers
    """The index of each job's settings in `others`: `[jobs]`."""

    @classmethod
    def of(cls, jobs: Iterable[tuple[int, Job]]) -> PackedJobs:
        """Pack (number, job); the jobs must have passed `Job.check`, and their prompts must be token ids."""
        listed = list(jobs)
        others: dict[Any, int] = {}
        other = [others.setdefault(_rest(job), len(others)) for _, job in listed]
        return cls(
            numbers=_numbers(number for number, _ in listed),
            ids=_tokens(chain.from_iterable(job.prompt for _, job in listed)),
            ends=_numbers(accumulate(len(job.prompt) for _, job in listed)),
            others=tuple(others),
            other=_numbers(other),
        )

    def unpack(self) -> list[tuple[int, Job]]:
        """(number, job) in their order; prompts and stops are tuples."""
        jobs = []
        for number, prompt, other in zip(self.numbers.tolist(), self._prompts(), self.other.tolist(), strict=True):
            most, sampling, stop, is_scored, likeliest, thinking = self.others[other]
            job = Job(
                prompt=prompt,
                max_new_tokens=most,
                sampling=sampling,
                stop=stop,
                prompt_logprobs=is_scored,
                likeliest=likeliest,
                thinking=thinking,
            )
            jobs.append((number, job))
        return jobs

    def _prompts(self) -> Iterator[tuple[int, ...]]:
        """The prompts; repeated tokens share one object, which is faster to make and to compare."""
        num_ids = int(self.ids.max(initial=0)) + 1
        known = np.arange(num_ids).astype(object) if num_ids < len(self.ids) else None
        for begin, end in _bounds(self.ends):
            ids = self.ids[begin:end]
            yield tuple((ids if known is None else known[ids]).tolist())


@dataclass(frozen=True, kw_only=True)
class PackedCompletions:
    """The results of jobs, by number."""

    numbers: Numbers
    texts: tuple[str, ...]
    tokens: Tokens
    """The tokens of all texts, concatenated, like the following."""
    token_ends: Numbers
    logprobs: NDArray[np.float64]
    prompt_logprobs: NDArray[np.float64]
    """The log-probabilities of prompt tokens, except the first of each prompt, which has none."""
    prompt_greedy: NDArray[np.bool_]
    """The greedy flags of prompt tokens, except the first of each prompt."""
    scored: Numbers
    """The number of tokens of each prompt that was scored; -1 for those that were not to be scored."""
    reasons: Numbers
    """The finish reason of each job, as an index in a list of reasons."""
    end_tokens: Numbers
    """The end-of-text token of each job; -1 where none ended it."""
    likeliest: dict[int, tuple[tuple[Likeliest, ...], tuple[Likeliest | None, ...] | None]]
    """The likeliest tokens, and those of the prompt, by number, for jobs that request them."""
    errors: dict[int, EngineError]
    """The errors of failed jobs, by number."""

    @classmethod
    def of(cls, completions: Sequence[tuple[int, Completion]]) -> PackedCompletions:
        """Pack (number, completion)."""
        done = [each for _, each in completions]
        scored = [_NONE if each.prompt_logprobs is None else len(each.prompt_logprobs) for each in done]
        return cls(
            numbers=_numbers(number for number, _ in completions),
            texts=tuple(each.text for each in done),
            tokens=_tokens(chain.from_iterable(each.tokens for each in done)),
            token_ends=_numbers(accumulate(len(each.tokens) for each in done)),
            logprobs=np.array([*chain.from_iterable(each.logprobs for each in done)], dtype=np.float64),
            prompt_logprobs=np.array(
                [*chain.from_iterable((each.prompt_logprobs or ())[1:] for each in done)], dtype=np.float64
            ),
            prompt_greedy=np.array([*chain.from_iterable((each.prompt_greedy or ())[1:] for each in done)], dtype=bool),
            scored=_numbers(scored),
            reasons=_numbers(_REASONS.index(each.finish_reason) for each in done),
            end_tokens=_numbers(_NONE if each.end_token is None else each.end_token for each in done),
            likeliest={
                number: (each.likeliest, each.prompt_likeliest)
                for number, each in completions
                if each.likeliest is not None
            },
            errors={number: each.error for number, each in completions if each.error is not None},
        )

    def unpack(self) -> list[tuple[int, Completion]]:
        """(number, completion) in their order."""
        tokens, logprobs = (
            _pieces(self.tokens.tolist(), self.token_ends),
            _pieces(self.logprobs.tolist(), self.token_ends),
        )
        behind_first = np.maximum(self.scored - 1, 0).cumsum()
        scores, greedy = (
            _pieces(values.tolist(), behind_first) for values in (self.prompt_logprobs, self.prompt_greedy)
        )
        found = []
        for number, text, ids, logs, size, own_scores, own_greedy, reason, end in zip(
            self.numbers.tolist(),
            self.texts,
            tokens,
            logprobs,
            self.scored.tolist(),
            scores,
            greedy,
            self.reasons.tolist(),
            self.end_tokens.tolist(),
            strict=True,
        ):
            first: tuple[None, ...] = (None,) * (size > 0)
            likeliest, of_prompt = self.likeliest.get(number, (None, None))
            completion = Completion(
                text=text,
                tokens=ids,
                logprobs=logs,
                prompt_logprobs=None if size == _NONE else (*first, *own_scores),
                prompt_greedy=None if size == _NONE else (*first, *own_greedy),
                likeliest=likeliest,
                prompt_likeliest=of_prompt,
                finish_reason=_REASONS[reason],
                end_token=None if end == _NONE else end,
                error=self.errors.get(number),
            )
            found.append((number, completion))
        return found


def _rest(job: Job) -> tuple[Any, ...]:
    stop = tuple(each if isinstance(each, str) else tuple(map(int, each)) for each in job.stop)
    return int(job.max_new_tokens), job.sampling, stop, bool(job.prompt_logprobs), bool(job.likeliest), job.thinking


def _numbers(values: Iterable[int]) -> Numbers:
    return np.fromiter(values, dtype=np.int64)


def _tokens(values: Iterable[int]) -> Tokens:
    return np.fromiter(values, dtype=np.int32)


def _pieces(values: list[Any], ends: Numbers) -> Iterator[tuple[Any, ...]]:
    return (tuple(values[begin:end]) for begin, end in _bounds(ends))


def _bounds(ends: Numbers) -> Iterator[tuple[int, int]]:
    return pairwise((0, *ends.tolist()))
