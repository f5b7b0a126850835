"""Prefill by the CPU's FlashAttention kernel: own tokens, then the shared prefix, merged by their log-sum-exps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.model.attention.flash import merge

if TYPE_CHECKING:
    from engine.batch.micro_batch import MicroBatch
    from engine.batch.prefill_group import PrefillGroup
    from engine.model.attention.rule import Scores
    from engine.model.sweep_context import Sweeping


def is_usable(query: torch.Tensor, value: torch.Tensor, scores: Scores, batch: MicroBatch) -> bool:
    """Whether the kernel can do it: heads of one size, plain softmax, no window that cuts anything off."""
    is_on_cpu, same_size = query.device.type == "cpu", query.shape[-1] == value.shape[-1]
    return is_on_cpu and same_size and scores.is_stock_within(batch.longest)


def prefill(
    batch: MicroBatch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sweeping: Sweeping,
    scores: Scores,
    output: torch.Tensor,
) -> None:
    """Attend the new spans of a micro-batch: query, key, value `[rows, heads, dim]` -> those rows of `output`.

    A mask over [prefix | own] would cost as much again for scores that it hides: rows of the spans beside.
    """
    logsumexp = torch.empty(query.shape[1], len(query), dtype=torch.float32)
    for group in batch.own_groups:
        rows = slice(group.first, group.end)
        output[rows], logsumexp[:, rows] = _own(group, query[rows], key[rows], value[rows], scores)
    for first, end, chain in batch.chain_runs:
        if first < batch.prefill_first:
            continue
        rows = slice(first, end)
        prefix_key, prefix_value = sweeping.cache.fork(sweeping.layer, chain)  # [kv heads, length, dim]
        shared, shared_logsumexp = _dense(query[rows], prefix_key, prefix_value, scores)
        merge(output[rows], logsumexp[:, rows], shared, shared_logsumexp)


def _own(
    group: PrefillGroup, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[rows, heads, dim]` against those of their own span: `[rows, heads, dim]`, log-sum-exps `[heads, rows]`."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    # [parts, heads, rows of a part, dim]
    query, key, value = (x.unflatten(0, (group.num_parts, -1)).transpose(1, 2) for x in (query, key, value))
    mask = None if group.is_causal else group.mask(None, query.dtype, 1)
    result, logsumexp = _attend(query, key, value, group.is_causal, mask, scores)
    return result.transpose(1, 2).flatten(0, 1), logsumexp.transpose(0, 1).flatten(1, 2)


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows `[rows, heads, dim]` against all of a prefix `[kv heads, length, dim]`; as `_own` returns it."""
    heads, groups = key.shape[0], query.shape[1] // key.shape[0]
    # The heads of one group of queries share keys and values: they become further rows, and nothing is copied.
    folded = query.transpose(0, 1).unflatten(0, (heads, groups)).flatten(1, 2)
    result, logsumexp = _attend(folded[None], key[None], value[None], False, None, scores)
    unfolded = result[0].unflatten(1, (groups, -1)).flatten(0, 1)
    return unfolded.transpose(0, 1), logsumexp[0].unflatten(1, (groups, -1)).flatten(0, 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    mask: torch.Tensor | None,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `scaled_dot_product_attention` calls, for its second result: float32 log-sum-exps `[…, heads, rows]`."""
    result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scores.scaling
    )
    return result[0], result[1]
