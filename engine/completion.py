"""Ends completions: stop strings, stop ids, end-of-text and length; and what text and tokens are then."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from engine.job import Completion
from engine.schedule.sequence import Sequence

_MARGIN = 8
"""Characters at the beginning of a piece of text that may be other than in the whole: a space, half a character."""


@dataclass(frozen=True)
class Text:
    """Turns tokens into text, and knows which tokens end it."""

    tokenizer: PreTrainedTokenizerBase
    end_of_text: frozenset[int]

    def decode(self, tokens: list[int]) -> str:
        """Text of generated tokens, special ones spelled out."""
        text = self.tokenizer.decode(tokens)
        assert isinstance(text, str)
        return text


def advance(sequence: Sequence, token: int, logprob: float, text: Text) -> None:
    """Add a generated token to `sequence`, or end it."""
    if token in text.end_of_text:
        sequence.finish_reason, sequence.end_token = "endoftext", token
        return
    sequence.tokens.append(token)
    sequence.generated_logprobs.append(logprob)
    if _stopped(sequence, text):
        sequence.finish_reason = "stop"
    elif len(sequence.generated_logprobs) == sequence.job.max_new_tokens:
        sequence.finish_reason = "length"


def _stopped(sequence: Sequence, text: Text) -> bool:
    generated = sequence.generated
    strings = [stop for stop in sequence.job.stop if isinstance(stop, str)]
    if any(_ends_with(generated, stop) for stop in sequence.job.stop):
        return True
    if not strings or not any(stop in _tail(generated, strings, text) for stop in strings):
        return False
    written = text.decode(generated)
    return any(stop in written for stop in strings)


def _tail(tokens: list[int], stops: list[str], text: Text) -> str:
    """Text of the last tokens: enough of them to show any of `stops` that the newest token may have completed.

    Decoding all of them at every step would take time that grows with the square of their number.
    """
    longest = max(map(len, stops))
    enough = longest + len(text.decode(tokens[-1:])) + _MARGIN
    count = longest + _MARGIN
    while True:
        tail = text.decode(tokens[-count:])
        if count >= len(tokens) or len(tail) >= enough:
            return tail
        count *= 2


def _ends_with(tokens: list[int], stop: object) -> bool:
    return not isinstance(stop, str) and list(stop) == tokens[-len(list(stop)) :]  # type: ignore[call-overload]


def completion_of(sequence: Sequence, text: Text) -> Completion:
    """The completion of a sequence that is done."""
    if sequence.error is not None:
        return Completion(error=sequence.error)
    tokens, written = _cut(sequence, text)
    logprobs, greedy = _prompt_scores(sequence) if sequence.job.prompt_logprobs else (None, None)
    return Completion(
        text=written,
        tokens=tuple(tokens),
        logprobs=tuple(sequence.generated_logprobs[: len(tokens)]),
        prompt_logprobs=logprobs,
        prompt_greedy=greedy,
        finish_reason=sequence.finish_reason,
        end_token=sequence.end_token,
    )


def _cut(sequence: Sequence, text: Text) -> tuple[list[int], str]:
    """Tokens and text before the stop, if one ended the sequence; the last token may reach past the text's end."""
    tokens = sequence.generated
    written = text.decode(tokens) if tokens else ""
    if sequence.finish_reason != "stop":
        return tokens, written
    by_ids = max((len(stop) for stop in sequence.job.stop if _ends_with(tokens, stop)), default=0)
    before = text.decode(tokens[: len(tokens) - by_ids]) if by_ids else written
    found = [written.find(stop) for stop in sequence.job.stop if isinstance(stop, str) and stop in written]
    if by_ids and len(before) <= min(found, default=len(written)):
        return tokens[: len(tokens) - by_ids], before
    written = written[: min(found)]
    while tokens and (not written or text.decode(tokens[:-1]).startswith(written)):
        tokens = tokens[:-1]
    return tokens, written


def _prompt_scores(sequence: Sequence) -> tuple[tuple[float | None, ...], tuple[bool | None, ...]]:
    """Log-probabilities of the whole prompt, and which tokens are greedy: the chain's, then the sequence's own.

    The first token of all has neither.
    """
    logprobs: list[float | None] = [None]
    greedy: list[bool | None] = [None]
    for prefix, following in zip(sequence.chain, (*sequence.chain, sequence)[1:], strict=True):
        token = following.tokens[0]
        logprobs += [*prefix.prompt_logprobs, float(prefix.next_logprobs[token])]
        greedy += [*prefix.prompt_greedy, prefix.next_greedy == token]
    return (*logprobs, *sequence.prompt_logprobs), (*greedy, *sequence.prompt_greedy)
