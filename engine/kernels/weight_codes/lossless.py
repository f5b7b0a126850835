"""Lossless codes for bfloat16 weights, about 12.1 bits each (docs/adr/0027)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from engine.errors import UnsupportedError
from engine.kernels.fused import Fused
from engine.kernels.weight_codes.lossless_encoder import HALF, NUMBERS_PER_ESCAPE, TILE, Encoder
from engine.memory.layout import align, lay_out

_TABLE_BYTES = 16
_HOST_TILES, _DEVICE_TILES = 256, 1024
"""The most tiles that torch decodes at once: a number takes about 20 bytes then; on the host they stay in its
caches."""


@dataclass(frozen=True)
class Lossless:
    """A lossless `WeightCodec`. Each matrix, or expert, has a table of its 15 commonest exponents.

    Its parts are: a byte of sign and mantissa for each number; codes of four bits, two in a byte, for a number of a
    tile's first half (low bits) and the number `HALF` after it (high bits); the table; and for the escapes, in order,
    the start of each tile's escapes, their positions in their tiles, and their exponents. Stored bytes are the first
    parts of all matrices, then the second ones, and so on, aligned.
    """

    plain: frozenset[str] = frozenset()
    """Parameters that are not encoded because they have too many escapes."""
    rounds: ClassVar[bool] = False
    working_part: ClassVar[float] = 0.0

    def takes(self, name: str, like: torch.Tensor) -> bool:
        """Whether a parameter is bfloat16 and becomes smaller by encoding."""
        return like.dtype == torch.bfloat16 and name not in self.plain and self.num_weight_bytes(like) < like.nbytes

    def num_weight_bytes(self, like: torch.Tensor) -> int:
        """The bytes of all parts."""
        return _layout(like)[-1][1]

    def weight_ranges(self, like: torch.Tensor, first_element: int, num_elements: int) -> list[tuple[int, int]]:
        """The ranges of the six parts."""
        size = max(1, like.shape[-2:].numel())
        first, end = first_element // size, (first_element + num_elements) // size
        return [(begin + first * each, begin + end * each) for begin, _, each in _layout(like)]

    def encoded(
        self, name: str, like: torch.Tensor, first_element: int, values: torch.Tensor, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Encode on the host, where the numbers are."""
        size = max(1, like.shape[-2:].numel())
        if first_element % size or values.numel() % size:
            raise UnsupportedError(f"compress-weight: lossless: {name} comes in pieces, not by matrices; leave it out")
        with Encoder() as encoder:
            for at in range(0, values.numel(), size):
                places = [first for first, _ in self.weight_ranges(like, first_element + at, size)]
                yield from encoder.encode(name, values[at : at + size], places)

    def decode_parts(self, parts: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """Decode by a kernel where there is one, else by torch."""
        if not values.numel():
            return
        count = len(parts[2]) // _TABLE_BYTES
        whole = [*parts[:3], parts[3].view(torch.int32), parts[4].view(torch.int16), parts[5]]
        each = [part.view(count, -1) for part in whole]
        _fill(values.view(torch.int16).view(count, -1), each)


def _layout(like: torch.Tensor) -> list[tuple[int, int, int]]:
    """The first byte, the end and the bytes per matrix of each part of a parameter."""
    size = like.shape[-2:].numel()
    count = like.numel() // size if size else 0
    tiles, room = -(-size // TILE), size // NUMBERS_PER_ESCAPE
    each = (size, tiles * HALF, _TABLE_BYTES, 4 * (tiles + 1), 2 * room, room)
    extents, _ = lay_out({str(number): count * num_bytes for number, num_bytes in enumerate(each)})
    return [(extent.first, align(extent.end), num_bytes) for extent, num_bytes in zip(extents, each, strict=True)]


def _expand(numbers: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Write the bits int16 `[matrices, size]` of numbers, with torch's functions; parts are `[matrices, …]`."""
    for index, matrix in enumerate(numbers):
        _expand_matrix([part[index] for part in parts], matrix)


def _expand_matrix(parts: Sequence[torch.Tensor], numbers: torch.Tensor) -> None:
    fractions, codes, table, starts, places, escaped = parts
    num_tiles, at_once = len(starts) - 1, _tiles_at_once(numbers.device)
    for first in range(0, num_tiles, at_once):
        end = min(first + at_once, num_tiles)
        some = codes[first * HALF : end * HALF].view(-1, 1, HALF)
        both = torch.cat((some & 15, some >> 4), dim=1).flatten()
        here = slice(first * TILE, min(end * TILE, len(numbers)))
        found = table.index_select(0, both[: here.stop - here.start].int())
        numbers[here] = _bits(fractions[here], found)
    counts = starts.diff()
    at = torch.arange(num_tiles, device=starts.device).repeat_interleave(counts) * TILE
    at += places[: len(at)]
    numbers[at] = _bits(fractions[at], escaped[: len(at)])


def _tiles_at_once(device: torch.device) -> int:
    return _HOST_TILES if device.type == "cpu" else _DEVICE_TILES


def _bits(fractions: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Combine sign and mantissa with exponents to bfloat16 numbers as int16."""
    wide = fractions.to(torch.int16)
    return ((wide & 128) << 8) | (wide & 127) | (exponents.to(torch.int16) << 7)


def _kernel() -> Callable[..., None]:
    from engine.kernels.weight_codes.lossless_kernel import expand  # needs Triton

    return partial(expand, half=HALF)


_fill = Fused(_expand, _kernel)
