"""The Triton kernel that turns codes of 4 or 8 bits into numbers, on accelerators that have Triton.

What `torch.compile` makes of the same expression computes places and parts anew for each number, which takes longer
than the memory does, and a call of it keeps the host longer than a launch (docs/adr/0004).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_GROUPS_PER_PROGRAM = 64


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    groups,
    codes,
    steps,
    leasts,
    count,
    per_row,
    code_stride,
    scale_stride,
    bits: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
):
    num_bytes: tl.constexpr = size * bits // 8
    group = tl.program_id(0) * block + tl.arange(0, block)
    inside = group < count
    row, column = (group // per_row).to(tl.int64), group % per_row
    step = tl.load(steps + row * scale_stride + column, mask=inside, other=0).to(tl.float32)[:, None]
    least = tl.load(leasts + row * scale_stride + column, mask=inside, other=0).to(tl.float32)[:, None]
    byte = tl.arange(0, num_bytes)[None, :]
    places = (row * code_stride + column * num_bytes)[:, None] + byte
    code = tl.load(codes + places, mask=inside[:, None], other=0)
    numbers = groups + group.to(tl.int64)[:, None] * size + byte
    # A code times a 16 bit step is exact in 32 bits, so it does not matter whether the sum is fused with it.
    if bits == 4:
        low, high = (code & 15).to(tl.float32), (code >> 4).to(tl.float32)
        tl.store(numbers, (least + low * step).to(groups.dtype.element_ty), mask=inside[:, None])
        tl.store(numbers + num_bytes, (least + high * step).to(groups.dtype.element_ty), mask=inside[:, None])
    else:
        tl.store(numbers, (least + code.to(tl.float32) * step).to(groups.dtype.element_ty), mask=inside[:, None])


def decode_into(
    groups: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor, leasts: torch.Tensor, bits: int
) -> torch.Tensor:
    """Fill `groups` `[…, GROUP]`, which has no gaps, as `engine.codec` says; on the current device.

    Codes are uint8 `[groups, bytes]`, or `[rows, groups, bytes]` whose rows may lie apart; steps and leasts, of the
    numbers' dtype, are `[groups]` or `[rows, groups]`, whose rows lie apart equally. Bit for bit what torch's own
    operations give in 16 bits.
    """
    count, per_row = steps.numel(), steps.shape[-1]
    strides = (codes.stride(0), steps.stride(0)) if steps.dim() == 2 else (0, 0)
    grid = (triton.cdiv(count, _GROUPS_PER_PROGRAM),)
    kernel: Any = _kernel
    sizes = {"bits": bits, "size": groups.shape[-1], "block": _GROUPS_PER_PROGRAM}
    kernel[grid](groups, codes, steps, leasts, count, per_row, *strides, **sizes)
    return groups
