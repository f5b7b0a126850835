"""FlashAttention of new rows to contexts that are gathered whole: for windows, sinks and narrow values."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.batch.context_group import ContextGroup
from engine.model.attention.backend import Attending
from engine.model.attention.dense import Dense
from engine.model.attention.flash import attend_parts, has_kernels
from engine.model.attention.rule import AttentionRule


class ContextFlash(Dense):
    """Prompts on CUDA from sm80 on, in 16 bits, with windows that cut something off, sinks, or narrow values.

    The prefix tokens that the first row of a span sees are gathered in front of its own tokens, so that the kernel's
    window, which ends at the last key, is right for all rows. A sink is a score without a value: a row's result is
    divided by what the sink adds to the sum of exponentials. Values that are narrower than keys are padded with zeros.
    (torch's own choice for those is cuDNN, which plans for tens of milliseconds for each shape and thread.) Decode
    steps use `Dense`.
    """

    def can(self, asked: Attending) -> bool:
        """Whether the GPU has kernels for these heads, scores have no cap, and chunks cover every context."""
        query, rule, width = asked.query, asked.rule, asked.query.shape[-1]
        has_them = has_kernels(query.device, query.dtype, width, width) and asked.value.shape[-1] <= width
        is_whole = rule.reach.chunk is None or asked.batch.longest <= rule.reach.chunk
        return has_them and is_whole and rule.softcap is None and not asked.is_batch_invariant

    def prefill(self, asked: Attending) -> torch.Tensor:
        """Compute group by group, each row against the context of its span."""
        parts = []
        for group in asked.batch.context_groups(asked.rule.reach.window):
            output, logsumexp = attend_contexts(asked, group)
            if asked.rule.sinks is not None:
                kept = torch.sigmoid(logsumexp - asked.rule.sinks.float()[:, None])
                output.mul_(kept.T[:, :, None])
            parts.append(output)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_contexts(asked: Attending, group: ContextGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a group against the contexts of their spans: `[rows, heads, dim]`, log-sum-exps `[heads, rows]`."""
    rows = slice(group.first, group.end)
    key, value = asked.key[rows], asked.value[rows]
    if group.index is not None:
        prefix_key, prefix_value = (x.transpose(0, 1) for x in asked.cache.fork(asked.layer, group.chain))
        key = torch.cat((prefix_key, key)).index_select(0, group.index)
        value = torch.cat((prefix_value, value)).index_select(0, group.index)
    borders = group.row_borders, group.context_borders
    return attend(asked.query[rows], key, value, borders, (group.longest, group.longest_context), asked.rule)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    rule: AttentionRule,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[rows, heads, dim]`, each at the end of its span's context; returns what `attend_contexts` returns.

    The longest span's number of rows is passed as two where it is one: for single rows there is another kernel, which
    splits contexts.
    """
    window, narrower = rule.reach.window, query.shape[-1] - value.shape[-1]
    longest = max(longest[0], 2), longest[1]
    padded = F.pad(value, (0, narrower)) if narrower else value
    output, logsumexp = attend_parts(
        query, key, padded, borders, longest, rule, is_causal=True, lengths=lengths, window=window
    )
    return output[..., : value.shape[-1]], logsumexp
