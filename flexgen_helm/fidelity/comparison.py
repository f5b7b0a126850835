"""Compares a run's requests with the reference: the differences of tokens and log-probabilities."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.job import Completion, Job
from flexgen_helm.fidelity.oracle import Forced, Oracle
from flexgen_helm.helm.requests.results import Timing, result
from flexgen_helm.helm.requests.translate import Translator

if TYPE_CHECKING:
    from helm.benchmark.adaptation.request_state import RequestState


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The log-probability of one token, by the engine and by the reference."""

    instance_id: str | None
    train_trial_index: int
    reference_index: int | None
    """The index of the instance's reference answer, where each has a request of its own."""
    part: str
    """"prompt" or "completion"."""
    position: int
    """The position of the token in that part."""
    ours: float
    reference: float

    @property
    def size(self) -> float:
        """The absolute difference."""
        return abs(self.ours - self.reference)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A completion of ours, compared with the reference."""

    worst: Difference | None
    """The largest difference; None where there is no log-probability to compare."""
    num_logprobs: int
    sum_of_differences: float
    is_sampled: bool
    """Sampled (or penalized) tokens are ours alone, so that only their log-probabilities are compared."""
    num_agreeing: int = 0
    """Greedy tokens up to the first that differs."""
    num_tokens: int = 0
    """Greedy tokens of the longer of the two completions."""
    same_text: bool | None = None
    """Whether the texts are equal; None where nothing is decoded greedily."""
    margin: float = 0.0
    """Where tokens differ: by how much log-probability the reference prefers its own to the next likely token."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All of a run's requests, compared with the reference, and the run's states with the reference's results."""

    compared: list[Compared]
    states: list[RequestState]
    """The states; those of sampled requests, of requests that the reference fails, too, and of those without a known
    reference answer are unchanged."""
    num_requests: int
    """The compared requests; failed ones have nothing to compare."""
    num_failed: int
    """Requests that our engine did not answer."""
    num_failed_here: int
    """The number of failed requests that the reference does answer; it does not run sampled ones, nor any where it
    does not decode."""
    num_untold: int = 0
    """Greedy requests whose continuation by the reference differs but is unknown, because the reference does not
    decode.
    """


def compare(
    states: Sequence[RequestState],
    completion_of: Callable[[Job], Completion],
    translator: Translator,
    reference: Oracle,
    progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
) -> Comparison:
    """Compute each request of a run by the reference and compare.

    `states` are the run's, with our results; `completion_of` returns our engine's completion of a job, with the token
    ids that HELM's results lack. The reference gets the very ids that our engine got. Its log-probabilities are those
    of our tokens, so that a divergence does not spoil the comparison of the tokens after it.
    """
    compared: list[Compared] = []
    theirs: list[RequestState] = []
    num_failed = num_failed_here = num_untold = num_tokens = 0
    for number, state in enumerate(states, start=1):
        request = state.request
        answers: list[Completion] = []
        started, is_sampled, is_told = time.time(), False, True
        if state.result is not None and state.result.success:
            text = translator.render(request)
            ids = translator.encode(request, text)
            jobs = translator.jobs(request, text, ids)
            for job in jobs:
                one, answer = _compare_job(state, job, completion_of(job), reference)
                compared.append(one)
                answers.append(answer)
                is_sampled |= one.is_sampled
                is_told &= answer.finish_reason is not None
            num_untold += not is_told
        else:
            num_failed += 1
            try:
                text = translator.render(request)
                ids = translator.encode(request, text)
                jobs = translator.jobs(request, text, ids)
                is_sampled = not all(map(_is_greedy, jobs))
                is_asked = reference.decodes and not is_sampled
                answers = [_answer(job, reference) for job in jobs] if is_asked else []
                num_failed_here += is_asked
            except EngineError:
                answers = []  # it fails there too
        if answers and is_told and not is_sampled:
            timing = Timing(seconds=time.time() - started, started=started, num_requests=1)
            response = translator.response(request, jobs, answers, timing)
            state = replace(state, result=result(response, cached=False))
        theirs.append(state)
        num_tokens += sum(len(ids) + len(answer.tokens) for answer in answers)
        progress(number, len(states), num_tokens)
    return Comparison(
        compared=compared,
        states=theirs,
        num_requests=len(states) - num_failed,
        num_failed=num_failed,
        num_failed_here=num_failed_here,
        num_untold=num_untold,
    )


def _is_greedy(job: Job) -> bool:
    """Whether the reference determines the job's tokens (also for a job that generates none)."""
    sampling = job.sampling
    return job.max_new_tokens == 0 or not (
        sampling.temperature or sampling.presence_penalty or sampling.frequency_penalty
    )


def _answer(job: Job, reference: Oracle) -> Completion:
    """Return the reference's answer to a greedy job; `EngineError` if it is not finite."""
    decoded = reference.greedy(job, Completion()) if job.max_new_tokens else Completion(finish_reason="length")
    forced = reference.force(job, decoded.tokens)
    return replace(decoded, logprobs=forced.logprobs, prompt_logprobs=forced.prompt_logprobs)


def _compare_job(state: RequestState, job: Job, ours: Completion, reference: Oracle) -> tuple[Compared, Completion]:
    """Compare one completion; also returns the reference's answer (for a sampled job: our tokens, forced)."""
    forced = reference.force(job, ours.tokens)
    differences = list(_differences(state, ours, forced))
    is_greedy = _is_greedy(job)
    compared = Compared(
        worst=max(differences, key=lambda each: each.size, default=None),
        num_logprobs=len(differences),
        sum_of_differences=math.fsum(each.size for each in differences),
        is_sampled=not is_greedy,
    )
    answer = replace(ours, logprobs=forced.logprobs, prompt_logprobs=forced.prompt_logprobs)
    if job.max_new_tokens == 0 or not is_greedy:
        return compared, answer
    decoded = reference.greedy(job, ours)
    num_agreeing = _common_prefix(ours.tokens, decoded.tokens)
    compared = replace(
        compared,
        num_agreeing=num_agreeing,
        num_tokens=max(len(ours.tokens), len(decoded.tokens)),
        same_text=decoded.finish_reason is not None and ours.text == decoded.text,
    )
    if decoded.tokens != ours.tokens:
        compared = replace(compared, margin=forced.margins[num_agreeing])
        if decoded.finish_reason is None:  # the reference's continuation is not known
            return compared, decoded
        forced = reference.force(job, decoded.tokens)
    return compared, replace(decoded, logprobs=forced.logprobs, prompt_logprobs=forced.prompt_logprobs)


def _differences(state: RequestState, ours: Completion, forced: Forced) -> Iterator[Difference]:
    pairs = {
        "prompt": (ours.prompt_logprobs or (), forced.prompt_logprobs or ()),
        "completion": (ours.logprobs, forced.logprobs),
    }
    for part, (here, there) in pairs.items():
        for position, (mine, its) in enumerate(zip(here, there, strict=True)):
            if mine is not None and its is not None:
                yield Difference(
                    instance_id=state.instance.id,
                    train_trial_index=state.train_trial_index,
                    reference_index=state.reference_index,
                    part=part,
                    position=position,
                    ours=mine,
                    reference=its,
                )


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)
