"""Rows of a micro-batch, and where their keys and values are to be kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.batch.state_group import state_groups
from engine.schedule.block import Block
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix


@dataclass(frozen=True, eq=False)
class Scatter:
    """Rows of a micro-batch that go to single rows of the host's table."""

    rows: torch.Tensor | None
    """`[stored]`, on the device; None for all, in their order."""
    slots: torch.Tensor
    """`[stored]`, on the host."""


class Rows:
    """Rows of a micro-batch, and where their keys and values are to be kept."""

    def __init__(self, segments: list[Segment], device: torch.device, most_states: int = 0) -> None:
        """most_states: that a layer takes on at once; 0 where none keeps a state."""
        self.segments = segments
        self.num_rows = segments[-1].end
        self.state_groups = state_groups(segments, self.num_rows, most_states, device) if most_states else []
        """Spans whose states are taken on together, in the order in which that must be done."""
        self.offloaded: list[tuple[Segment, Block]] = []
        """New spans whose keys and values go to the host, and all that go to disk."""
        self.scattered: Scatter | None = None
        """Rows of decode steps that go to the host."""
        self.passing: list[Segment] = []
        """Prefixes whose keys and values nobody needs beyond the current layer."""
        self.device_rows: torch.Tensor | None = None
        """Rows whose keys and values stay on the device `[stored]`; None for all, in their order."""
        self.device_slots: torch.Tensor | None = None
        """Where those are kept `[stored]`; None if no row is."""
        rows: list[torch.Tensor] = []
        slots: list[torch.Tensor] = []
        steps: list[tuple[Segment, Block]] = []
        for segment in self.segments:
            block = segment.span.block
            if block is None:
                if isinstance(segment.span, Prefix):
                    self.passing.append(segment)
                continue
            if block.tier != "device":
                (steps if segment.is_decode and block.tier == "host" else self.offloaded).append((segment, block))
                continue
            rows.append(torch.arange(segment.first, segment.first + segment.num_rows))
            first = block.first + segment.past
            slots.append(torch.arange(first, first + segment.num_rows))
        if rows:
            taken = torch.cat(rows)
            self.device_rows = None if len(taken) == self.num_rows else taken.to(device)
            self.device_slots = torch.cat(slots).to(device)
        if steps:
            taken = torch.cat([torch.arange(s.first, s.first + s.num_rows) for s, _ in steps])
            slots_there = torch.cat([torch.arange(s.num_rows) + block.first + s.past for s, block in steps])
            self.scattered = Scatter(None if len(taken) == self.num_rows else taken.to(device), slots_there)
