"""What the scheduler needs of whatever keeps sequences from one sweep to the next (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from engine.schedule.block import Block


class CacheRoom(Protocol):
    """What the scheduler needs of what layers keep: keys and values of tokens, and a state of each span."""

    def allocate(self, num_rows: int) -> Block | None:
        """Room for a span of `num_rows` tokens, or None."""

    def free(self, block: Block) -> None:
        """Give room back."""

    def free_state(self, block: Block) -> Block:
        """Give back the room of a state; what is left of the block."""

    refusal: str | None
    """Why memory for more room could not be had, the last time it was asked for; None if it could."""

    def expect(self, sizes: Sequence[int]) -> None:
        """Tell that spans of so many tokens will ask for room: it can grow once, not many times."""

    def num_off_device(self, num_rows: int) -> int:
        """How many of so many rows would lie off the device."""
