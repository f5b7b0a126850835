"""Protects: with every kind of tokenizer, text and tokens end where the text of all tokens so far says."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
from family_tokenizers import NAMES, family_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from engine import Completion, Job
from engine.errors import EngineError, JobError
from engine.schedule.sequence import Sequence as AdvancingSequence
from engine.text.completion import add_token, completion_of
from engine.text.decoding import Text

Stop = str | list[int]
KANJI = "吾輩は猫である"
TEXTS = [
    f"{KANJI}\n{KANJI}",
    "naïve café 🙂🙂🙂👨‍👩‍👧 end",
    "don't stop. It isn't , well ' it ' is 'm the end ?",
    "    return x  \n\n\n        # 12 + 37",
    "日\n本\n語\n\ttab\r\n",
]


def complete(tokens: Sequence[int], stops: Sequence[Stop], tokenizer: PreTrainedTokenizerFast) -> Completion:
    """The completion of a model that says `tokens`."""
    sequence = AdvancingSequence.of(Job(prompt=[0], max_new_tokens=len(tokens), stop=stops))
    text = Text(tokenizer, frozenset())
    for token in tokens:
        add_token(sequence, token, 0.0, text)
        if sequence.is_done:
            break
    return completion_of(sequence, text)


def complete_by_hand(
    tokens: list[int], stops: Sequence[Stop], tokenizer: PreTrainedTokenizerFast
) -> tuple[str, int, str]:
    """Text, number of tokens and finish reason by definition: after each token the text of all so far is searched."""
    written = ["", *(str(tokenizer.decode(tokens[:count])) for count in range(1, len(tokens) + 1))]
    for count in range(1, len(tokens) + 1):
        ends: list[tuple[int, int, str]] = []
        for stop in stops:
            if isinstance(stop, str):
                if stop in written[count]:
                    text = written[count][: written[count].index(stop)]
                    size = next(size for size, begun in enumerate(written) if begun.startswith(text))
                    ends.append((size, len(text), text))
            elif tokens[:count][-len(stop) :] == stop:
                ends.append((count - len(stop), len(written[count - len(stop)]), written[count - len(stop)]))
        if ends:
            size, _, text = min(ends)
            return text, size, "stop"
    return written[-1], len(tokens), "length"


@st.composite
def said(draw: st.DrawFn, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens of texts, of single characters in bytes where the tokenizer has such, and any at all."""
    rng = random.Random(draw(st.integers(0, 10**9)))
    by_bytes = [token for token in range(len(tokenizer)) if str(tokenizer.convert_ids_to_tokens(token))[:3] == "<0x"]
    tokens: list[int] = []
    while len(tokens) < 40:
        kind = rng.randrange(6)
        if kind < 3:
            text = rng.choice(TEXTS)
            begin = rng.randrange(len(text))
            tokens += tokenizer(text[begin : begin + rng.randrange(1, 12)], add_special_tokens=False)["input_ids"]
        elif kind == 3 and by_bytes:
            tokens += rng.choices(by_bytes, k=rng.randrange(1, 4))
        else:
            tokens += [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 4))]
    return tokens[: rng.randrange(1, 60)]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_stops_end_text_and_tokens_by_definition(name: str, data: st.DataObject) -> None:
    tokenizer = family_tokenizer(name)
    tokens = data.draw(said(tokenizer))
    rng = random.Random(data.draw(st.integers(0, 10**9)))
    stops: list[Stop] = []
    for _ in range(rng.randrange(1, 3)):
        count = rng.randrange(1, len(tokens) + 1)
        if rng.random() < 0.3:
            stops.append(tokens[count - 1 : count - 1 + rng.randrange(1, 4)])
        else:
            written = str(tokenizer.decode(tokens[:count]))
            begin = rng.randrange(len(written)) if written else 0
            pieces = [piece for piece in written[begin : begin + rng.randrange(1, 9)].split("\ufffd") if piece]
            stops.append(rng.choice(pieces) if pieces else "\n")
    done = complete(tokens, stops, tokenizer)
    assert done.error is None
    assert (done.text, len(done.tokens), done.finish_reason) == complete_by_hand(tokens, stops, tokenizer)
    assert list(done.tokens) == tokens[: len(done.tokens)]
    assert len(done.logprobs) == len(done.tokens)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_stop_that_is_unreadable_itself_is_found_where_it_comes(name: str, data: st.DataObject) -> None:
    tokenizer = family_tokenizer(name)
    tokens = data.draw(said(tokenizer))
    stop = "\ufffd" * data.draw(st.integers(1, 4))
    done = complete(tokens, [stop], tokenizer)
    text, _, reason = complete_by_hand(tokens, [stop], tokenizer)
    assert (done.text, done.finish_reason) == (text, reason)
    assert done.error is None


