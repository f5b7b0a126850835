"""Protects: thinking is not scored; styles are what template and vocabulary prove; what shapes answers is in keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helm.common.cache import BlackHoleCacheConfig
from helm.common.key_value_store import request_to_key
from helm.common.request import GeneratedOutput, Request
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from thinking_models import KINDS, TAGS

from engine import Completion
from engine.errors import ConfigError, EngineError, UnsupportedError
from flexgen_helm.helm.requests.results import Timing, is_cut_off, result
from flexgen_helm.helm.requests.shaping import Shaping
from flexgen_helm.helm.requests.translate import Translator

REQUEST = Request(model="local/tiny", prompt="2+2?", temperature=0.0, max_tokens=50, stop_sequences=["\n"])
SCORED = Request(model="local/tiny", prompt="2+2=4", temperature=0.0, max_tokens=0, echo_prompt=True)
Make = Callable[..., Translator]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A translator for a kind of model."""
    paths: dict[str, Path] = {}

    def make(kind: str, config: dict[str, Any] | None = None, **shaping: Any) -> Translator:
        if kind not in paths:
            paths[kind] = tmp_path_factory.mktemp("thinking")
            KINDS[kind].train(paths[kind])
        path = str(paths[kind])
        return Translator(
            HuggingFaceTokenizer(BlackHoleCacheConfig(), f"test{path}", path).get_wrapped_tokenizer(),
            model="local/tiny",
            window=512,
            pad_to=None,
            end_of_text_token="</s>",
            shaping=Shaping.of(shaping),
            generation_config=config,
        )

    return make


def job_of(translator: Translator, request: Request = REQUEST) -> Any:
    text = translator.render(request)
    return translator.jobs(request, text, translator.encode(request, text))[0]


def key(translator: Translator, request: Request = REQUEST) -> str:
    return str(request_to_key(translator.key(request, translator.render(request))))


def ids(translator: Translator, text: str) -> list[int]:
    with translator._tokenizer as tokenizer:
        return list(tokenizer.encode(text, add_special_tokens=False))


# Styles


@pytest.mark.parametrize(
    ("kind", "name", "is_open"),
    [
        ("opened by the model", "think", False),
        ("opened by the template", "think", True),
        ("mistral", "mistral", False),
        ("harmony", "harmony", False),
        ("a chat model", None, None),
        ("marks without tokens", None, None),
        ("tokens without marks", None, None),
    ],
)
def test_auto_is_what_template_and_vocabulary_prove(made: Make, kind: str, name: str | None, is_open: bool) -> None:
    translator = made(kind)
    rule = job_of(translator).thinking
    notes = [note for note in translator.notes if "is not scored" in note]
    assert (rule is None) == (name is None) == (not notes)
    if rule is not None:
        assert f"reasoning: {name}" in notes[0]
        assert rule.is_open == is_open
    scored = job_of(translator, SCORED)
    assert (scored.thinking, scored.prompt_logprobs) == (None, True)
    assert job_of(made(kind, reasoning="none")).thinking is None


def test_a_prompt_that_speaks_of_thinking_opens_none(made: Make) -> None:
    request = Request(model="local/tiny", prompt="What comes after <think>", max_tokens=5)
    assert not job_of(made("opened by the model"), request).thinking.is_open
    assert job_of(made("opened by the template"), request).thinking.is_open


def test_styles_by_name_and_of_ones_own(made: Make) -> None:
    assert job_of(made("marks without tokens", reasoning="think")).thinking.style.end == "</think>"
    own = {"begin": "<a>", "end": "</a>"}
    for shaping in ({}, {"apply_chat_template": False}):
        rule = job_of(made("a chat model", reasoning=own, **shaping)).thinking
        assert (rule.style.begin, rule.style.end) == ("<a>", "</a>")


