"""Batch-invariant attention by FlashAttention kernels: each row attends to its whole context in one pass."""

from __future__ import annotations

import torch

from engine.batch.decode_group import DecodeGroup
from engine.kernels.invariant.mode import plain_arithmetic
from engine.model.attention.backend import Attending, AttentionBackend
from engine.model.attention.blockwise import decode_in_blocks
from engine.model.attention.context_flash import attend, attend_contexts
from engine.model.attention.flash import has_kernels


class WholeFlash(AttentionBackend):
    """Plain softmax on CUDA from sm80 on, in 16 bits, with batch-invariant results.

    The kernel takes a context block by block from its first token on, and what a row does not see adds nothing; so a
    row's result depends on its context alone, if that is one piece: prefixes are gathered in front of own tokens.
    (Merging two results rounds otherwise than one pass, and the kernel for single rows splits contexts by their
    number.)
    """

    def can(self, asked: Attending) -> bool:
        """Whether the GPU has kernels for these heads, softmax is plain, and there is no window."""
        query, value, rule = asked.query, asked.value, asked.rule
        has_them = has_kernels(query.device, query.dtype, query.shape[-1], value.shape[-1])
        return asked.is_batch_invariant and has_them and rule.is_stock and rule.reach.is_whole

    def prefill(self, asked: Attending) -> torch.Tensor:
        """Compute group by group, each row against the context of its span."""
        with plain_arithmetic():
            parts = [attend_contexts(asked, group)[0] for group in asked.batch.context_groups(None)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode(self, asked: Attending) -> torch.Tensor:
        """Compute group by group, on the host where the policy says so."""
        parts = []
        for group in asked.batch.decode_groups:
            if asked.cache.is_attended_on_host(group):
                parts.append(decode_in_blocks(asked, group))
            else:
                with plain_arithmetic():
                    parts += _decode(asked, group)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(asked: Attending, group: DecodeGroup) -> list[torch.Tensor]:
    rows = slice(group.first, group.end)
    query = asked.query[rows]
    if not group.chain:
        table = asked.cache.own_flat(asked.layer, group, *asked.new(rows))
        where, most = (group.row_borders, group.own_borders), (group.steps, group.length)
        return [attend(query, *table, where, most, asked.rule, group.own_lengths)[0]]
    prefix = [x[None] for x in asked.cache.fork(asked.layer, group.chain)]  # [1, kv heads, prefix, dim]
    start = prefix[0].shape[2]
    own = asked.cache.own(asked.layer, group, *asked.new(rows))  # [sequences, kv heads, length, dim]
    at_once = max(1, asked.batch.most_gathered_rows // (start + group.length))
    results = []
    for first in range(0, len(group.segments), at_once):
        part = slice(first, first + at_once)
        key, value = (  # [sequences * (prefix + length), kv heads, dim]
            torch.cat((shared.expand(len(x[part]), -1, -1, -1), x[part]), dim=2).transpose(1, 2).flatten(0, 1)
            for shared, x in zip(prefix, own, strict=True)
        )
        lengths = group.own_lengths[part] + start
        borders = torch.arange(len(lengths) + 1, dtype=torch.int32, device=query.device)
        sizes = group.steps, start + group.length
        given = query[first * group.steps : (first + len(lengths)) * group.steps]
        both = borders * group.steps, borders * sizes[1]
        results.append(attend(given, key, value, both, sizes, asked.rule, lengths)[0])
    return results
