"""Requests become the jobs, and completions the results, that HELM's HuggingFaceClient would have made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helm.common.cache import BlackHoleCacheConfig
from helm.common.request import Request
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import is_spelling_of

from engine import Completion
from engine.errors import JobError, UnsupportedError
from flexgen_helm.helm.requests.results import PromptError, Timing, result
from flexgen_helm.helm.requests.shaping import NAMES, Shaping
from flexgen_helm.helm.requests.translate import Translator

ALONE = Timing(seconds=0.5, started=1000.0, num_requests=1)


def translator(model: Path, **fields: Any) -> Translator:
    wrapped = HuggingFaceTokenizer(BlackHoleCacheConfig(), f"test{model}", str(model)).get_wrapped_tokenizer()
    shaping = Shaping(**{name: fields.pop(name) for name in list(fields) if name in NAMES})
    defaults = {"window": 512, "pad_to": None, "end_of_text_token": "</s>", "shaping": shaping}
    return Translator(wrapped, model="local/tiny", **{**defaults, **fields})


def reference(model: Path, **args: Any) -> Any:
    from helm.clients.huggingface_client import HuggingFaceClient

    tokenizer = HuggingFaceTokenizer(BlackHoleCacheConfig(), f"test{model}", str(model))
    return HuggingFaceClient(BlackHoleCacheConfig(), tokenizer, str(model), "</s>", **args)


def encoded(translated: Translator, text: str) -> list[int]:
    """Ids of a prompt, through the chat template if there is one."""
    request = Request(prompt=text, model="local/tiny")
    return list(translated.encode(request, translated.render(request)))


@cache
def tokenizer_of(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


# Prompts


@pytest.mark.parametrize("apply", [None, True, False])
def test_prompts_are_rendered_as_the_reference_renders_them(tiny_chat: Path, apply: bool | None) -> None:
    request = Request(prompt="Name a colour.", model="local/tiny")
    assert translator(tiny_chat, apply_chat_template=apply).render(request) == reference(
        tiny_chat, apply_chat_template=apply
    ).get_prompt(request)


@pytest.mark.parametrize(
    ("fields", "applies", "told"),
    [
        ({}, True, "is applied to prompts, but for those that are only scored"),
        ({"apply_chat_template": True}, True, "is applied to prompts, but for those that are only scored"),
        ({"apply_chat_template": False}, False, "no chat template is applied"),
    ],
)
def test_whether_a_chat_template_is_applied_is_told(
    tiny_chat: Path, fields: dict[str, Any], applies: bool, told: str
) -> None:
    translated = translator(tiny_chat, **fields)
    assert translated.applies_chat_template == applies
    assert told in translated.notes[0]
    assert ("left out" in translated.notes[0]) == (not fields)


DATED = """
{{ bos_token }}{% set now = strftime_now('%d %b %Y') if strftime_now is defined %}
[{{ now }}, 100%] {{ messages[0].content }}"""


def test_a_template_writes_the_date_of_the_suite(tiny_chat: Path) -> None:
    """As transformers renders it, for the moment that is set."""
    wrapped = HuggingFaceTokenizer(BlackHoleCacheConfig(), f"dated{tiny_chat}", str(tiny_chat)).get_wrapped_tokenizer()
    with wrapped as tokenizer:
        tokenizer.chat_template = DATED
        expected = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    translated = Translator(
        wrapped,
        model="local/tiny",
        window=512,
        pad_to=None,
        end_of_text_token=None,
    )
    request = Request(prompt="Hi", model="local/tiny")
    assert translated.writes_date
    translated.begin(datetime.now())
    assert translated.render(request) == expected
    translated.begin(datetime(2026, 11, 29, 23, 59))
    assert translated.render(request) == "\n</s>[29 Nov 2026, 100%] Hi"
    assert "writes 2026-11-29, when the suite began" in translated.notes[0]
    assert not translator(tiny_chat).writes_date


def test_messages_are_rendered_as_the_reference_renders_them(tiny_chat: Path) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    request = Request(prompt="", messages=messages, model="local/tiny")
    text = translator(tiny_chat).render(request)
    assert text == reference(tiny_chat).get_prompt(request) == "[user] Hi\n[assistant] Ho\n[user] ?\n[assistant]"


def test_a_template_that_refuses_a_request_says_so_in_one_line(tiny_chat: Path) -> None:
    request = Request(prompt="", messages=[{"role": 3}], model="local/tiny")  # type: ignore[dict-item]
    translated = translator(tiny_chat)
    with translated._tokenizer as tokenizer:
        tokenizer.chat_template, before = "{{ raise_exception('roles\nmust alternate') }}", tokenizer.chat_template
    try:
        with pytest.raises(UnsupportedError, match="refuses the request: roles must alternate"):
            translated.render(request)
    finally:
        with translated._tokenizer as tokenizer:
            tokenizer.chat_template = before


@pytest.mark.parametrize("text", ["What is it?", " leading", "two\n\nlines", "naïve 学", "<pad> inside", "a </s> b"])
def test_prompts_are_tokenized_as_the_reference_does(tiny_llama: Path, tiny_llama_with_bos: Path, text: str) -> None:
    for model in (tiny_llama, tiny_llama_with_bos):
        expected = tokenizer_of(model)(text, return_token_type_ids=False)["input_ids"]
        assert encoded(translator(model), text) == expected


def test_a_bos_that_the_prompt_brings_is_not_doubled(tiny_llama_with_bos: Path) -> None:
    tokenizer, translated = tokenizer_of(tiny_llama_with_bos), translator(tiny_llama_with_bos)
    bos = tokenizer.bos_token_id
    plain = tokenizer("text", add_special_tokens=False)["input_ids"]
    assert encoded(translated, "text") == [bos, *plain]
    assert encoded(translated, "</s>text") == [bos, *plain]
    assert encoded(translated, "</s></s>text") == [bos, bos, *plain]
    assert encoded(translated, "</s>") == [bos]


def test_without_a_bos_of_the_tokenizer_nothing_is_dropped(tiny_llama: Path) -> None:
    bos = tokenizer_of(tiny_llama).bos_token_id
    assert encoded(translator(tiny_llama), "</s></s>text")[:2] == [bos, bos]


def test_a_prompt_that_fills_the_window_as_helm_counts_runs_without_the_tokenizers_bos(
    tiny_llama_with_bos: Path,
) -> None:
    tokenizer = tokenizer_of(tiny_llama_with_bos)
    plain = tokenizer(" x1" * 9, add_special_tokens=False)["input_ids"]
    fits = translator(tiny_llama_with_bos, window=len(plain))
    assert encoded(fits, " x1" * 9) == plain
    with pytest.raises(PromptError, match=f"has {len(plain) + 1} tokens, more than the {len(plain) - 1}"):
        encoded(translator(tiny_llama_with_bos, window=len(plain) - 1), " x1" * 9)


def test_lone_surrogates_fail_as_a_prompt_error(tiny_llama: Path) -> None:
    with pytest.raises(PromptError, match="cannot be tokenized"):
        encoded(translator(tiny_llama), "\ud800")


# Jobs


requests = st.builds(
    Request,
    prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    temperature=st.sampled_from([0, 0.0, 0.3, 1, 1.0]),
    num_completions=st.integers(1, 4),
    top_k_per_token=st.integers(1, 5),
    max_tokens=st.integers(1, 40),
    stop_sequences=st.lists(st.sampled_from(["\n", "###", " stop"]), unique=True),
    echo_prompt=st.booleans(),
    top_p=st.sampled_from([1, 0.9]),
    presence_penalty=st.sampled_from([0, 0.5]),
    random=st.sampled_from([None, "1", "2"]),
)


def jobs_of(translated: Translator, request: Request) -> list[Any]:
    text = translated.render(request)
    return translated.jobs(request, text, translated.encode(request, text))


@settings(max_examples=60, deadline=None)
@given(request=requests)
def test_jobs_say_what_the_request_says(tiny_llama: Path, request: Request) -> None:
    translated = translator(tiny_llama, top_k=7)
    jobs = jobs_of(translated, request)
    assert len(jobs) == (1 if request.temperature == 0 else request.num_completions)
    for job in jobs:
        job.check()
        assert job.max_new_tokens == request.max_tokens
        assert job.prompt_logprobs == request.echo_prompt
        assert list(job.stop)[: len(request.stop_sequences)] == request.stop_sequences
        assert list(job.stop)[len(request.stop_sequences) :] == [
            [0],
            "</s>",
        ]  # HELM's end-of-text token, also spelled out
        assert job.sampling.temperature == request.temperature
        assert job.sampling.presence_penalty == request.presence_penalty
        if request.temperature > 0:
            assert (job.sampling.top_k, job.sampling.top_p) == (7, request.top_p)  # never top_k_per_token


@settings(max_examples=60, deadline=None)
@given(request=requests.filter(lambda request: request.temperature > 0))
def test_seeds_follow_from_the_request_and_the_index_alone(tiny_llama: Path, request: Request) -> None:
    translated = translator(tiny_llama)
    seeds = [job.sampling.seed for job in jobs_of(translated, request)]
    assert len(set(seeds)) == len(seeds)
    more = jobs_of(translator(tiny_llama), replace(request, num_completions=6))
    assert [job.sampling.seed for job in more][: len(seeds)] == seeds
    others = [
        jobs_of(translated, replace(request, random="another")),
        jobs_of(translated, replace(request, prompt=request.prompt + "!")),
        jobs_of(translated, replace(request, temperature=0.77)),
    ]
    assert not {job.sampling.seed for jobs in others for job in jobs} & set(seeds)


def test_seeds_are_the_same_in_every_process(tiny_llama: Path) -> None:
    request = Request(prompt="a", temperature=1.0, max_tokens=3, stop_sequences=["\n"], random="1")
    assert jobs_of(translator(tiny_llama), request)[0].sampling.seed == SEED


SEED = 550217263173383599
"""Written down: results in people's caches were sampled with it."""


