"""How a layer turns queries and keys into attention weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scores:
    """How a layer turns queries and keys into attention weights."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def is_stock(self) -> bool:
        """Whether `scaled_dot_product_attention` can compute it."""
        return self.softcap is None and self.sinks is None

    def is_stock_within(self, length: int) -> bool:
        """The same for contexts of at most `length` tokens, of which no window may cut anything off."""
        return self.is_stock and (self.window is None or length <= self.window)

    def weights(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Scores `[…, heads, rows, keys]` (unscaled) and what to add to them -> float32 weights of the same shape."""
        scores = scores.float() * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores + mask
        if self.sinks is None:
            return torch.softmax(scores, dim=-1)
        sinks = self.sinks.to(scores.device, torch.float32).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat((scores, sinks), dim=-1), dim=-1)[..., :-1]
