"""Protects: the endpoint answers OpenAI's requests as plain transformers does, and stands whatever comes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is not installed; pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed; pip install -e '.[serve]'")

import httpx
import models
import torch
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import Engine, Job
from engine.errors import ConfigError, EngineError
from engine.text.prompt import PromptTokenizer
from flexgen_helm.adapters.openai import server as server_module
from flexgen_helm.adapters.openai.bodies import Asked
from flexgen_helm.adapters.openai.model import Model
from flexgen_helm.adapters.openai.server import Server
from flexgen_helm.commands.completion.serve import _api_key, _listening
from flexgen_helm.run import main

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
GREEDY = {"model": "m", "temperature": 0}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = models.save_model(tmp_path_factory.mktemp("llama"), "llama")
    tokenizer = AutoTokenizer.from_pretrained(made)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(str(directory)) as opened:
        yield opened


def model_of(engine: Engine) -> Model:
    return Model.of(["m"], PromptTokenizer.of(engine.tokenizer, engine.window), engine.vocab_size)


@contextmanager
def served(engine: Engine, **options: Any) -> Iterator[httpx.Client]:
    """A server at a free port, and who asks it."""
    server = Server(model_of(engine), engine, **{"most_choices": 60, **options})
    running = uvicorn.Server(
        uvicorn.Config(
            server.app(["127.0.0.1"]), port=0, log_level="warning", lifespan="off", timeout_graceful_shutdown=2
        )
    )
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not running.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[httpx.Client]:
    with served(engine) as client:
        yield client


@pytest.fixture(scope="module")
def greedy(directory: Path) -> Callable[[str, int], str]:
    """What plain transformers writes behind a prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)

    def of(prompt: str, count: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, max_new_tokens=count, do_sample=False)[0]
        return str(tokenizer.decode(whole[ids.shape[1] :]))

    return of


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_answers_are_those_of_plain_transformers(client: httpx.Client, greedy: Callable[[str, int], str]) -> None:
    """Many at a time, whole and as streams; prompts are scored, and the model is told."""
    prompts = [f"prompt number {number}" for number in range(12)]

    def ask(prompt: str) -> Any:
        return client.post("/v1/completions", json={**GREEDY, "prompt": prompt, "max_tokens": 5}).json()

    with ThreadPoolExecutor(12) as pool:
        found = [body["choices"][0]["text"] for body in pool.map(ask, prompts)]
    assert found == [greedy(prompt, 5) for prompt in prompts]
    asked = {
        **GREEDY,
        "messages": HI,
        "max_tokens": 6,
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 2,
    }
    chunks = events(client.post("/v1/chat/completions", json=asked))
    for index in range(2):
        deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(delta.get("content", "") for delta in deltas) == greedy("<user>hi<assistant>", 6)
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    asked = {**GREEDY, "prompt": "hello there", "max_tokens": 0, "echo": True, "logprobs": 0}
    whole = client.post("/v1/completions", json=asked).json()["choices"][0]
    (chunk,) = events(client.post("/v1/completions", json={**asked, "stream": True}))
    assert chunk["choices"][0] == whole
    assert all(score < 0 for score in whole["logprobs"]["token_logprobs"][1:])
    (told,) = client.get("/v1/models").json()["data"]
    assert told == client.get("/v1/models/m").json()
    assert (told["id"], told["max_model_len"]) == ("m", 128)
    assert client.get("/health").json() == {"status": "ok", "choices_in_progress": 0}


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, {**GREEDY, "prompt": "x", "max_token": 1}, "unknown field 'max_token'"),
        (400, {**GREEDY, "prompt": "x", "min_tokens": 1}, "unknown field 'min_tokens' of /v1/completions; known: "),
        (400, {**GREEDY, "prompt": "x", "seed": -1}, "field 'seed': -1 is no whole number from 0"),
        (400, {**GREEDY, "prompt": "x", "max_tokens": -1}, "field 'max_tokens': -1 is no whole number from 0"),
        (400, {**GREEDY, "prompt": "long " * 300}, "exceed the model's window of 128"),
        (400, {**GREEDY, "prompt": "x", "n": 61}, "61 choices are more than --max-choices 60"),
        (400, {**GREEDY, "prompt": ["x"] * 11, "n": 1000}, "11 prompts of n = 1000 choices are more than 10000"),
        (
            400,
            {**GREEDY, "prompt": [5, -1], "echo": True},
            "field 'prompt': -1 is no token id of the model's vocabulary",
        ),
        (404, {**GREEDY, "prompt": "x", "model": "other"}, "model 'other' is not here"),
        (400, b"{oops", "the body cannot be read"),
        (400, b'{"n": NaN}', "NaN"),
        (415, "text", "is not application/json"),
    ],
)
def test_bad_requests_are_refused(client: httpx.Client, status: int, body: Any, message: str) -> None:
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    kind = "text/plain" if isinstance(body, str) else "application/json"
    found = client.post("/v1/completions", content=content, headers={"content-type": kind})
    assert found.status_code == status
    assert message in found.json()["error"]["message"]


