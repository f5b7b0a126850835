"""The part of a unit that passes through a slot at once: all of it, or some experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.memory.disk.file import ByteRange
from engine.memory.disk.io import DiskIO, wait_for
from engine.memory.layout import align
from engine.memory.tiers import Tier
from engine.weights.placed_unit import PlacedUnit


class Portion:
    """Ranges of a unit's stored bytes that are copied to the device together, concatenated and aligned."""

    def __init__(self, placed: PlacedUnit, ranges: Sequence[tuple[int, int]]) -> None:
        """ranges: first and end bytes, in the unit."""
        self.placed = placed
        self._places: list[tuple[int, int, int]] = []
        at = 0
        for first, end in ranges:
            self._places.append((first, end, at))
            at = align(at + end - first)
        self.num_bytes = self._places[-1][2] + ranges[-1][1] - ranges[-1][0] if ranges else 0
        """The number of bytes in a slot."""

    @classmethod
    def whole(cls, placed: PlacedUnit, but_for: Sequence[tuple[int, int]] = ()) -> Portion:
        """Everything of a unit that must be copied to the device, except some ranges, which are in order."""
        borders = [placed.start, *(border for each in but_for for border in each), placed.num_bytes]
        return cls(
            placed, [(first, end) for first, end in zip(borders[::2], borders[1::2], strict=True) if first < end]
        )

    @property
    def num_slot_bytes(self) -> int:
        """The bytes of a slot that it uses; parts of several engines may reach past the end."""
        return max(self.num_bytes, self.placed.gathered_bytes)

    def of(self, slot: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """The unit's bytes `first` to `end`, which are in one of the ranges, in a slot that holds the portion."""
        begin, _, at = next(place for place in self._places if place[0] <= first and end <= place[1])
        return slot[at + first - begin : at + end - begin]

    def pieces(self) -> list[tuple[Tier, int, torch.Tensor]]:
        """The (tier, offset in the slot, bytes) of each piece in memory that is copied into the slot."""
        pieces: list[tuple[Tier, int, torch.Tensor]] = []
        for begin, stop, at in self._places:
            for tier, first, end in self.placed.tiers():
                low, high = max(first, begin), min(end, stop)
                if low < high and tier != "disk":
                    pieces.append((tier, at + low - begin, self.placed.parts[tier][low - first : high - first]))
        return pieces

    def disk_spans(self) -> list[ByteRange]:
        """The parts that are on disk, to be read to the slot."""
        return [span for begin, stop, at in self._places for span in self.placed.disk_spans(begin, stop, at)]

    def copy_from_disk(self, io: DiskIO, target: torch.Tensor) -> None:
        """Read the disk parts into a slot at once, for a unit that is not streamed in turn."""
        memory = torch.empty(self.num_bytes, dtype=torch.uint8)
        spans = self.disk_spans()
        wait_for(io.read(spans, memory))
        for span in spans:
            size = span.end - span.first
            target[span.at : span.at + size].copy_(memory[span.at : span.at + size])
