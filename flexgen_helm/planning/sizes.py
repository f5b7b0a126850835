"""Sizes of a model as it is placed: what a sweep moves and multiplies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A placed model, as far as it decides what a sweep moves and computes."""

    layer_parameters: int
    """Matrix elements of all layers that a token is multiplied with (of experts: those it is routed to)."""
    head_parameters: int
    attention_width: int
    """Query heads x (key + value elements of a head), summed over the layers; 0 where layers see a window only."""
    sweep_bytes: int
    """Weights of layers and head, on any tier."""
    streamed_bytes: int
    """The bytes of those that are not on the device."""
    disk_bytes: int
    """The bytes of those that are on disk."""
    cache_row_bytes: int
    """Keys and values of one token, all layers, off the device."""
    device_cache_row_bytes: int
    """The same on the device."""
    expanded_bytes: int
    """The bytes of encoded layers that a sweep decodes; 0 if none are encoded."""
    expert_bytes: int
    """The bytes of those that are experts' and may be decoded again for each micro-batch."""
    hidden_row_bytes: int
    num_layers: int
    state_bytes: int = 0
    """States of one sequence in all layers, on any tier; 0 where no layer keeps one."""
