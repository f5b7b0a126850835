"""Checks the tokenizer that transformers makes from a GGUF file against the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UnsupportedError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED = 3, 4
"""ggml's types of tokens that are matched wherever they occur in a text."""
_PLAIN_SPLITS = ("gpt-2", "qwen2", "deepseek-r1-qwen")
"""Pre-tokenizers for which llama.cpp adds no first token by default, and splits whole words by their merges."""
_CURE = (
    "put the tokenizer.json of the model it was made of into its directory, where no other GGUF file is, or take the "
    "model's checkpoint in safetensors files"
)


def ends_of_text(told: Mapping[str, Any]) -> list[int]:
    """The ids of the tokens that end a text, a turn or a message, by the file's metadata `told`, without duplicates."""
    found = (told.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(int(index) for index in found if index is not None))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, told: Mapping[str, Any], file: Path) -> None:
    """Raise `UnsupportedError`, which names `file`, where a tokenizer differs from the file's metadata `told`.

    It compares pre-tokenization, special tokens, first and last tokens of a text, and the space before a text.
    """
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in told.items()}
    for problem in (
        _split_problem(tokenizer, fields),
        _special_problem(tokenizer, fields),
        _whole_word_problem(tokenizer, fields),
        _added_problem(tokenizer, fields),
        _space_problem(tokenizer, fields),
    ):
        if problem is not None:
            raise UnsupportedError(f"{file}: {problem}; {_CURE}")


def _split_problem(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> str | None:
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    if fields.get("model") != "gpt2":
        return None
    split, known = fields.get("pre"), mapping.GGUF_PRE_TOKENIZER_SPLITS
    told = f"its tokenizer splits texts in the way {shown(split)} (tokenizer.ggml.pre), which transformers"
    if split not in {*known, "gpt-2"}:
        return f"{told} does not know"
    made = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    steps = made.get("pretokenizers", [made])
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    by_default = [step for step in steps if step["type"] == "ByteLevel" and step["use_regex"]]  # GPT-2's
    if patterns != ([known[split]] if split in known else []) or bool(by_default) != (split not in known):
        return f"{told} does in another way for its architecture"
    return None


def _special_problem(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> str | None:
    tokens = fields["tokens"]
    if fields.get("eos_token_id") is None:
        return "it does not say which token ends a text (tokenizer.ggml.eos_token_id)"
    if len(tokenizer) > len(tokens):
        return f"transformers' tokenizer of it has {len(tokenizer):,} tokens, and the file {len(tokens):,}"
    for name in ("eos", "bos"):
        wanted, found = fields.get(f"{name}_token_id"), getattr(tokenizer, f"{name}_token_id")
        if wanted != found:
            return f"tokenizer.ggml.{name}_token_id is {wanted}, and of transformers' tokenizer of it {found}"
    for index, (token, kind) in enumerate(zip(tokens, fields.get("token_type") or (), strict=False)):
        if kind in (_CONTROL, _USER_DEFINED):
            found = tokenizer.encode(token, add_special_tokens=False)
            if tokenizer.convert_tokens_to_ids(token) != index or found != [index]:
                return (
                    f"its special token {shown(token)} has the id {index}, and transformers' tokenizer of it makes "
                    f"{found[:8]} of it"
                )
    return None


def _whole_word_problem(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> str | None:
    """Check for words that are tokens: llama.cpp mostly takes them without merging, transformers merges."""
    if fields.get("model") != "gpt2" or fields.get("pre") in _PLAIN_SPLITS:
        return None
    model = tokenizer.backend_tokenizer.model
    kinds = fields.get("token_type") or [1] * len(fields["tokens"])
    for index, (token, kind) in enumerate(zip(fields["tokens"], kinds, strict=False)):
        if kind == 1 and [piece.id for piece in model.tokenize(token)] != [index]:
            return (
                f"transformers' tokenizer of it does not make its token {shown(token)} of that word, as llama.cpp does"
            )
    return None


def _added_problem(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> str | None:
    """Check the tokens that are added before and after a text."""
    adds_bos = fields.get("add_bos_token")
    if adds_bos is None and fields.get("model") == "gpt2" and fields.get("pre") not in _PLAIN_SPLITS:
        return (
            f"it does not say whether a text begins with a special token (tokenizer.ggml.add_bos_token), where its way "
            f"to split texts is {shown(fields.get('pre'))}"
        )
    if adds_bos is None:
        adds_bos = fields.get("model") == "llama"  # llama.cpp's default
    plain, whole = (tokenizer.encode("a", add_special_tokens=is_asked) for is_asked in (False, True))
    wanted = [
        *([fields.get("bos_token_id")] if adds_bos else []),
        *plain,
        *([fields.get("eos_token_id")] if fields.get("add_eos_token") else []),
    ]
    return None if whole == wanted else f"a text becomes {wanted} by what it says, and {whole} by transformers"


def _space_problem(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> str | None:
    if fields.get("model") != "llama":
        return None
    wanted = bool(fields.get("add_space_prefix", True))
    first = tokenizer.tokenize("a")[0]
    if first.startswith("\N{LOWER ONE EIGHTH BLOCK}") == wanted:
        return None
    return (
        f"tokenizer.ggml.add_space_prefix is {wanted}, and transformers' tokenizer of it puts "
        f"{'no' if wanted else 'a'} space before a text"
    )
