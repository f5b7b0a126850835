"""Every field of every kind of request is what plain `transformers` and HELM's own client give for it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.metrics.basic_metrics import convert_tokens_to_text, get_num_bytes
from helm.common.request import GeneratedOutput, Request, RequestResult, Token
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from reference import Answer, Bench, Generation, benches_of, is_spelling_of, our_client
from tiny_models import WINDOW, random_llama, save_tiny_model, train_sentencepiece
from watch import Watch

from engine import Completion, Job
from flexgen_helm.helm.requests.results import Timing
from flexgen_helm.helm.requests.results import result as result_of

LOGPROB_TOLERANCE = 1e-4
MODELS = ["tiny_llama", "tiny_opt", "tiny_chat", "tiny_pieces", "tiny_pieces_with_bos"]


@pytest.fixture(scope="session")
def tiny_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer like Llama's, without a BOS."""
    path = tmp_path_factory.mktemp("models") / "tiny-pieces"
    return save_tiny_model(path, random_llama, train=train_sentencepiece, loud=("<0x0A>", "</s>"))


@pytest.fixture(scope="session")
def tiny_pieces_with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one."""
    path = tmp_path_factory.mktemp("models") / "tiny-pieces-with-bos"
    return save_tiny_model(path, random_llama, train=train_sentencepiece, loud=("<0x0A>", "</s>"), adds_bos=True)


@pytest.fixture(scope="module")
def benches(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Bench]]:
    """The bench of a model's fixture."""
    yield from benches_of(request)


@dataclass
class Tally:
    """What a stream compared."""

    num_requests: int = 0
    num_near_ties: int = 0
    kinds: set[str] = field(default_factory=set)
    helms: set[str] = field(default_factory=set)
    """Greedy requests that HELM's own client answered too, all different."""


# What is compared


def assert_told(bench: Bench, request: Request, result: RequestResult, answer: Answer) -> None:
    """`result` says what `answer` does, as far as that is beyond doubt."""
    assert result.success, (result.error, request)
    assert len(result.completions) == request.num_completions
    for output, generation in zip(result.completions, answer.generations, strict=True):
        _assert_output(bench, request, output, answer, generation)


def _assert_output(
    bench: Bench, request: Request, output: GeneratedOutput, answer: Answer, generation: Generation
) -> None:
    ids = [*(answer.prompt if request.echo_prompt else ()), *generation.tokens]
    logprobs = [*answer.prompt_logprobs, *generation.logprobs]
    told = [token.text for token in output.tokens]
    if generation.sure is None:
        assert output.text == bench.reference.whole_text(answer, generation, echo=request.echo_prompt), request
        assert_spelled(bench, told, ids)
        assert output.finish_reason == {"reason": generation.finish_reason}, request
    else:
        num_sure = min(len(ids) - len(generation.tokens) + generation.sure, len(told))
        ids, logprobs, told = ids[:num_sure], logprobs[:num_sure], told[:num_sure]
        assert_spelled(bench, told, ids)
    assert [token.logprob for token in output.tokens[: len(told)]] == pytest.approx(
        logprobs, abs=LOGPROB_TOLERANCE, rel=0
    ), request
    assert output.logprob == pytest.approx(sum(token.logprob for token in output.tokens), abs=1e-9)


def assert_spelled(bench: Bench, told: list[str], ids: list[int]) -> None:
    """Each token is told as HELM's client tells it, but for spaces and bytes; together they are a text."""
    tokenizer = bench.reference.tokenizer
    assert len(told) == len(ids)
    assert all(is_spelling_of(text, tokenizer.decode([token])) for text, token in zip(told, ids, strict=True))
    first = next((place for place, token in enumerate(ids) if token not in tokenizer.all_special_ids), len(ids))
    text = bench.reference.decode(ids[first:])
    if "\ufffd" not in text:
        tokens = [Token(text=each, logprob=0.0) for each in told[first:]]
        assert "".join(group["text"] for group in convert_tokens_to_text(tokens)) == text
        assert get_num_bytes(tokens) == len(text.encode())