def test_choices_are_counted_before_they_are_made(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts times n, as a small body may ask for more than memory holds; and a refusal gives its places back."""
    made: list[Asked] = []
    jobs = Model.jobs
    monkeypatch.setattr(Model, "jobs", lambda model, asked: made.append(asked) or jobs(model, asked))
    found = client.post("/v1/completions", json={**GREEDY, "prompt": ["x"] * 31, "n": 2})
    assert "62 choices are more than --max-choices 60" in found.json()["error"]["message"]
    assert not made
    for _ in range(3):
        assert client.post("/v1/completions", json={**GREEDY, "prompt": "long " * 300, "n": 50}).status_code == 400
    assert client.get("/health").json()["choices_in_progress"] == 0


def test_a_tokenizer_is_not_lent_again_before_its_thread_has_ended(engine: Engine) -> None:
    """Whoever waits for it may be cancelled, and cancelled again; the thread works on."""

    async def run() -> list[str]:
        server = Server(model_of(engine), engine, most_choices=1)
        go, seen = threading.Event(), list[str]()

        def first() -> None:
            seen.append("begins")
            go.wait(60)
            seen.append("ends")

        waiting = asyncio.ensure_future(server._locked(first))
        while not seen:
            await asyncio.sleep(0.001)
        waiting.cancel()
        await asyncio.wait((waiting,))
        after = asyncio.ensure_future(server._locked(seen.append, "after"))
        await asyncio.sleep(0.05)
        assert seen == ["begins"]
        go.set()
        await after
        return seen

    assert asyncio.run(run()) == ["begins", "ends", "after"]


def test_bodies_are_read_and_written_beside_the_loop(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be large, and others' streams are to go on."""
    loops: list[object] = []
    for name in ("parse_json", "JSONResponse", "_event"):
        work = getattr(server_module, name)

        def noted(*args: Any, work: Any = work, **options: Any) -> Any:
            loops.append(asyncio._get_running_loop())
            return work(*args, **options)

        monkeypatch.setattr(server_module, name, noted)
    for stream in (False, True):
        asked = {**GREEDY, "prompt": "x", "max_tokens": 1, "stream": stream}
        assert client.post("/v1/completions", json=asked).status_code == 200
    assert loops == [None] * 4


def test_bodies_that_do_not_come_are_not_waited_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_BODY_S", 0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9"
    with served(engine) as client, socket.create_connection(("127.0.0.1", client.base_url.port), 60) as slow:
        slow.sendall(head + b"\r\n\r\n{")
        answer = b"".join(iter(lambda: slow.recv(4096), b""))  # to the end: it is closed
    assert answer.startswith(b"HTTP/1.1 408")


def test_the_health_of_an_engine_that_has_ended(directory: Path) -> None:
    with Engine.from_pretrained(str(directory)) as engine, served(engine) as client:
        assert client.get("/health").status_code == 200
        engine.close()
        found = client.get("/health")
        assert (found.status_code, found.json()["choices_in_progress"]) == (503, 0)
        assert "has ended" in found.json()["status"]


def test_other_doors_are_closed(client: httpx.Client, engine: Engine) -> None:
    assert client.get("/v1/embeddings").status_code == 404
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/v1/models/none").status_code == 404
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 400
    with served(engine, api_key="secret") as guarded:
        asked = {**GREEDY, "prompt": "x", "max_tokens": 1}
        for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "secret"}):
            assert guarded.post("/v1/completions", json=asked, headers=headers).status_code == 401
            assert guarded.get("/v1/models", headers=headers).status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert guarded.post("/v1/completions", json=asked, headers=headers).status_code == 200


