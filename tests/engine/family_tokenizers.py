"""Small tokenizers built as those of well-known families: the same kind of model, decoder and special tokens."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import PreTrainedTokenizerFast

WRITTEN = "don't we'll 12 + 37 = 49, isn't it? the end.\n\n    return x  # 日本語\n"
"""What pieces are learned from, beside English prose."""
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _corpus() -> list[str]:
    return [(Path(random.__file__).parent / "textwrap.py").read_text()[:6_000], WRITTEN * 20]


def _wrapped(tokenizer: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _with_bytes(special: list[str]) -> tuple[BPE, list[str]]:
    """A SentencePiece-like BPE of words that begin with a space or with none, with bytes for all else."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    words = " ".join(_corpus()).encode("ascii", "ignore").decode().split()
    learner.train_from_iterator([" ".join(words)], trainers.BpeTrainer(vocab_size=260, show_progress=False))
    merges = [tuple(pair) for pair in _state(learner)["merges"]]
    pieces = sorted(_state(learner)["vocab"], key=_state(learner)["vocab"].get)
    vocabulary = {piece: number for number, piece in enumerate([*special, *BYTES, *pieces, "▁▁▁▁▁▁▁▁▁▁▁▁"])}
    return BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True), special


def _state(tokenizer: Tokenizer) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def _begun(tokenizer: Tokenizer, *tokens: str, end: str = "") -> None:
    """Let the tokenizer put `tokens` before a text, and `end` behind it."""
    single = " ".join([*tokens, "$A", *([end] if end else [])])
    special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*tokens, *([end] if end else [])])]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def _special(tokenizer: Tokenizer, tokens: list[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])


def _llama2(end: str = "") -> PreTrainedTokenizerFast:
    model, special = _with_bytes(["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _special(tokenizer, special)
    _begun(tokenizer, "<s>", end=end)
    return _wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _mistral() -> PreTrainedTokenizerFast:
    model, special = _with_bytes(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _special(tokenizer, special)
    _begun(tokenizer, "<s>")
    return _wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _gemma() -> PreTrainedTokenizerFast:
    model, special = _with_bytes(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"])
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _special(tokenizer, special)
    _begun(tokenizer, "<bos>")
    return _wrapped(tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def _byte_level(special: list[str], split: Any = None, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = level if split is None else pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    _special(tokenizer, special)
    return tokenizer


def _gpt2() -> PreTrainedTokenizerFast:
    end = "<|endoftext|>"
    return _wrapped(_byte_level([end]), bos_token=end, eos_token=end, unk_token=end)


def _qwen() -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], split, normalizers.NFC())
    return _wrapped(tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _glm() -> PreTrainedTokenizerFast:
    tokenizer = _byte_level(["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"])
    _begun(tokenizer, "[gMASK]", "<sop>")
    return _wrapped(tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def _t5() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=12
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    _begun(tokenizer, end="</s>")
    return _wrapped(tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def _bert() -> PreTrainedTokenizerFast:
    """WordPiece, whose text depends on the words around: no space before "##ing", none before a full stop."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        _corpus(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    _begun(tokenizer, "[CLS]", end="[SEP]")
    return _wrapped(
        tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        clean_up_tokenization_spaces=True,
    )  # fmt: skip


_FAMILIES = {
    "llama-2": _llama2,
    "llama-2 with an end": lambda: _llama2("</s>"),
    "mistral": _mistral,
    "gemma": _gemma,
    "gpt-2": _gpt2,
    "qwen": _qwen,
    "glm": _glm,
    "t5": _t5,
    "bert": _bert,
}
NAMES = list(_FAMILIES)


@cache
def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer like those of the family; the same object at each call."""
    return _FAMILIES[name]()
