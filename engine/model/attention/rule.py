"""How a layer turns queries and keys into attention weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.batch.reach import Reach


@dataclass(frozen=True)
class AttentionRule:
    """How a layer turns queries and keys into attention weights."""

    scaling: float
    reach: Reach
    """The tokens that a token attends to."""
    softcap: float | None
    """The cap of the scores, as in Gemma-2."""
    sinks: torch.Tensor | None
    """An additional score of each head without a value, `[heads]`, as in GPT-OSS."""

    @property
    def is_stock(self) -> bool:
        """Whether `scaled_dot_product_attention` can compute it."""
        return self.softcap is None and self.sinks is None

    def is_stock_within(self, length: int) -> bool:
        """Whether `scaled_dot_product_attention` can compute it for contexts of at most `length` tokens."""
        return self.is_stock and self.reach.is_whole_within(length)

    def weights(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """float32 scores `[…, heads, rows, keys]` (unscaled) and an additive mask -> float32 weights."""
        scores = scores * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores + mask
        if self.sinks is None:
            return torch.softmax(scores, dim=-1)
        sinks = self.sinks.to(scores.device, torch.float32).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat((scores, sinks), dim=-1), dim=-1)[..., :-1]


def products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scores float32 `[…, rows, keys]` of query `[…, rows, dim]` and key `[…, keys, dim]`, of any dtype.

    Never in 16 bits: products of queries and keys exceed float16's 65504 in models with large biases (Qwen2), and lose
    digits in bfloat16.
    """
    if query.dtype == torch.float32:
        return query @ key.mT
    if query.device.type == "cuda" and torch.version.hip is None:  # at the rate of 16 bits
        flat = torch.bmm(query.flatten(0, -3), key.flatten(0, -3).mT, out_dtype=torch.float32)
        return flat.view(*query.shape[:-1], key.shape[-2])
    return query.float() @ key.float().mT
