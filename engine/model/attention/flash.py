"""Attention by FlashAttention kernels, where the card has them: no mask, no padding, no copy of a shared prefix."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from engine.memory.accelerator import has_flash_attention
from engine.model.attention import host_attention

if TYPE_CHECKING:
    from engine.batch.decode_group import DecodeGroup
    from engine.batch.micro_batch import MicroBatch
    from engine.model.attention.rule import Scores
    from engine.model.sweep_context import Sweeping

_MAX_HEAD_DIM = 256


def is_usable(query: torch.Tensor, value: torch.Tensor, scores: Scores, batch: MicroBatch) -> bool:
    """Whether the kernels can do it: CUDA from sm80 on, 16 bits, plain softmax, no window that cuts anything off."""
    has_them = has_kernels(query.device, query.dtype, query.shape[-1], value.shape[-1])
    return has_them and scores.is_stock_within(batch.longest)


@cache
def has_kernels(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether there are kernels for heads of these sizes on `device`."""
    return (
        has_flash_attention(device)
        and dtype in (torch.float16, torch.bfloat16)
        and key_dim == value_dim <= _MAX_HEAD_DIM
        and key_dim % 8 == 0
    )


def attend(
    batch: MicroBatch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sweeping: Sweeping,
    scores: Scores,
) -> torch.Tensor:
    """Attend a micro-batch: query, key, value `[rows, heads, dim]` -> `[rows, heads, dim]`.

    Own tokens first, all new spans in one call; then, per chain of prefixes, its rows against the prefix; the two are
    merged by their log-sum-exps, which is exact.
    """
    kv_cache, layer = sweeping.cache, sweeping.layer
    if not batch.chain_runs:  # often there is nothing to put together
        if not batch.decode_groups:
            return _varlen(query, key, value, batch.prefill_borders, batch.longest_prefill, scores)[0]
        if len(batch.decode_groups) == 1 and batch.prefill_first == len(query):
            return _own(batch.decode_groups[0], query, key, value, sweeping, scores)[0]
    if not batch.decode_groups:
        output, logsumexp = _varlen(query, key, value, batch.prefill_borders, batch.longest_prefill, scores)
    else:
        output = query.new_empty(query.shape)
        logsumexp = torch.empty(query.shape[1], len(query), dtype=torch.float32, device=query.device)

        def put(rows: slice, result: tuple[torch.Tensor, torch.Tensor]) -> None:
            output[rows] = result[0]
            if batch.chain_runs:
                logsumexp[:, rows] = result[1].to(query.device, non_blocking=True)

        for group in batch.decode_groups:
            rows = slice(group.first, group.end)
            put(rows, _own(group, query[rows], key[rows], value[rows], sweeping, scores))
        if batch.prefill_first < len(query):
            rows, borders = slice(batch.prefill_first, len(query)), batch.prefill_borders
            put(rows, _varlen(query[rows], key[rows], value[rows], borders, batch.longest_prefill, scores))
    for first, end, chain in batch.chain_runs:
        rows = slice(first, end)
        prefix_key, prefix_value = (x.transpose(0, 1)[None] for x in kv_cache.fork(layer, chain))
        shared, shared_logsumexp = _dense(query[rows][None], prefix_key, prefix_value, scores)
        merge(output[rows], logsumexp[:, rows], shared, shared_logsumexp)
    return output


def merge(output: torch.Tensor, logsumexp: torch.Tensor, shared: torch.Tensor, shared_logsumexp: torch.Tensor) -> None:
    """Let `output` `[rows, heads, dim]`, of the own tokens, be that of the prefix (`shared`) and the own ones.

    Log-sum-exps `[heads, rows]`; the weight of the prefix is its share of the sum of exponentials.
    """
    weight = torch.sigmoid(shared_logsumexp - logsumexp).T[:, :, None]
    output.lerp_(shared, weight.to(output.dtype))


def _own(
    group: DecodeGroup,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sweeping: Sweeping,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A decode group's rows against their own tokens, wherever those are: `[rows, heads, dim]`, `[heads, rows]`.

    The second result is where the keys and values are.
    """
    if sweeping.cache.is_attended_on_host(group):
        return host_attention.attend(group, query, sweeping.cache, sweeping.layer, scores)
    key, value = sweeping.cache.own_flat(sweeping.layer, group, key, value)
    return _decode(query, key, value, group, scores)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    result = torch.ops.aten._flash_attention_forward(
        query, key, value, borders, borders, longest, longest, 0.0, True, False, scale=scores.scaling
    )
    return result[0], result[1]


def _decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: DecodeGroup, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """New rows of each sequence against its own tokens: key, value `[rows, heads, dim]`, from its `own_borders` on.

    The kernel's causal mask is aligned with the last key, that is, with the last new row.
    """
    result = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        group.row_borders,
        group.own_borders,
        group.steps,
        group.length,
        0.0,
        group.steps > 1,
        False,
        scale=scores.scaling,
        seqused_k=group.own_lengths,
    )
    return result[0], result[1]


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows `[1, rows, heads, dim]` against all of a prefix `[1, length, heads, dim]`."""
    rows, length = query.shape[1], key.shape[1]
    result = torch.ops.aten._flash_attention_forward(
        query, key, value, None, None, rows, length, 0.0, False, False, scale=scores.scaling
    )
    return result[0][0], result[1][0]
