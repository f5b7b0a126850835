"""Cache keys hold all that can change a result, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from helm.common.key_value_store import request_to_key
from helm.common.request import Request

REQUEST = Request(model="local/tiny", prompt="Who?", temperature=0.5, max_tokens=5, stop_sequences=["\n"])


def key(client: Any, request: Request = REQUEST) -> str:
    translator = client._translator
    key = translator.key(request, translator.render(request))
    return request_to_key({**key, "identity": client._served.identity})


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "Who is it?"},
        {"temperature": 0.6},
        {"num_completions": 2},
        {"max_tokens": 6},
        {"stop_sequences": ["\n", "###"]},
        {"echo_prompt": True},
        {"top_p": 0.9},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"random": "1"},
    ],
)
def test_what_is_asked_is_in_the_key(make_client: Callable[..., Any], change: dict[str, Any]) -> None:
    assert key(make_client(), replace(REQUEST, **change)) != key(make_client())


def test_what_changes_nothing_is_not_in_the_key(make_client: Callable[..., Any]) -> None:
    same = replace(REQUEST, top_k_per_token=5, model_deployment="elsewhere/tiny", model="other/name", top_p=1.0)
    assert key(make_client(), same) == key(make_client())
    assert key(make_client(), replace(REQUEST, temperature=1)) == key(make_client(), replace(REQUEST, temperature=1.0))


@pytest.mark.parametrize(
    "args",
    [
        {"policy": {"dtype": "float16"}},
        {"policy": {"compress-weight": 4}},
        {"policy": {"compress-weight": 8}},
        {"policy": {"compress-cache": 8}},
        {"policy": {"batch-invariant": True}},
        {"top_k": 5},
        {"end_of_text_token": None},
    ],
)
def test_what_of_the_deployment_can_change_a_result_is_in_the_key(
    make_client: Callable[..., Any], args: dict[str, Any]
) -> None:
    assert key(make_client(policy={"device": "cpu"})) != key(make_client(**{"policy": {"device": "cpu"}, **args}))


@pytest.mark.parametrize(
    "policy",
    [
        {"percent": [20, 80, 0, 100, 0, 100]},
        {"gpu-batch-size": 3, "num-gpu-batches": 2},
        {"pad-to-seq-len": "bucket"},
        {"pad-to-seq-len": 400},
        {"dtype": "float32"},
        {"compress-weight": "lossless"},
        {"gpu-memory": "1GB", "cpu-memory": "2GB"},
        {"share-prefix": False, "overlap": False, "pin-weight": False},
    ],
)
def test_a_run_resumes_under_another_policy(make_client: Callable[..., Any], policy: dict[str, Any]) -> None:
    assert key(make_client(policy={"device": "cpu"})) == key(make_client(policy={"device": "cpu", **policy}))


def test_results_follow_the_model_wherever_it_is_moved(
    make_client: Callable[..., Any], fake_engines: list[FakeEngine], tiny_llama: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_llama, tmp_path / "moved")
    assert key(make_client(model=moved)) == key(make_client())


def test_other_weights_or_another_tokenizer_are_another_model(
    make_client: Callable[..., Any], tiny_llama: Path, tiny_llama_with_bos: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    other = shutil.copytree(tiny_llama, tmp_path / "other")
    model = LlamaForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    model.save_pretrained(other)
    assert key(make_client(model=other)) != key(make_client())
    # HELM's tokenizer alone differs: the deployment names another one than the model's own
    with_bos = make_client(model=tiny_llama_with_bos, pretrained_model_name_or_path=str(tiny_llama))
    assert key(with_bos) != key(make_client())


def test_the_chat_template_is_in_the_key_where_it_is_applied(make_client: Callable[..., Any], tiny_chat: Path) -> None:
    applied, left = make_client(model=tiny_chat), make_client(model=tiny_chat, apply_chat_template=False)
    assert key(applied) != key(left)
    rendered = applied._translator.render(REQUEST)  # the same text, but not because of the template
    assert key(left, replace(REQUEST, prompt=rendered)) != key(applied)


def test_truncation_left_over_in_the_tokenizer_is_not_in_the_key(tiny_llama: Path) -> None:
    from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

    from flexgen_helm.helm.requests.tokenizer import tokenizer_digests

    untouched, used = (HuggingFaceTokenizer.create_tokenizer(str(tiny_llama)) for _ in range(2))
    with used as tokenizer:
        tokenizer.encode("a long text", truncation=True, max_length=2)
    assert tokenizer_digests(used) == tokenizer_digests(untouched)
