"""Finds the prefixes that prompts share, ahead of time, at exact token borders (pure)."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import pairwise

from engine.schedule.sequence import Prefix, Sequence

MIN_SHARED_TOKENS = 16
"""A prefix is worth a span of its own when it saves at least this many tokens."""


def common_length(left: Seq[int], right: Seq[int]) -> int:
    """Length of the common prefix of two token lists."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # compares slices: far faster than token by token
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def share_prefixes(sequences: Iterable[Sequence], live: Iterable[Prefix] = ()) -> list[Sequence]:
    """Let `sequences`, all waiting, continue common prefixes; returns them so that sharers are neighbours.

    `live` are prefixes in use: a sequence that begins with one continues it, unless it is closed. Prefixes nest
    (instructions and examples, then the stem of a question for its choices). The last token of a prompt is always its
    own, since its logits are the sequence's own; a job that only scores keeps two, since its last one is never
    computed.
    """
    by_parent: dict[Prefix | None, list[Sequence]] = {}
    children: dict[Prefix | None, list[Prefix]] = {}
    for prefix in sorted(live, key=lambda prefix: prefix.is_closed):  # open ones first: another may have its tokens
        children.setdefault(prefix.parent, []).append(prefix)
    for sequence in sequences:
        if (last := _last_continued(sequence, children)) is not None:
            sequence.continue_from(last)
        by_parent.setdefault(sequence.parent, []).append(sequence)
    ordered: list[Sequence] = []
    for parent, group in by_parent.items():
        group.sort(key=lambda sequence: sequence.tokens)
        _cluster(group, parent)
        ordered += group
    return ordered


def _last_continued(sequence: Sequence, children: dict[Prefix | None, list[Prefix]]) -> Prefix | None:
    """The last of the prefixes in use, by parent, that `sequence` can continue one after the other."""
    own, begin, last = sequence.tokens, 0, sequence.parent
    found: Prefix | None = None
    while True:
        for prefix in children.get(last, ()):
            end = begin + len(prefix.tokens)
            if end <= sequence.num_shareable and own[begin:end] == prefix.tokens:
                begin, last = end, prefix
                found = found if prefix.is_closed else prefix
                break
        else:
            return found


def _cluster(group: list[Sequence], parent: Prefix | None) -> None:
    """Make nested prefixes for `group`, sorted by own tokens: the intervals of its common-prefix array, top down."""
    shared = [_shareable(left, right) for left, right in pairwise(group)]
    outer = parent
    work = [(0, len(group), 0, parent)]
    while work:
        first, end, depth, parent = work.pop()
        if end - first < 2:
            if first < end and parent is not outer and parent is not None:
                group[first].continue_from(parent)  # once, however many prefixes nest
            continue
        size = min(shared[first : end - 1])
        borders = [first, *(i + 1 for i in range(first, end - 1) if shared[i] == size), end]
        if (size - depth) * (len(borders) - 2) >= MIN_SHARED_TOKENS:
            prefix = Prefix(tokens=group[first].tokens[depth:size], parent=parent)
            if parent is not None:
                parent.num_users += 1
            depth, parent = size, prefix
        work += [(left, right, depth, parent) for left, right in pairwise(borders)]


def _shareable(left: Sequence, right: Sequence) -> int:
    return min(common_length(left.tokens, right.tokens), left.num_shareable, right.num_shareable)