@pytest.mark.parametrize(
    ("kind", "shaping", "told"),
    [
        ("a chat model", {"reasoning": "think"}, r"has none of its marks \(<think> </think>\)"),
        ("harmony", {"reasoning": "mistral"}, "has none of its marks"),
        ("opened by the model", {"reasoning": "think", "apply_chat_template": False}, "is not applied"),
        ("a chat model", {"reasoning": "thinks"}, "is none of auto, none, think, mistral, harmony"),
        ("a chat model", {"reasoning": {"begin": "<a>"}}, "no pair of strings"),
        ("a chat model", {"reasoning": {"begin": "<a>", "end": ""}}, "no pair of strings"),
        ("a chat model", {"thinking_budget": 64}, "how it thinks is not known"),
        ("opened by the model", {"thinking_budget": 64, "reasoning": "none"}, "how it thinks is not known"),
        ("opened by the model", {"thinking_budget": -1}, "no number of tokens"),
        ("opened by the model", {"thinking_buget": 3}, "did you mean thinking_budget"),
        ("opened by the model", {"chat_template_kwargs": {"enable_thinkin": 1}}, "did you mean enable_thinking"),
        ("opened by the model", {"chat_template_kwargs": {"messages": []}}, "does not look at 'messages'"),
        ("opened by the model", {"chat_template_kwargs": {"content": "a"}}, "does not look at 'content'"),
        (
            "opened by the model",
            {"chat_template_kwargs": {"enable_thinking": 1}, "apply_chat_template": False},
            "no chat template is applied",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(made: Make, kind: str, shaping: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        made(kind, **shaping)


def test_a_template_with_marks_of_two_styles_is_not_guessed_at(made: Make, tmp_path: Path) -> None:
    from dataclasses import replace

    kind = KINDS["opened by the model"]
    both = replace(kind, template=kind.template + "{# [THINK] #}", tokens=(*TAGS, "[THINK]", "[/THINK]"))
    KINDS["both"] = both
    try:
        with pytest.raises(ConfigError, match="marks of think and mistral; say which"):
            made("both")
        assert job_of(made("both", reasoning="mistral")).thinking.style.begin == "[THINK]"
    finally:
        del KINDS["both"]


# What HELM is told


def told(translator: Translator, text: str, request: Request = REQUEST, reason: Any = "stop") -> GeneratedOutput:
    """HELM's output of a completion with this text, through JSON as the cache keeps it; logprobs count up."""
    tokens = ids(translator, text)
    completion = Completion(
        text=text,
        tokens=tuple(tokens),
        logprobs=tuple(-float(place) for place in range(len(tokens))),
        prompt_logprobs=(None,) * 99,
        finish_reason=reason,
    )
    timing = Timing(seconds=1.0, started=1.0, num_requests=1)
    response = translator.response(request, [job_of(translator, request)], [completion], timing)
    (output,) = result(json.loads(json.dumps(response)), cached=True).completions
    return output


@pytest.mark.parametrize(
    ("kind", "before", "thinking", "between"),
    [
        ("opened by the model", "<think>\n", "It is four.", "\n</think>\n\n"),
        ("opened by the template", "", "It is <four>.", "\n</think>\n\n"),
        ("mistral", "[THINK]", "It is [4].", "[/THINK]"),
        (
            "harmony",
            "<|channel|>analysis<|message|>",
            "It is four.",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
    ],
)
def test_text_tokens_and_logprobs_are_the_answers(
    made: Make, kind: str, before: str, thinking: str, between: str
) -> None:
    translator, answer = made(kind), "Four, naïve one"
    output = told(translator, before + thinking + between + answer)
    assert output.thinking is not None
    assert (output.thinking.text, output.text) == (thinking, answer)
    spelled = "".join(token.text for token in output.tokens if not token.text.startswith("bytes:"))
    assert spelled == answer.replace("ï", "")
    whole, own = (ids(translator, text) for text in (before + thinking + between + answer, answer))
    assert len(output.tokens) == len(own)
    assert output.logprob == -sum(range(len(whole) - len(own), len(whole)))
    assert output.finish_reason == {"reason": "stop"}
    for text, reason in ((before + thinking, "length"), (before + thinking + between, "length")):
        cut = told(translator, text, reason=reason)
        assert cut.thinking is not None
        assert (cut.thinking.text, cut.text, cut.tokens, cut.logprob) == (thinking, "", [], 0)
        assert is_cut_off(cut)
    assert not is_cut_off(output)
    assert not is_cut_off(told(translator, before + thinking + between + answer, reason="length"))
    assert not is_cut_off(told(translator, before + thinking, reason="endoftext"))


def test_a_token_that_holds_the_border_is_the_answers(made: Make) -> None:
    """The answer's first character comes with the end of the mark where marks are no tokens of their own."""
    translator = made("a chat model", reasoning={"begin": "<a", "end": "Answer:"})
    text = "<a why?\nAnswer: Paris"
    tokens = ids(translator, text)
    output = told(translator, text)
    assert (output.text, output.thinking and output.thinking.text) == ("Paris", "why?")
    assert output.tokens[0].text.endswith("Paris"[: len(output.tokens[0].text.strip())])
    assert len(output.tokens) < len(tokens)


def test_an_answer_without_thinking_is_told_as_ever(made: Make) -> None:
    texts = ("Four", " <thing>", "")
    for text in texts:
        one, other = told(made("opened by the model"), text), told(made("opened by the model", reasoning="none"), text)
        assert one == other
        assert one.thinking is None


def test_a_prompt_that_is_echoed_stands_before_the_answer_alone(made: Make) -> None:
    translator = made("opened by the model")
    request = Request(model="local/tiny", prompt="2+2?", max_tokens=50, echo_prompt=True)
    prompt = translator.encode(request, translator.render(request))
    tokens = ids(translator, "<think>\nA\n</think>\n\nFour")
    completion = Completion(
        text="<think>\nA\n</think>\n\nFour",
        tokens=tuple(tokens),
        logprobs=(-1.0,) * len(tokens),
        prompt_logprobs=(None, *(-2.0,) * (len(prompt) - 1)),
        finish_reason="stop",
    )
    timing = Timing(seconds=1.0, started=1.0, num_requests=1)
    response = translator.response(request, [job_of(translator, request)], [completion], timing)
    output = result(response, cached=False).completions[0]
    assert output.text == translator.render(request) + "Four"
    assert len(output.tokens) == len(prompt) + len(ids(translator, "Four"))


# Jobs and keys


@pytest.mark.parametrize(
    ("kind", "closing"),
    [
        ("opened by the model", "</think>"),
        ("opened by the template", "</think>"),
        ("mistral", "[/THINK]"),
        ("harmony", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ],
)
def test_a_budget_closes_by_the_templates_own_end(made: Make, kind: str, closing: str) -> None:
    translator = made(kind, thinking_budget=64)
    job = job_of(translator)
    assert (job.thinking.budget, list(job.thinking.closing)) == (64, ids(translator, closing))
    assert any("closed after 64 tokens" in note for note in translator.notes)
    assert (job.stop[-1] == "<|end|>") == (kind == "harmony")


def test_arguments_of_the_template(made: Make) -> None:
    kind = "opened by the model"
    quiet = made(kind, chat_template_kwargs={"enable_thinking": False})
    assert quiet.render(REQUEST).endswith("assistant\n<think>\n\n</think>\n\n")
    assert not job_of(quiet).thinking.is_open
    assert "enable_thinking=False" in quiet.notes[0]
    assert quiet.num_added > made(kind).num_added
    hard = made("harmony", chat_template_kwargs={"reasoning_effort": "high"})
    assert "Reasoning: high" in hard.render(REQUEST)


def test_what_shapes_an_answer_is_in_the_key(made: Make) -> None:
    kind = "opened by the model"
    shapings: list[dict[str, Any]] = [
        {},
        {"reasoning": "none"},
        {"thinking_budget": 0},
        {"thinking_budget": 64},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning": {"begin": "<think>", "end": "</think>\n"}},
    ]
    keys = [key(made(kind, **shaping)) for shaping in shapings]
    assert len(set(keys)) == len(keys)
    assert key(made(kind, reasoning="think")) == key(made(kind)) == key(made(kind, reasoning="auto"))
    assert "thinking" not in key(made("a chat model"))
    assert key(made(kind), SCORED) == key(made(kind, thinking_budget=3), SCORED)


# Sampling


CONFIG = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def test_a_models_own_sampling_wins_where_it_is_asked_for(made: Make) -> None:
    sampled = made("a chat model", CONFIG, sampling="model")
    found = job_of(sampled).sampling
    assert (found.temperature, found.top_k, found.top_p) == (0.6, 20, 0.95)
    assert found.seed is not None
    assert any("temperature 0.6, top_p 0.95, among the 20 likeliest" in note for note in sampled.notes)
    assert key(sampled) != key(made("a chat model", CONFIG))
    two = Request(model="local/tiny", prompt="2+2?", temperature=0.0, max_tokens=5, num_completions=2)
    text = sampled.render(two)
    assert len({job.sampling.seed for job in sampled.jobs(two, text, sampled.encode(two, text))}) == 2
    for shaping in ({}, {"sampling": "entry"}):
        greedy = job_of(made("a chat model", CONFIG, **shaping)).sampling
        assert (greedy.temperature, greedy.top_k, greedy.top_p) == (0.0, None, 1.0)
    assert job_of(sampled, SCORED).sampling.temperature == 0.0
    bare = job_of(made("a chat model", {"do_sample": True}, sampling="model")).sampling
    assert (bare.temperature, bare.top_k, bare.top_p) == (1.0, 50, 1.0)  # what transformers samples with


@pytest.mark.parametrize(
    ("config", "shaping", "error", "told"),
    [
        ({}, {}, ConfigError, "does not say do_sample: true"),
        ({"temperature": 0.6}, {}, ConfigError, "does not say do_sample: true"),
        ({**CONFIG, "min_p": 0.1}, {}, UnsupportedError, "sets min_p 0.1"),
        (CONFIG, {"top_k": 5}, ConfigError, "leave top_k out"),
        (CONFIG, {"sampling": "models"}, ConfigError, "none of entry, model"),
    ],
)
def test_sampling_that_cannot_be_had_is_refused(
    made: Make, config: dict[str, Any], shaping: dict[str, Any], error: type[EngineError], told: str
) -> None:
    with pytest.raises(error, match=told):
        made("a chat model", config, **{"sampling": "model", **shaping})
