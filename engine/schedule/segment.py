"""Rows of a micro-batch that belong to one span (pure)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from engine.memory.tiers import Tier
from engine.planning.limits import Limits
from engine.schedule.sequence import Sequence, Span


@dataclass(eq=False)
class Segment:
    """Consecutive rows of a micro-batch that belong to one span: its tokens that are not cached yet."""

    span: Span
    num_rows: int
    """The number of rows without padding."""
    num_pad: int = 0
    """The number of rows of padding after them."""
    first: int = 0
    """The first row, without padding, in the micro-batch."""
    lead: int = 0
    """The number of rows of padding before it."""
    draft: tuple[int, ...] = ()
    """Drafted tokens after the last one, which are its last rows; only in a step of a running sequence."""
    continued: Any = None
    """What its rows continue, `[rows, width]` on the device; only where an MTP layer drafts."""
    past: int = field(init=False)
    """The number of own tokens that are in the cache already."""

    def __post_init__(self) -> None:
        self.past = self.span.cached

    @property
    def begin(self) -> int:
        """The first row in the micro-batch, padding included."""
        return self.first - self.lead

    @property
    def end(self) -> int:
        """The end in the micro-batch, padding included."""
        return self.first + self.num_rows + self.num_pad

    @property
    def is_decode(self) -> bool:
        """Whether this is one step of a running sequence."""
        return self.past > 0

    @property
    def tier(self) -> Tier | None:
        """The tier of its keys and values; None if they are not stored."""
        return None if self.span.block is None else self.span.block.tier

    @property
    def is_on_device(self) -> bool:
        """Whether its keys and values are stored on the device."""
        return self.tier == "device"

    @property
    def tokens(self) -> list[int]:
        """The token ids of the rows without padding."""
        return [*self.span.tokens[self.past : self.past + self.num_rows - len(self.draft)], *self.draft]


AddDrafts = Callable[[Collection[Segment], int, Limits], None]
"""A function that adds drafts to the decode steps of a sweep of so many rows."""


def add_drafts(segments: Collection[Segment], rows: int, limits: Limits) -> None:
    """Draft tokens by prompt lookup for decode steps without drafts, while further rows of the sweep are free."""
    most = min(limits.free_rows, limits.rows_per_sweep)
    for segment in segments:
        if rows >= most:
            break
        if segment.is_decode and not segment.draft and isinstance(segment.span, Sequence):
            draft = segment.span.draft()
            if rows + len(draft) <= most:
                segment.draft = draft
                segment.num_rows += len(draft)
                rows += len(draft)
