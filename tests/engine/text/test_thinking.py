"""Protects: what of a text is thinking, stops that count in the answer only, and budgets that forced tokens keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
from transcripts import CHANNELS, THINK, TRANSCRIPTS, Transcript
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from engine import Completion, Engine, Job, Sampling
from engine.errors import JobError
from engine.schedule.sequence import Sequence
from engine.text.completion import add_token, completion_of
from engine.text.decoding import Text
from engine.thinking import Tags, Thinking

KINDS = pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda each: each.name)


def rule(transcript: Transcript) -> Thinking:
    place = transcript.style.after(transcript.prompt)
    return Thinking(style=transcript.style, is_open=place == "thinking")


def parted(job: Job, text: str) -> tuple[str | None, str]:
    assert job.thinking is not None
    reading = job.thinking.read(text)
    return reading.thinking, text[reading.begin :]


@KINDS
def test_a_text_is_read_as_by_hand_wherever_it_ends(transcript: Transcript) -> None:
    job = Job(prompt=[1], thinking=rule(transcript))
    for end in range(len(transcript.text) + 1):
        assert parted(job, transcript.text[:end]) == transcript.until(end)


@pytest.mark.parametrize(
    ("prompt", "place"),
    [
        ("<|start|>assistant<|channel|>final<|message|>", "answer"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "thinking"),
        ("<|start|>assistant<|channel|>analysis<|message|>Well.<|end|>", "before"),
        ("<|start|>system<|message|>Say.<|end|><|start|>assistant", "before"),
    ],
)
def test_where_a_prompt_of_channels_ends(prompt: str, place: str) -> None:
    assert CHANNELS.after(prompt) == place


@pytest.fixture(scope="module", params=["in pieces", "as tokens"])
def text_of(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Text:
    """Marks are spelled in many tokens, or each is one."""
    tokenizer = deepcopy(tokenizer)
    if request.param == "as tokens":
        marks = ("<think>", "</think>", "<reason>", "</reason>", "[THINK]", "[/THINK]", "<|end|>", "<|message|>")
        tokenizer.add_tokens(list(marks))
    return Text(tokenizer, frozenset({2}))


def ended(job: Job, tokens: list[int], text: Text) -> Completion:
    """What becomes of a sequence whose model chooses these tokens, and then the end of text."""
    sequence = Sequence.of(job)
    for token in [*tokens, 2]:
        if not sequence.is_done:
            add_token(sequence, token, -1.0, text)
    return completion_of(sequence, text)


@KINDS
def test_stops_count_in_the_answer_only(transcript: Transcript, text_of: Text) -> None:
    """Every piece of the text as a stop: those in the thinking, at its borders and in its marks end nothing."""
    whole = transcript.text
    tokens = text_of.tokenizer.encode(whole, add_special_tokens=False)
    assert text_of.decode(tokens) == whole
    (thinking, answer), begin = transcript.until(len(whole)), transcript.begin
    job = Job(prompt=[1], max_new_tokens=len(tokens) + 1, thinking=rule(transcript))
    pieces = {*whole, *(whole[first : first + 4] for first in range(0, len(whole), 2))}
    for stop in sorted(pieces):
        at = answer.find(stop)
        done = ended(replace(job, stop=[stop]), tokens, text_of)
        assert parted(job, done.text) == (thinking, answer if at < 0 else answer[:at])
        assert (done.finish_reason, done.end_token) == (("stop", None) if at >= 0 else ("endoftext", 2))
        kept = whole if at < 0 else whole[: begin + at]
        fewest = next(n for n in range(len(tokens) + 1) if text_of.decode(tokens[:n]).startswith(kept))
        assert list(done.tokens) == tokens[:fewest]


@KINDS
def test_a_text_that_is_cut_off_or_ends_by_itself_anywhere(transcript: Transcript, text_of: Text) -> None:
    tokens = text_of.tokenizer.encode(transcript.text, add_special_tokens=False)
    for count in range(1, len(tokens)):
        job = Job(prompt=[1], max_new_tokens=count, thinking=rule(transcript), stop=["no such stop"])
        for done, reason in (
            (ended(job, tokens, text_of), "length"),
            (ended(replace(job, max_new_tokens=999), tokens[:count], text_of), "endoftext"),
        ):
            assert (done.finish_reason, list(done.tokens)) == (reason, tokens[:count])
            assert parted(job, done.text) == transcript.until(len(text_of.decode(tokens[:count])))


def test_stop_ids_end_the_thinking_too(text_of: Text) -> None:
    """HELM's end-of-text is one: a text goes on behind it nowhere."""
    tokens = text_of.tokenizer.encode("<think> reload 12", add_special_tokens=False)
    done = ended(
        Job(prompt=[1], max_new_tokens=99, thinking=Thinking(style=THINK), stop=[tokens[-1:]]), tokens, text_of
    )
    assert (done.finish_reason, list(done.tokens)) == ("stop", tokens[:-1])


