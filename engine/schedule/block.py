"""Where what layers keep of one span lies (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory.tiers import Tier


@dataclass(frozen=True)
class Block:
    """Consecutive rows on one tier, in every layer."""

    tier: Tier
    first: int
    num_rows: int
    slot: int | None = None
    """Row of the states of all layers, on the same tier; None where no layer keeps a state."""
