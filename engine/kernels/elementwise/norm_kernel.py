"""The Triton kernel for norms of rows of 16 bits, on accelerators that have Triton.

Written out in torch's functions a root-mean-square norm reads or writes its rows eleven times, seven of them in 32
bits; torch's kernel for layer norms reads them at half the rate of the memory. A row is summed in an order that follows
from its width alone, and rounded where torch's functions round it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 4096
"""The most elements that one program takes; a row is never split."""


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    rows,
    weight,
    bias,
    result,
    count,
    stride,
    eps,
    width: tl.constexpr,
    scaling: tl.constexpr,
    has_bias: tl.constexpr,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
):
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)[:, None]
    column = tl.arange(0, block_width)[None, :]
    inside = (row < count) & (column < width)
    numbers = tl.load(rows + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if has_bias:
        numbers = tl.where(inside, numbers - (tl.sum(numbers, 1) / width)[:, None], 0.0)
    mean = tl.sum(numbers * numbers, 1) / width
    normed = numbers * tl.rsqrt(mean + eps)[:, None]
    kind = result.dtype.element_ty
    if scaling == 0:
        scaled = normed.to(kind).to(tl.float32) * factor
    elif scaling == 1:
        scaled = normed * factor
    else:
        scaled = normed * (1.0 + factor)
    if has_bias:
        scaled += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(result + row * width + column, scaled.to(kind), mask=inside)


def norm(
    rows: torch.Tensor, weight: torch.Tensor, eps: float, scaling: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows `[…, width]` of 16 bits, with any strides, normed and scaled by weight `[width]`, on the current device.

    `eps` is added to the mean of the squares; scaling: see `engine.kernels.elementwise.norms.Scaling`. With a bias
    `[width]` and `WIDE` it is a layer norm: a row's mean is taken from it before, and the bias added at the end.
    """
    width = rows.shape[-1]
    flat = rows.reshape(-1, width)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    result = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    if not result.numel():
        return result
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, _BLOCK // block_width)
    kernel: Any = _kernel
    kernel[(triton.cdiv(len(flat), block_rows),)](
        flat,
        weight.contiguous(),
        weight if bias is None else bias.contiguous(),
        result,
        len(flat),
        flat.stride(0),
        eps,
        width=width,
        scaling=int(scaling),
        has_bias=bias is not None,
        block_rows=block_rows,
        block_width=block_width,
        num_warps=min(16, max(4, block_rows * block_width // 1024)),
    )
    return result
