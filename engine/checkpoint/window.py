"""The window: the maximum number of positions of a sequence, by a model's config.json, and its limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.checkpoint.config import WINDOW_KEYS, ropes, text_config

_NO_WINDOW = 10**9
"""The value that some configs write for "any length"."""
_LONG = ("longrope", "su")


def window_of(config: Mapping[str, Any]) -> int | None:
    """The maximum number of positions of a sequence by a config.json; None when it sets no limit.

    Scaled rotary tables reach further than the positions that the model was first trained for: linear ones by their
    factor, YaRN's by their factor beyond `original_max_position_embeddings`, as far as the config does not name the
    longer window itself (Llama 3's always does). Tables that depend on the longest sequence of a call end where they
    would change, since a result would depend on the other sequences of the call: dynamic ones at the config's window,
    LongRoPE (Phi-3's long variants) at the original one.
    """
    text = text_config(config)
    window: int | None = next((text[key] for key in WINDOW_KEYS if _is_length(text.get(key))), None)
    if window is None or window >= _NO_WINDOW:
        return None
    longest = window
    for rope in ropes(text):
        kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
        original = text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        told: int | None = original if _is_length(original) else None
        if kind in _LONG and told is not None:
            return min(window, told)
        # A table for one kind of layer only says nothing of the others: their config names the whole window.
        is_whole = rope is text.get("rope_parameters") or rope is text.get("rope_scaling")
        if is_whole and kind in ("linear", "yarn") and isinstance(factor, int | float) and 1 <= factor < _NO_WINDOW:
            longest = max(longest, int((told or window) * factor))
    return longest


def longest_window(config: Mapping[str, Any], *, is_rotary: bool) -> int | None:
    """The largest window that a user may set for a model; None where there is no limit.

    is_rotary: positions are rotary, by tables that are computed as far as a sequence reaches. Learned positions end
    with their table, and rotary ones where they would change with the longest sequence of a call.
    """
    kinds = {rope.get("rope_type") or rope.get("type") for rope in ropes(text_config(config))}
    return None if is_rotary and not kinds & {"dynamic", *_LONG} else window_of(config)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
