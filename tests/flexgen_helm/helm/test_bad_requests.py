"""A request that cannot be served is refused in one line, alone and for good; a strange one is served as HELM would."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helm.common.cache import SqliteCacheConfig, create_key_value_store
from helm.common.image_generation_parameters import ImageGenerationParameters
from helm.common.media_object import MultimediaObject
from helm.common.request import Request, RequestResult
from helm.common.response_format import ResponseFormat
from reference import Bench, benches_of, helms_client, is_spelling_of, our_client
from tiny_models import WINDOW, random_gptj, random_llama, save_tiny_model

NAN = math.nan


@pytest.fixture(scope="module")
def benches(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Bench]]:
    """The bench of a model's fixture."""
    yield from benches_of(request)


@pytest.fixture
def llama(benches: Callable[[str], Bench]) -> Bench:
    """The bench of tiny-llama, whose tokenizer adds no special tokens."""
    return benches("tiny_llama")


def said(result: RequestResult) -> list[Any]:
    return [result.success, result.error, result.completions]


def stored(cache: Path) -> list[Any]:
    with create_key_value_store(SqliteCacheConfig(str(cache))) as store:
        return [value for _, value in store.get_all()]


def assert_refused(result: RequestResult, *parts: str) -> None:
    assert not result.success
    assert result.completions == []
    assert result.error_flags is not None
    assert result.error_flags.is_retriable is False
    assert "\n" not in str(result.error)
    assert len(str(result.error)) < 400
    for part in parts:
        assert part in str(result.error)


def assert_refused_alone(bench: Bench, cache: Path, bad: Request, *parts: str) -> None:
    """Alone and among others, which do not notice; nothing of it is kept."""
    client = our_client(bench.path, cache_config=SqliteCacheConfig(str(cache)))
    good = [
        bench.request("What is the capital", max_tokens=3),
        bench.request("What else", max_tokens=2, echo_prompt=True),
    ]
    expected = [said(result) for result in bench.client.make_requests(good)]
    assert_refused(client.make_request(bad), *parts)
    assert stored(cache) == []
    before, result, after = client.make_requests([good[0], bad, good[1]])
    assert_refused(result, *parts)
    assert [said(before), said(after)] == expected
    assert len(stored(cache)) == 2


# Refused


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"temperature": -0.5}, ["temperature -0.5", ">= 0"]),
        ({"temperature": NAN}, ["temperature nan"]),
        ({"temperature": math.inf}, ["temperature inf"]),
        ({"temperature": 1.0, "top_p": 0}, ["top_p 0", "(0, 1]"]),
        ({"temperature": 1.0, "top_p": 1.5}, ["top_p 1.5", "(0, 1]"]),
        ({"temperature": 1.0, "top_p": NAN}, ["top_p nan", "(0, 1]"]),
        ({"top_p": 0}, ["top_p 0", "(0, 1]"]),  # at temperature 0 too
        ({"top_p": -1.0}, ["top_p -1", "(0, 1]"]),
        ({"top_p": NAN}, ["top_p nan", "(0, 1]"]),
        ({"presence_penalty": NAN}, ["presence_penalty nan"]),
        ({"frequency_penalty": math.inf}, ["frequency_penalty inf"]),
        ({"num_completions": -1}, ["num_completions -1"]),
        ({"max_tokens": -1}, ["max_new_tokens -1"]),
        ({"stop_sequences": ["\n", ""]}, ["stop sequence is empty"]),
        ({"prompt": "a \ud800 b"}, ["cannot be tokenized"]),
        ({"prompt": "", "messages": [{"role": "user", "content": "Hi"}]}, ["chat template"]),
        ({"prompt": "", "multimodal_prompt": MultimediaObject()}, ["multimodal prompt", "text requests only"]),
        ({"image_generation_parameters": ImageGenerationParameters()}, ["an image", "text requests only"]),
        ({"response_format": ResponseFormat(json_schema={})}, ["response format", "text requests only"]),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_alone(llama: Bench, tmp_path: Path, fields: dict[str, Any], parts: list[str]) -> None:
    bad = llama.request(**{"prompt": "What is it?", "max_tokens": 4, **fields})
    assert_refused_alone(llama, tmp_path / "cache.sqlite", bad, *parts)


def test_a_message_that_is_no_text_is_refused_alone(benches: Callable[[str], Bench], tmp_path: Path) -> None:
    bench = benches("tiny_chat")
    bad = bench.request("", messages=[{"role": "user", "content": "a \udfff b"}])
    assert_refused_alone(bench, tmp_path / "cache.sqlite", bad, "cannot be tokenized")


