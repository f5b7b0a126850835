"""Cuts the work of a sweep into micro-batches, and computes the length of a padded prompt (pure)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from engine.planning.limits import Limits
from engine.policy import PadMode
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix, Sequence

BUCKET_TOKENS = 64
"""Padding "bucket" rounds a prompt up to a power of two times this."""


def padded_length(rows: int, pad: PadMode) -> int:
    """The number of rows of a prompt of `rows` tokens, padding included."""
    if pad is None:
        return rows
    if pad == "bucket":
        size = BUCKET_TOKENS
        while size < rows:
            size *= 2
        return size
    return max(rows, pad)


def rows_of(segment: Segment) -> int:
    """The number of rows of a segment, padding included."""
    return segment.num_rows + segment.num_pad


def _is_alone(segment: Segment) -> bool:
    return isinstance(segment.span, Sequence) and segment.span.is_alone


def packed_batches(segments: list[Segment], limits: Limits) -> list[list[Segment]]:
    """Cut segments into micro-batches: decode steps first, users of one prefix adjacent, prefixes before users."""
    decode = [segment for segment in segments if segment.is_decode]
    ranks: dict[Prefix | None, int] = {}
    for segment in decode:
        ranks.setdefault(segment.span.parent, len(ranks))
    decode.sort(key=lambda segment: _decode_order(segment, ranks[segment.span.parent], limits.reads_in_place))
    new = [segment for segment in segments if not segment.is_decode]
    return [batch for part in _interleaved(decode, new, limits) for batch in _cut(part, limits)]


def _interleaved(decode: list[Segment], new: list[Segment], limits: Limits) -> list[list[Segment]]:
    """Interleave parts of decode steps with parts of the new spans after them; one part if transfers do not overlap."""
    most = limits.rows_between_fetches
    if most is None or all(segment.is_on_device for segment in decode):
        return [decode + new]
    most, num_steps = min(most, limits.rows_per_batch), sum(map(rows_of, decode))
    count = math.ceil((num_steps + sum(map(rows_of, new))) / most)
    room = most - math.ceil(num_steps / count)
    parts: list[list[Segment]] = [[]]
    rows = 0
    for segment in new:
        if parts[-1] and rows + rows_of(segment) > room:
            parts.append([])
            rows = 0
        parts[-1].append(segment)
        rows += rows_of(segment)
    borders = [len(decode) * part // len(parts) for part in range(len(parts) + 1)]
    return [decode[first:end] + part for (first, end), part in zip(pairwise(borders), parts, strict=True)]


def _cut(segments: list[Segment], limits: Limits) -> list[list[Segment]]:
    batches: list[list[Segment]] = []
    rows = count = num_prefixes = 0
    for segment in segments:
        size = rows_of(segment)
        is_sequence = isinstance(segment.span, Sequence)
        if not batches or (
            rows + size > limits.rows_per_batch
            or count + is_sequence > limits.sequences_per_batch
            or num_prefixes + (not is_sequence) > limits.most_prefixes
            or _is_alone(segment)
            or _is_alone(batches[-1][0])
        ):
            batches.append([])
            rows = count = num_prefixes = 0
        segment.first = rows
        batches[-1].append(segment)
        rows, count, num_prefixes = rows + size, count + is_sequence, num_prefixes + (not is_sequence)
    return batches


def _decode_order(segment: Segment, rank: int, in_place: bool) -> tuple[Any, ...]:
    """Sort key of decode steps: same prefix, tier and draft length together, then by position in the cache.

    So adjacent blocks are transferred in one copy. Where attention pads a group to its longest member, steps of similar
    lengths come together, too. `rank` is the prefix's place among those of the sweep, the same in every run.
    """
    block = segment.span.block
    assert block is not None
    length = 0 if in_place else segment.past
    return rank, block.tier, segment.num_rows, length, block.first


def rectangular_batches(segments: list[Segment], limits: Limits) -> list[list[Segment]]:
    """Cut segments into rectangular micro-batches of one kind each: decode steps, prefixes (first), sequences."""

    def kind(segment: Segment) -> int:
        return 0 if segment.is_decode else 1 if isinstance(segment.span, Prefix) else 2

    batches: list[list[Segment]] = []
    columns = keys = 0
    for segment in sorted(segments, key=kind):  # stable: prefixes stay before those that continue them
        size = rows_of(segment)
        reach = segment.span.start + segment.past + segment.num_rows
        count = len(batches[-1]) + 1 if batches else 1
        if (
            not batches
            or kind(batches[-1][0]) != kind(segment)
            or _is_alone(segment)
            or _is_alone(batches[-1][0])
            or count > min(limits.sequences_per_batch, limits.most_prefixes if kind(segment) == 1 else math.inf)
            or count * max(columns, size) > limits.rows_per_batch
            or count * max(keys, reach) > limits.cached_rows_per_batch
            or count * max(columns, size) * max(keys, reach, columns, size) > (limits.scores_per_batch or math.inf)
        ):
            batches.append([])
            columns = keys = 0
        batches[-1].append(segment)
        columns, keys = max(columns, size), max(keys, reach)
    for batch in batches:
        columns = max(map(rows_of, batch))
        for index, segment in enumerate(batch):
            segment.lead, segment.num_pad = columns - segment.num_rows, 0
            segment.first = index * columns + segment.lead
    return batches
