"""Tokens have the bytes of the text that they spell, as HELM's metrics count them, with every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.metrics.basic_metrics import convert_tokens_to_text, get_num_bytes
from helm.common.request import Token
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import train_sentencepiece, train_tokenizer

from flexgen_helm.helm.requests.tokenizer import Spelling

TEXTS = [
    "hi 🙂🙂",
    "plain English text here",
    "naïve café",
    "日本語の文です",
    " two  spaces ",
    "a\n\tb",
    "bytes: x",
    "",
]


def unigram(path: Path, **_: Any) -> Any:
    """Like T5's: pieces with "▁", no bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"])
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return wrapped(tokenizer)


def wordpiece(path: Path, **_: Any) -> Any:
    """Like BERT's: only decoding tells where spaces are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(TEXTS * 20, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["<unk>"]))
    return wrapped(tokenizer)


def wrapped(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")


@pytest.fixture(scope="module", params=[train_tokenizer, train_sentencepiece, unigram, wordpiece])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    train: Callable[..., Any] = request.param
    return train(tmp_path_factory.mktemp("tokenizer"), adds_bos=False)


@settings(max_examples=60, deadline=None, database=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=20))
@example(text=TEXTS[0])
@example(text=TEXTS[1])
@example(text=TEXTS[2])
@example(text=TEXTS[3])
@example(text=TEXTS[4])
@example(text=TEXTS[6])
def test_tokens_have_the_bytes_of_their_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in ids:
        return  # what is unknown cannot be spelled
    spelled = tokenizer.decode(ids)
    tokens = [Token(text=each, logprob=0.0) for each in Spelling(tokenizer).texts(ids)]
    assert len(tokens) == len(ids)
    assert "".join(group["text"] for group in convert_tokens_to_text(tokens)) == spelled
    assert get_num_bytes(tokens) == len(spelled.encode())


@pytest.mark.parametrize("text", TEXTS[:5])
def test_a_special_token_in_front_is_no_part_of_the_text(tmp_path: Path, text: str) -> None:
    tokenizer = train_sentencepiece(tmp_path, adds_bos=True)
    first, *others = Spelling(tokenizer).texts(tokenizer(text)["input_ids"])
    assert first == "<s>"
    assert get_num_bytes([Token(text=each, logprob=0.0) for each in others]) == len(text.encode())


def test_half_a_character_is_told_by_its_bytes(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tmp_path, adds_bos=False)
    ids = tokenizer("hi 🙂")["input_ids"]
    assert Spelling(tokenizer).texts(ids[:-2]) == ["hi", " ", r"bytes:\xf0", r"bytes:\x9f"]
