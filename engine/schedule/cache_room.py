"""The interface of a cache that the scheduler needs (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from engine.schedule.block import Block


class CacheRoom(Protocol):
    """Allocates storage for what layers keep: keys and values of tokens, and a state of each span."""

    def allocate(self, num_rows: int, *, with_state: bool = True) -> Block | None:
        """Allocate storage for a span of `num_rows` tokens, and for its state if it has one; None: no space now."""

    def free(self, block: Block) -> None:
        """Free a block."""

    def free_state(self, block: Block) -> Block:
        """Free the storage of a state, and return the rest of the block."""

    refusal: str | None
    """Why memory could not be allocated, at the last attempt; None if it could."""

    def expect(self, sizes: Sequence[int]) -> None:
        """Announce spans of so many tokens, so that tables grow once for all of them."""

    def num_off_device(self, num_rows: int) -> int:
        """The number of rows, of `num_rows` rows, that would not fit the device."""
