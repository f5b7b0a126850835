"""Spans of a micro-batch whose recurrent states are updated together: each has equally many rows."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

import torch

from engine.memory import accelerator
from engine.memory.tiers import Tier
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix

Source = Literal["nothing", "prefix", "own"]
"""Where rows start from: from an empty state, from the state at the end of a prefix, or from the span's own state."""


class StateGroup:
    """Rows of segments that begin from the same kind of state, as `[segments, rows]`."""

    def __init__(self, segments: list[Segment], num_rows: int, device: torch.device) -> None:
        """num_rows: the number of rows of the whole micro-batch, padding included."""
        self.segments = segments
        self.count, self.length = len(segments), segments[0].num_rows
        self.source: Source = _source(segments[0])
        firsts = torch.tensor([segment.first for segment in segments])
        index = (firsts[:, None] + torch.arange(self.length)).flatten()
        is_all = len(index) == num_rows and bool((index == torch.arange(num_rows)).all())
        self.index: torch.Tensor | None = None if is_all else accelerator.sent(index, device)
        """The rows of the micro-batch `[segments * rows]`; None for all, in their order."""
        self.prefixes: list[Prefix] = []
        """The prefixes whose states are continued, without duplicates."""
        self.num_continuing: list[int] = []
        """The number of segments that continue each of these."""
        self.of_prefixes: torch.Tensor | None = None
        """The number of the prefix that each segment continues `[segments]`; None where all continue one."""
        if self.source == "prefix":
            self._take_prefixes(device)
        self.tier: Tier | None = segments[0].tier if self.source == "own" else None
        """The tier of the spans' own states."""
        stored = [(at, s.tier, s.span.block.slot) for at, s in enumerate(segments) if s.span.block is not None]
        on_device = [(at, slot) for at, tier, slot in stored if tier == "device" and slot is not None]
        self.kept: torch.Tensor | None = None
        """The segments whose states stay on the device `[stored]`; None for all."""
        if 0 < len(on_device) < len(segments):
            self.kept = accelerator.sent(torch.tensor([at for at, _ in on_device]), device)
        self.device_slots: torch.Tensor | None = None
        """The slots of those `[stored]`; None where there are none."""
        if on_device:
            self.device_slots = accelerator.sent(torch.tensor([slot for _, slot in on_device]), device)
        self.host_runs = _runs([(at, slot) for at, tier, slot in stored if tier == "host" and slot is not None])
        """(segment, slot, count) of states that the host stores, adjacent both there and here."""
        self.disk_runs = _runs([(at, slot) for at, tier, slot in stored if tier == "disk" and slot is not None])
        """(segment, slot, count) of states that the disk stores."""
        self.read_on = [(at, s.span) for at, s in enumerate(segments) if isinstance(s.span, Prefix)]
        """The prefixes that others may continue in the same sweep."""

    def _take_prefixes(self, device: torch.device) -> None:
        places: dict[int, int] = {}
        parts = []
        for segment in self.segments:
            prefix = segment.span.parent
            assert prefix is not None
            if id(prefix) not in places:
                places[id(prefix)] = len(self.prefixes)
                self.prefixes.append(prefix)
                self.num_continuing.append(0)
            parts.append(places[id(prefix)])
            self.num_continuing[parts[-1]] += 1
        if len(self.prefixes) > 1 or self.count > 1:
            self.of_prefixes = accelerator.sent(torch.tensor(parts), device)


def state_groups(segments: list[Segment], num_rows: int, most: int, device: torch.device) -> list[StateGroup]:
    """Groups of at most `most` segments each; a prefix comes in an earlier group than the segments that continue it."""
    levels: dict[int, int] = {}
    """The number of a span's prefixes that are in the micro-batch, by span."""
    groups: dict[tuple[int, Hashable], list[Segment]] = {}
    for segment in segments:
        span = segment.span
        level = levels.get(id(span.parent), -1) + 1 if _source(segment) == "prefix" else 0
        levels[id(span)] = level
        source = _source(segment)
        kind = (segment.num_rows, source, segment.tier if source == "own" else None)
        groups.setdefault((level, kind), []).append(segment)
    ordered = [groups[key] for key in sorted(groups, key=lambda key: key[0])]
    return [
        StateGroup(group[first : first + most], num_rows, device)
        for group in ordered
        for first in range(0, len(group), most)
    ]


def _source(segment: Segment) -> Source:
    if segment.past:
        return "own"
    return "nothing" if segment.span.parent is None else "prefix"


def _runs(stored: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    runs: list[tuple[int, int, int]] = []
    for at, slot in stored:
        if runs and runs[-1][0] + runs[-1][2] == at and runs[-1][1] + runs[-1][2] == slot:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((at, slot, 1))
    return runs