def test_what_ends_before_it_begins_to_think_is_stopped_as_any_text(text_of: Text) -> None:
    tokens = text_of.tokenizer.encode(" \n\n", add_special_tokens=False)
    for most, stop in ((len(tokens), "\n"), (99, "\n"), (len(tokens), " ")):
        job = Job(prompt=[1], max_new_tokens=most, thinking=Thinking(style=THINK), stop=[stop])
        done = ended(job, tokens, text_of)
        assert (done.finish_reason, done.end_token, done.text) == ("stop", None, " \n\n".partition(stop)[0])


def test_what_turns_out_to_be_an_answer_is_stopped_where_it_would_have_been(text_of: Text) -> None:
    tokens = text_of.tokenizer.encode("\n" + " " * 60 + "reload", add_special_tokens=False)
    done = ended(Job(prompt=[1], max_new_tokens=999, thinking=Thinking(style=THINK), stop=["\n"]), tokens, text_of)
    assert (done.finish_reason, done.text, done.tokens) == ("stop", "", ())


# Engines


@pytest.fixture(scope="module")
def engine(build: Callable[[str], Path]) -> Iterator[Engine]:
    """One that drafts, as engines do where transfers set the pace."""
    with Engine.from_pretrained(str(build("llama")), policy={"device": "cpu"}) as engine:
        engine.parts.lanes[0].scheduler.limits = replace(engine.parts.lanes[0].scheduler.limits, free_rows=500)
        yield engine


