"""Protects: what fuzzing found in files of models, each kind by the case that showed it."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from engine.checkpoint.config import load_family_config
from engine.checkpoint.gguf.header import check_header
from engine.checkpoint.side_files import check_side_files
from engine.checkpoint.tokenizer import load_tokenizer
from engine.errors import CheckpointError, EngineError, JobError, UnsupportedError
from engine.text import template
from engine.text.prompt import PromptTokenizer
from engine.text.template import check_template_ends


def backtracking() -> PreTrainedTokenizerFast:
    """A tokenizer whose pattern its library gives up at, for texts of a few letters."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    from tokenizers import Regex

    tokenizer.normalizer = normalizers.Replace(Regex("(a|a|aa)+$"), "b")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_prompt_that_the_tokenizers_library_gives_up_at_fails_alone() -> None:
    """It raises what is no `Exception`."""
    prompts = PromptTokenizer.of(backtracking())
    with pytest.raises(JobError, match=r"the prompt cannot be tokenized: .*gives up"):
        prompts.plain("a" * 60 + " b")
    assert prompts.plain("c") == [1]


def test_a_tokenizer_that_the_library_gives_up_at_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backtracking().save_pretrained(tmp_path)

    def encode(self: Any, *_: Any, **__: Any) -> Any:
        return self._tokenizer.encode("a" * 60 + " b").ids

    monkeypatch.setattr(PreTrainedTokenizerFast, "encode", encode)
    with pytest.raises(CheckpointError, match=r"its tokenizer cannot be loaded .*gives up"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["\x1b[31m", "a b", "", "é"])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
def test_fields_of_tokens_that_the_library_would_print_are_refused(name: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    told: dict[str, Any] = {"added_tokens_decoder": {"0": {"content": "<s>", "lstrip": False, "__type": "AddedToken"}}}
    (tmp_path / where).write_text(json.dumps(told))
    check_side_files(tmp_path)
    told["added_tokens_decoder"]["0"][name] = True
    (tmp_path / where).write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="a token has the field") as caught:
        check_side_files(tmp_path)
    assert str(caught.value).isprintable()


def test_a_part_that_the_family_does_not_have_is_told(tmp_path: Path) -> None:
    config = {"model_type": "mamba2", "text_config": {"vocab_size": 500}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json .*has no text_config"):
        load_family_config(tmp_path)


TEMPLATES = {
    "one step": "{% set a = 'x' * (99999 * 99999) %}",
    "by doubling": "{% set n = namespace(x='x' * 999) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a list": "{% set a = range(99999) | list * 99999 %}",
    "padding": "{{ 'x'.center(9999999999) }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_template_that_takes_all_memory_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MOST_BYTES", 1 << 28)
    tokenizer = backtracking()
    tokenizer.chat_template = TEMPLATES[kind]
    with pytest.raises(CheckpointError, match="takes more than 268,435,456 bytes of memory"):
        check_template_ends(tokenizer)


def test_templates_that_are_checked_at_once_leave_no_limit_behind() -> None:
    before, meet = resource.getrlimit(resource.RLIMIT_DATA), threading.Barrier(2)

    def look(waits_s: float) -> None:
        meet.wait()
        time.sleep(waits_s)
        with template._little_memory():
            time.sleep(0.1)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(look, (0.0, 0.05)))
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_chat_template_that_writes_without_end_is_refused() -> None:
    """Its text would be tokenized, which takes some hundred bytes a character."""
    tokenizer = backtracking()
    tokenizer.chat_template = "{{ 'x'.center(1000001) }}"
    with pytest.raises(CheckpointError, match="writes 1,000,001 characters for 1 messages"):
        PromptTokenizer.of(tokenizer).chat([{"role": "user", "content": "a"}])
    tokenizer.chat_template = "{{ 'c'.center(messages[0]['content'] | length) }}"
    prompts = PromptTokenizer.of(tokenizer, 16)
    with pytest.raises(JobError, match="200,000 characters, more than 100,000"):
        prompts.rendered(" " * 200_000)
    assert prompts.chat([{"role": "user", "content": "a"}]) == [1]


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def header(*, version: int = 3, tensors: int = 0, fields: int = 1, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


MANY = 1 << 60
GGUFS: dict[str, tuple[bytes, type[EngineError], str]] = {
    "numbers without end": (
        header(rest=text(b"a") + struct.pack("<IIQ", 9, 4, MANY)),
        CheckpointError,
        r"describes 4,611,686,018,427,387,904 bytes at byte 49, after which there are 0 bytes",
    ),
    "texts without end": (
        header(rest=text(b"a") + struct.pack("<IIQ", 9, 8, MANY)),
        CheckpointError,
        "values of an array at byte",
    ),
    "lists in lists": (
        header(rest=text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50),
        CheckpointError,
        "nested more than 4 deep",
    ),
    "fields without end": (header(fields=MANY), CheckpointError, "fields at byte 24"),
    "tensors without end": (header(fields=0, tensors=MANY), CheckpointError, "tensors at byte 24"),
    "a text without end": (header(rest=struct.pack("<QI", MANY, 0) + bytes(8)), CheckpointError, "bytes at byte 32"),
    "a kind that there is not": (
        header(rest=text(b"a") + struct.pack("<II", 99, 0)),
        CheckpointError,
        "of the kind 99",
    ),
    "many dimensions": (
        header(fields=0, tensors=1, rest=text(b"a") + struct.pack("<I", 1 << 31) + bytes(64)),
        CheckpointError,
        "a tensor of 2147483648 dimensions",
    ),
    "nothing": (b"", CheckpointError, "it is empty"),
    "the beginning": (b"GGUF\x03", CheckpointError, "bytes at byte 4"),
    "another version": (header(version=7), UnsupportedError, "version 7"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedError, "big-endian"),
}


@pytest.mark.parametrize("kind", GGUFS)
def test_a_gguf_header_that_counts_what_is_not_there_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    content, error, told = GGUFS[kind]
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(error, match=told) as caught:
        check_header(file, file)
    assert str(caught.value).isprintable()


def test_a_whole_gguf_header_is_taken(tmp_path: Path) -> None:
    """One that the gguf package itself writes."""
    import gguf
    import numpy as np

    file = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_array("a", ["x", "é"])
    writer.add_array("b", [1.5, 2.5])
    writer.add_bool("c", True)
    writer.add_tensor("d", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_header(file, file)
    cut = tmp_path / "cut.gguf"
    shutil.copy(file, cut)
    begin = file.read_bytes().index(b"d\x02\x00\x00\x00")
    cut.write_bytes(file.read_bytes()[: begin + 10])
    with pytest.raises(CheckpointError, match="is damaged"):
        check_header(cut, cut)
