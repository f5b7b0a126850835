"""Protects: a GGUF file computes what transformers makes of it, stays packed, and is refused where it says more."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import parity
import pytest
import torch
from ggufs import SENTENCEPIECE, of_sentencepiece, random_blocks, save_gguf, with_last_token
from parity import JOBS, POLICIES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine import Engine, Policy
from engine.checkpoint.adapters.located import locate
from engine.checkpoint.description import describe
from engine.checkpoint.gguf import opened
from engine.checkpoint.gguf.index import GGUF_INDEX, PLAIN
from engine.checkpoint.identity.result import identity_beside_weights
from engine.checkpoint.tokenizer import special_tokens
from engine.errors import EngineError, InstallationError, UnsupportedError
from engine.kernels.packed.ggml_blocks import FORMS
from engine.kernels.packed.matrix import PartForm
from engine.kernels.packed.parameter import PackedParameter
from flexgen_helm.fidelity.reference import find_place


@pytest.mark.parametrize("chunk", [64, 1 << 22])
@pytest.mark.parametrize("kind", FORMS)
def test_blocks_expand_to_the_packages_numbers(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; and with rows that the file has in another order."""
    monkeypatch.setattr("engine.kernels.packed.matrix.CHUNK_ELEMENTS", chunk)
    form, rows = FORMS[kind], 12
    raw = random_blocks(kind, rows, 3)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    blocks = torch.from_numpy(raw).view(rows, 3, -1)
    turned = blocks.unflatten(0, (2, -1, 2)).transpose(1, 2)
    for given, wanted in (
        (blocks, expected),
        (turned, expected.unflatten(0, (2, -1, 2)).transpose(1, 2).reshape(expected.shape)),
    ):
        (name,) = form.names
        matrix = form(expected.shape, {name: PartForm(torch.uint8, given.shape)})
        packed = PackedParameter(matrix, [{name: "a"}])
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = packed.numbers({"a": given}, torch.empty(expected.shape, dtype=dtype))
            assert found.equal(wanted.to(dtype))


FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "4 bits, the embedding as head": (
        "llama",
        "Q4_0",
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "fields": {"attention.head_count_kv": None},  # as many as of queries, where a file does not tell
            "of_tokenizer": {"add_bos_token": True},
        },
    ),
    "8 bits": ("llama", "Q8_0", {}),
    "biases": ("qwen2", "Q4_0", {}),
    "plain numbers": ("qwen2", "BF16", {}),
    "experts": (
        "qwen3-moe",
        "Q8_0",
        {"moe_intermediate_size": 768, "num_hidden_layers": 1, "norm_topk_prob": True},
    ),
}


@pytest.mark.parametrize(
    "name", ["4 bits, the embedding as head", *(pytest.param(n, marks=pytest.mark.slow) for n in [*FILES][1:])]
)
def test_a_file_computes_what_its_model_does(name: str, tmp_path: Path) -> None:
    """The model in safetensors files that it was made of, with the numbers that the file's types can hold."""
    family, kind, changes = FILES[name]
    file = save_gguf(tmp_path / "tiny.gguf", family, kind, **changes)
    own = file.with_suffix("")
    expected = parity.expect(AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32).eval())
    tokenizer = AutoTokenizer.from_pretrained(own)
    first = [tokenizer.bos_token_id] if "of_tokenizer" in changes else []
    for policy in ("thirds", "disk") if name == "8 bits" else ("thirds",):
        settings = {**POLICIES[policy], "device": "cpu", "dtype": "float32", "offload-dir": str(tmp_path / "off")}
        with Engine.from_pretrained(str(file), policy=settings) as engine:
            assert bool(engine.parts.model.packed) == (kind in FORMS)
            assert parity.differences(expected, engine.run(JOBS))[0] == []
            for text in ("preplaces 1739 unfilling\n", "<s>re</s>load <pad>", ""):
                assert engine.tokenizer(text).input_ids == first + tokenizer(text).input_ids


def test_one_directory_is_made_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = save_gguf(tmp_path / "tiny.gguf", "llama", "Q8_0")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "same.gguf").hardlink_to(file)
    made = locate(str(file))
    config = (made.path / "config.json").read_bytes()
    identity = identity_beside_weights(str(file), Policy())
    (made.path / GGUF_INDEX).write_text((made.path / GGUF_INDEX).read_text().replace('"heads": 2', '"heads": 0'))
    assert identity_beside_weights(str(file), Policy()) != identity  # answers with rows in another order are others
    (made.path / GGUF_INDEX).unlink()  # as one that was not made to its end
    assert locate(str(file)) == made
    assert (made.path / "config.json").read_bytes() == config
    named = locate(str(tmp_path / "alone"))
    assert named.path != made.path
    assert (named.path / "config.json").read_bytes() == config
    os.utime(file, (1, 1))
    assert locate(str(file)).path != made.path
    (tmp_path / "alone" / "other.gguf").hardlink_to(file)
    with pytest.raises(EngineError, match=r"2 GGUF files, other\.gguf and same\.gguf"):
        locate(str(tmp_path / "alone"))
    file.unlink()
    (tmp_path / "alone" / "other.gguf").unlink()
    locate(str(tmp_path / "alone"))
    assert not made.path.exists()  # what is made of files that are gone goes when another one is made


def test_what_another_process_has_made_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = save_gguf(tmp_path / "tiny.gguf", "llama", "Q8_0")
    write, inside, made = opened._write, [True], []

    def slow(*args: Any) -> None:
        if inside and inside.pop():
            path = locate(str(file)).path
            made.append((path, path.stat().st_ino))
        write(*args)

    monkeypatch.setattr(opened, "_write", slow)
    path = locate(str(file)).path
    assert [(path, path.stat().st_ino)] == made


