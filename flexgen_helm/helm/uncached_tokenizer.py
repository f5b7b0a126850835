"""HELM's tokenizers without HELM's cache of tokens: looking them up takes longer than making them.

With no room on the disk, HELM's cache also stands still for good: its writing thread dies, and all others wait for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from typing import Any

from helm.common.cache import BlackHoleCacheConfig, Cache
from helm.common.cache_backend_config import CacheBackendConfig
from helm.tokenizers.auto_tokenizer import AutoTokenizer
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from helm.tokenizers.tokenizer import Tokenizer


class UncachedTokenizer(AutoTokenizer):
    """HELM's tokenizers, those of Hugging Face without a file."""

    def __init__(self, credentials: Any, cache_backend_config: CacheBackendConfig) -> None:
        super().__init__(credentials, cache_backend_config)

    def _get_tokenizer(self, tokenizer_name: str) -> Tokenizer:
        tokenizer = super()._get_tokenizer(tokenizer_name)
        if isinstance(tokenizer, HuggingFaceTokenizer) and not isinstance(tokenizer.cache, _SecondLook):
            tokenizer.cache = _SecondLook()
        return tokenizer


class _SecondLook(Cache):
    """Keeps a text's tokens from the first time they are asked for, to see if it fits, to the second, to count them."""

    def __init__(self) -> None:
        super().__init__(BlackHoleCacheConfig())
        self._kept: dict[tuple[Any, ...], array[int]] = {}

    def get(self, request: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """As HELM's."""
        if not request.get("encode"):
            return compute(), False
        key = tuple(request.values())
        kept = self._kept.pop(key, None)
        if kept is not None:
            return {"tokens": kept.tolist(), "request_time": 0.0}, True
        response = compute()
        self._kept[key] = array("i", response["tokens"])
        return response, False