def helm_is_right(bench: Bench, request: Request, answer: Answer) -> bool:
    """Whether HELM's client gives this request's text and tokens as documented (docs/fidelity.md lists where not)."""
    tokenizer = bench.reference.tokenizer
    doubled_bos = tuple(tokenizer(bench.reference.render(request))["input_ids"]) != answer.prompt
    scores_several = request.max_tokens == 0 and request.num_completions > 1
    keeps_what_follows = request.echo_prompt and any(each.finish_reason != "length" for each in answer.generations)
    decode = bench.reference.decode
    unreadable_prompt = request.echo_prompt and any(
        not decode((*answer.prompt, *each.tokens)).startswith(decode(answer.prompt)) for each in answer.generations
    )
    scores_a_template = bool(tokenizer.chat_template) and request.max_tokens == 0 and not request.messages
    stops = [tokenizer(stop, add_special_tokens=False)["input_ids"] for stop in request.stop_sequences]
    overlong_stop = max(map(len, stops), default=0) > len(answer.prompt) + 1
    drops_tokens_of_its_text = any(
        decode([token]).startswith(stop)
        for each in answer.generations
        for token in each.tokens
        for stop in request.stop_sequences
    )
    return (
        request.temperature == 0
        and request.presence_penalty == request.frequency_penalty == 0
        and len(answer.prompt) + request.max_tokens <= WINDOW
        and all(generation.sure is None for generation in answer.generations)
        and not (doubled_bos or scores_several or overlong_stop or unreadable_prompt or drops_tokens_of_its_text)
        and not scores_a_template
        and not (keeps_what_follows and request.max_tokens > 0)
    )


def assert_helm_says_so(bench: Bench, request: Request, result: RequestResult) -> None:
    """HELM's client gives the same text, tokens and log-probabilities of a scored prompt."""
    helms_result = bench.helm(request)
    assert helms_result.success, (helms_result.error, request)
    for ours, helms in zip(result.completions, helms_result.completions, strict=True):
        assert ours.text == helms.text, request
        texts, helms_texts = [token.text for token in ours.tokens], [token.text for token in helms.tokens]
        if ours.finish_reason == {"reason": "stop"}:  # it drops tokens only where one begins with a stop
            helms_texts = helms_texts[: len(texts)]
        assert len(texts) == len(helms_texts), request
        assert all(map(is_spelling_of, texts, helms_texts)), request
        if request.max_tokens == 0:
            assert [token.logprob for token in ours.tokens] == pytest.approx(
                [token.logprob for token in helms.tokens], abs=LOGPROB_TOLERANCE, rel=0
            ), request


# The stream

FEW_SHOT = "Question: What is the capital of France?\nAnswer: Paris\n\n" * 2
QUESTIONS = [FEW_SHOT + f"Question: {question}\nAnswer:" for question in ("Why?", "Who is it?")]
PROMPTS = [
    *(question + choice for question in QUESTIONS for choice in ("", " A", " B")),
    "a",
    "the capital of",
    " leading space\tand tab\n",
    "naïve 学 \u2014 \U0001f389 e\u0301",
    "a </s> and <pad> spelled out",
    "</s>begins with a prefix token",
    "line\n\nline\n\n",
]
STOPS = [[], ["\n"], ["\n\n"], ["e"], ["\n", " the"], [" capital of", "Question:", "\n\n\n"], ["\u00e9", "x"]]


