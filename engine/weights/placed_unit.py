"""A unit of parameters as it is placed: cut over device, host and disk."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from engine.memory.disk.file import ByteRange, DiskFile
from engine.memory.layout import Extent, Split
from engine.memory.tiers import Tier
from engine.model.unit import Unit


@dataclass(frozen=True)
class Place:
    """Where the disk part of a parameter lies."""

    first: int
    """First byte in the unit."""
    end: int
    file: DiskFile
    at: int
    """The place of `first` in the file."""
    is_adopted: bool
    """Whether the file is the checkpoint's."""

    def span(self, first: int, end: int, at: int) -> ByteRange:
        """Bytes `first` to `end` of the unit, as far as they are here; `first` belongs to byte `at` of a memory."""
        low, high = max(first, self.first), min(end, self.end)
        return ByteRange(self.file, self.at + low - self.first, self.at + high - self.first, at + low - first)


@dataclass(eq=False)
class PlacedUnit:
    """A unit of parameters, cut over the tiers."""

    unit: Unit
    extents: list[Extent]
    """Of the stored bytes."""
    split: Split
    parts: dict[Tier, torch.Tensor]
    """Bytes on device and host; together, in the order of the tiers, and with what is on disk, they are the unit."""
    start: int
    """First byte that must be brought to the device before use."""
    missing: set[str]
    """Parameters that have not arrived yet."""
    coded: frozenset[str]
    """Parameters that are stored encoded. If there are any, the whole unit is expanded before use."""
    expanded: list[Extent]
    """Where its parameters lie then; empty if none is encoded."""
    places: dict[str, Place] = field(default_factory=dict)
    """Of what parameters have on disk."""
    complete: threading.Event = field(default_factory=threading.Event)
    """Set when all have, or never will."""

    @property
    def num_streamed(self) -> int:
        """Bytes that pass through a slot."""
        return self.split.num_bytes - self.start

    def pieces(self) -> list[tuple[Tier, int, torch.Tensor]]:
        """(tier, offset in the slot, bytes) of everything in memory that is copied into the slot."""
        pieces: list[tuple[Tier, int, torch.Tensor]] = []
        for tier, first, end in self.split.parts():
            low = max(first, self.start)
            if low < end and tier != "disk":
                pieces.append((tier, low - self.start, self.parts[tier][low - first : end - first]))
        return pieces

    def disk_spans(self, first: int | None = None, end: int | None = None) -> list[ByteRange]:
        """What is on disk of the stored bytes `first` to `end`, to be read to `first`; without them, to the slot."""
        first, end = self.start if first is None else first, self.split.num_bytes if end is None else end
        return [place.span(first, end, 0) for place in self.places.values() if place.first < end and place.end > first]