class Slow:
    """An engine whose jobs end when they are let."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.go, self.dropped = engine, threading.Event(), 0

    async def astream(self, jobs: list[Job]) -> Any:
        if not jobs:
            return
        try:
            while not self.go.is_set():
                await asyncio.sleep(0.01)
        except BaseException:
            self.dropped += 1
            raise
        if len(jobs[0].prompt) > 20:
            raise EngineError("it broke")
        async for found in self.engine.astream(jobs):
            yield found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def test_a_full_queue_and_clients_that_go_away(engine: Engine) -> None:
    """429 beyond the bound; what nobody waits for is dropped, and its place is free again."""
    slow: Any = Slow(engine)
    asked = {**GREEDY, "prompt": "x", "max_tokens": 2, "n": 2}
    with served(slow, most_choices=4) as client:

        def wait_for(count: int) -> None:
            end = time.monotonic() + 30
            while client.get("/health").json()["choices_in_progress"] != count:
                assert time.monotonic() < end
                time.sleep(0.01)

        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json={**asked, "stream": stream}, timeout=0.3)
            wait_for(0)
        assert slow.dropped == 2
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(client.post, "/v1/completions", json=asked) for _ in range(2)]
            wait_for(4)
            refused = client.post("/v1/completions", json=asked)
            assert refused.status_code == 429
            assert refused.headers["retry-after"]
            slow.go.set()
            assert [each.result().status_code for each in waiting] == [200, 200]
        wait_for(0)
        broken = client.post("/v1/completions", json={**asked, "prompt": "x " * 30})
        assert (broken.status_code, broken.json()["error"]["message"]) == (500, "it broke")
        streamed = client.post("/v1/completions", json={**asked, "prompt": "x " * 30, "stream": True})
        assert "it broke" in streamed.text
        wait_for(0)


def test_the_official_client(client: httpx.Client, greedy: Callable[[str, int], str]) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed; tests/README.md says how to run these")
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="-") as asking:
        text = greedy("<user>hi<assistant>", 4)
        chat = asking.chat.completions.create(model="m", messages=HI, temperature=0, max_tokens=4, logprobs=True)
        assert chat.choices[0].message.content == text
        assert chat.choices[0].logprobs.content[0].logprob < 0
        stream = asking.chat.completions.create(model="m", messages=HI, temperature=0, max_tokens=4, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
        done = asking.completions.create(model="m", prompt="hi", temperature=0, max_tokens=4, echo=True, logprobs=0)
        assert done.choices[0].text == "hi" + greedy("hi", 4)
        assert [each.id for each in asking.models.list()] == ["m"]
        with pytest.raises(openai.BadRequestError, match="logit_bias"):
            asking.completions.create(model="m", prompt="hi", logit_bias={"5": 1})


def test_lm_evals_completions_over_it_are_those_of_its_own_model(client: httpx.Client, directory: Path) -> None:
    """Scores, whether continuations are greedy, and texts, by the harness's client for such endpoints."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install -e '.[lm-eval]'")
    pytest.importorskip("tenacity", reason="lm-eval's clients of endpoints need it; pip install 'lm-eval[api]'")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    theirs: Any = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=1)
    asking: Any = LocalCompletionsAPI(
        base_url=f"{client.base_url}/v1/completions",
        model="m",
        tokenizer=str(directory),
        tokenizer_backend="huggingface",
        max_length=theirs.max_length,
        batch_size=3,
    )
    contexts = [f"context number {number}" for number in range(5)]
    greedy = [theirs.tokenizer.decode(_next(theirs, context)) for context in contexts]
    pairs = [*zip(contexts, greedy, strict=True), *((context, " other words") for context in contexts)]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    found, expected = (each.loglikelihood(requests, disable_tqdm=True) for each in (asking, theirs))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert sum(is_greedy for _, is_greedy in found) >= 3
    until = {"until": ["e"], "max_gen_toks": 6}
    asked = [SimpleNamespace(args=(context, dict(until))) for context in contexts]
    texts = (each.generate_until(asked, disable_tqdm=True) for each in (asking, theirs))
    assert next(texts) == next(texts)


