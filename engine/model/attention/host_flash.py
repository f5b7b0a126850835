"""Prefill on the CPU: in one pass over shared prefix and own tokens, or by torch's FlashAttention kernel for each."""

from __future__ import annotations

import torch

from engine.batch.prefill_group import PrefillGroup
from engine.batch.reach import Reach
from engine.kernels.elementwise.merges import merge
from engine.kernels.host import prompts
from engine.model.attention.backend import Attending
from engine.model.attention.dense import Dense
from engine.model.attention.rule import AttentionRule
from engine.schedule.sequence import Prefix


class HostFlash(Dense):
    """Plain softmax on the CPU, without a mask over [prefix | own], whose masked scores would cost as much again.

    Decode steps use `Dense`.
    """

    def can(self, asked: Attending) -> bool:
        """On the CPU, with heads of one size, plain softmax, and no window that cuts anything off."""
        is_on_cpu, same_size = asked.query.device.type == "cpu", asked.query.shape[-1] == asked.value.shape[-1]
        return is_on_cpu and same_size and asked.rule.is_stock_within(asked.batch.longest)

    def prefill(self, asked: Attending) -> torch.Tensor:
        """With our kernel in float32; else own tokens of all new spans, then each chain for all spans that continue it.

        The two results are merged by their log-sum-exps.
        """
        batch, query, key, value, rule = asked.batch, asked.query, asked.key, asked.value, asked.rule
        start = batch.prefill_first
        if query.dtype == torch.float32:
            runs = [prompts.Run(borders, _prefix(asked, chain)) for borders, chain in batch.prefill_runs]
            found = prompts.attend(query[start:], key[start:], value[start:], runs, rule.scaling)
            if found is not None:
                return found
        output = query.new_empty(len(query) - start, *query.shape[1:])
        logsumexp = torch.empty(query.shape[1], len(output), dtype=torch.float32)
        for group in batch.own_groups:
            rows, place = slice(group.first, group.end), slice(group.first - start, group.end - start)
            output[place], logsumexp[:, place] = _own(group, query[rows], key[rows], value[rows], rule)
        for first, end, chain in batch.prefill_chains:
            place = slice(first - start, end - start)
            prefix_key, prefix_value = asked.cache.fork(asked.layer, chain)  # [kv heads, length, dim]
            shared, shared_logsumexp = _whole(query[first:end], prefix_key, prefix_value, rule)
            merge(output[place], logsumexp[:, place], shared, shared_logsumexp)
        return output


def _prefix(asked: Attending, chain: tuple[Prefix, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
    return asked.cache.fork_flat(asked.layer, [chain]) if chain else None


def _own(
    group: PrefillGroup, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: AttentionRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[rows, heads, dim]` against their own span: `[rows, heads, dim]`, log-sum-exps `[heads, rows]`."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    # [parts, heads, rows of a part, dim]
    query, key, value = (x.unflatten(0, (group.num_parts, -1)).transpose(1, 2) for x in (query, key, value))
    mask = None if group.is_causal else group.mask(Reach(), query.dtype, 1)
    result, logsumexp = _attend(query, key, value, group.is_causal, mask, rule)
    return result.transpose(1, 2).flatten(0, 1), logsumexp.transpose(0, 1).flatten(1, 2)


def _whole(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: AttentionRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows `[rows, heads, dim]` against all of a prefix `[kv heads, length, dim]`; returns what `_own` returns."""
    heads, groups = key.shape[0], query.shape[1] // key.shape[0]
    # The heads of one group of queries share keys and values: they become further rows, and nothing is copied.
    folded = query.transpose(0, 1).unflatten(0, (heads, groups)).flatten(1, 2)
    result, logsumexp = _attend(folded[None], key[None], value[None], False, None, rule)
    unfolded = result[0].unflatten(1, (groups, -1)).flatten(0, 1)
    return unfolded.transpose(0, 1), logsumexp[0].unflatten(1, (groups, -1)).flatten(0, 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    mask: torch.Tensor | None,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel of `scaled_dot_product_attention`, with its second result: float32 log-sum-exps `[…, heads, rows]`."""
    result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=rule.scaling
    )
    return result[0], result[1]