def test_a_scoring_request_is_one_job_that_only_scores(tiny_llama: Path) -> None:
    request = Request(prompt="score me", temperature=0.0, max_tokens=0, echo_prompt=True, num_completions=2)
    (job,) = jobs_of(translator(tiny_llama), request)
    assert (job.max_new_tokens, job.prompt_logprobs) == (0, True)


def test_generation_ends_where_positions_end(tiny_llama: Path) -> None:
    translated = translator(tiny_llama, window=10)
    ids = encoded(translated, "x1 x2 x3")
    for max_tokens in (1, 100):
        (job,) = translated.jobs(Request(prompt="", temperature=0.0, max_tokens=max_tokens), "", ids)
        assert job.max_new_tokens == min(max_tokens, 10 - len(ids) + 1)


def test_an_end_of_text_token_that_is_no_token_is_text_to_stop_at(tiny_llama: Path) -> None:
    for named, stop in (("<none>", ["<none>"]), ("", []), (None, [])):
        (job,) = jobs_of(translator(tiny_llama, end_of_text_token=named), Request(prompt="a", temperature=0.0))
        assert list(job.stop) == stop


def test_tokens_that_are_added_to_a_prompt_are_counted(
    tiny_llama: Path, tiny_llama_with_bos: Path, tiny_chat: Path
) -> None:
    """A BOS is not: it goes where it alone would overflow the window."""
    assert translator(tiny_llama).num_added == translator(tiny_llama_with_bos).num_added == 0
    chat = translator(tiny_chat, apply_chat_template=None)
    texts = ["Hello", "x = 1\n\n", "\u00e9"]
    grown = [len(encoded(chat, text)) - len(encoded(translator(tiny_llama), text)) for text in texts]
    assert 5 < max(grown) <= chat.num_added <= max(grown) + 2


