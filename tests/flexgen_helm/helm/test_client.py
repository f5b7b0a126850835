"""Every request is answered from cache or engine, every answer is kept at once, and bad requests fail alone."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from helm.common.request import Request
from sqlitedict import encode  # type: ignore[import-untyped]

from engine import EngineError
from engine.errors import CapacityError, CheckpointError, ConfigError, JobError
from flexgen_helm.helm.request_cache import RequestCache

Clients = Callable[..., Any]


def request(prompt: str = "What is the capital of France?", **fields: Any) -> Request:
    return Request(
        model="local/tiny",
        model_deployment="flexgen/tiny",
        **{"prompt": prompt, "temperature": 0.0, "max_tokens": 5, **fields},
    )


def outputs(result: Any) -> list[Any]:
    return [result.success, result.completions, result.error]


def test_a_whole_run_is_one_call_and_equals_requests_made_one_by_one(
    make_client: Clients, fake_engines: list[FakeEngine]
) -> None:
    asked = [
        request(f"number {n}", max_tokens=n % 4 + 1, num_completions=n % 3 + 1, temperature=1.0) for n in range(12)
    ]
    together = make_client(cache=None).make_requests(asked)
    assert len(fake_engines[0].calls) == 1
    alone = [make_client(cache=None).make_request(each) for each in asked]
    assert [outputs(each) for each in together] == [outputs(each) for each in alone]
    assert len({each.completions[0].text for each in together}) == 12


def test_stock_requests_and_whole_runs_share_cache_entries(
    make_client: Clients, fake_engines: list[FakeEngine]
) -> None:
    asked = [request(f"number {n}", echo_prompt=n % 2 == 0, num_completions=2, temperature=0.5) for n in range(6)]
    stock = [make_client().make_request(each) for each in asked[:3]]
    whole = make_client().make_requests(asked)
    again = [make_client().make_request(each) for each in asked]
    assert [each.cached for each in stock + whole + again] == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 6
    assert [outputs(each) for each in stock] == [outputs(each) for each in whole[:3]]
    assert [replace(each, cached=True) for each in whole] == again  # times and batch sizes too
    assert sum(len(jobs) for jobs in fake_engines[0].calls) == 12


def test_what_is_kept_and_is_no_answer_is_computed_anew(
    make_client: Clients, fake_engines: list[FakeEngine], tmp_path: Path
) -> None:
    asked = [request(f"number {n}") for n in range(3)]
    whole = make_client().make_requests(asked)
    with sqlite3.connect(tmp_path / "cache.sqlite") as connection:
        for place, odd in ((0, {"completionz": []}), (1, {"completions": 7})):
            found = connection.execute("SELECT key FROM unnamed WHERE key LIKE ?", (f"%number {place}%",)).fetchone()
            connection.execute("UPDATE unnamed SET value = ? WHERE key = ?", (encode(odd), *found))
    for cached in ([False, False, True], [True] * 3):
        again = make_client().make_requests(asked)
        assert [each.cached for each in again] == cached
        assert [outputs(each) for each in again] == [outputs(each) for each in whole]


def test_a_scored_prompt_kept_by_an_earlier_release_is_computed_anew_where_its_tokens_do_not_spell_it(
    make_client: Clients, fake_engines: list[FakeEngine]
) -> None:
    asked = [request(text, echo_prompt=True, max_tokens=0) for text in ("plain", "naïve")]
    client = make_client()
    expected = [result.completions for result in client.make_requests(asked)]
    with RequestCache(client.cache.config) as cache:
        translator = client._translator
        identity = client._served.identity
        keys = [{**translator.key(each, translator.render(each)), "identity": identity} for each in asked]
        kept = [cache.get(key) for key in keys]
        for response in kept:
            assert response is not None
            prompt = response["prompt"]
            del prompt["spelled"]
            prompt["tokens"] = [
                token if token.isascii() and "\\" not in token else "\ufffd" for token in prompt["tokens"]
            ]
        cache.put(zip(keys, kept, strict=True))
    results = make_client().make_requests(asked)
    assert [result.completions for result in results] == expected
    assert [result.cached for result in results] == [True, False]
    alone = make_client().make_request(asked[1])
    assert (alone.cached, alone.completions) == (True, expected[1])
    assert sum(len(jobs) for jobs in fake_engines[0].calls) == 3


@pytest.mark.parametrize(("how", "is_kept"), [("in place", False), ("by another file", True)])
def test_answers_of_weights_that_are_overwritten_meanwhile_are_not_kept(
    make_client: Clients, fake_engines: list[FakeEngine], tiny_llama: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, how: str, is_kept: bool,
) -> None:  # fmt: skip
    """A training job saves into the directory; a file that takes the other's place is not what the engine has open."""
    model = shutil.copytree(tiny_llama, tmp_path / "trained")
    weights, sweeps = model / "model.safetensors", FakeEngine.sweeps

    def meanwhile(self: FakeEngine, jobs: Any) -> Any:
        changed = bytearray(weights.read_bytes())
        changed[-1] ^= 1
        if how == "in place":
            weights.write_bytes(changed)
        else:
            (model / "new").write_bytes(changed)
            (model / "new").replace(weights)
        return sweeps(self, jobs)

    monkeypatch.setattr(FakeEngine, "sweeps", meanwhile)
    client = make_client(model=model)
    key = client._translator.key(request(), client._translator.render(request()))
    key["identity"] = make_client(model=shutil.copytree(model, tmp_path / "before"))._served.identity
    if is_kept:
        assert client.make_requests([request()])[0].success
    else:
        with pytest.raises(EngineError, match=r"model\.safetensors was written to while the engine reads its weights"):
            client.make_requests([request()])
        assert "was written to" in str(client.make_request(request("another")).error)
    with RequestCache(client.cache.config) as cache:
        assert (cache.get(key) is not None) is is_kept


