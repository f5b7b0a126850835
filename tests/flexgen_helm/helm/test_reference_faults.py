"""What HELM's HuggingFaceClient does wrong, seen on it, and what we do instead: the rows of docs/fidelity.md."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helm.benchmark.metrics.basic_metrics import convert_tokens_to_text, get_num_bytes
from helm.common.request import Request
from reference import Bench, benches_of, helms_client, is_spelling_of, log_softmax, our_client
from tiny_models import WINDOW

PROMPT = "Question: What is the capital of France?\nAnswer: Paris\n\nQuestion: Why?\nAnswer:"


@pytest.fixture(scope="module")
def benches(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Bench]]:
    """The bench of a model's fixture."""
    yield from benches_of(request)


@pytest.fixture
def llama(benches: Callable[[str], Bench]) -> Bench:
    """The bench of tiny-llama, whose tokenizer has no BOS."""
    return benches("tiny_llama")


def logprobs_of(output: Any) -> list[float]:
    return [token.logprob for token in output.tokens]


def tokens_of(output: Any) -> list[str]:
    return [token.text for token in output.tokens]


def are_spelled(texts: list[str], alone: list[str]) -> bool:
    """Whether they are the same tokens; HELM's client cannot tell parts of characters."""
    return len(texts) == len(alone) and all(map(is_spelling_of, texts, alone))


def ours_and_helms(bench: Bench, request: Request) -> tuple[Any, Any]:
    """First completions."""
    ours, helms = bench.client.make_request(request), bench.helm(request)
    assert ours.success, ours.error
    assert helms.success, helms.error
    return ours.completions[0], helms.completions[0]


# Log-probabilities


def test_log_probabilities_at_temperature_zero_are_the_models_not_zero(llama: Bench) -> None:
    ours, helms = ours_and_helms(llama, request := llama.request(PROMPT, max_tokens=6))
    assert are_spelled(tokens_of(ours), tokens_of(helms))
    assert logprobs_of(helms) == [0.0] * 6
    assert logprobs_of(ours) == pytest.approx(llama.reference.answer(request).generations[0].logprobs, abs=1e-4)
    assert max(logprobs_of(ours)) < -0.05


def test_log_probabilities_do_not_follow_the_temperature(llama: Bench) -> None:
    request = llama.request("naïve", temperature=0.5, max_tokens=1, num_completions=60)
    raw = log_softmax(llama.reference.next_logits(llama.reference.encode("naïve")))
    ranked = np.argsort(-raw)
    spelled = [llama.reference.decode([token]) for token in ranked.tolist()]
    rank = {text: place for place, text in enumerate(spelled) if spelled.count(text) == 1}
    scaled = log_softmax(raw[ranked][:50] / 0.5)  # HELM's are those of 50 tokens at this temperature
    for told, expected in ((llama.helm(request), scaled), (llama.client.make_request(request), raw[ranked])):
        outputs = [output for output in told.completions if output.text in rank]
        assert len(outputs) > 10
        for output in outputs:
            assert output.logprob == pytest.approx(expected[rank[output.text]], abs=1e-4)


def test_an_echoed_prompt_has_its_log_probabilities_also_before_a_generation(llama: Bench) -> None:
    request = llama.request("the capital of", max_tokens=2, echo_prompt=True)
    ours, helms = ours_and_helms(llama, request)
    answer = llama.reference.answer(request)
    num_prompt = len(answer.prompt)
    assert are_spelled(tokens_of(ours), tokens_of(helms))
    assert logprobs_of(helms)[:num_prompt] == [0.0] * num_prompt
    expected = [*answer.prompt_logprobs, *answer.generations[0].logprobs]
    assert logprobs_of(ours) == pytest.approx(expected, abs=1e-4)


def test_a_prompt_can_be_scored_for_several_completions(llama: Bench) -> None:
    request = llama.request("the capital of", max_tokens=0, echo_prompt=True, num_completions=2)
    helms = llama.helm(request)
    assert not helms.success
    assert helms.error_flags is None  # which makes HELM try it five times, 150 s in all
    ours = llama.client.make_request(request)
    assert ours.completions == llama.client.make_request(replace(request, num_completions=1)).completions * 2


