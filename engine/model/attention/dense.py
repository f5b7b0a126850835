"""Attention by plain torch: any rule, any device, with masks and gathered keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.batch.decode_group import DecodeGroup
from engine.batch.prefill_group import PrefillGroup
from engine.model.attention import host_attention
from engine.model.attention.backend import Attending, AttentionBackend
from engine.model.attention.rule import products


class Dense(AttentionBackend):
    """Supports every rule, by `scaled_dot_product_attention` where possible, else with explicit scores."""

    def can(self, asked: Attending) -> bool:
        """Always."""
        return True

    def prefill(self, asked: Attending) -> torch.Tensor:
        """Compute group by group, with a mask over [prefix | own] where one is needed."""
        parts = [_prefill(asked, group) for group in asked.batch.prefill_groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode(self, asked: Attending) -> torch.Tensor:
        """Compute group by group, on the host where the policy says so."""
        parts = [self._decode(asked, group) for group in asked.batch.decode_groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def _decode(asked: Attending, group: DecodeGroup) -> torch.Tensor:
        on_host = asked.cache.is_attended_on_host(group) and not group.chain
        if on_host and asked.rule.is_stock_within(asked.batch.longest):
            rows = asked.query[group.first : group.end]
            return host_attention.attend(group, rows, asked.cache, asked.layer, asked.rule)[0]
        return _decode(asked, group)


def _prefill(asked: Attending, group: PrefillGroup) -> torch.Tensor:
    """The result for the rows of `group`, `[rows, heads, dim]`."""
    rows = slice(group.first, group.end)
    size = (group.end - group.first) // group.num_parts
    rule, groups = asked.rule, asked.groups
    # [parts, heads, rows of a part, dim]
    query, key, value = (
        x[rows].unflatten(0, (-1, size)).transpose(1, 2) for x in (asked.query, asked.key, asked.value)
    )
    heads = key.shape[1]
    if not group.chain and rule.is_stock_within(size):
        whole = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=rule.scaling, enable_gqa=groups > 1
        )
        return whole.transpose(1, 2).flatten(0, 1)
    if group.chain:
        prefix_key, prefix_value = asked.cache.fork(asked.layer, group.chain)
        key, value = torch.cat((prefix_key[None], key), dim=2), torch.cat((prefix_value[None], value), dim=2)
    # The heads of one group of queries share keys and values: they become further rows, and nothing is copied.
    query = query.unflatten(1, (heads, groups)).flatten(2, 3)
    result: torch.Tensor
    if rule.is_stock:
        mask = group.mask(rule.reach, query.dtype, groups)
        result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rule.scaling)
    else:
        dots = products(query, key).unflatten(2, (groups, -1)).flatten(1, 2)  # sinks differ from head to head
        weights = rule.weights(dots, group.mask(rule.reach, torch.float32, 1)).to(value.dtype)
        result = weights.unflatten(1, (heads, groups)).flatten(2, 3) @ value
    unfolded: torch.Tensor = result.unflatten(2, (groups, -1)).flatten(1, 2)
    return unfolded.transpose(1, 2).flatten(0, 1)


def _decode(asked: Attending, group: DecodeGroup) -> torch.Tensor:
    """The result for the new rows of the sequences of `group`, `[rows, heads, dim]`, on the device."""
    taken = slice(group.first, group.end)
    device = torch.device("cpu") if asked.cache.is_attended_on_host(group) else asked.query.device
    # [sequences, kv heads, length, dim]
    key, value = asked.cache.own(asked.layer, group, *asked.new(taken))
    query = asked.query[taken].to(device)
    heads, groups = key.shape[1], asked.groups
    # As in a prefill, what shares keys and values becomes rows: [sequences, kv heads, groups * steps, dim].
    query = query.unflatten(0, (-1, group.steps)).unflatten(2, (heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    copies = query.shape[2]
    dots = products(query, key)
    start = 0
    if group.chain:
        prefix = asked.cache.fork(asked.layer, group.chain)
        prefix_key, prefix_value = (x.to(device) for x in prefix)  # [kv heads, prefix, dim]
        start = prefix_key.shape[1]
        # All sequences against the one prefix: [kv heads, sequences * groups * steps, dim] @ [kv heads, dim, prefix].
        flat = query.transpose(0, 1).flatten(1, 2)
        shared = products(flat, prefix_key).unflatten(1, (-1, copies)).transpose(0, 1)
        dots = torch.cat((shared, dots), dim=-1)
    by_head = dots.unflatten(2, (groups, group.steps)).flatten(1, 2)  # [sequences, heads, steps, keys]
    weights = asked.rule.weights(by_head, group.mask(asked.rule.reach).to(device)[:, None])
    weights = weights.to(value.dtype).view_as(dots)
    result: torch.Tensor = weights[..., start:] @ value
    if group.chain:
        flat = weights[..., :start].transpose(0, 1).flatten(1, 2)
        result = result + (flat @ prefix_value).unflatten(1, (-1, copies)).transpose(0, 1)
    # [sequences, steps, kv heads, groups, dim]
    result = result.unflatten(2, (groups, group.steps)).permute(0, 3, 1, 2, 4)
    return result.flatten(2, 3).flatten(0, 1).to(asked.query.device)
