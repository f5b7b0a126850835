"""Answers in HELM's cache are found while nothing that they depend on has changed, else asked again, once."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from helm.common.cache import SqliteCacheConfig
from helm.common.request import Request

from engine.checkpoint.identity import modelling_source, weight_digest
from engine.checkpoint.identity.result import sampled_identity
from engine.checkpoint.safetensors_header import read_safetensors_header
from flexgen_helm.helm import engines as engines_module
from flexgen_helm.helm.engines import engines
from flexgen_helm.helm.request_cache import RequestCache

Clients = Callable[..., Any]
ASKED = [
    Request(model="local/tiny", prompt=f"number {n}", temperature=0.0, max_tokens=3, echo_prompt=n == 2)
    for n in range(3)
]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def run(make_client: Clients, model: Path, **args: Any) -> tuple[int, list[str], Any]:
    """A run of its own: how many requests the cache answered, what is told of it, and the completions."""
    engines.close()
    client = make_client(model=model, **args)
    results = client.make_requests(ASKED)
    assert all(result.success for result in results)
    told = [note for note in client.notes if "HELM's cache" in note or "earlier release" in note]
    return sum(result.cached for result in results), told, [result.completions for result in results]


def change_last_row(model: Path) -> None:
    """Of the embedding: a sample of each tensor does not have it."""
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    content[data + read_safetensors_header(file)["model.embed_tokens.weight"]["data_offsets"][1] - 1] ^= 1
    file.write_bytes(content)


def keys_of(path: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(path) as connection:
        return [json.loads(name) for (name,) in connection.execute("SELECT key FROM unnamed ORDER BY key")]


def test_changed_weights_are_asked_again_once_and_both_digests_are_told(
    make_client: Clients, fake_engines: list[FakeEngine], model: Path
) -> None:
    assert run(make_client, model)[:2] == (0, [])
    before = make_client(model=model)._served.identity["weights"]
    assert run(make_client, model)[:2] == (3, [])
    os.utime(model / "model.safetensors")
    assert run(make_client, model)[:2] == (3, [])
    change_last_row(model)
    found, (told,), _ = run(make_client, model)
    after = make_client(model=model)._served.identity["weights"]
    assert found == 0
    assert f"computed again, once, because of other weights (sha256 {before[:12]} then, {after[:12]} now)" in told
    assert run(make_client, model)[:2] == (3, [])
    change_last_row(model)  # as they were
    assert run(make_client, model)[:2] == (3, [])


def test_one_request_by_itself_is_looked_up_in_the_same_way(
    make_client: Clients, fake_engines: list[FakeEngine], model: Path
) -> None:
    completions = run(make_client, model)[2]
    engines.close()
    alone = make_client(model=model).make_request(ASKED[1])
    assert (alone.cached, alone.completions) == (True, completions[1])
    change_last_row(model)
    engines.close()
    client = make_client(model=model)
    assert not client.make_request(ASKED[1]).cached
    assert client.make_request(ASKED[1]).cached
    assert sum("other weights" in note for note in client.notes) == 1


def test_changed_source_of_the_family_is_asked_again_once(
    make_client: Clients, fake_engines: list[FakeEngine], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_client, model)
    real, package = modelling_source._package(), tmp_path / "transformers"
    for file in modelling_source.source_files({"model_type": "llama"}).values():
        (package / file.relative_to(real)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, package / file.relative_to(real))
    monkeypatch.setattr(modelling_source, "_package", lambda: package)
    assert run(make_client, model)[:2] == (3, [])
    with (package / "models" / "llama" / "modeling_llama.py").open("a") as stream:
        stream.write("\n# mended\n")
    found, (told,), _ = run(make_client, model)
    assert found == 0
    assert "because of other transformers' source of the family (sha256 " in told
    assert run(make_client, model)[:2] == (3, [])


def test_answers_under_another_dtype_are_no_outdated_ones(
    make_client: Clients, fake_engines: list[FakeEngine], model: Path
) -> None:
    run(make_client, model, policy={"device": "cpu"})
    assert run(make_client, model, policy={"device": "cpu", "dtype": "bfloat16"})[:2] == (0, [])


def test_answers_without_batch_invariant_arithmetic_are_no_outdated_ones(
    make_client: Clients, fake_engines: list[FakeEngine], model: Path
) -> None:
    for expected in (0, 3):
        for switch in (False, True):
            policy = {"device": "cpu", "batch-invariant": switch}
            assert run(make_client, model, policy=policy)[:2] == (expected, [])


def test_weights_are_read_for_their_digest_only_where_there_is_something_to_find(
    make_client: Clients, fake_engines: list[FakeEngine], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a first start the engine reads them anyway: nobody waits for it before it is asked."""
    told: list[str] = []
    digest, sweeps = weight_digest.weights_digest, FakeEngine.sweeps

    def digesting(*args: Any) -> str:
        told.append("digest")
        return digest(*args)

    def sweeping(self: FakeEngine, jobs: Any) -> Any:
        told.append("sweeps")
        return sweeps(self, jobs)

    monkeypatch.setattr(engines_module, "weights_digest", digesting)
    monkeypatch.setattr(FakeEngine, "sweeps", sweeping)
    for expected in (["sweeps", "digest"], ["digest"]):  # a request that is not in the cache, and one that is
        told.clear()
        engines.close()
        make_client(model=model).make_requests(ASKED[:1])
        assert told == expected
    told.clear()
    engines.close()
    make_client(model=model).make_requests(ASKED[1:2])  # the cache holds others of this model
    assert told == ["sweeps", "digest"]
    told.clear()
    engines.close()
    make_client(model=model, cache=None).make_requests(ASKED)
    assert told[0] == "sweeps"