def _next(model: Any, context: str) -> list[int]:
    ids = torch.tensor([model.tok_encode(context)])
    with torch.no_grad():
        return [int(model.model(ids).logits[0, -1].argmax())]


def test_helms_own_client_for_such_endpoints(client: httpx.Client, directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="openai is not installed; tests/README.md says how to run these")
    from helm.clients.openai_client import OpenAILegacyCompletionsClient
    from helm.common.cache import BlackHoleCacheConfig
    from helm.common.request import Request

    with Engine.from_pretrained(str(directory)) as engine:
        ids = engine.tokenizer("how likely is it")["input_ids"]
        (done,) = engine.run([Job(prompt=ids, max_new_tokens=3, prompt_logprobs=True)])
    url = f"{client.base_url}/v1"
    cache = BlackHoleCacheConfig()
    asking = OpenAILegacyCompletionsClient(cache, api_key="-", base_url=url, openai_model_name="m")
    asked = Request(
        model="m/m", model_deployment="m/m", prompt="how likely is it", temperature=0, max_tokens=3, echo_prompt=True
    )
    found = asking.make_request(asked)
    assert found.success, found.error
    scores = [token.logprob for token in found.completions[0].tokens]
    assert scores[1:] == pytest.approx([*(done.prompt_logprobs or ())[1:], *done.logprobs], abs=1e-4)
    assert found.completions[0].text == "how likely is it" + done.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets others in; give an --api-key"),
        (["--port", "70000"], "--port 70000 is not from 0 to 65535"),
        (["--max-choices", "0"], "--max-choices 0 is below 1"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", "schl\u00fcssel"], "--api-key has a space, or a character outside ASCII"),
    ],
)
def test_bad_command_lines(flags: list[str], message: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", str(directory), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_token_of_the_environment_and_what_connections_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGEN_HELM_API_KEY", "secret")
    assert (_api_key(None), _api_key("other")) == ("secret", "other")
    monkeypatch.setenv("FLEXGEN_HELM_API_KEY", "")
    with pytest.raises(ConfigError, match="FLEXGEN_HELM_API_KEY is empty"):
        _api_key(None)
    with _listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted = listener.accept()[0]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000  # in milliseconds
        accepted.close()


@pytest.mark.usefixtures("warm_processes")
def test_the_command_serves_until_it_is_told_to_end(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "flexgen_helm", "serve", "--model", str(directory), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127.0.0.1:(\d+)/v1", line)
    assert found, process.communicate(timeout=60)[1]
    asked = {"model": str(directory), "prompt": "x", "max_tokens": 2}
    assert httpx.post(f"{found[0]}/completions", json=asked, timeout=120).status_code == 200
    assert main(["serve", "--model", str(directory), "--port", found[1]]) == 2
    assert "Address already in use; give another --port" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
