"""How rows of packed sequences are given their positions (pure)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Positions:
    """How rows of packed sequences are given their positions."""

    offset: int = 0
    """The number of the first position: RoBERTa and its relatives reserve positions for padding."""
    is_counted: bool = False
    """Whether the forward takes none, and counts on from its cache's length: each sequence is embedded by itself."""
