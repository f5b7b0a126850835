"""Attention by FlashAttention kernels, where the GPU has them: no mask, no padding, no copy of a shared prefix."""

from __future__ import annotations

from functools import cache

import torch

from engine.batch.decode_group import DecodeGroup
from engine.batch.prefix_group import PrefixGroup
from engine.kernels.elementwise.merges import merge
from engine.memory.accelerator import has_flash_attention
from engine.model.attention import host_attention
from engine.model.attention.backend import Attending, AttentionBackend
from engine.model.attention.rule import AttentionRule

_MAX_HEAD_DIM = 256


class Flash(AttentionBackend):
    """Plain softmax on CUDA from sm80 on, in 16 bits.

    Rows attend to own tokens first; then the rows that continue prefixes attend to those, several chains at once; the
    two results are merged by their log-sum-exps, which is exact.
    """

    def can(self, asked: Attending) -> bool:
        """Whether the GPU has kernels for these heads, softmax is plain, and no window cuts anything off."""
        query, value = asked.query, asked.value
        has_them = has_kernels(query.device, query.dtype, query.shape[-1], value.shape[-1])
        return has_them and asked.rule.is_stock_within(asked.batch.longest)

    def prefill(self, asked: Attending) -> torch.Tensor:
        """All new spans in one call, then their prefixes."""
        batch, start = asked.batch, asked.batch.prefill_first
        query, key, value = (x[start:] for x in (asked.query, asked.key, asked.value))
        output, logsumexp = _own_new(asked, query, key, value)
        _merge_prefixes(asked, batch.prefill_prefixes, output, logsumexp, start)
        return output

    def decode(self, asked: Attending) -> torch.Tensor:
        """Each group's own tokens, on device or host, then their prefixes."""
        batch, query = asked.batch, asked.query
        if len(batch.decode_groups) == 1:
            output, logsumexp = _own(asked, batch.decode_groups[0])
        else:
            output = query.new_empty(batch.prefill_first, *query.shape[1:])
            logsumexp = torch.empty(query.shape[1], len(output), dtype=torch.float32, device=query.device)
            for group in batch.decode_groups:
                rows = slice(group.first, group.end)
                output[rows], of_group = _own(asked, group)
                if batch.decode_chains:
                    logsumexp[:, rows] = of_group.to(query.device, non_blocking=True)
        _merge_prefixes(asked, batch.decode_prefixes, output, logsumexp, 0)
        return output


@cache
def has_kernels(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether there are kernels for heads of these sizes on `device`."""
    return (
        has_flash_attention(device)
        and dtype in (torch.float16, torch.bfloat16)
        and key_dim == value_dim <= _MAX_HEAD_DIM
        and key_dim % 8 == 0
    )


def _merge_prefixes(
    asked: Attending, groups: list[PrefixGroup], output: torch.Tensor, logsumexp: torch.Tensor, start: int
) -> None:
    """Merge the attention of rows to their prefixes into `output`, whose first row is the micro-batch's row `start`."""
    if groups:
        logsumexp = logsumexp.to(output.device, non_blocking=True)  # that of attention on the host is there
    for group in groups:
        place = slice(group.first - start, group.end - start)
        key, value = asked.cache.fork_flat(asked.layer, group.chains)
        query = asked.query[group.first : group.end]
        if len(group.chains) == 1:  # with few rows, its kernel shares out a long prefix
            shared, shared_logsumexp = _whole(query, key, value, asked.rule)
        else:
            borders, longest = (group.row_borders, group.prefix_borders), (group.longest, group.longest_prefix)
            shared, shared_logsumexp = attend_parts(query, key, value, borders, longest, asked.rule, is_causal=False)
        merge(output[place], logsumexp[:, place], shared, shared_logsumexp)


def _own(asked: Attending, group: DecodeGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """A decode group's rows against their own tokens, on device or host: `[rows, heads, dim]`, `[heads, rows]`.

    The second result is on the device of the keys and values.
    """
    rows = slice(group.first, group.end)
    if asked.cache.is_attended_on_host(group):
        return host_attention.attend(group, asked.query[rows], asked.cache, asked.layer, asked.rule)
    key, value = asked.cache.own_flat(asked.layer, group, *asked.new(rows))
    return _decode(asked.query[rows], key, value, group, asked.rule)


def _own_new(
    asked: Attending, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of new spans, each against its own span: `[rows, heads, dim]`, `[heads, rows]`."""
    borders, longest = asked.batch.prefill_borders, asked.batch.longest_prefill
    return attend_parts(query, key, value, (borders, borders), (longest, longest), asked.rule, is_causal=True)


def attend_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    rule: AttentionRule,
    *,
    is_causal: bool,
    lengths: torch.Tensor | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of parts of the rows to parts of the keys, given by `borders` of both; `longest`: the largest parts.

    Queries, keys and values `[rows, heads, dim]` -> `[rows, heads, dim]` and log-sum-exps `[heads, rows]`. Where parts
    of the keys are followed by unused rows, `lengths` are their lengths. The kernel's causal mask, and a window of so
    many keys, are aligned with the last key of a part, that is, with its last row.
    """
    windows = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    result = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        *borders,
        *longest,
        0.0,
        is_causal,
        False,
        scale=rule.scaling,
        seqused_k=lengths,
        **windows,
    )
    return result[0], result[1]


def _decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: DecodeGroup, rule: AttentionRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """New rows of each sequence against its own tokens: key, value `[rows, heads, dim]`, from its `own_borders` on."""
    borders, longest = (group.row_borders, group.own_borders), (group.steps, group.length)
    is_causal = group.steps > 1
    return attend_parts(query, key, value, borders, longest, rule, is_causal=is_causal, lengths=group.own_lengths)


def _whole(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: AttentionRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows `[rows, heads, dim]` against all of a prefix `[length, heads, dim]`."""
    rows, length = query.shape[0], key.shape[0]
    result = torch.ops.aten._flash_attention_forward(
        query[None], key[None], value[None], None, None, rows, length, 0.0, False, False, scale=rule.scaling
    )
    return result[0][0], result[1][0]
