"""The Triton kernel that decodes lossless weights: stored bytes are read once, numbers written once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

_WARPS = 2


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    numbers,
    fractions,
    codes,
    tables,
    starts,
    places,
    escaped,
    size,
    num_tiles,
    room,
    half: tl.constexpr,
):
    tile, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, half)
    first = tile.to(tl.int64) * (2 * half)
    fractions += matrix * size + first
    numbers += matrix * size + first
    inside, inside_behind = at < size - first, at + half < size - first
    code = tl.load(codes + (matrix * num_tiles + tile) * half + at).to(tl.int32)
    fraction = tl.load(fractions + at, mask=inside, other=0).to(tl.int32)
    fraction_behind = tl.load(fractions + half + at, mask=inside_behind, other=0).to(tl.int32)
    table = tables + matrix * 16
    exponent = tl.load(table + (code & 15)).to(tl.int32)
    exponent_behind = tl.load(table + (code >> 4)).to(tl.int32)
    # Few tiles have an escape, so that one after the other is put in place.
    start = starts + matrix * (num_tiles + 1) + tile
    for each in range(tl.load(start), tl.load(start + 1)):
        place = tl.load(places + matrix * room + each).to(tl.int32)
        found = tl.load(escaped + matrix * room + each).to(tl.int32)
        exponent = tl.where(at == place, found, exponent)
        exponent_behind = tl.where(at + half == place, found, exponent_behind)
    bits = ((fraction & 128) << 8) | (exponent << 7) | (fraction & 127)
    bits_behind = ((fraction_behind & 128) << 8) | (exponent_behind << 7) | (fraction_behind & 127)
    tl.store(numbers + at, bits.to(tl.int16), mask=inside)
    tl.store(numbers + half + at, bits_behind.to(tl.int16), mask=inside_behind)


def expand(numbers: torch.Tensor, parts: Sequence[torch.Tensor], half: int) -> None:
    """Write the bits int16 `[matrices, size]` of numbers; parts `[matrices, …]` as `Lossless` has them.

    half: the numbers of half a tile.
    """
    count, size = numbers.shape
    num_tiles = parts[3].shape[1] - 1
    if not numbers.numel():
        return
    kernel: Any = _kernel
    grid = (num_tiles, count)
    kernel[grid](numbers, *parts, size, num_tiles, parts[4].shape[1], half=half, num_warps=_WARPS)
