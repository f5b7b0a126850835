"""Protects: a deployment may lower or raise its model's window, as far as its positions reach, and says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine
from helm.common.request import Request

from engine.errors import ConfigError
from flexgen_helm.runs.models import Models, our_deployment
from flexgen_helm.runs.registration import entries_for, register_in_process

Clients = Callable[..., Any]


@pytest.fixture(autouse=True)
def closed_engines() -> Iterator[None]:
    yield
    from flexgen_helm.helm.engines import engines

    engines.close()


def scoring(text: str) -> Request:
    return Request(model="local/tiny", prompt=text, temperature=0.0, max_tokens=0, echo_prompt=True)


def short(model: Path, to: Path) -> Path:
    """The model with a window of 32 by its files."""
    shutil.copytree(model, to)
    content = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**content, "max_position_embeddings": 32}))
    return to


def test_rotary_positions_go_on_as_transformers_computes_them(
    make_client: Clients, tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = short(tiny_llama, tmp_path / "short")
    text = "a b c d " * 12
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    assert len(ids) > 32
    refused = make_client(model=model).make_request(scoring(text))
    assert not refused.success
    assert "more than the 32" in refused.error
    client = make_client(model=model, window=100)
    (completion,) = client.make_request(scoring(text)).completions
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    assert [token.logprob for token in completion.tokens] == pytest.approx([0.0, *expected], abs=1e-4)
    assert any("up to 100 positions" in note and "in place of 32" in note for note in client.notes)


def test_learned_positions_end_with_their_table(make_client: Clients, tiny_opt: Path) -> None:
    result = make_client(model=tiny_opt, window=513).make_request(scoring("a"))
    assert not result.success
    assert "window 513" in result.error
    assert "more than 512" in result.error


@pytest.mark.parametrize("window", [0, -1, True, "512", 1.5])
def test_what_is_no_window(make_client: Clients, tiny_llama: Path, window: Any) -> None:
    result = make_client(window=window).make_request(scoring("a"))
    assert not result.success
    assert "is not a number of at least 1" in result.error


def test_a_lower_window_is_the_engines(make_client: Clients, fake_engines: list[FakeEngine]) -> None:
    client = make_client(window=20)
    assert client._served.description.window == 20
    client.make_request(Request(model="local/tiny", prompt="a b", temperature=0.0, max_tokens=100))
    ((job,),) = fake_engines[0].calls
    assert len(job.prompt) + job.max_new_tokens - 1 == 20
    assert make_client()._served is not client._served


def test_the_longest_sequence_may_be_raised_as_far_as_positions_reach(
    tiny_llama: Path, tiny_opt: Path, tmp_path: Path
) -> None:
    deployment = entries_for(str(short(tiny_llama, tmp_path / "short")), max_sequence_length=700).deployment
    assert (deployment.max_sequence_length, deployment.client_spec.args["window"]) == (700, 700)
    lower = entries_for(str(tmp_path / "short"), max_sequence_length=20).deployment
    assert lower.max_sequence_length == 20
    assert "window" not in lower.client_spec.args  # answers are the same, so caches stay valid
    with pytest.raises(ConfigError, match=r"513 of .* can be 512 at most.*give 512 or less"):
        entries_for(str(tiny_opt), max_sequence_length=513)


def test_a_registered_window_is_raised_again_or_kept(tiny_llama: Path, tmp_path: Path) -> None:
    model = short(tiny_llama, tmp_path / "short")
    for asked, window in ((100, 100), (50, 100), (300, 300)):
        register_in_process(entries_for(str(model), name="win/dow", max_sequence_length=100))
        Models(policy=None, max_sequence_length=asked).target("win/dow")
        found = our_deployment("win/dow")
        assert found is not None
        assert (found.max_sequence_length, found.client_spec.args["window"]) == (asked, window)


def test_padding_beyond_the_window_is_refused_before_anything_is_prepared(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="pad-to-seq-len 100000 is more than the model's window of 512"):
        entries_for(str(tiny_llama), policy={"pad-to-seq-len": 100_000})
    register_in_process(entries_for(str(tiny_llama), name="pad/ded"))
    refused = Models(policy={"pad-to-seq-len": 513})
    refused.target("pad/ded")
    with pytest.raises(ConfigError, match="pad-to-seq-len 513 is more than the model's window of 512"):
        raise next(refused.problems())
