"""The attention function that `transformers` layers call, and the options that it supports."""

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
from engine.model.attention.sparse import Sparse
from engine.model.attention.step_flash import attend_steps
from engine.model.attention.whole_flash import WholeFlash
from engine.model.indexers.choice import Choice
from engine.model.sweep_context import SweepContext
from engine.model.undrivable import UndrivableError

ATTENTION_NAME = "flexgen"
"""The name under which `transformers` finds our attention function."""
BACKENDS: tuple[AttentionBackend, ...] = (
    *(Sparse(), WholeFlash(), Blockwise()),
    *(Flash(), ContextFlash(), HostFlash(), Dense()),
)
"""The implementations in order of preference; the last one supports everything."""

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
    indices: Choice | None = None,
    block_indices: Choice | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with `transformers.AttentionInterface`.

    query, key, value: rotated, `[1, heads, rows, head_dim]`; returns `[1, rows, heads, head_dim]`. `softcap` is
    Gemma-2's cap of the scores, `s_aux` the sinks of GPT-OSS `[heads]`, `indices` and `block_indices` stand for the
    keys that an indexer chooses.
    """
    choice = indices if block_indices is None else block_indices
    context: SweepContext = module.__dict__["sweeping"]
    if query.device.type == "meta":
        if strange := sorted(k for k, v in others.items() if v is not None and k not in _IGNORED):
            raise UnsupportedError(f"its attention takes {', '.join(strange)}")
        if not (choice is None or isinstance(choice, Choice)):
            raise UnsupportedError("its attention takes indices, which none of its modules gets by a cache")
        reach = _reach(module, context, attention_mask, sliding_window, others.get("is_causal"))
        is_plain = reach.is_whole and softcap is None and s_aux is None and choice is None
        index = _index_keys(context, choice, key.dtype)
        index_width = 0 if index is None else index.shape[1]
        shape = KVShape(key.shape[1], key.shape[3], value.shape[1], value.shape[3], index_width)
        context.note(shape, reach, is_plain=is_plain)
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None
    if context.is_checking:
        context.attended += 1
        rows = (value + key.mean(-1, keepdim=True)).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        rows = rows + query.mean(-1, keepdim=True)
        if choice is not None:
            rows = rows + choice.keys.mean(-1)[:, None]
        return rows.transpose(1, 2).contiguous(), None
    batch = context.batch
    assert isinstance(batch, MicroBatch | StepBatch)
    if attention_mask is not None and not context.hands_masks:
        raise UnsupportedError("its attention got a mask that it did not get when the model was opened")
    rule = AttentionRule(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        reach=context.reaches[context.layer],
        softcap=softcap,
        sinks=s_aux,
    )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [rows, heads, dim]
    with plain_arithmetic():
        index = _index_keys(context, choice, key.dtype)
        kept = context.cache.write(context.layer, batch, key, value, *([] if index is None else [index]))
    if isinstance(batch, StepBatch):
        return attend_steps(query, batch, context.cache, context.layer, rule)[None], None
    asked = Attending(
        *(batch, query, kept[0], kept[1], context.cache, context.layer, rule, context.is_batch_invariant),
        choice=choice,
        index=kept[2] if len(kept) > 2 else None,
        hands_on=context.handed_row_bytes > 0,
    )
    backend = next(backend for backend in BACKENDS if backend.can(asked))
    with context.apart():
        parts = [backend.decode(asked)] if batch.decode_groups else []
        if batch.prefill_first < len(query):
            parts.append(backend.prefill(asked))
    if choice is not None:
        choice.forget_rows()
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _index_keys(context: SweepContext, choice: Choice | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The index keys of the new rows to be stored, `[rows, index width]`; None where another layer stores them."""
    return None if choice is None or choice.layer != context.layer else choice.stored(dtype)


def _reach(
    module: nn.Module,
    context: SweepContext,
    mask: torch.Tensor | None,
    sliding_window: int | None,
    is_causal: bool | None,
) -> Reach:
    """The tokens that a layer attends to, by these arguments, in transformers' default attention.

    It follows the mask; without one the layer attends to all earlier tokens, whatever `sliding_window` says.
    """
    if is_causal is False or not getattr(module, "is_causal", True):
        raise UndrivableError("its tokens attend to later ones (is_causal is False)")
    if mask is None:
        if sliding_window is not None:
            raise UnsupportedError(f"it has a sliding window of {sliding_window} tokens and no mask that follows it")
        return Reach()
    reach = context.masks.reach_of(mask)
    if reach is None:
        raise UnsupportedError("its attention uses a mask of its own")
    return reach


AttentionInterface.register(ATTENTION_NAME, attention)
AttentionMaskInterface.register(ATTENTION_NAME, make_mask)
