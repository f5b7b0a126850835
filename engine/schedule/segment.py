"""Rows of a micro-batch that belong to one span (pure)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from engine.memory.tiers import Tier
from engine.planning.limits import Limits
from engine.schedule.sequence import Sequence, Span


@dataclass(eq=False)
class Segment:
    """Consecutive rows of a micro-batch that belong to one span: its tokens that are not cached yet."""

    span: Span
    num_rows: int
    """Real rows."""
    num_pad: int = 0
    """Rows of padding behind them."""
    first: int = 0
    """First real row in the micro-batch."""
    lead: int = 0
    """Rows of padding before it."""
    draft: tuple[int, ...] = ()
    """Tokens that may follow the last one, the last of the rows; only in a step of a running sequence."""
    past: int = field(init=False)
    """Own tokens already in the cache."""

    def __post_init__(self) -> None:
        self.past = self.span.cached

    @property
    def begin(self) -> int:
        """First row in the micro-batch, padding included."""
        return self.first - self.lead

    @property
    def end(self) -> int:
        """Row behind the last one, padding included."""
        return self.first + self.num_rows + self.num_pad

    @property
    def is_decode(self) -> bool:
        """Whether this is one step of a running sequence."""
        return self.past > 0

    @property
    def tier(self) -> Tier | None:
        """Where its keys and values are kept; None if they are not."""
        return None if self.span.block is None else self.span.block.tier

    @property
    def is_on_device(self) -> bool:
        """Whether its keys and values are kept on the device."""
        return self.tier == "device"

    @property
    def tokens(self) -> list[int]:
        """The token ids of the real rows."""
        return [*self.span.tokens[self.past : self.past + self.num_rows - len(self.draft)], *self.draft]


AddDrafts = Callable[[Collection[Segment], int, Limits], None]
"""Lets decode steps of a sweep of so many rows try tokens that may come next."""


def add_drafts(segments: Collection[Segment], rows: int, limits: Limits) -> None:
    """Let decode steps that try none yet try what came next earlier, as long as rows of the sweep cost nothing."""
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
