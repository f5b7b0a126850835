"""The storage of one span's keys and values, and its state (pure)."""

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
    """The row of the states of all layers, on the same tier; None where no layer keeps a state."""