# Results


def round_trip(translated: Translator, request: Request, completions: list[Completion], timing: Timing = ALONE) -> Any:
    text = translated.render(request)
    jobs = translated.jobs(request, text, translated.encode(request, text))
    response = translated.response(request, jobs, completions, timing)
    return result(json.loads(json.dumps(response)), cached=True)


def test_a_generation_is_told_token_by_token(tiny_llama: Path) -> None:
    tokenizer = tokenizer_of(tiny_llama)
    tokens = tokenizer("Paris is naïve")["input_ids"]
    completion = Completion(
        text="Paris is naïve", tokens=tuple(tokens), logprobs=tuple([-0.5] * len(tokens)), finish_reason="stop"
    )
    told = round_trip(translator(tiny_llama), Request(prompt="a", temperature=0.0), [completion])
    (output,) = told.completions
    assert (told.success, told.cached, told.request_time, told.request_datetime) == (True, True, 0.5, 1000)
    assert (told.batch_size, told.batch_request_time) == (None, None)
    assert output.text == "Paris is naïve"
    assert [token.text for token in output.tokens] == [
        "P",
        "aris",
        " is",
        " n",
        "a",
        r"bytes:\xc3",
        r"bytes:\xaf",
        "ve",
    ]
    assert output.logprob == -0.5 * len(tokens)
    assert output.finish_reason == {"reason": "stop"}