# Sampling


def test_sampling_is_not_cut_to_fifty_tokens(llama: Bench) -> None:
    request = llama.request("a", temperature=5.0, max_tokens=1, num_completions=100)
    raw = llama.reference.next_logits(llama.reference.encode("a"))
    likely = {llama.reference.decode([token]) for token in np.argsort(-raw)[:50].tolist()}
    assert {output.text for output in llama.helm(request).completions} <= likely | {""}  # "": end-of-text
    assert len({output.text for output in llama.client.make_request(request).completions} - likely) > 20


def test_the_same_request_gives_the_same_sample(llama: Bench) -> None:
    request = llama.request(PROMPT, temperature=2.0, max_tokens=12, random="1")
    helms = {llama.helm(request).completions[0].text for _ in range(4)}
    assert len(helms) > 1  # `random` is in its cache key only
    assert len({llama.client.make_request(request).completions[0].text for _ in range(4)}) == 1


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties_are_applied(llama: Bench, penalty: str) -> None:
    plain = llama.request("Question: Question: Question:", max_tokens=40)
    request = replace(plain, **{penalty: -100.0})  # then it says its first token again and again
    answer = llama.reference.answer(request)
    ours, helms = ours_and_helms(llama, request)
    assert helms == llama.helm(plain).completions[0]
    assert ours.text == answer.generations[0].text != helms.text


# Where a completion ends


def test_finish_reasons_are_told(llama: Bench) -> None:
    free = llama.request(PROMPT, max_tokens=3)
    text = llama.client.make_request(free).completions[0].text
    for request, reason in ((free, "length"), (replace(free, stop_sequences=[text[-1]]), "stop")):
        ours, helms = ours_and_helms(llama, request)
        assert helms.finish_reason is None
        assert ours.finish_reason == {"reason": reason}


def prompt_that_ends(bench: Bench) -> Request:
    """A greedy request after which the model soon says that its text ends, though it could go on."""
    for number in range(400):
        request = bench.request(f"{number} x", max_tokens=12)
        (generation,) = bench.reference.answer(request).generations
        if generation.finish_reason == "endoftext" and 0 < len(generation.tokens) < 10 and generation.sure is None:
            return request
    raise AssertionError("the model never ends a text")


def test_end_of_text_ends_a_completion_also_beside_a_single_token_stop(llama: Bench) -> None:
    """HELM's client puts such a stop in the place of end-of-text; HELM's end_of_text_token, where given, hides it."""
    request = replace(prompt_that_ends(llama), stop_sequences=["\x00"])
    expected = llama.reference.answer(request).generations[0]
    helms = helms_client(llama.path, end_of_text_token=None)(request).completions[0]
    ours = our_client(llama.path, end_of_text_token=None).make_request(request).completions[0]
    assert helms.text.startswith(expected.text + "</s>")
    assert len(helms.tokens) == 12
    assert (ours.text, len(ours.tokens)) == (expected.text, len(expected.tokens))
    assert ours.finish_reason == {"reason": "endoftext"}


def test_a_stop_inside_a_token_ends_the_completion(llama: Bench) -> None:
    request, count = stopped_inside_a_token(llama)
    ours, helms = ours_and_helms(llama, request)
    assert ours.text == helms.text
    assert len(helms.tokens) == 12  # all that it generated, though the text ends before
    assert (len(ours.tokens), ours.finish_reason) == (count, {"reason": "stop"})
    assert are_spelled(tokens_of(ours), tokens_of(helms)[:count])


def stopped_inside_a_token(bench: Bench) -> tuple[Request, int]:
    """A greedy request whose stop is the inner part of a generated token, and how many tokens its text takes."""
    for number in range(400):
        request = bench.request(f"{number} x", max_tokens=12)
        (generation,) = bench.reference.answer(request).generations
        spelled = [bench.reference.decode([token]) for token in generation.tokens]
        for count in range(2, len(spelled) if len(spelled) == 12 and generation.sure is None else 0):
            before, stop = "".join(spelled[: count - 1]), spelled[count - 1][1:]
            begun = any(text.startswith(stop) for text in spelled)
            if "\ufffd" not in before + stop and not begun and generation.text.find(stop) == len(before) + 1:
                return replace(request, stop_sequences=[stop]), count
    raise AssertionError("no stop inside a token")


