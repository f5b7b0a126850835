"""Protects: stop strings, stop ids, end-of-text and length end text and tokens where the contract says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import models
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from engine import Completion, Engine, Job, Sampling
from engine.schedule.sequence import Sequence as AdvancingSequence
from engine.text.completion import add_token
from engine.text.decoding import Text

COUNT = 14
Stop = str | list[int]
Decode = Callable[[Sequence[int]], str]


@pytest.fixture(scope="module")
def engine(build: Callable[[str], Path]) -> Iterator[Engine]:
    with Engine.from_pretrained(str(build("llama")), policy={"device": "cpu"}) as engine:
        yield engine


@pytest.fixture(scope="module")
def decode(tokenizer: PreTrainedTokenizerFast) -> Decode:
    def text(tokens: Sequence[int]) -> str:
        written = tokenizer.decode(list(tokens))
        assert isinstance(written, str)
        return written

    return text


@dataclass(frozen=True)
class Whole:
    """A job that nothing stops, and its completion."""

    job: Job
    done: Completion

    def stopped_by(self, stop: Sequence[Stop]) -> Job:
        """The same job with stops."""
        return replace(self.job, stop=stop)


@pytest.fixture(scope="module")
def wholes(engine: Engine) -> list[Whole]:
    """Greedy completions, and sampled ones, which vary more."""
    rng = random.Random(5)
    prompts = [[rng.randrange(3, models.VOCABULARY) for _ in range(rng.randrange(1, 20))] for _ in range(12)]
    jobs = [
        Job(prompt=prompt, max_new_tokens=COUNT, sampling=Sampling(temperature=index % 3, seed=index))
        for index, prompt in enumerate(prompts)
    ]
    return [
        Whole(job, done) for job, done in zip(jobs, engine.run(jobs), strict=True) if done.finish_reason == "length"
    ]


def cut_by_hand(tokens: Sequence[int], stops: Sequence[Stop], decode: Decode) -> tuple[str, int, str]:
    """Text, number of tokens and finish reason that the contract demands, from the unstopped tokens."""
    for count in range(1, len(tokens) + 1):
        written = decode(tokens[:count])
        ends: list[tuple[str, int]] = []
        for stop in stops:
            if not isinstance(stop, str):
                if list(tokens[:count][-len(stop) :]) == stop:
                    ends.append((decode(tokens[: count - len(stop)]), count - len(stop)))
            elif stop in written:
                text = written[: written.index(stop)]
                # Those it took to produce the text: the fewest that spell all of it.
                needed = next(size for size in range(count + 1) if decode(tokens[:size]).startswith(text))
                ends.append((text, needed if text else 0))
        if ends:
            return *min(ends, key=lambda end: len(end[0])), "stop"
    return decode(tokens), len(tokens), "length"


def stop_strings(whole: Completion, decode: Decode) -> list[str]:
    """All short pieces of a completion's text: inside tokens, across their borders, from the first character on."""
    text = decode(whole.tokens)
    pieces = {text[first : first + size] for first, size in product(range(len(text)), (1, 2, 3, 7))}
    return sorted(piece for piece in pieces if piece and "\ufffd" not in piece)


def assert_all_cut(cases: list[tuple[Whole, Sequence[Stop]]], engine: Engine, decode: Decode) -> list[Completion]:
    """Run each job with its stops and hold the completion against the one cut by hand."""
    found = engine.run([whole.stopped_by(stops) for whole, stops in cases])
    for (whole, stops), done in zip(cases, found, strict=True):
        text, count, reason = cut_by_hand(whole.done.tokens, stops, decode)
        assert done.error is None
        assert done.text == text
        assert done.tokens == whole.done.tokens[:count]
        assert done.logprobs == pytest.approx(whole.done.logprobs[:count], abs=1e-5)
        assert done.finish_reason == reason
    return found


def test_every_piece_of_a_text_stops_it(engine: Engine, wholes: list[Whole], decode: Decode) -> None:
    pieces = [(whole, stop) for whole in wholes[:6] for stop in stop_strings(whole.done, decode)]
    found = assert_all_cut([(whole, [stop]) for whole, stop in pieces], engine, decode)
    assert {done.finish_reason for done in found} == {"stop"}
    # Stops that begin inside a token, and stops that no single token holds.
    assert sum(decode(done.tokens) != done.text for done in found) > 20
    assert sum(not any(stop in decode([token]) for token in whole.done.tokens) for whole, stop in pieces) > 20


def test_several_stops_of_both_kinds(engine: Engine, wholes: list[Whole], decode: Decode) -> None:
    rng = random.Random(2)
    cases: list[tuple[Whole, Sequence[Stop]]] = []
    for whole in wholes:
        pieces = [*stop_strings(whole.done, decode), "never in it"]
        for _ in range(6):
            first, size = rng.randrange(COUNT - 3), rng.randrange(1, 4)
            stops: list[Stop] = [*rng.choices(pieces, k=2), list(whole.done.tokens[first : first + size])]
            rng.shuffle(stops)
            cases.append((whole, stops))
    assert {done.finish_reason for done in assert_all_cut(cases, engine, decode)} == {"stop"}


