"""Space for the keys and values of a span and for its recurrent state, on one tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.cache.tables import Tables
from engine.memory.tiers import TIERS, Tier
from engine.schedule.block import Block


class JointRoom:
    """Gives every span rows for its tokens and a slot for its state, on the same tier, within one budget."""

    def __init__(self, rows: Tables, slots: Tables) -> None:
        self._rows, self._slots = rows, slots
        rows.beside, slots.beside = slots, rows
        self.refusal: str | None = None
        """Why a tier could not grow at the last attempt; None if it could."""

    def allocate(self, num_rows: int, *, with_state: bool = True) -> Block | None:
        """Allocate space for a span of `num_rows` tokens; None when every allowed tier is full."""
        self.refusal = None
        for tier in self._rows.tiers_in_turn():
            found = self._allocate_on(tier, num_rows, with_state)
            if found is None and self._release(tier):  # one kind may have taken what the other lacks
                found = self._allocate_on(tier, num_rows, with_state)
            if found is not None:
                return found
            self.refusal = self._rows.refusal or self._slots.refusal
        return None

    def _allocate_on(self, tier: Tier, num_rows: int, with_state: bool) -> Block | None:
        if not with_state:
            return self._rows.allocate_on(tier, num_rows)
        slot = self._slots.allocate_on(tier, 1)  # first: rows of a model without attention take nothing anywhere
        rows = None if slot is None else self._rows.allocate_on(tier, num_rows)
        if slot is not None and rows is not None:
            return replace(rows, slot=slot.first)
        if slot is not None:
            self._slots.free(slot)
        return None

    def free(self, block: Block) -> None:
        """Free a block."""
        self._rows.free(block if block.slot is None else self.free_state(block))

    def free_state(self, block: Block) -> Block:
        """Free the slot of a state, and return the rest of the block."""
        assert block.slot is not None
        self._slots.free(Block(block.tier, block.slot, 1))
        return replace(block, slot=None)

    def expect(self, sizes: Sequence[int]) -> None:
        """Announce spans of so many tokens, so that tables grow once for all of them."""
        self._rows.expect(sizes)
        self._slots.expect([1] * len(sizes))
        for tier in TIERS:
            if self._is_lopsided(tier):
                self._release(tier)

    def _is_lopsided(self, tier: Tier) -> bool:
        """Whether one kind has less than half of its part of a tier that is divided by the announced spans."""
        both = (self._rows, self._slots)
        total = sum(each.expected_bytes(tier) for each in both)
        part = min(1.0, self._rows.budgets[tier] / total) if total else 0.0
        return any(2 * each.taken(tier) < part * each.expected_bytes(tier) for each in both)

    def _release(self, tier: Tier) -> bool:
        """Release the tables of both kinds on a tier in memory that no block uses; False where one is in use."""
        if tier == "disk" or self._slots.num_blocks[tier] or self._rows.num_blocks[tier]:
            return False  # rows alone are those of a span whose state nobody continues any more
        self._rows.release(tier)
        self._slots.release(tier)
        return True

    def num_off_device(self, num_rows: int) -> int:
        """The number of rows, of `num_rows` rows of spans, that would not fit the device."""
        return self._rows.num_off_device(num_rows)