def test_a_locked_cache_is_waited_for_once(
    make_client: Clients, fake_engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(RequestCache.__init__.__kwdefaults__, "wait_s", 1.0)
    client = make_client()
    client.make_requests([request("another")])
    other = sqlite3.connect(tmp_path / "cache.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    waited = []
    for _ in range(3):  # runs of one suite
        began = time.monotonic()
        with pytest.raises(ConfigError, match="is locked by another process"):
            client.make_requests([request()])
        waited.append(time.monotonic() - began)
    assert waited[0] > 0.9
    assert sum(waited[1:]) < 0.9
    other.execute("ROLLBACK")
    assert client.make_requests([request()])[0].success


def test_equal_requests_are_computed_once(make_client: Clients, fake_engines: list[FakeEngine]) -> None:
    results = make_client(cache=None).make_requests([request("a"), request("b"), request("a"), request("a")])
    assert len(fake_engines[0].calls[0]) == 2
    assert outputs(results[0]) == outputs(results[2]) == outputs(results[3]) != outputs(results[1])


def test_a_greedy_completion_is_computed_once_and_given_n_times(
    make_client: Clients, fake_engines: list[FakeEngine]
) -> None:
    greedy, sampled = make_client().make_requests(
        [request(num_completions=3), request(num_completions=3, temperature=1.0)]
    )
    assert len(fake_engines[0].calls[0]) == 1 + 3
    assert len(greedy.completions) == 3 == len(sampled.completions)
    assert len({each.text for each in greedy.completions}) == 1
    assert len({each.text for each in sampled.completions}) == 3


def test_a_killed_run_keeps_what_the_engine_yielded(make_client: Clients, fake_engines: list[FakeEngine]) -> None:
    asked = [request(f"number {n}") for n in range(5)]
    client = make_client()
    client.make_request(request("loads the engine"))
    fake_engines[0].fault, fake_engines[0].fault_after = EngineError("the power went"), 3
    with pytest.raises(EngineError, match="the power went"):
        client.make_requests(asked)
    fake_engines[0].fault = None
    assert [each.cached for each in make_client().make_requests(asked)] == [False, False, True, True, True]


def test_concurrent_requests_reach_the_engine_together(make_client: Clients, fake_engines: list[FakeEngine]) -> None:
    asked = [request(f"number {n}") for n in range(8)]
    clients = [make_client() for _ in asked]  # HELM makes one in each thread
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda pair: pair[0].make_request(pair[1]), zip(clients, asked, strict=True)))
    assert len(fake_engines) == 1
    assert len(fake_engines[0].calls) < 8
    alone = [make_client(cache=None).make_request(each) for each in asked]
    assert [outputs(each) for each in results] == [outputs(each) for each in alone]
    assert not [thread for thread in threading.enumerate() if thread.name == "flexgen-batch"]


