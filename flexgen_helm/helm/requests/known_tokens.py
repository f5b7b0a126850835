"""HELM's tokenizers, changed to tokenize each text once, many texts at a time, and to store nothing in files.

HELM's cache of tokens is not used: looking tokens up takes longer than computing them. It also hangs if the disk is
full: its writing thread dies, and all others wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
from helm.common.cache import BlackHoleCacheConfig, Cache
from helm.common.cache_backend_config import CacheBackendConfig
from helm.common.tokenization_request import (
    DecodeRequest,
    DecodeRequestResult,
    TokenizationRequest,
    TokenizationRequestResult,
    TokenizationToken,
)
from helm.tokenizers.auto_tokenizer import AutoTokenizer
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from helm.tokenizers.tokenizer import Tokenizer
from numpy.typing import NDArray

from engine.errors import without_panics

Ids = NDArray[np.int32]


class KnownTokens(AutoTokenizer):
    """HELM's tokenizers, where those of Hugging Face cache the tokens of texts given to `encode`.

    All window services use it, however they count.
    """

    def __init__(self, credentials: Any, cache_backend_config: CacheBackendConfig) -> None:
        super().__init__(credentials, cache_backend_config)
        self._ids: dict[tuple[str, str], Ids] = {}
        """Token ids by HELM's name of the tokenizer and text, without special tokens."""
        self._counts: dict[tuple[str, str], int] = {}
        """The numbers of tokens of texts that another process has tokenized."""

    def encode(self, name: str, texts: Iterable[str]) -> None:
        """Tokenize those of `texts` that are not known, in one call; texts that cannot be tokenized remain unknown.

        Does nothing for a tokenizer that is not from Hugging Face.
        """
        try:
            tokenizer = self._get_tokenizer(name)
        except Exception:  # if there is no tokenizer, the code that needs it raises the error
            return
        left = [text for text in dict.fromkeys(texts) if (name, text) not in self._ids]
        if not left or type(tokenizer) is not HuggingFaceTokenizer:
            return
        with tokenizer.get_wrapped_tokenizer() as found:
            if not found.is_fast:  # it would tokenize one text after the other anyway
                return
            try:
                with without_panics():
                    found.encode("", add_special_tokens=False)  # resets truncation that an earlier call has enabled
                    encoded = found.backend_tokenizer.encode_batch_fast(left, add_special_tokens=False)
            except Exception:  # a lone surrogate, for example: the request with that text raises the error
                return
        for text, each in zip(left, encoded, strict=True):
            self._ids[name, text] = np.array(each.ids, dtype=np.int32)

    def ids(self, name: str, text: str) -> Ids | None:
        """The token ids of a text without special tokens, if they are known."""
        return self._ids.get((name, text))

    def numbers(self, name: str, texts: Iterable[str]) -> dict[str, int]:
        """The number of tokens of each known text."""
        return {text: len(ids) for text in texts if (ids := self._ids.get((name, text))) is not None}

    def count(self, name: str, counts: Mapping[str, int]) -> None:
        """Store the numbers of tokens of texts."""
        self._counts.update({(name, text): number for text, number in counts.items()})

    def forget(self) -> None:
        """Forget all texts."""
        self._ids.clear()
        self._counts.clear()

    def tokenize(self, request: TokenizationRequest) -> TokenizationRequestResult:
        """Like HELM's method, but a text is tokenized once, and token objects are made when they are read."""
        number = self._number(request)
        if number is None or (request.truncation and number > request.max_length):
            return super().tokenize(request)
        tokens = _Tokens(number, lambda: list(map(TokenizationToken, self._made(request).tolist())))
        return TokenizationRequestResult(success=True, cached=False, text=request.text, tokens=tokens, request_time=0.0)  # type: ignore[arg-type]

    def decode(self, request: DecodeRequest) -> DecodeRequestResult:
        """Like HELM's method, without the copies that it makes of the tokens for a cache that does not exist."""
        tokenizer = self._get_tokenizer(request.tokenizer)
        if type(tokenizer) is not HuggingFaceTokenizer:
            return super().decode(request)
        asked = {
            "tokenizer": request.tokenizer,
            "tokens": request.tokens,
            "clean_up_tokenization_spaces": request.clean_up_tokenization_spaces,
        }
        return DecodeRequestResult(
            success=True, cached=False, text=tokenizer._decode_do_it(asked)["text"], request_time=0.0
        )

    def _number(self, request: TokenizationRequest) -> int | None:
        """Return the number of tokens of a text that is not truncated; None if HELM's tokenizer must be called."""
        key = (request.tokenizer, request.text)
        if not request.encode or type(self._get_tokenizer(request.tokenizer)) is not HuggingFaceTokenizer:
            return None
        if key in self._counts and key not in self._ids:
            return self._counts[key]
        return len(self._made(request)) if key in self._ids or not request.truncation else None

    def _made(self, request: TokenizationRequest) -> Ids:
        key = (request.tokenizer, request.text)
        if key not in self._ids:
            asked = {"text": request.text, "tokenizer": request.tokenizer, "encode": True, "truncation": False}
            tokenizer = self._get_tokenizer(request.tokenizer)
            assert isinstance(tokenizer, HuggingFaceTokenizer)
            with without_panics():
                self._ids[key] = np.array(tokenizer._tokenize_do_it(asked)["tokens"], dtype=np.int32)
        return self._ids[key]

    def _get_tokenizer(self, tokenizer_name: str) -> Tokenizer:
        tokenizer = super()._get_tokenizer(tokenizer_name)
        if isinstance(tokenizer, HuggingFaceTokenizer) and not isinstance(tokenizer.cache, _NoCache):
            tokenizer.cache = _NoCache()
        return tokenizer


class _Tokens(Sequence[TokenizationToken]):
    """The tokens of a text, made on demand, because callers mostly need only their number."""

    def __init__(self, number: int, make: Callable[[], list[TokenizationToken]]) -> None:
        self._number = number
        self._make = make
        self._made: list[TokenizationToken] | None = None

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, place: int) -> TokenizationToken: ...

    @overload
    def __getitem__(self, place: slice) -> list[TokenizationToken]: ...

    def __getitem__(self, place: int | slice) -> TokenizationToken | list[TokenizationToken]:
        if self._made is None:
            self._made = self._make()
        return self._made[place]

    def __add__(self, other: Sequence[TokenizationToken]) -> list[TokenizationToken]:
        return [*self, *other]

    def __radd__(self, other: Sequence[TokenizationToken]) -> list[TokenizationToken]:
        return [*other, *self]


class _NoCache(Cache):
    """A cache that stores nothing."""

    def __init__(self) -> None:
        super().__init__(BlackHoleCacheConfig())

    def get(self, request: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """Like HELM's method, for a missing key."""
        return compute(), False
