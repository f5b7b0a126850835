"""Splits long spans into pieces, and reduces a sweep that ran out of memory (pure)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate

from engine.planning.limits import Limits
from engine.schedule.cache_room import CacheRoom
from engine.schedule.cutting import padded_length, rows_of
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix, Sequence, Span

_LEAST_ROWS = 64
"""The least rows of a micro-batch: fewer would save little memory, apart from what decode steps gather of the cache."""


def smaller(limits: Limits, batches: list[list[Segment]]) -> Limits | None:
    """Limits under which the work of `batches` takes less memory; None if there are none.

    Micro-batches that wait for each other hold most, and no longer wait.
    """
    if limits.waiting_rows:
        return replace(limits, waiting_rows=0)
    contexts = [[segment.span.start + segment.past + segment.num_rows for segment in batch] for batch in batches]
    rows = min(limits.rows_per_batch, max(sum(map(rows_of, batch)) for batch in batches)) // 2
    cached = min(limits.cached_rows_per_batch, max(map(sum, contexts))) // 2
    least = min(_LEAST_ROWS, limits.rows_per_batch)
    has_long = any(is_long(segment.span, least, limits) for batch in batches for segment in batch)
    if not (rows >= _LEAST_ROWS or has_long or cached >= max(map(max, contexts)) or limits.most_states > 1):
        return None
    rows, states = max(rows, least), min(limits.most_states, max(1, limits.most_states // 2))
    return replace(
        limits,
        rows_per_batch=rows,
        rows_per_piece=rows,
        cached_rows_per_batch=max(1, cached),
        most_states=states,
    )


def is_long(span: Span, most: int, limits: Limits) -> bool:
    """Whether a span to compute has more than `most` rows, and can be computed in pieces."""
    is_whole = isinstance(limits.pad, int) or (isinstance(span, Sequence) and span.is_alone)
    return limits.continues and not is_whole and span.cached == 0 and span.num_rows > most


def split(spans: Iterable[Span], limits: Limits, prefixes: list[Prefix]) -> dict[int, list[Prefix]]:
    """Split spans of more rows than a piece may have; return each one's new prefixes by the span's identity.

    The new prefixes are also added to `prefixes`. Where there are any, sequences must follow their parents again.
    """
    most = limits.rows_per_piece
    heads = {} if most is None else {id(span): span.split(most) for span in spans if is_long(span, most, limits)}
    prefixes.extend(head for each in heads.values() for head in each)
    for prefix in sorted(prefixes, key=lambda prefix: prefix.start) if heads else ():
        prefix.follow(prefix.parent)
    return heads


def place(span: Span, heads: list[Prefix], cache: CacheRoom) -> bool:
    """Divide the space of a span that was split among its pieces; whether all have some.

    heads: all of them but the last, which the span is now. Each is continued in the sweep that computes it, and by the
    next one alone: none needs space for its state, and without one nothing else can continue it later.
    """
    before = span.block
    if before is None:
        return True
    cache.free(before)
    has_state = before.slot is not None
    is_closed = has_state or (isinstance(span, Prefix) and span.is_closed)
    for head in heads:
        head.block, head.is_closed = cache.allocate(head.capacity, with_state=False), is_closed
    span.block = cache.allocate(span.capacity, with_state=has_state)
    return all(part.block is not None for part in (*heads, span))


def beginning(new: list[Segment], most: int, taken: int) -> list[Segment]:
    """The leading segments of a sequence, each of which continues those before it, that a sweep of `taken` rows admits.

    All of them if a sweep of `most` rows has space for all at once, and if pieces have no storage in the cache, since
    such pieces do not outlive the sweep; otherwise those that fit in addition, or one.
    """
    reached = list(accumulate(map(rows_of, new)))
    if reached[-1] <= most or any(isinstance(each.span, Prefix) and each.span.block is None for each in new):
        return new
    return new[: max(1, sum(taken + rows <= most for rows in reached))]


def largest(segments: Iterable[Segment]) -> Span:
    """The part of a sweep that takes most memory: a sequence, or a new prefix that is longer than its continuations."""

    def size(segment: Segment) -> int:
        return segment.span.num_rows + (0 if segment.is_decode else segment.span.start)

    span = max(segments, key=size).span
    parent = span.parent if isinstance(span, Sequence) else None
    is_longer = parent is not None and not parent.is_computed and parent.start + parent.num_rows > span.num_rows
    return parent if parent is not None and is_longer else span


def named(span: Span, prompts: list[Sequence]) -> str:
    """The name, in messages, of the prompt that contains a span, or of the prefix of several prompts."""
    if len(prompts) > 1:
        return f"the {span.start + span.num_rows} tokens that {len(prompts)} prompts begin with"
    return f"the prompt of {len(prompts[0].job.prompt)} tokens"


def whole(span: Span, limits: Limits) -> Segment:
    """The number of rows of a span to compute; prefixes are not padded."""
    rows = span.num_rows
    return Segment(span, rows, padded_length(rows, limits.pad) - rows if isinstance(span, Sequence) else 0)


def is_too_long(sequence: Sequence, limits: Limits) -> bool:
    """Whether its attention scores alone exceed the memory."""
    most = limits.scores_per_batch
    if most is None:
        return False
    rows = padded_length(sequence.num_rows, limits.pad)
    rectangles = [(rows, max(rows, sequence.start + sequence.num_rows))]
    rectangles += [(len(prefix.tokens), prefix.start + len(prefix.tokens)) for prefix in sequence.chain]
    return any(rows * keys > most for rows, keys in rectangles)


def no_room(what: str, sequence: Sequence, cure: str) -> str:
    """The error of a sequence for which there is never enough memory; `what` has none, `cure` says what to change."""
    rows = sequence.start + sequence.capacity
    return f"{what} has no room for a sequence of {rows} tokens; shorten it, or give {cure}"
