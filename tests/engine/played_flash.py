"""FlashAttention's kernel played by torch's functions on the CPU, as its signature says."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


class Kernel:
    """FlashAttention: parts of the queries against parts of the keys; of those that do not meet, nothing is read."""

    def __init__(self) -> None:
        self.parts: list[int] = []
        """Of each call over prefixes, how many there were."""
        self.windows: set[int | None] = set()

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_borders: Tensor | None,
        key_borders: Tensor | None,
        longest: int,
        longest_key: int,
        dropout: float,
        is_causal: bool,
        is_debug: bool,
        *,
        scale: float,
        seqused_k: Tensor | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert (dropout, is_debug) == (0.0, False)
        assert key.shape[-1] == value.shape[-1]
        assert window_size_right in (None, 0)
        self.windows.add(window_size_left)
        if query_borders is None or key_borders is None:
            self.parts.append(len(query))
            made = [_attended(*each, is_causal, scale) for each in zip(query, key, value, strict=True)]
            return torch.stack([output for output, _ in made]), torch.stack([sums for _, sums in made])
        assert query_borders.dtype == key_borders.dtype == torch.int32
        if query_borders is not key_borders and seqused_k is None:
            self.parts.append(len(query_borders) - 1)
        rows = list(pairwise(query_borders.tolist()))
        firsts = key_borders.tolist()
        ends = firsts[1:] if seqused_k is None else [a + n for a, n in zip(firsts, seqused_k.tolist(), strict=False)]
        assert longest >= max(b - a for a, b in rows)
        assert longest_key >= max(b - a for a, b in zip(firsts, ends, strict=False))
        parts = [
            _attended(query[a:b], key[first:end], value[first:end], is_causal, scale, window_size_left)
            for (a, b), first, end in zip(rows, firsts, ends, strict=False)
        ]
        assert rows[-1][1] == len(query)
        return torch.cat([output for output, _ in parts]), torch.cat([sums for _, sums in parts], dim=1)


def _attended(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, left: int | None = None
) -> tuple[Tensor, Tensor]:
    """`[rows, heads, dim]`, and log-sum-exps `[heads, rows]`; causal mask and window are aligned with the last key."""
    copies = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if is_causal:
        hidden = torch.ones(len(query), len(key), dtype=torch.bool).triu(len(key) - len(query) + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    if left is not None:
        hidden = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query) - left - 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value), scores.logsumexp(-1)
