"""Fuzz targets of YAML and JSON that users write: policies, hardware profiles, HELM's entries, prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from changes import TEXTS, as_json, as_yaml, changed, mappings, maybe_damaged
from door import Door, check_line
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.policy import Policy, policy_directories

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = Path()
"""The process's scratch directory; set by the caller before the first case."""

PERCENTS = st.sampled_from([0, 20, 50, 80, 100, 100.0, 33.3, -1, 101])
SHARES = st.fixed_dictionaries({}, optional=dict.fromkeys(("gpu", "cpu", "disk"), PERCENTS))
SIZES = st.sampled_from([16, "16GB", "16GiB", "0.5", "9" * 400, "1e3GB", " 7 kb ", 1e300, "-1GB", "१GB"])
FLAGS = st.booleans()
COUNTS = st.integers(-1, 100)
POLICY: dict[str, st.SearchStrategy[Any]] = {
    "gpu-batch-size": COUNTS,
    "num-gpu-batches": COUNTS,
    "percent": st.lists(PERCENTS, min_size=5, max_size=7),
    "weights": SHARES,
    "kv-cache": SHARES,
    "activations": SHARES,
    "pad-to-seq-len": st.sampled_from(["bucket", "Bucket", 512, 1 << 17, (1 << 17) + 1]),
    "compress-weight": st.sampled_from([4, 8, 4.0, "lossless", "Lossless", 16]),
    "compress-cache": st.sampled_from([4, 8, "lossless", "4"]),
    **dict.fromkeys(("cpu-cache-compute", "pin-weight", "overlap", "batch-invariant", "share-prefix"), FLAGS),
    "draft-model": st.sampled_from(["a/b", "", "./x", "\n"]),
    "dtype": st.sampled_from(["auto", "float16", "float8", "bfloat16"]),
    "device": st.sampled_from(["cpu", "cuda", "cuda:1", "all", ["cuda:0", "cuda:1"], ["cpu", "cuda"], "mps", []]),
    "gather-weights": st.sampled_from(["auto", True, False]),
    "gpu-memory": SIZES,
    "cpu-memory": SIZES,
    "offload-dir": st.sampled_from(["/tmp/x", "", "x" * 5000, "~nosuchuser/x", "a\x00b"]),
}


def _policies() -> st.SearchStrategy[bytes]:
    shipped = [yaml.safe_load(file.read_text()) for folder in policy_directories() for file in folder.glob("*.yaml")]
    documents = [each for each in shipped if isinstance(each, dict)]
    drawn = mappings(POLICY) | changed(documents, keys=sorted(POLICY))
    return maybe_damaged(drawn.map(as_yaml)) | st.binary(max_size=200)


def _enter_policy(content: bytes) -> None:
    file = SCRATCH / "policy.yaml"
    file.write_bytes(content)
    policy = Policy.load(file)
    told = Policy.from_mapping(policy.as_mapping())
    assert told == policy, f"{policy} is told as {policy.as_mapping()}, which is {told}"


def _profiles() -> st.SearchStrategy[bytes]:
    from engine.planning.hardware_profile import HardwareProfile

    shipped = [yaml.safe_load(file.read_text()) for file in sorted((ROOT / "configs" / "hardware").glob("*.yaml"))]
    keys = [each.name.replace("_", "-") for each in fields(HardwareProfile)]
    return maybe_damaged(changed(shipped, keys=keys).map(as_yaml))


def _enter_profile(content: bytes) -> None:
    from engine.planning.hardware_profile import HardwareProfile

    file = SCRATCH / "hardware.yaml"
    file.write_bytes(content)
    HardwareProfile.load(file)


ENTRY = {
    "name": "flexgen/tiny",
    "model_name": "local/tiny",
    "tokenizer_name": "local/tiny",
    "max_sequence_length": 512,
    "client_spec": {
        "class_name": "flexgen_helm.client.FlexGenClient",
        "args": {
            "pretrained_model_name_or_path": "/nowhere",
            "policy": "auto",
            "window": 512,
            "apply_chat_template": True,
            "chat_template_kwargs": {"enable_thinking": False},
            "reasoning": {"begin": "<think>", "end": "</think>"},
            "thinking_budget": 100,
            "sampling": "model",
            "top_k": 50,
        },
    },
}
LISTS = [
    {"model_deployments": [ENTRY]},
    {"model_deployments": [ENTRY, {**ENTRY, "name": "flexgen/other"}]},
    {"model_deployments": None},
    {"model_deployments": []},
    {},
]


def _lists() -> st.SearchStrategy[bytes]:
    flow = changed(LISTS).map(
        lambda document: yaml.safe_dump(document, default_flow_style=True).encode("utf-8", "replace")
    )
    return maybe_damaged(changed(LISTS, keys=("model_deployments",)).map(as_yaml) | flow)


def _enter_list(content: bytes) -> None:
    """Old entries must stay beside the new one; if the content is refused, the file must be unchanged."""
    from flexgen_helm.runs.yaml_lists import add_to_yaml_lists

    file = SCRATCH / "model_deployments.yaml"
    file.write_bytes(content)
    try:
        add_to_yaml_lists([(file, "model_deployments", {"name": "flexgen/new", "model_name": "local/new"})])
    except ConfigError:
        assert file.read_bytes() == content, "refused, and written to"
        raise
    finally:
        left = {each.name for each in SCRATCH.iterdir() if each.name.startswith(f".{file.name}")}
        assert not left, f"left behind: {left}"
    before, after = yaml.safe_load(content), yaml.safe_load(file.read_bytes())
    known = (before or {}).get("model_deployments") or []
    assert [repr(each) for each in known] == [repr(each) for each in after["model_deployments"]][-len(known) or 99 :]