def test_an_echoed_completion_ends_at_its_stop(llama: Bench) -> None:
    request, count = stopped_inside_a_token(llama)
    (stop,) = request.stop_sequences
    text = llama.client.make_request(request).completions[0].text
    ours, helms = ours_and_helms(llama, replace(request, echo_prompt=True))
    assert ours.text == request.prompt + text
    assert helms.text.startswith(ours.text + stop)
    assert len(helms.tokens) - len(ours.tokens) == 12 - count


def test_a_stop_longer_than_the_prompt_is_no_error(llama: Bench) -> None:
    request = llama.request("a", max_tokens=3, stop_sequences=["a stop of many, many tokens"])
    helms = llama.helm(request)
    assert "size of tensor" in str(helms.error)
    assert llama.client.make_request(request).completions[0].finish_reason == {"reason": "length"}


# Bytes


@pytest.mark.parametrize("text", ["hi 🙂🙂", "naïve café", "日本語の文です"])
def test_bytes_of_a_scored_prompt_are_those_of_its_text(llama: Bench, text: str) -> None:
    ours, helms = ours_and_helms(llama, llama.request(text, max_tokens=0, echo_prompt=True))
    assert get_num_bytes(ours.tokens) == len(text.encode()) < get_num_bytes(helms.tokens)
    assert "".join(group["text"] for group in convert_tokens_to_text(ours.tokens)) == text


# Chat templates


def test_a_prompt_that_is_only_scored_ends_with_its_own_tokens(benches: Callable[[str], Bench]) -> None:
    """HELM's metrics sum up the last tokens, which are the template's where one is applied."""
    bench = benches("tiny_chat")
    ours, helms = ours_and_helms(bench, request := bench.request(PROMPT + " Paris", max_tokens=0, echo_prompt=True))
    assert helms.text == f"[user] {PROMPT} Paris\n[assistant]"
    assert ours.text == PROMPT + " Paris"
    plain = bench.reference.tokenizer(ours.text)["input_ids"]
    logprobs = log_softmax(bench.reference.logits(plain))
    expected = [0.0, *(logprobs[place, token] for place, token in enumerate(plain[1:]))]
    assert logprobs_of(ours) == pytest.approx(expected, abs=1e-4)
    answered = ours_and_helms(bench, replace(request, max_tokens=1, echo_prompt=False))
    assert answered[0].text == answered[1].text


# Positions


def test_a_prefix_token_is_not_doubled(benches: Callable[[str], Bench]) -> None:
    """HELM begins language-modelling prompts with it, and its client adds the tokenizer's."""
    bench = benches("tiny_opt")
    ours, helms = ours_and_helms(bench, bench.request("</s>the capital of", max_tokens=0, echo_prompt=True))
    assert tokens_of(helms)[:2] == ["</s>", "</s>"]
    assert are_spelled(tokens_of(ours), tokens_of(helms)[1:])
    assert logprobs_of(ours)[0] == 0.0
    assert abs(logprobs_of(ours)[1] - logprobs_of(helms)[2]) > 1e-3


def test_a_full_window_is_generated_to_its_end(benches: Callable[[str], Bench]) -> None:
    """Where positions are learned there are none beyond the window; HELM's client raises, ours stops."""
    bench = benches("tiny_opt")
    request = bench.request(bench.filling(WINDOW - 3), max_tokens=8)
    assert not bench.helm(request).success
    ours = bench.client.make_request(request).completions[0]
    answer = bench.reference.answer(request).generations[0]
    assert (ours.text, len(ours.tokens)) == (answer.text, len(answer.tokens))
    assert len(ours.tokens) <= 3


# Failures