def test_a_call_waits_for_requests_that_are_still_being_prepared(
    make_client: Clients, fake_engines: list[FakeEngine]
) -> None:
    clients = [make_client() for _ in range(4)]
    for number, client in enumerate(clients):
        prepare = client._tokenizer.get_wrapped_tokenizer
        client._tokenizer.get_wrapped_tokenizer = lambda p=prepare, n=number: (time.sleep(0.1 * n), p())[1]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: clients[n].make_request(request(f"number {n}")), range(4)))
    assert [len(jobs) for jobs in fake_engines[0].calls] == [4]


def test_requests_computed_together_say_so(make_client: Clients, fake_engines: list[FakeEngine]) -> None:
    before = time.time()
    alone, *together = [
        *make_client().make_requests([request("alone")]),
        *make_client().make_requests([request("a"), request("b"), request("alone")]),
    ]
    assert (alone.batch_size, alone.batch_request_time) == (None, None)
    for result in together[:2]:
        assert result.batch_size == 2
        assert result.batch_request_time == result.request_time
        assert 0 <= result.request_time < 10
        assert int(before) <= result.request_datetime <= time.time()
    assert replace(together[2], cached=False) == alone  # what was stored, not what it costs to look it up


def test_loading_the_engine_is_not_counted_as_request_time(
    make_client: Clients, fake_engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexgen_helm.helm.engines import engines

    quick = engines.load
    monkeypatch.setattr(engines, "load", lambda *arguments: (time.sleep(0.5), quick(*arguments))[1])
    assert make_client().make_request(request("a")).request_time < 0.3
    assert make_client(policy={"device": "cpu"}).make_requests([request("b")])[0].request_time < 0.3


def test_progress_counts_requests_and_tokens(make_client: Clients, fake_engines: list[FakeEngine]) -> None:
    client, seen = make_client(), []
    client.make_requests([request("a")])
    asked = [request("a"), request("b", max_tokens=3), request("b", max_tokens=3), request("c")]
    client.make_requests(asked, lambda *counts: seen.append(counts))
    num_prompt = len(fake_engines[0].calls[1][0].prompt), len(fake_engines[0].calls[1][1].prompt)
    assert seen[0] == (1, 4, 0)
    assert seen[-1] == (4, 4, sum(num_prompt) + 3 + 5)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


# What fails


def test_a_prompt_longer_than_the_window_fails_alone_with_its_length(
    make_client: Clients, fake_engines: list[FakeEngine]
) -> None:
    asked = [request("short"), request("zq " * 700), request(""), request("also short")]
    results = make_client().make_requests(asked)
    assert [each.success for each in results] == [True, False, False, True]
    num_tokens = len(fake_engines[0].tokenizer("zq " * 700)["input_ids"])
    assert f"{num_tokens} tokens, more than the 512" in results[1].error
    assert "empty" in results[2].error
    for each in results[1:3]:
        assert "\n" not in each.error
        assert (each.error_flags.is_retriable, each.error_flags.is_fatal) == (False, False)
    assert outputs(make_client().make_request(asked[1])) == outputs(results[1])


def test_a_failed_scoring_request_is_fatal_because_an_empty_completion_would_win(
    make_client: Clients, fake_engines: list[FakeEngine]
) -> None:
    result = make_client().make_request(request("zq " * 700, echo_prompt=True, max_tokens=0))
    assert (result.error_flags.is_retriable, result.error_flags.is_fatal) == (False, True)


def test_check_finds_bad_requests_without_loading_an_engine(
    make_client: Clients, fake_engines: list[FakeEngine]
) -> None:
    client = make_client()
    client.check([request("a"), request("b")])
    with pytest.raises(JobError, match=r"2 of 3 requests cannot be run; number 2: .* tokens, more than the 512"):
        client.check([request("a"), request("zq " * 700), request("")])
    with pytest.raises(JobError, match="top_p 7"):
        client.check([request("a", top_p=7.0, temperature=1.0)])
    with pytest.raises(JobError, match="top_p 7"):
        client.check([request("a", top_p=7.0, temperature=0.0)])
    assert fake_engines == []


def test_a_prompt_longer_than_a_fixed_pad_is_found_before(make_client: Clients, fake_engines: list[FakeEngine]) -> None:
    client = make_client(policy={"pad-to-seq-len": 4})
    with pytest.raises(JobError, match="more than pad-to-seq-len 4; raise pad-to-seq-len to "):
        client.check([request("a rather long prompt, for four tokens")])


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"embedding": True}, "an embedding"),
        ({"multimodal_prompt": object()}, "a multimodal prompt"),
        ({"image_generation_parameters": object()}, "an image"),
        ({"response_format": object()}, "a response format"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "both prompt and messages"),
        ({"messages": [{"role": "user", "content": "Hi"}], "prompt": ""}, "without a chat template"),
        ({"num_completions": 0}, "num_completions 0"),
        ({"max_tokens": 0}, "requests nothing"),
        ({"temperature": -1.0}, "temperature -1"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    make_client: Clients, fake_engines: list[FakeEngine], fields: dict[str, Any], line: str
) -> None:
    bad = request(**fields)
    alone, (good, beside) = make_client().make_request(bad), make_client().make_requests([request("fine"), bad])
    assert good.success
    for result in (alone, beside):
        assert not result.success
        assert line in result.error
        assert "\n" not in result.error
        assert (result.error_flags.is_retriable, result.error_flags.is_fatal) == (False, True)


