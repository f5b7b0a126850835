"""The Triton kernel that decodes codes with scales, on accelerators that have Triton.

Codes and scales are read once and numbers are written once, along whichever dimension of the target is contiguous. With
torch's functions numbers are read and written some ten times, most of them in 32 bits (docs/adr/0006).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.packed.coded import Coded, Codes

_TILE_ROWS, _TILE_BYTES = 64, 64
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_E2M1, _INT4, _E4M3 = (tl.constexpr(int(codes)) for codes in (Codes.E2M1, Codes.INT4, Codes.E4M3))


@triton.jit  # type: ignore[untyped-decorator]
def _float_of(code, mantissa_bits: tl.constexpr, bias: tl.constexpr, sign: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert a small float's bits (int32, with `sign` the highest bit) to float32; subnormal numbers are supported."""
    magnitude = code & (sign - 1)
    exponent, mantissa = magnitude >> mantissa_bits, magnitude & ((1 << mantissa_bits) - 1)
    normal = ((exponent + (127 - bias)) << 23) | (mantissa << (23 - mantissa_bits))
    least: tl.constexpr = 2.0 ** (1 - bias - mantissa_bits)
    small = (mantissa.to(tl.float32) * least).to(tl.int32, bitcast=True)
    bits = tl.where(exponent == 0, small, normal)
    return tl.where(code >= sign, bits | -2147483648, bits).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    codes,
    scales,
    target,
    rows,
    columns,
    num_bytes,
    code_matrix,
    code_row,
    scale_matrix,
    scale_row,
    target_matrix,
    target_row,
    target_column,
    kind: tl.constexpr,
    has_exponents: tl.constexpr,
    rounds_to: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_bytes: tl.constexpr,
):
    per_byte: tl.constexpr = 1 if kind == _E4M3 else 2
    row = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
    byte = (tl.program_id(1) * tile_bytes + tl.arange(0, tile_bytes))[None, :]
    matrix = tl.program_id(2).to(tl.int64)
    inside = (row < rows) & (byte < num_bytes)
    code = tl.load(codes + matrix * code_matrix + row * code_row + byte, mask=inside, other=0).to(tl.int32)
    # Numbers of a byte have one scale: blocks are of even widths.
    places = matrix * scale_matrix + (row // block_rows) * scale_row + byte * per_byte // block_columns
    scale = tl.load(scales + places, mask=inside, other=0)
    if has_exponents:
        exponent = scale.to(tl.int32)
        bits = tl.where(exponent == 0, 0x00400000, exponent << 23)  # the least is no normal number
        factor = tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        factor = scale.to(rounds_to).to(tl.float32)
    if kind == _E4M3:
        number = _float_of(code, 3, 7, 128)
        number = tl.where((code & 127) == 127, float("nan"), number)
        numbers = number * factor
    else:
        low, high = code & 15, code >> 4
        if kind == _INT4:
            first, second = (low - 8).to(tl.float32), (high - 8).to(tl.float32)
        else:
            first, second = _float_of(low, 1, 1, 8), _float_of(high, 1, 1, 8)
        numbers = tl.interleave(first * factor, second * factor)
    column = (tl.program_id(1) * tile_bytes * per_byte + tl.arange(0, tile_bytes * per_byte)).to(tl.int64)[None, :]
    stored = target + matrix * target_matrix + row * target_row + column * target_column
    numbers = numbers.to(rounds_to).to(target.dtype.element_ty)
    tl.store(stored, numbers, mask=(row < rows) & (column < columns))


def expand(coded: Coded, matrices: torch.Tensor) -> None:
    """Decode into `matrices` `[matrices, rows, columns]`, with any strides, on the current device.

    The result is bit-equal to that of torch's functions, except for scales below 2^-126 where a device flushes them to
    zero.
    """
    count, rows, columns = matrices.shape
    num_bytes = coded.codes.shape[-1]
    if not matrices.numel():
        return
    grid = (triton.cdiv(rows, _TILE_ROWS), triton.cdiv(num_bytes, _TILE_BYTES), count)
    kernel: Any = _kernel
    kernel[grid](
        coded.codes,
        coded.scales,
        matrices,
        rows,
        columns,
        num_bytes,
        *coded.codes.stride()[:2],
        *coded.scales.stride()[:2],
        *matrices.stride(),
        kind=int(coded.kind),
        has_exponents=coded.scales.dtype is torch.uint8,
        rounds_to=_TYPES[coded.rounds_to],
        block_rows=coded.block[0],
        block_columns=coded.block[1],
        tile_rows=_TILE_ROWS,
        tile_bytes=_TILE_BYTES,
    )
