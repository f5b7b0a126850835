"""Protects: OpenAI's batch files are answered as plain transformers answers, line by line, and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import Engine
from engine.job import Completion
from engine.text.prompt import PromptTokenizer
from flexgen_helm.adapters.openai.bodies import read_body
from flexgen_helm.adapters.openai.model import Model
from flexgen_helm.helm.requests import tokenizer as tokenizer_module
from flexgen_helm.run import main

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant><think>"
CHAT = "/v1/chat/completions"
GREEDY = {"model": "m", "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = models.save_model(tmp_path_factory.mktemp("llama"), "llama")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


class Plain:
    """The model as plain transformers has it."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def greedy(self, prompt: str | list[int], count: int) -> tuple[str, list[float]]:
        """What it generates, and log-probabilities."""
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        whole = self.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0].tolist()
        return self.tokenizer.decode(whole[len(ids) :]), self.scores(whole)[len(ids) :]

    def scores(self, ids: list[int]) -> list[float]:
        """Log-probability of each token; 0 for the first."""
        with torch.no_grad():
            logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [0.0, *(logprobs[at, token].item() for at, token in enumerate(ids[1:]))]


@pytest.fixture(scope="module")
def plain(model: Path) -> Plain:
    return Plain(model)


Batch = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def batch(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Batch:
    """Run the command on a file of these lines: its exit code, its lines, standard error."""

    def run(lines: list[Any], *flags: str) -> tuple[int, list[dict[str, Any]], str]:
        file, out = tmp_path / "batch.jsonl", tmp_path / "out.jsonl"
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        command = ["complete", "--model", str(model), "--format", "openai", str(file), "-o", str(out)]
        code = main([*command, "--served-model-name", "m", *flags])
        found = out.read_text().splitlines() if out.exists() else []
        return code, [json.loads(line) for line in found], capsys.readouterr().err

    return run


def line(custom_id: str, body: Any, url: str = "/v1/completions") -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def test_requests_are_answered_as_plain_transformers_answers(batch: Batch, plain: Plain) -> None:
    """Texts, lists of prompts and of ids, choices, stops, echo and scores, chats with what is thought apart."""
    ids = plain.tokenizer("some ids")["input_ids"]
    free, _ = plain.greedy("stop here", 20)
    stop = free[3:5]
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    chat, chat_scores = plain.greedy("<user>hi<assistant><think>", 9)
    lines = [
        line("one", {**GREEDY, "prompt": "hello world", "max_tokens": 6, "logprobs": 1, "user": "me"}),
        line("many", {**GREEDY, "prompt": ["a b", "another text"], "max_tokens": 4, "n": 2, "seed": 3}),
        line("ids", {**GREEDY, "prompt": ids, "max_tokens": 5}),
        line("stop", {**GREEDY, "prompt": "stop here", "max_tokens": 20, "stop": [stop, "zzz"]}),
        line("score", {**GREEDY, "prompt": "how likely", "max_tokens": 0, "echo": True, "logprobs": 0}),
        line("chat", {**GREEDY, "messages": messages, "max_tokens": 9, "logprobs": True}, CHAT),
        line("sampled", {"model": "m", "prompt": "x", "seed": 7, "n": 3, "max_tokens": 5}),
    ]
    code, found, _ = batch(lines)
    assert code == 0
    assert [each["custom_id"] for each in found] == ["one", "many", "ids", "stop", "score", "chat", "sampled"]
    assert all(each["error"] is None and each["response"]["status_code"] == 200 for each in found)
    body = {each["custom_id"]: each["response"]["body"] for each in found}
    text, scores = plain.greedy("hello world", 6)
    (choice,) = body["one"]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-4)
    assert [max(each.values()) for each in choice["logprobs"]["top_logprobs"]] == choice["logprobs"]["token_logprobs"]
    assert "".join(choice["logprobs"]["tokens"]) == text
    count = len(plain.tokenizer("hello world")["input_ids"])
    assert body["one"]["usage"] == {"prompt_tokens": count, "completion_tokens": 6, "total_tokens": count + 6}
    expected = [plain.greedy(prompt, 4)[0] for prompt in ("a b", "a b", "another text", "another text")]
    assert [(each["index"], each["text"]) for each in body["many"]["choices"]] == list(enumerate(expected))
    assert body["ids"]["choices"][0]["text"] == plain.greedy(ids, 5)[0]
    (choice,) = body["stop"]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (free[: free.find(stop)], "stop")
    (choice,) = body["score"]["choices"]
    asked = plain.tokenizer("how likely")["input_ids"]
    assert (choice["text"], len(choice["logprobs"]["tokens"])) == ("how likely", len(asked))
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(plain.scores(asked)[1:], abs=1e-4)
    assert [("how likely" + " ")[at] for at in choice["logprobs"]["text_offset"][1:]] == [
        each[0] for each in choice["logprobs"]["tokens"][1:]
    ]
    (choice,) = body["chat"]["choices"]
    assert choice["message"]["content"] == ""  # all of it is thought
    assert choice["message"]["reasoning_content"] == chat.strip()
    assert [each["logprob"] for each in choice["logprobs"]["content"]] == pytest.approx(chat_scores, abs=1e-4)
    assert len({each["text"] for each in body["sampled"]["choices"]}) == 3


