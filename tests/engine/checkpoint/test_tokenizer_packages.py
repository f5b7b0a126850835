"""Protects: tokenizers without tokenizer.json make the ids of their own libraries, or the missing package is named."""

from __future__ import annotations

import base64
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.checkpoint.side_files import found_side_files
from engine.checkpoint.tokenizer import load_tokenizer
from engine.errors import CheckpointError, InstallationError
from engine.text.decoding import Text
from engine.text.prompt import PromptTokenizer

TEXT = "the thing, isn't it? café\n  12 日本"
CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PIECES = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the", b"in", b"ing", b"is"]
CURES = {
    "tokenizer.model": (b"\n\x0e\n\x05<unk>", "sentencepiece", "SentencePiece", "pip install sentencepiece protobuf"),
    "spiece.model": (b"\n\x0e\n\x05<unk>", "google.protobuf", "SentencePiece", "pip install sentencepiece protobuf"),
    "tiktoken.model": (b"IQ== 0\nIg== 1\n", "tiktoken", "tiktoken", "pip install tiktoken"),
    "tekken.json": (b"{}", "mistral_common", "tekken", "pip install mistral-common"),
}
"""File -> its beginning, the module that is missing, the format, the cure."""


def directory_of(folder: Path, model_type: str = "llama", **told: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("name", list(CURES))
def test_a_package_that_is_missing_is_named_with_its_cure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, module, kind, cure = CURES[name]
    for each in ("sentencepiece", "google.protobuf", "tiktoken", "mistral_common"):
        if each == module or each not in sys.modules:
            monkeypatch.setitem(sys.modules, each, None)  # importing it fails
    folder = directory_of(tmp_path / "model", "mistral")
    (folder / name).write_bytes(content)
    with pytest.raises(InstallationError) as caught:
        load_tokenizer(folder)
    said = str(caught.value)
    assert said.startswith(f"{folder / name} is a tokenizer of {kind}")
    assert said.endswith(f"run `{cure}`")
    assert "\n" not in said


def test_a_damaged_file_is_not_blamed_on_a_package(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    pytest.importorskip("tiktoken")
    folder = directory_of(tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>" * 9)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded by transformers"):
        load_tokenizer(folder)


def sentencepiece_model(folder: Path) -> tuple[Path, Callable[[str], list[int]], int]:
    library = pytest.importorskip("sentencepiece")
    directory_of(folder, tokenizer_class="LlamaTokenizer", legacy=False, bos_token="<s>", add_bos_token=True)
    corpus = folder.parent / "corpus.txt"
    corpus.write_text((Path(random.__file__).parent / "textwrap.py").read_text()[:6_000])
    library.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_whitespace=True,
        minloglevel=2,
    )
    processor = library.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return folder, processor.encode, processor.bos_id()


def tiktoken_model(folder: Path) -> tuple[Path, Callable[[str], list[int]], None]:
    library = pytest.importorskip("tiktoken")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    directory_of(folder)
    ranks = {piece: rank for rank, piece in enumerate(PIECES)}
    lines = (f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks.items())
    (folder / "tokenizer.model").write_text("".join(lines))
    encoding = library.Encoding("own", pat_str=TikTokenConverter().pattern, mergeable_ranks=ranks, special_tokens={})
    return folder, encoding.encode, None


def tekken_model(folder: Path) -> tuple[Path, Callable[[str], list[int]], int]:
    library = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    directory_of(folder, "mistral")
    told = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(PIECES),
            "default_vocab_size": len(PIECES) + 20,
            "default_num_special_tokens": 20,
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(PIECES)
        ],
        "special_tokens": [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(CONTROL)],
    }
    (folder / "tekken.json").write_text(json.dumps(told))
    tokenizer = library.Tekkenizer.from_file(folder / "tekken.json")
    return folder, lambda text: tokenizer.encode(text, bos=False, eos=False), 1


@pytest.mark.parametrize("make", [sentencepiece_model, tiktoken_model, tekken_model])
def test_ids_and_texts_are_those_of_the_formats_own_library(
    make: Callable[[Path], tuple[Path, Callable[[str], list[int]], int | None]], tmp_path: Path
) -> None:
    folder, encode, first = make(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    ids = PromptTokenizer.of(tokenizer).plain(TEXT)
    assert ids == [*([] if first is None else [first]), *encode(TEXT)]
    assert ids == AutoTokenizer.from_pretrained(folder).encode(TEXT)
    text = Text(tokenizer, frozenset())
    assert text.decode(encode(TEXT)) == TEXT
    assert text.tail(ids, 0, 4).endswith(" 日本")
    assert {file.name for file in found_side_files(folder)} > {"config.json", "tokenizer_config.json"}
