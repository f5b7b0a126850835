"""A micro-batch of decode steps whose keys and values are all on the device, in tensors of few different shapes.

The shapes say nothing of the sequences, so one captured computation serves many micro-batches.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from engine.batch.rows import Rows
from engine.memory import accelerator
from engine.schedule.segment import Segment

_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""The sizes of such micro-batches in rows; larger ones are multiples of the last."""
_LEAST_LENGTH = 256


@dataclass(frozen=True)
class StepShape:
    """The shape that two such micro-batches share if they differ in numbers alone."""

    count: int
    """The number of rows, one per sequence, padding included."""
    levels: int
    """The largest number of prefixes of a sequence."""
    length: int
    """The most tokens of a context, rounded up to a power of two."""


class StepBatch(Rows):
    """One new row of each sequence, padded to a round number of rows by copies of the last one.

    A copy writes the same numbers to the same place as its original.
    """

    def __init__(self, segments: list[Segment], device: torch.device) -> None:
        """segments: decode steps of one row, whose keys and values, and those of their prefixes, are on the device."""
        num_steps = len(segments)
        count = padded_count(num_steps)
        super().__init__(segments, device, num_copies=count - num_steps)
        padded = [*segments, *segments[-1:] * (count - num_steps)]
        ends = [segment.span.start + segment.past + 1 for segment in segments]
        levels = max(len(segment.span.chain) for segment in segments)
        self.shape = StepShape(count, levels, max(_LEAST_LENGTH, 1 << (max(ends) - 1).bit_length()))
        self.num_steps = num_steps
        """The number of rows that are not padding."""
        self.ids = torch.tensor([[segment.tokens[0] for segment in padded]])
        """The token ids `[1, rows]`, on the host."""
        contexts = [_context(segment, level) for level in range(levels + 1) for segment in padded]
        firsts, lengths, present = (torch.tensor(each).view(levels + 1, count) for each in zip(*contexts, strict=True))
        self._device = device
        positions = torch.tensor([[segment.span.start + segment.past for segment in padded]])
        self._positions = accelerator.sent(positions, device)
        self.firsts = accelerator.sent(torch.cat((firsts, firsts[:, -1:]), 1), device, torch.int32)
        """Rows of the device's table at which own tokens (first), then those of each prefix begin: int32 `[levels + 1,
        rows + 1]`, the last one for the kernel's sake."""
        self.lengths = accelerator.sent(lengths, device, torch.int32)
        """The numbers of these tokens: int32 `[levels + 1, rows]`."""
        self.present = accelerator.sent(present, device)
        """Whether there are any: bool `[levels + 1, rows]`. Where there are none, an own row is a placeholder."""
        self.row_borders = accelerator.sent(torch.arange(count + 1, dtype=torch.int32), device)

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of the model's forward."""
        return {
            "input_ids": accelerator.sent(self.ids, self._device),
            "position_ids": self._positions,
            "use_cache": False,
        }

    def copy(self) -> StepBatch:
        """The same rows, in memory of their own, and without the segments: it may outlive those who decode."""
        other = copy(self)
        assert self.device_slots is not None
        other.segments, other.device_slots = [], self.device_slots.clone()
        other.firsts, other.lengths, other.present = self.firsts.clone(), self.lengths.clone(), self.present.clone()
        return other

    def take(self, other: StepBatch) -> None:
        """Take over the numbers of another micro-batch of the same shape, in the same memory."""
        assert other.shape == self.shape
        assert self.device_slots is not None
        assert other.device_slots is not None
        self.device_slots.copy_(other.device_slots)
        self.firsts.copy_(other.firsts)
        self.lengths.copy_(other.lengths)
        self.present.copy_(other.present)


def padded_count(count: int) -> int:
    """The number of rows of a micro-batch of so many steps, padding included."""
    fitting = next((size for size in _COUNTS if size >= count), None)
    return fitting or -(-count // _COUNTS[-1]) * _COUNTS[-1]


def _context(segment: Segment, level: int) -> tuple[int, int, bool]:
    """The first table row, the number of tokens and whether there are any, of own tokens (level 0) or of a prefix."""
    span = segment.span
    if 0 < level <= len(span.chain):
        prefix = span.chain[level - 1]
        assert prefix.block is not None
        return prefix.block.first, len(prefix.tokens), True
    assert span.block is not None
    return span.block.first, segment.past + 1 if level == 0 else 1, level == 0
