"""Batch-invariant attention by plain torch, for any rule and device: contexts are processed in blocks."""

from __future__ import annotations

import itertools

import torch

from engine.batch.context_group import ContextGroup
from engine.batch.decode_group import DecodeGroup
from engine.kernels.invariant.mode import plain_arithmetic
from engine.model.attention.backend import Attending, AttentionBackend
from engine.model.attention.rule import AttentionRule, products

_BLOCK = 128
"""The number of tokens of a block; blocks begin at its multiples, wherever a prefix ends."""

_Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""


class Blockwise(AttentionBackend):
    """Supports every rule, so that a row's result depends on its query and its context alone.

    Scores, weights and sums are made block by block; blocks that a row does not see do not change its result. Within a
    block the arithmetic is that of the current mode (`BatchInvariant`).
    """

    def can(self, asked: Attending) -> bool:
        """Whether results must be batch-invariant."""
        return asked.is_batch_invariant

    def prefill(self, asked: Attending) -> torch.Tensor:
        """Compute span by span."""
        parts = [part for group in asked.batch.context_groups(None) for part in _prefill(asked, group)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode(self, asked: Attending) -> torch.Tensor:
        """Compute group by group, on the host where the policy says so."""
        parts = [decode_in_blocks(asked, group) for group in asked.batch.decode_groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _prefill(asked: Attending, group: ContextGroup) -> list[torch.Tensor]:
    with plain_arithmetic():
        prefix = asked.cache.fork(asked.layer, group.chain) if group.chain else None
    start = 0 if prefix is None else prefix[0].shape[1]
    borders = (group.row_borders + group.first).tolist()
    results = []
    for first, end in itertools.pairwise(borders):
        rows = slice(first, end)
        own = asked.key[rows].transpose(0, 1)[None], asked.value[rows].transpose(0, 1)[None]
        positions = torch.arange(start, start + end - first, device=asked.query.device)[None]
        results.append(_attend(asked.query[rows][None], positions, prefix, own, asked.rule)[0])
    return results


def decode_in_blocks(asked: Attending, group: DecodeGroup) -> torch.Tensor:
    """The result for the new rows of the sequences of `group`, `[rows, heads, value dim]`."""
    rows = slice(group.first, group.end)
    device = torch.device("cpu") if asked.cache.is_attended_on_host(group) else asked.query.device
    with plain_arithmetic():
        # [sequences, kv heads, length, dim]
        own = asked.cache.own(asked.layer, group, *asked.new(rows))
        prefix, start = None, 0
        if group.chain:
            key, value = asked.cache.fork(asked.layer, group.chain)
            prefix, start = (key.to(device), value.to(device)), key.shape[1]
    query = asked.query[rows].to(device).unflatten(0, (-1, group.steps))
    positions = start + group.past.to(device)[:, None] + torch.arange(group.steps, device=device)
    return _attend(query, positions, prefix, own, asked.rule).flatten(0, 1).to(asked.query.device)


def _attend(
    query: torch.Tensor, positions: torch.Tensor, prefix: _Pair | None, own: _Pair, rule: AttentionRule
) -> torch.Tensor:
    """Rows of sequences `[sequences, rows, heads, dim]` at `positions` `[sequences, rows]`: the same shape.

    Keys and values: of the prefix `[kv heads, length, dim]`, which all continue, and of own tokens `[sequences, kv
    heads, length, dim]`; those after a row's position are not seen.
    """
    count, num_rows, _, _ = query.shape
    heads = own[0].shape[1]
    groups = query.shape[2] // heads
    # The heads of one group of queries share keys and values: they become further rows.
    query = query.unflatten(2, (heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    positions = positions.repeat(1, groups)[:, None, :, None]  # [sequences, 1, rows, 1]
    start = 0 if prefix is None else prefix[0].shape[1]
    shared = start - start % _BLOCK
    rest = tuple(_in_blocks(x, None if prefix is None else prefix[i][:, shared:]) for i, x in enumerate(own))
    most = query.new_full((*query.shape[:3], 1), float("-inf"), dtype=torch.float32)
    sums = torch.zeros_like(most)
    result = query.new_zeros(*query.shape[:3], own[1].shape[-1], dtype=torch.float32)
    for first in range(0, shared + rest[0].shape[2], _BLOCK):
        if first < shared:
            assert prefix is not None
            key, value = (x[None, :, first : first + _BLOCK] for x in prefix)
        else:
            key, value = (x[:, :, first - shared : first - shared + _BLOCK] for x in rest)
        scores = _by_head(query, key.mT) * rule.scaling
        if rule.softcap is not None:
            scores = torch.tanh(scores / rule.softcap) * rule.softcap
        at = torch.arange(first, first + _BLOCK, device=query.device)
        with plain_arithmetic():
            seen = rule.reach.sees(positions, at)
        scores = scores.masked_fill(~seen, float("-inf"))
        higher = torch.maximum(most, scores.amax(-1, keepdim=True))
        base = higher.masked_fill(higher == float("-inf"), 0.0)  # of a row that has seen nothing yet
        weights, kept = torch.exp(scores - base), torch.exp(most - base)
        sums = sums * kept + weights.sum(-1, keepdim=True)
        result = result * kept + _by_head(weights.to(value.dtype), value)
        most = higher
    if rule.sinks is not None:
        sinks = rule.sinks.to(query.device, torch.float32).view(heads, groups, 1).expand(-1, -1, num_rows)
        sinks = sinks.reshape(1, heads, -1, 1)
        higher = torch.maximum(most, sinks)
        kept = torch.exp(most - higher)
        sums, result = sums * kept + torch.exp(sinks - higher), result * kept
    by_head: torch.Tensor = (result / sums).to(query.dtype).unflatten(2, (groups, num_rows))
    return by_head.permute(0, 3, 1, 2, 4).reshape(count, num_rows, heads * groups, -1)


def _in_blocks(own: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Own keys or values after the remainder of the prefix's last block, padded to whole blocks."""
    parts = [own] if before is None else [before[None].expand(own.shape[0], -1, -1, -1), own]
    length = sum(part.shape[2] for part in parts)
    parts.append(own.new_zeros(own.shape[0], own.shape[1], -length % _BLOCK, own.shape[3]))
    return torch.cat(parts, dim=2)


def _by_head(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`[sequences, heads, rows, k]` times `[sequences or 1, heads, k, n]` -> float32 `[sequences, heads, rows, n]`."""
    count, heads = left.shape[:2]
    found: torch.Tensor
    if right.shape[0] == count:
        found = products(left.flatten(0, 1), right.flatten(0, 1).mT).unflatten(0, (count, heads))
    else:
        rows = left.transpose(0, 1).flatten(1, 2)
        found = products(rows, right[0].mT).unflatten(1, (count, -1)).transpose(0, 1)
    return found