def test_an_adapter_with_a_file_beside_is_an_adapter(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "llama", "Q8_0")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert opened.gguf_file(str(tmp_path)) is None


def test_a_tokenizer_beside_the_file_is_taken(build: Callable[[str], Path], tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "llama", "Q8_0", pre="smollm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((build("llama") / name).read_bytes())
    made = locate(str(tmp_path))
    assert (made.path / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert made.tokenizer == str(made.path)


def test_what_a_file_says_of_first_and_last_tokens_holds(tmp_path: Path) -> None:
    """Computed by hand: a piece of a text begins with a space, and a text with its first token."""
    ends = {"eot_token_id": SENTENCEPIECE.index("b"), "eom_token_id": SENTENCEPIECE.index("</s>")}
    file = save_gguf(tmp_path / "tiny.gguf", "llama", "Q8_0", of_tokenizer={**of_sentencepiece(), **ends})
    path = locate(str(file)).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    pieces = ["<s>", "\u2581a", "b", "\u2581", "b", "</s>"]
    assert tokenizer("ab b</s>").input_ids == [SENTENCEPIECE.index(piece) for piece in pieces]
    expected = [SENTENCEPIECE.index("</s>"), SENTENCEPIECE.index("b")]
    assert special_tokens(path, AutoConfig.from_pretrained(path), tokenizer).end_of_text == expected


def test_numbers_of_one_type_stay_in_it(tmp_path: Path) -> None:
    for kind, dtype in PLAIN.items():
        file = save_gguf(tmp_path / f"{kind}.gguf", "qwen2", kind)
        description = describe(str(file))
        assert description.dtype == dtype
        with pytest.raises(UnsupportedError, match="it is a GGUF file"):  # `verify` compares it layer by layer
            find_place(description, Policy.load({"device": "cpu"}))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


REFUSED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "a type": (lambda file: save_gguf(file, "llama", "Q5_0"), ("output.weight is of the type Q5_0", "Q8_0, Q4_0")),
    "plain rows in another order": (lambda file: save_gguf(file, "llama", "F16"), (".weight is of the type F16",)),
    "a field": (
        lambda file: save_gguf(file, "llama", "Q8_0", fields={"rope.scaling.type": "yarn"}),
        ("does not look at llama.rope.scaling.type, which is 'yarn'",),
    ),
    "heads of another size": (
        lambda file: save_gguf(file, "qwen2", "Q8_0", fields={"attention.key_length": 32}),
        ("qwen2.attention.key_length, which is 32, and takes 16 for it",),
    ),
    "a tensor": (
        lambda file: save_gguf(file, "llama", "Q8_0", more={"rope_freqs.weight": torch.ones(8)}),
        ("holds 'rope_freqs.weight', which transformers does not read",),
    ),
    "changed numbers": (
        lambda file: save_gguf(file, "gemma2", "Q8_0", sliding_window=4096),
        ("changes the numbers of", "norm.weight"),
    ),
    "an architecture": (
        lambda file: save_gguf(file, "llama", "Q8_0", fields={"general.architecture": "chameleon"}),
        ("of the architecture 'chameleon', which transformers",),
    ),
    "first token not told": (
        lambda file: save_gguf(file, "llama", "Q8_0", pre="tekken"),
        ("whether a text begins with a special token (tokenizer.ggml.add_bos_token)",),
    ),
    "whole words": (
        lambda file: save_gguf(file, "llama", "Q8_0", pre="llama-bpe", of_tokenizer={"merges": ["r e"]}),
        ("does not make its token", "of that word"),
    ),
    "a special token out of the byte alphabet": (
        lambda file: save_gguf(
            file, "llama", "Q8_0", of_tokenizer=with_last_token("<\uff5cend\uff5c>", gguf.TokenType.CONTROL)
        ),
        ("its special token '<\uff5cend\uff5c>' has the id 499",),
    ),
    "a token of the user out of it": (
        lambda file: save_gguf(file, "llama", "Q8_0", of_tokenizer=with_last_token("a b", gguf.TokenType.USER_DEFINED)),
        ("its special token 'a b' has the id 499",),
    ),
    "no end of text": (
        lambda file: save_gguf(file, "llama", "Q8_0", of_tokenizer={"eos_token_id": None}),
        ("does not say which token ends a text",),
    ),
    "no space before a text": (
        lambda file: save_gguf(file, "llama", "Q8_0", of_tokenizer={**of_sentencepiece(), "add_space_prefix": False}),
        ("tokenizer.ggml.add_space_prefix is False",),
    ),
    "a way to split texts": (
        lambda file: save_gguf(file, "llama", "Q8_0", pre="smollm"),
        ("the way 'smollm' (tokenizer.ggml.pre)", "put the tokenizer.json"),
    ),
    "a file cut off": (lambda file: cut(save_gguf(file, "llama", "Q8_0")), ("cannot be read as a GGUF file",)),
    "another file": (lambda file: file.write_bytes(b"\x80\x02garbage"), ("is no GGUF file",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_says_more_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, parts = REFUSED[name]
    file = tmp_path / "tiny.gguf"
    make(file)
    with pytest.raises(EngineError) as caught:
        Engine.from_pretrained(str(file), policy={"device": "cpu"})
    assert "\n" not in str(caught.value)
    assert [part for part in (str(file), *parts) if part not in str(caught.value)] == []


def test_the_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_gguf(tmp_path / "tiny.gguf", "llama", "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InstallationError, match=r"run `pip install gguf`"):
        locate(str(file))
