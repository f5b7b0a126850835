"""bfloat16 weights in about 12.1 bits each, which come back bit for bit (docs/adr/0027)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch.nn import functional

from engine.errors import UnsupportedError
from engine.kernels.fused import Fused
from engine.memory.layout import align, lay_out

TILE = 2048
"""Numbers that one program of the kernel expands."""
HALF = TILE // 2
ESCAPE = 15
"""The code of a number whose exponent is none of the 15 commonest of its matrix."""
_EXPONENTS = 16
_NUMBERS_PER_ESCAPE = 320
"""Of a matrix, numbers for each of which there is room for one escape."""
_HOST_TILES, _DEVICE_TILES = 256, 1024
"""Encoded or expanded at once by torch: a number takes about 20 bytes meanwhile, on the host in its caches."""
_SAMPLED_PART = 0.5
"""Of the room for escapes, what those of a sample may fill."""


def room_for_escapes(size: int) -> int:
    """Escapes that a matrix of so many numbers may have."""
    return size // _NUMBERS_PER_ESCAPE


def commonest(counts: torch.Tensor) -> torch.Tensor:
    """The 15 commonest exponents uint8, in order, by how often each of the 256 occurs; the 16th is not used."""
    found = counts.cpu().sort(descending=True, stable=True).indices[:ESCAPE]
    return functional.pad(found.sort().values, (0, 1)).to(torch.uint8)


def exponents_of(values: torch.Tensor) -> torch.Tensor:
    """Exponents uint8 of bfloat16 `values`, as they are stored."""
    return (values.view(torch.int16) >> 7).to(torch.uint8)


def is_worth_it(sample: torch.Tensor) -> bool:
    """Whether a matrix that bfloat16 `sample` is taken from has few enough escapes, by far."""
    counts = torch.bincount(exponents_of(sample), minlength=256)
    escapes = int(counts.sum() - counts[commonest(counts)[:ESCAPE].long()].sum())
    return escapes <= _SAMPLED_PART / _NUMBERS_PER_ESCAPE * sample.numel()


@dataclass(frozen=True)
class Lossless:
    """A `WeightCodec`. Each matrix, or expert, has a table of its 15 commonest exponents.

    Its parts: sign and mantissa of each number, a byte; codes of four bits, of which a byte holds that of a number of a
    tile's first half in its low bits, and that of the number `HALF` behind it in its high bits; the table; and of the
    escapes, in order, where those of each tile begin, their places in their tiles, and their exponents. Stored bytes
    are the first parts of all matrices, then the second ones, and so on, aligned.
    """

    plain: frozenset[str] = frozenset()
    """Parameters that stay as they are: they have too many escapes."""
    rounds: ClassVar[bool] = False
    working_part: ClassVar[float] = 0.0

    def takes(self, name: str, like: torch.Tensor) -> bool:
        """Of bfloat16, what becomes smaller by it."""
        return like.dtype == torch.bfloat16 and name not in self.plain and self.num_weight_bytes(like) < like.nbytes

    def num_weight_bytes(self, like: torch.Tensor) -> int:
        """All parts."""
        return _layout(like)[-1][1]

    def weight_ranges(self, like: torch.Tensor, first_element: int, num_elements: int) -> list[tuple[int, int]]:
        """Of the six parts."""
        size = max(1, like.shape[-2:].numel())
        first, end = first_element // size, (first_element + num_elements) // size
        return [(begin + first * each, begin + end * each) for begin, _, each in _layout(like)]

    def encoded(
        self, name: str, like: torch.Tensor, first_element: int, values: torch.Tensor, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """A chunk after the other; the table is found before, of all numbers of a matrix."""
        size = max(1, like.shape[-2:].numel())
        if first_element % size or values.numel() % size:
            raise UnsupportedError(f"compress-weight: lossless: {name} comes in pieces, not by matrices; leave it out")
        for at in range(0, values.numel(), size):
            places = [first for first, _ in self.weight_ranges(like, first_element + at, size)]
            yield from _encoded(name, values[at : at + size], places, device)

    def decode_parts(self, parts: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """By a kernel, where there is one, else by torch."""
        if not values.numel():
            return
        count = len(parts[2]) // _EXPONENTS
        whole = [*parts[:3], parts[3].view(torch.int32), parts[4].view(torch.int16), parts[5]]
        each = [part.view(count, -1) for part in whole]
        _fill(values.view(torch.int16).view(count, -1), each)


def _layout(like: torch.Tensor) -> list[tuple[int, int, int]]:
    """First byte, end and bytes for each matrix of the parts of a parameter."""
    size = like.shape[-2:].numel()
    count = like.numel() // size if size else 0
    tiles, room = -(-size // TILE), room_for_escapes(size)
    each = (size, tiles * HALF, _EXPONENTS, 4 * (tiles + 1), 2 * room, room)
    extents, _ = lay_out({str(number): count * num_bytes for number, num_bytes in enumerate(each)})
    return [(extent.first, align(extent.end), num_bytes) for extent, num_bytes in zip(extents, each, strict=True)]


def _encoded(
    name: str, values: torch.Tensor, places: Sequence[int], device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    """Stored bytes of a matrix, whose parts begin at `places`."""
    size, chunk = values.numel(), _tiles_at_once(device) * TILE

    def chunks() -> Iterator[tuple[int, torch.Tensor]]:
        for at in range(0, size, chunk):
            yield at, values[at : at + chunk].to(device).to(torch.bfloat16)

    counts = [torch.bincount(exponents_of(part), minlength=256) for _, part in chunks()]
    table = commonest(torch.stack(counts).sum(0))
    code_of = torch.full((256,), ESCAPE, dtype=torch.uint8)
    code_of[table[:ESCAPE].long()] = torch.arange(ESCAPE, dtype=torch.uint8)
    code_of = code_of.to(device)
    num_escapes: list[torch.Tensor] = [torch.zeros(1, dtype=torch.int64)]
    escapes: list[tuple[torch.Tensor, torch.Tensor]] = []
    for at, part in chunks():
        bits, exponents = part.view(torch.int16), exponents_of(part)
        yield places[0] + at, ((bits & 127) | ((bits >> 8) & 128)).to(torch.uint8).cpu()
        codes = code_of.index_select(0, exponents.int())
        (found,) = (codes == ESCAPE).nonzero(as_tuple=True)
        num_escapes.append(torch.bincount(found // TILE, minlength=-(-len(part) // TILE)).cpu())
        escapes.append(((found % TILE).to(torch.int16).cpu(), exponents[found].cpu()))
        tiles = functional.pad(codes, (0, -len(codes) % TILE)).view(-1, 2, HALF)
        yield places[1] + at // 2, (tiles[:, 0] | (tiles[:, 1] << 4)).flatten().cpu()
    starts = torch.cat(num_escapes).cumsum(0).to(torch.int32)
    if int(starts[-1]) > room_for_escapes(size):
        raise UnsupportedError(
            f"compress-weight: lossless: {name} has {int(starts[-1]):,} of {size:,} numbers whose exponent is none of "
            f"the 15 commonest, and room for {room_for_escapes(size):,}; leave compress-weight out"
        )
    yield places[2], table
    yield places[3], starts.view(torch.uint8)
    yield places[4], torch.cat([place for place, _ in escapes]).view(torch.uint8)
    yield places[5], torch.cat([exponent for _, exponent in escapes])


def _expand(numbers: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Write the bits int16 `[matrices, size]` of numbers, by torch's functions; parts are `[matrices, …]`."""
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
    """Numbers as int16, of sign and mantissa, and of exponents."""
    wide = fractions.to(torch.int16)
    return ((wide & 128) << 8) | (wide & 127) | (exponents.to(torch.int16) << 7)


def _kernel() -> Callable[..., None]:
    from engine.kernels.weight_codes.lossless_kernel import expand  # needs Triton

    return partial(expand, half=HALF)


_fill = Fused(_expand, _kernel)
