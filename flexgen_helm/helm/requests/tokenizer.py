"""Facts about a tokenizer: what each token spells, how texts begin, and a digest of everything that determines ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from engine.errors import CheckpointError
from engine.reading import find_file, read_bytes

if TYPE_CHECKING:
    from helm.tokenizers.huggingface_tokenizer import WrappedPreTrainedTokenizer
    from transformers import PreTrainedTokenizerBase


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How tokenizers with byte fallback write a byte that is not a token of its own."""
_SPACE = "▁"
_BYTES = "bytes:"
"""How HELM marks a token that is only a part of a character (`get_num_bytes`)."""


class Spelling:
    """What each token of a text spells, such that the tokens together have the bytes of the text.

    A token decoded by itself may lose its space, and a part of a character is unreadable. Use it while the tokenizer is
    locked: HELM lends it to one thread at a time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def texts(self, ids: Sequence[int]) -> list[str]:
        r"""One text per token, in HELM's form: "bytes:\xf0\x9f" where a token is part of a character.

        Special tokens before a text are not part of it: what follows them is spelled as if it came first.
        """
        special = set(self._tokenizer.all_special_ids)
        first = next((place for place, token in enumerate(ids) if token not in special), len(ids))
        before = [str(self._tokenizer.decode([token])) for token in ids[:first]]
        return before + self._spelled(list(ids[first:]))

    def _spelled(self, ids: list[int]) -> list[str]:
        if not ids:
            return []
        if self._is_byte_wise is None:
            return self._by_decoding(ids)
        parts = [self._bytes_of(token) for token in ids]
        joined, text = b"".join(parts).decode(errors="replace"), str(self._tokenizer.decode(ids))
        if joined != text and joined[:1] == " " and (joined[1:2] == " ") == (text[:1] == " "):
            place = next(place for place, part in enumerate(parts) if part)  # a space with which every text begins
            parts[place], joined = parts[place][1:], joined[1:]
        if joined != text and "\ufffd" not in text:
            return self._by_decoding(ids)
        return [_as_helm_has_it(part) for part in parts]

    @cached_property
    def _is_byte_wise(self) -> bool | None:
        """Whether tokens are written in byte-level BPE's alphabet; None if only decoding shows what they spell."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        if decoder is None:
            return None
        kinds = set(_types(json.loads(decoder.__getstate__())))
        if "ByteLevel" in kinds:
            return True
        return False if kinds & {"ByteFallback", "Metaspace"} else None

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        """The byte for each character of a byte-level BPE's tokens."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {character: byte for byte, character in bytes_to_unicode().items()}

    def _bytes_of(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def _spell(self, token: int) -> bytes:
        piece = cast("str | None", self._tokenizer.convert_ids_to_tokens(token))
        if piece is None:  # embedding rows without a token
            return b""
        if token in self._tokenizer.added_tokens_decoder:
            return piece.encode()
        if self._is_byte_wise:
            known = self._alphabet
            return bytes(map(known.__getitem__, piece)) if all(map(known.__contains__, piece)) else piece.encode()
        if found := _BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace(_SPACE, " ").encode()

    def _by_decoding(self, ids: list[int]) -> list[str]:
        """What each token adds to the text; a character counts for its last token."""
        texts: list[str] = []
        begin = read = 0
        for end in range(1, len(ids) + 1):
            before, now = (str(self._tokenizer.decode(ids[begin:to])) if to > begin else "" for to in (read, end))
            if now.endswith("\ufffd") and end - read < 4 and end < len(ids):
                texts.append("")
                continue
            kept = next(
                (at for at, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), len(before)
            )
            if kept < len(before) and texts:  # a final mark such as "@@", which disappears when the text continues
                texts[-1] = texts[-1][: kept - len(before)]
            texts.append(now[kept:])
            begin, read = read, end
        return texts


def _as_helm_has_it(part: bytes) -> str:
    try:
        text = part.decode()
    except UnicodeDecodeError:
        text = _BYTES
    return _BYTES + "".join(f"\\x{byte:02x}" for byte in part) if text.startswith(_BYTES) else text


def _types(decoder: Any) -> Iterator[str]:
    """The types of a decoder and of its parts."""
    if isinstance(decoder, Mapping):
        yield str(decoder.get("type"))
        for each in decoder.get("decoders") or ():
            yield from _types(each)


@dataclass(frozen=True)
class EarlierRule:
    """Finds prompts whose ids differ under the rule for special tokens that preceded `PromptTokenizer`.

    It used the tokenizer's ids of a text, without a BOS that the text spelled at its very beginning, regardless of
    templates and suffixes. Caches contain answers to such prompts.
    """

    beginnings: tuple[str, ...]
    """The spelling of each token that the tokenizer puts before a text."""
    bos: str | None
    """The BOS, if it is all that the tokenizer puts before a text."""
    has_end: bool
    """Whether the tokenizer adds something after a text."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int]) -> EarlierRule:
        """The rule of a tokenizer that puts `prefix` before a text."""
        own, whole = (tokenizer.encode("a", add_special_tokens=add) for add in (False, True))
        return cls(
            beginnings=tuple(str(tokenizer.decode([token])) for token in prefix),
            bos=str(tokenizer.bos_token) if list(prefix) == [tokenizer.bos_token_id] else None,
            has_end=len(whole) > len(prefix) + len(own),
        )

    def made_others(self, text: str, *, is_templated: bool) -> bool:
        """Whether the rule made other ids of `text`."""
        had_beginning = bool(self.beginnings) and not (self.bos is not None and text.startswith(self.bos))
        begins_itself = text.lstrip().startswith(self.beginnings)
        has_beginning = bool(self.beginnings) and not (is_templated or begins_itself)
        return self.has_end or had_beginning != has_beginning


