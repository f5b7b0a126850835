"""How many rows of new prompts a sweep admits, so that they are computed during transfers of other sequences (pure)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Admission:
    """The rows of prompts to compute while the link transfers weights and the keys and values of decode steps.

    Prompts that all enter at once leave the link idle, and afterwards, while all decode, the arithmetic units. Fewer at
    a time take more sweeps, and each transfers the streamed weights once more: that pays where a sweep transfers more
    keys and values than weights.
    """

    rows_beside_weights: float
    """The rows of prompts that are admitted for the transfer of a sweep's weights."""
    rows_beside_cached_row: float
    """The rows of prompts that are admitted for the transfer of one row of keys and values in all layers."""

    def most_rows(self, cached_rows: int) -> int | None:
        """The rows of prompts that a sweep admits, given the cached rows to transfer once all run; None: any number."""
        beside_cache = cached_rows * self.rows_beside_cached_row
        if beside_cache <= self.rows_beside_weights:
            return None
        return max(1, int(beside_cache + self.rows_beside_weights))

    def hidden_rows(self, cached_rows: int) -> int:
        """The rows of prompts that are computed while a sweep's weights and so many cached rows are transferred."""
        return int(cached_rows * self.rows_beside_cached_row + self.rows_beside_weights)