# Earlier releases


def as_an_earlier_release(make_client: Clients, model: Path, cache: Path, asked_at: float) -> None:
    """Rewrite a cache with the keys of an earlier release, as it would have at `asked_at`, seconds since the Epoch."""
    client = make_client(model=model)
    config = SqliteCacheConfig(str(cache))
    with RequestCache(config) as opened:
        kept = [(key, opened.get(key)) for key in keys_of(cache)]
    cache.unlink()
    earlier = sampled_identity(str(model), client.policy)
    assert set(earlier) == {"weights", "dtype", "compress_weight", "compress_cache", "numerics"}
    with RequestCache(config) as opened:
        opened.put(
            (
                {**client._translator.earlier_key(key), "identity": earlier},
                {**(response or {}), "request_datetime": int(asked_at)},
            )
            for key, response in kept
        )


def test_answers_of_an_earlier_release_are_used_if_nothing_was_written_to_since(
    make_client: Clients, fake_engines: list[FakeEngine], model: Path, tmp_path: Path
) -> None:
    completions = run(make_client, model)[2]
    as_an_earlier_release(make_client, model, tmp_path / "cache.sqlite", time.time() + 60)
    found, (told,), again = run(make_client, model)
    assert (found, again) == (3, completions)
    assert "answers that an earlier release kept in HELM's cache are used" in told
    os.utime(model / "model.safetensors")  # they are known by the whole digest from now on
    assert run(make_client, model) == (3, [], completions)
    set_asked_at(tmp_path / "cache.sqlite", time.time() - 120)
    change_last_row(model)
    found, (told,), _ = run(make_client, model)
    assert found == 0
    assert "because of other weights (sha256 " in told


@pytest.mark.parametrize("how", ["written to since", "other weights", "last row"])
def test_answers_of_an_earlier_release_that_may_be_of_something_else_are_asked_again_once(
    how: str, make_client: Clients, fake_engines: list[FakeEngine], model: Path, tmp_path: Path
) -> None:
    run(make_client, model)
    asked_at = time.time() + (-3600 if how == "written to since" else 60)
    as_an_earlier_release(make_client, model, tmp_path / "cache.sqlite", asked_at)
    if how == "other weights":
        header = 8 + int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")
        content = bytearray((model / "model.safetensors").read_bytes())
        content[header] ^= 1
        (model / "model.safetensors").write_bytes(content)
    elif how == "last row":  # which the earlier release's sample of the weights misses
        before = sampled_identity(str(model), make_client(model=model).policy)
        change_last_row(model)
        assert sampled_identity(str(model), make_client(model=model).policy) == before
        set_asked_at(tmp_path / "cache.sqlite", time.time() - 120)  # the change came after the answers
    found, (told,), _ = run(make_client, model)
    assert found == 0
    assert "requests that an earlier release answered are computed again, once" in told
    assert run(make_client, model)[:2] == (3, [])


def set_asked_at(cache: Path, asked_at: float) -> None:
    """Set when the answers in a cache were asked for."""
    config = SqliteCacheConfig(str(cache))
    with RequestCache(config) as opened:
        kept = [(key, opened.get(key)) for key in keys_of(cache)]
        opened.put((key, {**(response or {}), "request_datetime": int(asked_at)}) for key, response in kept)


# The cache's file


def test_heads_of_keys_are_found_among_many_and_odd_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(number: int, weights: str, **more: Any) -> dict[str, Any]:
        common = {"chat_template": None, "client": "ours", "prompt": f"a {number}", "identity": {"weights": weights}}
        return {**common, "echo_prompt": number % 2 == 0, **more}

    many = [key(number, weights) for number in range(300) for weights in ("one", "two", 'th"ree')]
    odd = [
        {"engine": "other", "prompt": "x"},
        {"chat_template": "x", "client": "theirs", "identity": {"weights": "no"}, "prompt": ""},
        {"chat_template": "x", "client": "ours", "identity": "no mapping", "prompt": ""},
        {
            "chat_template": {"default": "ä", "tool": "\u2028"},
            "client": "ours",
            "identity": {"weights": "four"},
            "z": 1,
        },
    ]
    with RequestCache(SqliteCacheConfig(str(tmp_path / "cache.sqlite"))) as cache:
        assert cache.heads("ours") == []
        cache.put((each, {"completions": []}) for each in [*many, *odd])
        cache._sql.execute("INSERT INTO unnamed VALUES ('{\"chat_template\": no JSON', x'00')")
        cache._sql.execute("INSERT INTO unnamed VALUES (x'ff', x'00')")
        heads = cache.heads("ours")
        assert heads is not None
        asked = cache._sql.total_changes
        found = [json.dumps(head, sort_keys=True) for head in heads]
        expected = {
            json.dumps({name: value for name, value in each.items() if name <= "identity"}, sort_keys=True)
            for each in [*many, odd[3]]
        }
        assert sorted(found) == sorted(expected)
        assert cache._sql.total_changes == asked
