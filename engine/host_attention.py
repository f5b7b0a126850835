"""Attention of decode steps on the host: over keys and values that stay where they are, in their own type."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from engine.fused import Fused

if TYPE_CHECKING:
    from engine.batch import DecodeGroup
    from engine.kv_cache import KVCache
    from engine.scores import Scores


def attend(
    group: DecodeGroup, query: torch.Tensor, cache: KVCache, layer: int, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the new rows of a decode group to their own tokens, by plain softmax, without windows.

    query `[rows, heads, dim]` -> `[rows, heads, dim]`, and float32 log-sum-exps `[heads, rows]`; all on the host.
    """
    query = query.unflatten(0, (-1, group.steps))  # [sequences, steps, heads, dim]
    output = query.new_empty(*query.shape[:3], cache.shapes[layer].value_dim)
    logsumexp = torch.empty(query.shape[:3], dtype=torch.float32)
    for first, rows in cache.in_place(layer, group):
        taken = slice(first, first + len(rows))
        keys, values = cache.unpack(layer, rows)  # [sequences, kv heads, length, dim]
        output[taken], logsumexp[taken] = attention(query[taken], keys, values, scores.scaling)
    return output.flatten(0, 1), logsumexp.flatten(0, 1).T


def _in_two_passes(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend queries `[sequences, steps, heads, dim]` to keys and values `[sequences, kv heads, length, dim]`.

    Returns `[sequences, steps, heads, dim]` and float32 log-sum-exps `[sequences, steps, heads]`. These are elementwise
    operations and sums: compiled, they are one pass over the keys and one over the values, at the rate of the memory.
    """
    steps, heads, kv_heads, length = query.shape[1], query.shape[2], keys.shape[1], keys.shape[2]
    # The heads of one group of queries share keys and values: they become further rows.
    query = query.unflatten(2, (kv_heads, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    dots = (query[:, :, None].float() * keys[:, :, :, None].float()).sum(-1) * scaling  # [s, kv heads, length, rows]
    if steps > 1:  # of the new tokens, each sees those up to itself
        row = torch.arange(steps).repeat_interleave(heads // kv_heads)
        dots = dots.masked_fill(torch.arange(length)[:, None] > length - steps + row, -math.inf)
    highest = dots.amax(2, keepdim=True)
    weights = (dots - highest).exp()
    total = weights.sum(2, keepdim=True)
    result = ((weights / total)[..., None] * values[:, :, :, None].float()).sum(2).to(values.dtype)
    logsumexp = (highest + total.log())[:, :, 0]
    return (
        result.unflatten(2, (steps, -1)).transpose(1, 2).flatten(2, 3),
        logsumexp.unflatten(2, (steps, -1)).transpose(1, 2).flatten(2, 3),
    )


def by_kernel(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the kernel of `scaled_dot_product_attention`, which in 16 bits is fast only on CPUs with AMX."""
    steps, copies = query.shape[1], query.shape[2] // keys.shape[1]
    if copies > 1:
        keys, values = keys.repeat_interleave(copies, dim=1), values.repeat_interleave(copies, dim=1)
    mask = None
    if steps > 1:
        seen = torch.ones(steps, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - steps)
        mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill_(~seen, -math.inf)
    result, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(1, 2), keys, values, 0.0, False, attn_mask=mask, scale=scaling
    )
    return result.transpose(1, 2), logsumexp.transpose(1, 2)


attention = Fused(_in_two_passes, ("cpu",), otherwise=by_kernel)
"""Whichever of the two there is: the first needs a C++ compiler."""
