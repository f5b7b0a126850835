"""What is asked of a tokenizer: how it begins a text, and a digest of all that decides which ids a text becomes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from helm.tokenizers.huggingface_tokenizer import WrappedPreTrainedTokenizer
    from transformers import PreTrainedTokenizerBase


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it puts its beginning of text before a text that does not begin with it."""
    plain, special = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    return tokenizer.bos_token_id is not None and special[:1] == [tokenizer.bos_token_id] != plain[:1]


_fingerprints: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def tokenizer_fingerprint(wrapped: WrappedPreTrainedTokenizer) -> str:
    """Hex digest of all that decides which ids a text becomes; a tokenizer's name would not tell."""
    with wrapped as tokenizer:  # its lock also keeps two threads from computing this twice
        if wrapped not in _fingerprints:
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is None:
                state: Any = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
            else:
                backend.no_truncation()  # left over from HELM's own calls
                backend.no_padding()
                state = backend.to_str()
            _fingerprints[wrapped] = sha256_of(state)
        return _fingerprints[wrapped]


def sha256_of(value: Any) -> str:
    """Hex digest of a value as JSON has it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
