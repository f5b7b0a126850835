"""The Triton kernel for rotary embeddings of states of 16 bits, on accelerators that have Triton.

Written out in torch's functions, queries or keys are read or written ten times by five functions. Numbers are rounded
where torch's functions round them, and depend on their own row alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_LINES = 32
"""Heads of rows that one program takes."""


@triton.jit(do_not_specialize=["lines"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    states,
    cos,
    sin,
    result,
    lines,
    head_stride,
    row_stride,
    step,
    cos_stride,
    sin_stride,
    heads: tl.constexpr,
    half: tl.constexpr,
    is_wide: tl.constexpr,
    tile_lines: tl.constexpr,
    tile_half: tl.constexpr,
):
    line = (tl.program_id(0) * tile_lines + tl.arange(0, tile_lines)).to(tl.int64)[:, None]
    column = tl.arange(0, tile_half)[None, :]
    inside = (line < lines) & (column < half)
    row, head = line // heads, line % heads
    kind = result.dtype.element_ty
    place = states + row * row_stride + head * head_stride + column * step
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half * step, mask=inside, other=0.0).to(tl.float32)
    cosines, sines = cos + row * cos_stride + column, sin + row * sin_stride + column
    first_cos = tl.load(cosines, mask=inside, other=0.0).to(tl.float32)
    first_sin = tl.load(sines, mask=inside, other=0.0).to(tl.float32)
    if is_wide:
        second_cos = tl.load(cosines + half, mask=inside, other=0.0).to(tl.float32)
        second_sin = tl.load(sines + half, mask=inside, other=0.0).to(tl.float32)
    else:
        second_cos, second_sin = first_cos, first_sin
    # Each product is rounded before the sum.
    turned = (first * first_cos).to(kind).to(tl.float32) + (-second * first_sin).to(kind).to(tl.float32)
    other = (second * second_cos).to(kind).to(tl.float32) + (first * second_sin).to(kind).to(tl.float32)
    target = result + line * (2 * half) + column
    tl.store(target, turned.to(kind), mask=inside)
    tl.store(target + half, other.to(kind), mask=inside)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotated` of states `[1, heads, rows, dim]` with any strides; of the result, heads of a row lie side by side.

    cos and sin `[1, rows, dim or half of it]`, whose numbers lie side by side.
    """
    _, heads, rows, dim = states.shape
    result = torch.empty(1, rows, heads, dim, dtype=states.dtype, device=states.device)
    if result.numel():
        kernel: Any = _kernel
        kernel[(triton.cdiv(rows * heads, _LINES),)](
            states,
            cos,
            sin,
            result,
            rows * heads,
            *states.stride()[1:],
            cos.stride(1),
            sin.stride(1),
            heads=heads,
            half=dim // 2,
            is_wide=cos.shape[-1] == dim,
            tile_lines=_LINES,
            tile_half=triton.next_power_of_2(dim // 2),
        )
    return result.transpose(1, 2)