@pytest.fixture(scope="module")
def plain(reference: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return reference("llama")


def prompts() -> list[list[int]]:
    """Some begin alike; long ones repeat themselves, so that drafts come true."""
    shared = [5 + 7 * place % 300 for place in range(20)]
    return [[*shared, 9, 40], [*shared, 9, 41], [11, 12, 13, 14] * 6, [22]]


def expected(
    plain: PreTrainedModel, prompt: list[int], opening: int, budget: int, closing: list[int], count: int
) -> list[int]:
    """Plain transformers, up to the budget, and on from what is forced there."""
    at = min(count, opening + budget)
    first = models.reference_greedy(plain, prompt, at) if at else []
    if len(first) < opening + budget:
        return first
    forced = [*first, *closing][:count]
    if len(forced) == count:
        return forced
    return forced + models.reference_greedy(plain, prompt + forced, count - len(forced))


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("budget", [0, 1, 7, 64])
def test_a_budget_is_kept_to_the_token(engine: Engine, plain: PreTrainedModel, is_open: bool, budget: int) -> None:
    """By thinking that the prompt opens, and by thinking that the model opens: the mark is what it writes first."""
    decode = engine.tokenizer.decode
    closing = engine.tokenizer.encode("</think>", add_special_tokens=False)
    assert len(closing) > 1
    jobs, wanted, count = [], [], budget + 20
    for prompt in prompts():
        opening = models.reference_greedy(plain, prompt, 2)
        begin = "<think>" if is_open else str(decode(opening)).strip()
        num_opening = 0 if is_open else next(n for n in (1, 2) if begin in str(decode(opening[:n])))
        wanted.append(expected(plain, prompt, num_opening, budget, closing, count))
        style = Tags(begin=begin, end="</think>")
        thinking = Thinking(style=style, is_open=is_open, budget=budget, closing=tuple(closing))
        jobs.append(Job(prompt=prompt, max_new_tokens=count, thinking=thinking))
    together, num_saved = engine.run(jobs), 0
    for job, done, tokens in zip(jobs, together, wanted, strict=True):
        assert done.error is None
        assert list(done.tokens) == tokens
        logprobs = models.reference_logprobs(plain, [*job.prompt, *tokens])[len(job.prompt) - 1 :]
        assert done.logprobs == pytest.approx(logprobs, abs=1e-4)
        before = engine.num_sweeps
        assert [done.tokens] == [alone.tokens for alone in engine.run([job])]
        num_saved += len(tokens) - (engine.num_sweeps - before)
    assert num_saved > 5  # drafts came true


def test_what_is_due_is_not_drafted(engine: Engine, plain: PreTrainedModel) -> None:
    """The prompt repeats itself, and what closes the thinking is how it would go on."""
    prompt, closing = [11, 12, 13, 14] * 6, [11, 12]
    style = Tags(begin="<think>", end=str(engine.tokenizer.decode(closing)))
    thinking = Thinking(style=style, is_open=True, budget=0, closing=tuple(closing))
    (done,) = engine.run([Job(prompt=prompt, max_new_tokens=9, thinking=thinking)])
    assert list(done.tokens) == expected(plain, prompt, 0, 0, closing, 9)


def test_what_closes_thinking_is_forced_once_whatever_it_spells(engine: Engine, plain: PreTrainedModel) -> None:
    prompt, closing = [11, 12, 13, 14] * 6, [7, 8, 9]
    thinking = Thinking(style=THINK, is_open=True, budget=2, closing=tuple(closing))
    (done,) = engine.run([Job(prompt=prompt, max_new_tokens=12, thinking=thinking)])
    assert list(done.tokens) == expected(plain, prompt, 0, 2, closing, 12)


def test_a_budget_that_is_not_used_up_changes_nothing(engine: Engine) -> None:
    """Sampled, too: the same draws choose the same tokens."""
    sampling = [Sampling(), Sampling(temperature=1.0, seed=3)]
    jobs = [Job(prompt=prompt, max_new_tokens=12, sampling=each) for prompt in prompts() for each in sampling]
    style = Tags(begin="<think>", end="</think>")
    free = Thinking(style=style, is_open=True)
    kept = replace(free, budget=12, closing=(5, 6))
    results = [engine.run([replace(job, thinking=thinking) for job in jobs]) for thinking in (None, free, kept)]
    assert results[0] == results[1] == results[2]
    shorter = engine.run([replace(job, thinking=replace(kept, budget=4)) for job in jobs])
    assert [done.tokens[:6] for done in shorter] == [(*done.tokens[:4], 5, 6) for done in results[0]]


@pytest.mark.parametrize(
    ("thinking", "told"),
    [
        (Thinking(style=Tags(begin="", end="x")), "neither may be empty"),
        (Thinking(style=THINK, budget=-1, closing=(1,)), "thinking budget -1 is no number of tokens"),
        (Thinking(style=THINK, budget=3), "needs the token ids that close thinking"),
        (Thinking(style=THINK, budget=3, closing=[1]), "is a tuple of token ids, not [1]"),  # type: ignore[arg-type]
        (Thinking(style="think"), "is neither Tags nor Channels"),  # type: ignore[arg-type]
        (Thinking(style=THINK, budget=3, closing=(10**6,)), "token 1000000, which is to close thinking, is outside"),
    ],
)
def test_rules_that_cannot_be_carried_out(engine: Engine, thinking: Any, told: str) -> None:
    (done,) = engine.run([Job(prompt=[5], thinking=thinking)])
    assert isinstance(done.error, JobError)
    assert told in str(done.error)
