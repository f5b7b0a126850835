"""Attention of a packed micro-batch over [prefix | own past | new], as a function that `transformers` layers call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from engine.batch.decode_group import DecodeGroup
from engine.batch.micro_batch import MicroBatch
from engine.batch.prefill_group import PrefillGroup
from engine.cache.shape import KVShape
from engine.errors import UnsupportedError
from engine.model.attention import flash, host_attention, host_flash
from engine.model.attention.rule import Scores
from engine.model.sweep_context import Sweeping

ATTENTION_NAME = "flexgen"
"""The name under which `transformers` finds our attention function."""


_IGNORED = frozenset({"dropout", "is_causal", "position_ids", "position_embeddings", "use_cache", "cache_position"})
"""What layers hand to their attention function besides, and no scores depend on."""


def probe_kv_shape(layer: nn.Module, hidden: torch.Tensor, args: Any, kwargs: Any) -> KVShape | None:
    """Call `layer`, whose parameters are on `meta`, until it shows its keys and values; None when it never does.

    Raises `UnsupportedError` for a layer whose attention is not what `attention` computes.
    """
    sweeping: Sweeping = layer.__dict__["sweeping"]
    sweeping.probed = None

    def on_meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        if isinstance(value, tuple | list):
            return type(value)(on_meta(item) for item in value)
        return value

    buffers = [(module, dict(module._buffers)) for module in layer.modules()]
    try:
        layer.to("meta")
        with torch.no_grad(), torch.device("meta"):
            layer(on_meta(hidden), *on_meta(args), **{key: on_meta(value) for key, value in kwargs.items()})
    except UnsupportedError:
        raise
    except Exception:  # what comes after its attention may need real numbers
        if sweeping.probed is None:
            raise
    finally:
        for module, before in buffers:
            module._buffers.update(before)
    return sweeping.probed


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
    sweeping: Sweeping = module.__dict__["sweeping"]
    if query.device.type == "meta":
        strange = sorted(k for k, v in others.items() if v is not None and k not in _IGNORED)
        if attention_mask is not None or strange:
            raise UnsupportedError(f"its attention takes {', '.join(strange) or 'a mask of its own'}")
        sweeping.is_plain &= sliding_window is None and softcap is None and s_aux is None
        sweeping.note(KVShape(key.shape[1], key.shape[3], value.shape[1], value.shape[3]))
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None
    batch = sweeping.batch
    assert isinstance(batch, MicroBatch)
    scores = Scores(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [rows, heads, dim]
    key, value = sweeping.cache.write(sweeping.layer, batch, key, value)
    if flash.is_usable(query, value, scores, batch):
        return flash.attend(batch, query, key, value, sweeping, scores)[None], None
    output = query.new_empty(*query.shape[:2], value.shape[2])
    if host_flash.is_usable(query, value, scores, batch):
        host_flash.prefill(batch, query, key, value, sweeping, scores, output)
    else:
        for prefill in batch.prefill_groups:
            _prefill(prefill, query, key, value, sweeping, scores, output)
    cache = sweeping.cache
    for decode in batch.decode_groups:
        if cache.is_attended_on_host(decode) and not decode.chain and scores.is_stock_within(batch.longest):
            taken = slice(decode.first, decode.end)
            output[taken], _ = host_attention.attend(decode, query[taken], cache, sweeping.layer, scores)
        else:
            _decode(decode, query, key, value, sweeping, scores, output)
    return output[None], None


def _prefill(
    group: PrefillGroup,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sweeping: Sweeping,
    scores: Scores,
    output: torch.Tensor,
) -> None:
    """Attend the rows of `group`: query, key, value `[rows, heads, dim]` of the whole micro-batch -> its `output`."""
    rows = slice(group.first, group.end)
    size = (group.end - group.first) // group.num_parts
    # [parts, heads, rows of a part, dim]
    query, key, value = (x[rows].unflatten(0, (-1, size)).transpose(1, 2) for x in (query, key, value))
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    if not group.chain and scores.is_stock_within(size):
        result = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scores.scaling, enable_gqa=groups > 1
        )
        output[rows] = result.transpose(1, 2).flatten(0, 1)
        return
    if group.chain:
        prefix_key, prefix_value = sweeping.cache.fork(sweeping.layer, group.chain)
        key, value = torch.cat((prefix_key[None], key), dim=2), torch.cat((prefix_value[None], value), dim=2)
    # The heads of one group of queries share keys and values: they become further rows, and nothing is copied.
    query = query.unflatten(1, (heads, groups)).flatten(2, 3)
    if scores.is_stock:
        mask = group.mask(scores.window, query.dtype, groups)
        result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scores.scaling)
    else:
        dots = (query @ key.mT).unflatten(2, (groups, -1)).flatten(1, 2)  # sinks differ from head to head
        weights = scores.weights(dots, group.mask(scores.window, torch.float32, 1)).to(value.dtype)
        result = weights.unflatten(1, (heads, groups)).flatten(2, 3) @ value
    output[rows] = result.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2).flatten(0, 1)


def _decode(
    group: DecodeGroup,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sweeping: Sweeping,
    scores: Scores,
    output: torch.Tensor,
) -> None:
    """Attend the new rows of the sequences of `group`; query, key, value `[rows, heads, dim]` of the micro-batch."""
    taken = slice(group.first, group.end)
    device = torch.device("cpu") if sweeping.cache.is_attended_on_host(group) else query.device
    # [sequences, kv heads, length, dim]
    key, value = sweeping.cache.own(sweeping.layer, group, key[taken], value[taken])
    query = query[taken].to(device)
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    # As in a prefill, what shares keys and values becomes rows: [sequences, kv heads, groups * steps, dim].
    query = query.unflatten(0, (-1, group.steps)).unflatten(2, (heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    copies = query.shape[2]
    dots = query @ key.mT
    start = 0
    if group.chain:
        prefix = sweeping.cache.fork(sweeping.layer, group.chain)
        prefix_key, prefix_value = (x.to(device) for x in prefix)  # [kv heads, prefix, dim]
        start = prefix_key.shape[1]
        # All sequences against the one prefix: [kv heads, sequences * groups * steps, dim] @ [kv heads, dim, prefix].
        flat = query.transpose(0, 1).flatten(1, 2)
        shared = (flat @ prefix_key.mT).unflatten(1, (-1, copies)).transpose(0, 1)
        dots = torch.cat((shared, dots), dim=-1)
    by_head = dots.unflatten(2, (groups, group.steps)).flatten(1, 2)  # [sequences, heads, steps, keys]
    weights = scores.weights(by_head, group.mask(scores.window).to(device)[:, None])
    weights = weights.to(value.dtype).view_as(dots)
    result = weights[..., start:] @ value
    if group.chain:
        flat = weights[..., :start].transpose(0, 1).flatten(1, 2)
        result = result + (flat @ prefix_value).unflatten(1, (-1, copies)).transpose(0, 1)
    result = result.unflatten(2, (groups, group.steps)).permute(
        0, 3, 1, 2, 4
    )  # [sequences, steps, kv heads, groups, dim]
    output[taken] = result.flatten(2, 3).flatten(0, 1).to(output.device)


AttentionInterface.register(ATTENTION_NAME, attention)
# No mask is made: causality, windows and padding are told by the segments of the micro-batch.
AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)
