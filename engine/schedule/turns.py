"""Holds back prompts, and prompt-lookup drafts, while decode steps are replayed (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.planning.limits import Limits
from engine.schedule.segment import AddDrafts, Segment

_STEPS = 8
"""The number of replayed sweeps before prompts enter again. A sweep with prompts is not replayed and takes several
times as long; an answer of a few hundred tokens waits little for its neighbours' prompts."""

_MOST_PREFIXES = 4
"""The most prefixes that a sequence may continue: each is a further attention call for every row of its micro-batch."""


class Turns:
    """Admits prompts together, some sweeps apart, as long as that keeps the sweeps between them fast.

    Replayed steps have one row per sequence, and further rows cost time: only a draft model may add some.
    """

    def __init__(self, add: AddDrafts) -> None:
        self._add = add
        self._num_steps = _STEPS

    def is_of_steps(self, segments: Sequence[Segment], limits: Limits) -> bool:
        """Whether a sweep of these steps is to have no prompts."""
        return self._num_steps < _STEPS and _are_replayed(segments, limits)

    def take(self, segments: Sequence[Segment], rows: int, limits: Limits, *, has_begun: bool) -> None:
        """Note what the next sweep of so many rows consists of, and add drafts where allowed.

        has_begun: whether a part of a prompt was admitted, whose rest follows without delay.
        """
        are_replayed = _are_replayed(segments, limits)
        self._num_steps = self._num_steps + 1 if are_replayed else _STEPS if has_begun else 0
        self._add(segments, rows, replace(limits, free_rows=0) if are_replayed else limits)


def are_steps(segments: Sequence[Segment]) -> bool:
    """Whether these are only decode steps of one row, whose contexts are on the device, in few parts."""
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
    """Whether the device replays a sweep of these."""
    return limits.replays and bool(segments) and are_steps(segments)
