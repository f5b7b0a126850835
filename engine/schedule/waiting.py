"""The queues of waiting sequences, in the order of their admission (pure)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable, Iterator
from itertools import chain

from engine.schedule.sequence import Sequence

_MOST_WITHOUT = 4
"""After so many sweeps in a row that could admit no sequence that does not decode, one of those is admitted before
any other."""


class Waiting:
    """Two queues: sequences that will decode, and those that end with the sweep that computes their prompt.

    The former come first, and among those queued together the ones with the most tokens to generate: each of their
    sweeps hides prompts of the latter behind its transfers, and long-running sequences are to run together. Sharers of
    a prefix stay adjacent. No sequence overtakes those queued in earlier calls.
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
        """Queue new sequences after those that wait, with sharers of a prefix adjacent."""
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
        """Queue restarted sequences before all others, in their order."""
        for sequence in reversed(list(sequences)):
            self._queue_of(sequence).appendleft(sequence)

    def drop(self, identities: Container[int]) -> None:
        """Remove sequences by their identity."""
        self.decoding = deque(sequence for sequence in self.decoding if id(sequence) not in identities)
        self.passing = deque(sequence for sequence in self.passing if id(sequence) not in identities)

    @property
    def is_passing_due(self) -> bool:
        """Whether those that do not decode have waited so long that one of them must be admitted before any other.

        The resource that kept them out (rows, running sequences, cache space) is then reserved for them as others
        leave.
        """
        return self._num_without >= _MOST_WITHOUT

    @property
    def has_begun_decoding(self) -> bool:
        """Whether a part of the prompt of the next sequence that will decode was admitted."""
        return bool(self.decoding) and self.decoding[0] is self._begun

    def note(self, num_passing: int, begun: Sequence | None) -> None:
        """Note how many sequences that do not decode a sweep admitted, and which sequence was admitted in part."""
        self._num_without = self._num_without + 1 if self.passing and not num_passing else 0
        self._begun = begun or self._begun

    def share(self, running: Iterable[Sequence]) -> int:
        """The number of sequences that do not decode to admit per sweep, if they are spread over the decoding sweeps.

        The number of those sweeps is that of the tokens left to the longest answer, or to all answers together where no
        more run at once than now. None where no sequence decodes.
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
    """A number that all sharers of a prefix have in common."""
    return id(sequence.chain[0] if sequence.chain else sequence)


def _num_left(sequence: Sequence) -> int:
    return sequence.job.max_new_tokens - (len(sequence.tokens) - sequence.num_prompt)
