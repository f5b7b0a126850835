"""How many rows of new prompts a sweep lets in, so that they are computed while others' keys and values come (pure)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What of prompts is computed while a link is busy with a sweep, where keys and values of decode steps cross it.

    Prompts that all come in at once leave the link idle, and afterwards, while all decode, the arithmetic is. Fewer at
    a time take more sweeps, and each brings the streamed weights once more: that pays where a sweep brings more of
    keys and values than of weights.
    """

    rows_beside_weights: float
    """Rows of prompts that are let in for the transfer of a sweep's weights."""
    rows_beside_cached_row: float
    """Rows of prompts that are let in for the transfer of one row of keys and values, all layers."""

    def most_rows(self, cached_rows: int) -> int | None:
        """Rows of prompts that a sweep lets in where so many cached ones cross the link once all run; None: all."""
        beside_cache = cached_rows * self.rows_beside_cached_row
        if beside_cache <= self.rows_beside_weights:
            return None
        return max(1, int(beside_cache + self.rows_beside_weights))

    def hidden_rows(self, cached_rows: int) -> int:
        """Rows of prompts that are computed while a sweep's weights and so many cached rows cross the link."""
        return int(cached_rows * self.rows_beside_cached_row + self.rows_beside_weights)
