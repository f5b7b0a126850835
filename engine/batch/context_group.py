"""Groups of new spans of a micro-batch whose keys and values are gathered with their prefixes', a context per span."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from engine.memory import accelerator
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix


@dataclass(frozen=True, eq=False)
class ContextGroup:
    """Neighbouring new spans that continue the same chain of prefixes."""

    first: int
    end: int
    """The group's end, in rows of the micro-batch, padding included."""
    chain: tuple[Prefix, ...]
    index: torch.Tensor | None
    """The row numbers in [prefix | rows of the group] that form the contexts, concatenated; None where no prefix is
    visible: the contexts are then the group's own rows."""
    row_borders: torch.Tensor
    """The start of each span, in rows from the first one: int32 `[spans + 1]`."""
    context_borders: torch.Tensor
    """The start of each span's context among the gathered rows: int32 `[spans + 1]`."""
    longest: int
    """The number of rows of the longest span."""
    longest_context: int


def context_groups(
    segments: list[Segment], device: torch.device, most_rows: int, window: int | None = None
) -> list[ContextGroup]:
    """Split new spans into groups that gather at most `most_rows` rows each; a larger span is a group of its own.

    window: the most tokens that a row attends to, itself included; prefix tokens that no row sees are left out.
    """
    groups: list[list[Segment]] = []
    gathered = 0
    for segment in segments:
        last = groups[-1][-1] if groups else None
        size = _seen(segment.span.start, window) + segment.end - segment.first
        if last is None or last.span.parent is not segment.span.parent or gathered + size > most_rows:
            groups.append([])
            gathered = 0
        groups[-1].append(segment)
        gathered += size
    return [_group(group, device, window) for group in groups]


def _seen(start: int, window: int | None) -> int:
    """The number of tokens before a span that its first row attends to."""
    return start if window is None else min(start, window - 1)


def _group(segments: list[Segment], device: torch.device, window: int | None) -> ContextGroup:
    start, first = segments[0].span.start, segments[0].first
    seen = _seen(start, window)
    sizes = [segment.end - segment.first for segment in segments]
    index = None
    if seen:
        prefix = torch.arange(start - seen, start)
        own = [torch.arange(s.first, s.end) - first + start for s in segments]
        index = accelerator.sent(torch.cat([rows for each in own for rows in (prefix, each)]), device)
    return ContextGroup(
        first=first,
        end=segments[-1].end,
        chain=segments[0].span.chain,
        index=index,
        row_borders=borders(sizes, device),
        context_borders=borders([seen + size for size in sizes], device),
        longest=max(sizes),
        longest_context=seen + max(sizes),
    )


def borders(sizes: list[int], device: torch.device) -> torch.Tensor:
    """The start offsets of consecutive parts of these sizes, and the end of the last one: int32."""
    return accelerator.sent(torch.tensor([0, *accumulate(sizes)], dtype=torch.int32), device)