def test_an_echoed_prompt_comes_first_with_its_log_probabilities(tiny_llama_with_bos: Path) -> None:
    tokenizer = tokenizer_of(tiny_llama_with_bos)
    ids = tokenizer("score me")["input_ids"]
    completion = Completion(
        text="!", tokens=(tokenizer("!")["input_ids"][-1],), logprobs=(-2.0,),
        prompt_logprobs=(None, *[-1.0] * (len(ids) - 1)), finish_reason="length",
    )  # fmt: skip
    request = Request(prompt="score me", temperature=0.0, echo_prompt=True, max_tokens=1)
    (output,) = round_trip(translator(tiny_llama_with_bos), request, [completion]).completions
    assert output.text == "</s>score me!"
    assert [token.logprob for token in output.tokens] == [0.0, *[-1.0] * (len(ids) - 1), -2.0]
    assert "".join(token.text for token in output.tokens) == output.text
    assert output.logprob == -1.0 * (len(ids) - 1) - 2.0


def test_a_request_computed_in_company_says_how_large_and_how_long(tiny_llama: Path) -> None:
    timing = replace(ALONE, num_requests=7)
    told = round_trip(translator(tiny_llama), Request(prompt="a", temperature=0.0), [Completion()], timing)
    assert (told.batch_size, told.batch_request_time, told.request_time) == (7, 0.5, 0.5)


def test_a_failed_completion_fails_the_request(tiny_llama: Path) -> None:
    with pytest.raises(JobError, match="not finite"):
        round_trip(
            translator(tiny_llama), Request(prompt="a"), [Completion(), Completion(error=JobError("not finite"))]
        )


@pytest.mark.parametrize("echo", [False, True])
def test_results_equal_the_references(
    tiny_llama: Path, tiny_llama_with_bos: Path, echo: bool, make_client: Callable[..., Any]
) -> None:
    """The reference runs the model; its raw completions go through our translation."""
    for model in (tiny_llama, tiny_llama_with_bos):
        request = Request(
            model="local/" + model.name, prompt="What is\nthe answer", temperature=0.0,
            max_tokens=0 if echo else 9, echo_prompt=echo, stop_sequences=[] if echo else ["\n"],
        )  # fmt: skip
        expected = reference(model, device="cpu").make_request(request).completions[0]
        ids = translator(model).encode(request, request.prompt)
        vocabulary = {tokenizer_of(model).decode(token): token for token in range(len(tokenizer_of(model)))}
        generated = () if echo else tuple(vocabulary[token.text] for token in expected.tokens)
        completion = Completion(
            text="" if echo else expected.text,
            tokens=generated,
            logprobs=tuple(token.logprob for token in expected.tokens) if not echo else (),
            prompt_logprobs=(None, *[token.logprob for token in expected.tokens[1:]]) if echo else None,
            finish_reason="length",
        )
        (told,) = round_trip(translator(model), request, [completion]).completions
        assert len(ids) > 3
        pairs = zip(told.tokens, expected.tokens, strict=True)
        assert all(is_spelling_of(ours.text, helms.text) for ours, helms in pairs)
        assert replace(told, finish_reason=None, tokens=expected.tokens) == expected
