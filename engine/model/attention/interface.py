"""The function that `transformers` layers call for attention, and what they may ask of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from engine.batch.micro_batch import MicroBatch
from engine.cache.shape import KVShape
from engine.errors import UnsupportedError
from engine.model.attention.backend import Attending, AttentionBackend
from engine.model.attention.dense import Dense
from engine.model.attention.flash import Flash
from engine.model.attention.host_flash import HostFlash
from engine.model.attention.rule import AttentionRule
from engine.model.sweep_context import SweepContext

ATTENTION_NAME = "flexgen"
"""The name under which `transformers` finds our attention function."""
BACKENDS: tuple[AttentionBackend, ...] = (Flash(), HostFlash(), Dense())
"""In order of preference; the last one can compute everything."""

_IGNORED = frozenset({"dropout", "is_causal", "position_ids", "position_embeddings", "use_cache", "cache_position"})
"""Keyword arguments that layers pass to attention and that do not affect its result."""


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with `transformers.AttentionInterface`.

    query, key, value: rotated, `[1, heads, rows, head_dim]`; returns `[1, rows, heads, head_dim]`. `softcap` is
    Gemma-2's cap of the scores, `s_aux` the sinks of GPT-OSS `[heads]`.
    """
    context: SweepContext = module.__dict__["sweeping"]
    if query.device.type == "meta":
        strange = sorted(k for k, v in others.items() if v is not None and k not in _IGNORED)
        if attention_mask is not None or strange:
            raise UnsupportedError(f"its attention takes {', '.join(strange) or 'a mask of its own'}")
        context.is_plain &= sliding_window is None and softcap is None and s_aux is None
        context.note(KVShape(key.shape[1], key.shape[3], value.shape[1], value.shape[3]))
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None
    batch = context.batch
    assert isinstance(batch, MicroBatch)
    rule = AttentionRule(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [rows, heads, dim]
    key, value = context.cache.write(context.layer, batch, key, value)
    asked = Attending(batch, query, key, value, context.cache, context.layer, rule)
    backend = next(backend for backend in BACKENDS if backend.can(asked))
    parts = [backend.decode(asked)] if batch.decode_groups else []
    if batch.prefill_first < len(query):
        parts.append(backend.prefill(asked))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


AttentionInterface.register(ATTENTION_NAME, attention)
# No mask is made: causality, windows and padding are told by the segments of the micro-batch.
AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)