BAD: dict[str, tuple[Any, str]] = {
    "field": (line("field", {**GREEDY, "prompt": "x", "max_token": 1}), "unknown field 'max_token'"),
    "unsupported": (line("unsupported", {**GREEDY, "prompt": "x", "logit_bias": {"5": 1}}), "field 'logit_bias'"),
    "url": (line("url", {}, "/v1/embeddings"), "url '/v1/embeddings' is none of"),
    "method": ({**line("method", {}), "method": "GET"}, "method 'GET' is not POST"),
    "key": ({**line("key", {}), "bdy": 1}, "unknown key 'bdy' of the line"),
    "body": (line("body", None), "the body is None"),
    "good": (line("good", {**GREEDY, "prompt": "twice"}), "custom_id 'good' is that of line 1, too"),
    "model": (line("model", {**GREEDY, "prompt": "x", "model": "gpt-5"}), "model 'gpt-5' is not here"),
    "long": (line("long", {**GREEDY, "prompt": "long " * 300}), "exceed the model's window of 128"),
    "likeliest": (line("likeliest", {**GREEDY, "prompt": "x", "logprobs": 5}), "neither 0 nor 1"),
    "stream": (line("stream", {**GREEDY, "prompt": "x", "stream": True}), "field 'stream'"),
    "number": (line("number", {**GREEDY, "prompt": "x", "n": True}), "field 'n': True is no whole number"),
    "many": (line("many", {**GREEDY, "prompt": ["x"] * 2000, "n": 6}), "2000 prompts of n = 6 choices are more than"),
    "outside": (line("outside", {**GREEDY, "prompt": [[1], [10**6]]}), "field 'prompt': 1000000 is no token id of"),
    "image": (
        line(
            "image",
            {**GREEDY, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "/v1/chat/completions",
        ),
        "neither a text nor one part of text",
    ),
}


def test_bad_lines_are_answered_with_errors_and_the_others_run(batch: Batch, plain: Plain) -> None:
    good = line("good", {**GREEDY, "prompt": "good", "max_tokens": 3})
    code, found, err = batch([good, "{oops", *(each for each, _ in BAD.values())])
    assert code == 0
    assert found[0]["response"]["body"]["choices"][0]["text"] == plain.greedy("good", 3)[0]
    assert found[1]["custom_id"] is None
    assert "line 2: the line cannot be read" in found[1]["error"]["message"]
    assert len(found) == 2 + len(BAD)
    for custom_id, answer in zip(BAD, found[2:], strict=True):
        response, message = answer["response"], BAD[custom_id][1]
        assert answer["custom_id"] == custom_id
        assert message in response["body"]["error"]["message"]
        assert message in answer["error"]["message"]
        assert message in err
        assert response["status_code"] == (404 if custom_id == "model" else 400)
    assert "bodies say it" in batch([good], "--max-new-tokens", "4")[2]
    assert "takes one batch file" in batch([good], "--input", "other.jsonl")[2]


def test_a_batch_of_bad_lines_alone_is_answered(batch: Batch, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for _ in range(2):  # the second goes on where the first was
        code, found, _ = batch([BAD["field"][0], BAD["model"][0]])
        assert code == 0
        assert [each["response"]["status_code"] for each in found] == [400, 404]
    other = {**found[0], "id": "batch_req-0-5f0e8c1fdd7b5c9a", "error": None}
    out.write_text(json.dumps(other) + "\n")
    code, kept, err = batch([BAD["field"][0], BAD["model"][0]])
    assert (code, kept) == (2, [other])
    assert "line 1 answers something else" in err


def test_a_tokenizer_is_looked_into_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens are told beside likelier ones."""
    looked: list[object] = []
    kinds = tokenizer_module._types
    monkeypatch.setattr(tokenizer_module, "_types", lambda decoder: looked.append(decoder) or kinds(decoder))
    prompts = PromptTokenizer.of(AutoTokenizer.from_pretrained(model), 128)
    asked = read_body({**GREEDY, "prompt": "one two three", "logprobs": 1}, "/v1/completions")
    served = Model.of(["m"], prompts, None)
    jobs = served.jobs(asked)
    tokens = tuple(prompts.plain("four five six"))
    likeliest = tuple((token + 1, -0.1) for token in tokens)
    done = Completion(text="x", tokens=tokens, logprobs=(-1.0,) * len(tokens), likeliest=likeliest)
    body = served.body(asked, jobs, [done], "x")
    assert all(len(each) == 2 for each in body["choices"][0]["logprobs"]["top_logprobs"])
    looks = len(looked)
    served.body(asked, jobs, [done], "x")
    assert looks == len(looked) > 0


def test_goes_on_where_it_was(batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose choices were not all there is asked again, as one that failed; other bodies are others."""
    lines = [line(str(at), {**GREEDY, "prompt": f"number {at}", "max_tokens": 3, "n": 2}) for at in range(4)]
    out = tmp_path / "out.jsonl"

    def untimed() -> list[Any]:
        found = [json.loads(each) for each in out.read_text().splitlines()]
        for each in found:
            each["response"]["body"].pop("created")
        return found

    assert batch(lines)[0] == 0
    whole = untimed()
    kept = out.read_text().splitlines(keepends=True)
    failed = {**whole[2], "id": "batch_req-2-failed", "error": {"code": "server_error", "message": "it broke"}}
    out.write_text(kept[3] + json.dumps(failed) + "\n" + kept[1][:-9])
    asked: list[int] = []
    stream = Engine.stream

    def counting(engine: Engine, jobs: Any) -> Any:
        jobs = list(jobs)
        asked.append(len(jobs))
        return stream(engine, jobs)

    monkeypatch.setattr(Engine, "stream", counting)
    assert batch(lines)[0] == 0
    assert asked == [6]
    assert untimed() == whole
    lines[0]["body"]["stop"] = "x"
    assert "line 1 answers something else" in batch(lines)[2]
    lines[0] = line("other", {**GREEDY, "prompt": "number 0", "max_tokens": 3, "n": 2})
    assert "line 1 answers something else" in batch(lines)[2]


def test_official_types_take_what_is_written(batch: Batch) -> None:
    types = pytest.importorskip("openai.types", reason="openai is not installed; pip install openai")
    chat = line("chat", {**GREEDY, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": True})
    chat["url"] = CHAT
    _, found, _ = batch([line("text", {**GREEDY, "prompt": "hi", "max_tokens": 3, "logprobs": 0, "echo": True}), chat])
    for answer, kind in zip(found, (types.Completion, types.chat.ChatCompletion), strict=True):
        body = {**answer["response"]["body"]}
        if kind is types.Completion:
            body["choices"][0]["logprobs"]["token_logprobs"][0] = 0.0  # its type knows no null, its service writes one
        kind.model_validate(body, strict=True)