def test_a_job_that_the_engine_fails_is_neither_kept_nor_retried(
    make_client: Clients, fake_engines: list[FakeEngine]
) -> None:
    client = make_client()
    client.make_request(request("loads the engine"))
    fake_engines[0].bad_tokens = set(fake_engines[0].tokenizer("§")["input_ids"])
    good, bad = client.make_requests([request("good"), request("§")])
    assert good.success
    assert "not finite" in bad.error
    assert (bad.error_flags.is_retriable, bad.error_flags.is_fatal) == (False, False)
    fake_engines[0].bad_tokens = set()
    assert not client.make_request(request("§")).cached


def test_an_engine_that_cannot_be_built_is_tried_once_and_fails_every_request(
    make_client: Clients, fake_engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexgen_helm.helm.engines import engines

    attempts: list[str] = []

    def load(path: str, policy: object, window: int | None) -> FakeEngine:
        attempts.append(path)
        raise CapacityError("weights 59.2 GB exceed 16.0 GB")

    monkeypatch.setattr(engines, "load", load)
    results = [make_client().make_request(request(f"{n}")) for n in range(3)]
    assert {each.error for each in results} == {"CapacityError: weights 59.2 GB exceed 16.0 GB"}
    assert {each.error_flags.is_retriable for each in results} == {False}
    assert {each.error_flags.is_fatal for each in results} == {True}
    with pytest.raises(CapacityError):
        make_client().make_requests([request("4")])
    assert len(attempts) == 1


def test_an_unexpected_exception_of_the_engine_is_not_retried_either(
    make_client: Clients, fake_engines: list[FakeEngine]
) -> None:
    client = make_client()
    client.make_request(request("loads the engine"))
    fake_engines[0].fault = ZeroDivisionError("of\nall")  # type: ignore[assignment]
    result = client.make_request(request("other"))
    assert "ZeroDivisionError: of all" in result.error
    assert result.error_flags.is_retriable is False


def test_a_model_directory_that_is_missing_fails_requests_in_one_line(
    make_client: Clients, fake_engines: list[FakeEngine], tmp_path: Path
) -> None:
    client = make_client(pretrained_model_name_or_path=str(tmp_path / "no-model"))
    result = client.make_request(request())
    assert "no-model" in result.error
    assert result.error_flags.is_retriable is False
    with pytest.raises(CheckpointError, match="no-model"):
        client.make_requests([request()])


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ({"policy": {"gpu-batch-sise": 4}}, "did you mean 'gpu-batch-size'"),
        ({"policy": "no-such-policy"}, "no-such-policy"),
        ({"top_k": 0}, "top_k 0"),
    ],
)
def test_a_wrong_deployment_is_refused_when_the_client_is_made(
    make_client: Clients, args: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        make_client(**args)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"cache_implementation": "none such"}', "generation_config.json is invalid"),
        ('["a"]', "generation_config.json"),
        ('{"repetition_penalty": "much"}', "generation_config.json says {'repetition_penalty': 'much'}"),
        ('{"suppress_tokens": 5}', "generation_config.json"),
    ],
)
def test_a_generation_config_that_cannot_be_meant_is_told_before_anything_is_asked(
    content: str,
    told: str,
    tmp_path: Path,
    tiny_llama: Path,
    make_client: Callable[..., Any],
    fake_engines: list[FakeEngine],
) -> None:
    """It was taken for one that says nothing, and texts were made without its rules."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / "generation_config.json").write_text(content)
    request = Request(model="local/tiny", prompt="a", temperature=0.0, max_tokens=1)
    with pytest.raises(CheckpointError) as caught:
        make_client(model=model).check([request])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    (model / "generation_config.json").write_text('{"repetition_penalty": 2.0')  # no JSON: left out, as by transformers
    make_client(model=model, cache=None).check([request])
