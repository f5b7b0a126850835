"""The function that `transformers` layers call for attention, and what they may ask of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from engine.batch.micro_batch import MicroBatch
from engine.batch.reach import Reach
from engine.batch.step_batch import StepBatch
from engine.cache.shape import KVShape
from engine.errors import UnsupportedError
from engine.kernels.invariant.mode import plain_arithmetic
from engine.model.attention.backend import Attending, AttentionBackend
from engine.model.attention.blockwise import Blockwise
from engine.model.attention.context_flash import ContextFlash
from engine.model.attention.dense import Dense
from engine.model.attention.flash import Flash
from engine.model.attention.host_flash import HostFlash
from engine.model.attention.mask import make_mask
from engine.model.attention.rule import AttentionRule
from engine.model.attention.step_flash import attend_steps
from engine.model.attention.whole_flash import WholeFlash
from engine.model.sweep_context import SweepContext
from engine.model.undrivable import UndrivableError

ATTENTION_NAME = "flexgen"
"""The name under which `transformers` finds our attention function."""
BACKENDS: tuple[AttentionBackend, ...] = (WholeFlash(), Blockwise(), Flash(), ContextFlash(), HostFlash(), Dense())
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
        if strange := sorted(k for k, v in others.items() if v is not None and k not in _IGNORED):
            raise UnsupportedError(f"its attention takes {', '.join(strange)}")
        reach = _reach(module, context, attention_mask, sliding_window, others.get("is_causal"))
        is_plain = reach.is_whole and softcap is None and s_aux is None
        context.note(KVShape(key.shape[1], key.shape[3], value.shape[1], value.shape[3]), reach, is_plain=is_plain)
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None
    if context.is_checking:
        context.attended += 1
        rows = (value + key.mean(-1, keepdim=True)).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return (rows + query.mean(-1, keepdim=True)).transpose(1, 2).contiguous(), None
    batch = context.batch
    assert isinstance(batch, MicroBatch | StepBatch)
    if attention_mask is not None:
        raise UnsupportedError("its attention got a mask that it did not get when the model was opened")
    rule = AttentionRule(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        reach=context.reaches[context.layer],
        softcap=softcap,
        sinks=s_aux,
    )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [rows, heads, dim]
    with plain_arithmetic():
        key, value = context.cache.write(context.layer, batch, key, value)
    if isinstance(batch, StepBatch):
        return attend_steps(query, batch, context.cache, context.layer, rule)[None], None
    asked = Attending(batch, query, key, value, context.cache, context.layer, rule, context.is_batch_invariant)
    backend = next(backend for backend in BACKENDS if backend.can(asked))
    with context.apart():
        parts = [backend.decode(asked)] if batch.decode_groups else []
        if batch.prefill_first < len(query):
            parts.append(backend.prefill(asked))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _reach(
    module: nn.Module,
    context: SweepContext,
    mask: torch.Tensor | None,
    sliding_window: int | None,
    is_causal: bool | None,
) -> Reach:
    """Which tokens a layer attends to that is called with these arguments, in transformers' default attention.

    That follows the mask; without one it attends to all tokens before, whatever `sliding_window` says.
    """
    if is_causal is False or not getattr(module, "is_causal", True):
        raise UndrivableError("its tokens attend to later ones (is_causal is False)")
    if mask is None:
        if sliding_window is not None:
            raise UnsupportedError(f"it has a sliding window of {sliding_window} tokens and no mask that follows it")
        return Reach()
    reach = context.masks.reach_of(mask)
    if reach is None:
        raise UnsupportedError("its attention takes a mask of its own")
    return reach


AttentionInterface.register(ATTENTION_NAME, attention)
AttentionMaskInterface.register(ATTENTION_NAME, make_mask)
