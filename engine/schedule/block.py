"""Where the keys and values of one span lie (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory.tiers import Tier


@dataclass(frozen=True)
class Block:
    """Consecutive rows on one tier, in every layer."""

    tier: Tier
    first: int
    num_rows: int
