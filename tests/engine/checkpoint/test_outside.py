"""Protects: whatever lies in a model directory is read as transformers reads it, or refused in a line that names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import Engine, EngineError, Job
from engine.checkpoint.description import describe
from engine.checkpoint.tokenizer import load_tokenizer
from engine.errors import CheckpointError

Build = Callable[[str], Path]
POLICY = {"device": "cpu"}


@pytest.fixture
def directory(build: Build, tmp_path: Path) -> Path:
    return Path(shutil.copytree(build("llama"), tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "content", [b'{"eos_token_id": 2, ', b"", b'{"eos_token_id": 2,}', b"\xff\xfe", b"\xef\xbb\xbf{}"]
)
def test_a_generation_config_that_is_no_json_is_left_out(content: bytes, directory: Path) -> None:
    """As `from_pretrained` does; end-of-text comes from config.json then."""
    edit(directory / "config.json", eos_token_id=17)
    (directory / "generation_config.json").write_bytes(content)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.generation_config.eos_token_id == 17
    with Engine.from_pretrained(str(directory), policy=POLICY) as engine:
        assert engine.parts.text.end_of_text == {17}


@pytest.mark.parametrize("content", ['["a"]', "3", '{"cache_implementation": "none such"}', '{"eos_token_id": "601"}'])
def test_a_generation_config_that_cannot_be_meant_is_refused(content: str, directory: Path) -> None:
    (directory / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        Engine.from_pretrained(str(directory), policy=POLICY)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


TOKENIZERS: dict[str, Callable[[Any], Any]] = {
    "a kind of model to come": lambda told: told | {"model": {"type": "ModelUntagged"}},
    "a list": lambda told: [told],
    "merges of numbers": lambda told: told | {"model": told["model"] | {"merges": [1, 2]}},
    "an added token of another shape": lambda told: told | {"added_tokens": [3]},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_of_another_kind_is_refused_with_versions(kind: str, directory: Path) -> None:
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(TOKENIZERS[kind](json.loads(file.read_text()))))
    with pytest.raises(
        CheckpointError, match=r"tokenizer cannot be loaded by transformers 5\..* and tokenizers "
    ) as caught:
        Engine.from_pretrained(str(directory), policy=POLICY)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("change", [{"model_max_length": {}}, {"model_max_length": "long"}])
def test_a_tokenizer_that_cannot_tokenize_is_refused(change: dict[str, Any], directory: Path) -> None:
    edit(directory / "tokenizer_config.json", **change)
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_tokenizer(directory)


def test_code_of_a_directory_never_runs(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where standard input says yes to the question that transformers asks."""
    touched = tmp_path / "touched"
    (directory / "evil.py").write_text(f"open({str(touched)!r}, 'w').close()\nEvil = None\n")
    edit(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    edit(directory / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        Engine.from_pretrained(str(directory), policy=POLICY)
    assert not touched.exists()


def deep(levels: int = 100_000) -> str:
    return "[" * levels + "]" * levels


CONFIGS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "layers as a text": ({"num_hidden_layers": "abc"}, "num_hidden_layers is 'abc'"),
    "no width": ({"hidden_size": 0}, "hidden_size is 0; a whole number of at least 1"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size is 0; a whole number of at least 1"),
    "no layers": ({"num_hidden_layers": None}, "num_hidden_layers is None"),
    "absurd layers": ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; at most 10,000"),
    "absurd experts": ({"num_experts": 10**6}, "num_experts is 1000000; at most 100,000"),
    "an absurd width": ({"hidden_size": 10**15}, "hidden_size is 1000000000000000; at most"),
    "a family as a list": ({"model_type": ["llama"]}, r"model_type is \['llama'\]; a text is expected"),
    "architectures as a number": ({"architectures": 3}, "architectures is 3; a list is expected"),
    "architectures as numbers": ({"architectures": [3]}, r"architectures is \[3\]; names are expected"),
    "dtype as a number": ({"dtype": 16}, "dtype is 16; a text is expected"),
    "a text part as a list": ({"text_config": []}, r"text_config is \[\]; an object is expected"),
    "a kind of rotary table as a list": (
        {"rope_parameters": {"rope_type": ["yarn"], "rope_theta": 10000.0}},
        r"rope_type is \['yarn'\]; a text is expected",
    ),
    "another for a kind of layer": (
        {"rope_parameters": {"full_attention": {"type": {}, "rope_theta": 10000.0}}},
        "type is {}; a text is expected",
    ),
    "quantization as a text": ({"quantization_config": "awq"}, "quantization_config is 'awq'; an object is expected"),
    "nothing": ("", "config.json cannot be read"),
    "a list": ("[1, 2]", r"config.json holds \[1, 2\]; a JSON object is expected"),
    "nested deep": (deep(), "config.json is nested more than 100 levels deep"),
    "nested": ('{"model_type": ' + deep(200) + "}", "config.json is nested more than 100 levels deep"),
    "many digits": ('{"model_type": ' + "9" * 5000 + "}", "config.json cannot be read: a number of 5000 digits"),
    "half a character": ('{"model_type": "\\ud800"}', "no Unicode text"),
    "no UTF-8": ('{"model_type": "\xff"}', "config.json cannot be read"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_cannot_be_meant_is_refused_by_its_field(kind: str, directory: Path) -> None:
    change, expected = CONFIGS[kind]
    file = directory / "config.json"
    if isinstance(change, str):
        file.write_bytes(change.encode("latin-1"))
    else:
        edit(file, **change)
    with pytest.raises(CheckpointError, match=expected) as caught:
        describe(str(directory))
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


UNBUILDABLE: dict[str, dict[str, Any]] = {
    "padding beyond the vocabulary": {"pad_token_id": models.VOCABULARY},
    "no width": {"hidden_size": 0},
    "width as a text": {"hidden_size": "48"},
    "an unknown activation": {"hidden_act": "none such"},
    "heads that do not divide": {"num_attention_heads": 7, "head_dim": None},
    "rope as a text": {"rope_parameters": "yarn"},
}


@pytest.mark.parametrize("kind", UNBUILDABLE)
def test_what_transformers_cannot_build_is_refused_in_a_line(kind: str, directory: Path) -> None:
    edit(directory / "config.json", **UNBUILDABLE[kind])
    with pytest.raises(Exception):  # noqa: B017 - whatever transformers raises
        AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([[1, 2]]))
    with pytest.raises(EngineError) as caught:
        Engine.from_pretrained(str(directory), policy=POLICY)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("told", [{"a": 1}, "many", [], -1])
def test_a_field_that_the_family_does_not_know_means_nothing(told: Any, directory: Path) -> None:
    """Memory is planned by the sizes of mixtures, which a family without experts does not look at."""
    edit(directory / "config.json", num_experts_per_tok=told, ffn_dim=told, n_inner=told)
    prompt = [*range(20, 40)]
    expected = models.reference_logprobs(AutoModelForCausalLM.from_pretrained(directory).eval(), prompt)
    with Engine.from_pretrained(str(directory), policy=POLICY) as engine:
        [done] = engine.run([Job(prompt=prompt, max_new_tokens=0, prompt_logprobs=True)])
    assert done.prompt_logprobs is not None
    assert done.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_padding_beyond_the_vocabulary_is_refused_before_weights_are_read_where_it_cannot_run(directory: Path) -> None:
    edit(directory / "config.json", pad_token_id=models.VOCABULARY)
    with pytest.raises(CheckpointError, match=r"config.json: pad_token_id is 500, and the vocabulary ends at 499"):
        describe(str(directory))


def test_padding_beyond_the_vocabulary_runs_where_transformers_runs(build: Build, tmp_path: Path) -> None:
    path = Path(shutil.copytree(build("gpt2"), tmp_path / "model"))
    edit(path / "config.json", pad_token_id=models.VOCABULARY)
    prompt = [*range(20, 40)]
    expected = models.reference_logprobs(AutoModelForCausalLM.from_pretrained(path).eval(), prompt)
    with Engine.from_pretrained(str(path), policy=POLICY) as engine:
        [done] = engine.run([Job(prompt=prompt, max_new_tokens=0, prompt_logprobs=True)])
    assert done.prompt_logprobs is not None
    assert done.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-4)


NAMES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]


def put_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def put_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def put_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


ODD = {"a pipe": (put_pipe, "is a pipe"), "a directory": (put_directory, "is a directory"), "a loop": (put_loop, "")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_regular_file_is_refused_at_once(kind: str, name: str, directory: Path) -> None:
    put, expected = ODD[kind]
    put(directory / name)
    with pytest.raises(CheckpointError) as caught:
        describe(str(directory))
    assert str(directory / name) in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.txt"])
def test_a_file_of_gigabytes_beside_the_weights_is_refused_before_libraries_read_it(name: str, directory: Path) -> None:
    with (directory / name).open("ab") as stream:
        stream.truncate(3 << 30)
    with pytest.raises(CheckpointError, match=rf"{name} has 3,221,225,472 bytes") as caught:
        describe(str(directory))
    assert str(directory) in str(caught.value)


def test_a_template_beside_others_that_is_a_pipe_is_refused_at_once(directory: Path) -> None:
    file = directory / "additional_chat_templates" / "tool_use.jinja"
    file.parent.mkdir()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match=r"tool_use\.jinja is a pipe"):
        describe(str(directory))


@pytest.mark.parametrize("name", NAMES)
def test_files_that_must_not_be_read_are_told(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another user; `save_pretrained` writes weights that only their owner may read."""
    if os.geteuid():
        (directory / name).chmod(0)
    else:  # whom no permission stops: the system's answer stands in for it
        given = os.open

        def denied(path: Any, *rest: Any, **more: Any) -> int:
            if str(path) == str(directory / name):
                raise PermissionError(13, "Permission denied", str(path))
            return given(path, *rest, **more)

        monkeypatch.setattr(os, "open", denied)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        describe(str(directory))
    assert str(directory / name) in str(caught.value)


def test_a_directory_called_like_weights_does_not_matter(directory: Path) -> None:
    (directory / "x.safetensors").mkdir()
    (directory / "consolidated.bin").mkdir()
    with Engine.from_pretrained(str(directory), policy=POLICY) as engine:
        [done] = engine.run([Job(prompt=[7, 8, 9], max_new_tokens=1)])
    assert done.error is None


ODD_TENSORS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "sparse": (lambda tensor: tensor.to_sparse(), r"layout torch\.sparse_coo"),
    "without numbers": (lambda tensor: tensor.to("meta"), "without numbers"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_a_tensor_that_is_no_plain_one_is_refused_by_name(kind: str, directory: Path) -> None:
    change, expected = ODD_TENSORS[kind]
    name = "model.layers.1.mlp.up_proj.weight"
    state = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    torch.save(state | {name: change(state[name])}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: '{name}' is .*{expected}") as caught:
        Engine.from_pretrained(str(directory), policy=POLICY)
    assert "\n" not in str(caught.value)


HEADERS: dict[str, tuple[str, str]] = {
    "nested deep": (deep(), "nested more than 100 levels"),
    "a list": ("[]", r"it is \[\]"),
    "a number": ('{"a": 3}', "'a' has the dtype None"),
    "an unknown dtype": ('{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', "has the dtype 'F99'"),
    "a shape below zero": ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', r"has the shape \[-1\]"),
    "offsets of texts": ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}', "data_offsets"),
    "huge offsets": (
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99999999999999999999999999]}}',
        "data_offsets",
    ),
    "a shape of other bytes": ('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}', "4 bytes"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_cannot_be_meant_is_refused_by_its_tensor(kind: str, directory: Path) -> None:
    text, expected = HEADERS[kind]
    file = directory / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))
    with pytest.raises(CheckpointError, match=rf"model.safetensors is damaged: .*{expected}"):
        describe(str(directory))


def test_a_file_that_is_too_long_is_not_called_truncated(directory: Path) -> None:
    with (directory / "model.safetensors").open("ab") as stream:
        stream.write(bytes(100))
    with pytest.raises(CheckpointError, match=r"is damaged: [0-9]+ bytes instead of"):
        describe(str(directory))


@pytest.mark.parametrize("model", ["~nosuchuser/x", "./" + "x" * 5000, "a\0b/c", "x" * 300 + "/y", "a b/c"])
def test_names_that_are_no_place_are_told_in_a_line(model: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        describe(model)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