@st.composite
def requests(draw: st.DrawFn, bench: Bench, temperatures: list[float]) -> Request:
    """Any request that HELM's scenarios could make of a text model."""
    max_tokens = draw(st.sampled_from([0, 0, 1, 2, 5, 8, 12]))
    temperature = draw(st.sampled_from(temperatures))
    fields: dict[str, Any] = {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "echo_prompt": max_tokens == 0 or draw(st.integers(0, 3)) == 0,
        "num_completions": draw(st.sampled_from([1, 1, 2, 5])),
        "top_k_per_token": draw(st.integers(1, 5)),
        "top_p": draw(st.sampled_from([1, 1, 0.9, 0.4])),
        "random": draw(st.sampled_from([None, "1", "2"])),
        "presence_penalty": draw(st.sampled_from([0, 0, 0, 0.7])),
        "frequency_penalty": draw(st.sampled_from([0, 0, 0, 1.3])),
    }
    has_template = bool(bench.reference.tokenizer.chat_template)
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    said = said if has_template and draw(st.booleans()) else []

    def asking(prompt: str) -> Request:
        if said:
            return bench.request("", messages=[*said, {"role": "user", "content": prompt}], **fields)
        return bench.request(prompt, **fields)

    prompt = draw(st.sampled_from([*PROMPTS, None]))
    if prompt is None:  # as long as the window lets it be
        template = len(bench.reference.encode(bench.reference.render(asking("")))) if has_template else 0
        prompt = bench.filling(WINDOW - template - max_tokens)
    request = asking(prompt)
    return replace(request, stop_sequences=draw(st.sampled_from(STOPS) | cuts(bench, request)))


@st.composite
def cuts(draw: st.DrawFn, bench: Bench, request: Request) -> list[str]:
    """A piece of what the model would say: it begins and ends anywhere, also inside tokens."""
    freely = replace(request, temperature=0.0, num_completions=1, max_tokens=max(4, request.max_tokens))
    text = bench.reference.answer(replace(freely, stop_sequences=[])).generations[0].text
    first = draw(st.integers(0, max(0, len(text) - 1)))
    piece = text[first : first + draw(st.integers(1, 6))]
    return [piece] if piece and "\ufffd" not in piece else []


def compare_stream(bench: Bench, temperatures: list[float], num_batches: int) -> Tally:
    """Compare batches of 4 to 12 requests, one of each also made alone; then one with every kind of request."""
    batches = st.lists(requests(bench, temperatures), min_size=4, max_size=12)
    tally = Tally()

    @seed(zlib.crc32(f"{bench.path.name} {temperatures}".encode()))  # each model has a stream of its own
    @settings(
        max_examples=num_batches,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,  # a failure names its request
        suppress_health_check=list(HealthCheck),
    )
    @given(batch=batches, single=st.integers(0, 3))
    def compare_drawn(batch: list[Request], single: int) -> None:
        compare(batch, single)

    def compare(batch: list[Request], single: int) -> None:
        results = bench.client.make_requests([*batch, batch[-1]])
        assert results[-1].completions == results[-2].completions
        answers = [bench.reference.answer(request) for request in batch]
        for request, result, answer in zip(batch, results, answers, strict=False):
            assert_told(bench, request, result, answer)
            if helm_is_right(bench, request, answer):
                assert_helm_says_so(bench, request, result)
                tally.helms.add(repr(request))
            tally.num_requests += 1
            tally.num_near_ties += any(generation.sure is not None for generation in answer.generations)
            tally.kinds |= kinds(request, answer)
        assert_told(bench, batch[single], bench.client.make_request(batch[single]), answers[single])

    compare_drawn()
    compare(every_kind(bench, temperatures[-1]), 0)
    return tally


