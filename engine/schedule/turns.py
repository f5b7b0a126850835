"""What sweeps whose decode steps are replayed do without: prompts for a while, and drafts that are looked up (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.planning.limits import Limits
from engine.schedule.segment import AddDrafts, Segment

_STEPS = 8
"""Sweeps of replayed steps before prompts come in again. One that has prompts, too, is not replayed and takes several
times as long; an answer of a few hundred tokens waits little of that for those of its neighbours."""

_MOST_PREFIXES = 4
"""That a sequence continues, one behind the other: each is a further attention for every row of its micro-batch."""


class Turns:
    """Lets prompts come in together, some sweeps apart, as long as that keeps the sweeps between them fast.

    Rows of steps that are replayed are one a sequence, and further ones cost: only a draft model may add some.
    """

    def __init__(self, add: AddDrafts) -> None:
        self._add = add
        self._num_steps = _STEPS

    def is_of_steps(self, segments: Sequence[Segment], limits: Limits) -> bool:
        """Whether a sweep of these is to have no prompts beside them."""
        return self._num_steps < _STEPS and _are_replayed(segments, limits)

    def take(self, segments: Sequence[Segment], rows: int, limits: Limits, *, has_begun: bool) -> None:
        """Note what the next sweep consists of, of so many rows, and let it try drafts where it may.

        has_begun: a part of a prompt, whose rest follows without delay.
        """
        are_replayed = _are_replayed(segments, limits)
        self._num_steps = self._num_steps + 1 if are_replayed else _STEPS if has_begun else 0
        self._add(segments, rows, replace(limits, free_rows=0) if are_replayed else limits)


def are_steps(segments: Sequence[Segment]) -> bool:
    """Whether these are nothing but decode steps of one row, all of whose contexts lie on the device, in few parts."""
    return all(
        segment.is_decode
        and segment.num_rows == 1
        and not segment.num_pad
        and segment.is_on_device
        and len(segment.span.chain) <= _MOST_PREFIXES
        and all(prefix.block is not None and prefix.block.tier == "device" for prefix in segment.span.chain)
        for segment in segments
    )


def _are_replayed(segments: Sequence[Segment], limits: Limits) -> bool:
    """Whether a sweep of these is replayed by the device."""
    return limits.replays and bool(segments) and are_steps(segments)
