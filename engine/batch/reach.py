"""How far back tokens attend."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Reach:
    """Which tokens a token attends to: all up to itself, or fewer of them."""

    window: int | None = None
    """The last so many, itself included."""
    chunk: int | None = None
    """Those of its own chunk; chunks begin at multiples of so many tokens."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing before a token is cut off, however long the context is."""
        return self.window is None and self.chunk is None

    def is_whole_within(self, length: int) -> bool:
        """The same for contexts of at most `length` tokens."""
        return all(limit is None or length <= limit for limit in (self.window, self.chunk))

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether positions `query` attend to positions `key`: bool of the shape that both are broadcast to."""
        seen = key <= query
        if self.window is not None:
            seen = seen & (query - key < self.window)
        if self.chunk is not None:
            seen = seen & (query // self.chunk == key // self.chunk)
        return seen
