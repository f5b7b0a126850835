"""Finds the parts of prefixes that are not needed any more, or not beyond the sweep that computes them (pure)."""

from __future__ import annotations

from collections.abc import Iterable

from engine.schedule.block import Block
from engine.schedule.cache_room import CacheRoom
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix, Sequence, Span


def passing_prefixes(segments: Iterable[Segment], room: int) -> tuple[list[Prefix], list[Prefix]]:
    """Split a sweep's new prefixes: those kept only for the current layer, and the others; last ones first.

    The former have at most `room` rows together, and all sequences that continue them are in the sweep and store
    nothing.
    """
    segments = list(segments)
    users: dict[int, int] = {}
    for segment in segments:
        if isinstance(segment.span, Sequence) and not segment.is_decode and not segment.span.needs_cache:
            users[id(segment.span.parent)] = users.get(id(segment.span.parent), 0) + 1
    passing: list[Prefix] = []
    kept: list[Prefix] = []
    for segment in reversed(segments):  # a prefix comes before those that continue it
        prefix = segment.span
        if not isinstance(prefix, Prefix):
            continue
        if users.get(id(prefix)) == prefix.num_users and segment.num_rows <= room:
            users[id(prefix.parent)] = users.get(id(prefix.parent), 0) + 1
            room -= segment.num_rows
            passing.append(prefix)
        else:
            kept.append(prefix)
    return passing, kept


def continued_prefixes(spans: Iterable[Span]) -> list[tuple[Prefix, Block]]:
    """The prefixes that computed spans continue and whose states no other span will begin from, with their blocks.

    Of a long prompt in pieces, those are all but the last; later pieces see their tokens as long as they run.
    """
    parents = [span.parent for span in spans if span.cached and span.parent is not None]
    found = [(each, each.block) for each in parents if each.is_piece and each.num_users == 1 and each.block is not None]
    return [(prefix, block) for prefix, block in found if block.slot is not None]


def idle_prefixes(prefixes: Iterable[Prefix], running: Iterable[Sequence], wanted: Iterable[Prefix]) -> list[Prefix]:
    """The cached prefixes that no running sequence continues and that are not wanted."""
    kept = {id(prefix) for sequence in running for prefix in sequence.chain} | set(map(id, wanted))
    return [prefix for prefix in prefixes if prefix.block is not None and id(prefix) not in kept]


def spare_blocks(segments: Iterable[Segment], room: int, cache: CacheRoom) -> None:
    """Free the blocks of new prefixes that are not needed after this sweep; others may then get a better tier.

    Their keys and values live as long as the current layer, if they have no more than `room` rows together.
    """
    passing, kept = passing_prefixes(segments, room)
    for prefix in passing:
        if prefix.block is not None:
            cache.free(prefix.block)
            prefix.block = None
    for prefix in kept if passing else ():
        if prefix.block is not None:
            prefix.block = _nearer(prefix.block, cache)


def _nearer(block: Block, cache: CacheRoom) -> Block:
    """A block of the same size on the device, if there is space, in place of one that was not written to."""
    better = cache.allocate(block.num_rows)
    if better is None:
        return block
    is_nearer = better.tier == "device" != block.tier
    cache.free(block if is_nearer else better)
    return better if is_nearer else block
