"""The only module that changes spans by the results of a sweep."""

from __future__ import annotations

from collections.abc import Iterable

from engine.executor import Answer
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix, Sequence
from engine.text.completion import add_token
from engine.text.decoding import Text


def advance(batches: Iterable[Iterable[Segment]], answers: Iterable[Answer], text: Text) -> None:
    """Apply the results of a sweep, and `answers`, to the spans of its micro-batches, in order.

    Sequences get their next tokens, or end; spans get the log-probabilities of their prompt tokens. A span whose logits
    are not all finite is marked so and gets no token.
    """
    segments = [segment for batch in batches for segment in batch]
    for segment in segments:
        segment.span.cached += segment.num_rows - len(segment.draft)
    for answer in answers:
        _take(answer, text)
    for segment in segments:
        span = segment.span
        if isinstance(span, Sequence) and span.job.max_new_tokens == 0 and span.is_finite_with_prefixes:
            span.finish_reason = "length"


def _take(answer: Answer, text: Text) -> None:
    ask, span = answer.ask, answer.ask.span
    if ask.drafted:
        assert isinstance(span, Sequence)
        if span.is_done or span.thinking.due or span.tokens[ask.num_before :] != list(ask.drafted):
            return  # computed on tokens that did not come, or chosen freely where one is due
        span.cached += 1
    span.is_finite &= answer.is_finite
    if ask.target is not None:
        span.prompt_logprobs.append(answer.logprob)
        span.prompt_greedy.append(answer.token == answer.greedy)
        if isinstance(span, Prefix) or (isinstance(span, Sequence) and span.job.likeliest):
            span.prompt_likeliest.append((answer.greedy, answer.greedy_logprob))
    elif isinstance(span, Prefix):
        span.next_logprobs, span.next_greedy = answer.next_logprobs, answer.greedy
    elif isinstance(span, Sequence) and span.is_finite:
        if span.job.likeliest:
            span.generated_likeliest.append((answer.greedy, answer.greedy_logprob))
        add_token(span, answer.token, answer.logprob, text)
