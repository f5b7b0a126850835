"""Sequences that wait to come in, in the order in which they do (pure)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable, Iterator
from itertools import chain

from engine.schedule.sequence import Sequence


class Waiting:
    """Two queues: sequences that will decode, and those that end with the sweep that computes their prompt.

    The first come first, those that ask for most tokens ahead: each of their sweeps hides prompts of the second behind
    what it brings over the link, and all that run long are to run beside each other. Sharers of a prefix stay
    neighbours.
    """

    def __init__(self) -> None:
        self.decoding: deque[Sequence] = deque()
        self.passing: deque[Sequence] = deque()

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self.decoding, self.passing)

    def __len__(self) -> int:
        return len(self.decoding) + len(self.passing)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue new sequences, sharers of a prefix next to each other."""
        for sequence in sequences:
            self._queue_of(sequence).append(sequence)
        longest: dict[int, int] = {}
        for sequence in self.decoding:
            key = _group_of(sequence)
            longest[key] = max(longest.get(key, 0), sequence.job.max_new_tokens)
        self.decoding = deque(sorted(self.decoding, key=lambda sequence: -longest[_group_of(sequence)]))

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences that begin anew before all others, in their order."""
        for sequence in reversed(list(sequences)):
            self._queue_of(sequence).appendleft(sequence)

    def drop(self, identities: Container[int]) -> None:
        """Forget sequences by their identity."""
        self.decoding = deque(sequence for sequence in self.decoding if id(sequence) not in identities)
        self.passing = deque(sequence for sequence in self.passing if id(sequence) not in identities)

    def share(self, running: Iterable[Sequence]) -> int:
        """How many that do not decode come in with the next sweep if as many come in with each in which others decode.

        Those may be as many as the longest answer has tokens left, or all answers together where no more run at once
        than now. None where nobody decodes.
        """
        if not self.passing:
            return 0
        at_once = [_num_left(sequence) for sequence in running if sequence.needs_cache]
        left = [*at_once, *map(_num_left, self.decoding)]
        num_sweeps = max(max(left, default=0), math.ceil(sum(left) / max(1, len(at_once))) if at_once else 0)
        return math.ceil(len(self.passing) / num_sweeps) if num_sweeps else 0

    def _queue_of(self, sequence: Sequence) -> deque[Sequence]:
        return self.decoding if sequence.needs_cache else self.passing


def _group_of(sequence: Sequence) -> int:
    """The same number for all who share a prefix."""
    return id(sequence.chain[0] if sequence.chain else sequence)


def _num_left(sequence: Sequence) -> int:
    return sequence.job.max_new_tokens - (len(sequence.tokens) - sequence.num_prompt)
