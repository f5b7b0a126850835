"""The segments of a sweep while it is assembled (pure)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain, islice

from engine.planning.limits import Limits
from engine.schedule.cache_room import CacheRoom
from engine.schedule.cutting import rows_of
from engine.schedule.segment import Segment
from engine.schedule.sequence import Sequence


class Intake:
    """The segments of a sweep: steps of running sequences, then newly admitted spans."""

    def __init__(self, steps: Iterable[Segment]) -> None:
        self.segments = list(steps)
        self.num_steps = len(self.segments)
        self.rows = self.num_steps
        self.entered: set[int] = set()
        """The admitted spans, by their identity."""
        self.begun: Sequence | None = None
        """The sequence whose prompt was admitted in part most recently; its rest follows without delay."""

    @property
    def num_prompt_rows(self) -> int:
        """The number of admitted prompt rows."""
        return self.rows - self.num_steps

    def take(self, segments: Iterable[Segment]) -> None:
        """Admit segments."""
        for segment in segments:
            self.segments.append(segment)
            self.entered.add(id(segment.span))
            self.rows += rows_of(segment)


def most_admitted(running: Iterable[Sequence], waiting: Iterable[Sequence], limits: Limits, cache: CacheRoom) -> float:
    """The most rows of sequences that will decode, and of their prefixes, that a sweep admits (docs/adr/0009)."""
    if limits.admission is None:
        return math.inf
    at_once = islice(chain(running, waiting), limits.seats)
    most = limits.admission.most_rows(_num_off_device(at_once, cache))
    return math.inf if most is None else most


def most_hidden(
    intake: Intake, running: Iterable[Sequence], waiting: Iterable[Sequence], limits: Limits, cache: CacheRoom
) -> float:
    """The most rows of sequences that do not decode, and of their prefixes, that a sweep admits additionally.

    All of them where no other sequence decodes, now or later, and where no transfer could be hidden.
    """
    running = list(running)
    decoding = any(sequence.needs_cache for sequence in chain(running, waiting))
    if limits.admission is None or not decoding or not limits.admission.hidden_rows(_num_off_device(running, cache)):
        return math.inf
    steps = [sequence for sequence in running if sequence.cached]
    return limits.admission.hidden_rows(_num_off_device(steps, cache)) - intake.num_prompt_rows


def _num_off_device(sequences: Iterable[Sequence], cache: CacheRoom) -> int:
    return cache.num_off_device(sum(sequence.capacity for sequence in sequences if sequence.needs_cache))