@pytest.mark.parametrize("name", ["llama-2", "mistral", "gemma"])
@pytest.mark.parametrize("stop", ["\n", "🙂", "で"])
def test_a_stop_within_a_long_run_of_bytes_is_not_missed(name: str, stop: str) -> None:
    tokenizer = family_tokenizer(name)
    for before in (KANJI.replace("で", ""), "🙃" * 9, "日" * 300):
        tokens = tokenizer(before + stop + KANJI, add_special_tokens=False)["input_ids"]
        done = complete(tokens, [stop], tokenizer)
        assert (done.text, done.finish_reason) == (before, "stop")
        assert tokenizer.decode(list(done.tokens)) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_of_ids_within_a_character_cuts_there(name: str) -> None:
    tokenizer = family_tokenizer(name)
    tokens = tokenizer("a日", add_special_tokens=False)["input_ids"]
    done = complete(tokens, [tokens[-1:], "never in it"], tokenizer)
    assert done.error is None
    assert (done.tokens, done.finish_reason) == (tuple(tokens[:-1]), "stop")
    assert done.text == tokenizer.decode(tokens[:-1])


class Panic(BaseException):
    """As a panic of the tokenizers library, which is no `Exception`."""


class Faulty(PreTrainedTokenizerFast):
    """Fails at a token."""

    fault: BaseException

    def decode(self, token_ids: int | list[int], **kwargs: object) -> str:
        """Text, unless 7 is among the tokens."""
        if 7 in (token_ids if isinstance(token_ids, list) else [token_ids]):
            raise self.fault
        return str(super().decode(token_ids, **kwargs))


@pytest.mark.parametrize("fault", [KeyError("no\nsuch"), MemoryError(), Panic("index out of range"), RecursionError()])
@pytest.mark.parametrize("stops", [[], ["x"]])
def test_a_fault_in_the_text_of_a_job_is_its_error(fault: BaseException, stops: list[str]) -> None:
    tokenizer = Faulty(tokenizer_object=family_tokenizer("llama-2").backend_tokenizer)
    tokenizer.fault = fault
    done = complete([5, 7, 9], stops, tokenizer)
    assert isinstance(done.error, JobError)
    assert str(done.error).startswith(f"the tokenizer cannot decode generated token ids 7 ({type(fault).__name__}")
    assert "\n" not in str(done.error)


def test_a_fault_that_is_not_the_tokens_is_the_error_of_the_job_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr(Text, "tail", fail)
    done = complete([5, 9], ["x"], family_tokenizer("gpt-2"))
    assert isinstance(done.error, EngineError)
    assert str(done.error).startswith("the completion of this job could not be made (ZeroDivisionError: by chance)")


def test_an_interrupt_is_no_fault_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Text, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        complete([5, 9], ["x"], family_tokenizer("gpt-2"))


@pytest.mark.parametrize("name", ["llama-2", "gpt-2"])
def test_the_search_for_stops_takes_time_in_proportion_to_the_tokens(name: str) -> None:
    """One run of bytes, the longest way; four times the tokens would take sixteen times as long by decoding all."""
    tokenizer = family_tokenizer(name)

    def seconds(count: int) -> float:
        tokens = tokenizer("日本語" * (count // 9), add_special_tokens=False)["input_ids"]
        begun = time.process_time()
        assert complete(tokens, ["\n", "never in it"], tokenizer).finish_reason == "length"
        return time.process_time() - begun

    seconds(900)
    few, many = min(seconds(2_000) for _ in range(3)), min(seconds(8_000) for _ in range(2))
    assert many < 8 * few
