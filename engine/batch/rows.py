"""The rows of a micro-batch, and where their keys and values will be stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.batch.state_group import state_groups
from engine.memory import accelerator
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
    """The rows of a micro-batch, and where their keys and values will be stored."""

    def __init__(
        self, segments: list[Segment], device: torch.device, most_states: int = 0, num_copies: int = 0
    ) -> None:
        """most_states: the most recurrent states that a layer updates at once; 0 for models without states.

        num_copies: so many copies of the last row follow; only where all rows stay on the device.
        """
        self.segments = segments
        self.num_rows = segments[-1].end + num_copies
        self.state_groups = state_groups(segments, self.num_rows, most_states, device) if most_states else []
        """Spans whose states are updated together, in the order in which they must be."""
        self.offloaded: list[tuple[Segment, Block]] = []
        """The new spans whose keys and values go to the host, and those that go to disk."""
        self.scattered: Scatter | None = None
        """The rows of decode steps that go to the host."""
        self.passing: list[Segment] = []
        """The prefixes whose keys and values are not needed beyond the current layer."""
        self.device_rows: torch.Tensor | None = None
        """The rows whose keys and values stay on the device `[stored]`; None for all, in their order."""
        self.device_slots: torch.Tensor | None = None
        """The table rows in which those are stored `[stored]`; None if there are none."""
        rows: list[int] = []
        slots: list[int] = []
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
            rows += range(segment.first, segment.first + segment.num_rows)
            slots += _slots(segment, block)
        if rows:
            rows += rows[-1:] * num_copies
            slots += slots[-1:] * num_copies
            self.device_rows = None if len(rows) == self.num_rows else accelerator.sent(torch.tensor(rows), device)
            self.device_slots = accelerator.sent(torch.tensor(slots), device)
        if steps:
            rows = [row for segment, _ in steps for row in range(segment.first, segment.first + segment.num_rows)]
            taken = None if len(rows) == self.num_rows else accelerator.sent(torch.tensor(rows), device)
            self.scattered = Scatter(taken, torch.tensor([slot for each in steps for slot in _slots(*each)]))


def _slots(segment: Segment, block: Block) -> range:
    """The table rows of one tier that a segment's new rows go to."""
    first = block.first + segment.past
    return range(first, first + segment.num_rows)
