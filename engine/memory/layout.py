"""The layout of a unit's bytes: its parts by tier, and the offsets of its parameters (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory.tiers import Tier
from engine.policy import Share

ALIGNMENT = 64
"""The alignment, in bytes, of parameters and tier borders inside a unit."""

_PART_ALIGNMENT = 512
"""The alignment, in bytes, of the parts of a unit that several engines hold: the best one for GPU copies."""


def align(num_bytes: int) -> int:
    """Round up to the alignment of parameters."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The byte range of one parameter in its unit."""

    name: str
    first: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """The sizes in bytes of a unit's device part, host part and disk part, in this order."""

    device: int
    host: int
    disk: int

    @property
    def num_bytes(self) -> int:
        """The size of the unit in bytes."""
        return self.device + self.host + self.disk

    def parts(self) -> tuple[tuple[Tier, int, int], ...]:
        """The (tier, first byte, end byte) of each part."""
        host_end = self.device + self.host
        return ("device", 0, self.device), ("host", self.device, host_end), ("disk", host_end, self.num_bytes)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The bytes of a unit that one engine holds."""

    first: int
    end: int

    @property
    def num_bytes(self) -> int:
        """The number of bytes."""
        return self.end - self.first


def part_bytes(num_bytes: int, count: int) -> int:
    """The bytes of each of `count` equal parts that cover a unit; the last may reach past its end."""
    return -(-num_bytes // (count * _PART_ALIGNMENT)) * _PART_ALIGNMENT


def part_of(num_bytes: int, index: int, count: int) -> Part:
    """Part `index` of `count` of a unit, cut off at the unit's end."""
    size = part_bytes(num_bytes, count)
    return Part(first=min(num_bytes, index * size), end=min(num_bytes, (index + 1) * size))


def split_bytes(num_bytes: int, share: Share, row_bytes: int = ALIGNMENT) -> Split:
    """Cut `num_bytes` by the percents of `share`, at the nearest multiples of `row_bytes`."""
    device = min(num_bytes, round(num_bytes * share.gpu / 100 / row_bytes) * row_bytes)
    end = min(num_bytes, round(num_bytes * (share.gpu + share.cpu) / 100 / row_bytes) * row_bytes)
    if share.disk == 0:
        end = num_bytes
        if share.cpu == 0:
            device = num_bytes
    host = max(0, end - device)
    return Split(device=device, host=host, disk=num_bytes - device - host)


def lay_out(sizes: dict[str, int]) -> tuple[list[Extent], int]:
    """Place parameters one after the other, aligned; returns their extents and the size of the unit."""
    extents, first = [], 0
    for name, size in sizes.items():
        extents.append(Extent(name=name, first=first, end=first + size))
        first = align(first + size)
    return extents, first


def streamed_from(extents: list[Extent], split: Split) -> int:
    """The first byte that must be copied to the device: the start of the first parameter not wholly there."""
    return next((extent.first for extent in extents if extent.end > split.device), split.num_bytes)
