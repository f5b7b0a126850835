"""Attention of decode steps whose contexts are described by tensors alone, as recorded calls need it."""

from __future__ import annotations

import torch

from engine.batch.step_batch import StepBatch
from engine.cache.key_value import KVCache
from engine.model.attention.flash import attend_parts
from engine.model.attention.rule import AttentionRule


def attend_steps(
    query: torch.Tensor, batch: StepBatch, cache: KVCache, layer: int, rule: AttentionRule
) -> torch.Tensor:
    """Plain softmax by FlashAttention: query `[rows, heads, dim]` -> `[rows, heads, value dim]`.

    Rows attend to own tokens first, then to the prefixes of each level; results are merged by their log-sum-exps. Every
    sequence reads its prefixes in place and for itself, since a call's shapes do not tell which sequences share one.
    """
    key, value = cache.device_table(layer)
    output, logsumexp = _attend(query, key, value, batch, 0, rule)
    for level in range(1, batch.shape.levels + 1):
        shared, of_shared = _attend(query, key, value, batch, level, rule)
        of_shared = of_shared.masked_fill(~batch.present[level], float("-inf"))
        weight = torch.sigmoid(of_shared - logsumexp).T[:, :, None]
        output.lerp_(shared, weight.to(output.dtype))
        logsumexp = torch.logaddexp(logsumexp, of_shared)
    return output


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: StepBatch, level: int, rule: AttentionRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row against a level of its context: `[rows, heads, dim]`, log-sum-exps `[heads, rows]`."""
    borders = batch.row_borders, batch.firsts[level]
    longest, lengths = (1, batch.shape.length), batch.lengths[level]
    return attend_parts(query, key, value, borders, longest, rule, is_causal=False, lengths=lengths)
