"""Attention of decode steps on the host, over keys and values in place, in their own dtype or as codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.kernels import host_kernel
from engine.kernels.host_kernel import by_torch
from engine.memory import accelerator

if TYPE_CHECKING:
    from engine.batch.decode_group import DecodeGroup
    from engine.cache.key_value import KVCache
    from engine.model.attention.rule import AttentionRule


def attend(
    group: DecodeGroup, query: torch.Tensor, cache: KVCache, layer: int, rule: AttentionRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the new rows of a decode group to their own tokens, by plain softmax, without windows.

    query `[rows, heads, dim]` -> `[rows, heads, dim]` on its device, and float32 log-sum-exps `[heads, rows]` on the
    host. The copy is asynchronous: the link may be busy with the next layer's weights.
    """
    device = query.device
    shape = cache.shapes[layer]
    dims = shape.key_heads, shape.key_dim, shape.value_dim
    query = query.cpu().unflatten(0, (-1, group.steps))  # [sequences, steps, heads, dim]
    table, (firsts, lengths) = cache.host_table(layer), group.places
    found = None
    if not (cache.bits and shape.index_width):  # the kernel finds a row's scales behind codes of keys and values alone
        found = host_kernel.attend(table, firsts, lengths, query, dims, cache.dtype, cache.bits, rule.scaling, device)
    if found is not None:
        output, logsumexp = found
    else:
        output = query.new_empty(*query.shape[:3], shape.value_dim)
        logsumexp = torch.empty(query.shape[:3], dtype=torch.float32)
        for index, (first, length) in enumerate(zip(firsts.tolist(), lengths.tolist(), strict=True)):
            one, rows = slice(index, index + 1), cache.decoded(layer, table[first : first + length])
            keys, values = cache.unpack(layer, rows)  # [kv heads, length, dim]
            output[one], logsumexp[one] = by_torch(query[one], keys[None], values[None], rule.scaling)
    is_kept = accelerator.has_streams(device)  # until the copy has been made
    return output.flatten(0, 1).to(device, non_blocking=is_kept), logsumexp.flatten(0, 1).T
