"""The Triton kernel that encodes numbers, on accelerators that have Triton.

It adds in the order of torch's operations, except for the errors by which it chooses a multiple: where two nearly tie,
it may choose either.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_GROUPS_PER_PROGRAM = 16
_MULTIPLES = tl.constexpr(16)


@triton.jit  # type: ignore[untyped-decorator]
def _rotated(numbers, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `[block, 64]` times the Hadamard matrix over 8."""
    place = tl.broadcast_to(tl.arange(0, 64)[None, :], (block, 64))
    for stage in tl.static_range(6):
        other = tl.gather(numbers, place ^ (32 >> stage), axis=1)
        numbers = tl.where((place & (32 >> stage)) == 0, numbers + other, other - numbers)
    return numbers * 0.125


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    groups,
    codes,
    scales,
    multiples,
    count,
    bits: tl.constexpr,
    bend: tl.constexpr,
    block: tl.constexpr,
):
    levels: tl.constexpr = 2**bits - 1
    top: tl.constexpr = levels * (bend + levels) if bits == 4 else levels
    group = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = (group < count)[:, None]
    places = group[:, None] * 64 + tl.arange(0, 64)[None, :]
    numbers = _rotated(tl.load(groups + places, mask=inside, other=0).to(tl.float32), block)
    quarters = tl.reshape(numbers, (block, 4, 16))
    largest = tl.max(tl.abs(quarters), axis=2)
    # A greatest number may pass over a NaN, a sum does not.
    greatest = tl.max(largest, axis=1) + tl.sum(numbers * 0, axis=1)
    scale = tl.div_rn(greatest, tl.full((block,), top * _MULTIPLES, tl.float32))
    stored = scale.to(tl.int32, bitcast=True)
    stored = (stored + 0x7FFF + ((stored >> 16) & 1)) >> 16
    stored = tl.where(stored < 0x80, 0, stored)  # less than the least normal number
    stored = tl.where(scale == scale, stored, 0x7FC0)  # a NaN whose bits would overflow
    scale = (stored << 16).to(tl.float32, bitcast=True)
    one = tl.full((block,), 1.0, tl.float32)
    whole = tl.where(stored == 0, 0.0, tl.div_rn(one, scale))[:, None]
    nearest = tl.floor(tl.div_rn(largest * whole, tl.full((block, 4), top, tl.float32)) + 0.5)
    odd, multiple, least = quarters, largest, largest
    for index in tl.static_range(3):
        tried = tl.minimum(tl.maximum(nearest + (index // 2 - index % 2), 1.0), 16.0)  # and 0, -1, 1
        wanted = quarters * tl.div_rn(tl.broadcast_to(whole, (block, 4)), tried)[:, :, None]
        size = tl.abs(wanted)
        if bits == 4:
            size = tl.sqrt_rn(tl.maximum(size - 1, 0.0) + bend * bend / 4) - bend / 2
        found = tl.minimum(tl.maximum(tl.floor(size / 2), 0.0), (levels - 1) / 2) * 2 + 1
        found = tl.where(wanted < 0, -found, found)
        if bits == 4:
            reached = found * (tl.abs(found) + bend)
        else:
            reached = found
        apart = quarters - reached * (tried * scale[:, None])[:, :, None]
        error = tl.sum(apart * apart, axis=2)
        if index == 0:
            odd, multiple, least = found, tried, error
        else:
            better = error < least
            odd = tl.where(better[:, :, None], found, odd)
            multiple, least = tl.where(better, tried, multiple), tl.where(better, error, least)
    code = ((odd + levels) / 2).to(tl.int32)
    if bits == 4:
        low, high = tl.split(tl.permute(tl.reshape(code, (block, 2, 32)), (0, 2, 1)))
        byte = group[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(codes + byte, (low | (high << 4)).to(tl.uint8), mask=inside)
    else:
        tl.store(codes + places, tl.reshape(code, (block, 64)).to(tl.uint8), mask=inside)
    tl.store(scales + group, stored.to(tl.int16), mask=group < count)
    fours = multiple.to(tl.int32) - 1
    shifted = tl.sum(fours << (4 * tl.arange(0, 4))[None, :], axis=1)
    tl.store(multiples + group, shifted.to(tl.int16), mask=group < count)


def encode(groups: torch.Tensor, bits: int, bend: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode `groups` `[…, GROUP]` to bytes `[…, bytes of a group]` of codes, scales and multiples, as in the codec."""
    shape, groups = groups.shape[:-1], groups.contiguous()
    codes = torch.empty(*shape, groups.shape[-1] * bits // 8, dtype=torch.uint8, device=groups.device)
    scales, multiples = torch.empty(2, *shape, 1, dtype=torch.int16, device=groups.device)
    kernel: Any = _kernel
    grid = (triton.cdiv(scales.numel(), _GROUPS_PER_PROGRAM),)
    if scales.numel():
        kernel[grid](groups, codes, scales, multiples, scales.numel(), bits=bits, bend=bend, block=_GROUPS_PER_PROGRAM)
    return codes, scales.view(torch.uint8), multiples.view(torch.uint8)
