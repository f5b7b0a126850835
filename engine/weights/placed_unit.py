"""A unit of parameters as it is placed: cut over device, host and disk."""

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


@dataclass(eq=False, kw_only=True)
class PlacedUnit:
    """A unit of parameters, or this engine's part of one, cut over the tiers."""

    unit: Unit
    extents: list[Extent]
    """Of the stored bytes."""
    num_bytes: int
    """Stored bytes of the whole unit."""
    part: Part
    """Those that are placed here: all, unless parts of several engines are gathered."""
    gathered_bytes: int = 0
    """What the parts of all engines take in a slot: the unit, and what the last reaches past it; 0 if not gathered."""
    split: Split
    """How `part` is cut."""
    parts: dict[Tier, torch.Tensor]
    """Bytes on device and host; together, in the order of the tiers, and with what is on disk, they are `part`."""
    start: int
    """First byte that must be brought to the device before use."""
    coded: frozenset[str]
    """Parameters that are stored encoded. If there are any, all but the `stacks` are expanded before use."""
    stacks: frozenset[str]
    """Those of them that are experts whose numbers are expanded some at a time, while the unit is computed."""
    expanded: list[Extent]
    """Where the parameters lie that are expanded before; empty if none is encoded."""
    places: dict[str, Place] = field(default_factory=dict)
    """Of what parameters have on disk."""
    brings: frozenset[Tier] = frozenset(TIERS)
    """Whose bytes this process puts in place."""
    missing: set[str] = field(default_factory=set)
    """Parameters of which this process brings something that has not arrived yet."""
    has_begun: bool = False
    """Whether it is decided what this process brings."""
    is_in_place: bool = False
    """Whether all have arrived."""
    complete: threading.Event = field(default_factory=threading.Event)
    """Set when all have, or never will."""

    def __post_init__(self) -> None:
        self.bring(self.brings)

    @property
    def num_streamed(self) -> int:
        """Bytes that pass through a slot."""
        return self.num_bytes - self.start

    def bring(self, tiers: frozenset[Tier]) -> None:
        """Let this process put the bytes of `tiers` in place: of their parameters, none has arrived."""
        self.brings = tiers
        self.missing = {extent.name for extent in self.extents if self.needs(extent)}

    def needs(self, extent: Extent) -> bool:
        """Whether this process brings anything of a parameter; of one without bytes, that it is there."""
        return (extent.first == extent.end and self.brings == frozenset(TIERS)) or any(
            max(first, extent.first) < min(end, extent.end) for tier, first, end in self.tiers() if tier in self.brings
        )

    def settle(self) -> None:
        """All parameters have arrived."""
        self.is_in_place = True
        self.complete.set()

    def tiers(self) -> Iterator[tuple[Tier, int, int]]:
        """(tier, first byte, end byte), in the unit, of each piece of `part`."""
        for tier, first, end in self.split.parts():
            yield tier, self.part.first + first, self.part.first + end

    def disk_spans(self, first: int, end: int, at: int = 0) -> list[ByteRange]:
        """What is on disk of the stored bytes `first` to `end`, to be read to where `first` belongs to byte `at`."""
        return [place.span(first, end, at) for place in self.places.values() if place.first < end and place.end > first]
