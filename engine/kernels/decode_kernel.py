"""The Triton kernel that decodes 4-bit or 8-bit codes, on accelerators that have Triton.

The code that `torch.compile` makes of the same expression recomputes positions and parts for each number, which takes
longer than the memory access does, and its call keeps the host longer than a launch (docs/adr/0004).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_GROUPS_PER_PROGRAM = 64
_QUARTER = tl.constexpr(16)


@triton.jit
def _hadamard():  # type: ignore[no-untyped-def]
    """The Hadamard matrix of 16 rows as float16: 1 where row and column have an even number of ones in common."""
    common = tl.arange(0, 16)[:, None] & tl.arange(0, 16)[None, :]
    common ^= common >> 2
    common ^= common >> 1
    return (1 - 2 * (common & 1)).to(tl.float16)


@triton.jit  # type: ignore[untyped-decorator]
def _whole(code, fours, quarter: tl.constexpr, bits: tl.constexpr, bend: tl.constexpr, matrix):  # type: ignore[no-untyped-def]
    """The levels of a quarter's codes times the matrix and the quarter's multiple: integers, so all sums are exact."""
    odd = 2 * code.to(tl.int32) - (2**bits - 1)
    if bits == 4:
        odd = odd * (tl.abs(odd) + bend)
    multiple = ((fours >> (4 * quarter)) & 15) + 1
    return tl.dot(odd.to(tl.float16), matrix) * multiple.to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    groups,
    codes,
    scales,
    multiples,
    count,
    per_row,
    code_stride,
    scale_stride,
    multiple_stride,
    bits: tl.constexpr,
    bend: tl.constexpr,
    block: tl.constexpr,
):
    num_bytes: tl.constexpr = 8 * bits
    group = tl.program_id(0) * block + tl.arange(0, block)
    inside = group < count
    row, column = (group // per_row).to(tl.int64), group % per_row
    scale = tl.load(scales + row * scale_stride + column, mask=inside, other=0).to(tl.int32)
    scale = (scale << 16).to(tl.float32, bitcast=True)[:, None] * 0.125
    fours = tl.load(multiples + row * multiple_stride + column, mask=inside, other=0).to(tl.int32)
    byte = tl.arange(0, _QUARTER)[None, :]
    places = codes + (row * code_stride + column * num_bytes)[:, None] + byte
    here = inside[:, None]
    first, second = tl.load(places, mask=here, other=0), tl.load(places + 16, mask=here, other=0)
    if bits == 4:
        third, fourth = first >> 4, second >> 4
        first, second = first & 15, second & 15
    else:
        third, fourth = tl.load(places + 32, mask=here, other=0), tl.load(places + 48, mask=here, other=0)
    matrix = _hadamard()
    a = _whole(first, fours, 0, bits, bend, matrix)
    b = _whole(second, fours, 1, bits, bend, matrix)
    c = _whole(third, fours, 2, bits, bend, matrix)
    d = _whole(fourth, fours, 3, bits, bend, matrix)
    numbers = groups + group.to(tl.int64)[:, None] * (4 * _QUARTER) + byte
    kind = groups.dtype.element_ty
    tl.store(numbers, ((a + b + c + d) * scale).to(kind), mask=here)
    tl.store(numbers + 16, ((a - b + c - d) * scale).to(kind), mask=here)
    tl.store(numbers + 32, ((a + b - c - d) * scale).to(kind), mask=here)
    tl.store(numbers + 48, ((a - b - c + d) * scale).to(kind), mask=here)


def decode_into(
    groups: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, multiples: torch.Tensor, bits: int, bend: int
) -> torch.Tensor:
    """Decode into `groups` `[…, GROUP]`, contiguous, as `engine.kernels.codec` says; on the current device.

    Codes, scales and multiples are bytes `[groups, bytes of a group]`, or `[rows, groups, bytes of a group]` with any
    row stride. The result is bit-equal to that of torch's own operations.
    """
    count = groups.numel() // groups.shape[-1]
    scales, multiples = (part.view(torch.int16)[..., 0] for part in (scales, multiples))
    strides = [each.stride(0) if scales.dim() == 2 else 0 for each in (codes, scales, multiples)]
    grid = (triton.cdiv(count, _GROUPS_PER_PROGRAM),)
    kernel: Any = _kernel
    sizes = {"bits": bits, "bend": bend, "block": _GROUPS_PER_PROGRAM}
    kernel[grid](groups, codes, scales, multiples, count, scales.shape[-1], *strides, **sizes)
    return groups