@pytest.mark.parametrize(
    ("model", "text"),
    [("tiny_opt", "zq x1 " * 170_000), ("tiny_llama", "a" * 1_000_000)],
    ids=["words", "one word"],
)
def test_a_megabyte_of_text_is_refused_quickly(benches: Callable[[str], Bench], model: str, text: str) -> None:
    bench = benches(model)
    bench.client.make_request(bench.request(max_tokens=1))  # loads the engine
    begun = time.process_time()
    result = bench.client.make_requests([bench.request(text)])[0]
    assert time.process_time() - begun < 10
    num_tokens = len(bench.reference.tokenizer(text)["input_ids"])
    assert_refused(result, f"{num_tokens} tokens", f"{WINDOW}", "max_sequence_length")
    assert result.error_flags.is_fatal is False  # the prompt is at fault, not the model: the run goes on


# Strange, but served


def assert_same_tokens(ours: Any, helms: Any) -> None:
    """The same but for parts of characters, which HELM's client cannot tell."""
    assert len(ours.tokens) == len(helms.tokens)
    pairs = zip(ours.tokens, helms.tokens, strict=True)
    assert all(is_spelling_of(mine.text, its.text) for mine, its in pairs)


@pytest.mark.parametrize("text", ["a\x00b", "\x00", "\x00\x00 x\x01\x7f\ufffe", "\ufeffx\u200b", "\r\n\r", "e\u0301é"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_opt"])
def test_control_characters_are_text(benches: Callable[[str], Bench], model: str, text: str) -> None:
    bench = benches(model)
    request = bench.request(text, max_tokens=0, echo_prompt=True)
    ours, helms = bench.client.make_request(request).completions[0], bench.helm(request).completions[0]
    assert ours.text == helms.text
    assert_same_tokens(ours, helms)
    assert [token.logprob for token in ours.tokens] == pytest.approx([each.logprob for each in helms.tokens], abs=1e-4)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_opt", "tiny_chat"])
def test_special_tokens_spelled_out_are_those_tokens(benches: Callable[[str], Bench], model: str) -> None:
    """As in HELM's client: it tokenizes prompts without `split_special_tokens`."""
    bench = benches(model)
    tokenizer = bench.reference.tokenizer
    prompts = ["x " + special + end for special in tokenizer.all_special_tokens for end in (" y", special, "")]
    assert len(prompts) >= 6
    said = [[{"role": "user", "content": prompt}] if tokenizer.chat_template else [] for prompt in prompts]
    asked = [
        bench.request("" if messages else prompt, messages=messages, max_tokens=0, echo_prompt=True)
        for prompt, messages in zip(prompts, said, strict=True)
    ]
    for request, result in zip(asked, bench.client.make_requests(asked), strict=True):
        ours, helms = result.completions[0], bench.helm(request).completions[0]
        special = [token.text for token in ours.tokens if token.text in tokenizer.all_special_tokens]
        assert special
        assert_same_tokens(ours, helms)
        assert [each.logprob for each in ours.tokens] == pytest.approx(
            [each.logprob for each in helms.tokens], abs=1e-4
        )


@pytest.mark.parametrize("model", ["tiny_opt", "tiny_chat"])
def test_an_empty_prompt_is_served_where_the_model_still_sees_a_token(
    benches: Callable[[str], Bench], model: str
) -> None:
    bench = benches(model)
    request = bench.request("", max_tokens=4)
    ours, helms = bench.client.make_request(request).completions[0], bench.helm(request).completions[0]
    assert (ours.text, len(ours.tokens)) == (helms.text, len(helms.tokens))


# Tokenizers that do not fit their model


def test_tokens_beyond_the_embedding_fail_alone(llama: Bench, tmp_path: Path) -> None:
    """Tokens added to a tokenizer but not to the model, as in some fine-tuned models."""
    path = copy(llama.path, tmp_path / "tiny-more-tokens")
    tokenizer = llama.reference.tokenizer
    num_rows = len(tokenizer)
    more = type(tokenizer).from_pretrained(path)
    more.add_tokens(["<first added>", "<added>"])
    more.save_pretrained(path)
    bench = Bench(path, our_client(path), helms_client(path), llama.reference)
    bad = bench.request("x <added> y", max_tokens=2)
    assert not bench.helm(bad).success
    assert_refused_alone(
        bench, tmp_path / "cache.sqlite", bad, f"{num_rows}", f"{more.convert_tokens_to_ids('<added>')}"
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_beyond_the_tokenizer_are_tokens_without_text(tmp_path: Path, temperature: float) -> None:
    """Embeddings are often padded. HELM's client generates such a token where the model wants it, and shows nothing."""

    def padded(tokenizer: Any) -> Any:
        import torch

        model = random_llama(tokenizer)
        model.resize_token_embeddings(len(tokenizer) + 40, mean_resizing=False)
        with torch.no_grad():
            model.get_output_embeddings().weight[len(tokenizer) :] *= 10.0  # trained models want them less
        return model

    path = save_tiny_model(tmp_path / f"tiny-padded-{temperature}", padded)
    bench = Bench.of(path)
    asked = [bench.request(f"{n} is", temperature=temperature, max_tokens=6) for n in range(8)]
    generated: set[int] = set()
    for request, result in zip(asked, bench.client.make_requests(asked), strict=True):
        (output,), (expected,) = result.completions, bench.reference.answer(request).generations
        assert output.text == expected.text
        spelled = [bench.reference.decode([token]) for token in expected.tokens]
        assert len(output.tokens) == len(spelled)
        assert all(map(is_spelling_of, (token.text for token in output.tokens), spelled))
        assert [token.logprob for token in output.tokens] == pytest.approx(expected.logprobs, abs=1e-4)
        generated |= set(expected.tokens)
        if temperature == 0:
            (helms,) = bench.helm(request).completions
            assert (output.text, len(output.tokens)) == (helms.text, len(helms.tokens))
    assert max(generated) >= len(bench.reference.tokenizer)


# Damaged weights


def copy(model: Path, target: Path) -> Path:
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("make", [random_llama, random_gptj], ids=["packed", "padded"])
def test_requests_that_meet_a_damaged_row_fail_alone(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    """One embedding row is NaN; the others of the batch, sharing a prefix with those that use it, do not notice."""

    def damaged(tokenizer: Any) -> Any:
        import torch

        model = make(tokenizer)
        model.config.tie_word_embeddings = False
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("~")] = torch.nan
        return model

    path = save_tiny_model(tmp_path / f"tiny-damaged-{make.__name__}", damaged)
    cache = tmp_path / "cache.sqlite"
    client = our_client(path, cache_config=SqliteCacheConfig(str(cache)))
    prefix = "Question: What is the capital of France?\nAnswer: Paris\n\n" * 3

    def request(end: str, **fields: Any) -> Request:
        return Request(
            model=f"local/{path.name}", prompt=prefix + end, **{"temperature": 0.0, "max_tokens": 5, **fields}
        )

    scoring = {"max_tokens": 0, "echo_prompt": True}
    good = [
        *(request(f"Question: {n}?\nAnswer:", echo_prompt=n % 2 == 0) for n in range(6)),
        *(request(f"Question: {n}?\nAnswer:", temperature=1.0, num_completions=3) for n in range(3)),
        *(request(f"Question: 1?\nAnswer: {choice}", **scoring) for choice in "ABCD"),
    ]
    bad = [
        request("Question: ~?\nAnswer:"),
        request("~ Question: 3?\nAnswer:", temperature=1.0, num_completions=2),
        request("Question: 1?\nAnswer: ~ is it", **scoring),
        *(request(f"Question: ~ 1?\nAnswer: {choice}", **scoring) for choice in "AB"),
        replace(request("what follows"), prompt="~"),
    ]
    alone = our_client(path).make_requests(good)
    assert all(result.success for result in alone)
    mixed = [each for pair in zip(good, [*bad, *bad[:1] * len(good)], strict=False) for each in pair]
    told = dict(zip(map(id, mixed), client.make_requests(mixed), strict=True))
    for request_, expected in zip(good, alone, strict=True):
        result = told[id(request_)]
        assert result.success, result.error
        for ours, theirs in zip(result.completions, expected.completions, strict=True):
            assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
            assert [token.text for token in ours.tokens] == [token.text for token in theirs.tokens]
            assert [token.logprob for token in ours.tokens] == pytest.approx(
                [token.logprob for token in theirs.tokens], abs=2e-5
            )
    for request_ in bad:
        assert_refused(told[id(request_)], "not finite", "float32")
        # An empty completion would have the best log-probability of all.
        assert told[id(request_)].error_flags.is_fatal is request_.echo_prompt
        assert_refused(client.make_request(request_), "not finite")
    assert len(stored(cache)) == len(good)