def every_kind(bench: Bench, temperature: float) -> list[Request]:
    """Requests of each of `KINDS`, whatever was drawn."""

    def asking(prompt: str, **fields: Any) -> Request:
        return bench.request(prompt, **{"temperature": temperature, **fields})

    text = bench.reference.answer(asking("a", max_tokens=8, temperature=0.0)).generations[0].text
    has_template = bool(bench.reference.tokenizer.chat_template)
    template = len(bench.reference.encode(bench.reference.render(asking("")))) if has_template else 0
    return [
        asking(QUESTIONS[0], max_tokens=5, num_completions=2),
        asking(QUESTIONS[1], max_tokens=5, presence_penalty=0.7, frequency_penalty=1.3),
        asking(QUESTIONS[1] + " A", max_tokens=0, echo_prompt=True),
        asking("the capital of", max_tokens=4, echo_prompt=True),
        asking(bench.filling(WINDOW - template - 8), max_tokens=8),
        asking("a", max_tokens=8, temperature=0.0, stop_sequences=[text[len(text) // 2]]),
    ]


def kinds(request: Request, answer: Answer) -> set[str]:
    """What a stream must have had in it, lest it proves too little."""
    found = {
        "several completions": request.num_completions > 1,
        "penalty": bool(request.presence_penalty or request.frequency_penalty),
        "scoring": request.max_tokens == 0,
        "echo and generation": request.echo_prompt and request.max_tokens > 0,
        "full window": len(answer.prompt) + request.max_tokens >= WINDOW - 16,
    }
    reasons = {generation.finish_reason for generation in answer.generations}
    return {kind for kind, is_so in found.items() if is_so} | reasons


KINDS = {"several completions", "penalty", "scoring", "echo and generation", "full window", "stop", "length"}


@pytest.mark.parametrize("model", MODELS)
def test_greedy_requests_are_what_the_references_give(benches: Callable[[str], Bench], model: str) -> None:
    tally = compare_stream(benches(model), [0.0], 5)
    assert len(tally.helms) >= 12  # of each of five models
    assert tally.num_near_ties <= tally.num_requests / 20
    assert tally.kinds >= KINDS


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_opt", "tiny_pieces_with_bos"])
def test_sampled_requests_are_what_the_reference_gives(benches: Callable[[str], Bench], model: str) -> None:
    tally = compare_stream(benches(model), [0.0, 0.3, 1.0, 2.5], 4)
    assert tally.num_requests >= 16
    assert tally.num_near_ties <= tally.num_requests / 10
    assert tally.kinds >= KINDS


def test_requests_are_what_the_references_give_under_another_policy(tiny_llama: Path) -> None:
    policy = {"device": "cpu", "percent": [30, 70, 30, 70, 0, 100], "gpu-batch-size": 3, "num-gpu-batches": 2}
    tally = compare_stream(Bench.of(tiny_llama, policy=policy), [0.0, 1.0], 3)
    assert tally.num_requests >= 12
    assert tally.num_near_ties <= tally.num_requests / 10


@pytest.mark.slow
@pytest.mark.parametrize("temperatures", [[0.0], [0.0, 0.3, 1.0, 2.5]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("model", MODELS)
def test_a_long_stream_is_what_the_references_give(
    benches: Callable[[str], Bench], model: str, temperatures: list[float]
) -> None:
    is_greedy = temperatures == [0.0]
    tally = compare_stream(benches(model), temperatures, 80 if is_greedy else 40)
    assert tally.num_requests >= 160
    assert len(tally.helms) >= (60 if is_greedy else 0)  # of each of five models
    assert tally.num_near_ties <= tally.num_requests / (20 if is_greedy else 10)
    assert tally.kinds >= KINDS | {"endoftext"}


# Single kinds, so that a failure has a name


@pytest.mark.parametrize("model", MODELS)
def test_an_echoed_prompt_and_its_completion_are_one_text(benches: Callable[[str], Bench], model: str) -> None:
    """A tokenizer may write the first generated token differently at the beginning of a text."""
    bench = benches(model)
    asked = [bench.request(prompt, max_tokens=3, echo_prompt=True) for prompt in PROMPTS]
    for request, result in zip(asked, bench.client.make_requests(asked), strict=True):
        answer = bench.reference.answer(request)
        assert_told(bench, request, result, answer)
        if helm_is_right(bench, request, answer):
            assert result.completions[0].text == bench.helm(request).completions[0].text


def test_a_completion_that_changes_what_its_prompt_is_stands_behind_it_as_it_is(tiny_pieces: Path) -> None:
    """A byte that belongs to no character makes those before it unreadable; the prompt is told as it was."""
    bench = Bench.of(tiny_pieces)
    decode, byte = bench.reference.decode, bench.reference.tokenizer.convert_tokens_to_ids("<0x80>")
    request = bench.request("a \u5b66", max_tokens=1, echo_prompt=True)
    ids = bench.reference.encode(request.prompt)
    assert decode(ids) == request.prompt
    assert not decode((*ids, byte)).startswith(request.prompt)
    completion = Completion(
        text=decode([byte]),
        tokens=(byte,),
        logprobs=(-1.0,),
        prompt_logprobs=(None,) * len(ids),
        finish_reason="length",
    )
    timing = Timing(seconds=0.0, started=0.0, num_requests=1)
    response = bench.client._translator.response(request, [Job(prompt=ids)], [completion], timing)
    assert result_of(response, cached=False).completions[0].text == "a \u5b66\ufffd"


@pytest.mark.parametrize("echo", [False, True], ids=["", "echo"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_pieces"])
def test_a_stop_is_found_wherever_it_lies_across_tokens(
    benches: Callable[[str], Bench], model: str, echo: bool
) -> None:
    bench = benches(model)
    free = bench.request(PROMPTS[0], max_tokens=12, echo_prompt=echo)
    answer = bench.reference.answer(free)
    text = answer.generations[0].text
    before = len(bench.reference.whole_text(answer, answer.generations[0], echo=echo)) - len(text)
    pieces = {text[i : i + size] for i in range(len(text)) for size in (1, 2, 5)}
    asked = [replace(free, stop_sequences=[piece]) for piece in sorted(pieces) if "\ufffd" not in piece]
    assert len(asked) > 20
    for request, result in zip(asked, bench.client.make_requests(asked), strict=True):
        assert_told(bench, request, result, bench.reference.answer(request))
        stop = text.index(request.stop_sequences[0])
        assert result.completions[0].text[before:] == text[:stop]
        assert result.completions[0].finish_reason == {"reason": "stop"}


def test_a_tokenizer_in_python_alone_is_served_like_a_fast_one(tmp_path: Path) -> None:
    """CTRL's has no fast form: words are split at "@@ ", and nothing is added to them."""
    from transformers import CTRLTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["</s>", "<unk>", *letters, *(f"{letter}@@" for letter in letters), "th@@", "the", "of", "is"]

    def train(path: Path, *, adds_bos: bool) -> Any:
        path.mkdir()
        (path / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
        (path / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\no f</w>\ni s</w>\n")
        tokenizer = CTRLTokenizer(
            str(path / "vocab.json"), str(path / "merges.txt"), unk_token="<unk>", eos_token="</s>",
            bos_token="</s>", pad_token="</s>", model_max_length=WINDOW,
        )  # fmt: skip
        tokenizer.save_pretrained(path)
        return tokenizer

    model = save_tiny_model(tmp_path / "tiny-ctrl", random_llama, train=train, loud=("</s>",))
    bench = Bench.of(model)
    assert not bench.reference.tokenizer.is_fast
    prompts = ("the capital of france", "a cat is", "zzz")
    asked = [bench.request(prompt, max_tokens=count, stop_sequences=stops)
             for prompt in prompts for count in (1, 6) for stops in ([], ["e"])]  # fmt: skip
    asked += [bench.request(prompt, max_tokens=0, echo_prompt=True) for prompt in prompts]
    num_helms = 0
    for request, result in zip(asked, bench.client.make_requests(asked), strict=True):
        answer = bench.reference.answer(request)
        assert_told(bench, request, result, answer)
        if helm_is_right(bench, request, answer):
            assert_helm_says_so(bench, request, result)
            num_helms += 1
    assert num_helms >= 6


# Samples


def texts(results: list[RequestResult]) -> list[list[str]]:
    return [[completion.text for completion in result.completions] for result in results]


def test_a_sample_depends_on_its_request_alone(benches: Callable[[str], Bench]) -> None:
    bench = benches("tiny_llama")
    asked = [
        bench.request(prompt, temperature=1.5, max_tokens=6, num_completions=3, random=seed)
        for prompt in PROMPTS
        for seed in (None, "1", "2")
    ]
    together = texts(bench.client.make_requests(asked))
    assert texts(our_client(bench.path).make_requests(asked[::-1]))[::-1] == together
    assert texts([bench.client.make_request(request) for request in asked[:6]]) == together[:6]
    others = [replace(request, prompt=request.prompt + " ", echo_prompt=True) for request in asked]
    assert texts(bench.client.make_requests([*others, *asked[5:9], *others]))[len(asked) :][:4] == together[5:9]


def test_random_asks_for_another_sample(benches: Callable[[str], Bench]) -> None:
    bench = benches("tiny_llama")
    asked = {
        seed: [bench.request(prompt, temperature=1.0, max_tokens=8, random=seed) for prompt in PROMPTS]
        for seed in (None, "1", "2")
    }
    told = {seed: texts(bench.client.make_requests(each)) for seed, each in asked.items()}
    for left, right in ((None, "1"), (None, "2"), ("1", "2")):
        assert sum(a != b for a, b in zip(told[left], told[right], strict=True)) >= len(PROMPTS) - 2
    assert {seed: texts(bench.client.make_requests(each)) for seed, each in asked.items()} == told


def test_completions_of_one_request_differ_and_more_of_them_begin_with_the_same(
    benches: Callable[[str], Bench],
) -> None:
    bench = benches("tiny_llama")
    asked = [bench.request(prompt, temperature=2.5, max_tokens=8, num_completions=5) for prompt in PROMPTS]
    told = texts(bench.client.make_requests(asked))
    assert all(len(set(each)) == 5 for each in told)
    fewer = [replace(request, num_completions=2) for request in asked]
    assert texts(bench.client.make_requests(fewer)) == [each[:2] for each in told]


def test_completions_of_one_prompt_share_its_prefill(tiny_llama: Path) -> None:
    bench = Bench.of(tiny_llama)
    request = bench.request(QUESTIONS[0], temperature=1.0, max_tokens=1, num_completions=5)
    bench.client.make_request(bench.request("a", max_tokens=1))  # loads the engine
    engine = bench.client._served._engine
    watch = Watch(engine)
    (result,) = bench.client.make_requests([request])
    assert len(result.completions) == 5
    num_prompt = len(bench.reference.encode(QUESTIONS[0]))
    assert watch.tokens == [num_prompt - 1 + 5]  # all but the last token once


def test_completions_come_as_they_were_drawn(benches: Callable[[str], Bench]) -> None:
    """As HELM's client gives them; its metrics sort by log-probability themselves where they need to."""
    bench = benches("tiny_llama")
    asked = [bench.request(prompt, temperature=1.0, max_tokens=4, num_completions=5) for prompt in PROMPTS]
    results = bench.client.make_requests(asked)
    logprobs = [[completion.logprob for completion in result.completions] for result in results]
    assert any(each != sorted(each, reverse=True) for each in logprobs)
    for request, result in zip(asked, results, strict=True):
        assert_told(bench, request, result, bench.reference.answer(request))


def test_the_candidate_count_changes_nothing(benches: Callable[[str], Bench]) -> None:
    bench = benches("tiny_llama")
    asked = [
        [bench.request(prompt, temperature=2.0, max_tokens=6, top_k_per_token=count) for prompt in PROMPTS]
        for count in (1, 5, 50)
    ]
    told = [texts(bench.client.make_requests(each)) for each in asked]
    assert told[0] == told[1] == told[2]


def test_a_deployments_top_k_restricts_sampling(benches: Callable[[str], Bench]) -> None:
    bench = benches("tiny_llama")
    asked = [bench.request(prompt, temperature=2.0, max_tokens=6, num_completions=2) for prompt in PROMPTS]
    client = our_client(bench.path, top_k=3)
    for request, result in zip(asked, client.make_requests(asked), strict=True):
        assert_told(bench, request, result, bench.reference.answer(request, top_k=3))
