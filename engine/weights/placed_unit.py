"""A placed unit of parameters: divided over device, host and disk."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from engine.memory.disk.file import ByteRange, DiskFile
from engine.memory.layout import Extent, Part, Split
from engine.memory.tiers import TIERS, Tier
from engine.model.unit import Unit


@dataclass(frozen=True)
class Place:
    """The location of the disk part of a parameter."""

    first: int
    """The first byte in the unit."""
    end: int
    file: DiskFile
    at: int
    """The position of `first` in the file."""
    is_adopted: bool
    """Whether the file is the checkpoint's."""

    def span(self, first: int, end: int, at: int) -> ByteRange:
        """The file range of bytes `first` to `end` of the unit that are here; `first` goes to byte `at` of a memory."""
        low, high = max(first, self.first), min(end, self.end)
        return ByteRange(self.file, self.at + low - self.first, self.at + high - self.first, at + low - first)


@dataclass(eq=False, kw_only=True)
class PlacedUnit:
    """A unit of parameters, or this engine's part of one, divided over the tiers."""

    unit: Unit
    extents: list[Extent]
    """The byte ranges of parameters in the stored bytes."""
    num_bytes: int
    """The number of stored bytes of the whole unit."""
    part: Part
    """The bytes that are placed here: all, unless parts of several engines are gathered."""
    gathered_bytes: int = 0
    """The bytes of the gathered parts of all engines in a slot: the unit, and what the last part reaches past it; 0
    if not gathered."""
    split: Split
    """The division of `part` over the tiers."""
    parts: dict[Tier, torch.Tensor]
    """The bytes on device and host; in the order of the tiers, and with the bytes on disk, they are `part`."""
    start: int
    """The first byte that must be copied to the device before use."""
    coded: frozenset[str]
    """The parameters that are stored encoded. If there are any, all but the `stacks` are decoded before use."""
    stacks: frozenset[str]
    """Those of them that are experts which are decoded some at a time, while the unit is computed."""
    expanded: list[Extent]
    """The byte ranges of the parameters that are decoded before; empty if none is encoded."""
    places: dict[str, Place] = field(default_factory=dict)
    """The file locations of the parameters' disk parts."""
    brings: frozenset[Tier] = frozenset(TIERS)
    """The tiers whose bytes this process loads."""
    missing: set[str] = field(default_factory=set)
    """The parameters of which this process loads something that has not arrived yet."""
    has_begun: bool = False
    """Whether it is decided what this process loads."""
    is_in_place: bool = False
    """Whether all have arrived."""
    complete: threading.Event = field(default_factory=threading.Event)
    """Set when all have arrived, or never will."""

    def __post_init__(self) -> None:
        self.bring(self.brings)

    @property
    def num_streamed(self) -> int:
        """The number of bytes that pass through a slot."""
        return self.num_bytes - self.start

    def bring(self, tiers: frozenset[Tier]) -> None:
        """Make this process load the bytes of `tiers`: none of their parameters has arrived."""
        self.brings = tiers
        self.missing = {extent.name for extent in self.extents if self.needs(extent)}

    def needs(self, extent: Extent) -> bool:
        """Whether this process loads anything of a parameter; for an empty one, its existence counts."""
        return (extent.first == extent.end and self.brings == frozenset(TIERS)) or any(
            max(first, extent.first) < min(end, extent.end) for tier, first, end in self.tiers() if tier in self.brings
        )

    def settle(self) -> None:
        """Note that all parameters have arrived."""
        self.is_in_place = True
        self.complete.set()

    def tiers(self) -> Iterator[tuple[Tier, int, int]]:
        """The (tier, first byte, end byte), in the unit, of each piece of `part`."""
        for tier, first, end in self.split.parts():
            yield tier, self.part.first + first, self.part.first + end

    def disk_spans(self, first: int, end: int, at: int = 0) -> list[ByteRange]:
        """The disk parts of stored bytes `first` to `end`, to be read to where `first` goes to byte `at`."""
        return [place.span(first, end, at) for place in self.places.values() if place.first < end and place.end > first]