@dataclass(frozen=True)
class TokenizerDigests:
    """Hex digests of everything that determines the ids of texts and the text of ids; a tokenizer's name does not."""

    whole: str
    """The digest of everything."""
    earlier: str
    """The digest of earlier releases: without the settings that are not part of the tokenizer's own state."""


_SETTINGS = (
    *("split_special_tokens", "clean_up_tokenization_spaces", "add_prefix_space", "add_bos_token", "add_eos_token"),
    *("legacy", "do_lower_case"),
)
_MOST_BYTES = 1 << 30
_digests: WeakKeyDictionary[Any, TokenizerDigests] = WeakKeyDictionary()


def tokenizer_digests(wrapped: WrappedPreTrainedTokenizer) -> TokenizerDigests:
    """The digests of a tokenizer as HELM lends it."""
    with wrapped as tokenizer:  # its lock also keeps two threads from computing this twice
        if wrapped not in _digests:
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is None:
                state: Any = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
            else:
                backend.no_truncation()  # left over from HELM's own calls
                backend.no_padding()
                state = backend.to_str()
            settings = {name: getattr(tokenizer, name, None) for name in _SETTINGS}
            files = [] if backend is not None else _vocabulary_files(tokenizer)
            _digests[wrapped] = TokenizerDigests(sha256_of([state, settings, files]), sha256_of(state))
        return _digests[wrapped]


def _vocabulary_files(tokenizer: Any) -> list[tuple[str, str]]:
    """The files of a tokenizer, and a digest of each: those of a Python tokenizer contain what its state lacks."""
    named = [(name, getattr(tokenizer, name, None)) for name in sorted(getattr(tokenizer, "vocab_files_names", ()))]
    return [
        (name, hashlib.sha256(read_bytes(Path(file), CheckpointError, limit=_MOST_BYTES)).hexdigest())
        for name, file in named
        if isinstance(file, str) and find_file(Path(file), CheckpointError)
    ]


def sha256_of(value: Any) -> str:
    """Hex digest of a value as JSON has it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
