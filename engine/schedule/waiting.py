"""Sequences that wait to come in, in the order in which they do (pure)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable, Iterator
from itertools import chain

from engine.schedule.sequence import Sequence

_MOST_WITHOUT = 4
"""Sweeps in a row that may let in none of those that do not decode, before nobody else comes in until one has."""


class Waiting:
    """Two queues: sequences that will decode, and those that end with the sweep that computes their prompt.

    The first come first, of those that are queued together the ones that ask for most tokens ahead: each of their
    sweeps hides prompts of the second behind what it brings over the link, and all that run long are to run beside each
    other. Sharers of a prefix stay neighbours. Nobody overtakes those that were queued before.
    """

    def __init__(self) -> None:
        self.decoding: deque[Sequence] = deque()
        self.passing: deque[Sequence] = deque()
        self._begun: Sequence | None = None
        self._num_without = 0

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self.decoding, self.passing)

    def __len__(self) -> int:
        return len(self.decoding) + len(self.passing)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue new sequences, sharers of a prefix next to each other, behind those that wait."""
        decoding: list[Sequence] = []
        longest: dict[int, int] = {}
        for sequence in sequences:
            if not sequence.needs_cache:
                self.passing.append(sequence)
                continue
            decoding.append(sequence)
            key = _group_of(sequence)
            longest[key] = max(longest.get(key, 0), sequence.job.max_new_tokens)
        self.decoding.extend(sorted(decoding, key=lambda sequence: -longest[_group_of(sequence)]))

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences that begin anew before all others, in their order."""
        for sequence in reversed(list(sequences)):
            self._queue_of(sequence).appendleft(sequence)

    def drop(self, identities: Container[int]) -> None:
        """Forget sequences by their identity."""
        self.decoding = deque(sequence for sequence in self.decoding if id(sequence) not in identities)
        self.passing = deque(sequence for sequence in self.passing if id(sequence) not in identities)

    @property
    def is_passing_due(self) -> bool:
        """Whether those that do not decode have waited so long that nobody else comes in until one of them has.

        Whatever kept them out (rows, seats, room in the cache) then falls to them as others leave.
        """
        return self._num_without >= _MOST_WITHOUT

    @property
    def has_begun_decoding(self) -> bool:
        """Whether a part of the prompt of the next sequence that will decode was let in."""
        return bool(self.decoding) and self.decoding[0] is self._begun

    def note(self, num_passing: int, begun: Sequence | None) -> None:
        """Note how many that do not decode came in with a sweep, and of which sequence only a part did."""
        self._num_without = self._num_without + 1 if self.passing and not num_passing else 0
        self._begun = begun or self._begun

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