def test_of_two_stops_that_match_at_once_the_earlier_one_cuts(
    engine: Engine, wholes: list[Whole], decode: Decode
) -> None:
    cases: list[tuple[Whole, Sequence[Stop]]] = []
    for whole in wholes:
        tokens = whole.done.tokens
        for end in range(2, COUNT):
            before, after = decode(tokens[:end]), decode(tokens[: end + 1])
            across = after[len(before) - 1 :]  # its first character is of the token before the stop id
            if len(across) > 1 and "\ufffd" not in across and across not in before and tokens[end] not in tokens[:end]:
                cases += [(whole, [[tokens[end]], across]), (whole, [across, [tokens[end]]])]
    assert len(cases) > 10
    assert_all_cut(cases, engine, decode)


@pytest.mark.parametrize("size", [1, 2, 5, COUNT])
def test_stop_ids_of_any_length(size: int, engine: Engine, wholes: list[Whole], decode: Decode) -> None:
    stops = [list(whole.done.tokens[COUNT - size :]) for whole in wholes]
    whole_stops = assert_all_cut([(whole, [stop]) for whole, stop in zip(wholes, stops, strict=True)], engine, decode)
    assert {done.finish_reason for done in whole_stops} == {"stop"}
    longer: list[tuple[Whole, Sequence[Stop]]]
    longer = [(whole, [[*stop, 3]]) for whole, stop in zip(wholes, stops, strict=True)]  # it ends before they do
    assert "length" in {done.finish_reason for done in assert_all_cut(longer, engine, decode)}


def test_stops_are_matched_in_generated_text_only(engine: Engine, wholes: list[Whole], decode: Decode) -> None:
    cases: list[tuple[Whole, Sequence[Stop]]] = []
    for whole in wholes:
        border = [whole.job.prompt[-1], whole.done.tokens[0]]
        cases.append((whole, [border, decode(border[:1]) + decode(border[1:])]))
        cases.append((whole, [list(whole.job.prompt), decode(whole.job.prompt)]))
    assert sum(done.finish_reason == "length" for done in assert_all_cut(cases, engine, decode)) > len(wholes)


def test_end_of_text_is_in_neither_text_nor_tokens(
    wholes: list[Whole], build: Callable[[str], Path], tmp_path: Path, decode: Decode
) -> None:
    """A model whose end-of-text is a token from the middle of a completion ends there, and so does `generate`."""
    whole, end = next(
        (one, index)
        for one in wholes
        for index, token in enumerate(one.done.tokens)
        if index >= 2 and token not in one.done.tokens[:index] and one.job.sampling.temperature == 0
    )
    tokens = whole.done.tokens
    for file in build("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [2, {tokens[end]}]}}')
    with Engine.from_pretrained(str(tmp_path), policy={"device": "cpu"}) as engine:
        done, last, before = engine.run([replace(whole.job, max_new_tokens=count) for count in (COUNT, end + 1, end)])
    output = models.load_reference(tmp_path).generate(  # type: ignore[operator]
        torch.tensor([list(whole.job.prompt)]), max_new_tokens=COUNT
    )
    assert tuple(output[0, len(whole.job.prompt) :].tolist()) == tokens[: end + 1]
    for one, reason in ((done, "endoftext"), (last, "endoftext"), (before, "length")):
        assert one.finish_reason == reason
        assert one.tokens == tokens[:end]
        assert one.text == decode(tokens[:end])
        assert one.logprobs == pytest.approx(whole.done.logprobs[:end], abs=1e-5)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.lists(st.integers(0, models.VOCABULARY - 1), min_size=1, max_size=60),
    cut=st.tuples(st.integers(0, 400), st.integers(1, 12)),
)
def test_a_stop_is_seen_at_the_very_token_that_completes_it(
    tokens: list[int], cut: tuple[int, int], tokenizer: PreTrainedTokenizerFast, decode: Decode
) -> None:
    """Though only the last tokens are decoded at each step."""
    stop = decode(tokens)[cut[0] % len(decode(tokens)) :][: cut[1]]
    sequence = AdvancingSequence.of(Job(prompt=[3], max_new_tokens=len(tokens) + 1, stop=[stop]))
    completed = next(count for count in range(1, len(tokens) + 1) if stop in decode(tokens[:count]))
    for count, token in enumerate(tokens, start=1):
        add_token(sequence, token, 0.0, Text(tokenizer, frozenset()))
        assert (sequence.finish_reason == "stop") == (count == completed)
        if count == completed:
            break
