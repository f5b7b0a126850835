"""Sparse attention by plain torch: each row attends to the keys that an indexer chooses for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.cache.key_value import pack
from engine.model.attention.backend import Attending, AttentionBackend
from engine.model.attention.rule import products
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix

_SCORE_COPIES = 3
"""The number of float32 copies of the scores held at once: raw, scaled and masked, and their weights."""


class Sparse(AttentionBackend):
    """Supports every rule where a context has more keys than are chosen, one sequence at a time.

    Rows are taken in blocks, so that their scores take no more memory than logits may, which come later.
    """

    def can(self, asked: Attending) -> bool:
        """Whether keys are chosen, and some context has more of them."""
        return asked.choice is not None and asked.batch.longest > asked.choice.top_k

    def prefill(self, asked: Attending) -> torch.Tensor:
        """Compute span by span; rows of padding get zeros."""
        first = asked.batch.prefill_first
        result = asked.query.new_zeros(len(asked.query) - first, asked.query.shape[1], asked.value.shape[2])
        chain: tuple[Prefix, ...] = ()
        before: list[torch.Tensor] = []
        for segment in (each for each in asked.batch.segments if not each.is_decode):
            if segment.span.chain != chain:
                chain = segment.span.chain
                before = [asked.cache.prefix_rows(asked.layer, chain)] if chain else []
            rows = slice(segment.first, segment.first + segment.num_rows)
            context = torch.cat([*before, pack(*asked.new(rows))])
            result[rows.start - first : rows.stop - first] = _attend(asked, segment, context)
        return result

    def decode(self, asked: Attending) -> torch.Tensor:
        """Compute sequence by sequence, on the device: the cache gathers a group's own tokens."""
        parts = []
        for group in asked.batch.decode_groups:
            own = asked.cache.own_rows(asked.layer, group, *asked.new(slice(group.first, group.end)))
            before = [asked.cache.prefix_rows(asked.layer, group.chain)] if group.chain else []
            for segment, rows in zip(group.segments, own, strict=True):
                rows = rows[: segment.past + segment.num_rows].to(asked.query.device)
                parts.append(_attend(asked, segment, torch.cat([*before, rows])))
        return torch.cat(parts)


def _attend(asked: Attending, segment: Segment, context: torch.Tensor) -> torch.Tensor:
    """Attention of a segment's rows to the chosen tokens of `context`: `[rows, heads, value dim]`.

    context: the tokens up to the last of the rows, as the cache stores them, `[tokens, width]`.
    """
    choice = asked.choice
    assert choice is not None
    index = asked.cache.index_keys(asked.layer, context) if choice.layer == asked.layer else None
    key, value = asked.cache.unpack(asked.layer, context)  # [kv heads, tokens, dim]
    row_bytes = len(context) * max(choice.score_bytes, 4 * _SCORE_COPIES * asked.query.shape[1])
    at_once = max(1, asked.batch.most_score_bytes // row_bytes)
    parts = []
    for first in range(0, segment.num_rows, at_once):
        end = min(first + at_once, segment.num_rows)
        length = len(context) - segment.num_rows + end
        positions = torch.arange(length, device=context.device)
        seen = asked.rule.reach.sees(positions[length - (end - first) :, None], positions)
        chosen = choice.mask(segment, first, end, index, hands_on=asked.hands_on)
        by_group = seen[None] if chosen is None else seen & chosen
        num_heads = asked.query.shape[1]
        if len(by_group) == 1:
            by_head = by_group.expand(num_heads, -1, -1)
        else:
            by_head = by_group.repeat_interleave(num_heads // len(by_group), dim=0)
        query = asked.query[segment.first + first : segment.first + end]
        parts.append(_attend_some(asked, query, key[:, :length], value[:, :length], by_head))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_some(
    asked: Attending, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """Rows `[rows, heads, dim]` with mask bool `[heads, rows, tokens]` over keys and values `[kv heads, …]`."""
    rule, heads, groups = asked.rule, key.shape[0], asked.groups
    # The heads of one group of queries share keys and values: they become further rows, and nothing is copied.
    folded = query.transpose(0, 1).unflatten(0, (heads, groups)).flatten(1, 2)  # [kv heads, groups * rows, dim]
    if rule.is_stock:
        mask = seen.unflatten(0, (heads, groups)).flatten(1, 2)[None]
        result = F.scaled_dot_product_attention(folded[None], key[None], value[None], mask, scale=rule.scaling)[0]
    else:
        by_head = products(folded, key).unflatten(1, (groups, -1)).flatten(0, 1)  # [heads, rows, tokens]
        mask = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))
        weights = rule.weights(by_head, mask).to(value.dtype)
        result = weights.unflatten(0, (heads, groups)).flatten(1, 2) @ value
    rows: torch.Tensor = result.unflatten(1, (groups, -1)).flatten(0, 1).transpose(0, 1)
    return rows