def test_a_failure_is_not_retried(llama: Bench) -> None:
    """HELM takes five attempts and 150 s over everything that does not say otherwise."""
    request = llama.request("", max_tokens=3)
    helms, ours = llama.helm(request), llama.client.make_request(request)
    assert (helms.success, helms.error_flags) == (False, None)
    assert (ours.success, ours.error_flags.is_retriable) == (False, False)


# What is no fault of HELM's client: generation_config.json


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.3},
        pytest.param({"no_repeat_ngram_size": 2}, marks=pytest.mark.slow),
        pytest.param({"suppress_tokens": "first"}, marks=pytest.mark.slow),
        pytest.param({"begin_suppress_tokens": "first"}, marks=pytest.mark.slow),
        {"bad_words_ids": "first"},
        {"min_new_tokens": 25},
        pytest.param({"min_length": 60}, marks=pytest.mark.slow),
        {"forced_eos_token_id": 5},
        {"temperature": 0.7, "top_p": 0.5, "top_k": 3, "do_sample": True},
    ],
)
def test_what_a_checkpoint_forbids_its_texts_is_followed_as_helms_client_follows_it(
    llama: Bench, tmp_path: Path, setting: dict[str, Any]
) -> None:
    prompts = [PROMPT, "the capital of", "a", "def random(", "naïve"]
    plain = [llama.client.make_request(llama.request(prompt, max_tokens=30)).completions[0] for prompt in prompts]
    first = {llama.reference.next_logits(llama.reference.encode(prompt)).argmax().item() for prompt in prompts}
    if "first" in setting.values():
        setting = {name: [[each] for each in first] if name == "bad_words_ids" else [*first] for name in setting}
    model = shutil.copytree(llama.path, tmp_path / f"tiny-{zlib.crc32(repr(setting).encode())}")
    file = model / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **setting}))
    client, helm = our_client(model), helms_client(model)
    asked = [Request(model=f"local/{model.name}", prompt=prompt, temperature=0.0, max_tokens=30) for prompt in prompts]
    ours = [result.completions[0] for result in client.make_requests(asked)]
    helms = [helm(request).completions[0] for request in asked]
    assert [each.text for each in ours] == [each.text for each in helms]
    assert ([each.text for each in ours] != [each.text for each in plain]) is ("temperature" not in setting)
    assert any(next(iter(setting)) in note for note in client.notes) is ("temperature" not in setting)
    scored = replace(asked[0], max_tokens=0, echo_prompt=True)
    assert client.make_request(scored).completions == llama.client.make_request(scored).completions


def test_a_setting_of_the_checkpoint_that_cannot_be_followed_is_refused(llama: Bench, tmp_path: Path) -> None:
    model = shutil.copytree(llama.path, tmp_path / "tiny-beams")
    (model / "generation_config.json").write_text(json.dumps({"num_beams": 4, "eos_token_id": 0}))
    result = our_client(model).make_request(llama.request("a", max_tokens=2))
    assert "sets num_beams 4, which is not supported" in result.error


ROOT = Path(__file__).resolve().parents[3]


def test_every_field_of_helms_requests_is_told_of_in_the_documentation() -> None:
    told = (ROOT / "docs" / "fidelity.md").read_text()
    assert [field.name for field in fields(Request) if f"`{field.name}`" not in told] == []


def test_every_setting_that_changes_a_text_is_told_of_in_the_documentation() -> None:
    """All keys of generation_config.json are told of, or change no text."""
    from transformers import GenerationConfig

    told = (ROOT / "docs" / "fidelity.md").read_text()
    without_effect = {
        "max_length", "max_new_tokens", "early_stopping", "use_mtp", "use_cache", "cache_implementation",
        "cache_config", "max_cache_len", "length_penalty", "renormalize_logits", "remove_invalid_values",
        "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
        "return_dict_in_generate", "pad_token_id", "bos_token_id", "decoder_start_token_id", "is_assistant",
        "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
        "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile",
        "continuous_batching_config", "low_memory", "prefill_chunk_size", "_from_model_config", "transformers_version",
    }  # fmt: skip
    keys = GenerationConfig().to_dict().keys()
    assert [key for key in keys - without_effect if f"`{key}`" not in told] == []