def _args() -> st.SearchStrategy[Any]:
    config = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    return changed(
        [{"args": ENTRY["client_spec"]["args"], "generation_config": config}],  # type: ignore[index]
        more=("auto", "none", "model", "entry", "between", "strip"),
    )


def _clients() -> Callable[[Any], None]:
    from model_files import model_directory
    from transformers import AutoTokenizer

    from flexgen_helm.helm.requests.shaping import Shaping
    from flexgen_helm.helm.requests.translate import Translator

    class Wrapped:
        def __init__(self, tokenizer: Any) -> None:
            self._tokenizer = tokenizer

        def __enter__(self) -> Any:
            return self._tokenizer

        def __exit__(self, *_: object) -> None:
            pass

    tokenizer = Wrapped(AutoTokenizer.from_pretrained(model_directory()))

    def enter(told: Any) -> None:
        """Read the args of a deployment as `FlexGenClient` does."""
        args = told.get("args") if isinstance(told, dict) else None
        if not isinstance(args, dict) or not all(isinstance(name, str) for name in args):
            return  # HELM calls no client with this
        Policy.load(args.get("policy"))
        others = ("pretrained_model_name_or_path", "policy", "window")
        shaping = Shaping.of({name: value for name, value in args.items() if name not in others})
        config = told.get("generation_config")
        translator = Translator(
            tokenizer,  # type: ignore[arg-type]
            model="tiny",
            window=512,
            pad_to=None,
            end_of_text_token=None,
            shaping=shaping,
            generation_config=config if isinstance(config, dict) else {},
        )
        assert all(map(str, translator.notes))

    return enter


OWN_LINE = {
    "prompt": "Paris is",
    "id": 7,
    "metadata": {"a": [1]},
    "max_new_tokens": 8,
    "temperature": 0.7,
    "top_k": 3,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["\n"],
    "num_completions": 2,
}
CHAT_LINE = {"messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}], "stop": "."}


def _lines(documents: list[Any], keys: list[str]) -> st.SearchStrategy[str]:
    line = maybe_damaged(changed(documents, keys=keys).map(as_json)).map(lambda each: each.decode("utf-8", "replace"))
    return st.lists(line | st.sampled_from([each for each in TEXTS if each.isascii()]), min_size=1, max_size=3).map(
        "\n".join
    )


def _prompts() -> Callable[[str], None]:
    from argparse import Namespace

    from flexgen_helm.commands.completion.own_format import OwnFormat
    from flexgen_helm.commands.completion.prompts import Settings, from_jsonl

    tokenizer = _tokenizer()

    def enter(text: str) -> None:
        found = from_jsonl(text.split("\n"), "prompts.jsonl", Settings())
        form = OwnFormat(Namespace(chat=False))
        questions, bad = form.questions(found, tokenizer, 600)
        _check_answers(form, questions, bad)

    return enter


def _bodies() -> Callable[[str], None]:
    from argparse import Namespace

    from flexgen_helm.commands.completion.openai_batch import OpenAIFormat, read_batch

    tokenizer = _tokenizer()

    def enter(text: str) -> None:
        found = read_batch(text.split("\n"), "batch.jsonl")
        form = OpenAIFormat(Namespace(model="tiny", served_model_name="tiny", prompts=["x"], input=None), {})
        questions, bad = form.questions(found, tokenizer, 600)
        _check_answers(form, questions, bad)

    return enter


def _check_answers(form: Any, questions: list[Any], bad: list[Any]) -> None:
    """Every line of the answers must be strict JSON in UTF-8, and every refusal one line."""
    import json

    for refused in bad:
        check_line(" ".join(refused.reason.splitlines()) if refused.reason.isprintable() else repr(refused.reason))
        json.dumps(form.refusal(refused), allow_nan=False).encode()
    for question in questions:
        question.key({"weights": "a"}).encode()
        json.dumps(question.asked({}), allow_nan=False).encode()


def _tokenizer() -> Any:
    from model_files import model_directory
    from transformers import AutoTokenizer

    from engine.text.prompt import PromptTokenizer

    return PromptTokenizer.of(AutoTokenizer.from_pretrained(model_directory()), 512)


BODY = {"model": "tiny", "prompt": "Paris", "max_tokens": 4, "temperature": 0.5, "n": 2, "echo": True, "logprobs": 1}
CHAT_BODY = {
    "model": "tiny",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "max_completion_tokens": 4,
    "top_logprobs": 1,
    "logprobs": True,
    "chat_template_kwargs": {"thinking": True},
    "stop": ["x"],
}


def _batch_lines() -> list[Any]:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": BODY}
    tokens = {**line, "custom_id": "2", "body": {**BODY, "prompt": [[1, 2], [3]], "echo": False}}
    return [line, tokens, {**line, "custom_id": "3", "url": "/v1/chat/completions", "body": CHAT_BODY}]


DOORS = [
    Door("policies", _policies, lambda: _enter_policy),
    Door("hardware profiles", _profiles, lambda: _enter_profile),
    Door("HELM's lists of entries", _lists, lambda: _enter_list),
    Door("args of deployments", _args, _clients),
    Door("lines of prompts", lambda: _lines([OWN_LINE, CHAT_LINE], [*OWN_LINE, "messages"]), _prompts),
    Door("lines of OpenAI's batches", lambda: _lines(_batch_lines(), [*BODY, *CHAT_BODY]), _bodies),
]
