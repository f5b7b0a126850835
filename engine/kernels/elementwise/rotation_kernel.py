"""The Triton kernel for rotary position embeddings in 16 bits, on accelerators that have Triton.

With torch's functions the rotation of queries and keys takes ten kernels or more, which read and write them five times.
Here it is one kernel, and it rounds where torch's functions round.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 2048
"""The number of elements that one program rotates."""


@triton.jit(do_not_specialize=["count", "query_heads"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    cosine,
    sine,
    query_result,
    key_result,
    count,
    query_heads,
    query_row,
    query_head,
    key_row,
    key_head,
    key_heads,
    cosine_row,
    sine_row,
    dim: tl.constexpr,
    turned: tl.constexpr,
    per_pair: tl.constexpr,
    block_rows: tl.constexpr,
    block_dim: tl.constexpr,
):
    head = tl.program_id(1)
    is_query = head < query_heads
    own = tl.where(is_query, head, head - query_heads)
    source = query if is_query else key
    result = query_result if is_query else key_result
    row_stride = tl.where(is_query, query_row, key_row)
    head_stride = tl.where(is_query, query_head, key_head)
    heads = tl.where(is_query, query_heads, key_heads)
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)[:, None]
    column = tl.arange(0, block_dim)[None, :]
    inside = (row < count) & (column < dim)
    is_turned = inside & (column < turned)
    half: tl.constexpr = turned // 2
    other = tl.where(column < half, column + half, column - half)
    begin = source + row * row_stride + own * head_stride
    number = tl.load(begin + column, mask=inside, other=0.0)
    kind = number.dtype
    number = number.to(tl.float32)
    beside = tl.load(begin + other, mask=is_turned, other=0.0).to(tl.float32)
    beside = tl.where(column < half, -beside, beside)
    at = tl.where((column < half) | (per_pair == 2), column, column - half)
    along = tl.load(cosine + row * cosine_row + at, mask=is_turned, other=0.0).to(tl.float32)
    across = tl.load(sine + row * sine_row + at, mask=is_turned, other=0.0).to(tl.float32)
    found = (number * along).to(kind).to(tl.float32) + (beside * across).to(kind).to(tl.float32)
    found = tl.where(column < turned, found, number)
    tl.store(result + (row * heads + own) * dim + column, found.to(kind), mask=inside)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, per_pair: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate as `rotations.rotated` does; results are stored row by row, as projections give queries and keys.

    All four tensors have 16 bits and one dtype, are on the current device, and are contiguous in the last dimension.
    """
    _, query_heads, count, dim = query.shape
    key_heads = key.shape[1]
    results = tuple(
        torch.empty(1, count, heads, dim, dtype=query.dtype, device=query.device).transpose(1, 2)
        for heads in (query_heads, key_heads)
    )
    if not count:
        return results[0], results[1]
    block_dim = triton.next_power_of_2(dim)
    block_rows = max(1, _BLOCK // block_dim)
    kernel: Any = _kernel
    kernel[(triton.cdiv(count, block_rows), query_heads + key_heads)](
        query,
        key,
        cosine,
        sine,
        *results,
        count,
        query_heads,
        query.stride(2),
        query.stride(1),
        key.stride(2),
        key.stride(1),
        key_heads,
        cosine.stride(1),
        sine.stride(1),
        dim=dim,
        turned=cosine.shape[-1] * 2 // per_pair,
        per_pair=per_pair,
        block_rows=block_rows,
        block_dim=block_dim,
        num_warps=4,
        enable_fp_fusion=False,  # else a product and the sum with it are one operation of 16 bits, rounded once
    )
    return results[0], results[1]
