"""Which earlier tokens a token attends to: all, a sliding window, or its chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Reach:
    """The tokens that a token attends to: all up to itself, or fewer of them."""

    window: int | None = None
    """The size of the sliding window, the token itself included; None without a window."""
    chunk: int | None = None
    """The size of chunks, which begin at its multiples: a token attends within its own chunk. None without chunks."""

    @property
    def is_whole(self) -> bool:
        """Whether a token attends to all tokens before it, however long the context is."""
        return self.window is None and self.chunk is None

    def is_whole_within(self, length: int) -> bool:
        """Whether a token attends to all tokens before it in contexts of at most `length` tokens."""
        return all(limit is None or length <= limit for limit in (self.window, self.chunk))

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether positions `query` attend to positions `key`: bool of the shape that both are broadcast to."""
        seen = key <= query
        if self.window is not None:
            seen = seen & (query - key < self.window)
        if self.chunk is not None:
            seen = seen & (query // self.chunk == key // self.chunk)
        return seen
