"""Ends completions at stop strings, stop ids, end-of-text or their length, and makes their text and tokens."""

from __future__ import annotations

from itertools import islice

from engine.errors import EngineError, JobError, named
from engine.job import Completion, Likeliest
from engine.schedule.sequence import Sequence
from engine.text.decoding import Text

_INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit)
_UNREADABLE = "\ufffd"
"""The replacement character for bytes that form no character; later bytes may complete them."""


def add_token(sequence: Sequence, token: int, logprob: float, text: Text) -> None:
    """Append a generated token to `sequence`, or end it; never raises: an error in its text becomes its `error`."""
    try:
        _add_token(sequence, token, logprob, text)
    except _INTERRUPTS:
        raise
    except BaseException as error:  # tokenizers raise whatever they meet; a panic of theirs is no Exception
        sequence.error = _fault(sequence, error, text)


def _add_token(sequence: Sequence, token: int, logprob: float, text: Text) -> None:
    if token in text.end_of_text:
        sequence.finish_reason, sequence.end_token = "endoftext", token
        return
    sequence.tokens.append(token)
    sequence.generated_logprobs.append(logprob)
    before = sequence.thinking.place
    if sequence.job.thinking is not None:
        sequence.thinking.take(
            sequence.job.thinking,
            lambda size: text.tail(sequence.tokens, sequence.num_prompt, size),
            lambda: text.decode(sequence.generated),
        )
    if _stopped(sequence, text, all_is_new=before != sequence.thinking.place):
        sequence.finish_reason = "stop"
    elif len(sequence.generated_logprobs) == sequence.job.max_new_tokens:
        sequence.finish_reason = "length"


def _stopped(sequence: Sequence, text: Text, *, all_is_new: bool) -> bool:
    """Whether a stop ends the sequence now; `all_is_new`: none of its text has been searched yet."""
    if _num_stop_ids(sequence):
        return True
    strings = [stop for stop in sequence.job.stop if isinstance(stop, str)]
    if not strings or sequence.thinking.place != "answer":
        return False
    if not all_is_new and not any(_UNREADABLE in stop for stop in strings):  # any byte may change what was before
        tail = text.tail(sequence.tokens, sequence.num_prompt, max(map(len, strings)))
        if not any(stop in tail for stop in strings):
            return False
    written = text.decode(sequence.generated)
    answer = written[_answer_begin(sequence, written) :]
    return any(stop in answer for stop in strings)


def _answer_begin(sequence: Sequence, written: str) -> int:
    """The index in its text from which stops count: the beginning, or the end of the thinking."""
    rule = sequence.job.thinking
    return 0 if rule is None else rule.read(written).begin


def _num_stop_ids(sequence: Sequence) -> int:
    """The length of the longest stop of token ids that the generated tokens end with; 0 without one."""
    tokens, num_generated = sequence.tokens, len(sequence.tokens) - sequence.num_prompt
    found = 0
    for stop in sequence.job.stop:
        size = len(stop)
        if not isinstance(stop, str) and found < size <= num_generated and list(stop) == tokens[-size:]:
            found = size
    return found


def completion_of(sequence: Sequence, text: Text) -> Completion:
    """The completion of a sequence that is done; never raises: an error in its text becomes its error."""
    if sequence.error is not None:
        return Completion(error=sequence.error)
    try:
        return _completion_of(sequence, text)
    except _INTERRUPTS:
        raise
    except BaseException as error:
        return Completion(error=_fault(sequence, error, text))


def _completion_of(sequence: Sequence, text: Text) -> Completion:
    tokens, written, is_cut = _cut(sequence, text)
    logprobs, greedy = _prompt_scores(sequence) if sequence.job.prompt_logprobs else (None, None)
    asks = sequence.job.likeliest
    return Completion(
        text=written,
        tokens=tuple(tokens),
        logprobs=tuple(sequence.generated_logprobs[: len(tokens)]),
        prompt_logprobs=logprobs,
        prompt_greedy=greedy,
        likeliest=tuple(sequence.generated_likeliest[: len(tokens)]) if asks else None,
        prompt_likeliest=_prompt_likeliest(sequence) if asks and logprobs is not None else None,
        finish_reason="stop" if is_cut else sequence.finish_reason,
        end_token=None if is_cut else sequence.end_token,
    )


def _cut(sequence: Sequence, text: Text) -> tuple[list[int], str, bool]:
    """Tokens and text before the stop, and whether there is one; the last token may reach past the text's end.

    A sequence that ends before it is decided whether it thinks does not think, and was not searched for stops. Of
    several stops the one that leaves the fewest tokens cuts, and of those the one that leaves the least text.
    """
    tokens = sequence.generated
    written = text.decode(tokens) if tokens else ""
    if sequence.finish_reason != "stop" and sequence.thinking.place != "before":
        return tokens, written, False
    ends: list[tuple[int, str]] = []
    begin = _answer_begin(sequence, written)
    places = [written.find(stop, begin) for stop in sequence.job.stop if isinstance(stop, str)]
    found = [place for place in places if place >= 0]
    if found:
        before = written[: min(found)]
        ends.append((text.num_spelling(tokens, before), before))
    if by_ids := _num_stop_ids(sequence):
        count = len(tokens) - by_ids
        ends.append((count, text.decode(tokens[:count]) if count else ""))
    if not ends:
        return tokens, written, False
    count, written = min(ends, key=lambda end: (end[0], len(end[1])))
    return tokens[:count], written, True


def _prompt_scores(sequence: Sequence) -> tuple[tuple[float | None, ...], tuple[bool | None, ...]]:
    """Log-probabilities of the whole prompt, and which tokens are greedy: the chain's, then the sequence's own.

    The very first token has neither.
    """
    logprobs: list[float | None] = [None]
    greedy: list[bool | None] = [None]
    for prefix, following in zip(sequence.chain, (*sequence.chain, sequence)[1:], strict=True):
        token = following.tokens[0]
        logprobs += [*prefix.prompt_logprobs, float(prefix.next_logprobs[token])]
        greedy += [*prefix.prompt_greedy, prefix.next_greedy == token]
    return (*logprobs, *sequence.prompt_logprobs), (*greedy, *sequence.prompt_greedy)


def _prompt_likeliest(sequence: Sequence) -> tuple[Likeliest | None, ...]:
    """The likeliest token in the place of each token of the whole prompt; the first has none."""
    found: list[Likeliest | None] = [None]
    for prefix in sequence.chain:
        assert prefix.next_greedy is not None
        found += [*prefix.prompt_likeliest, (prefix.next_greedy, float(prefix.next_logprobs[prefix.next_greedy]))]
    return (*found, *sequence.prompt_likeliest)


def _fault(sequence: Sequence, error: BaseException, text: Text) -> EngineError:
    """The error of a sequence whose completion failed with `error`; names tokens that cannot be decoded."""
    reason = named(error)
    generated = sequence.generated
    bad = list(islice((token for token in dict.fromkeys(generated) if not _is_readable([token], text)), 11))
    if not bad and _is_readable(generated, text):
        return EngineError(f"the completion of this job could not be made ({reason}); please report it with the job")
    told = bad or generated
    return JobError(
        f"the tokenizer cannot decode generated token ids {', '.join(map(str, told[:10]))}"
        f"{' ...' if len(told) > 10 else ''} ({reason}); the tokenizer and the model do not belong together, use the "
        "tokenizer that the model was trained with"
    )


def _is_readable(tokens: list[int], text: Text) -> bool:
    try:
        text.decode(tokens)
    except _INTERRUPTS:
        raise
    except BaseException:
        return False
    return True
