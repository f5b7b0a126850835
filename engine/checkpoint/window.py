"""The window: how many positions a sequence may have, by a model's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.checkpoint.config import text_config

_WINDOW_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def window_of(config: Mapping[str, Any]) -> int | None:
    """Most positions of a sequence by a config.json; None when it sets no limit."""
    text = text_config(config)
    window = next((text[key] for key in _WINDOW_KEYS if isinstance(text.get(key), int)), None)
    return _without_switching(window, text) if window is not None and window < 10**9 else None


def _without_switching(window: int, text: Mapping[str, Any]) -> int:
    """The window up to which rotary tables do not depend on the longest sequence in the call.

    LongRoPE (Phi-3's long variants) takes other tables for all sequences of a call as soon as one is longer than the
    original window: a result would depend on its company.
    """
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) not in ("longrope", "su"):
        return window
    original = text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return min(window, int(original)) if original else window
