"""Room for keys and values of a span and for its state, on one tier."""

from __future__ import annotations

from dataclasses import replace

from engine.cache.tables import Tables
from engine.schedule.block import Block


class JointRoom:
    """Gives every span rows for its tokens and a slot for its state, on the same tier, within one budget."""

    def __init__(self, rows: Tables, slots: Tables) -> None:
        self._rows, self._slots = rows, slots
        rows.beside, slots.beside = slots, rows
        self.refusal: str | None = None
        """Why a tier could not grow the last time that it should have; None if it could."""

    def allocate(self, num_rows: int) -> Block | None:
        """Room for a span of `num_rows` tokens; None when every tier that may hold it is full."""
        self.refusal = None
        for tier in self._rows.tiers_in_turn():
            rows = self._rows.allocate_on(tier, num_rows)
            slot = None if rows is None else self._slots.allocate_on(tier, 1)
            if rows is not None and slot is not None:
                return replace(rows, slot=slot.first)
            if rows is not None:
                self._rows.free(rows)
            self.refusal = self._rows.refusal or self._slots.refusal
        return None

    def free(self, block: Block) -> None:
        """Give a block back."""
        assert block.slot is not None
        self._rows.free(block)
        self._slots.free(Block(block.tier, block.slot, 1))

    def expect(self, num_rows: int, num_spans: int) -> None:
        """Tell that room for `num_rows` tokens in so many spans will be asked for."""
        self._rows.expect(num_rows, num_spans)
        self._slots.expect(num_spans, num_spans)

    def num_off_device(self, num_rows: int) -> int:
        """How many of so many rows of spans would lie off the device."""
        return self._rows.num_off_device(num_rows)
